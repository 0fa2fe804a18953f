"""CLIP's and SigLIP's towers give transformers' hidden states, in its names and in timm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from pipeline.errors import UserError
from pipeline.kernels.attention import plan_attention
from pipeline.models.loading import Weights
from pipeline.models.vision.clip import ClipTower
from pipeline.models.vision.siglip import TIMM, SiglipTower
from pipeline.models.vision.vit import VitConfig, image_patches

SIDE, PATCH = 42, 14
MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.26, 0.27)
SIZES = {"hidden_size": 24, "intermediate_size": 40, "num_attention_heads": 3}
RENAME = ((r"^vision_model\.", "vision_tower."), (r"^(?!vision_tower\.)", "vision_tower."))


def config(depth: int, **options: Any) -> VitConfig:
    return VitConfig(depth, 24, 3, 40, PATCH, SIDE, **options)


def randomise(model: torch.nn.Module) -> None:
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        spread = 0.2 if parameter.ndim > 1 or name.endswith("bias") else 0.1
        offset = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data = offset + spread * torch.randn_like(parameter)


def reference(kind: str, **options: Any) -> Any:
    made = {
        "clip": (CLIPVisionModel, CLIPVisionConfig),
        "siglip": (SiglipVisionModel, SiglipVisionConfig),
    }
    model, settings = made[kind]
    built = model(
        settings(num_hidden_layers=4, image_size=SIDE, patch_size=PATCH, **SIZES, **options)
    )
    randomise(built)
    return built.eval()


def opened(tensors: dict[str, torch.Tensor], folder: Path) -> Weights:
    file = folder / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return Weights([file], "cpu", torch.float32, RENAME)


def pixels(count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, SIDE, SIDE, 3), generator=generator, dtype=torch.uint8)


def normalised(images: torch.Tensor) -> torch.Tensor:
    return ((images / 255 - torch.tensor(MEAN)) / torch.tensor(STD)).permute(0, 3, 1, 2)


def patches(images: torch.Tensor) -> torch.Tensor:
    return image_patches(images, PATCH, MEAN, STD, torch.float32)


@pytest.mark.parametrize("depth", [4, 3])
@torch.inference_mode()
def test_clip_after_any_block(depth: int, tmp_path: Path) -> None:
    theirs = reference("clip")
    weights = opened(theirs.state_dict(), tmp_path)
    tower = ClipTower(weights, config(depth, act="quick_gelu", eps=1e-5))
    weights.finish()
    hidden = theirs(normalised(pixels()), output_hidden_states=True).hidden_states[depth]
    torch.testing.assert_close(tower(patches(pixels())), hidden, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("final_norm", [True, False])
@torch.inference_mode()
def test_siglip(final_norm: bool, tmp_path: Path) -> None:
    theirs = reference("siglip")
    weights = opened(theirs.state_dict(), tmp_path)
    tower = SiglipTower(weights, config(4), final_norm=final_norm)
    weights.finish()
    out = theirs(normalised(pixels()), output_hidden_states=True)
    hidden = out.last_hidden_state if final_norm else out.hidden_states[-1]
    torch.testing.assert_close(tower(patches(pixels())), hidden, atol=2e-5, rtol=1e-4)


def in_timms_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, tensor in tensors.items():
        for old, new in (
            ("embeddings.patch_embedding", "patch_embed.proj"),
            ("embeddings.position_embedding.weight", "pos_embed"),
            ("encoder.layers", "blocks"),
            ("layer_norm", "norm"),
            ("post_layernorm", "norm"),
            ("self_attn.out_proj", "attn.proj"),
        ):
            name = name.replace(old, new)
        renamed[name] = tensor[None] if name.endswith("pos_embed") else tensor
    for name in [name for name in renamed if ".self_attn.q_proj." in name]:
        parts = [renamed.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        renamed[name.replace("self_attn.q_proj", "attn.qkv")] = torch.cat(parts)
    return {name: tensor for name, tensor in renamed.items() if ".head." not in name}


@torch.inference_mode()
def test_siglip_in_timms_names(tmp_path: Path) -> None:
    theirs = reference("siglip", vision_use_head=False)
    weights = opened(in_timms_names(theirs.state_dict()), tmp_path)
    tower = SiglipTower(weights, config(4), names=TIMM)
    weights.finish()
    hidden = theirs(normalised(pixels())).last_hidden_state
    torch.testing.assert_close(tower(patches(pixels())), hidden, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_packed_images_equal_the_batch(tmp_path: Path) -> None:
    tower = SiglipTower(opened(reference("siglip").state_dict(), tmp_path), config(4))
    cut = patches(pixels())
    places = torch.arange(9).repeat(3)
    plan = plan_attention([9, 9, 9])
    packed = tower.packed(cut.flatten(0, 1), places, plan)
    torch.testing.assert_close(packed.view(3, 9, -1), tower(cut))
    alone = tower.packed(cut[0, :6], places[:6], plan_attention([6]))
    uneven = tower.packed(torch.cat([cut[0, :6], cut[1]]), places[:15], plan_attention([6, 9]))
    torch.testing.assert_close(uneven[:6], alone, atol=1e-5, rtol=1e-5)


def test_a_missing_block_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"encoder\.layers\.4\.layer_norm1"):
        SiglipTower(opened(reference("siglip").state_dict(), tmp_path), config(5))
