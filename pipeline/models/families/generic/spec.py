"""Any other image-text-to-text model of transformers: its own chat template, unfused.

The model's processor expands and counts images when it runs; lengths here only order the work.
Knows no architecture. Imports no torch until a config is found that no family of ours takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family, ModelSizes, default_sampling, end_tokens
from pipeline.rows import ImageLayout, Turn
from pipeline.settings import ModelSettings
from pipeline.templates.render import Template

if TYPE_CHECKING:
    from pipeline.tokenizer import Tokenizer

_DEFAULT_CONTEXT = 4096
_GUESSED_FACTOR = 28  # pixels of a side that one image token covers, where nobody says
_GUESSED_TOKENS = (64, 4096)
_NO_TEMPLATE = Template("auto", control=(), user="{content}", assistant="{content}", answer="")


def matches(config: Mapping[str, Any]) -> bool:
    """True for a config that transformers itself gives an image-text-to-text class."""
    if "mm_vision_tower" in config or not config.get("architectures"):
        return False  # an original LLaVA layout, which transformers misreads
    try:
        from transformers.models.auto import modeling_auto
    except ImportError:
        return False
    names = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    known = names.get(config.get("model_type", ""), ())
    known = known if isinstance(known, tuple | list) else (known,)
    return config["architectures"][0] in known


def build(checkpoint: Checkpoint, settings: ModelSettings) -> Generic:
    return Generic(checkpoint, settings)


class Generic(Family):
    """A checkpoint that only transformers knows how to run."""

    name = "generic"
    templates = ("auto",)
    fused = False

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        text = checkpoint.config.get("text_config") or checkpoint.config
        self.template = _NO_TEMPLATE
        self.image_token_id = _first(checkpoint.config, "image_token_id", "image_token_index")
        self.context_length = _first(text, "max_position_embeddings") or _DEFAULT_CONTEXT
        self.eos_token_ids = end_tokens(checkpoint, text, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.sizes = _sizes(text, checkpoint.num_weight_bytes)
        self._checkpoint = checkpoint

    @property
    def control(self) -> tuple[str, ...]:
        return self._specials

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """The image as it is: the model's processor resizes it. Its token count is a guess."""
        fixed = _first(self._checkpoint.config, "image_seq_length", "mm_tokens_per_image")
        low, high = _GUESSED_TOKENS
        guess = min(max(width * height // _GUESSED_FACTOR**2, low), high)
        return ImageLayout(height, width, (1, 1, 1), fixed or guess)

    def prompt_text(self, turns: Sequence[Turn]) -> str:
        """The prompt as the checkpoint's own template renders it, one marker an image."""
        for turn in turns:
            for part in turn.parts:
                self._refuse_control(part)
        messages = [
            {"role": turn.role, "content": [_part(part) for part in turn.parts]} for turn in turns
        ]
        try:
            from transformers.utils.chat_template_utils import render_jinja_template

            rendered, _ = render_jinja_template(
                conversations=[messages],
                chat_template=self._chat_template,
                add_generation_prompt=True,
                **self._special_names,
            )
        except Exception as error:
            raise RowError("bad_messages", f"The model's chat template: {error}") from error
        return str(rendered[0])

    def tokenize(
        self, turns: Sequence[Turn], layouts: Sequence[ImageLayout], tokenizer: Tokenizer
    ) -> tuple[np.ndarray, tuple[int, ...]]:
        """Ids of about the right number: the exact ones are the processor's."""
        text = tokenizer.ids(self.prompt_text(turns), special=True)
        filler = self.image_token_id or 0
        blocks = [np.full(layout.num_tokens, filler, np.int32) for layout in layouts]
        ends = np.cumsum([0, *(len(block) for block in blocks)])
        return np.concatenate([*blocks, text]), tuple(int(end) for end in ends[:-1])

    def _refuse_control(self, part: str | int) -> None:
        found = isinstance(part, str) and next((s for s in self._specials if s in part), None)
        if found:
            raise RowError("bad_prompt", f"The text holds the model's control token {found!r}.")

    @cached_property
    def _specials(self) -> tuple[str, ...]:
        added = (self._checkpoint.json("tokenizer.json") or {}).get("added_tokens", ())
        return tuple(entry["content"] for entry in added if entry.get("special"))

    @cached_property
    def _special_names(self) -> dict[str, str]:
        """bos_token, eos_token and the like, which some templates print."""
        config = self._checkpoint.json("tokenizer_config.json") or {}
        named = {key: config[key] for key in config if key.endswith("_token")}
        plain = {k: v["content"] if isinstance(v, dict) else v for k, v in named.items()}
        return {key: value for key, value in plain.items() if isinstance(value, str)}

    @cached_property
    def _chat_template(self) -> str:
        folder = self._checkpoint.folder
        if (jinja := folder / "chat_template.jinja").is_file():
            return jinja.read_text("utf-8")
        for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
            found = (self._checkpoint.json(name) or {}).get("chat_template")
            if isinstance(found, str):
                return found
        raise UserError(f"model.id {self._checkpoint.id!r}: the checkpoint has no chat template")


def _part(part: str | int) -> dict[str, str]:
    return {"type": "image"} if isinstance(part, int) else {"type": "text", "text": part}


def _first(config: Mapping[str, Any], *keys: str) -> int | None:
    return next((int(config[key]) for key in keys if config.get(key) is not None), None)


def _sizes(text: Mapping[str, Any], num_bytes: int | None) -> ModelSizes:
    heads = _first(text, "num_attention_heads") or 0
    hidden = _first(text, "hidden_size") or 0
    return ModelSizes(
        num_layers=_first(text, "num_hidden_layers") or 0,
        num_heads=heads,
        num_kv_heads=_first(text, "num_key_value_heads") or heads,
        head_dim=_first(text, "head_dim") or (hidden // heads if heads else 0),
        decoder_params=(num_bytes or 0) // 2,
    )
