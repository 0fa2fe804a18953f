#!/usr/bin/env bash
# One step of a session on a GPU machine; every step ends within ten minutes and leaves in $OUT what it measured.
# usage: [VLM_BENCH_COMMIT=…] bash scripts/gpu/step.sh STEP…     (steps: see the functions)
set -uo pipefail
cd "$(dirname "$0")/../.."
. scripts/gpu/env.sh || exit 1
: "${OUT:?}"
mkdir -p /tmp/vlm-batch-kept
kept=/tmp/vlm-batch-kept

bench() { # FILE ARGUMENTS…: rows go to $OUT/FILE at once, and are kept for later steps
  local file=$1; shift
  python3 scripts/bench.py --results "$OUT/$file" "$@"
  echo "[$(date +%T)] bench ended with $?: $*"
  cat "$OUT/$file" >>"$kept/$file" 2>/dev/null
}

tests() { # parity on the device
  timeout 60 python3 -m pytest -q -p no:cacheprovider tests/kernels/test_fused_kernels.py 2>&1 | tee "$OUT/kernels.log"
  timeout 300 python3 -m pytest -q -m gpu -n 8 --dist loadfile --timeout 300 -p no:cacheprovider $(grep -rl "mark.gpu" tests) 2>&1 | tee "$OUT/tests.log"
}
smoke() { # half a minute: everything starts, nothing is recorded for keeps
  bench smoke.jsonl --shape 7b --work caption:1 --rows 96 --roofline --name smoke
}
ready() { bench ready.jsonl --shape 7b --ready --reps 3; }
ready_fp8() { bench ready.jsonl --shape 7b --ready --reps 3 --quantization fp8; }
bf16() { # about 6 minutes
  bench bf16.jsonl --shape 7b --work caption:3,mixed:3,vqa:3,prefix:3,ocr:1 --roofline --seconds 480
}
ocr() { bench bf16.jsonl --shape 7b --work ocr:3 --roofline; }
fp8() { # about 4 minutes
  bench fp8.jsonl --shape 7b --quantization fp8 \
    --work caption:3,mixed:3,vqa:3,prefix:3,ocr:1 --roofline --seconds 480 "$@"
}
fp8_cache() { fp8 --set engine.kv_cache=fp8; } # keys and values in float8 too
fp8_error() { # logits of fp8 beside bf16's; right answers lost by the model that ships
  for model in demo /dev/shm/vlm-batch-7b; do
    python3 scripts/bench/fp8.py --model "$model" --rows "$([ "$model" = demo ] && echo 200 || echo 8)" \
      --results "$OUT/fp8_error.jsonl"
  done
}
feeder() { # the host alone, on this machine's cores
  python3 scripts/bench/feeder.py --workers 14 --images 3000 --results "$OUT/feeder.jsonl"
}
job() { bench job.jsonl --shape 7b --work caption --through job; }
small() { # the 3B shapes
  bench small.jsonl --shape 3b --work caption:3,mixed:3 --roofline --seconds 240
  rm -rf /dev/shm/vlm-batch-3b
}
families() { # published sizes of other families; FAMILIES="kimi-vl-a3b llava-next-72b" QUANT=fp8
  local name quant=${QUANT:-none}
  for name in ${FAMILIES:-janus-pro-1b deepseek-vl2-tiny kimi-vl-a3b}; do
    bench families.jsonl --published "$name" --quantization "$quant" --work "${WORK:-caption:2}" --rows "${ROWS:-256}" \
      --roofline --name "caption/$name$([ "$quant" = none ] || echo "/$quant")" ${ARGS:-}
  done
}
card24() { # as on a card of 24 GB; the weights take 16.6 of them
  bench card24.jsonl --shape 7b --work caption:2 --memory-limit 24 --name caption/24gb
}
steady() { # many more rows than lanes: how full they are while work waits
  bench steady.jsonl --shape 7b --work mixed:1 --rows 2048 --roofline --set engine.decode_slots=256 --name mixed/steady
}
deterministic() { # what the same bits in every batch cost
  bench deterministic.jsonl --shape 7b --work caption:2,mixed:2 --set engine.deterministic=true --name deterministic
}
plain() { # what the recorded step and the overlap bring
  bench plain.jsonl --shape 7b --work caption:1 --set engine.overlap=false --name caption/plain-loop
}
unpack() { # .vllm/0, .vllm/1, … came with this call and the calls before
  [ -e /tmp/vllm/.unpacked ] && return 0
  bash .vllm/0/unpack_vllm.sh .vllm /tmp/vllm && touch /tmp/vllm/.unpacked && du -sh /tmp/vllm
}
vllm() { # about 9 minutes with unpack; the first start compiles
  unpack || return 1
  peer "${VLLM_WORK:-caption:3,mixed:3,vqa:3,prefix:3,ocr:1}" "${VLLM_SECONDS:-530}"
}
vllm_ocr() { # two more repetitions of the pages, those that `vllm` had no time for
  peer ocr:2 400 --seed 987
}
peer() { # WORK SECONDS ARGUMENTS…
  local work=$1 seconds=$2; shift 2
  [ -d /dev/shm/vlm-batch-7b ] || bench write.jsonl --shape 7b --rows 1 --write-parquet /tmp/one.parquet
  PYTHONPATH=/tmp/vllm/site:/tmp/vllm/vllm:$PWD timeout 590 python3 scripts/bench/peer_vllm.py \
    --model /dev/shm/vlm-batch-7b --work "$work" --seconds "$seconds" --out "$OUT/vllm.jsonl" "$@" \
    2>&1 | tee "$OUT/vllm.log" | grep -E '"peer"|started|no time|rror'
  cat "$OUT/vllm.jsonl" >>"$kept/vllm.jsonl"
}

for step in "$@"; do
  declare -F "$step" >/dev/null || { echo "no step $step"; exit 2; }
  echo "[$(date +%T)] $step"
  "$step"
done
echo "[$(date +%T)] done"
