"""Which family a checkpoint belongs to, judged by its plain config.json.

One line a family; a spec is imported only when its turn comes. Imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.family import Family
from pipeline.settings import ModelSettings


@dataclass(frozen=True, slots=True)
class Memory:
    """What an example needs, in GB: its weights on the device, and the least card that runs it.

    Those are `ModelSizes.num_bytes` and `estimate.least_card_gb`; a test holds them together.
    """

    weights_gb: float  # in bfloat16
    weights_fp8_gb: float  # with model.quantization fp8
    needed_gb: float
    needed_fp8_gb: float


@dataclass(frozen=True, slots=True)
class Entry:
    """One family of the table."""

    name: str
    spec: str
    example: str
    templates: tuple[str, ...]
    memory: Memory | None
    takes: tuple[str, ...] = ("image",)
    fused: bool = True


_GENERIC = Entry(
    name="generic",
    spec="pipeline.models.families.generic.spec",
    example="any image-text-to-text model of transformers",
    templates=("auto",),
    memory=None,
    fused=False,
)
FAMILIES = (
    Entry(
        name="qwen-vl",
        spec="pipeline.models.families.qwen_vl.spec",
        example="Qwen/Qwen2.5-VL-7B-Instruct",
        templates=("qwen2-vl",),
        memory=Memory(16.6, 10.1, 21.2, 13.9),
        takes=("image", "video"),
    ),
    Entry(
        name="gemma3",
        spec="pipeline.models.families.gemma3.spec",
        example="google/gemma-3-4b-it",
        templates=("gemma-it",),
        memory=Memory(8.6, 5.4, 13.0, 9.5),
    ),
    Entry(
        name="mllama",
        spec="pipeline.models.families.mllama.spec",
        example="meta-llama/Llama-3.2-11B-Vision-Instruct",
        templates=("llama_3_vision",),
        memory=Memory(21.3, 12.6, 27.4, 17.7),
    ),
    Entry(
        name="janus",
        spec="pipeline.models.families.janus.spec",
        example="deepseek-ai/Janus-Pro-7B",
        templates=("janus-pro",),
        memory=Memory(14.5, 8.4, 22.8, 16.0),
    ),
    Entry(
        name="deepseek-vl2",
        spec="pipeline.models.families.deepseek_vl2.spec",
        example="deepseek-ai/deepseek-vl2",
        templates=("deepseek-vl2",),
        memory=Memory(54.9, 28.6, 63.6, 34.3),
    ),
    Entry(
        name="kimi-vl",
        spec="pipeline.models.families.kimi_vl.spec",
        example="moonshotai/Kimi-VL-A3B-Instruct",
        templates=("kimi-vl",),
        memory=Memory(32.8, 17.5, 39.0, 22.0),
    ),
    Entry(
        name="minicpm-v",
        spec="pipeline.models.families.minicpm.spec",
        example="openbmb/MiniCPM-V-2_6",
        templates=("minicpmv",),
        memory=Memory(16.2, 9.7, 20.7, 13.5),
        takes=("image", "video"),
    ),
    Entry(
        name="minicpm-o",
        spec="pipeline.models.families.minicpm_o.spec",
        example="openbmb/MiniCPM-o-2_6",
        templates=("minicpmo",),
        memory=Memory(16.8, 10.3, 21.4, 14.2),
        takes=("image", "video", "audio"),
    ),
    Entry(
        name="smolvlm",
        spec="pipeline.models.families.smolvlm.spec",
        example="HuggingFaceTB/SmolVLM2-2.2B-Instruct",
        templates=("smolvlm",),
        memory=Memory(4.5, 2.9, 9.0, 7.2),
    ),
    Entry(
        name="pixtral",
        spec="pipeline.models.families.pixtral.spec",
        example="mistral-community/pixtral-12b",
        templates=("mistral",),
        memory=Memory(25.4, 14.5, 31.9, 19.8),
    ),
    Entry(
        name="llava",
        spec="pipeline.models.families.llava.spec",
        example="liuhaotian/llava-v1.5-13b",
        templates=("vicuna_v1.1", "mistral", "chatml-llava"),
        memory=Memory(26.7, 14.0, 39.3, 25.2),
    ),
    Entry(
        name="llava-next",
        spec="pipeline.models.families.llava.next",
        example="lmms-lab/llava-next-72b",
        templates=("chatml-llava", "llava_llama_3"),
        memory=Memory(145.3, 75.5, 187.5, 110.0),
    ),
    Entry(
        name="llava-onevision",
        spec="pipeline.models.families.llava.onevision",
        example="lmms-lab/llava-onevision-qwen2-7b-ov",
        templates=("chatml-llava",),
        memory=Memory(16.1, 9.5, 20.6, 13.3),
        takes=("image", "video"),
    ),
    _GENERIC,  # last: it takes what no family of ours does
)


def list_families() -> list[dict[str, Any]]:
    """The table that `vlm-batch models` prints."""
    return [
        {
            "family": entry.name,
            "example": entry.example,
            "templates": list(entry.templates),
            "takes": list(entry.takes),
            "fused": entry.fused,
            **{name: getattr(entry.memory, name, None) for name in Memory.__slots__},
        }
        for entry in FAMILIES
    ]


_PARTS = ("text_config", "language_config", "vision_config", "audio_config")


def family_for(checkpoint: Checkpoint, settings: ModelSettings) -> Family:
    """The family of `checkpoint`. Raises UserError where none fits, or the template does not."""
    for part in _PARTS:
        if not isinstance(checkpoint.config.get(part) or {}, dict):
            raise UserError(
                f"model.id {settings.id!r}: {part} in its config.json is no JSON object"
            )
    for entry in FAMILIES:
        spec = import_module(entry.spec)
        if _matches(spec, entry.name, checkpoint):
            _check_template(settings.chat_template, entry.name, entry.templates)
            family = _build(spec, entry.name, checkpoint, settings)
            if settings.pan_and_scan and not family.pans_and_scans:
                raise UserError(
                    f"model.pan_and_scan is Gemma 3's; this {entry.name} model has none"
                )
            _check_template(settings.chat_template, entry.name, family.templates)
            return family
    config = checkpoint.config
    raise UserError(
        f"model.id {settings.id!r}: no model family fits its config.json"
        f" (model_type {config.get('model_type')!r}, architectures {config.get('architectures')});"
        " `vlm-batch models` lists them"
    )


def _matches(spec: Any, name: str, checkpoint: Checkpoint) -> bool:
    try:
        return bool(spec.matches(checkpoint.config))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise checkpoint.describes_no(name, error) from error


def _build(spec: Any, name: str, checkpoint: Checkpoint, settings: ModelSettings) -> Family:
    """The spec's family. Raises UserError where values of the checkpoint's files make none."""
    try:
        family: Family = spec.build(checkpoint, settings)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise checkpoint.describes_no(name, error) from error
    return family


def _check_template(wanted: str, family: str, templates: tuple[str, ...]) -> None:
    """Raise UserError unless `wanted` is one of `templates`."""
    if wanted in ("auto", *templates):
        return
    right = " or ".join(repr(name) for name in dict.fromkeys([*templates, "auto"]))
    raise UserError(
        f"model.chat_template {wanted!r} is not the template of this {family} model; write {right}"
    )
