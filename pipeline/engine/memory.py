"""How many lanes, prefill tokens and cache places fit the device.

Weights are loaded already; the rest is divided between the activations of one prefill and one
step, and the cache. Knows no request.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from pipeline.engine.kv_cache import KVCache
from pipeline.errors import UserError
from pipeline.models.base import Model
from pipeline.settings import EngineSettings

GIB = 1 << 30
CPU_CACHE_BYTES = 2 * GIB
CUDA_CONTEXT_BYTES = 1 * GIB  # library workspaces and captured graphs
LOGIT_BYTES = 40  # of a lane's logit in a sampled step: noise of 64 bits, the sort and its order
SHORT_SEQUENCE = 640  # tokens; bounds the lanes, which cost little: what does not fit waits
TYPICAL_TEXT = 320  # tokens of a sequence whose images are states, not tokens
TYPICAL_IMAGE = (1024, 768)
MAX_IMAGES = 4  # of a lane at once, on average


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """What the engine was given: lanes, tokens of a prefill batch, token places."""

    num_slots: int
    prefill_tokens: int
    num_places: int
    num_state_places: int = 0  # for image states, where layers attend to them


def place_bytes(model: Model, float8: bool = False) -> int:
    """Bytes of one token's keys and values; `float8` as in `engine.kv_cache`."""
    c = model.decoder.config
    layers, size = c.num_cached_layers, model.dtype.itemsize
    return KVCache.bytes_per_place(
        layers, c.num_kv_heads, c.head_dim, size, c.mla is not None, float8
    )


def state_bytes(model: Model) -> int:
    """Bytes of one image state's keys and values."""
    c = model.decoder.config
    layers, size = len(c.cross_layers), model.dtype.itemsize
    return KVCache.bytes_per_place(layers, c.num_kv_heads, c.head_dim, size)


def states_of_an_image(model: Model) -> int:
    if not model.decoder.config.cross_layers:
        return 0
    layout = model.family.layout(*TYPICAL_IMAGE)
    return layout.num_states + layout.num_padding_states


def activation_bytes(model: Model, prefill_tokens: int, num_slots: int) -> int:
    """Upper estimate of what one prefill batch with its images, or one step, needs at once."""
    c = model.decoder.config
    qkv = (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    per_token = 3 * c.intermediate_size + 6 * c.hidden_size + 2 * qkv
    if c.moe is not None:
        per_token += c.moe.top_k * (c.moe.inner + 2 * c.hidden_size)
    prefill = prefill_tokens * per_token * model.dtype.itemsize
    # NOTE: four patches a token, a tower as wide as half the decoder, images of 8 bytes a value.
    vision = prefill_tokens * 4 * 3 * c.hidden_size * model.dtype.itemsize
    logits = LOGIT_BYTES * num_slots * c.vocab_size
    return prefill + vision + logits


def size_engine(model: Model, settings: EngineSettings) -> EngineSizes:
    """Divide the device's free memory. Raises UserError when no sequence would fit."""
    cuda = model.device.type == "cuda"
    slots, tokens = settings.decode_slots, settings.prefill_tokens
    if tokens == "auto":
        tokens = 16_384 if cuda else 2_048
    wanted = slots if slots != "auto" else (512 if cuda else 256)
    free = free_bytes(model.device, settings)
    states = states_of_an_image(model)
    typical = TYPICAL_TEXT if states else SHORT_SEQUENCE
    place = place_bytes(model, settings.kv_cache == "fp8")
    image, text = states * state_bytes(model), typical * place
    while True:
        spare = free - activation_bytes(model, tokens, wanted)
        places = spare * text // (text + image) // place
        if places >= wanted * typical or (slots != "auto" and places >= tokens):
            break
        if settings.prefill_tokens == "auto" and tokens > 2_048 and places < 2 * tokens:
            tokens //= 2
        elif slots == "auto" and wanted > 8:
            wanted = max(8, wanted * 7 // 8 // 8 * 8)
        else:
            break
    if places < 1024:
        raise UserError(
            f"The model leaves {free / GIB:.1f} GiB of the device, too little for one sequence; "
            "lower engine.prefill_tokens or take a larger device."
        )
    limit = wanted * (settings.max_context or model.family.context_length)
    places = int(min(places, limit))
    if not states:
        return EngineSizes(wanted, tokens, places)
    num_states = (spare - places * place) // state_bytes(model)
    return EngineSizes(wanted, tokens, places, min(num_states, wanted * MAX_IMAGES * states))


def free_bytes(device: torch.device, settings: EngineSettings) -> int:
    """What the settings leave of the device beside what is on it now."""
    if device.type != "cuda":
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return min(int(pages * settings.memory_fraction) // 2, CPU_CACHE_BYTES)
    used, total = device_bytes(device, settings)
    return int(total * settings.memory_fraction) - used - CUDA_CONTEXT_BYTES


def device_bytes(device: torch.device, settings: EngineSettings) -> tuple[int, int]:
    """Bytes in use on the GPU, by whom ever, and its size as far as the settings allow."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    limit = settings.memory_limit_gb
    return total - free, total if limit is None else min(total, int(limit * 1e9))
