"""Training batches: several questions about each scene in one sequence, made by worker processes.

The layout is fixed: the prefix with the image once, then six branches (caption, objects, four
questions) that see the prefix and themselves only. So mask and positions are the same for every
sequence, and every branch is for the network exactly an ordinary one-question conversation.
"""

import multiprocessing
import random
from collections.abc import Iterator

import numpy as np
import torch

from demo import language, render
from demo.scenes import Sampler
from demo.tokens import SYSTEM, FastEncoder
from demo.vocabulary import HEIGHT, NOUNS, WIDTH

ROWS, COLUMNS = HEIGHT // 28, WIDTH // 28
IMAGE_TOKENS = ROWS * COLUMNS
QUESTIONS = 4
IGNORE = -100


class Layout:
    """Where everything lies in a packed sequence; the same for all of them."""

    def __init__(self, encode: FastEncoder):
        """Knows the special ids from `encode`."""
        start, end = encode.special("<|im_start|>"), encode.special("<|im_end|>")
        newline = encode("\n")
        self.end, self.pad = end, encode.special("<|endoftext|>")
        self.image = encode.special("<|image_pad|>")
        before = [start, *encode("system\n" + SYSTEM), end, *newline, start, *encode("user\n")]
        before.append(encode.special("<|vision_start|>"))
        self.before = len(before)
        self.prefix = [*before, *[self.image] * IMAGE_TOKENS, encode.special("<|vision_end|>")]
        self.turn = [end, *newline, start, *encode("assistant\n")]
        self.slots = [56, 88] + [24] * QUESTIONS
        self.slots[0] += -(len(self.prefix) + sum(self.slots)) % 8
        self.starts = [len(self.prefix) + sum(self.slots[:i]) for i in range(len(self.slots))]
        self.length = len(self.prefix) + sum(self.slots)

    def positions(self) -> torch.Tensor:
        """[3, length]: time, height and width of M-RoPE."""
        out = torch.zeros(3, self.length, dtype=torch.long)
        out[:, : self.before] = torch.arange(self.before)
        cell = torch.arange(IMAGE_TOKENS)
        inside = slice(self.before, self.before + IMAGE_TOKENS)
        out[0, inside], out[1, inside] = self.before, self.before + cell // COLUMNS
        out[2, inside] = self.before + cell % COLUMNS
        following = self.before + max(ROWS, COLUMNS)
        out[:, self.before + IMAGE_TOKENS] = following
        for start, slot in zip(self.starts, self.slots, strict=True):
            out[:, start : start + slot] = following + 1 + torch.arange(slot)
        return out

    def mask(self) -> torch.Tensor:
        """[length, length]: True where a query (row) may see a key (column)."""
        branch = torch.full((self.length,), -1)
        for i, (start, slot) in enumerate(zip(self.starts, self.slots, strict=True)):
            branch[start : start + slot] = i
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        return causal & ((branch[None] == -1) | (branch[None] == branch[:, None]))

    def weights(self) -> torch.Tensor:
        """[length]: how much a token of each branch counts in the loss."""
        out = torch.zeros(self.length)
        for i, (start, slot) in enumerate(zip(self.starts, self.slots, strict=True)):
            out[start : start + slot] = (1.0, 0.7)[i] if i < 2 else 2.0
        return out


class Maker:
    """Makes packed batches as arrays from a sampler."""

    def __init__(
        self, sampler: Sampler, encode: FastEncoder, every_kind: bool = False, variants: bool = True
    ):
        """`every_kind`: asks all kinds in turn. `variants`: more wordings of the caption prompt."""
        self.sampler, self.encode, self.layout = sampler, encode, Layout(encode)
        self.every_kind, self.variants = every_kind, variants

    def __call__(self, rng: random.Random, size: int) -> dict[str, np.ndarray]:
        """`size` scenes: what the renderer needs, `tokens`, `labels` and `categories`."""
        layout = self.layout
        tokens = np.full((size, layout.length), layout.pad, np.int16)
        labels = np.full((size, layout.length), IGNORE, np.int16)
        categories = np.zeros((size, len(layout.slots)), np.int8)
        tokens[:, : len(layout.prefix)] = layout.prefix
        scenes = []
        for i in range(size):
            scene = self.sampler.scene(rng)
            scenes.append(scene)
            for j, (kind, question, answer) in enumerate(self._conversations(scene, rng, i)):
                self._write(tokens[i], labels[i], j, question, answer)
                categories[i, j] = language.CATEGORIES.index(kind)
        packed = render.pack(scenes, len(NOUNS))
        return {**packed, "tokens": tokens, "labels": labels, "categories": categories}

    def _conversations(self, scene, rng: random.Random, i: int) -> list[tuple[str, str, str]]:
        prompt = language.CAPTION
        if self.variants and rng.random() < 0.25:
            prompt = rng.choice(language.CAPTION_VARIANTS)
        out = [
            ("caption", prompt, language.caption(scene)),
            ("objects", language.OBJECTS, language.objects(scene)),
        ]
        kinds = language.QUESTION_KINDS
        if self.every_kind:
            chosen = [kinds[(i * QUESTIONS + j) % len(kinds)] for j in range(QUESTIONS)]
        else:
            chosen = rng.choices(kinds, weights=(2, 1, 2, 1, 1, 1, 1), k=QUESTIONS)
        return out + [language.question(scene, rng, kind) for kind in chosen]

    def _write(
        self, tokens: np.ndarray, labels: np.ndarray, branch: int, question: str, answer: str
    ) -> None:
        layout = self.layout
        ask = [*self.encode(question), *layout.turn]
        reply = [*self.encode(answer), layout.end]
        if len(ask) + len(reply) > layout.slots[branch]:
            raise ValueError(f"too long for its slot: {question} {answer}")
        start = layout.starts[branch]
        first = start + len(ask)
        tokens[start : first + len(reply)] = ask + reply
        labels[first - 1 : first - 1 + len(reply)] = reply


def _work(maker: Maker, seed: int, size: int, queue) -> None:
    rng = random.Random(seed)
    while True:
        queue.put(maker(rng, size))


class Feeder:
    """Worker processes that keep a queue of batches full. Start it before CUDA is touched."""

    def __init__(self, maker: Maker, size: int, workers: int, seed: int):
        """Forks `workers` processes at once."""
        context = multiprocessing.get_context("fork")
        self.queue = context.Queue(maxsize=max(4, workers * 3))
        self.workers = [
            context.Process(
                target=_work, args=(maker, seed * 1000 + i, size, self.queue), daemon=True
            )
            for i in range(workers)
        ]
        for worker in self.workers:
            worker.start()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        """Batches without end."""
        while True:
            yield self.queue.get(timeout=120)

    def stop(self) -> None:
        """Ends the workers."""
        for worker in self.workers:
            worker.terminate()
