"""Trains the demonstration model from build/artwork.npz within a given wall-clock time.

    python3 scripts/train_demo_model.py --artwork build/artwork.npz --output OUT/demo --minutes 7

Needs torch, numpy, tokenizers and safetensors only. `--smoke` takes a few tiny steps on the CPU.
A checkpoint is written at half time and at the end; the time counts from the start of the process.
"""

import time

START = time.monotonic()

import argparse  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from demo import artwork_file, checkpoint, render, tokens  # noqa: E402
from demo.batches import IGNORE, Feeder, Layout, Maker  # noqa: E402
from demo.heldout import HeldOut, picture, table  # noqa: E402
from demo.network import Network, Shape  # noqa: E402
from demo.optim import Optimizer, schedule  # noqa: E402
from demo.scenes import Sampler  # noqa: E402
from demo.vocabulary import ARTISTS, TRAIN_ARTISTS  # noqa: E402


def say(text: str) -> None:
    """One line with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.1f}s] {text}", flush=True)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--artwork", type=Path, default=Path("build/artwork.npz"))
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument(
        "--batch", type=int, default=256, help="scenes in one step; six answers each"
    )
    parser.add_argument("--rate", type=float, default=1.5e-3, help="AdamW's learning rate")
    parser.add_argument("--muon-rate", type=float, default=3e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--workers", type=int, default=10)
    parser.add_argument("--held", type=int, default=512, help="held-out scenes checked on the way")
    parser.add_argument("--every", type=float, default=60, help="seconds between checks")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--steps", type=int, default=0, help="stop after this many (0: when the time is up)"
    )
    parser.add_argument(
        "--nouns", type=int, default=0, help="for experiments: only this many nouns"
    )
    parser.add_argument(
        "--objects", type=int, default=0, help="for experiments: at most this many objects"
    )
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    parser.add_argument(
        "--smoke", action="store_true", help="a few tiny steps, to see that everything works"
    )
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.workers, args.held, args.every, args.compile = 4, 1, 8, 20, False
        args.steps = args.steps or 4
    return args


@dataclass
class Run:
    """All the parts of one training."""

    args: argparse.Namespace
    device: torch.device
    tokenizer: object
    layout: Layout
    feeder: Feeder
    network: Network
    renderer: render.Renderer
    held: HeldOut

    def autocast(self) -> torch.autocast:
        """bfloat16 on the GPU, float32 on the CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")


def prepare(args: argparse.Namespace) -> Run:
    """Starts the workers, then the device."""
    artwork = artwork_file.load(args.artwork)
    known = tuple(ARTISTS.index(a) for a in TRAIN_ARTISTS)
    photographs = len(artwork["train_backgrounds"])
    tokenizer = tokens.train(tokens.corpus(Sampler(artwork, known, photographs)))
    if args.nouns:
        artwork["there"] = artwork["there"].copy()
        artwork["there"][:, args.nouns :] = False
    sampler = Sampler(artwork, known, photographs, most=args.objects or 4)
    encode = tokens.FastEncoder(tokenizer)
    maker = Maker(sampler, encode)
    feeder = Feeder(maker, args.batch, args.workers, args.seed)
    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.matmul.allow_tf32 = True
    torch.backends.cudnn.allow_tf32 = True
    layout = maker.layout
    network = Network(Shape(), layout.positions(), layout.mask(), layout.before).to(device)
    count = sum(p.numel() for p in network.parameters())
    say(
        f"{device}, torch {torch.__version__}, {count / 1e6:.2f} M parameters, "
        f"{tokenizer.get_vocab_size()} tokens, "
        f"sequence {layout.length}, {args.workers} workers"
    )
    if tokenizer.get_vocab_size() > network.shape.vocabulary:
        raise ValueError("the tokenizer is larger than the embedding")
    held = HeldOut(artwork, encode, device, args.held)
    renderer = render.Renderer(artwork, device)
    return Run(args, device, tokenizer, layout, feeder, network, renderer, held)


