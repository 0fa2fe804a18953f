"""The model that ships: its size, its layout, its data, and that it answers as its card says.

Asks transformers' own class, so it says nothing about this package's engine.
"""

from __future__ import annotations

import importlib.util
import json
import struct
from pathlib import Path
from types import ModuleType

import pyarrow.parquet as pq
import pytest

from pipeline import demo

ROOT = Path(__file__).resolve().parents[2]
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}
FLOOR = 0.9

pytestmark = pytest.mark.skipif(
    not (demo.FOLDER / "model.safetensors").exists(), reason="the model is not trained yet"
)


@pytest.fixture(scope="module")
def evaluate() -> ModuleType:
    """scripts/eval_demo_model.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "eval_demo_model", ROOT / "scripts" / "eval_demo_model.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_folder_is_complete_and_small() -> None:
    assert {path.name for path in demo.FOLDER.iterdir()} >= FILES
    assert (demo.FOLDER / "model.safetensors").stat().st_size <= 16 << 20
    assert demo.SCENES.stat().st_size <= 2_500_000
    assert demo.PHOTOGRAPHS.stat().st_size <= 1_500_000


def test_weights_are_an_ordinary_flat_qwen2_5_vl() -> None:
    with (demo.FOLDER / "model.safetensors").open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(size))
    names = {name for name in header if name != "__metadata__"}
    assert {header[name]["dtype"] for name in names} == {"BF16"}
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert {name.split(".")[0] for name in names} == {"visual", "model"}
    config = json.loads((demo.FOLDER / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"
    assert config["tie_word_embeddings"] is True
    assert len(header["visual.patch_embed.proj.weight"]["shape"]) == 5


def test_any_text_can_be_tokenised() -> None:
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(demo.FOLDER / "tokenizer.json"))
    text = "Grüße — 你好 🙂\n\t<b>1234</b> l'été\x00"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_scenes_have_images_and_truths() -> None:
    table = pq.read_table(demo.SCENES)
    assert table.num_rows == 200
    for row in table.to_pylist():
        assert row["image"]["bytes"][:4] in (b"\xff\xd8\xff\xe0", b"\x89PNG")
        things = json.loads(row["objects_truth"])
        assert all(thing["object"] in row["caption_truth"] for thing in things)
        assert row["answer_truth"]


def test_answers_are_as_good_as_the_card_says(evaluate: ModuleType) -> None:
    """The floor is under the card's score for all 200 scenes; here every fifth and sixth."""
    rows = [row for i, row in enumerate(evaluate.read(demo.SCENES, 0)) if i % 10 in (1, 2)]
    answers = evaluate.ask_transformers(demo.FOLDER, rows, "cpu")
    known = evaluate.scores(rows, answers)["known"]
    for prompt in ("caption", "objects", "answer"):
        assert known[prompt] >= FLOOR, known
