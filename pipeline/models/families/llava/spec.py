"""LLaVA 1.5 and 1.6 on Vicuna, Mistral and Yi: detection, templates, image layout, prompt tokens.

The base of the other rows (`next.py`, `onevision.py`). Transformers' copy of a checkpoint gets the
original's prompt, so that both answer alike; its pictures are made as its own processor's settings
say. The weights' side stands in `model.py`. Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.families.llava import pictures, tiles
from pipeline.models.families.llava.config import (
    LLAMA_3_VOCABULARY,
    LlavaConfig,
    read,
    row_of,
)
from pipeline.models.family import (
    Family,
    ModelSizes,
    decoder_sizes,
    default_sampling,
    end_tokens,
)
from pipeline.models.processor import mean_colour
from pipeline.rows import ImageLayout, Turn, View
from pipeline.settings import ModelSettings
from pipeline.templates import chatml_llava, llava_llama_3, mistral, vicuna
from pipeline.templates.render import Control, Template

if TYPE_CHECKING:
    from pipeline.tokenizer import Tokenizer

_YI_VOCABULARIES = (64_000, 64_064)  # the original's and transformers'
_MAX_CROPPED = 65_536  # pixels of the longer side before the middle is cut out


def matches(config: Mapping[str, Any]) -> bool:
    """True for a LLaVA 1.5 or 1.6 checkpoint, judged by its plain config.json."""
    return row_of(config) == "llava"


def build(checkpoint: Checkpoint, settings: ModelSettings) -> Llava:
    return Llava(checkpoint, settings)


class Llava(Family):
    """A LLaVA checkpoint without its weights."""

    name = "llava"

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        self.config = config = _limited(read(checkpoint), settings)
        self.template = template_of(config, checkpoint)
        self.templates = (self.template.name,)
        self.context_length = int(config.text["max_position_embeddings"])
        stops = [checkpoint.token_id(token) for token in self.template.stop]
        ends = end_tokens(checkpoint, config.text, self.template)
        self.eos_token_ids = tuple(dict.fromkeys([*ends, *(i for i in stops if i is not None)]))
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.image_token_id = _image_token(checkpoint, config)
        self.sizes = _sizes(config)
        tokenizer = checkpoint.json("tokenizer_config.json") or {}
        self.legacy_blanks = tokenizer.get("legacy") in (None, True)
        self.named_tokens = _named_tokens(tokenizer)
        self.added_start = None if self.template.start else _added_start(tokenizer)
        self._read_processor(checkpoint.preprocessor_config)

    def _read_processor(self, processor: Mapping[str, Any]) -> None:
        read = {} if self.config.original else processor
        self.image_mean, self.image_std = mean, _ = pictures.colours(read, self.config.tower.kind)
        self.background = mean_colour(mean)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """One square picture, or a small one and the tiles of a large one."""
        if self.config.tiled:
            return self._tiled(width, height)
        return self._square(width, height, self.config.aspect)

    def _square(self, width: int, height: int, aspect: str, newline: bool = False) -> ImageLayout:
        tower = self.config.tower
        views: tuple[View, ...] = ()
        if aspect == "pad" and width != height:
            views = (tiles.padded_view(height, width, tower.side, self.background),)
        elif aspect == "crop" and width != height:
            view = tiles.cropped_view(height, width, tower.side)
            if max(view.resized) > _MAX_CROPPED:
                raise RowError("bad_aspect_ratio", f"The image is {width}x{height}.")
            views = (view,)
        grid = (1, tower.grid, tower.grid)
        tokens = self.config.picture_tokens + newline
        return ImageLayout(tower.side, tower.side, grid, tokens, views)

    def _tiled(self, width: int, height: int) -> ImageLayout:
        """`grid` counts the tiles, and the rows and columns of features before any pooling."""
        c, patches = self.config, self.config.tower.grid
        resolution = tiles.best_resolution(height, width, c.pinpoints)
        views = tiles.tile_views(height, width, resolution, c.tower.side)
        down, across = (size // c.tower.side for size in resolution)
        full = (down * patches, across * patches)
        grid = tiles.unpadded(height, width, full, rounded=not c.original)
        rows, columns = tiles.pooled(grid, patches, c.max_tiles)
        if min(rows, columns) < 1 <= min(grid):
            raise RowError("bad_aspect_ratio", f"The image is {width}x{height}.")
        tokens = patches**2 + rows * (columns + 1)
        return ImageLayout(*resolution, (1 + down * across, *grid), tokens, views)

    def tokenize(
        self, turns: Sequence[Turn], layouts: Sequence[ImageLayout], tokenizer: Tokenizer
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """As the original code: text is cut at the images and each part tokenized by itself."""
        start = () if self.added_start is None else (tokenizer.id(self.added_start),)
        chunks: list[np.ndarray] = [np.array(start, np.int32)]
        starts: list[int] = []
        begun = False  # the part has something before this piece
        for piece in self.render(turns):
            if isinstance(piece, int):
                starts.append(sum(map(len, chunks)))
                chunks.append(self.image_tokens(layouts[piece]))
                begun = False
            else:
                chunks.append(self._ids(piece, begun, tokenizer))
                begun = begun or piece != self.template.start
        return np.concatenate(chunks), tuple(starts)

    def _ids(self, piece: str, begun: bool, tokenizer: Tokenizer) -> np.ndarray:
        """A SentencePiece tokenizer sets a blank before each part, even before a control token
        that its config does not name; a legacy one sets it after each control token.
        """
        control = isinstance(piece, Control)
        ids = tokenizer.ids(piece, control, continued=begun and not self.legacy_blanks)
        bare = control and not begun and piece not in (self.template.start, *self.named_tokens)
        if bare and not self.legacy_blanks and tokenizer.prefix is not None:
            return np.concatenate([np.array([tokenizer.prefix], np.int32), ids])
        return ids


def _named_tokens(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The special tokens that tokenizer_config.json gives a role."""
    listed = list(config.get("additional_special_tokens") or ())
    listed += [value for key, value in config.items() if key.endswith("_token") and value]
    names = [entry.get("content") if isinstance(entry, dict) else entry for entry in listed]
    return tuple(name for name in names if isinstance(name, str))


