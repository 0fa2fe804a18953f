"""Another engine on the same rows: starts it in a process of its own and reads what it measured.

The child makes the same workloads from the same seeds, so nothing but names crosses over. Run by
`scripts/bench.py --peer vllm`; as a program it is the child.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARK = "PEER-RESULT "
DECODE_THREADS = 16
SLOTS, PREFILL_TOKENS = 256, 16384


def run(name: str, model: str, loads: list[Any], path: str) -> dict[str, Any]:
    """Measure the peer; the first workload is its warm-up, as it is ours."""
    asked = {
        "model": model,
        "loads": [(load.name, load.num_answers, load.seed) for load in loads],
    }
    folders = [f"{path}/site", f"{path}/{name}", str(ROOT)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(folders),
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_USE_FLASHINFER_SAMPLER": "0",
    }
    command = [sys.executable, "-m", "scripts.bench.peer", json.dumps(asked)]
    child = subprocess.run(
        command, env=environment, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False
    )
    found = [line for line in child.stdout.splitlines() if line.startswith(MARK)]
    if not found:
        sys.stderr.write(child.stdout[-3000:])
        return {"error": f"{name} ended with {child.returncode} and no result"}
    return dict(json.loads(found[-1].removeprefix(MARK)))


def prompt_text(question: str, system: str) -> str:
    """Qwen2.5-VL's prompt as its template writes it, with one image before the question."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n<|vision_start|><|image_pad|>"
        f"<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )


def _decode(data: bytes) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(data)).convert("RGB")


def _repetition(engine: Any, load: Any) -> tuple[float, int]:
    """Seconds from encoded bytes to text, and the tokens written."""
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
    return seconds, sum(len(answer.outputs[0].token_ids) for answer in answers)


def main() -> None:
    asked = json.loads(sys.argv[1])
    from scripts.bench import workloads
    from scripts.bench.results import quantiles

    warmup, *loads = [workloads.make(*load) for load in asked["loads"]]
    import vllm

    started = time.perf_counter()
    longest = 8192 if loads[0].name == "ocr" else 4096
    engine = vllm.LLM(
        model=asked["model"],
        load_format="dummy",
        max_model_len=longest,
        max_num_seqs=SLOTS,
        max_num_batched_tokens=PREFILL_TOKENS,
        gpu_memory_utilization=0.9,
        limit_mm_per_prompt={"image": 1, "video": 0},
        seed=0,
    )
    start_seconds = time.perf_counter() - started
    _repetition(engine, warmup)
    timed = [(load, *_repetition(engine, load)) for load in loads]
    row = {
        "version": vllm.__version__,
        "rows_per_s": quantiles([load.num_answers / seconds for load, seconds, _ in timed]),
        "seconds": [round(seconds, 3) for _, seconds, _ in timed],
        "output_tokens": timed[-1][2],
        "start_s": round(start_seconds, 1),
        "slots": SLOTS,
    }
    print(MARK + json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
