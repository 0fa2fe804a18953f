"""Every hostile input ends as `ok` or with its own code, in one pass through the real stages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.cli import main
from pipeline import urls
from pipeline.errors import CODES, RowError
from pipeline.feeder import END, Feeder
from pipeline.models.checkpoint import Checkpoint
from pipeline.models.registry import family_for
from pipeline.prepare import Preparer
from pipeline.prompts import prompt_columns
from pipeline.rows import Answer, Group, Request
from pipeline.settings import LabelSettings
from pipeline.sources import open_source
from pipeline.spool import Spool
from pipeline.tokenizer import Tokenizer
from tests.helpers.checkpoints import write_qwen2_5_vl
from tests.helpers.web import Web, serve_web
from tests.hostile.make_corpus import make_corpus

INPUTS: dict[str, dict[str, Any]] = {  # by table; all others are Parquet with the column `name`
    "nested": {"id": None},
    "numbers": {"id": None},
    "messages": {"messages": "messages"},
    "mixed": {"source": "openai", "image": None},
    "remote": {"remote": True, "remote_timeout_sec": 2.5},
}
TABLES = (
    "files", "paths", "lists", "texts", "messages", "remote", "remote_off", "nested", "numbers",
    "ids", "mixed",
)  # fmt: skip


class Corpus:
    """The corpus on disk, a tiny checkpoint, and how a table goes through the pipeline."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.expected = make_corpus(folder, port)
        write_qwen2_5_vl(folder / "model")

    def settings(self, table: str) -> LabelSettings:
        suffix = "jsonl" if table == "mixed" else "parquet"
        source = {"path": str(self.folder / f"{table}.{suffix}"), "id": "name"}
        source |= INPUTS.get(table, {})
        messages = source.get("messages") or source.get("source") == "openai"
        prompts = {} if messages else {"p": "Look. {text}" if table == "texts" else "Look."}
        model = {"id": str(self.folder / "model")}
        return LabelSettings.model_validate({"model": model, "input": source, "prompts": prompts})

    def outcomes(self, table: str) -> tuple[dict[str, str], dict[str, Request]]:
        """(row name -> state, row name -> its request); a repeated name gets `#2`."""
        settings = self.settings(table)
        checkpoint = Checkpoint.open(settings.model)
        family = family_for(checkpoint, settings.model)
        states: dict[str, str] = {}
        requests: dict[str, Request] = {}
        with Spool() as spool:
            preparer = Preparer(settings, family, Tokenizer(checkpoint), spool)
            source = open_source(settings.input, prompt_columns(settings))
            for file in source.files():
                for row in source.read(file.path, 0, file.num_rows):
                    name = row.row_id if row.row_id not in states else f"{row.row_id}#2"
                    (made,) = preparer.prepare("shard", row)
                    if isinstance(made, Answer):
                        states[name] = made.error_code or ""
                    else:
                        states[name], requests[name] = "ok", made
            states |= _decoded(requests, settings.input.max_pixels)
        return states, requests


def _decoded(requests: dict[str, Request], max_pixels: int) -> dict[str, str]:
    """The state of each request after its images were decoded."""
    states: dict[str, str] = {}
    with Feeder(1, 64 << 20, max_pixels, resize=True) as feeder:
        feed = feeder.feed([Group((r,), 0, 0) for r in requests.values()])
        for name in requests:
            fed = feed.get(60.0)
            errors = [i.code for i in fed.images if isinstance(i, RowError)]
            states[name] = errors[0] if errors else "ok"
            fed.release()
        assert feed.get(60.0) is END
        assert feeder.stats()["replaced_workers"] == 0
    return states


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with serve_web() as web:
        yield web


@pytest.fixture(scope="module")
def corpus(web: Web, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return Corpus(tmp_path_factory.mktemp("corpus"), web.port)


@pytest.fixture
def reachable(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """The misbehaving server counts as public, by its names alone."""
    client = web.client()
    monkeypatch.setattr(urls, "resolve", client.resolve)
    monkeypatch.setattr(urls, "is_public", client.is_allowed)
    monkeypatch.setattr(urls, "PAUSE_SEC", 0.01)


@pytest.mark.usefixtures("reachable")
@pytest.mark.parametrize("table", TABLES)
def test_every_input_ends_as_it_should(
    corpus: Corpus, table: str, capfd: pytest.CaptureFixture[str]
) -> None:
    states, _ = corpus.outcomes(table)
    assert states == corpus.expected[table]
    assert capfd.readouterr().err == ""


@pytest.mark.usefixtures("reachable")
@pytest.mark.parametrize("table", TABLES)
def test_the_same_through_the_command_line(
    corpus: Corpus, table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the model that ships, to the committed rows: the job itself ends well."""
    settings = corpus.settings(table)
    values = settings.model_dump(mode="json", include={"input", "prompts"}, exclude_none=True)
    values |= {"model": {"id": "demo"}, "generation": {"max_new_tokens": 2}}
    values |= {"output": {"path": str(tmp_path / "out"), "rows_per_shard": 10_000}}
    config = tmp_path / "job.yaml"
    config.write_text(yaml.safe_dump(values))
    assert main(["run", str(config)]) == 0, capsys.readouterr().err
    assert main(["verify", str(tmp_path / "out")]) == 0
    states: dict[str, str] = {}
    for row in pq.read_table(tmp_path / "out/data").to_pylist():
        name = row["row_id"] if row["row_id"] not in states else f"{row['row_id']}#2"
        states[name] = row["error_code"] or row["status"]
    assert states == corpus.expected[table]


def test_special_tokens_in_text_forge_nothing(corpus: Corpus) -> None:
    for table, plain in (("texts", "empty_text"), ("messages", "good")):
        settings = corpus.settings(table)
        checkpoint = Checkpoint.open(settings.model)
        tokenizer = Tokenizer(checkpoint, family_for(checkpoint, settings.model).control)
        _, requests = corpus.outcomes(table)
        for token in ("<|im_start|>", "<|im_end|>", "<|image_pad|>", "<|vision_start|>"):
            number = tokenizer.id(token)
            counts = [(requests[n].tokens == number).sum() for n in (plain, "special_tokens")]
            assert counts[0] == counts[1] > 0


def test_the_corpus_is_large_and_its_codes_are_known(corpus: Corpus) -> None:
    codes = Counter(code for named in corpus.expected.values() for code in named.values())
    assert sum(codes.values()) >= 60
    assert codes.keys() - {"ok"} <= CODES.keys()
    assert len(codes) >= 18


def test_every_code_of_the_corpus_is_in_the_table(corpus: Corpus, root: Path) -> None:
    table = (root / "pipeline/sources/README.md").read_text()
    codes = {code for named in corpus.expected.values() for code in named.values()}
    assert not [code for code in codes if f"`{code}`" not in table]
