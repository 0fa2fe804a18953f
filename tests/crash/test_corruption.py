"""Planted corruption: `verify` names the file and the remedy, and the remedy works."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.verify import verify
from tests.helpers.job_folder import JobFolder, as_json, make_input, make_job
from tests.helpers.tally import Tally

NUM_ROWS = 48


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """A finished job; tests copy what they damage."""
    job = make_job(tmp_path_factory.mktemp("whole") / "job", NUM_ROWS, rows_per_shard=6)
    done = job.run()
    assert done.returncode == 0, done.stderr
    return job


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    """A finished job of the test's own."""
    job = make_job(tmp_path / "job", NUM_ROWS, rows_per_shard=6)
    assert job.run().returncode == 0
    return job


def flip(path: Path, offset: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def _check_flips(
    job: JobFolder, file: Path, count: int, tally: Tally, rng: random.Random, advice: str
) -> None:
    """Each flipped bit by itself is found, and none is found without."""
    data = file.read_bytes()
    for _ in range(count):
        flip(file, rng.randrange(len(data)), rng.randrange(8))
        findings = verify(str(job.out)).findings
        assert [Path(f.file).name for f in findings] == [file.name]
        assert advice in findings[0].advice
        file.write_bytes(data)
    assert verify(str(job.out)).is_whole
    tally.injected("flipped bytes", count)


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.crash) for s in (1, 2, 3))]
)
def test_a_flipped_bit_anywhere_in_a_part(whole: JobFolder, tally: Tally, seed: int) -> None:
    rng = random.Random(seed)
    _check_flips(whole, rng.choice(whole.parts()), 15, tally, rng, "--repair")


@pytest.mark.parametrize("name", ["manifest.json", "plan/part-000000.jsonl"])
def test_a_flipped_bit_in_manifest_or_plan(whole: JobFolder, tally: Tally, name: str) -> None:
    _check_flips(whole, whole.out / name, 10, tally, random.Random(5), "backup")
    flip(whole.out / name, 30)
    told = whole.call("verify", str(whole.out))
    refused = whole.run()
    flip(whole.out / name, 30)
    assert told.returncode == 1
    assert name in told.stdout
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1


def _truncate(job: JobFolder, part: Path) -> None:
    part.write_bytes(part.read_bytes()[:-100])


def _empty(job: JobFolder, part: Path) -> None:
    part.write_bytes(b"")


def _swap(job: JobFolder, part: Path) -> None:
    shutil.copy(job.parts()[0], part)


def _delete(job: JobFolder, part: Path) -> None:
    part.unlink()


def _rewrite(job: JobFolder, part: Path) -> None:
    """A whole Parquet file with the same record and one other answer."""
    table = pq.read_table(part)
    texts = ["forged", *table.column("caption").to_pylist()[1:]]
    index = table.schema.get_field_index("caption")
    pq.write_table(
        table.set_column(index, table.schema.field(index), pa.array([texts])[0].values), part
    )


def _drop_a_row(job: JobFolder, part: Path) -> None:
    pq.write_table(pq.read_table(part).slice(1), part)


@pytest.mark.parametrize("damage", [_truncate, _empty, _swap, _delete, _rewrite, _drop_a_row])
def test_repair_gives_just_the_bad_shards_back(
    job: JobFolder, tally: Tally, damage: Callable[[JobFolder, Path], None]
) -> None:
    wanted = job.content()
    bad = [job.parts()[3], job.parts()[6]]
    for part in bad:
        damage(job, part)
    told = job.call("verify", str(job.out), "--json")
    findings = as_json(told)["findings"]
    assert told.returncode == 1
    assert [f["file"] for f in findings] == [f"data/{part.name}" for part in bad]
    assert all("done anew" in f["advice"] for f in findings)
    _repair_and_finish(job, bad, wanted, tally)
    tally.injected("damaged part", 2)


def _repair_and_finish(
    job: JobFolder, bad: list[Path], wanted: list[dict[str, Any]], tally: Tally
) -> None:
    good = {part: part.stat() for part in job.parts() if part not in bad}
    before = job.generated()
    repaired = job.call("verify", str(job.out), "--repair", "--json")
    assert as_json(repaired)["repaired"] == [part.stem for part in bad]
    left = job.call("verify", str(job.out))
    assert left.returncode == 75, left.stdout
    done = job.run()
    assert done.returncode == 0, done.stderr
    tally.check_rows(job.content(), wanted)
    assert {part: part.stat() for part in good} == good
    again = {answer.split()[0] for answer, count in (job.generated() - before).items() if count}
    assert again == {part.stem for part in bad}
    assert job.call("verify", str(job.out)).returncode == 0


