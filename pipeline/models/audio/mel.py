"""Whisper's log-mel spectrogram: what a Whisper encoder hears of 16 kHz samples.

Equal to transformers' WhisperFeatureExtractor, which pads to 30 seconds, without computing the
padding. Knows no encoder.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

RATE = 16_000
HOP = 160
WINDOW = 400
PIECE = 30 * RATE  # samples of the longest piece
_BREAK_HZ, _BREAK_MEL, _STEP = 1000.0, 15.0, 27.0 / np.log(6.4)  # Slaney's scale


def num_frames(num_samples: int) -> int:
    """Frames that hear something."""
    return -(-num_samples // HOP)


def log_mel(waves: Tensor, filters: Tensor, frames: int) -> Tensor:
    """float32 [B, N] of one number of `frames`, zeros after the end -> [B, bins, frames]."""
    # Three more frames hear nothing but the end of the last: enough for the reflected edge.
    width = min(PIECE, (frames + 3) * HOP)
    padded = torch.nn.functional.pad(waves, (0, width - waves.shape[1]))
    window = _window(waves.device)
    spectrum = torch.stft(padded, WINDOW, HOP, window=window, return_complex=True)
    power = (spectrum[..., :-1].abs() ** 2).contiguous()
    loud = (filters @ power).clamp(min=1e-10).log10()
    loud = torch.maximum(loud, loud.amax((1, 2), keepdim=True) - 8.0)
    return ((loud + 4.0) / 4.0)[:, :, :frames]


@lru_cache(maxsize=8)
def _window(device: torch.device) -> Tensor:
    return torch.hann_window(WINDOW, device=device)


def mel_filters(bins: int) -> Tensor:
    """Triangles of equal area on Slaney's scale, float32 [bins, frequencies]."""
    edges = _hertz(np.linspace(0.0, _mel(RATE / 2), bins + 2))
    found = np.linspace(0, RATE // 2, WINDOW // 2 + 1)
    slopes = edges - found[:, None]
    widths = np.diff(edges)
    down, up = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    triangles = np.maximum(0.0, np.minimum(down, up)) * (2.0 / (edges[2:] - edges[:-2]))
    return torch.from_numpy(triangles.T.astype(np.float32)).contiguous()


def _mel(hertz: float) -> float:
    if hertz < _BREAK_HZ:
        return 3.0 * hertz / 200.0
    return float(_BREAK_MEL + np.log(hertz / _BREAK_HZ) * _STEP)


def _hertz(mels: np.ndarray) -> np.ndarray:
    high = _BREAK_HZ * np.exp((mels - _BREAK_MEL) / _STEP)
    return np.where(mels >= _BREAK_MEL, high, 200.0 * mels / 3.0)