def _limited(config: LlavaConfig, settings: ModelSettings) -> LlavaConfig:
    """`config` without the resolutions that `model.max_pixels` forbids."""
    if settings.min_pixels is not None:
        raise UserError("model.min_pixels has no meaning for LLaVA models; leave it null.")
    most = settings.max_pixels
    if most is None:
        return config
    least = min((a * b for a, b in config.pinpoints), default=config.tower.side**2)
    if most < least:
        raise UserError(f"model.max_pixels must be at least {least} for this model.")
    return replace(config, pinpoints=tuple(p for p in config.pinpoints if p[0] * p[1] <= most))


def _added_start(config: Mapping[str, Any]) -> str | None:
    """The token that a SentencePiece tokenizer itself sets before the prompt, if it does."""
    llama = str(config.get("tokenizer_class", "")).startswith("LlamaTokenizer")
    if not llama or not config.get("add_bos_token", True):
        return None
    token = config.get("bos_token") or "<s>"
    return str(token["content"] if isinstance(token, dict) else token)


def template_of(config: LlavaConfig, checkpoint: Checkpoint) -> Template:
    """The template that goes with the checkpoint's language model."""
    if config.decoder == "qwen2":
        return chatml_llava.TEMPLATE
    if config.decoder == "mistral":
        return mistral.LLAVA
    if int(config.text["vocab_size"]) >= LLAMA_3_VOCABULARY:
        return llava_llama_3.TEMPLATE
    yi = config.text["vocab_size"] in _YI_VOCABULARIES
    if yi or checkpoint.token_id("<|im_start|>") is not None:
        return chatml_llava.YI
    return vicuna.TEMPLATE


def _image_token(checkpoint: Checkpoint, config: LlavaConfig) -> int:
    """An id for the places of images; the original layout has none, and no place keeps its row."""
    found = checkpoint.config.get("image_token_index", checkpoint.config.get("image_token_id"))
    if not config.original and found is not None:
        return int(found)
    last = int(config.text["vocab_size"]) - 1
    return last if config.decoder == "qwen2" or last + 1 >= LLAMA_3_VOCABULARY else 0


def _sizes(config: LlavaConfig) -> ModelSizes:
    tower, hidden = config.tower, config.text["hidden_size"]
    block = 4 * tower.size**2 + 2 * tower.size * tower.inner
    return ModelSizes(
        **decoder_sizes(config.text, config.tied),
        vision_params=tower.depth * block,
        projector_params=tower.size * hidden + max(0, config.projector_layers - 1) * hidden**2,
        # Tiles overlap the edge and are scaled down; of a video, four patches make a token.
        patches_per_token=2 if config.max_tiles else 1,
        patches_per_run=tower.grid**2,
        vision_width=tower.size,
        vision_full_blocks=tower.depth,
    )
