"""Layers are quantised one by one as they are taken: the least memory, and the same model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.models.base import Model
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.decoder import quantize_layer
from pipeline.models.loading import load_model
from pipeline.models.registry import family_for
from pipeline.models.vision.qwen import QwenTower, quantize_tower_block
from pipeline.settings import ModelSettings
from scripts.bench import published, random_weights
from tests.helpers.checkpoints import write_qwen2_5_vl
from tests.helpers.deepseek_vl2_checkpoint import write_deepseek_vl2
from tests.helpers.kimi_vl_checkpoint import write_kimi_vl
from tests.helpers.mllama_checkpoint import write_mllama

LAYERS = 12
WRITERS: dict[str, Callable[[Path], Path]] = {
    "dense, with a tower": write_qwen2_5_vl,
    "cross-attention": write_mllama,
    "experts": lambda folder: write_deepseek_vl2(folder, "base"),
    "experts and latents": write_kimi_vl,
}


class Living(TorchDispatchMode):
    """The most bytes of bfloat16 that lived at once."""

    def __init__(self) -> None:
        super().__init__()
        self.most = 0
        self._bytes: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype == torch.bfloat16:
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                self._bytes[ref.cdata] = (ref, storage.nbytes())
        self._bytes = {k: entry for k, entry in self._bytes.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self._bytes.values()))
        return out


def load(folder: Path, quantization: str, device: str = "cpu") -> Model:
    """Random weights, the same each time."""
    settings = ModelSettings(id=str(folder))
    checkpoint = Checkpoint.open(settings)
    family = family_for(checkpoint, settings)
    with random_weights.installed():
        return load_model(checkpoint, family, device, torch.bfloat16, quantization)


def deepened(folder: Path) -> Path:
    """The checkpoint's config with more layers."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for part in (config, *(v for v in config.values() if isinstance(v, dict))):
        if "num_hidden_layers" in part and "num_key_value_heads" in part:
            part["num_hidden_layers"] = LAYERS
    path.write_text(json.dumps(config))
    return folder


def tensors(part: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor below `part`, with the way to it and the types on it."""
    if isinstance(part, Tensor):
        yield name, part
    elif isinstance(part, list | tuple):
        for i, inner in enumerate(part):
            yield from tensors(inner, f"{name}.{i}")
    elif is_dataclass(part) or type(part).__module__.startswith("pipeline.models"):
        slots = {s for kind in type(part).__mro__ for s in getattr(kind, "__slots__", ())}
        names = sorted(slots | set(getattr(part, "__dict__", {})) - {"family"})
        for inner in names:
            yield from tensors(getattr(part, inner), f"{name}:{type(part).__name__}.{inner}")


def num_bytes(part: Any) -> int:
    """Bytes of the bfloat16 storages below `part`, each counted once."""
    found = (t.untyped_storage() for _, t in tensors(part) if t.dtype == torch.bfloat16)
    return sum({s.data_ptr(): s.nbytes() for s in found}.values())


@pytest.fixture(params=WRITERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return deepened(WRITERS[request.param](tmp_path))


def test_one_layer_is_plain_at_a_time(folder: Path) -> None:
    """Never more than what stays in bfloat16 and one layer; far less than the plain model."""
    plain = load(folder, "none")
    layers = [num_bytes(layer) for layer in plain.decoder.layers]
    assert len(layers) == LAYERS
    with Living() as living:
        quantized = load(folder, "fp8")
    assert living.most <= num_bytes(quantized) + max(layers)
    assert living.most < 0.7 * num_bytes(plain)


def test_the_model_is_that_quantised_at_the_end(folder: Path) -> None:
    after, before = load(folder, "none"), load(folder, "fp8")
    for layer in after.decoder.layers:
        quantize_layer(layer)
    tower = getattr(after, "tower", None)
    if isinstance(tower, QwenTower):
        for block in tower.blocks:
            quantize_tower_block(block)
    expected, found = dict(tensors(after)), dict(tensors(before))
    assert list(found) == list(expected)
    assert any(tensor.dtype == torch.float8_e4m3fn for tensor in found.values())
    for name, tensor in expected.items():
        assert tensor.dtype == found[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), found[name].view(torch.uint8)), name


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llava-v1.6-vicuna-7b", "deepseek-vl2-small"])
def test_a_gpu_needs_one_layer_more(name: str, tmp_path: Path) -> None:
    published.write_small_files(name, tmp_path)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.inference_mode():
        model = load(tmp_path, "fp8", "cuda")
    sizes = model.family.sizes
    layer = 2 * sizes.decoder_params / sizes.num_layers
    stays = torch.cuda.memory_allocated() - before
    assert stays == pytest.approx(sizes.num_bytes(2, float8=True), rel=0.02)
    assert torch.cuda.max_memory_allocated() - before < stays + 1.6 * layer
