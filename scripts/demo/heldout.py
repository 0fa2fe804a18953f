"""Exact match on scenes that training never sees, by category, under teacher forcing.

When every token of an answer (and its end) is the most likely one given the true tokens before it,
greedy decoding gives exactly this answer; so one forward pass is enough.
"""

import random

import numpy as np
import torch

from demo import language, render
from demo.artwork_file import Artwork
from demo.batches import IGNORE, Maker
from demo.network import Network
from demo.scenes import Sampler
from demo.tokens import FastEncoder
from demo.vocabulary import ARTISTS, HELD_ARTIST, TRAIN_ARTISTS


class HeldOut:
    """Fixed scenes: known artists and the held-out artist, both before held-out backgrounds."""

    def __init__(
        self,
        artwork: Artwork,
        encode: FastEncoder,
        device: torch.device,
        scenes: int,
        batch: int = 256,
    ):
        """Draws everything once; keeps uint8 pixels."""
        self.device, self.batch = device, batch
        self.layout = None
        known = tuple(ARTISTS.index(a) for a in TRAIN_ARTISTS)
        renderer = render.Renderer(artwork, device, held=True)
        self.sets = {}
        for name, artists, count in (
            ("known", known, scenes),
            ("new artist", (ARTISTS.index(HELD_ARTIST),), scenes // 2),
        ):
            sampler = Sampler(artwork, artists, len(artwork["held_backgrounds"]))
            maker = Maker(sampler, encode, every_kind=True, variants=False)
            self.layout = maker.layout
            rng = random.Random(f"held out: {name}")
            self.sets[name] = []
            for start in range(0, count, batch):
                data = maker(rng, min(batch, count - start))
                self.sets[name].append((renderer(picture(data)).byte(), data))

    @torch.no_grad()
    def check(self, network: Network, autocast: torch.autocast) -> dict[str, dict[str, float]]:
        """{set: {category: share of exact answers, …, "all": …}}."""
        out = {}
        for name, batches in self.sets.items():
            right: dict[int, list[bool]] = {}
            for pixels, data in batches:
                with autocast:
                    exact = exact_branches(network, self.layout, pixels, data)
                for category, ok in zip(data["categories"].ravel(), exact.ravel(), strict=True):
                    right.setdefault(int(category), []).append(bool(ok))
            shares = {language.CATEGORIES[c]: float(np.mean(v)) for c, v in sorted(right.items())}
            out[name] = {"all": float(np.mean([ok for v in right.values() for ok in v])), **shares}
        return out


def picture(data: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Only what the renderer needs."""
    return {k: v for k, v in data.items() if k not in ("tokens", "labels", "categories")}


def exact_branches(
    network: Network, layout, pixels: torch.Tensor, data: dict[str, np.ndarray]
) -> np.ndarray:
    """[b, branches]: is every token of the answer right?"""
    device = pixels.device
    tokens = torch.from_numpy(data["tokens"]).to(device).long()
    labels = torch.from_numpy(data["labels"]).to(device).long()
    hidden = network(render.patches(pixels.float()), tokens)
    first = layout.starts[0]
    best = network.logits(hidden[:, first:]).argmax(-1)
    fine = (best == labels[:, first:]) | (labels[:, first:] == IGNORE)
    parts = [
        fine[:, s - first : s - first + n].all(1)
        for s, n in zip(layout.starts, layout.slots, strict=True)
    ]
    return torch.stack(parts, 1).cpu().numpy()


def table(scores: dict[str, dict[str, float]]) -> str:
    """Scores as lines of text."""
    return "\n".join(
        f"  {name:10s} " + "  ".join(f"{k} {100 * v:5.1f}" for k, v in shares.items())
        for name, shares in scores.items()
    )
