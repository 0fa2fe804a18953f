"""The output table of a shard: row ids, kept columns, one answer column a prompt, states, `meta`.

Rows stand in input order. Knows the columns' meaning, not where the table goes.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from jobs.answer_types import Unreadable, arrow_type, parse_answer
from jobs.config import JobConfig
from pipeline.errors import CODES, UserError
from pipeline.rows import Answer

OK, FAILED, FILTERED = "ok", "failed", "filtered"
STATES = (OK, FAILED, FILTERED)

META_TYPE = pa.struct(
    [
        ("finish_reason", pa.string()),
        ("num_prompt_tokens", pa.int32()),
        ("num_cached_tokens", pa.int32()),
        ("num_output_tokens", pa.int32()),
        ("attempt", pa.string()),
        ("error_code", pa.string()),
        ("error", pa.string()),
        ("raw", pa.string()),  # text that its schema's column cannot hold
    ]
)


class KeptRow(Protocol):
    """What the table needs of an input row."""

    @property
    def row_id(self) -> str: ...
    @property
    def columns(self) -> Sequence[Any]: ...  # in the order of `input.keep`


class Failure(NamedTuple):
    """Why an answer is not there."""

    code: str
    message: str


def output_schema(config: JobConfig, source: pa.Schema | None) -> pa.Schema:
    """The parts' schema; `source` is the input's (not needed when nothing is kept).

    Raises: UserError for a kept column that the input lacks.
    """
    fields = [pa.field("row_id", pa.string())]
    for name in config.input.keep:
        if source is None or name not in source.names:
            has = f"; the input has {', '.join(source.names)}" if source is not None else ""
            raise UserError(f"input.keep: there is no column {name!r}{has}.")
        fields.append(pa.field(name, _stored_type(source.field(name).type)))
    for name in config.prompt_names():
        schema = config.answer_schema(name)
        fields.append(pa.field(name, pa.string() if schema is None else arrow_type(schema)))
    fields += [pa.field(name, pa.string()) for name in ("status", "error_code", "error")]
    meta = pa.struct([(name, META_TYPE) for name in config.prompt_names()])
    return _as_read(pa.schema([*fields, pa.field("meta", meta)]))


def _as_read(schema: pa.Schema) -> pa.Schema:
    """The schema that a Parquet file of it is read with: the items of lists change their name."""
    file = io.BytesIO()
    pq.write_table(schema.empty_table(), file)
    return pq.read_schema(file).remove_metadata()


def build_table(
    schema: pa.Schema,
    rows: Sequence[KeptRow],
    answers: Mapping[tuple[int, str], Answer],
    made_by: Mapping[tuple[int, str], str],
) -> pa.Table:
    """The table of a shard of which every (row, prompt) has its answer.

    Raises: KeyError for one that has none.
    """
    prompts = [field.name for field in schema.field("meta").type]
    keep = schema.names[1 : schema.names.index("status") - len(prompts)]
    failures: list[dict[str, Failure]] = [{} for _ in rows]
    columns: dict[str, pa.Array] = {}
    columns["row_id"] = pa.array([_text(row.row_id) for row in rows], pa.string())
    for position, name in enumerate(keep):
        values = [row.columns[position] for row in rows]
        columns[name], bad = _kept_column(values, schema.field(name).type)
        for index, reason in bad.items():
            message = f"The kept column {name!r} cannot be stored: {reason}"
            failures[index][""] = Failure("bad_row", message)
    metas = {}
    for name in prompts:
        columns[name], metas[name] = _answer_column(
            name, schema.field(name).type, [answers[i, name] for i in range(len(rows))],
            [made_by.get((i, name)) for i in range(len(rows))], failures,
        )  # fmt: skip
    columns |= _state_columns(failures, len(prompts))
    meta_type = schema.field("meta").type
    columns["meta"] = pa.StructArray.from_arrays(list(metas.values()), fields=list(meta_type))
    return pa.table([columns[name] for name in schema.names], schema=schema)


def count_states(table: pa.Table) -> dict[str, int]:
    """Rows by state."""
    counts = dict.fromkeys(STATES, 0)
    for entry in table.column("status").value_counts().to_pylist():
        counts[entry["values"]] = entry["counts"]
    return counts


def answers_of(
    table: pa.Table, shard: str, drop_codes: frozenset[str] | None
) -> tuple[dict[tuple[int, str], Answer], dict[tuple[int, str], str]]:
    """Answers back from a committed table, for a shard that is redone, with their attempts.

    Failed answers whose code is in `drop_codes` are left out (None: all failed ones).
    """
    from pipeline.rows import RequestKey

    answers, made_by = {}, {}
    for prompt in [field.name for field in table.schema.field("meta").type]:
        texts = _texts(table.column(prompt))
        metas = pa.compute.struct_field(table.column("meta"), prompt).to_pylist()
        for index, (text, meta) in enumerate(zip(texts, metas, strict=True)):
            code = meta["error_code"]
            if code is not None and (drop_codes is None or code in drop_codes):
                continue
            answers[index, prompt] = Answer(
                key=RequestKey(shard, index, prompt),
                text=meta["raw"] if meta["raw"] is not None else text,
                **{name: meta[name] for name in _ANSWER_FIELDS},
            )
            made_by[index, prompt] = meta["attempt"]
    return answers, made_by


_ANSWER_FIELDS = (
    "finish_reason", "num_prompt_tokens", "num_cached_tokens", "num_output_tokens", "error_code",
    "error",
)  # fmt: skip


def _answer_column(
    prompt: str,
    type_: pa.DataType,
    answers: Sequence[Answer],
    made_by: Sequence[str | None],
    failures: list[dict[str, Failure]],
) -> tuple[pa.Array, pa.Array]:
    values, metas = [], []
    for index, (answer, attempt) in enumerate(zip(answers, made_by, strict=True)):
        value, failure, raw = _read(answer, type_)
        if failure is not None:
            failures[index][prompt] = failure
        values.append(value)
        metas.append(_meta(answer, attempt, failure, raw))
    return pa.array(values, type_), pa.array(metas, META_TYPE)


def _read(answer: Answer, type_: pa.DataType) -> tuple[Any, Failure | None, str | None]:
    """The column's value, why there is none, and the text that did not fit."""
    text = _text(answer.text)
    if answer.error_code is not None:
        return None, Failure(answer.error_code, _text(answer.error) or answer.error_code), text
    if text is None or pa.types.is_string(type_):
        return text, None, None
    try:
        return parse_answer(text, type_), None, None
    except Unreadable as error:
        return None, Failure("schema_invalid", f"{CODES['schema_invalid']} ({error})"), text


