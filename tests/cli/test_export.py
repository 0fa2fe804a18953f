"""An export is read alike by pandas, DuckDB and `datasets`, and says how it was made."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from tests.helpers.job_folder import JobFolder, as_json, make_job


@pytest.fixture(scope="module")
def job(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    job = make_job(tmp_path_factory.mktemp("export") / "job", 20, rows_per_shard=5)
    assert job.run(env={"FAKE_FAIL_ROWS": "f0-00003"}).returncode == 0
    return job


def _export(job: JobFolder, out: Path, *args: str) -> None:
    done = job.call("export", str(job.out), str(out), *args)
    assert done.returncode == 0, done.stderr


def test_one_parquet_file(job: JobFolder, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    _export(job, out)
    assert pq.read_table(out).to_pylist() == job.table().to_pylist()
    assert [p.name for p in tmp_path.iterdir()] == ["answers.parquet"]


def test_lines(job: JobFolder, tmp_path: Path) -> None:
    out = tmp_path / "answers.jsonl"
    _export(job, out, "--no-meta", "--status", "ok")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 19
    assert "meta" not in rows[0]


def test_bytes_are_base64_in_lines(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 2, files=1, input={"keep": ["raw"]})
    table = pq.read_table(job.folder / "input/part-0.parquet")
    table = table.append_column("raw", pa.array([b"\xff\xd8", None], pa.binary()))
    pq.write_table(table, job.folder / "input/part-0.parquet")
    assert job.run().returncode == 0
    _export(job, tmp_path / "x.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text().splitlines()]
    assert [row["raw"] for row in rows] == ["/9g=", None]


def test_pandas_and_duckdb(job: JobFolder, tmp_path: Path) -> None:
    import duckdb
    import pandas

    _export(job, tmp_path / "set")
    assert len(pandas.read_parquet(tmp_path / "set/data")) == 20
    query = f"select status, count(*) from '{tmp_path}/set/data/*.parquet' group by 1 order by 1"
    assert duckdb.sql(query).fetchall() == [("failed", 1), ("ok", 19)]
    straight = f"select count(*) from '{job.out}/data/*.parquet'"
    assert duckdb.sql(straight).fetchall() == [(20,)], "the parts are readable as they are"


def test_datasets(job: JobFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    import datasets

    _export(job, tmp_path / "set")
    loaded = datasets.load_dataset(
        str(tmp_path / "set"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded.num_rows == 20
    assert loaded[0]["caption"].startswith("caption of f0-00000")


def test_the_card_says_how(job: JobFolder, tmp_path: Path) -> None:
    _export(job, tmp_path / "set")
    card = (tmp_path / "set/README.md").read_text()
    header = yaml.safe_load(card.split("---")[1])
    assert header["configs"][0]["data_files"] == "data/train-*.parquet"
    assert "Describe {word}." in card
    assert "19 ok" in card


def test_an_existing_target_is_kept(job: JobFolder, tmp_path: Path) -> None:
    out = tmp_path / "answers.parquet"
    out.write_text("mine")
    refused = job.call("export", str(job.out), str(out))
    assert refused.returncode == 2
    assert out.read_text() == "mine"
    _export(job, out, "--force")
    assert pq.read_table(out).num_rows == 20


def test_an_unfinished_job_is_refused(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 20, rows_per_shard=5)
    job.run(env={"FAKE_KILL_AT": "35", "FAKE_DELAY_SEC": "0.01"})
    refused = job.call("export", str(job.out), str(tmp_path / "a.parquet"))
    assert refused.returncode == 2
    assert "--partial" in refused.stderr
    told = as_json(
        job.call("export", str(job.out), str(tmp_path / "a.parquet"), "--partial", "--json")
    )
    assert 0 < told["rows"] < 20


def test_answers_of_another_job_stand_beside(job: JobFolder, tmp_path: Path) -> None:
    """The same input with other prompts, cut into other shards."""
    other = make_job(
        tmp_path / "other", 20, rows_per_shard=7, prompts={"caption": "Again {word}.", "x": "X."}
    )
    config = yaml.safe_load(other.config.read_text())
    config["input"] = yaml.safe_load(job.config.read_text())["input"]
    config["output"] = {"path": str(tmp_path / "v2"), "rows_per_shard": 7}
    other.config.write_text(yaml.safe_dump(config))
    assert other.run().returncode == 0
    out = tmp_path / "both.parquet"
    _export(job, out, "--join", str(tmp_path / "v2"), "--status", "ok")
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 19
    for row in rows:
        assert row["caption"].startswith(f"caption of {row['row_id']}:")
        assert row["caption_v2"].startswith(f"caption of {row['row_id']}:")
        assert row["caption"] != row["caption_v2"]
        assert row["x"].startswith(f"x of {row['row_id']}:")
        assert row["status_v2"] == "ok"
    _export(job, tmp_path / "named", "--join", f"b={tmp_path / 'v2'}", "--no-meta")
    names = pq.read_schema(tmp_path / "named/data/train-00000.parquet").names
    assert names[-6:] == ["caption_b", "ocr_b", "x", "status_b", "error_code_b", "error_b"]
    assert "Joined answers `b`" in (tmp_path / "named/README.md").read_text()


def test_a_join_needs_the_same_rows(job: JobFolder, tmp_path: Path) -> None:
    stranger = make_job(tmp_path / "stranger", 20)
    assert stranger.run().returncode == 0
    done = job.call("export", str(job.out), str(tmp_path / "x"), "--join", str(stranger.out))
    assert done.returncode == 2
    assert "lacks answers" in done.stderr
    assert not (tmp_path / "x").exists()
    done = job.call("export", str(job.out), str(tmp_path / "x"), "--join", str(job.folder))
    assert done.returncode == 2
    assert "no run folder" in done.stderr


def test_one_place_to_write_to(job: JobFolder, tmp_path: Path) -> None:
    for places in ((), (str(tmp_path / "x"), "--to", "hf://datasets/o/n")):
        done = job.call("export", str(job.out), *places)
        assert done.returncode == 2
        assert "one place" in done.stderr


@pytest.mark.parametrize("name", ["out.csv", "out.JSON", "out.parquet.gz"])
def test_a_format_that_is_not_written_is_refused(job: JobFolder, tmp_path: Path, name: str) -> None:
    told = job.call("export", str(job.out), str(tmp_path / name))
    assert told.returncode == 2
    assert "export writes OUT.parquet, OUT.jsonl or a folder" in told.stderr
    assert not (tmp_path / name).exists()