def test_a_damaged_part_of_a_redone_shard_is_repaired(job: JobFolder, tally: Tally) -> None:
    make_input(job.folder / "input/part-0.parquet", NUM_ROWS // 2, prefix="other")
    assert job.run("--changed", "redo").returncode == 0
    wanted = job.content()
    bad = job.parts()[1]
    flip(bad, 200)
    _repair_and_finish(job, [bad], wanted, tally)
    bad.unlink()
    refused = job.run("--changed", "redo")
    assert refused.returncode == 1
    assert "vlm-batch verify" in refused.stderr
    _repair_and_finish(job, [bad], wanted, tally)
    tally.injected("damaged part", 2)


def test_a_stranger_among_the_parts_is_found(job: JobFolder, tally: Tally) -> None:
    """What a reader of data/*.parquet would count."""
    names = ("shard-00000099.parquet", "copy of shard-00000001.parquet", "shard-1.parquet")
    for name in names:
        shutil.copy(job.parts()[0], job.out / "data" / name)
    told = job.call("verify", str(job.out), "--json")
    assert told.returncode == 1
    assert sorted(f["file"] for f in as_json(told)["findings"]) == sorted(
        f"data/{n}" for n in names
    )
    tally.injected("stranger in data/", 3)


def test_a_lost_plan_part_is_found(job: JobFolder, tally: Tally) -> None:
    make_input(job.folder / "input/part-2.parquet", 12, prefix="late")
    assert job.run().returncode == 0
    for name in ("part-000000.jsonl", "part-000001.jsonl"):
        part = job.out / "plan" / name
        data = part.read_bytes()
        part.unlink()
        verdict = verify(str(job.out))
        assert verdict.findings
        part.write_bytes(data)
        tally.injected("lost plan part")
    assert verify(str(job.out)).is_whole


@pytest.mark.parametrize("ending", ["truncated", "replaced"])
def test_a_damaged_input_is_found(job: JobFolder, tally: Tally, ending: str) -> None:
    """The rows are safe; the finding says which file the plan no longer fits."""
    file = job.folder / "input/part-1.parquet"
    data = file.read_bytes()
    if ending == "truncated":
        file.write_bytes(data[:-40])
    else:
        make_input(file, NUM_ROWS // 2, prefix="other")
    told = job.call("verify", str(job.out), "--json")
    assert told.returncode == 1
    assert [f["file"] for f in as_json(told)["findings"]] == [str(file)]
    assert job.run().returncode == 2
    file.write_bytes(data)
    assert job.call("verify", str(job.out)).returncode == 0
    tally.injected(f"{ending} input")


def _half_done(tmp_path: Path) -> JobFolder:
    job = make_job(tmp_path / "half", NUM_ROWS, rows_per_shard=12)
    assert job.run(env={"FAKE_KILL_AT": "35"}).returncode == -signal.SIGKILL
    return job


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(s, marks=pytest.mark.crash) for s in range(1, 13))]
)
def test_damaged_journals_cost_answers_and_no_row(
    tmp_path: Path, whole: JobFolder, tally: Tally, seed: int
) -> None:
    """Flipped bits and torn tails: the rest is answered again."""
    rng = random.Random(seed)
    job = _half_done(tmp_path)
    wanted = {row["row_id"]: row for row in whole.content()}
    journals = sorted(job.out.glob("journal/*/*.journal"))
    assert journals
    for journal in journals:
        if rng.random() < 0.5:
            flip(journal, rng.randrange(journal.stat().st_size), rng.randrange(8))
            tally.injected("flipped bytes in a journal")
        else:
            data = journal.read_bytes()
            journal.write_bytes(data[: rng.randrange(len(data) - 8, len(data))])
            tally.injected("torn journal tail")
    told = job.call("verify", str(job.out), "--json")
    assert told.returncode == 75
    assert len([n for n in as_json(told)["notes"] if "answered again" in n]) == len(journals)
    done = job.run()
    assert done.returncode == 0, done.stderr
    tally.check_rows(job.content(), [wanted[row["row_id"]] for row in job.content()])
    assert len(job.content()) == NUM_ROWS
    assert job.call("verify", str(job.out)).returncode == 0


def test_garbage_in_small_files_is_survived(tmp_path: Path, tally: Tally) -> None:
    """Leases, the log of events, private files: nothing rests on them."""
    job = _half_done(tmp_path)
    for lease in (job.out / "leases").glob("*.json"):
        lease.write_bytes(b"\x00garbage")
        tally.injected("garbage in a lease")
    with (job.out / "events.jsonl").open("ab") as file:
        file.write(b'{"kind": "com\xff\n')
    (job.out / "tmp").mkdir(exist_ok=True)
    (job.out / "tmp/shard-00000000.nobody.parquet.tmp").write_bytes(b"half a part")
    tally.injected("garbage in events and tmp", 2)
    done = job.run()
    assert done.returncode == 0, done.stderr
    assert job.call("status", str(job.out)).returncode == 0
    assert job.call("verify", str(job.out)).returncode == 0


def test_a_damaged_winner_of_a_redo_is_found_out(job: JobFolder, tally: Tally) -> None:
    wanted_args = ("--changed", "redo")
    make_input(job.folder / "input/part-0.parquet", NUM_ROWS // 2, prefix="other")
    env = {"VLM_BATCH_FAULT": "commit.before_replace:kill"}
    assert job.run(*wanted_args, env=env).returncode == -signal.SIGKILL
    for record in (job.out / "redo").glob("*.json"):
        record.write_text(json.dumps({"attempt": "x"})[:5])
        tally.injected("garbage in redo/")
    job.run(*wanted_args)
    verdict = verify(str(job.out))
    if verdict.findings:
        assert job.call("verify", str(job.out), "--repair").returncode == 1
    done = job.run(*wanted_args)
    assert done.returncode == 0, done.stderr
    assert job.call("verify", str(job.out)).returncode == 0
    ids = job.table().column("row_id").to_pylist()
    assert len(ids) == len(set(ids)) == NUM_ROWS
    assert sum(id_.startswith("other") for id_ in ids) == NUM_ROWS // 2
