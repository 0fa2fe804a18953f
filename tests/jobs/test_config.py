"""The config: messages with line and nearest key, `--set`, the environment, secrets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from jobs.config import JobConfig, config_from_values, json_schema, load_config
from pipeline.errors import UserError
from pipeline.settings import EngineSettings, LabelSettings

BASE = """\
model: {id: demo}
input:
  path: data/*.parquet
  keep: [url]
prompts:
  caption: Describe this image.
output: {path: out}
"""


def load(folder: Path, text: str = BASE, *sets: str, **options: Any) -> JobConfig:
    file = folder / "job.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, sets, **options)


def mistake(folder: Path, text: str = BASE, *sets: str, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        load(folder, text, *sets, **options)
    message = str(raised.value)
    assert "\n" not in message
    return message.replace(str(folder / "job.yaml"), "job.yaml")


def test_defaults_and_sections(tmp_path: Path) -> None:
    config = load(tmp_path)
    assert config.output.rows_per_shard == 4096
    assert config.checkpoint.interval_sec == 30
    assert config.prompt_names() == ("caption",)
    settings = config.label_settings()
    assert type(settings) is LabelSettings
    assert settings.prompts["caption"].text == "Describe this image."


@pytest.mark.parametrize(
    ("added", "expected"),
    [
        (
            "generaton: {}\n",
            "job.yaml, line 8: unknown key `generaton`; did you mean `generation`?",
        ),
        (
            "generation:\n  seed: 1\n  temprature: 1\n",
            "job.yaml, line 10: unknown key `temprature` in `generation`; "
            "did you mean `temperature`?",
        ),
        (
            "generation: {top_p: 1.5}\n",
            "job.yaml, line 8: `generation.top_p` should be less than or equal to 1, not 1.5.",
        ),
        ("model: {id: x}\n", "job.yaml, line 8: the key `model` stands here twice."),
        ("retry: [\n", "job.yaml, line 9: not valid YAML"),
        ("retry: {attempts: 0}\n", "job.yaml, line 8: `retry.attempts` should be greater"),
        ("qqq: 1\n", "job.yaml, line 8: unknown key `qqq`; allowed are model, input"),
        ("env_references: {a: b}\n", "job.yaml, line 8: unknown key `env_references`."),
        ("system: ${NO_SUCH_NAME}\n", "job.yaml, line 8: the environment variable NO_SUCH_NAME"),
        ("system: ${not a name}\n", "job.yaml, line 8: ${not a name} is no variable"),
        ("engine:\n  workers: many\n", "job.yaml, line 9: `engine.workers` should be"),
    ],
)
def test_mistakes_name_the_line(tmp_path: Path, added: str, expected: str) -> None:
    assert expected in mistake(tmp_path, BASE + added)


def test_prompt_mistakes(tmp_path: Path) -> None:
    wrong = BASE.replace("Describe this image.", "{text: a, shema: b.json}")
    assert "line 6: unknown key `shema` in `prompts.caption`; did you mean `schema`?" in mistake(
        tmp_path, wrong
    )
    for name in ("status", "row_id", "meta", "url"):
        assert f"prompt '{name}'" in mistake(tmp_path, BASE.replace("caption", name)) or (
            f"kept column '{name}'" in mistake(tmp_path, BASE.replace("caption", name))
        )
    assert "use letters" in mistake(tmp_path, BASE.replace("caption", "'a b'"))
    assert "nothing is asked" in mistake(
        tmp_path, BASE.replace("caption: Describe this image.", "{}")
    )
    assert "not both" in mistake(tmp_path, BASE, "input.messages=turns")


def test_missing_sections_and_files(tmp_path: Path) -> None:
    assert "`model` is missing" in mistake(tmp_path, "prompts: {a: b}\n")
    assert "a config is a mapping" in mistake(tmp_path, "- a\n")
    with pytest.raises(UserError, match=r"There is no config .*nope\.yaml"):
        load_config(tmp_path / "nope.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        load_config(tmp_path / "binary.yaml")


def test_set_overrides(tmp_path: Path) -> None:
    config = load(
        tmp_path, BASE, "generation.temperature=0.5", "input.path=[a, b]", "prompts.tags=Tags: all",
        "prompts.caption.max_new_tokens=7", "engine.workers=3", "system=", "input.id=null",
    )  # fmt: skip
    assert config.generation.temperature == 0.5
    assert config.input.path == ("a", "b")
    assert config.prompts["tags"].text == "Tags: all"
    assert config.prompts["caption"].text == "Describe this image."
    assert config.prompts["caption"].max_new_tokens == 7
    assert config.engine.workers == 3
    assert config.system is None
    assert config.input.id is None


def test_set_mistakes(tmp_path: Path) -> None:
    assert "--set output.pth: unknown key `pth`" in mistake(tmp_path, BASE, "output.pth=4")
    assert "--set a: write it as key=value" in mistake(tmp_path, BASE, "a")
    assert "model.id has no keys" in mistake(tmp_path, BASE, "model.id.x=3")
    assert "not valid YAML" in mistake(tmp_path, BASE, "input.keep=[a")


def test_short_options(tmp_path: Path) -> None:
    config = load(tmp_path, model_path="/models/a: b", chat_template=None, output="s3://b/c")
    assert config.model.id == "/models/a: b"
    assert config.output.path == "s3://b/c"


def test_environment(tmp_path: Path) -> None:
    env = {"WHERE": "here", "ROWS": "17", "EMPTY": ""}
    text = BASE.replace("out}", '"${WHERE}/${SUB:-x}", rows_per_shard: "${ROWS}"}')
    text += "system: ${EMPTY}\n"
    config = load(tmp_path, text.replace("Describe", "Pay $${5} and describe"), env=env)
    assert config.output.path == "here/x"
    assert config.output.rows_per_shard == 17
    assert config.system is None
    assert config.prompts["caption"].text == "Pay ${5} and describe this image."


def test_secrets_stay_out_of_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", "hunter2")
    text = BASE.replace("data/*.parquet", "https://${API_TOKEN}.example.com/a.parquet")
    config = load(tmp_path, text, "input.base_path=https://me:hunter2@example.com/")
    assert "hunter2" in str(config.input.path)
    stored = json.dumps(config.resolved())
    assert "hunter2" not in stored
    assert "hunter2" not in repr(config.env_references)
    assert "${API_TOKEN}" in stored
    again = config_from_values(config.resolved())
    assert again.input.path == config.input.path
    child = JobConfig.model_validate_json(config.model_dump_json(by_alias=True))
    assert child == config
    assert child.resolved() == config.resolved()


def test_stored_config_comes_back(tmp_path: Path) -> None:
    config = load(tmp_path, BASE.replace("Describe", "Pay $${5} and describe"))
    assert config_from_values(config.resolved()) == config


def test_schema_files_are_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    text = BASE.replace("Describe this image.", "{text: a, schema: s.json}")
    monkeypatch.chdir("/")
    config = load(tmp_path, text)  # beside the config
    assert config.answer_schema("caption") == schema
    (tmp_path / "s.json").write_text("[1]")
    assert "a JSON schema is an object" in mistake(tmp_path, text)
    (tmp_path / "s.json").write_text("{")
    assert "not valid JSON" in mistake(tmp_path, text)
    assert "line 6: there is no schema file t.json" in mistake(
        tmp_path, text.replace("s.json", "t.json")
    )


def test_shipped_configs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "tiny.yaml").write_text(BASE)
    monkeypatch.setattr("jobs.config.shipped_configs", lambda: shipped)
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/tiny.yaml").model.id == "demo"
    with pytest.raises(UserError, match=r"Configs that ship: tiny\.yaml"):
        load_config("configs/other.yaml")


def test_json_schema_accepts_both_prompt_forms() -> None:
    schema = json_schema()
    kinds = schema["properties"]["prompts"]["additionalProperties"]["anyOf"]
    assert {"type": "string"} in kinds
    assert "env_references" not in schema["properties"]
    json.dumps(schema)


def test_no_engine_key_is_forgotten() -> None:
    """Each key's description, if it has one, is a sentence; the table in the docs shows them."""
    for name, field in EngineSettings.model_fields.items():
        assert field.description is None or field.description.endswith("."), name


KEYS = st.sampled_from(sorted(JobConfig.model_fields.keys() - {"env_references"}))


@given(key=KEYS, at=st.integers(0, 20), letter=st.sampled_from("abcxyz"))
def test_a_typo_is_never_silent(
    tmp_path_factory: pytest.TempPathFactory, key: str, at: int, letter: str
) -> None:
    typo = key[: at % len(key)] + letter + key[at % len(key) :]
    values = yaml.safe_load(BASE)
    values[typo] = values.pop(key, {})
    folder = tmp_path_factory.mktemp("typo")
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items()]
    message = mistake(folder, "\n".join(lines) + "\n")
    assert f"line {len(lines)}: unknown key `{typo}`; did you mean `{key}`?" in message
