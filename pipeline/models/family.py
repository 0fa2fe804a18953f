"""What the pipeline needs of a model family without its weights: template, layout, positions.

A family's `spec.py` implements `Family`; its `model.py` (torch) stands beside it. Knows no row
and no engine. Imports no torch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.rows import ImageLayout, PlacedImage, Turn, VideoInfo
from pipeline.schemas import check_schema
from pipeline.settings import LabelSettings, VideoSettings
from pipeline.templates.render import Control, Piece, Template, render

if TYPE_CHECKING:
    from pipeline.images import Transparency
    from pipeline.tokenizer import Tokenizer

_SAMPLING_KEYS = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
SCALE_BYTES = 4  # of a key or value in float8
GREEDY_BELOW = 1e-5  # a checkpoint's temperature of 1e-6 means greedy


@dataclass(frozen=True, slots=True)
class ModelSizes:
    """What the cost estimate needs to know of the weights; zero where unknown."""

    num_layers: int = 0
    num_kv_heads: int = 0
    head_dim: int = 0
    num_heads: int = 0
    decoder_params: int = 0  # without embeddings
    embedding_params: int = 0  # input and output together
    vision_params: int = 0  # work on every patch
    projector_params: int = 0  # work on every image token
    patches_per_token: int = 4
    patches_per_run: int = 0  # patches that see each other in full blocks; 0: an image's
    vision_width: int = 0
    values_per_state: int = 0  # keys and values of an image state that layers attend to
    vision_full_blocks: int = 0  # blocks in which all patches of an image see each other
    audio_params: int = 0  # work on every 20 ms of sound, two for a token
    active_params: int = 0  # of the decoder, that one token meets; 0: all
    latent_values: int = 0  # of a token and layer in a compressed cache; 0: keys and values

    @property
    def num_params(self) -> int:
        vision = self.vision_params + self.projector_params + self.audio_params
        return self.decoder_params + self.embedding_params + vision

    def num_bytes(self, value_bytes: int, float8: bool) -> int:
        """Bytes of the weights on the device; `float8` makes the decoder's a byte each."""
        saved = self.decoder_params * (value_bytes - 1) if float8 else 0
        return self.num_params * value_bytes - saved

    @property
    def kv_values_per_token(self) -> int:
        row = self.latent_values or 2 * self.num_kv_heads * self.head_dim
        return self.num_layers * row

    def kv_bytes_per_token(self, value_bytes: int, float8: bool = False) -> int:
        """Bytes of a token's keys and values; `float8` as in `engine.kv_cache`."""
        if self.latent_values:
            return self.num_layers * cached_bytes(self.latent_values, value_bytes, float8)
        rows = 2 * self.num_layers * self.num_kv_heads
        return rows * cached_bytes(self.head_dim, value_bytes, float8)


def cached_bytes(num_values: int, value_bytes: int, float8: bool) -> int:
    """Bytes of one key or value of a head in the cache; in float8 it has a scale."""
    return num_values + SCALE_BYTES if float8 else num_values * value_bytes


def decoder_sizes(text: Mapping[str, Any], tied: bool = False) -> dict[str, int]:
    """The fields of `ModelSizes` that a plain gated decoder's config gives."""
    hidden, layers = text["hidden_size"], text["num_hidden_layers"]
    heads = text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads") or heads
    head_dim = text.get("head_dim") or hidden // heads
    attention = hidden * head_dim * (2 * heads + 2 * kv_heads)
    return {
        "num_layers": layers,
        "num_kv_heads": kv_heads,
        "head_dim": head_dim,
        "num_heads": heads,
        "decoder_params": layers * (attention + 3 * hidden * text["intermediate_size"]),
        "embedding_params": (1 if tied else 2) * hidden * text["vocab_size"],
    }


