"""MiniCPM-o 2.6 on a device: MiniCPM-V and an encoder that hears. Its speech synthesis is left out.

The torch half of the family; `spec.py` beside it is the other. Knows no chat template.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.kernels.transfer import upload
from pipeline.models.audio.mel import log_mel, mel_filters
from pipeline.models.audio.pieces import SoundPiece, pieces
from pipeline.models.audio.whisper import WhisperConfig, WhisperEncoder
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.minicpm import model as minicpm
from pipeline.models.families.minicpm_o import spec
from pipeline.models.layers import MLP
from pipeline.models.loading import Weights
from pipeline.rows import ImageLayout

RENAME = minicpm.RENAME
MAX_FRAMES = 60_000  # of one pass of the encoder: twenty minutes
_FRAMES_A_SEC = 50


def audio_config(config: Mapping[str, Any]) -> WhisperConfig:
    """Read the encoder's settings; a key that is left out is whisper-medium's."""
    audio = config.get("audio_config") or {}
    positions, seconds = audio.get("max_source_positions", 1500), config.get("audio_chunk_length")
    chunk = int((1.0 if seconds is None else seconds) * _FRAMES_A_SEC)
    return WhisperConfig(
        depth=audio.get("encoder_layers", 24),
        size=audio.get("d_model", 1024),
        heads=audio.get("encoder_attention_heads", 16),
        inner=audio.get("encoder_ffn_dim", 4096),
        bins=audio.get("num_mel_bins", 80),
        positions=positions,
        chunk=chunk if chunk > 0 else positions,  # without chunks a frame hears all others
        act=audio.get("activation_function", "gelu"),
    )


class Hearing:
    """Sounds to features of the decoder's width."""

    def __init__(self, weights: Weights, config: WhisperConfig, out: int, pool: int) -> None:
        self.encoder = WhisperEncoder(weights, config, "apm")
        names = "audio_projection_layer.linear1", "audio_projection_layer.linear2"
        self.project = MLP.take(weights, names, (config.size, out, out), "relu")
        self.filters = mel_filters(config.bins).to(weights.device)
        self.pool = pool

    def __call__(self, sounds: Sequence[Tensor]) -> Tensor:
        """float32 [samples] each -> [tokens of all, out], in their order."""
        found = pieces([len(s) for s in sounds], self.encoder.config.chunk, self.pool)
        heard: dict[int, Tensor] = {}
        for some in _bounded(found):
            heard |= self._hear(sounds, some)
        return torch.cat([heard[number] for number in sorted(heard)])

    def _hear(self, sounds: Sequence[Tensor], some: Sequence[SoundPiece]) -> dict[int, Tensor]:
        groups = [list(g) for _, g in groupby(some, key=lambda p: (p.shape, p.mel_frames))]
        mels = [self._mel(sounds, group) for group in groups]
        features = self.encoder(mels, [group[0].shape for group in groups])
        found: dict[int, Tensor] = {}
        for group, states in zip(groups, features, strict=True):
            tokens = group[0].num_tokens
            used = self.project(states[:, : tokens * self.pool])
            pooled = used.unflatten(1, (tokens, self.pool)).mean(2)
            found |= {piece.number: part for piece, part in zip(group, pooled, strict=True)}
        return found

    def _mel(self, sounds: Sequence[Tensor], group: Sequence[SoundPiece]) -> Tensor:
        width = max(p.stop - p.start for p in group)
        waves = sounds[0].new_zeros(len(group), width)
        for row, piece in zip(waves, group, strict=True):
            row[: piece.stop - piece.start] = sounds[piece.sound][piece.start : piece.stop]
        mel = log_mel(waves, self.filters, group[0].mel_frames)
        silence = group[0].shape.mel_frames - group[0].mel_frames
        return torch.nn.functional.pad(mel, (0, silence))


def _bounded(found: Sequence[SoundPiece]) -> list[list[SoundPiece]]:
    passes: list[list[SoundPiece]] = [[]]
    frames = 0
    for piece in found:
        if passes[-1] and frames + piece.shape.frames > MAX_FRAMES:
            passes.append([])
            frames = 0
        passes[-1].append(piece)
        frames += piece.shape.frames
    return passes


class MiniCPMO(minicpm.MiniCPM):
    """A MiniCPM-o 2.6 checkpoint on one device."""

    def __init__(
        self, family: spec.MiniCPMO, parts: minicpm.Parts, hearing: Hearing | None
    ) -> None:
        super().__init__(family, parts)
        self.hearing = hearing  # None where the checkpoint has no encoder of sounds

    def encode_images(self, images: list[Tensor], layouts: list[ImageLayout]) -> Tensor:
        """Sounds stand among the images as the bytes of their float32 samples, uint8 [N, 4]."""
        heard = [i for i, layout in enumerate(layouts) if layout.sound is not None]
        if not heard:
            return super().encode_images(images, layouts)
        blocks = dict(zip(heard, self._sounds(images, layouts, heard), strict=True))
        seen = [i for i in range(len(layouts)) if i not in blocks]
        if seen:
            both = super().encode_images([images[i] for i in seen], [layouts[i] for i in seen])
            parts = both.split([layouts[i].num_tokens for i in seen])
            blocks |= dict(zip(seen, parts, strict=True))
        return torch.cat([blocks[i] for i in range(len(layouts))])

    def _sounds(
        self, images: Sequence[Tensor], layouts: Sequence[ImageLayout], heard: Sequence[int]
    ) -> tuple[Tensor, ...]:
        waves = [images[i].contiguous().view(torch.float32).view(-1) for i in heard]
        blocks = [self.family.image_tokens(layouts[i]) for i in heard]
        ids = np.concatenate(blocks).astype(np.int64)
        where = upload(np.flatnonzero(ids == self.family.image_token_id), self.device)
        rows = self.embedding.index_select(0, upload(ids, self.device))
        assert self.hearing is not None
        rows.index_copy_(0, where, self.hearing(waves).to(rows.dtype))
        return rows.split([layouts[i].num_tokens for i in heard])


def build(checkpoint: Checkpoint, family: spec.MiniCPMO, weights: Weights) -> MiniCPMO:
    """Take the model's tensors from `weights`; `tts.` speaks, which nothing here asks for."""
    parts = minicpm.take_parts(checkpoint, family, weights)
    weights.drop_all("tts.")
    if "audio" not in family.takes:
        return MiniCPMO(family, parts, None)
    hidden = parts.decoder.config.hidden_size
    hearing = Hearing(weights, audio_config(checkpoint.config), hidden, family.pool)
    return MiniCPMO(family, parts, hearing)
