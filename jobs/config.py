"""The job's config: one YAML file, `--set` on top, defaults once, in frozen models.

A mistake ends in one sentence with the line and the nearest allowed key. Knows nothing of how a
job runs; `pipeline.settings` holds the part that the pipeline knows.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator
from pydantic.json_schema import SkipJsonSchema

from jobs.yaml_source import YamlSource, parse_yaml
from pipeline.errors import UserError, without_secrets
from pipeline.settings import LabelSettings, PromptSettings, Settings

RESERVED_COLUMNS = ("row_id", "status", "error_code", "error", "meta")
MESSAGES_COLUMN = "answer"
SHORT_KEYS = {
    "model_path": "model.id",
    "chat_template": "model.chat_template",
    "output": "output.path",
}
_PROMPT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]*")


class OutputSettings(Settings):
    """Where results go, and in which portions."""

    path: str = Field(description="The run folder: a local folder or an fsspec address.")
    rows_per_shard: int = Field(4096, ge=1, description="Rows of one part; the unit of a commit.")
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = Field(
        "zstd", description="Of the parts: zstd, snappy, gzip, lz4 or none."
    )


class CheckpointSettings(Settings):
    """How much work a crash may cost."""

    interval_sec: float = Field(30.0, gt=0, description="Finished answers are journaled as often.")
    lease_sec: float = Field(
        120.0, gt=0, description="A shard whose worker gives no sign for as long is taken over."
    )


class RetrySettings(Settings):
    """How often a shard is tried."""

    attempts: int = Field(3, ge=1, description="Tries at one shard by one run before it gives up.")
    watchdog_sec: float = Field(
        1800.0, gt=0, description="A worker process without progress for as long is restarted."
    )


class JobConfig(LabelSettings):
    """One resolved config over one input into one run folder."""

    output: OutputSettings
    checkpoint: CheckpointSettings = Field(default_factory=CheckpointSettings)  # type: ignore[arg-type]
    retry: RetrySettings = Field(default_factory=RetrySettings)  # type: ignore[arg-type]
    env_references: SkipJsonSchema[dict[str, str]] = Field(default_factory=dict, repr=False)

    @model_validator(mode="after")
    def _check(self) -> JobConfig:
        _check_columns(self)
        return self

    def label_settings(self) -> LabelSettings:
        """The part that the pipeline knows."""
        return LabelSettings.model_construct(
            **{name: getattr(self, name) for name in LabelSettings.model_fields}
        )

    def prompt_names(self) -> tuple[str, ...]:
        """The answer columns, in their order."""
        return (MESSAGES_COLUMN,) if self.input.messages is not None else tuple(self.prompts)

    def answer_schema(self, name: str) -> dict[str, Any] | None:
        """The JSON schema of a prompt's answers; None for plain text."""
        prompt = self.prompts.get(name)
        schema = prompt.schema_ if prompt is not None else None
        return json.loads(schema) if isinstance(schema, str) else schema

    def resolved(self) -> dict[str, Any]:
        """All keys with their values, fit to be stored: secrets stand as `${NAME}`."""
        values = self.model_dump(mode="json", by_alias=True, exclude={"env_references"})
        masked: dict[str, Any] = _mask(values)
        for dotted, reference in self.env_references.items():
            _put(masked, dotted.split("."), reference)
        return masked


def load_config(
    path: str | Path,
    sets: Sequence[str] = (),
    *,
    env: Mapping[str, str] | None = None,
    **short: str | None,
) -> JobConfig:
    """Read a config file, then `sets` (`a.b=value`), then `short` (keys of `SHORT_KEYS`).

    Raises: UserError.
    """
    file = find_config(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8 text"
        raise UserError(f"{path} cannot be read: {reason}.") from error
    source = parse_yaml(text, str(path), env)
    for assignment in sets:
        source.set(assignment, env)
    for name, value in short.items():
        if value is not None:
            source.set(f"{SHORT_KEYS[name]}={json.dumps(value)}", env)
    return make_config(source, base=file.parent)


def config_from_values(values: Mapping[str, Any], name: str = "manifest.json") -> JobConfig:
    """A config that `resolved()` made; `${NAME}` references are filled again."""
    return make_config(parse_yaml(yaml.safe_dump(_json(values), sort_keys=False), name))


def make_config(source: YamlSource, base: Path | None = None) -> JobConfig:
    """Validate what YAML gave.

    Raises: UserError.
    """
    if "env_references" in source.values:
        raise UserError(f"{source.place(('env_references',))}: unknown key `env_references`.")
    values = _json(source.values)
    _read_schemas(values, source, base)
    if source.secrets:
        values["env_references"] = dict(source.secrets)
    try:
        return JobConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, source)) from error


def find_config(path: str | Path) -> Path:
    """The file itself, or the one of the same name that ships with the package.

    Raises: UserError.
    """
    file = Path(path).expanduser()
    if file.is_file():
        return file
    shipped = shipped_configs()
    if shipped is not None and not file.is_absolute() and (shipped / file.name).is_file():
        return shipped / file.name
    names = sorted(p.name for p in shipped.glob("*.yaml")) if shipped is not None else []
    hint = f" Configs that ship: {', '.join(names)}." if names else ""
    raise UserError(f"There is no config {path}.{hint}")


def shipped_configs() -> Path | None:
    """The folder of configs that ship: inside the package, or beside it in a checkout."""
    here = Path(__file__).resolve().parent
    for folder in (here / "shipped_configs", here.parent / "configs"):
        if folder.is_dir():
            return folder
    return None


def json_schema() -> dict[str, Any]:
    """The config's JSON schema, for editors."""
    schema = JobConfig.model_json_schema(by_alias=True)
    prompts = schema["properties"]["prompts"]
    reference = prompts["additionalProperties"]
    prompts["additionalProperties"] = {"anyOf": [{"type": "string"}, reference]}
    return schema


