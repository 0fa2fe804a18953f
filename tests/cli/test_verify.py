"""Planted damage: `verify` names the file and what to do, `--repair` redoes just those shards."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.job_folder import JobFolder, as_json, make_input, make_job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    job = make_job(tmp_path_factory.mktemp("made") / "job", 24, rows_per_shard=6)
    assert job.run().returncode == 0
    return job


@pytest.fixture
def job(made: JobFolder) -> JobFolder:
    """The finished job, put back as it was: paths are part of the config."""
    saved = made.folder.with_name("saved")
    if not saved.exists():
        shutil.copytree(made.folder, saved)
    shutil.rmtree(made.folder)
    shutil.copytree(saved, made.folder)
    return made


def _verify(job: JobFolder, *args: str) -> tuple[int, dict[str, Any]]:
    done = job.call("verify", str(job.out), "--json", *args)
    return done.returncode, as_json(done)


def _flip(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[len(data) // 3] ^= 1
    part.write_bytes(data)


def _flip_footer(part: Path) -> None:
    data = bytearray(part.read_bytes())
    data[-30] ^= 1
    part.write_bytes(data)


def _truncate(part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def _empty(part: Path) -> None:
    part.write_bytes(b"")


def _swap(part: Path) -> None:
    shutil.copy(part.with_name("shard-00000002.parquet"), part)


def _rewrite(part: Path) -> None:
    """Someone has opened and saved the file: same rows, another file."""
    pq.write_table(pq.read_table(part), part)


def _lose_a_row(part: Path) -> None:
    table = pq.read_table(part)
    pq.write_table(table.slice(0, 5), part)


@pytest.mark.parametrize(
    "damage", [_flip, _flip_footer, _truncate, _empty, _swap, _rewrite, _lose_a_row]
)
def test_damage_is_found_and_repaired(job: JobFolder, damage: Callable[[Path], None]) -> None:
    content = job.content()
    others = {p.name: p.read_bytes() for p in job.parts() if p.name != "shard-00000001.parquet"}
    damage(job.out / "data/shard-00000001.parquet")
    code, told = _verify(job)
    assert code == 1
    assert [f["file"] for f in told["findings"]] == ["data/shard-00000001.parquet"]
    assert "--repair" in told["findings"][0]["advice"]
    code, told = _verify(job, "--repair")
    assert (code, told["repaired"]) == (1, ["shard-00000001"])
    assert _verify(job)[0] == 75
    assert job.run().returncode == 0
    assert _verify(job)[0] == 0
    assert job.content() == content
    assert {p.name: p.read_bytes() for p in job.parts() if p.name in others} == others
    assert sum(count - 1 for count in job.generated().values()) == 12


def test_a_repaired_redone_shard(job: JobFolder) -> None:
    make_input(job.folder / "input/part-0.parquet", 12, prefix="new")
    assert job.run("--changed", "redo").returncode == 0
    content = job.content()
    _flip(job.out / "data/shard-00000001.parquet")
    assert _verify(job, "--repair")[1]["repaired"] == ["shard-00000001"]
    assert job.run().returncode == 0
    assert _verify(job)[0] == 0
    assert job.content() == content


def test_a_missing_part_is_found_and_done_again(job: JobFolder) -> None:
    """The log of events remembers it; without the log it is work left."""
    (job.out / "data/shard-00000003.parquet").unlink()
    code, told = _verify(job)
    assert code == 1
    assert told["rows_left"] == 6
    assert [f["file"] for f in told["findings"]] == ["data/shard-00000003.parquet"]
    (job.out / "events.jsonl").unlink()
    assert _verify(job)[0] == 75
    assert job.run().returncode == 0
    assert _verify(job)[0] == 0


def test_a_stray_file_is_named(job: JobFolder) -> None:
    shutil.copy(job.parts()[0], job.out / "data/copy.parquet")
    code, told = _verify(job)
    assert code == 1
    assert told["findings"][0]["file"] == "data/copy.parquet"


def test_a_row_without_its_answer_is_found(job: JobFolder) -> None:
    """A part that is whole by its digest, and wrong: written by a program with a fault."""
    from jobs.part import read_info, write_part

    part = job.parts()[0]
    table = pq.read_table(part)
    info = read_info(part)
    codes = pa.array([None] * 5 + ["corrupt_image"])
    position = table.schema.get_field_index("error_code")
    write_part(part, table.set_column(position, "error_code", codes), info)
    code, told = _verify(job)
    assert code == 1
    assert "error code 'corrupt_image'" in told["findings"][0]["problem"]


@pytest.mark.parametrize("name", ["manifest.json", "plan/part-000000.jsonl"])
def test_damage_of_the_plan_is_one_sentence(job: JobFolder, name: str) -> None:
    file = job.out / name
    file.write_bytes(file.read_bytes().replace(b'"', b"'", 3))
    done = job.call("verify", str(job.out))
    assert done.returncode == 1
    assert name in done.stdout
    assert "is damaged" in done.stdout
    done = job.call("status", str(job.out))
    assert done.returncode == 2
    assert name in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_input_is_a_note(job: JobFolder) -> None:
    shutil.rmtree(job.folder / "input")
    code, told = _verify(job)
    assert code == 0
    assert "cannot be looked at" in told["notes"][0]
    assert _verify(job, "--no-input")[1]["notes"] == []


def test_a_changed_input_is_found(job: JobFolder) -> None:
    make_input(job.folder / "input/part-1.parquet", 12, prefix="other")
    code, told = _verify(job)
    assert code == 1
    assert told["findings"][0]["file"].endswith("part-1.parquet")


def test_text_for_people(job: JobFolder) -> None:
    done = job.call("verify", str(job.out))
    assert "24 of 24 planned rows proved (24 ok), 0 left" in done.stdout
    assert "whole: every row has exactly one state" in done.stdout


def test_events_are_lines_of_json(job: JobFolder) -> None:
    kinds = [json.loads(line)["kind"] for line in (job.out / "events.jsonl").open()]
    assert kinds[0] == "start"
    assert kinds[-1] == "end"
    assert kinds.count("commit") == 4


def test_a_limit_that_was_raised_later(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 24, rows_per_shard=6, input={"limit": 8})
    assert job.run().returncode == 0
    assert job.run("--set", "input.limit=20").returncode == 0
    told = job.call("verify", str(job.out))
    assert told.returncode == 0, told.stdout
    assert "20 of 20 planned rows" in told.stdout
    assert "the input has 20 rows" in told.stdout