def try_compile(run: Run) -> None:
    """Compiles the blocks when the machine can; training goes on without if it cannot."""
    try:
        probe = torch.compile(lambda x: torch.nn.functional.silu(x) * 2)
        probe(torch.ones(64, device=run.device)).sum().item()
        torch._dynamo.config.suppress_errors = True
        torch._dynamo.config.cache_size_limit = 64
        for block in (
            *run.network.visual.blocks,
            *run.network.model.layers,
            run.network.visual.merger,
        ):
            block.compile(dynamic=False)
    except Exception as error:  # noqa: BLE001 - no C compiler, or no Triton
        say(f"not compiled: {type(error).__name__}: {str(error)[:200]}")
        torch._dynamo.reset()


def loss_of(run: Run, weights: torch.Tensor, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted cross-entropy over the answers, and the share of right tokens."""
    with torch.no_grad():
        pixels = render.disturb(run.renderer(picture(batch)))
        patches = render.patches(pixels)
    first = run.layout.starts[0]
    labels = np.ascontiguousarray(batch["labels"][:, first:]).ravel()
    places = np.flatnonzero(labels != IGNORE)
    sequence, at = (
        render.upload(batch["tokens"], run.device).long(),
        render.upload(places, run.device),
    )
    wanted = render.upload(labels[places], run.device).long()
    with run.autocast():
        hidden = run.network(patches, sequence)[:, first:]
        scores = run.network.logits(hidden.flatten(0, 1)[at])
    weight = weights[first:][at % (run.layout.length - first)]
    losses = F.cross_entropy(scores.float(), wanted, reduction="none")
    right = (scores.detach().argmax(-1) == wanted).float().mean()
    return (losses * weight).sum() / weight.sum(), right


def check(run: Run, note: str) -> dict:
    """Prints the exact match on the held-out scenes."""
    with torch.compiler.set_stance(
        "force_eager"
    ):  # else everything is compiled once more, without gradients
        scores = run.held.check(run.network, run.autocast())
    say(f"held-out exact match, {note}\n{table(scores)}")
    return scores


def train(run: Run) -> int:
    """Steps until the time is up; gives how many."""
    args = run.args
    optimizer = Optimizer(run.network, args.optimizer)
    weights = run.layout.weights().to(run.device)
    begin, limit = time.monotonic(), START + args.minutes * 60
    checked, halfway, waited = begin, False, 0.0
    batches = iter(run.feeder)
    step = 0
    while True:
        now = time.monotonic()
        done = step / args.steps if args.steps else (now - begin) / max(limit - begin, 1)
        if done >= 1 or now >= limit:
            return step
        batch = next(batches)
        waited += time.monotonic() - now
        loss, right = loss_of(run, weights, batch)
        loss.backward()
        share = schedule(step, done)
        optimizer.step(args.rate * share, args.muon_rate * share)
        step += 1
        if step in (1, 2, 5, 10, 20, 50) or step % 100 == 0:
            say(
                f"step {step}: loss {loss.item():.4f}, tokens right {100 * right.item():.2f} %, "
                f"rate × {share:.3f}, waited for data {waited:.1f} s"
            )
        if time.monotonic() - checked > args.every:
            check(run, f"step {step}")
            checked = time.monotonic()
        if not halfway and done >= 0.5:
            halfway = True
            checkpoint.save(
                run.network, run.tokenizer, args.output, {"steps": step, "finished": False}
            )
            say("checkpoint at half time written")


def main() -> None:
    """Prepares, trains, rounds the weights, saves, checks."""
    args = arguments()
    run = prepare(args)
    if args.compile and run.device.type == "cuda":
        try_compile(run)
    try:
        steps = train(run)
        checkpoint.round_weights(run.network)
        notes = {
            "steps": steps,
            "finished": True,
            "scenes": steps * args.batch,
            "torch": torch.__version__,
            "minutes": args.minutes,
            "seed": args.seed,
            "optimizer": args.optimizer,
        }
        checkpoint.save(run.network, run.tokenizer, args.output, notes)
        say(f"saved to {args.output} after {steps} steps")
        notes["held_out_exact_match"] = check(run, "saved weights")
        checkpoint.save(run.network, run.tokenizer, args.output, notes)
    finally:
        run.feeder.stop()


if __name__ == "__main__":
    main()
