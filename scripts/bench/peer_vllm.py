"""vLLM on the benchmark's own rows: one engine for all workloads, one JSON line a repetition.

    PYTHONPATH=/tmp/vllm/site:/tmp/vllm/vllm:. python3 scripts/bench/peer_vllm.py \\
        --model /dev/shm/vlm-batch-7b --work caption:3,mixed:3,vqa:3,prefix:3,ocr:1 --out vllm.jsonl

Makes the workloads from the same names and seeds as `scripts/bench.py`, so both see the same bytes
and the same answer lengths. Each line is written as soon as it is measured. Weights are vLLM's
own dummies: the folder's config and tokenizer are enough.
"""

from __future__ import annotations

import argparse
import io
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))

from scripts.bench import results, workloads  # noqa: E402

DECODE_THREADS = 16
WARMUPS = (("mixed", 96, 999), ("caption", 96, 998))
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder with config and tokenizer of Qwen2.5-VL")
    add("--work", default=",".join(workloads.NAMES), help="NAME or NAME:REPETITIONS; commas")
    add("--rows", type=int, default=512, help="answers in one repetition")
    add("--reps", type=int, default=3, help="where --work names none")
    add("--seed", type=int, default=10, help="as scripts/bench.py")
    add("--slots", type=int, default=256, help="max_num_seqs")
    add("--prefill-tokens", type=int, default=16384, help="max_num_batched_tokens")
    add("--max-len", type=int, default=4096)
    add("--quantization", default=None, help="none by default; fp8")
    add("--seconds", type=float, default=540, help="start no repetition that would end later")
    add("--no-warmup", action="store_true", help="measure from the first row on")
    add("--out", type=Path, required=True, help="JSON lines are appended to it")
    return parser.parse_args()


def prompt_text(question: str, system: str) -> str:
    """Qwen2.5-VL's prompt as its template writes it, with one image before the question."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def repetition(engine: Any, load: workloads.Workload) -> dict[str, Any]:
    """Seconds from encoded bytes to text, and the tokens read and written."""
    from vllm import SamplingParams

    started = time.perf_counter()
    with ThreadPoolExecutor(DECODE_THREADS) as pool:
        images = list(pool.map(_decode, load.images))
    asked, limits = [], []
    for image, tokens in zip(images, load.output_tokens, strict=True):
        for question in load.prompts.values():
            text = prompt_text(question, load.system)
            asked.append({"prompt": text, "multi_modal_data": {"image": image}})
            limits.append(SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0))
    answers = engine.generate(asked, limits, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {
        "seconds": round(seconds, 3),
        "rows_per_s": round(load.num_answers / seconds, 3),
        "prompt_tokens": sum(len(answer.prompt_token_ids) for answer in answers),
        "output_tokens": sum(len(answer.outputs[0].token_ids) for answer in answers),
    }


def _decode(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def start_engine(args: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """The engine, and what each line says of it."""
    import vllm

    started = time.perf_counter()
    engine = vllm.LLM(
        model=args.model,
        load_format="dummy",
        max_model_len=args.max_len,
        max_num_seqs=args.slots,
        max_num_batched_tokens=args.prefill_tokens,
        gpu_memory_utilization=0.9,
        limit_mm_per_prompt={"image": 1, "video": 0},
        quantization=args.quantization,
        seed=0,
    )
    about = {
        "peer": "vllm",
        "version": vllm.__version__,
        "start_s": round(time.perf_counter() - started, 1),
        "slots": args.slots,
        "prefill_tokens": args.prefill_tokens,
        "quantization": args.quantization or "none",
        "device": results.gpu_name(),
        "date": results.now(),
    }
    return engine, about


def main() -> None:
    args = arguments()
    os.environ.update(ENVIRONMENT)
    started = time.perf_counter()
    engine, about = start_engine(args)
    print(f"vLLM {about['version']} started in {about['start_s']} s", file=sys.stderr, flush=True)
    for load in () if args.no_warmup else WARMUPS:
        repetition(engine, workloads.make(*load))
    for name, reps in workloads.asked(args.work, args.reps):
        slowest = 0.0
        for number in range(reps):
            if time.perf_counter() - started + slowest > args.seconds:
                print(f"no time for {name} {number}", file=sys.stderr, flush=True)
                break
            load = workloads.make(name, args.rows, workloads.repetition_seed(args.seed, number))
            found = repetition(engine, load)
            slowest = max(slowest, found["seconds"])
            row = {**about, "work": name, "rows": load.num_answers, "seed": load.seed, **found}
            results.append(row, args.out)


if __name__ == "__main__":
    main()
