"""Every command on a small run folder: what it prints, where, its JSON and its exit code."""

from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from jobs.cli import COMMANDS
from tests.helpers.job_folder import JobFolder, as_json, make_job


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> JobFolder:
    """A finished job with one failed row; tests only read it."""
    job = make_job(tmp_path_factory.mktemp("cli") / "job", 20, rows_per_shard=5)
    ended = job.run(env={"FAKE_FAIL_ROWS": "f0-00003"})
    assert ended.returncode == 0, ended.stderr
    return job


@pytest.fixture
def job(tmp_path: Path) -> JobFolder:
    return make_job(tmp_path / "job", 20, rows_per_shard=5)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, done: JobFolder) -> None:
    told = done.call(command, "--help")
    assert told.returncode == 0
    assert told.stdout.startswith(f"Usage: vlm-batch {command}")


def test_run_prints_its_result_on_stdout(job: JobFolder) -> None:
    ended = job.run()
    assert ended.stdout == f"{job.out}: 20 rows, 20 ok, 0 failed\n"


def test_run_as_json(job: JobFolder) -> None:
    told = as_json(job.run("--json"))
    assert told["exit_code"] == 0
    assert told["run"]["rows"] == 20
    assert told["run"]["answers"] == 40
    assert told["status"]["complete"]


def test_status(done: JobFolder) -> None:
    told = as_json(done.call("status", str(done.out), "--json"))
    assert told["rows"] == {
        "total": 20, "left": 0, "ok": 19, "failed": 1, "filtered": 0, "in_journals": 0,
    }  # fmt: skip
    assert told["shards"]["committed"] == 4
    text = done.call("status", str(done.out)).stdout
    assert "20 rows, 19 ok, 1 failed" in text


def test_status_of_an_unfinished_job(job: JobFolder) -> None:
    job.run(env={"FAKE_KILL_AT": "25"})
    told = as_json(job.call("status", str(job.out), "--json"))
    assert told["rows"]["left"] > 0
    assert told["rows"]["in_journals"] > 0
    assert not told["complete"]


def test_show(done: JobFolder) -> None:
    text = done.call("show", str(done.out), "-n", "2").stdout
    assert text.startswith("f0-00000  ok\n")
    assert text.count("caption: ") == 2
    rows = done.call("show", str(done.out), "--json", "-n", "100").stdout.splitlines()
    assert len([json.loads(row) for row in rows]) == 20


def test_show_filters(done: JobFolder) -> None:
    def ids(*args: str) -> list[str]:
        lines = done.call("show", str(done.out), "--json", *args).stdout.splitlines()
        return [json.loads(line)["row_id"] for line in lines]

    assert ids("--status", "failed") == ["f0-00003"]
    assert ids("--code", "corrupt_image") == ["f0-00003"]
    assert ids("--id", "f1-00004") == ["f1-00004"]
    assert ids("--shard", "shard-00000001", "-n", "1") == ["f0-00005"]


def test_show_failures(done: JobFolder) -> None:
    text = done.call("show", str(done.out), "--failures").stdout
    assert "corrupt_image" in text
    assert "f0-00003" in text
    told = as_json(done.call("show", str(done.out), "--failures", "--json"))
    assert told[0]["count"] == 1


def test_validate(job: JobFolder) -> None:
    import shutil

    from tests.helpers.checkpoints import write_qwen2_vl

    checkpoint = job.folder / "checkpoint"
    shutil.rmtree(checkpoint)
    write_qwen2_vl(checkpoint)
    told = as_json(job.call("validate", str(job.config), "--json"))
    assert told["valid"]
    assert told["rows"] == 20
    assert told["run_folder"] == "new"
    assert not job.out.exists()


def test_report(job: JobFolder) -> None:
    job.run(env={"FAKE_FAIL_ROWS": "f0-00003"})
    ended = job.call("report", str(job.out))
    page = Path(ended.stdout.strip()).read_text()
    assert "corrupt_image" in page
    assert "<script" not in page
    assert (
        as_json(job.call("report", str(job.out), "--json"))["prompts"]["caption"]["answers"] == 19
    )


def test_schema(done: JobFolder) -> None:
    schema = as_json(done.call("schema"))
    assert "prompts" in schema["properties"]


def test_models(done: JobFolder) -> None:
    assert "qwen2-vl" in done.call("models").stdout
    assert any(family["fused"] for family in as_json(done.call("models", "--json")))


def test_doctor(done: JobFolder) -> None:
    told = as_json(done.call("doctor", "--json"))
    assert {check["name"] for check in told["checks"]} >= {"python", "torch", "shared memory"}


def test_init_writes_a_config_that_loads(job: JobFolder) -> None:
    made = job.call(
        "init", "first.yaml", "--input", str(job.folder / "input/*.parquet"),
        "--model", str(job.folder / "checkpoint"), "--prompt", "caption=What is {word}: \"it\"?",
        "--output", str(job.out),
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    config = yaml.safe_load((job.folder / "first.yaml").read_text())
    assert config["input"]["id"] == "id"
    assert config["prompts"]["caption"] == 'What is {word}: "it"?'
    again = job.call("init", "first.yaml", "--input", "x.parquet")
    assert again.returncode == 2
    ended = job.call("run", "first.yaml", "--set", "input.image=null")
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("frobnicate",), "no command"),
        (("statsu", "x"), "did you mean `status`?"),
        (("status", "/nowhere/at/all"), "no run folder"),
        (("verify", "/nowhere/at/all"), "no run folder"),
        (("run", "missing.yaml"), "missing.yaml"),
        (("run", "job.yaml", "--set", "generation.temprature=1"), "did you mean `temperature`?"),
        (("run", "job.yaml", "--model-path", "no/such/folder/here"), "model.id"),
        (("run", "job.yaml", "--set", "input.path=none/*.parquet"), "none/*.parquet"),
        (("run", "job.yaml", "--set", "prompts.caption=Say {wrod}"), "did you mean 'word'?"),
        (("run", "job.yaml", "--workers", "0"), "0"),
        (("export", "/nowhere", "out.parquet"), "no run folder"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_2(
    args: tuple[str, ...], words: str, job: JobFolder
) -> None:
    ended = job.call(*args)
    assert ended.returncode == 2, ended.stderr
    assert words in ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1, ended.stderr


def test_a_closed_pipe_is_no_error(done: JobFolder) -> None:
    process = replace(done, spawns=True).start("show", str(done.out), "--json", "-n", "100")
    assert isinstance(process, subprocess.Popen)
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert process.wait(20) == 0


def test_a_foreign_pipeline_package_is_named(job: JobFolder) -> None:
    foreign = job.folder / "elsewhere/pipeline"
    foreign.mkdir(parents=True)
    (foreign / "__init__.py").write_text("")
    (foreign / "errors.py").write_text(
        "class UserError(Exception): pass\nclass EngineError(Exception): pass\n"
    )
    from tests.helpers.job_folder import ROOT

    path = f"{foreign.parent}:{ROOT}"
    ended = replace(job, spawns=True).call(
        "status", str(job.out), env={"PYTHONPATH": path, "PYTHONSAFEPATH": "1"}
    )
    assert ended.returncode == 2
    assert "not beside" in ended.stderr


def test_a_script_as_json(job: JobFolder) -> None:
    plain = job.call("submit", str(job.config), "--dry-run").stdout
    assert as_json(job.call("submit", str(job.config), "--dry-run", "--json"))["script"] == plain
