"""Schedules as their own parsers read them, and what a job does that runs again and again."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from jobs.schedule import Schedule, systemd_units, units
from pipeline.errors import UserError
from tests.helpers.job_folder import JobFolder, as_json, make_input, make_job

EVERY = ("hourly", "daily", "weekly", "15min", "6h", "1h", "30min")


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(not shutil.which(program), reason=f"needs {program}")


@contextmanager
def inside(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as context:
        context.chdir(folder)
        yield


def command_of(text: str) -> str:
    """The shell command of a crontab's line, as cron hands it over."""
    line = text.splitlines()[-1]
    return line.split(" ", 5)[5].replace("\\%", "%")


@needs("crontab")
def test_cron_takes_the_line_and_the_line_runs(
    nasty_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = make_job(nasty_folder / "100% job", 8)
    log = nasty_folder / "100%.log"
    with inside(nasty_folder, monkeypatch):
        done = job.call("schedule", str(job.config), "--log", str(log), "--every", "15min")
    assert done.returncode == 0, done.stderr
    # NOTE: crontab cuts its file's name after 100 characters, so it reads the text from its stdin.
    checked = subprocess.run(
        ["crontab", "-n", "-"], input=done.stdout, capture_output=True, text=True
    )
    assert checked.returncode == 0, checked.stderr
    assert done.stdout.splitlines()[-1].startswith("*/15 * * * * ")
    ran = subprocess.run(["sh", "-c", command_of(done.stdout)], env=job._environment())
    assert ran.returncode == 0
    assert "8 rows, 8 ok" in log.read_text()


@needs("crontab")
@pytest.mark.parametrize("every", EVERY)
def test_every_interval_is_one_that_cron_knows(every: str, tmp_path: Path) -> None:
    text = units(Schedule(tmp_path / "a.yaml", every, tmp_path / "log"), "cron")
    (tmp_path / "crontab").write_text(text)
    done = subprocess.run(["crontab", "-n", str(tmp_path / "crontab")], capture_output=True)
    assert done.returncode == 0, done.stderr


@needs("systemd-analyze")
def test_systemd_takes_the_units(nasty_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--set", "prompts.caption=It costs $5, 100% of \"it\" \\ 'now'")
    schedule = Schedule(nasty_folder / "my job.yaml", "6h", nasty_folder / "log", arguments)
    with inside(nasty_folder, monkeypatch):
        files = systemd_units(schedule)
    folder = nasty_folder.parent
    for name, text in files.items():
        (folder / name).write_text(text)
    line = ["systemd-analyze", "verify", "--man=no", *(str(folder / name) for name in files)]
    done = subprocess.run(line, capture_output=True, text=True)
    told = [text for text in done.stderr.splitlines() if "vlm-batch" in text]
    assert done.returncode == 0, done.stderr
    assert told == []


@needs("systemd-analyze")
@pytest.mark.parametrize("every", EVERY)
def test_every_interval_is_a_calendar_of_systemd(every: str, tmp_path: Path) -> None:
    files = systemd_units(Schedule(tmp_path / "a.yaml", every, tmp_path / "log"))
    timer = next(text for name, text in files.items() if name.endswith(".timer"))
    calendar = timer.split("OnCalendar=")[1].splitlines()[0]
    done = subprocess.run(["systemd-analyze", "calendar", calendar], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Next elapse" in done.stdout


def test_options_of_the_run_are_in_the_schedule(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 8)
    out = str(tmp_path / "other place")
    done = job.call(
        "schedule", str(job.config), "--output", out, "--changed", "redo",
        "--set", "input.limit=3", "--kind", "scrontab", "--sbatch", "--mem=1G",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = done.stdout.splitlines()[-1]
    assert line.endswith(f"--set input.limit=3 --output '{out}' --changed redo")
    assert "#SCRON --mem=1G" in done.stdout


def test_what_no_scheduler_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="divide an hour"):
        units(Schedule(tmp_path / "a.yaml", "7min", tmp_path / "log"), "cron")
    with pytest.raises(UserError, match="line breaks"):
        units(Schedule(tmp_path / "a\nb.yaml", "6h", tmp_path / "log"), "systemd")


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    job = make_job(tmp_path / "job", 20, rows_per_shard=5)
    assert job.run().returncode == 0
    return job


def test_new_files_are_answered_and_old_rows_stay(job: JobFolder) -> None:
    before = {part.name: part.read_bytes() for part in job.parts()}
    assert job.run("--idle-code", "10").returncode == 10
    make_input(job.folder / "input/part-1b.parquet", 7, "new")
    done = job.run("--idle-code", "10", "--json")
    assert done.returncode == 0
    assert as_json(done)["run"]["rows"] == 7
    for name, data in before.items():
        assert (job.out / "data" / name).read_bytes() == data
    assert len(job.parts()) == len(before) + 2
    assert job.table().num_rows == 27
    assert max(job.generated().values()) == 1
    assert job.call("verify", str(job.out)).returncode == 0


def test_runs_that_overlap_share_the_new_rows(job: JobFolder) -> None:
    make_input(job.folder / "input/part-2.parquet", 30, "new")
    runs = [job.start_run(env={"FAKE_DELAY_SEC": "0.01"}) for _ in range(3)]
    for process in runs:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
    rows = job.table().column("row_id").to_pylist()
    assert len(rows) == len(set(rows)) == 50
    assert max(job.generated().values()) == 1
    assert job.call("verify", str(job.out)).returncode == 0


def test_lines_appended_while_the_job_lives(tmp_path: Path) -> None:
    lines = tmp_path / "chats.jsonl"

    def append(numbers: range) -> None:
        with open(lines, "a", encoding="utf-8") as file:
            for number in numbers:
                turns = [{"role": "user", "content": f"Say {number}."}]
                file.write(json.dumps({"custom_id": f"c{number}", "messages": turns}) + "\n")

    append(range(12))
    source = {"source": "openai", "path": str(lines), "image": None}
    job = make_job(tmp_path / "job", 0, rows_per_shard=5)
    config = yaml.safe_load(job.config.read_text()) | {"input": source, "prompts": {}}
    job.config.write_text(yaml.safe_dump(config))
    assert job.run().returncode == 0
    before = {part.name: part.read_bytes() for part in job.parts()}
    append(range(12, 19))
    assert as_json(job.call("verify", str(job.out), "--json", timeout=30))["rows_left"] == 7
    assert job.run().returncode == 0
    assert job.table().column("row_id").to_pylist() == [f"c{n}" for n in range(19)]
    for name, data in before.items():
        assert (job.out / "data" / name).read_bytes() == data
    assert job.call("verify", str(job.out)).returncode == 0


def test_a_changed_file_is_refused_or_done_again(job: JobFolder) -> None:
    kept = [part.read_bytes() for part in job.parts()[2:]]
    make_input(job.folder / "input/part-0.parquet", 13, "other")
    done = job.run()
    assert done.returncode == 2
    assert "part-0.parquet has changed" in done.stderr
    assert "--changed redo" in done.stderr
    done = job.run("--changed", "redo")
    assert done.returncode == 0, done.stderr
    rows = job.table().column("row_id").to_pylist()
    assert sorted(rows) == sorted(
        [f"other-{i:05d}" for i in range(13)] + [f"f1-{i:05d}" for i in range(10)]
    )
    assert [part.read_bytes() for part in job.parts()[2:4]] == kept
    assert job.call("verify", str(job.out)).returncode == 0
    assert job.run("--idle-code", "10").returncode == 10


def test_new_settings_answer_beside_the_old(job: JobFolder, tmp_path: Path) -> None:
    before = {part.name: part.read_bytes() for part in job.parts()}
    prompt = ("--set", "prompts.caption=Name {word}.")
    done = job.run(*prompt)
    assert done.returncode == 2
    assert "prompts.caption.text" in done.stderr
    assert "--new-version" in done.stderr
    done = job.run(*prompt, "--new-version", "--json")
    assert done.returncode == 0, done.stderr
    second = job.out / "v2"
    assert as_json(done)["status"]["path"] == str(second)
    assert job.run(*prompt, "--new-version", "--idle-code", "10").returncode == 10
    assert job.run("--new-version", "--idle-code", "10").returncode == 10
    assert {part.name: part.read_bytes() for part in job.parts()} == before
    for folder in (job.out, second):
        assert job.call("verify", str(folder)).returncode == 0
    third = job.run("--set", "generation.seed=7", "--new-version", "--workers", "2")
    assert third.returncode == 0, third.stderr
    assert (job.out / "v3/manifest.json").exists()
    out = tmp_path / "both.parquet"
    joined = job.call("export", str(job.out), str(out), "--join", str(second))
    assert joined.returncode == 0, joined.stderr
    rows = pq.read_table(out).to_pylist()
    assert len(rows) == 20
    assert all(row["caption"] != row["caption_v2"] for row in rows)
    assert all(row["ocr"] == row["ocr_v2"] for row in rows)


def test_an_input_replaced_under_way_ends_the_run(tmp_path: Path) -> None:
    job = make_job(tmp_path / "job", 40, rows_per_shard=10)
    file = job.folder / "input/part-1.parquet"
    kept = file.read_bytes()
    process = job.start_run(env={"FAKE_DELAY_SEC": "0.05"})
    job.wait_for("journal/*")
    make_input(tmp_path / "other.parquet", 20, "other")
    (tmp_path / "other.parquet").replace(file)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "was changed while the job ran" in told
    assert "Traceback" not in told
    file.write_bytes(kept)
    assert job.run().returncode == 0
    assert not [row for row in job.content() if row["row_id"].startswith("other")]
    assert job.call("verify", str(job.out)).returncode == 0
