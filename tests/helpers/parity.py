"""Runs one prompt through our model and through transformers' from the same folder.

A prompt is a list of parts: lists of token ids, and images as uint8 arrays. Logits of every
position come back on the CPU, whatever device the model is on, so that a test can compare them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from pipeline.models.base import DenseAttend, Model, image_spans
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family
from pipeline.models.loading import load_model
from pipeline.models.registry import family_for
from pipeline.rows import EncodedImage, ImageLayout, PlacedImage
from pipeline.settings import ModelSettings

Part = list[int] | np.ndarray


@dataclass(frozen=True)
class Prompt:
    """Tokens with images expanded, and the images with their places."""

    tokens: np.ndarray  # int32 [T]
    images: tuple[np.ndarray, ...]
    layouts: tuple[ImageLayout, ...]
    starts: tuple[int, ...]

    @property
    def where(self) -> np.ndarray:
        """Indices of the image tokens."""
        spans = zip(self.starts, self.layouts, strict=True)
        parts = [np.arange(start, start + layout.num_tokens) for start, layout in spans]
        return np.concatenate([np.zeros(0, np.int64), *parts])

    def placed(self) -> tuple[PlacedImage, ...]:
        return tuple(
            PlacedImage(
                EncodedImage(bytes(16), image.shape[1], image.shape[0], "", 0, 0), layout, start
            )
            for image, layout, start in zip(self.images, self.layouts, self.starts, strict=True)
        )


def open_ours(
    folder: Path, build: Any, dtype: torch.dtype = torch.float32, quantization: str = "none"
) -> Model:
    """Load the folder with the family's `spec.build`."""
    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    return load_model(checkpoint, build(checkpoint, settings), "cpu", dtype, quantization)


def open_found(
    folder: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Model:
    """Load the folder, or the hub's repository, with the family that the registry finds."""
    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    return load_model(checkpoint, family_for(checkpoint, settings), device, dtype)


def make_prompt(family: Family, parts: Sequence[Part], num_images: int = 1) -> Prompt:
    tokens: list[int] = []
    images, layouts, starts = [], [], []
    for part in parts:
        if isinstance(part, list):
            tokens += part
            continue
        layout = family.layout(part.shape[1], part.shape[0], num_images)
        images.append(part)
        layouts.append(layout)
        starts.append(len(tokens))
        tokens += family.image_tokens(layout).tolist()
    return Prompt(np.array(tokens, np.int32), tuple(images), tuple(layouts), tuple(starts))


def mixed_prompt(family: Family, sizes: Sequence[tuple[int, int]]) -> Prompt:
    """Images of these sizes with a little text before each and at the end."""
    parts = [p for i, size in enumerate(sizes) for p in (random_text(4, i), random_image(*size, i))]
    return make_prompt(family, [*parts, random_text(5)])


def random_image(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Soft blobs with noise: neither flat nor white noise after a resize."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    soft = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    return (soft + rng.integers(-20, 21, soft.shape)).clip(0, 255).astype(np.uint8)


def random_text(length: int, seed: int = 0, vocabulary: int = 300) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocabulary, length).tolist()


def model_input(model: Model, prompt: Prompt) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Return embedded tokens and positions on the model's device, and the next position."""
    positions, following = model.family.positions(prompt.tokens, prompt.placed())
    tokens = torch.from_numpy(prompt.tokens).long().to(model.device)
    features = where = None
    if prompt.images:
        features = model.encode_images(images_on(model, prompt), list(prompt.layouts))
        where = torch.from_numpy(prompt.where).to(model.device)
    placed = torch.from_numpy(positions).to(model.device)
    return model.embed(tokens, features, where), placed, following


def images_on(model: Model, prompt: Prompt) -> list[torch.Tensor]:
    """The prompt's images on the model's device."""
    return [torch.from_numpy(image).to(model.device) for image in prompt.images]


def our_logits(model: Model, prompt: Prompt) -> torch.Tensor:
    """Return logits [T, V] of every position."""
    x, positions, _ = model_input(model, prompt)
    decoder = model.decoder
    attend = DenseAttend(decoder.config, image_spans(model, prompt.tokens))
    return decoder.logits(decoder(x, positions, attend)).cpu()


def our_tokens(model: Model, prompt: Prompt, count: int) -> list[int]:
    """Return `count` greedy tokens, decoded one by one through the cache."""
    decoder = model.decoder
    x, positions, following = model_input(model, prompt)
    attend = DenseAttend(decoder.config, image_spans(model, prompt.tokens))
    last = torch.tensor([len(x) - 1], device=model.device)
    hidden = decoder(x, positions, attend, last)
    out: list[int] = []
    for step in range(count):
        out.append(int(decoder.logits(hidden)[0].argmax()))
        at = torch.full((model.num_axes, 1), following + step, device=model.device)
        token = torch.tensor(out[-1:], device=model.device)
        hidden = decoder(model.embed(token), at, attend)
    return out


@contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside, whatever makes the host wait for the GPU raises."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def check_encodes_without_waiting(model: Model, prompt: Prompt) -> None:
    """A second encoding, when all tables are made, waits for nothing and gives the same bits."""
    images, layouts = images_on(model, prompt), list(prompt.layouts)
    first = model.encode_images(images, layouts)
    with waiting_is_an_error():
        again = model.encode_images(images, layouts)
    assert torch.equal(first, again)


def difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Return the largest difference relative to the spread of `theirs`."""
    spread = (theirs.max() - theirs.min()).item()
    return (ours - theirs).abs().max().item() / spread
