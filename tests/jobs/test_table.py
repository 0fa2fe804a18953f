"""The output table: columns, states, answers under a schema, values that do not fit."""

from __future__ import annotations

import datetime as dt
import decimal
import io
import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobs.answer_types import Unreadable, arrow_type, parse_answer
from jobs.table import answers_of, build_table, count_states, output_schema
from pipeline.errors import RowError, UserError
from pipeline.rows import Answer, RequestKey
from tests.helpers.run_folder import Kept, answer, make_config

SHARD = "shard-00000000"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": ["integer", "null"]},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}},
    },
}


def test_columns_and_their_order() -> None:
    config = make_config(
        input={"keep": ["url", "n"]},
        prompts={"caption": "a", "person": {"text": "b", "schema": PERSON}},
    )
    source = pa.schema([("n", pa.int32()), ("url", pa.string()), ("other", pa.int8())])
    schema = output_schema(config, source)
    assert schema.names == [
        "row_id", "url", "n", "caption", "person", "status", "error_code", "error", "meta",
    ]  # fmt: skip
    assert schema.field("n").type == pa.int32()
    assert pa.types.is_struct(schema.field("person").type)
    assert [f.name for f in schema.field("meta").type] == ["caption", "person"]


def test_a_missing_kept_column_is_the_users_mistake() -> None:
    config = make_config(input={"keep": ["url"]})
    with pytest.raises(UserError, match="no column 'url'; the input has id, x"):
        output_schema(config, pa.schema([("id", pa.int8()), ("x", pa.int8())]))


def two_prompts() -> tuple[pa.Schema, dict[tuple[int, str], Answer]]:
    config = make_config(prompts={"a": "1", "b": "2"})
    answers = {(i, p): answer(SHARD, i, p) for i in range(4) for p in "ab"}
    for key, code in {
        (1, "b"): "out_of_memory",
        (2, "a"): "bad_prompt",
        (2, "b"): "bad_prompt",
    }.items():
        answers[key] = Answer.failed(RequestKey(SHARD, *key), RowError(code, f"It is {code}."))
    answers[3, "a"] = Answer.failed(RequestKey(SHARD, 3, "a"), RowError("bad_row", "One."))
    answers[3, "b"] = Answer.failed(RequestKey(SHARD, 3, "b"), RowError("bad_prompt", "Two."))
    return output_schema(config, None), answers


def test_a_failed_prompt_fails_the_row_and_keeps_the_others() -> None:
    schema, answers = two_prompts()
    table = build_table(schema, [Kept(str(i)) for i in range(4)], answers, {(0, "a"): "at"})
    table.validate(full=True)
    assert count_states(table) == {"ok": 1, "failed": 3, "filtered": 0}
    rows = table.to_pylist()
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "failed"]
    assert rows[1]["a"] == f"{SHARD} 1 a"
    assert rows[1]["b"] is None
    assert [row["error_code"] for row in rows] == [None, "out_of_memory", "bad_prompt", "bad_row"]
    assert [row["error"] for row in rows] == [
        None, "b: It is out_of_memory.", "It is bad_prompt.", "a: One. b: Two.",
    ]  # fmt: skip
    assert rows[0]["meta"]["a"] == {
        "finish_reason": "stop", "num_prompt_tokens": 10, "num_cached_tokens": 4,
        "num_output_tokens": 3, "attempt": "at", "error_code": None, "error": None, "raw": None,
    }  # fmt: skip
    assert rows[1]["meta"]["b"]["error_code"] == "out_of_memory"


def test_every_row_needs_its_answers() -> None:
    schema, answers = two_prompts()
    del answers[2, "b"]
    with pytest.raises(KeyError):
        build_table(schema, [Kept(str(i)) for i in range(4)], answers, {})


def test_answers_come_back_from_a_table() -> None:
    schema, answers = two_prompts()
    made_by = dict.fromkeys(answers, "at")
    table = build_table(schema, [Kept(str(i)) for i in range(4)], answers, made_by)
    found, attempts = answers_of(table, SHARD, frozenset())
    assert found == answers
    assert attempts == made_by
    found, _ = answers_of(table, SHARD, frozenset({"bad_prompt"}))
    assert found.keys() == answers.keys() - {(2, "a"), (2, "b"), (3, "b")}
    found, _ = answers_of(table, SHARD, None)
    assert all(one.error_code is None for one in found.values())


def test_schema_answers_become_structs_or_failures() -> None:
    config = make_config(prompts={"p": {"text": "x", "schema": PERSON}})
    texts = [
        '{"name": "é", "age": 3, "tags": ["a"]}',
        '{"name": "x"',
        '{"name": 3, "age": "x"}',
        "{}",
    ]
    answers = {(i, "p"): answer(SHARD, i, "p", text) for i, text in enumerate(texts)}
    table = build_table(output_schema(config, None), [Kept(str(i)) for i in range(4)], answers, {})
    rows = table.to_pylist()
    assert rows[0]["p"] == {"name": "é", "age": 3, "tags": ["a"]}
    assert [row["error_code"] for row in rows] == [None, "schema_invalid", "schema_invalid", None]
    assert rows[1]["p"] is None
    assert rows[1]["meta"]["p"]["raw"] == '{"name": "x"'
    assert "age is no int64" in rows[2]["error"]
    found, _ = answers_of(table, SHARD, frozenset())
    assert found[1, "p"].text == texts[1]
    assert json.loads(found[0, "p"].text or "") == json.loads(texts[0])


