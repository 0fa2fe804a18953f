"""MiniCPM-V 2.6 through the engine and through `vlm-batch run`; checkpoints that do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.errors import UserError
from pipeline.models.families.minicpm import spec
from pipeline.rows import Request
from tests.engine.engine_bench import PIXELS, Bench, outputs, picture, questions
from tests.helpers.checkpoint_copies import copy_with_tensor
from tests.helpers.label_run import label_run
from tests.helpers.minicpm_checkpoint import write_minicpm_v
from tests.helpers.parity import Prompt, open_ours, our_tokens


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return write_minicpm_v(tmp_path_factory.mktemp("minicpm"))


def _alone(model: Any, request: Request) -> tuple[int, ...]:
    """The greedy answer, one request by itself in plain attention."""
    prompt = Prompt(
        request.tokens,
        tuple(PIXELS[i.image.digest] for i in request.images),
        tuple(i.layout for i in request.images),
        tuple(i.start for i in request.images),
    )
    found = our_tokens(model, prompt, request.sampling.max_new_tokens)
    ends = [i for i, token in enumerate(found) if token in request.sampling.stop_token_ids]
    return tuple(found[: ends[0]] if ends else found)


@torch.inference_mode()
@pytest.mark.parametrize("slots", [1, 8])
def test_the_engine_answers_as_each_request_alone(folder: Path, slots: int) -> None:
    bench = Bench.open(folder, decode_slots=slots, prefill_tokens=512)
    requests = questions(bench, rows=4)
    for number, text in enumerate(("What?", "Where?")):
        requests.append(bench.request(20, text, [picture(7, 640, 480)], f"s{number}"))
    model = open_ours(folder, spec.build)
    assert outputs(bench.run(requests)) == {r.key: _alone(model, r) for r in requests}


@pytest.mark.parametrize(
    ("name", "shape", "named"),
    [
        ("resampler.proj", None, "'resampler.proj'"),
        ("vpm.more", (2,), "'vpm.more'"),
        ("llm.lm_head.weight", (3, 256), r"'llm.lm_head.weight' has shape \(3, 256\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(
    folder: Path, tmp_path: Path, name: str, shape: Any, named: str
) -> None:
    broken = copy_with_tensor(folder, tmp_path / "broken", name, shape)
    with pytest.raises(UserError, match=named):
        open_ours(broken, spec.build)


def test_run(folder: Path, tmp_path: Path) -> None:
    rows = label_run(folder, tmp_path, [(64, 48), (640, 300), (31, 90)], "minicpmv")
    assert all(row["caption"] is not None and row["count"] is not None for row in rows)