class Family(ABC):
    """One family's prompt, image layout and positions, for one checkpoint."""

    name: str
    templates: tuple[str, ...]
    fused: bool = True  # runs on our own engine
    takes: frozenset[str] = frozenset({"image"})
    num_axes: int = 1
    image_token_id: int | None = None
    own_ids: Mapping[str, int] = MappingProxyType({})  # of control tokens that no tokenizer cuts
    context_length: int
    eos_token_ids: tuple[int, ...] = ()
    default_sampling: Mapping[str, Any]
    template: Template
    sizes: ModelSizes = ModelSizes()
    pans_and_scans: bool = False  # heeds model.pan_and_scan
    transparency: Transparency = "white"  # as transformers; "drop" where official code does
    images_reach_back: bool = False  # tokens before an image depend on it, on all of a prompt's

    @property
    def control(self) -> tuple[str, ...]:
        """Tokens that user text must never become."""
        return self.template.control

    @abstractmethod
    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """What the family makes of one of a conversation's images.

        Raises: RowError bad_aspect_ratio.
        """

    def video_layout(self, info: VideoInfo, settings: VideoSettings) -> ImageLayout:
        """Which frames of a video the family takes, and what it makes of them."""
        raise RowError("unsupported_input", "The model takes no videos.")

    def audio_layout(self, num_samples: int) -> ImageLayout:
        """What the family makes of a sound of so many samples at 16 kHz."""
        raise RowError("unsupported_input", "The model takes no audio.")

    def render(self, turns: Sequence[Turn]) -> tuple[Piece, ...]:
        """The prompt's pieces: texts, control tokens and image numbers, up to the answer."""
        return render(self.template, turns)

    def pieces(self, turns: Sequence[Turn], layouts: Sequence[ImageLayout]) -> tuple[Piece, ...]:
        """As `render`, for families whose prompt depends on what the numbers stand for."""
        return self.render(turns)

    def prompt_text(self, turns: Sequence[Turn]) -> str | None:
        """The rendered prompt, for families whose engine wants text; None for ours."""
        return None

    def image_tokens(self, layout: ImageLayout) -> np.ndarray:
        """Ids of one image's or video's block, `layout.num_tokens` of them."""
        return np.full(layout.num_tokens, self.image_token_id, np.int32)

    def tokenize(
        self, turns: Sequence[Turn], layouts: Sequence[ImageLayout], tokenizer: Tokenizer
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """Token ids with images expanded, and where each image's block starts."""
        chunks: list[np.ndarray] = []
        starts: list[int] = []
        length = 0
        for piece in self.pieces(turns, layouts):
            if isinstance(piece, int):
                starts.append(length)
                chunk = self.image_tokens(layouts[piece])
            elif isinstance(piece, Control) and piece in self.own_ids:
                chunk = np.array([self.own_ids[piece]], np.int32)
            else:
                chunk = tokenizer.ids(piece, special=isinstance(piece, Control))
            chunks.append(chunk)
            length += len(chunk)
        return np.concatenate(chunks) if chunks else np.zeros(0, np.int32), tuple(starts)

    def positions(
        self, tokens: np.ndarray, images: Sequence[PlacedImage]
    ) -> tuple[np.ndarray, int]:
        """Positions `[axes, T]` of the prompt, and the first generated token's position."""
        return np.arange(len(tokens), dtype=np.int32)[None], len(tokens)


def check_inputs(family: Family, settings: LabelSettings) -> None:
    """Raises the UserError of a job whose inputs, schemas or cache the family does not take."""
    for kind, column in (("video", settings.input.video), ("audio", settings.input.audio)):
        if column is not None and kind not in family.takes:
            raise UserError(
                f"input.{kind} names the column {column!r}, and {settings.model.id} takes no"
                f" {kind}; `vlm-batch models` says which families do"
            )
    for name, prompt in settings.prompts.items():
        check_schema(name, prompt)
    if settings.engine.kv_cache == "fp8" and (family.sizes.latent_values or not family.fused):
        raise UserError(
            f"engine.kv_cache fp8 is not supported for {family.name} models; write `kv_cache: auto`"
        )


def default_sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says about drawing tokens; greedy unless it samples."""
    known = {key: generation_config.get(key) for key in _SAMPLING_KEYS}
    sampling = {key: value for key, value in known.items() if value is not None}
    if not generation_config.get("do_sample", False):
        kept = sampling.get("repetition_penalty")
        return {"temperature": 0.0} | ({"repetition_penalty": kept} if kept else {})
    sampling.setdefault("temperature", 1.0)
    if sampling["temperature"] < GREEDY_BELOW or sampling.get("top_k") == 1:
        sampling["temperature"] = 0.0
    return sampling


def end_tokens(
    checkpoint: Checkpoint, config: Mapping[str, Any], template: Template
) -> tuple[int, ...]:
    """Ids that end an answer: the generation_config's, else the config's and the template's."""
    ids = _as_ids(checkpoint.generation_config.get("eos_token_id"))
    if ids:
        return ids
    known = [checkpoint.token_id(token) for token in template.stop]
    named = [i for i in known if i is not None]
    return tuple(dict.fromkeys([*_as_ids(config.get("eos_token_id")), *named]))


def _as_ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list | tuple) else (int(value),)
