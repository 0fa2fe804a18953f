"""The whole engine on its Triton kernels, interpreted: what the kernels are given fits them.

A GPU runs the same kernels; here they see the shapes and strides that the engine really passes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from pipeline.engine import cascade
from tests.engine.engine_bench import Bench, outputs, picture
found, shared = [], []
cascade.MIN_LENGTH, share = 4, cascade.share
import pipeline.engine.decode
pipeline.engine.decode.share = lambda *a: shared.append(share(*a)) or shared[-1]
for kernels in ("reference", "triton"):
    os.environ["VLM_BATCH_KERNELS"] = kernels
    bench = Bench.open(Path(sys.argv[1]), decode_slots=4, prefill_tokens=64)
    requests = [
        bench.request(0, text, [picture(1, 56, 84)], name, max_new_tokens=3, ignore_eos=True)
        for name, text in (("a", "What is this?"), ("b", "Count."))
    ]
    requests.append(bench.request(1, "Hm", [], max_new_tokens=2, ignore_eos=True))
    found.append(outputs(bench.run(requests)))
assert found[0] == found[1], found
assert any(table is not None for table in shared)
print("equal", len(found[0]))
"""


def test_kernels_in_the_engine_give_the_references_tokens(folder: Path, root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)],
        cwd=root, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "equal 3" in done.stdout
