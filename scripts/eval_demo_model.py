"""Exact match of the demonstration model on pipeline/demo/data/scenes.parquet, prompt by prompt.

    python scripts/eval_demo_model.py --engine transformers --limit 60 --floor 0.9

`--engine transformers` asks transformers' own class, with the prompts expanded here by hand;
`--engine ours` asks this package. The floor holds for the artists the model was trained on.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HELD_ARTIST = "openmoji"
PROMPTS = {"caption": "Describe this image.", "objects": "List the objects as JSON."}
MAX_NEW_TOKENS = {"caption": 64, "objects": 96, "answer": 64}
Answers = dict[tuple[int, str], str]


def read(path: Path, limit: int) -> list[dict]:
    """Rows of the table; `limit` of them, spread over the file (0: all)."""
    import pyarrow.parquet as pq

    rows = pq.read_table(path).to_pylist()
    step = max(1, len(rows) // limit) if limit else 1
    # NOTE: artists come again every 5 scenes and kinds of question every 7; the step must not.
    while math.gcd(step, 35) > 1:
        step += 1
    return rows[::step][: limit or None]


def expanded(question: str, image_tokens: int) -> str:
    """The conversation as text, with as many image tokens as the picture needs."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{'<|image_pad|>' * image_tokens}<|vision_end|>{question}<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def ask_transformers(folder: Path, rows: list[dict], device: str) -> Answers:
    """Greedy answers of Qwen2_5_VLForConditionalGeneration, one request at a time."""
    import torch
    from PIL import Image
    from tokenizers import Tokenizer
    from transformers import Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)
    model.eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
    image_token = tokenizer.token_to_id("<|image_pad|>")
    out: Answers = {}
    for i, row in enumerate(rows):
        image = Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")
        pixels = processor(images=[image], return_tensors="pt").to(device)
        count = int(pixels["image_grid_thw"].prod()) // 4
        for name, text in {**PROMPTS, "answer": row["question"]}.items():
            ids = torch.tensor([tokenizer.encode(expanded(text, count)).ids], device=device)
            new = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=(ids == image_token).int(),
                max_new_tokens=MAX_NEW_TOKENS[name],
                do_sample=False,
                **pixels,
            )
            out[i, name] = tokenizer.decode(new[0, ids.shape[1] :].tolist())
    return out


def ask_ours(
    folder: Path,
    rows: list[dict],
    device: str,
    quantization: str = "none",
    kv_cache: str = "auto",
) -> Answers:
    """Greedy answers of this package."""
    sys.path.insert(0, str(ROOT))
    from pipeline.labeller import Labeller
    from pipeline.rows import ImageRef, Row, ShardWork
    from pipeline.settings import LabelSettings

    settings = LabelSettings.model_validate(
        {
            "model": {
                "id": "demo" if folder == ROOT / "pipeline" / "demo" else str(folder),
                "quantization": quantization,
            },
            "input": {"path": "scenes.parquet", "image": "image"},
            "prompts": {
                name: {"text": text, "max_new_tokens": MAX_NEW_TOKENS[name]}
                for name, text in {**PROMPTS, "answer": "{question}"}.items()
            },
            "generation": {"temperature": 0.0},
            "engine": {"device": device, "kv_cache": kv_cache},
        }
    )

    def given() -> Iterator[Row]:
        for i, row in enumerate(rows):
            image = ImageRef(data=row["image"]["bytes"])
            yield Row(row["id"], i, {"question": row["question"]}, (image,))

    labeller = Labeller(settings)
    work = ShardWork("scenes", given(), frozenset())
    try:
        return {(a.key.row, a.key.prompt): a.text or "" for a in labeller.label([work])}
    finally:
        labeller.close()


ENGINES: dict[str, Callable[[Path, list[dict], str], Answers]] = {
    "transformers": ask_transformers,
    "ours": ask_ours,
}


def scores(rows: list[dict], answers: Answers) -> dict[str, dict[str, float]]:
    """{"known" | "new artist": {prompt or answer/category: share of exact answers}}."""
    right: dict[str, dict[str, list[bool]]] = {"known": defaultdict(list), "new artist": {}}
    right["new artist"] = defaultdict(list)
    for i, row in enumerate(rows):
        group = right["new artist" if row["artist"] == HELD_ARTIST else "known"]
        for name in (*PROMPTS, "answer"):
            exact = answers[i, name] == row[f"{name}_truth"]
            group[name].append(exact)
            if name == "answer":
                group[f"answer/{row['category']}"].append(exact)
    return {
        key: {name: sum(ok) / len(ok) for name, ok in sorted(group.items())}
        for key, group in right.items()
    }


def lost(rows: list[dict], plain: Answers, quantized: Answers, name: str) -> dict:
    """What quantisation costs: its scores, and each prompt's share of right answers with both."""
    prompts = (*PROMPTS, "answer")

    def share(answers: Answers, prompt: str) -> float:
        right = [answers[i, prompt] == row[f"{prompt}_truth"] for i, row in enumerate(rows)]
        return sum(right) / len(right)

    return {
        "quantization": name,
        "exact_match_quantized": scores(rows, quantized),
        "same_text": sum(plain[key] == quantized[key] for key in plain) / len(plain),
        "accuracy": {p: [share(plain, p), share(quantized, p)] for p in prompts},
    }


def show(report: dict) -> None:
    for part in ("exact_match", "exact_match_quantized"):
        for group, shares in report.get(part, {}).items():
            marks = (f"{name} {100 * share:.1f}" for name, share in shares.items())
            print(report["quantization"] if "quant" in part else "plain", group, *marks, sep="  ")
    for prompt, (before, after) in report.get("accuracy", {}).items():
        print(f"{prompt}: {100 * before:.1f} % right, {100 * after:.1f} % quantised")


def main() -> int:
    """Prints the scores; 1 when a prompt is under the floor."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=ROOT / "pipeline" / "demo")
    parser.add_argument(
        "--data", type=Path, default=ROOT / "pipeline" / "demo" / "data" / "scenes.parquet"
    )
    parser.add_argument("--engine", choices=tuple(ENGINES), default="ours")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--quantization", choices=["none", "fp8"], default="none", help="ask once more with it"
    )
    parser.add_argument("--limit", type=int, default=0)
    parser.add_argument("--floor", type=float, default=0.0, help="least share for each prompt")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--wrong", action="store_true", help="print the wrong answers")
    args = parser.parse_args()
    rows = read(args.data, args.limit)
    folder = args.model.resolve()
    answers = ENGINES[args.engine](folder, rows, args.device)
    result = scores(rows, answers)
    report = {"rows": len(rows), "engine": args.engine, "exact_match": result}
    if args.quantization != "none":
        quantized = ask_ours(folder, rows, args.device, args.quantization)
        report |= lost(rows, answers, quantized, args.quantization)
    if args.json:
        print(json.dumps(report))
    else:
        show(report)
    if args.wrong:
        for (i, name), answer in answers.items():
            if answer != rows[i][f"{name}_truth"]:
                print(f"{rows[i]['id']} {rows[i]['artist']} {name}: {answer!r}", end=" ")
                print(f"but is {rows[i][f'{name}_truth']!r}")
    return int(min(result["known"][name] for name in (*PROMPTS, "answer")) < args.floor)


if __name__ == "__main__":
    sys.exit(main())
