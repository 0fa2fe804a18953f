"""MiniCPM-o 2.6: MiniCPM-V's images, and sounds of one token for 40 milliseconds.

A sound's tokens stand in groups of one second, each between its markers. The weights' side stands
in `model.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.minicpm.spec import MiniCPM
from pipeline.rows import ImageLayout, Sound, Turn
from pipeline.settings import ModelSettings
from pipeline.templates import minicpmo
from pipeline.templates.render import Piece, render

RATE = 16_000
_HOP = 160
_POOL = 2  # the official processor counts tokens by it, whatever the config says
_MARKERS = ("<|audio_start|>", "<|audio_end|>")


def matches(config: Mapping[str, Any]) -> bool:
    """True for MiniCPM-o 2.6; its model_type is shared by later versions."""
    named = "MiniCPMO" in (config.get("architectures") or ["MiniCPMO"])
    typed = config.get("model_type") == "minicpmo"
    return named and typed and str(config.get("version")) == "2.6" and "query_num" in config


def build(checkpoint: Checkpoint, settings: ModelSettings) -> MiniCPMO:
    return MiniCPMO(checkpoint, settings)


class MiniCPMO(MiniCPM):
    """A MiniCPM-o 2.6 checkpoint without its weights."""

    name = "minicpm-o"
    templates = ("minicpmo",)
    template = minicpmo.TEMPLATE
    takes = frozenset({"image", "video", "audio"})

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        super().__init__(checkpoint, settings)
        if not checkpoint.config.get("init_audio", True):
            self.takes = frozenset({"image", "video"})
            return
        self.pool = int(checkpoint.config.get("audio_pool_step", _POOL))
        if self.pool != _POOL:
            raise UserError(f"config.json: only audio_pool_step {_POOL} is known")
        found = [checkpoint.token_id(name) for name in _MARKERS]
        if None in found:
            missing = _MARKERS[found.index(None)]
            raise UserError(f"model.id {checkpoint.id!r}: the tokenizer has no {missing}")
        self._sound_markers = tuple(int(i) for i in found if i is not None)
        self.sizes = replace(self.sizes, audio_params=_audio_params(checkpoint.config))
        self.per_group = (50 - self.pool) // self.pool + 1

    def audio_layout(self, num_samples: int) -> ImageLayout:
        if "audio" not in self.takes:
            return super().audio_layout(num_samples)
        mel_frames = -(-num_samples // _HOP)
        features = ((mel_frames - 1) // 2 + 1 - self.pool) // self.pool + 1
        if features <= 0:
            raise RowError("empty_audio", f"The audio has {num_samples} samples, too few to hear.")
        tokens = features + 2 * -(-features // self.per_group)
        return ImageLayout(num_samples, 4, (1, 0, features), tokens, sound=Sound(num_samples))

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        if layout.sound is None:
            return super().image_tokens(layout)
        assert self.image_token_id is not None
        markers = (*self._sound_markers, self.image_token_id)
        return sound_tokens(layout.grid[2], self.per_group, markers)

    def pieces(self, turns: Sequence[Turn], layouts: Sequence[ImageLayout]) -> tuple[Piece, ...]:
        """A prompt with sound has no default system text and opens a spoken answer."""
        sounds = sum(layout.sound is not None for layout in layouts)
        if not sounds:
            return super().pieces(turns, layouts)
        if sounds > 1:
            # NOTE: the reference joins those of a turn and lets others' lengths change features.
            raise RowError("too_many_audios", "The model takes one recording a row.")
        return self.numbered(render(minicpmo.SPOKEN, turns), layouts)


def _audio_params(config: Mapping[str, Any]) -> int:
    """Of the encoder and its projection; what config.json leaves out is whisper-medium's."""
    audio = config.get("audio_config") or {}
    size, inner = audio.get("d_model", 1024), audio.get("encoder_ffn_dim", 4096)
    layer = 4 * size * size + 2 * size * inner
    convolutions = 3 * size * (audio.get("num_mel_bins", 80) + size)
    hidden = config["hidden_size"]
    projection = size * hidden + hidden * hidden
    return audio.get("encoder_layers", 24) * layer + convolutions + projection


@lru_cache(maxsize=256)
def sound_tokens(features: int, per_group: int, markers: tuple[int, ...]) -> np.ndarray:
    """Ids of a sound's block, read-only."""
    start, end, unknown = markers
    ids: list[int] = []
    for done in range(0, features, per_group):
        ids += [start, *[unknown] * min(per_group, features - done), end]
    block = np.array(ids, np.int32)
    block.setflags(write=False)
    return block