def test_text_that_utf8_cannot_hold_is_mended() -> None:
    answers = {(0, "caption"): answer(SHARD, 0, text="a\ud800b")}
    table = build_table(output_schema(make_config(), None), [Kept("i\udfff")], answers, {})
    assert table.column("caption").to_pylist() == ["a?b"]
    assert table.column("row_id").to_pylist() == ["i?"]


KEPT: list[tuple[pa.DataType, list[Any]]] = [
    (pa.int8(), [1, None, -3]),
    (pa.float32(), [0.5, float("inf"), None]),
    (pa.timestamp("us", "UTC"), [dt.datetime(2024, 2, 29, 1, tzinfo=dt.UTC), None, None]),
    (pa.decimal128(9, 2), [decimal.Decimal("1.25"), None, decimal.Decimal("-3.00")]),
    (pa.list_(pa.struct([("a", pa.int64())])), [[{"a": 1}], [], None]),
    (pa.map_(pa.string(), pa.int64()), [[("a", 1)], [], None]),
    (pa.large_binary(), [b"\0\xff", b"", None]),
    (pa.dictionary(pa.int32(), pa.string()), ["x", "x", None]),
    (pa.null(), [None, None, None]),
]


@pytest.mark.parametrize(("type_", "values"), KEPT, ids=str)
def test_kept_columns_keep_their_values(type_: pa.DataType, values: list[Any]) -> None:
    config = make_config(input={"keep": ["k"]})
    schema = output_schema(config, pa.schema([("k", type_)]))
    answers = {(i, "caption"): answer(SHARD, i) for i in range(3)}
    rows = [Kept(str(i), (value,)) for i, value in enumerate(values)]
    table = build_table(schema, rows, answers, {})
    assert table.column("k").to_pylist() == values
    assert count_states(table)["ok"] == 3


def test_a_kept_value_that_does_not_fit_fails_its_row_alone() -> None:
    config = make_config(input={"keep": ["k"]})
    schema = output_schema(config, pa.schema([("k", pa.int8())]))
    answers = {(i, "caption"): answer(SHARD, i) for i in range(3)}
    rows = [Kept("a", (1,)), Kept("b", (["x"],)), Kept("c", (300,))]
    table = build_table(schema, rows, answers, {})
    assert table.column("k").to_pylist() == [1, None, None]
    assert table.column("error_code").to_pylist() == [None, "bad_row", "bad_row"]
    assert table.column("caption").to_pylist() == [f"{SHARD} {i} caption" for i in range(3)]
    assert "kept column 'k'" in table.column("error").to_pylist()[1]


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"type": "string"}, pa.string()),
        ({"type": "array", "items": {"type": "number"}}, pa.list_(pa.float64())),
        ({"anyOf": [{"type": "boolean"}, {"type": "null"}]}, pa.bool_()),
        ({"anyOf": [{"type": "boolean"}, {"type": "string"}]}, pa.string()),
        ({"type": "object"}, pa.string()),
        ({"type": "object", "properties": {"a": {}}, "additionalProperties": True}, pa.string()),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "integer"}}}, pa.int64()),
        ({"type": ["integer", "number"]}, pa.float64()),
        ({"const": 3}, pa.string()),
        ({}, pa.string()),
    ],
)
def test_types(schema: dict[str, Any], expected: pa.DataType) -> None:
    assert arrow_type(schema) == expected


def test_recursive_schemas_end_in_text() -> None:
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {"left": {"$ref": "#/$defs/node"}, "v": {"type": "integer"}},
            },
            "loop": {"$ref": "#/$defs/loop"},
        },
    }
    type_ = arrow_type(tree)
    value = parse_answer('{"left": {"v": 2}, "v": 1}', type_)
    assert pa.array([value], type_).to_pylist()[0]["left"]["v"] == 2
    assert arrow_type({**tree, "$ref": "#/$defs/loop"}) == pa.string()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(value=JSON)
def test_any_json_is_stored_or_refused(value: Any) -> None:
    type_ = arrow_type(PERSON)
    try:
        parsed = parse_answer(json.dumps(value), type_)
    except Unreadable:
        return
    pa.array([parsed], type_).validate(full=True)


def test_the_schema_is_the_one_that_a_part_is_read_with() -> None:
    """`verify` compares the two; a list's items change their name in Parquet."""
    person = {"text": "Who?", "schema": PERSON}
    config = make_config(prompts={"caption": "Describe.", "who": person}, input={"keep": ["k"]})
    kept = pa.schema([pa.field("k", pa.list_(pa.field("item", pa.large_string())))])
    schema = output_schema(config, kept)
    file = io.BytesIO()
    pq.write_table(build_table(schema, [], {}, {}), file)
    assert pq.read_schema(file).remove_metadata().to_string() == schema.to_string()
