"""An image with transparency reaches each model as its official processor would hand it over."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.feeder import END, Feeder
from pipeline.images import probe
from pipeline.labeller import Labeller
from pipeline.models.family import Family
from pipeline.rows import ImageRef, Row, ShardWork
from pipeline.settings import LabelSettings
from pipeline.spool import Spool
from tests.feeder.feed_items import group, placed
from tests.helpers import llava_checkpoint, pixtral_checkpoint
from tests.helpers.checkpoints import write_qwen2_5_vl, write_qwen2_vl, write_qwen3_vl
from tests.helpers.deepseek_vl2_checkpoint import write_deepseek_vl2
from tests.helpers.families import found_family
from tests.helpers.gemma_checkpoint import write_gemma3
from tests.helpers.generic_checkpoint import write_llava as write_generic
from tests.helpers.janus_checkpoint import write_janus
from tests.helpers.kimi_vl_checkpoint import write_kimi_vl
from tests.helpers.minicpm_checkpoint import write_minicpm_o, write_minicpm_v
from tests.helpers.mllama_checkpoint import write_mllama
from tests.helpers.pictures import encode, transparent_files
from tests.helpers.smolvlm_checkpoint import write_smolvlm

FILES = transparent_files()
Writer = Callable[[Path], Path]
# The writer of a checkpoint, and transformers' module and class of its processor.
WHITE: dict[str, tuple[Writer, str, str]] = {
    "qwen2": (write_qwen2_vl, "qwen2_vl", "Qwen2VL"),
    "qwen2.5": (write_qwen2_5_vl, "qwen2_vl", "Qwen2VL"),
    "qwen3": (write_qwen3_vl, "qwen2_vl", "Qwen2VL"),
    "gemma3": (write_gemma3, "gemma3", "Gemma3"),
    "mllama": (write_mllama, "mllama", "Mllama"),
    "pixtral": (pixtral_checkpoint.write_twin, "pixtral", "Pixtral"),
    "smolvlm": (write_smolvlm, "smolvlm", "SmolVLM"),
    "llava 1.5": (partial(llava_checkpoint.write_twin, kind="1.5"), "llava", "Llava"),
    "llava 1.6": (partial(llava_checkpoint.write_twin, kind="1.6"), "llava_next", "LlavaNext"),
    "onevision": (
        partial(llava_checkpoint.write_twin, kind="onevision"), "llava_onevision", "LlavaOnevision",
    ),
    "generic": (write_generic, "clip", "CLIP"),
}  # fmt: skip
DROP: dict[str, Writer] = {
    "janus": write_janus,
    "janus, transformers'": partial(write_janus, twin=True),
    "deepseek-vl2": partial(write_deepseek_vl2, kind="tiny"),
    "kimi-vl": write_kimi_vl,
    "minicpm-v": write_minicpm_v,
    "minicpm-o": write_minicpm_o,
}


def fed(folder: Path, workers: int = 0) -> dict[str, np.ndarray]:
    """What the feeder gives of each file for the checkpoint's family, by name."""
    family = found_family(Family, folder)
    with (
        Spool() as spool,
        Feeder(workers, 1 << 20, 10**6, resize=False, transparency=family.transparency) as feeder,
    ):
        items = [
            group(n, placed(spool, data, *probe(data, 10**6)))
            for n, data in enumerate(FILES.values())
        ]
        feed = feeder.feed(items)
        found = {}
        for name in FILES:
            item = feed.get(30.0)
            found[name] = np.array(item.images[0])
            item.release()
        assert feed.get(30.0) is END
    return found


def opened(name: str) -> Image.Image:
    return Image.open(io.BytesIO(FILES[name]))


@pytest.mark.parametrize("kind", WHITE)
def test_on_white_as_transformers_processors(kind: str, tmp_path: Path) -> None:
    """To the bit: what a processor makes of the opened file, and of our pixels."""
    write, module, prefix = WHITE[kind]
    folder = write(tmp_path)
    classes = import_module(f"transformers.models.{module}.image_processing_pil_{module}")
    processor: Any = getattr(classes, f"{prefix}ImageProcessorPil").from_pretrained(folder)
    for name, ours in fed(folder).items():
        plain = Image.fromarray(np.asarray(opened(name).convert("RGB")))
        theirs, found, dropped = (
            np.asarray(processor(images=[image], return_tensors="np")["pixel_values"])
            for image in (opened(name), Image.fromarray(ours), plain)
        )
        np.testing.assert_array_equal(found, theirs, name)
        assert not np.array_equal(found, dropped), name


@pytest.mark.parametrize("kind", DROP)
def test_dropped_as_the_original_code(kind: str, tmp_path: Path) -> None:
    """It converts to RGB when it opens a file, and its processors know no alpha."""
    for name, ours in fed(DROP[kind](tmp_path)).items():
        np.testing.assert_array_equal(ours, np.asarray(opened(name).convert("RGB")), name)


def test_worker_processes_read_the_same(tmp_path: Path) -> None:
    for write in (write_qwen2_vl, write_janus):
        folder = write(tmp_path / write.__name__)
        inline, worker = fed(folder), fed(folder, workers=1)
        for name in FILES:
            np.testing.assert_array_equal(worker[name], inline[name], name)


@pytest.mark.parametrize(("write", "twin"), [(write_qwen2_5_vl, 1), (write_janus, 2)])
def test_answers_of_a_job(write: Writer, twin: int, tmp_path: Path) -> None:
    """A clear image is answered as the family reads it: as its twin on white, or without alpha."""
    clear = np.zeros((60, 80, 4), np.uint8)
    clear[20:40, 10:50, 3] = 255
    on_white = np.repeat(255 - clear[..., 3:], 3, axis=-1)
    images = [Image.fromarray(i) for i in (clear, on_white, clear[..., :3])]
    rows = [Row(f"r{n}", n, {}, (ImageRef(data=encode(i, "PNG")),)) for n, i in enumerate(images)]
    settings = LabelSettings(
        model={"id": str(write(tmp_path))},
        input={"path": "x", "image": "image"},
        prompts={"a": "What?"},
        generation={"max_new_tokens": 16, "ignore_eos": True, "temperature": 0.0},
        engine={"device": "cpu"},
    )  # type: ignore[arg-type]
    labeller = Labeller(settings)
    try:
        answers = list(labeller.label([ShardWork("s", rows)]))
    finally:
        labeller.close()
    texts = {answer.key.row: answer.text for answer in answers}
    assert texts[0] == texts[twin] != texts[3 - twin]
