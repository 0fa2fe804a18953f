"""The whole engine on its Triton kernels, interpreted: what the kernels are given fits them.

A GPU runs the same kernels; here they see the shapes and strides that the engine really passes, for
every family. One process with the interpreter takes them one after another.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

MAKERS = {
    "qwen2-vl": "checkpoints.write_qwen2_vl",
    "qwen2.5-vl": "checkpoints.write_qwen2_5_vl",
    "qwen3-vl": "checkpoints.write_qwen3_vl",
    "gemma3": "gemma_checkpoint.write_gemma3",
    "mllama": "mllama_checkpoint.write_mllama",
    "kimi-vl": "kimi_vl_checkpoint.write_kimi_vl",
    "deepseek-vl2": "deepseek_vl2_checkpoint.write_deepseek_vl2",
    "janus": "janus_checkpoint.write_janus",
    "pixtral": "pixtral_checkpoint.write_twin",
    "smolvlm": "smolvlm_checkpoint.write_smolvlm",
    "minicpm-v": "minicpm_checkpoint.write_minicpm_v",
}
OPTIONS: dict[str, tuple[Any, ...]] = {"deepseek-vl2": ("small",)}


def test_kernels_in_the_engine_give_the_references_tokens(tmp_path: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.engine.test_interpreted_engine", str(tmp_path)],
        cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == list(MAKERS)


def main(folder: Path) -> None:
    """Print each family whose tokens are the same with kernels as with references."""
    from pipeline.engine import cascade, decode

    tables: list[Any] = []
    cascade.MIN_LENGTH, share = 4, cascade.share  # small images are shared too
    decode.share = lambda *given: tables.append(share(*given)) or tables[-1]  # type: ignore[func-returns-value]
    for name in MAKERS:
        (folder / name).mkdir()
        _maker(name)(folder / name, *OPTIONS.get(name, ()))
        found = [_answers(folder / name, kernels) for kernels in ("reference", "triton")]
        assert found[0] == found[1], (name, found)
        print(name)
    assert any(table is not None for table in tables)


def _maker(name: str) -> Callable[..., Path]:
    from importlib import import_module

    module, _, function = MAKERS[name].partition(".")
    made: Callable[..., Path] = getattr(import_module(f"tests.helpers.{module}"), function)
    return made


def _answers(folder: Path, kernels: str) -> dict[Any, tuple[int, ...]]:
    from tests.engine.engine_bench import Bench, outputs, picture

    os.environ["VLM_BATCH_KERNELS"] = kernels
    bench = Bench.open(folder, decode_slots=4, prefill_tokens=512)
    pixels = [picture(1, 56, 84)]
    requests = [
        bench.request(0, text, pixels, text, max_new_tokens=3, ignore_eos=True)
        for text in ("What is it?", "Count.")
    ]
    requests.append(bench.request(1, "Hm", [], max_new_tokens=2, ignore_eos=True))
    return outputs(bench.run(requests))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
