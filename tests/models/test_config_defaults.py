"""Keys that a config.json leaves out have the values of transformers' classes, family by family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import UserError
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import DecoderConfig, common_config
from pipeline.models.families.gemma3 import model as gemma3
from pipeline.models.families.janus import model as janus
from pipeline.models.families.llava import config as llava_config
from pipeline.models.families.llava import model as llava
from pipeline.models.families.mllama import model as mllama
from pipeline.models.families.pixtral import model as pixtral
from pipeline.models.families.pixtral import spec as pixtral_spec
from pipeline.models.families.qwen_vl import model as qwen_vl
from pipeline.models.families.qwen_vl import spec as qwen_spec
from pipeline.models.families.smolvlm import spec as smolvlm
from pipeline.models.rope import rope_config
from pipeline.settings import ModelSettings
from tests.helpers.checkpoints import write_qwen2_5_vl, write_qwen2_vl
from tests.helpers.gemma_checkpoint import write_gemma3
from tests.helpers.parity import make_prompt, open_found, open_ours, our_logits, random_text
from tests.helpers.pixtral_checkpoint import write_twin as write_pixtral
from tests.helpers.smolvlm_checkpoint import write_smolvlm

transformers = pytest.importorskip("transformers")

LLAVA = ("LlavaForConditionalGeneration", "LlavaNextForConditionalGeneration")
ONEVISION = "LlavaOnevisionForConditionalGeneration"
TEXT = {
    "vocab_size": 1000,
    "hidden_size": 512,
    "intermediate_size": 700,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 40_000,
    "rms_norm_eps": 1e-4,
    "rope_theta": 123.0,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
QWEN_WINDOW = {"use_sliding_window": True, "sliding_window": 77, "max_window_layers": 5}
GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 99,
    "sliding_window": 55,
    "rope_local_base_freq": 7.0,
}


def _llava(architecture: str) -> Any:
    def read(config: dict[str, Any], folder: Path) -> DecoderConfig:
        config = config | {"architectures": [architecture]}
        return llava.decoder_config(llava_config.read(_checkpoint(folder, config)), False)

    return read


def _smolvlm(config: dict[str, Any], folder: Path) -> DecoderConfig:
    text = smolvlm.text_config(config)
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    return common_config(text, rope_config(text, head_dim))


def _qwen(variant: str) -> Any:
    return lambda config, folder: qwen_vl.decoder_config(config, variant)


CASES = {
    "qwen2": ("Qwen2VLConfig", TEXT | MROPE | QWEN_WINDOW, _qwen("qwen2")),
    "qwen2_5": ("Qwen2_5_VLConfig", TEXT | MROPE | QWEN_WINDOW, _qwen("qwen2_5")),
    "qwen3": ("Qwen3VLConfig", TEXT | MROPE | {"head_dim": 96}, _qwen("qwen3")),
    "gemma3": ("Gemma3Config", TEXT | GEMMA, lambda c, _: gemma3.decoder_config(c)),
    "mllama": ("MllamaConfig", TEXT, lambda c, _: mllama.decoder_config(c)),
    "janus": ("JanusConfig", TEXT, lambda c, _: janus.decoder_config(c, False)),
    "smolvlm": ("SmolVLMConfig", TEXT | {"model_type": "llama"}, _smolvlm),
    "pixtral": (
        "LlavaConfig",
        TEXT | {"model_type": "mistral", "head_dim": 40},
        lambda c, _: pixtral.decoder_config(c),
    ),
    "llava-llama": ("LlavaConfig", TEXT | {"model_type": "llama"}, _llava(LLAVA[0])),
    "llava-mistral": ("LlavaNextConfig", TEXT | {"model_type": "mistral"}, _llava(LLAVA[1])),
    "onevision": (
        "LlavaOnevisionConfig",
        TEXT | QWEN_WINDOW | {"model_type": "qwen2"},
        _llava(ONEVISION),
    ),
}


def _checkpoint(folder: Path, config: dict[str, Any]) -> Checkpoint:
    (folder / "config.json").write_text(json.dumps(config))
    return Checkpoint("tiny", folder)


def _theirs(name: str, config: dict[str, Any]) -> dict[str, Any]:
    text = getattr(transformers, name)(**json.loads(json.dumps(config))).text_config
    rope = text.rope_parameters
    theta = rope.get("full_attention", rope)["rope_theta"]
    head_dim = getattr(text, "head_dim", None)
    kinds = getattr(text, "layer_types", None)
    window = getattr(text, "sliding_window", None)
    everywhere = ["sliding_attention" if window else ""] * text.num_hidden_layers
    local = [kind == "sliding_attention" for kind in kinds or everywhere]
    return {
        "num_layers": text.num_hidden_layers,
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_heads": text.num_attention_heads,
        "num_kv_heads": text.num_key_value_heads,
        "head_dim": head_dim or text.hidden_size // text.num_attention_heads,
        "vocab_size": text.vocab_size,
        "eps": text.rms_norm_eps,
        "theta": theta,
        "windows": tuple(window if near else None for near in local) if any(local) else (),
    }


def _ours(config: DecoderConfig) -> dict[str, Any]:
    found = {key: getattr(config, key) for key in config.__dataclass_fields__}
    return found | {
        "theta": config.rope.theta,
        "windows": config.windows if any(config.windows) else (),
    }


@pytest.mark.parametrize("case", CASES)
def test_a_key_left_out_of_the_text_config(tmp_path: Path, case: str) -> None:
    name, text, read = CASES[case]
    names = {"qwen3": {"model_type": "qwen3_vl"}}.get(case, {})
    for missing in (None, *text):
        if case == "onevision" or missing not in ("model_type", "rope_scaling"):
            kept = {key: value for key, value in text.items() if key != missing}
            theirs = _theirs(name, {"text_config": kept})
            ours = _ours(read(names | {"text_config": kept}, tmp_path))
            assert {key: ours[key] for key in theirs} == theirs, missing


@pytest.mark.parametrize("architecture", [*LLAVA, ONEVISION])
@pytest.mark.parametrize("vision", [None, {}, {"num_hidden_layers": 3}])
def test_a_llava_tower_without_sizes(
    tmp_path: Path, architecture: str, vision: dict[str, int] | None
) -> None:
    """Once a missing vision_config meant a tower of no blocks."""
    pairs = {"image_grid_pinpoints": [[2688, 2688]]}  # a multiple of all sides
    given = pairs if vision is None else pairs | {"vision_config": vision}
    theirs = getattr(transformers, architecture.replace("ForConditionalGeneration", "Config"))(
        **json.loads(json.dumps(given))
    )
    config = given | {"architectures": [architecture]}
    ours = llava_config.read(_checkpoint(tmp_path, config)).tower
    sizes, layer = theirs.vision_config, theirs.vision_feature_layer
    assert sizes.model_type.startswith(ours.kind)
    assert ours.depth == sizes.num_hidden_layers + 1 + layer
    assert (ours.blocks, ours.size, ours.heads, ours.inner, ours.patch, ours.side) == (
        sizes.num_hidden_layers,
        sizes.hidden_size,
        sizes.num_attention_heads,
        sizes.intermediate_size,
        sizes.patch_size,
        sizes.image_size,
    )


@pytest.mark.parametrize("key", ["vision_feature_layer", "vision_feature_select_strategy"])
def test_pixtral_without_its_features_key(tmp_path: Path, key: str) -> None:
    """The class's default is another layer, and a patch less: nothing to guess."""
    write_pixtral(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config[key]
    settings = ModelSettings(id=str(tmp_path))
    with pytest.raises(UserError, match=key):
        pixtral_spec.build(_checkpoint(tmp_path, config), settings)


def test_a_tied_checkpoint_with_a_head_of_its_own(tmp_path: Path) -> None:
    """transformers takes the head where it differs; it was once dropped without a word."""
    folder = write_qwen2_vl(tmp_path, tied=True)
    prompt = make_prompt(open_ours(folder, qwen_spec.build).family, [random_text(20)])
    tied = our_logits(open_ours(folder, qwen_spec.build), prompt)
    file = next(folder.glob("*.safetensors"))
    tensors = load_file(file)
    for factor in (1.0, -2.0):
        own = tensors["model.embed_tokens.weight"] * factor
        save_file(tensors | {"lm_head.weight": own}, file, {"format": "pt"})
        found = our_logits(open_ours(folder, qwen_spec.build), prompt)
        torch.testing.assert_close(found, tied * factor)
        theirs = transformers.Qwen2VLForConditionalGeneration.from_pretrained(folder).eval()
        with torch.no_grad():
            reference = theirs(input_ids=torch.from_numpy(prompt.tokens)[None].long()).logits[0]
        torch.testing.assert_close(found, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("write", "part", "change", "words"),
    [
        (write_qwen2_vl, "preprocessor_config.json", {"do_resize": False}, "do_resize"),
        (write_qwen2_vl, "preprocessor_config.json", {"rescale_factor": 0.5}, "rescale_factor"),
        (write_gemma3, "preprocessor_config.json", {"do_normalize": False}, "do_normalize"),
        (write_gemma3, "preprocessor_config.json", {"resample": 0}, "resample"),
        (write_gemma3, "config.json", {"mm_tokens_per_image": 25}, "averaged to 25 tokens"),
        (write_smolvlm, "preprocessor_config.json", {"resample": 3}, "resample 3"),
        (write_smolvlm, "preprocessor_config.json", {"size": {"height": 9}}, "size"),
        (write_smolvlm, "config.json", {"scale_factor": 3}, "scale_factor 3"),
        (write_qwen2_vl, "video_preprocessor_config.json", {"patch_size": 7}, "7 for videos"),
        (write_qwen2_5_vl, "config.json", {"vision_config": {"window_size": 9}}, "window_size 9"),
        (write_qwen2_vl, "preprocessor_config.json", {"merge_size": 3}, "merge_size is 3"),
        (write_qwen2_vl, "preprocessor_config.json", {"max_pixels": -1}, "below 1"),
        (write_qwen2_vl, "preprocessor_config.json", {"image_std": [1, 2]}, "image_std"),
        (write_qwen2_vl, "config.json", {"image_token_id": 10**6}, "token id 1000000"),
        (write_qwen2_vl, "config.json", {"num_attention_heads": 3}, "no multiple"),
        (write_qwen2_vl, "config.json", {"rms_norm_eps": None}, "NoneType"),
        (write_qwen2_vl, "config.json", {"num_hidden_layers": 0}, "num_layers is 0"),
        (write_qwen2_vl, "config.json", {"rope_theta": "x"}, "rope_theta is 'x'"),
        (write_qwen2_vl, "config.json", {"architectures": 7}, "not iterable"),
        (write_qwen2_vl, "config.json", {"rope_scaling": {"mrope_section": 7}}, "not iterable"),
        (write_qwen2_vl, "config.json", {"vision_config": {"num_heads": "x"}}, "TypeError"),
        (
            write_qwen2_5_vl,
            "config.json",
            {"layer_types": ["sliding_attention"] * 3},
            "sliding_attention",
        ),
        (
            write_qwen2_5_vl,
            "config.json",
            {"layer_types": ["sliding_attention"], "use_sliding_window": True},
            "1 layers of 3",
        ),
    ],
)
def test_what_no_model_of_ours_does_is_refused(
    tmp_path: Path, write: Any, part: str, change: dict[str, Any], words: str
) -> None:
    path = write(tmp_path) / part
    found = json.loads(path.read_text()) if path.is_file() else {}
    nested = {k: found[k] | v for k, v in change.items() if k == "vision_config"}
    path.write_text(json.dumps(found | change | nested))
    with pytest.raises(UserError, match=words):
        open_found(tmp_path)