def _check_columns(config: JobConfig) -> None:
    if config.input.messages is not None and config.prompts:
        raise ValueError("give either `prompts` or `input.messages`, not both")
    if config.input.messages is None and not config.prompts:
        raise ValueError("nothing is asked: give `prompts`, or `input.messages`")
    for name in config.prompts:
        if not _PROMPT_NAME.fullmatch(name):
            raise ValueError(f"prompt name {name!r}: use letters, digits, _ and -")
    seen = set(RESERVED_COLUMNS)
    for kind, names in (("prompt", config.prompt_names()), ("kept column", config.input.keep)):
        for name in names:
            if name in RESERVED_COLUMNS:
                raise ValueError(f"{kind} {name!r}: this name is the output's own column")
            if name in seen:
                raise ValueError(f"{kind} {name!r}: the output already has a column of this name")
            seen.add(name)


def _read_schemas(values: dict[str, Any], source: YamlSource, base: Path | None) -> None:
    """Replace paths of prompt schemas by the schemas: relative to here, else to the config."""
    prompts = values.get("prompts")
    for name, prompt in prompts.items() if isinstance(prompts, dict) else ():
        schema = prompt.get("schema") if isinstance(prompt, dict) else None
        if not isinstance(schema, str):
            continue
        place = source.place(("prompts", name, "schema"))
        prompt["schema"] = _read_schema(schema, place, base)


def _read_schema(text: str, place: str, base: Path | None) -> dict[str, Any]:
    if not text.lstrip().startswith("{"):
        candidates = [Path(text).expanduser()] + ([base / text] if base is not None else [])
        file = next((path for path in candidates if path.is_file()), None)
        if file is None:
            raise UserError(f"{place}: there is no schema file {text}.")
        text = file.read_text(encoding="utf-8")
    try:
        schema = json.loads(text)
    except ValueError as error:
        raise UserError(f"{place}: the schema is not valid JSON: {error}.") from error
    if not isinstance(schema, dict):
        raise UserError(f"{place}: a JSON schema is an object.")
    return schema


def _explain(error: ValidationError, source: YamlSource) -> str:
    """One sentence on the first mistakes, each with its place."""
    told = list(dict.fromkeys(_explain_one(dict(e), source) for e in error.errors()))
    more = f" (and {len(told) - 3} more)" if len(told) > 3 else ""
    text = "; ".join(told[:3]) + more
    return text if text.endswith("?") else text + "."


def _explain_one(error: dict[str, Any], source: YamlSource) -> str:
    path, model = _walk(error["loc"], source.values)
    place = source.place(path)
    dotted = ".".join(map(str, path))
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key `{path[-1]}`{_nearest(str(path[-1]), path, model)}"
    if error["type"] == "missing":
        return f"{place}: `{dotted}` is missing"
    if error["type"] == "value_error":
        return f"{place}: {error['ctx']['error']}" if "ctx" in error else f"{place}: {error['msg']}"
    value = error.get("input")
    shown = f", not {value!r}" if isinstance(value, str | int | float | bool | None) else ""
    message = error["msg"].removeprefix("Input ").removeprefix("String ")
    return f"{place}: `{dotted}` {message}{shown}"


def _walk(
    loc: Sequence[str | int], values: Any
) -> tuple[tuple[str | int, ...], type[BaseModel] | None]:
    """The part of pydantic's location that names keys, and the model that should hold the last."""
    path: list[str | int] = []
    model: type[BaseModel] | None = JobConfig
    holder = model
    for step in loc:
        field_ = _fields(model).get(str(step)) if model is not None else None
        if model is None and not (isinstance(values, dict | list) and _has(values, step)):
            if path[:1] != ["prompts"] or len(path) != 1:
                break  # the name of a union's member, no key
        path.append(step)
        holder = model
        values = _at(values, step)
        model = _model_of(field_, path)
    return tuple(path), holder


def _has(values: Any, step: str | int) -> bool:
    if isinstance(values, list):
        return isinstance(step, int) and step < len(values)
    return isinstance(values, dict) and step in values


def _at(values: Any, step: str | int) -> Any:
    return values[step] if _has(values, step) else None


def _fields(model: type[BaseModel]) -> dict[str, Any]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _model_of(field: Any, path: Sequence[str | int]) -> type[BaseModel] | None:
    if len(path) == 2 and path[0] == "prompts":
        return PromptSettings
    annotation = getattr(field, "annotation", None)
    return (
        annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None
    )


def _nearest(key: str, path: Sequence[str | int], model: type[BaseModel] | None) -> str:
    allowed = [name for name in _fields(model or JobConfig) if name != "env_references"]
    inside = f" in `{'.'.join(map(str, path[:-1]))}`" if len(path) > 1 else ""
    close = difflib.get_close_matches(key, allowed, n=1, cutoff=0.5)
    if close:
        return f"{inside}; did you mean `{close[0]}`?"
    return f"{inside}; allowed are {', '.join(allowed)}"


def _put(values: Any, path: Sequence[str], value: str) -> None:
    for part in path[:-1]:
        values = values[int(part) if isinstance(values, list) else part]
    last = path[-1]
    if isinstance(values, dict) and isinstance(values.get(last), dict) and "text" in values[last]:
        values[last]["text"] = value  # a prompt in short form
        return
    values[int(last) if isinstance(values, list) else last] = value


def _mask(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _mask(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_mask(inner) for inner in value]
    return without_secrets(value.replace("${", "$${")) if isinstance(value, str) else value


def _json(values: Any) -> Any:
    """A deep copy in plain JSON types; dates that YAML made become text again."""
    return json.loads(json.dumps(values, default=str))
