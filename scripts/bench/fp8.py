"""What fp8 costs in accuracy: the error of the logits, and right answers lost by the shipped model.

Of float8 weights, or with `--kv-cache fp8` of keys and values in float8 alone (with `--quantization
fp8` beside it, of both). Both models read the same prompts and the same answers (the model's own
truths, or random tokens for random weights), so that each position's logits can be compared one by
one.

    python -m scripts.bench.fp8 --model demo --rows 200
    python -m scripts.bench.fp8 --model demo --rows 200 --kv-cache fp8
    python -m scripts.bench.fp8 --model /dev/shm/vlm-batch-7b --rows 8
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from pipeline.engine.build import choose_dtype  # noqa: E402
from pipeline.images import decode  # noqa: E402
from pipeline.models.base import DenseAttend, Model  # noqa: E402
from pipeline.models.checkpoint import Checkpoint  # noqa: E402
from pipeline.models.loading import load_model  # noqa: E402
from pipeline.models.registry import family_for  # noqa: E402
from pipeline.settings import ModelSettings  # noqa: E402
from scripts import eval_demo_model  # noqa: E402
from scripts.bench import results, workloads  # noqa: E402

NUM_RANDOM_TOKENS = 64
NAMES = {  # of the result rows, by weights and cache
    ("none", "auto"): "fp8_none",
    ("fp8", "auto"): "fp8",
    ("none", "fp8"): "fp8_cache",
    ("fp8", "fp8"): "fp8_both",
}


def requests(
    settings: ModelSettings, num_rows: int, checkpoint: Checkpoint, family: Any
) -> Iterator[tuple[Any, np.ndarray, list[int]]]:
    """(prepared request, decoded image, answer's tokens) of each row."""
    from pipeline.prepare import Preparer, Unstored
    from pipeline.rows import ImageRef, Row
    from pipeline.settings import InputSettings, LabelSettings, PromptSettings
    from pipeline.tokenizer import Tokenizer

    images, truths = _rows(settings.id, num_rows)
    tokenizer = Tokenizer(checkpoint, family.control)
    asked = LabelSettings(
        model=settings,
        input=InputSettings(path="memory"),
        prompts={"answer": PromptSettings(text="Describe this image.")},
    )
    preparer = Preparer(asked, family, tokenizer, Unstored())
    rng = np.random.default_rng(0)
    for i, (data, truth) in enumerate(zip(images, truths, strict=True)):
        (request,) = preparer.prepare("fp8", Row(str(i), i, {}, (ImageRef(data=data),)))
        answer = tokenizer.encode(truth) if truth else rng.integers(0, 5000, NUM_RANDOM_TOKENS)
        yield request, decode(data, 1 << 26), [int(token) for token in answer]


def _rows(model: str, num_rows: int) -> tuple[list[bytes], list[str]]:
    if model != "demo":
        images = workloads.make("caption", num_rows, 3).images
        return list(images), [""] * num_rows
    import pyarrow.parquet as pq

    from pipeline import demo

    rows = pq.read_table(demo.SCENES, columns=["image", "caption_truth"]).to_pylist()[:num_rows]
    return [row["image"]["bytes"] for row in rows], [row["caption_truth"] for row in rows]


@torch.inference_mode()
def logits(
    model: Model, float8: bool, request: Any, image: np.ndarray, answer: list[int]
) -> torch.Tensor:
    """[answer + 1, V] in float32: what the model says after the prompt and after each token.

    With `float8` it sees keys and values in float8.
    """
    device = model.device
    (placed,) = request.images
    pixels = torch.from_numpy(image).to(device)
    features = model.encode_images([pixels], [placed.layout])
    where = torch.arange(placed.start, placed.start + placed.layout.num_tokens, device=device)
    tokens = torch.tensor([*request.tokens.tolist(), *answer], device=device)
    after = request.next_position + torch.arange(len(answer)).expand(model.num_axes, -1)
    positions = torch.cat([torch.from_numpy(request.positions).long(), after], 1).to(device)
    decoder = model.decoder
    attend = DenseAttend(decoder.config, float8=float8)
    hidden = decoder(model.embed(tokens, features, where), positions, attend, None)
    return decoder.logits(hidden[-len(answer) - 1 :]).float().cpu()


def compare(plain: torch.Tensor, quantized: torch.Tensor) -> dict[str, float]:
    """Relative error of the centred logits, divergence of what they say, agreement of the first."""
    centred = [x - x.mean(-1, keepdim=True) for x in (plain, quantized)]
    error = (centred[1] - centred[0]).norm(dim=-1) / centred[0].norm(dim=-1)
    said, meant = (x.log_softmax(-1) for x in (quantized, plain))
    return {
        "logit_error": error.mean().item(),
        "kl_nats": (meant.exp() * (meant - said)).sum(-1).mean().item(),
        "top1_agreement": (plain.argmax(-1) == quantized.argmax(-1)).float().mean().item(),
    }


def measure(
    settings: ModelSettings, num_rows: int, device: str, weights: str, cache: str
) -> dict[str, Any]:
    """Means over all positions of all rows."""
    checkpoint = Checkpoint.open(settings)
    family = family_for(checkpoint, settings)
    dtype = choose_dtype(settings.dtype, torch.device(device))
    with torch.inference_mode():
        plain = load_model(checkpoint, family, device, dtype)
        other = plain
        if weights != "none":
            other = load_model(checkpoint, family, device, dtype, weights)
    found = [
        compare(logits(plain, False, *one), logits(other, cache == "fp8", *one))
        for one in requests(settings, num_rows, checkpoint, family)
    ]
    return {key: round(float(np.mean([f[key] for f in found])), 5) for key in found[0]}


def accuracy(num_rows: int, device: str, weights: str, cache: str) -> dict[str, Any]:
    """Shares of exact answers of the model that ships, plain and quantised."""
    folder = ROOT / "pipeline" / "demo"
    rows = eval_demo_model.read(folder / "data" / "scenes.parquet", num_rows)
    plain, quantized = (
        eval_demo_model.ask_ours(folder, rows, device, *kind)
        for kind in (("none", "auto"), (weights, cache))
    )
    found = eval_demo_model.lost(rows, plain, quantized, "fp8")
    return {key: found[key] for key in ("same_text", "accuracy")}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--kv-cache", choices=["auto", "fp8"], default="auto")
    parser.add_argument(
        "--quantization", choices=["none", "fp8"], help="fp8 by default, none beside --kv-cache fp8"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--results", type=Path, default=results.FILE)
    parser.add_argument("--no-record", action="store_true")
    args = parser.parse_args()
    cache = args.kv_cache
    weights = args.quantization or ("fp8" if cache == "auto" else "none")
    row = {
        "name": NAMES[weights, cache],
        **results.surroundings(args.device, "scripts/bench/fp8.py"),
        "model": args.model,
        "rows": args.rows,
        **measure(ModelSettings(id=args.model), args.rows, args.device, weights, cache),
    }
    if args.model == "demo":
        row |= accuracy(args.rows, args.device, weights, cache)
    results.append(row, None if args.no_record else args.results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
