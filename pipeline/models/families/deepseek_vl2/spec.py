"""DeepSeek-VL2 (tiny, small, base): detection, tiles of an image, prompt.

An image is a whole view and, in at most two images a conversation, the best of several canvases cut
into square tiles. The weights' side stands in `model.py`. Imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pipeline.errors import RowError, UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.deepseek_sizes import text_sizes
from pipeline.models.families.deepseek_vl2 import tiles
from pipeline.models.family import Family, ModelSizes, default_sampling, end_tokens
from pipeline.models.processor import mean_colour
from pipeline.rows import ImageLayout
from pipeline.settings import ModelSettings
from pipeline.templates import deepseek_vl2

MAX_TILED_IMAGES = 2  # of a conversation; with more, each is two pictures
# What the original classes take for a key that the json leaves out.
_LANGUAGE = {
    "vocab_size": 102400,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "moe_intermediate_size": 1407,
    "num_hidden_layers": 30,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "gready",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
_VISION = {"image_size": 384, "patch_size": 16, "width": 1024, "layers": 24, "heads": 16}
_PROJECTOR = {"input_dim": 1152, "n_embed": 2048, "depth": 2, "mlp_ratio": 1, "downsample_ratio": 2}
_PROMPT = {"sft_format": "deepseek", "image_token": "<image>"}
# The official processor adds those that the tokenizer lacks, in this order.
_ADDED = (
    "<｜▁pad▁｜>", "<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>",
    "<|User|>", "<|Assistant|>",
)  # fmt: skip


def text_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The language model's keys, with the original defaults."""
    return _LANGUAGE | config["language_config"]


def vision_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's keys, with the original defaults and the MLP's width as `inner`."""
    v = _VISION | config["vision_config"]
    return v | {"inner": int(v["width"] * v.get("mlp_ratio", 4))}


def projector_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The projector's keys, with the original defaults."""
    return _PROJECTOR | config["projector_config"]


def matches(config: Mapping[str, Any]) -> bool:
    """True for DeepSeek-VL2, judged by its plain config.json; DeepSeek-OCR has its model_type."""
    if config.get("model_type") != "deepseek_vl_v2":
        return False
    vision, projector = config.get("vision_config") or {}, config.get("projector_config") or {}
    return (
        "language_config" in config
        and str(vision.get("model_name", "siglip")).startswith("siglip")
        and projector.get("projector_type", "downsample_mlp_gelu") == "downsample_mlp_gelu"
    )


def build(checkpoint: Checkpoint, settings: ModelSettings) -> DeepseekVL2:
    return DeepseekVL2(checkpoint, settings)


class DeepseekVL2(Family):
    """A DeepSeek-VL2 checkpoint without its weights."""

    name = "deepseek-vl2"
    templates = ("deepseek-vl2",)
    template = deepseek_vl2.TEMPLATE
    transparency = "drop"

    def __init__(self, checkpoint: Checkpoint, settings: ModelSettings) -> None:
        config = checkpoint.config
        if config.get("tile_tag") != "2D":
            raise UserError(f"model.id {settings.id!r}: only the tile_tag '2D' is known")
        text = text_config(config)
        self.own_ids = _control_ids(checkpoint)
        self.image_token_id = self.own_ids["<image>"]
        self.context_length = int(text["max_position_embeddings"])
        # NOTE: the classes' default eos_token_id belongs to an older tokenizer.
        self.eos_token_ids = end_tokens(checkpoint, {}, self.template)
        self.default_sampling = default_sampling(checkpoint.generation_config)
        self.global_first = config.get("global_view_pos", "head") == "head"
        self.sizes = _sizes(config)
        self._read_processor(checkpoint, config)
        self._limit(settings)

    def _read_processor(self, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
        processor = checkpoint.json("processor_config.json") or {}
        if any(processor.get(key, value) != value for key, value in _PROMPT.items()):
            raise UserError(f"processor_config.json: only prompts of {_PROMPT} are known")
        found = processor.get("candidate_resolutions") or config.get("candidate_resolutions")
        self.candidates = tuple((int(w), int(h)) for w, h in found or ((384, 384),))
        self.side = self.candidates[0][0]
        if any(length % self.side for canvas in self.candidates for length in canvas):
            raise UserError(f"candidate_resolutions: not all are whole tiles of {self.side} pixels")
        patch = vision_config(config)["patch_size"]
        ratio = projector_config(config)["downsample_ratio"]
        told = processor.get("patch_size", patch), processor.get("downsample_ratio", ratio)
        if told != (patch, ratio):
            raise UserError("processor_config.json: patches do not fit the tower and projector")
        self.tile_rows = -(-(self.side // patch) // ratio)
        mean = processor.get("image_mean") or (0.5, 0.5, 0.5)
        self.background = mean_colour(mean)
        std = processor.get("image_std") or (0.5, 0.5, 0.5)
        plain = not processor.get("normalize", True)
        self.image_mean = (0.0, 0.0, 0.0) if plain else tuple(mean)
        self.image_std = (1.0, 1.0, 1.0) if plain else tuple(std)

    def _limit(self, settings: ModelSettings) -> None:
        """`model.max_pixels` is of the tiled view: larger canvases are left out."""
        most = settings.max_pixels
        if settings.min_pixels is not None or (most is not None and most < self.side**2):
            raise UserError(f"model.max_pixels must be {self.side**2} or more, min_pixels null.")
        if most is not None:
            self.candidates = tuple(c for c in self.candidates if c[0] * c[1] <= most)

    def layout(self, width: int, height: int, num_images: int = 1) -> ImageLayout:
        """The whole view and the tiled one; `grid` counts rows and columns of tiles."""
        best = (self.side, self.side)
        if num_images <= MAX_TILED_IMAGES:
            best = tiles.best_resolution(width, height, self.candidates)
        canvases = ((self.side, self.side), best)
        views = tuple(tiles.padded_view(width, height, c, self.background) for c in canvases)
        if any(min(view.resized) == 0 for view in views):
            raise RowError(
                "bad_aspect_ratio", f"The image is {width}x{height}, too thin for the model."
            )
        columns, rows = best[0] // self.side, best[1] // self.side
        count = tiles.num_tokens(self.tile_rows, rows, columns)
        return ImageLayout(best[1], best[0], (1, rows, columns), count, views)


def _control_ids(checkpoint: Checkpoint) -> dict[str, int]:
    """Ids of the tokens that the official processor makes sure of."""
    spec = json.loads(checkpoint.tokenizer_json)
    known = dict(spec["model"]["vocab"])
    known |= {entry["content"]: entry["id"] for entry in spec.get("added_tokens", ())}
    following, ids = max(known.values()) + 1, {}
    for token in _ADDED:
        if token not in known:
            known[token] = following
            following += 1
        ids[token] = known[token]
    return ids


def _sizes(config: Mapping[str, Any]) -> ModelSizes:
    v, p = vision_config(config), projector_config(config)
    unit = p["input_dim"] * p["downsample_ratio"] ** 2
    patches = (v["image_size"] // v["patch_size"]) ** 2
    return ModelSizes(
        vision_params=v["layers"] * (4 * v["width"] ** 2 + 2 * v["width"] * v["inner"]),
        projector_params=unit * p["n_embed"] + p["n_embed"] ** 2,
        patches_per_token=p["downsample_ratio"] ** 2,
        patches_per_run=patches,
        vision_width=v["width"],
        vision_full_blocks=v["layers"],
        **text_sizes(text_config(config)),
    )
