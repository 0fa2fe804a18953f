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
_ROW_MEDIA = re.compile(r"(image|video|audio)(?::(\d+))?")
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


def prompt_turns(text: str, num_media: int, system: str | None) -> tuple[Turn, ...]:
    """System text, then one user turn: images, videos and recordings, then the text."""
    user = Turn("user", (*range(num_media), text))
    return (user,) if system is None else (Turn("system", (system,)), user)


def message_turns(row: Row, system: str | None) -> tuple[tuple[Turn, ...], tuple[ImageRef, ...]]:
    """Turns of the row's messages, and the images and the like that they use, in their order.

    Raises RowError bad_messages, and missing_image, _video or _audio for what the row lacks.
    """
    reader = _Messages(row)
    turns = [reader.turn(message) for message in _message_list(row.messages)]
    if any(turn.role == "system" for turn in turns[1:]):
        raise RowError("bad_messages", "A system turn may only stand first.")
    if not turns or turns[-1].role != "user":
        raise RowError("bad_messages", "The last turn must be the user's.")
    if turns[0].role != "system" and system is not None:
        turns.insert(0, Turn("system", (system,)))
    return tuple(turns), tuple(reader.media)


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
    """Reads turns and collects their images, videos and recordings, each once."""

    def __init__(self, row: Row) -> None:
        self._row = row
        self._own = {"image": row.images, "video": row.videos, "audio": row.audios}
        self._next = dict.fromkeys(self._own, 0)  # of the row's own, for a part without a name
        self._numbers: dict[tuple[str, str, Any], int] = {}
        self.media: list[ImageRef] = []

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
            message = f"Images and the like stand in user turns, not in the {role} turn."
            raise RowError("bad_messages", message)
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
            address = part.get("image_url") or part.get("image") or part.get("url")
            return self._medium("image", address)
        if kind in ("video_url", "input_video", "video"):
            address = part.get("video_url") or part.get("video") or part.get("url")
            return self._medium("video", address)
        if kind in ("input_audio", "audio_url", "audio"):
            return self._medium("audio", _recording(part))
        raise RowError("bad_messages", f"A content part of type {kind!r} is not understood.")

    def _medium(self, kind: str, address: Any) -> int:
        if isinstance(address, Mapping):
            address = address.get("url")
        if address is None or address == "":
            address = f"{kind}:{self._next[kind]}"
        if not isinstance(address, str):
            raise RowError("bad_messages", f"A part of type {kind} has no address.")
        match = _ROW_MEDIA.fullmatch(address)
        if match and match.group(1) == kind:
            index = int(match.group(2)) if match.group(2) else self._next[kind]
            self._next[kind] = index + 1
            return self._number((kind, "row", index), lambda: self._row_medium(kind, index))
        return self._number((kind, "path", address), lambda: ImageRef(path=address, kind=kind))

    def _row_medium(self, kind: str, index: int) -> ImageRef:
        if index >= len(self._own[kind]):
            raise RowError(
                f"missing_{kind}",
                f"The messages name {kind} {index}; the row has {len(self._own[kind])}.",
            )
        return self._own[kind][index]

    def _number(self, key: tuple[str, str, Any], make: Any) -> int:
        """A number for each appearance: the same image twice is two blocks of tokens."""
        if key not in self._numbers:
            self._numbers[key] = len(self.media)
            self.media.append(make())
            return self._numbers[key]
        self.media.append(self.media[self._numbers[key]])
        return len(self.media) - 1


def _recording(part: Mapping[str, Any]) -> Any:
    """The address of a part's recording; OpenAI's `input_audio` brings the bytes in base64."""
    inner = part.get("input_audio")
    if isinstance(inner, Mapping) and isinstance(inner.get("data"), str):
        return f"data:audio/{inner.get('format', 'wav')};base64,{inner['data']}"
    return inner or part.get("audio_url") or part.get("audio") or part.get("url")
