"""Configs that mean harm or go wrong: one sentence each, at once, and no secret told."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.config import load_config
from jobs.yaml_source import parse_yaml
from pipeline.errors import EngineError, RowError, UserError, without_secrets
from pipeline.schemas import check_schema
from pipeline.settings import PromptSettings
from pipeline.sources.files import expand

BASE = "model: {id: demo}\ninput: {path: a}\nprompts: {a: b}\noutput: {path: out}\n"
LAUGHS = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 12)
)


def mistake(text: str) -> str:
    with pytest.raises(UserError) as raised:
        parse_yaml(text, "job.yaml", {})
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (LAUGHS, "at most 100,000 values"),
        ("a: " + "[" * 5000 + "]" * 5000, "nests at most 64 levels"),
        ("a: " + "[" * 70 + "]" * 70, "nests at most 64 levels"),
        ("model: &m {id: *m}", "nests at most 64 levels"),
        ("a: {<<: 3}", "line 1: not valid YAML: expected a mapping"),
        ("a: b\x00", "not valid YAML"),
        ("a: {path: out/${NAME}}", "a text with `${NAME}` needs quotes"),
    ],
    ids=["laughs", "deep", "nested", "circle", "merge", "nul", "flow"],
)
def test_yaml_that_means_harm_is_one_sentence(text: str, says: str) -> None:
    assert says in mistake(text)


def test_a_merged_key_may_be_written_anew() -> None:
    text = "b: &b {k: 1, l: 1}\na: &a {<<: *b, k: 2}\nc: {<<: *a, l: 3}\nd: *a\n"
    values = parse_yaml(text, "job.yaml", {}).values
    assert values["a"] == values["d"] == {"k": 2, "l": 1}
    assert values["c"] == {"k": 2, "l": 3}


def test_merges_of_merges_stay_small() -> None:
    assert parse_yaml(MERGES, "job.yaml", {}).values["a11"] == {"x": 1}


def test_a_deep_value_of_set_is_one_sentence() -> None:
    source = parse_yaml(BASE, "job.yaml", {})
    with pytest.raises(UserError, match="nests at most"):
        source.set("generation.stop=" + "[" * 5000, {})


@pytest.mark.parametrize(
    ("addition", "key"),
    [
        ("engine: {device: gpu}", "engine.device"),
        ("engine: {device: 'cuda:'}", "engine.device"),
        ("generation: {temperature: .inf}", "generation.temperature"),
        ("generation: {repetition_penalty: .inf}", "generation.repetition_penalty"),
    ],
)
def test_values_that_no_run_could_use(tmp_path: Path, addition: str, key: str) -> None:
    file = tmp_path / "job.yaml"
    file.write_text(BASE + addition + "\n", encoding="utf-8")
    with pytest.raises(UserError, match=rf"line 5: `{key}` should [^S]*, not "):
        load_config(file)


def test_a_schema_that_guides_nothing_is_refused_before_the_run() -> None:
    good = {"type": "object", "properties": {"a": {"type": "string"}}}
    check_schema("a", PromptSettings(text="b", schema=good))
    for bad in ({"type": "obj"}, {"if": {}}):
        with pytest.raises(UserError, match=r"prompts\.a\.schema cannot be used"):
            check_schema("a", PromptSettings(text="b", schema=bad))


@pytest.mark.parametrize(
    "text",
    [
        "https://user:hunter2@host/a.png is gone",
        "https://h/a.png?X-Amz-Signature=hunter2&b=1",
        "https://h/a.png?b=1&sig=hunter2",
        "https://h/a.png?access_token=hunter2'",
        "Invalid bucket name 'AKIAIOSFODNN7EXAMPLE:hunter2@bucket'",
        "s3://AKIAIOSFODNN7EXAMPLE:hunter2@bucket/a.png",
    ],
)
def test_no_error_tells_a_secret(text: str) -> None:
    for error in (UserError(text), EngineError(text), RowError("remote_failed", text)):
        assert "hunter2" not in str(error)
        assert "AKIA" not in str(error)


@pytest.mark.parametrize(
    "text", ["mail a@b.c at 12:30", "s3://bucket/a.png", "https://h/?signed=1&max_tokens=3", ""]
)
def test_other_texts_stay(text: str) -> None:
    assert without_secrets(text) == text


def test_a_password_in_the_input_is_refused() -> None:
    with pytest.raises(UserError, match="holds a password") as raised:
        expand("https://user:hunter2@127.0.0.1:1/a.parquet", (".parquet",))
    assert "hunter2" not in str(raised.value)
