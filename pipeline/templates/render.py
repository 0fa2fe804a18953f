"""Chat templates as tables, and the rendering of turns into pieces.

A piece is text, a control token, or an image's number. Only `Control` pieces are read as special
tokens later, so text of a row can never forge one. Knows no tokenizer and no model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

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
    system: str | None = None  # None: the system text opens the first user turn
    default_system: str | None = None
    start: str = ""
    image: str = IMAGE
    after_image: str = ""  # between an image and text that follows it
    between_images: str = ""
    system_separator: str = "\n\n"  # where `system` is None
    strip: bool = False  # contents lose outer blanks
    stop: tuple[str, ...] = ()  # tokens that end an answer
    alternate: bool = False  # user and assistant turns must alternate
    system_with_images: bool = True
    aliases: tuple[str, ...] = field(default=())

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
    if template.alternate:
        _check_alternation(dialogue)
    pieces: list[Piece] = list(template.split(template.start))
    if template.system is not None and system is not None:
        pieces += _turn(template, template.system, system)
        system = None
    for turn in dialogue:
        parts = turn.parts
        if turn.role == "user" and system is not None:
            parts, system = (*system, template.system_separator, *parts), None
        pieces += _turn(template, _frame(template, turn.role), parts)
    pieces += template.split(template.answer)
    return _merged(pieces)


def _take_system(
    template: Template, turns: Sequence[Turn]
) -> tuple[tuple[str | int, ...] | None, Sequence[Turn]]:
    if turns and turns[0].role == "system":
        return turns[0].parts, turns[1:]
    default = template.default_system
    return (None if default is None else (default,)), turns


def _check_alternation(turns: Sequence[Turn]) -> None:
    for number, turn in enumerate(turns):
        if turn.role != ("user", "assistant")[number % 2]:
            raise RowError("bad_messages", "The model needs user and assistant turns in turn.")


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
    cut = list(parts)
    if cut and isinstance(cut[0], str):
        cut[0] = cut[0].lstrip()
    if cut and isinstance(cut[-1], str):
        cut[-1] = cut[-1].rstrip()
    return cut


def _content(template: Template, parts: Sequence[str | int]) -> Iterator[Piece]:
    for number, part in enumerate(parts):
        if isinstance(part, str):
            yield str(part)
            continue
        before, after = template.image.split(IMAGE)
        yield from template.split(before)
        yield part
        yield from template.split(after)
        following = parts[number + 1] if number + 1 < len(parts) else None
        if following is not None:
            joint = template.after_image if isinstance(following, str) else template.between_images
            yield from template.split(joint)


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
