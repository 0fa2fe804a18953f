"""Prompt patterns and OpenAI-style messages: what they become and what they refuse."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest

from pipeline.errors import RowError, UserError
from pipeline.prompts import PromptText, message_turns, prompt_turns
from pipeline.rows import ImageRef, Row, Turn

PIXEL = base64.b64encode(b"GIF89a").decode()


def messages_row(messages: Any, images: int = 2) -> Row:
    refs = tuple(ImageRef(data=bytes([n])) for n in range(images))
    return Row("r", 0, {}, refs, messages)


@pytest.mark.parametrize(
    ("text", "columns", "filled"),
    [
        ("Describe.", {}, "Describe."),
        ("{a}", {"a": "x"}, "x"),
        ("{a} and {b}", {"a": 1, "b": 2.5}, "1 and 2.5"),
        ("{{a}} {a}", {"a": "{b}"}, "{a} {b}"),
        ("{two words}", {"two words": True}, "True"),
        ("{a}", {"a": ["é", 1]}, '["é", 1]'),
        ("}}{{", {}, "}{"),
    ],
)
def test_fill(text: str, columns: dict[str, Any], filled: str) -> None:
    assert PromptText("p", text).fill(columns) == filled


@pytest.mark.parametrize(
    "text", ["{", "}", "{}", "{a.b}", "{a!r}", "{a:>5}", "{a[0]}", '{"a": 1}', "{ }", "{a{b}}"]
)
def test_a_pattern_that_is_none(text: str) -> None:
    with pytest.raises(UserError, match="braces"):
        PromptText("p", text)


@pytest.mark.parametrize("columns", [{}, {"a": None}, {"a": b"x"}])
def test_a_value_that_is_none(columns: dict[str, Any]) -> None:
    with pytest.raises(RowError) as caught:
        PromptText("p", "{a}").fill(columns)
    assert caught.value.code == "bad_prompt"


def test_columns_of_a_text() -> None:
    assert PromptText("p", "{b} {a} {b} {{c}}").columns == ("b", "a")


def test_prompt_turns() -> None:
    assert prompt_turns("q", 2, None) == (Turn("user", (0, 1, "q")),)
    assert prompt_turns("q", 0, "s") == (Turn("system", ("s",)), Turn("user", ("q",)))


def test_messages_with_images_anywhere() -> None:
    turns, images = message_turns(
        messages_row(
            [
                {"role": "developer", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "First", "image_url": None},
                        {"type": "image_url", "image_url": {"url": "image:1"}},
                        {"type": "text", "text": "then"},
                        {"type": "image_url", "image_url": f"data:image/gif;base64,{PIXEL}"},
                    ],
                },
                {"role": "assistant", "content": "Yes."},
                {"role": "user", "content": [{"type": "image", "image": "a/b.png"}, "why?"]},
            ]
        ),
        system="ignored",
    )
    assert turns == (
        Turn("system", ("Be brief.",)),
        Turn("user", ("First", 0, "then", 1)),
        Turn("assistant", ("Yes.",)),
        Turn("user", (2, "why?")),
    )
    assert images == (
        ImageRef(data=b"\1"),
        ImageRef(path=f"data:image/gif;base64,{PIXEL}"),
        ImageRef(path="a/b.png"),
    )


def test_images_without_a_name_come_in_order() -> None:
    content = [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]
    row = messages_row([{"role": "user", "content": content}])
    assert message_turns(row, None) == ((Turn("user", (0, "and", 1)),), row.images)


def test_an_image_twice_is_two_blocks() -> None:
    part = {"type": "image_url", "image_url": {"url": "image:0"}}
    turns, images = message_turns(messages_row([{"role": "user", "content": [part, part]}]), None)
    assert turns == (Turn("user", (0, 1)),)
    assert images == (ImageRef(data=b"\0"),) * 2


def test_the_jobs_system_text_stands_in() -> None:
    text = json.dumps([{"role": "user", "content": "q"}])
    turns, _ = message_turns(messages_row(text), "s")
    assert turns == (Turn("system", ("s",)), Turn("user", ("q",)))


@pytest.mark.parametrize(
    ("messages", "code"),
    [
        (None, "bad_messages"),
        ([], "bad_messages"),
        ("{", "bad_messages"),
        (["q"], "bad_messages"),
        ([{"role": "tool", "content": "q"}], "bad_messages"),
        ([{"role": ["user"], "content": "q"}], "bad_messages"),
        ([{"role": "user"}], "bad_messages"),
        ([{"role": "user", "content": [3]}], "bad_messages"),
        ([{"role": "user", "content": [{"type": "text"}]}], "bad_messages"),
        ([{"role": "user", "content": [{"type": "thing"}]}], "bad_messages"),
        ([{"role": "assistant", "content": "q"}], "bad_messages"),
        ([{"role": "user", "content": "q"}, {"role": "system", "content": "s"}], "bad_messages"),
        ([{"role": "system", "content": [{"type": "image"}]}], "bad_messages"),
        ([{"role": "user", "content": [{"type": "image", "image": 3}]}], "bad_messages"),
        ([{"role": "user", "content": [{"type": "image", "image": "image:2"}]}], "missing_image"),
        ([{"role": "user", "content": [{"type": "video", "video": "video:2"}]}], "missing_video"),
        ([{"role": "user", "content": [{"type": "input_audio"}]}], "missing_audio"),
    ],
)
def test_messages_that_are_none(messages: Any, code: str) -> None:
    with pytest.raises(RowError) as caught:
        message_turns(messages_row(messages), None)
    assert caught.value.code == code
