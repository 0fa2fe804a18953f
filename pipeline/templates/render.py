"""Chat templates as tables, and the rendering of turns into pieces.

A piece is text, a control token, or an image's number. Only `Control` pieces are read as special
tokens later, so text of a row can never forge one. Knows no tokenizer and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from pipeline.errors import RowError
from pipeline.rows import Turn


class Control(str):
    """A control token of the template, spelled as in the tokenizer."""

    __slots__ = ()


Piece = Control | str | int
CONTENT = "{content}"
IMAGE = "{image}"


@dataclass(frozen=True)
class Template:
    """One chat template under its public name.

    `system`, `user` and `assistant` hold `{content}` once; `image` holds `{image}` once, where the
    expanded image tokens go. `control` lists the strings that are control tokens.
    """

    name: str
    control: tuple[str, ...]
    user: str
    assistant: str
    answer: str  # opens the answer
    system: str | None = None  # None: the system text opens a user turn
    system_opens: Literal["first", "last"] = "first"  # which user turn, where `system` is None
    default_system: str | None = None
    start: str = ""
    image: str = IMAGE
    text_opens: str = ""  # before a content that begins with text
    before_image: str = ""  # between text and an image that follows it
    after_image: str = ""  # between an image and text that follows it
    between_images: str = ""
    between_texts: str = ""
    system_start: str = ""  # before and after the system text, where `system` is None
    system_separator: str = "\n\n"
    blank_system: bool = True  # an empty system text has its frame all the same
    strip: bool = False  # contents lose outer blanks
    strip_each: bool = False  # each text of a turn loses outer blanks, the system text none
    stop: tuple[str, ...] = ()  # tokens that end an answer
    spoken: tuple[str, ...] = ()  # tokens that are part of texts: rows and answers may hold them
    alternate: bool = False  # user and assistant turns must alternate
    system_with_images: bool = True

    @cached_property
    def _control(self) -> re.Pattern[str]:
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def split(self, text: str) -> Iterator[Piece]:
        """The template's own text, cut at its control tokens."""
        parts = self._control.split(text) if self.control else [text]
        for number, part in enumerate(parts):
            if part:
                yield Control(part) if number % 2 else part


def render(template: Template, turns: Sequence[Turn]) -> tuple[Piece, ...]:
    """Pieces of the whole prompt, from the template's start to the opening of the answer."""
    system, dialogue = _take_system(template, turns)
    _check(template, system, dialogue)
    if template.strip_each:
        dialogue = [replace(turn, parts=_each_stripped(turn.parts)) for turn in dialogue]
    pieces: list[Piece] = list(template.split(template.start))
    if system is not None and template.system is not None:
        pieces += _turn(template, template.system, system)
    elif system is not None:
        dialogue = _with_system(template, system, dialogue)
    for turn in dialogue:
        pieces += _turn(template, _frame(template, turn.role), turn.parts)
    pieces += template.split(template.answer)
    return _merged(pieces)


def _take_system(
    template: Template, turns: Sequence[Turn]
) -> tuple[tuple[str | int, ...] | None, Sequence[Turn]]:
    if turns and turns[0].role == "system":
        system = turns[0].parts
        said = _stripped(system) if template.strip else "".join(map(str, system))
        return (system if said or template.blank_system else None), turns[1:]
    default = template.default_system
    return (None if default is None else (default,)), turns


def _check(template: Template, system: tuple[str | int, ...] | None, turns: Sequence[Turn]) -> None:
    if template.alternate:
        for number, turn in enumerate(turns):
            if turn.role != ("user", "assistant")[number % 2]:
                raise RowError("bad_messages", "The model needs user and assistant turns in turn.")
    with_images = any(isinstance(part, int) for turn in turns for part in turn.parts)
    if system is not None and with_images and not template.system_with_images:
        raise RowError("bad_messages", "The model takes no system text beside images.")


def _with_system(
    template: Template, system: tuple[str | int, ...], turns: Sequence[Turn]
) -> list[Turn]:
    """`turns` with the system text at the head of a user turn."""
    users = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if not users:
        return list(turns)
    chosen = users[0 if template.system_opens == "first" else -1]
    start = (template.system_start,) if template.system_start else ()
    opened = (*start, *system, template.system_separator, *turns[chosen].parts)
    return [
        replace(turn, parts=opened) if number == chosen else turn
        for number, turn in enumerate(turns)
    ]


def _frame(template: Template, role: str) -> str:
    if role == "user":
        return template.user
    if role == "assistant":
        return template.assistant
    if role == "system" and template.system is not None:
        return template.system
    raise RowError("bad_messages", f"The model's template has no place for this {role} turn.")


def _turn(template: Template, frame: str, parts: Sequence[str | int]) -> Iterator[Piece]:
    before, after = frame.split(CONTENT)
    yield from template.split(before)
    yield from _content(template, _stripped(parts) if template.strip else parts)
    yield from template.split(after)


def _stripped(parts: Sequence[str | int]) -> Sequence[str | int]:
    """`parts` as their whole text would be: blanks alone at an end bring no joint."""
    cut = list(parts)
    while cut and isinstance(cut[0], str):
        cut[0] = cut[0].lstrip()
        if cut[0]:
            break
        del cut[0]
    while cut and isinstance(cut[-1], str):
        cut[-1] = cut[-1].rstrip()
        if cut[-1]:
            break
        del cut[-1]
    return cut


def _each_stripped(parts: Sequence[str | int]) -> tuple[str | int, ...]:
    return tuple(part.strip() if isinstance(part, str) else part for part in parts)


def _content(template: Template, parts: Sequence[str | int]) -> Iterator[Piece]:
    if parts and isinstance(parts[0], str):
        yield from template.split(template.text_opens)
    for number, part in enumerate(parts):
        if number:
            yield from template.split(_joint(template, parts[number - 1], part))
        if isinstance(part, str):
            yield str(part)
            continue
        before, after = template.image.split(IMAGE)
        yield from template.split(before)
        yield part
        yield from template.split(after)


def _joint(template: Template, one: str | int, other: str | int) -> str:
    """What the template writes between two parts."""
    if isinstance(one, int):
        return template.between_images if isinstance(other, int) else template.after_image
    return template.before_image if isinstance(other, int) else template.between_texts


def _merged(pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """Adjacent plain texts as one: a tokenizer must see them together."""
    merged: list[Piece] = []
    for piece in pieces:
        if piece == "" and not isinstance(piece, int):
            continue
        if _plain(piece) and merged and _plain(merged[-1]):
            merged[-1] = f"{merged[-1]}{piece}"
        else:
            merged.append(piece)
    return tuple(merged)


def _plain(piece: Piece) -> bool:
    return isinstance(piece, str) and not isinstance(piece, Control)
