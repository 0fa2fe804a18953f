"""The engine with keys and values in float8: near the others, and the same in every arrangement.

On a CPU the references run, interpreted kernels see one question, a GPU runs the kernels.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.engine.memory import place_bytes, size_engine
from pipeline.errors import UserError
from pipeline.kernels import backend, rope
from pipeline.kernels.fp8 import FP8
from pipeline.models.family import check_inputs
from pipeline.settings import EngineSettings
from tests.engine.engine_bench import Bench, outputs, picture, questions
from tests.helpers.kimi_vl_checkpoint import write_kimi_vl
from tests.helpers.mllama_checkpoint import write_mllama
from tests.helpers.parity import difference

ARRANGEMENTS: list[dict[str, Any]] = [
    {"overlap": False},
    {"decode_slots": 1},
    {"decode_slots": 32, "prefill_tokens": 4096},
    {"share_images": False},
    {"share_prefix": False},
    {"share_images": False, "share_prefix": False, "overlap": False, "prefill_tokens": 64},
]


def answers(bench: Bench, requests: Any = None) -> tuple[dict[Any, torch.Tensor], dict[Any, Any]]:
    """Logits of each first token, whose prompt was read from the cache; and all tokens."""
    engine = bench.engine()
    logits: dict[Any, torch.Tensor] = {}
    start = engine._start

    def keep(sequences: Any, rows: torch.Tensor) -> None:
        logits.update((s.request.key, row.cpu()) for s, row in zip(sequences, rows, strict=True))
        start(sequences, rows)

    engine._start = keep
    return logits, outputs(bench.run(requests or questions(bench), engine))


def check_logits(folder: Path, device: str) -> None:
    plain, eight = (
        answers(Bench.open(folder, device=device, kv_cache=kind))[0] for kind in ("auto", "fp8")
    )
    errors = torch.tensor([difference(eight[k].float(), plain[k].float()) for k in plain])
    assert 1e-4 < errors.mean() < 0.1, errors
    assert errors.max() < 0.15, errors


def test_logits_are_near_the_others(folder: Path) -> None:
    check_logits(folder, "cpu")


@pytest.mark.gpu
def test_logits_are_near_the_others_on_a_gpu(folder: Path) -> None:
    check_logits(folder, "cuda")


@pytest.mark.parametrize("engine", ARRANGEMENTS, ids=lambda e: "-".join(f"{k}={e[k]}" for k in e))
def test_arrangements_give_the_same_tokens(folder: Path, engine: dict[str, Any]) -> None:
    plain = Bench.open(folder, kv_cache="fp8")
    other = Bench.open(folder, kv_cache="fp8", **engine)
    assert outputs(other.run(questions(other))) == outputs(plain.run(questions(plain)))


def test_image_states_stay_as_they_are(tmp_path: Path) -> None:
    """Llama 3.2 Vision: tokens' keys in float8, those of image states not."""
    bench = Bench.open(write_mllama(tmp_path), kv_cache="fp8")
    engine = bench.engine()
    assert engine.cache.data.dtype == FP8
    assert engine.cross.cache.data.dtype == torch.float32
    bench.run([bench.request(0, "Hm", [picture(1, 56, 84)])], engine)


def test_more_places_fit(folder: Path) -> None:
    bench = Bench.open(folder)
    model = bench.engine().model
    c = model.decoder.config
    rows = 2 * c.num_layers * c.num_kv_heads
    assert place_bytes(model) == rows * c.head_dim * 4
    assert place_bytes(model, float8=True) == rows * (c.head_dim + 4)
    sizes = [
        size_engine(model, EngineSettings(device="cpu", kv_cache=kind, decode_slots=100_000))
        for kind in ("auto", "fp8")
    ]
    assert sizes[1].num_places > 1.9 * sizes[0].num_places
    cache = Bench.open(folder, kv_cache="fp8").engine().cache
    assert cache.nbytes == (cache.num_places + 1) * place_bytes(model, float8=True)
    sizes = bench.family.sizes
    assert place_bytes(model, True) == sizes.kv_bytes_per_token(4, float8=True)


def test_compressed_rows_are_refused(tmp_path: Path) -> None:
    bench = Bench.open(write_kimi_vl(tmp_path), kv_cache="fp8")
    with pytest.raises(UserError, match=r"kv_cache fp8 is not supported for kimi"):
        check_inputs(bench.family, bench.settings)


def test_an_old_gpu_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.models import fp8

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match=r"engine.kv_cache fp8 needs .*8\.9.* `kv_cache: auto`"):
        fp8.check_device(torch.device("cuda"), "engine.kv_cache", "auto")


def test_interpreted_engine(folders: dict[str, Path], root: Path) -> None:
    """What the kernels are given fits them."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = "import sys; from tests.engine.test_float8_engine import interpreted; interpreted()"
    done = subprocess.run(
        [sys.executable, "-c", command, str(folders["qwen2_5_vl"])],
        cwd=root, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def interpreted() -> None:
    """In a process of its own: the references' answers from a cache that they or the kernel wrote.

    The interpreter loses the carry where float8 rounds up to a power of two, so what the kernel
    wrote there is less near.
    """
    found = []
    for kernels, written in (("reference", True), ("triton", False), ("triton", True)):
        os.environ["VLM_BATCH_KERNELS"] = kernels
        rope.use_triton = backend.use_triton if written else (lambda tensor: False)
        bench = Bench.open(Path(sys.argv[1]), kv_cache="fp8", decode_slots=4, prefill_tokens=512)
        pixels = [picture(1, 56, 84)]
        asked = [
            bench.request(0, text, pixels, text, max_new_tokens=3, ignore_eos=True)
            for text in ("What is it?", "Count.")
        ]
        found.append(answers(bench, asked))
    assert found[0][1] == found[1][1]
    near = [[difference(other[k], found[0][0][k]) for k in other] for other, _ in found[1:]]
    assert max(near[0]) < 1e-4, near
    assert max(near[1]) < 0.2, near
