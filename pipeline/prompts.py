"""Prompt texts with `{column}` fields, and OpenAI-style messages, as turns.

Knows no tokenizer and no template: a turn's parts are texts and numbers of images. Imports no
torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.errors import RowError, UserError
from pipeline.rows import ImageRef, Row, Turn
from pipeline.settings import LabelSettings

_FIELD = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
_NAME = re.compile(r"[^{}!:.\[\]\s\"',][^{}!:.\[\]\"',]*")
_ROW_IMAGE = re.compile(r"image(?::(\d+))?")
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class PromptText:
    """A prompt's text: literal pieces and the columns between them.

    Raises UserError where the text is no valid pattern: only plain `{column}` names are read, and
    `{{` and `}}` stand for braces.
    """

    def __init__(self, name: str, text: str) -> None:
        self.name = name
        self._pieces: list[tuple[str, str | None]] = []  # literal, then the column after it
        literal, end = "", 0
        for match in _FIELD.finditer(text):
            literal += text[end : match.start()]
            end = match.end()
            column = match.group(1)
            if match.group() in ("{{", "}}"):
                literal += match.group()[0]
            elif column is None or not _NAME.fullmatch(column):
                raise UserError(
                    f"prompt {name!r}: {match.group()!r} is no column name;"
                    " write {column} for a column's value, {{ and }} for braces"
                )
            else:
                self._pieces.append((literal, column))
                literal = ""
        self._pieces.append((literal + text[end:], None))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that the text reads, in order of first use."""
        return tuple(dict.fromkeys(column for _, column in self._pieces if column is not None))

    def fill(self, columns: Mapping[str, Any]) -> str:
        """The text for one row. Raises RowError bad_prompt for an absent or null value."""
        filled = []
        for literal, column in self._pieces:
            filled.append(literal)
            if column is not None:
                filled.append(self._value(columns, column))
        return "".join(filled)

    def _value(self, columns: Mapping[str, Any], column: str) -> str:
        value = columns.get(column)
        if value is None:
            what = "is empty in this row" if column in columns else "does not exist"
            raise RowError("bad_prompt", f"Prompt {self.name!r}: column {column!r} {what}.")
        if isinstance(value, str):
            return value
        if isinstance(value, bytes):
            raise RowError("bad_prompt", f"Prompt {self.name!r}: column {column!r} holds bytes.")
        if isinstance(value, Mapping | list | tuple):
            return json.dumps(value, ensure_ascii=False, default=str)
        return str(value)


def prompt_columns(settings: LabelSettings) -> tuple[str, ...]:
    """Columns that the job's prompts and messages read, for `open_source`."""
    texts = (PromptText(name, prompt.text) for name, prompt in settings.prompts.items())
    columns = [column for text in texts for column in text.columns]
    if settings.input.messages is not None:
        columns = [settings.input.messages]
    return tuple(dict.fromkeys(columns))


def prompt_turns(text: str, num_images: int, system: str | None) -> tuple[Turn, ...]:
    """System text, then one user turn: the images in order, then the text."""
    user = Turn("user", (*range(num_images), text))
    return (user,) if system is None else (Turn("system", (system,)), user)


def message_turns(row: Row, system: str | None) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
    """Turns of the row's messages, and the images that they use in order of appearance.

    Raises RowError bad_messages, and missing_image for a name that the row lacks.
    """
    reader = _Messages(row)
    turns = [reader.turn(message) for message in _message_list(row.messages)]
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowError("bad_messages", "A system turn may only stand first.")
    if not turns or turns[-1].role != "user":
        raise RowError("bad_messages", "The last turn must be the user's.")
    if turns[0].role != "system" and system is not None:
        turns.insert(0, Turn("system", (system,)))
    return tuple(turns), tuple(reader.images)


def _message_list(messages: Any) -> Sequence[Any]:
    if isinstance(messages, str):
        try:
            messages = json.loads(messages)
        except (ValueError, RecursionError) as error:
            raise RowError("bad_messages", f"The messages are no JSON: {error}.") from error
    if isinstance(messages, Mapping):
        messages = messages.get("messages", messages)
    if not isinstance(messages, list | tuple) or not messages:
        raise RowError("bad_messages", "The messages are no list of turns.")
    return messages


class _Messages:
    """Reads turns and collects their images, each once."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._next = 0  # the next of the row's images for a part without a name
        self._numbers: dict[tuple[str, Any], int] = {}
        self.images: list[ImageRef] = []

    def turn(self, message: Any) -> Turn:
        if not isinstance(message, Mapping):
            raise RowError("bad_messages", "A turn is no mapping with role and content.")
        role = _ROLES.get(str(message.get("role")))
        if role is None:
            raise RowError("bad_messages", f"Role {message.get('role')!r} is not supported.")
        content = message.get("content")
        if isinstance(content, str):
            return Turn(role, (content,))
        if not isinstance(content, list | tuple):
            raise RowError("bad_messages", f"The {role} turn's content is no text and no list.")
        parts = tuple(self._part(part) for part in content)
        if role != "user" and any(isinstance(part, int) for part in parts):
            raise RowError("bad_messages", f"Images stand in user turns, not in the {role} turn.")
        return Turn(role, parts)

    def _part(self, part: Any) -> str | int:
        if isinstance(part, str):
            return part
        if not isinstance(part, Mapping):
            raise RowError("bad_messages", "A content part is no mapping.")
        kind = part.get("type")
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            return str(part["text"])
        if kind in ("image_url", "input_image", "image"):
            return self._image(part.get("image_url") or part.get("image") or part.get("url"))
        if kind in ("video", "video_url", "input_audio", "audio"):
            raise RowError("unsupported_input", f"Parts of type {kind!r} are not supported here.")
        raise RowError("bad_messages", f"A content part of type {kind!r} is not understood.")

    def _image(self, address: Any) -> int:
        if isinstance(address, Mapping):
            address = address.get("url")
        if address is None or address == "":
            address = f"image:{self._next}"
        if not isinstance(address, str):
            raise RowError("bad_messages", "An image part has no address.")
        if match := _ROW_IMAGE.fullmatch(address):
            index = int(match.group(1)) if match.group(1) else self._next
            self._next = index + 1
            return self._number(("row", index), lambda: self._row_image(index))
        return self._number(("path", address), lambda: ImageRef(path=address))

    def _row_image(self, index: int) -> ImageRef:
        if index >= len(self._row.images):
            raise RowError(
                "missing_image",
                f"The messages name image {index}; the row has {len(self._row.images)}.",
            )
        return self._row.images[index]

    def _number(self, key: tuple[str, Any], make: Any) -> int:
        """A number for each appearance: the same image twice is two blocks of tokens."""
        if key not in self._numbers:
            self._numbers[key] = len(self.images)
            self.images.append(make())
            return self._numbers[key]
        self.images.append(self.images[self._numbers[key]])
        return len(self.images) - 1