def _meta(
    answer: Answer, attempt: str | None, failure: Failure | None, raw: str | None
) -> dict[str, Any]:
    return {
        "finish_reason": answer.finish_reason,
        "num_prompt_tokens": answer.num_prompt_tokens,
        "num_cached_tokens": answer.num_cached_tokens,
        "num_output_tokens": answer.num_output_tokens,
        "attempt": attempt,
        "error_code": failure.code if failure else None,
        "error": failure.message if failure else None,
        "raw": raw,
    }


def _state_columns(failures: Sequence[dict[str, Failure]], num_prompts: int) -> dict[str, pa.Array]:
    codes = [next(iter(f.values())).code if f else None for f in failures]
    return {
        "status": pa.array([FAILED if f else OK for f in failures], pa.string()),
        "error_code": pa.array(codes, pa.string()),
        "error": pa.array([_sentence(f, num_prompts) for f in failures], pa.string()),
    }


def _sentence(failures: dict[str, Failure], num_prompts: int) -> str | None:
    """One text for the row: a reason that all share stands once, else each behind its prompt."""
    if not failures:
        return None
    messages = {f.message for f in failures.values()}
    if len(messages) == 1 and (num_prompts == len(failures) or "" in failures):
        return messages.pop()
    told = (f"{name}: {f.message}" if name else f.message for name, f in failures.items())
    return " ".join(told)


def _kept_column(values: list[Any], type_: pa.DataType) -> tuple[pa.Array, dict[int, str]]:
    """A column of kept values; those that do not fit become null, with the reason by row."""
    try:
        return pa.array(values, type_), {}
    except (pa.ArrowException, TypeError, ValueError, OverflowError):
        pass
    bad: dict[int, str] = {}
    for index, value in enumerate(values):
        try:
            pa.array([value], type_)
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            bad[index] = str(error).splitlines()[0]
            values[index] = None
    return pa.array(values, type_), bad


def _stored_type(type_: pa.DataType) -> pa.DataType:
    """The type a kept column is stored in: dictionaries and views as their plain values."""
    if pa.types.is_dictionary(type_):
        return _stored_type(type_.value_type)
    if isinstance(type_, pa.BaseExtensionType):
        return _stored_type(type_.storage_type)
    return pa.string() if pa.types.is_null(type_) else type_


def _text(value: str | None) -> str | None:
    """Text that UTF-8 can hold: a lone surrogate becomes `?`."""
    if value is None or not isinstance(value, str):
        return value if value is None else str(value)
    return value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8")


def _texts(column: pa.ChunkedArray) -> list[str | None]:
    import json

    if pa.types.is_string(column.type):
        texts: list[str | None] = column.to_pylist()
        return texts
    values = column.to_pylist()
    return [None if v is None else json.dumps(v, ensure_ascii=False) for v in values]
