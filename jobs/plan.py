"""The plan: which shard is which rows of which input file; it grows when the input grows.

Stored as parts, each made exclusively, each line a span of consecutive shards of one file; shards
are computed from spans, so a plan costs memory by files, not by rows. Shard numbers never change
their meaning, except that a redone shard gets a higher revision. Knows nothing of file formats.
"""

from __future__ import annotations

import bisect
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from jobs.paths import RunPaths, shard_id, shard_number
from jobs.plan_parts import read_parts, write_part
from jobs.storage import StorageError
from pipeline.errors import UserError

log = logging.getLogger(__name__)
StillHolds = Callable[[str, str], bool]  # a path; a fingerprint that it had when it was planned
MAX_RACES = 100  # other processes that planned between our reading and our writing


class InputFile(Protocol):
    """What the plan needs of `pipeline.sources.InputFile`."""

    @property
    def path(self) -> str: ...
    @property
    def num_rows(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """Rows `[start, stop)` of one input file: the unit of work, retry and commit."""

    id: str
    path: str
    start: int
    stop: int
    fingerprint: str  # of the input file
    revision: int = 0  # higher where the shard was planned anew

    @property
    def num_rows(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive shards of one file: `[start, stop)` in portions of `rows_per_shard`.

    `num_shards` may be more than the rows fill: the rest are empty (a redone file has shrunk).
    """

    path: str
    fingerprint: str
    start: int
    stop: int
    first_shard: int
    num_shards: int
    rows_per_shard: int
    revision: int = 0
    num_bytes: int = 0  # of the file, for people

    def shard(self, number: int) -> Shard:
        offset = (number - self.first_shard) * self.rows_per_shard
        start = min(self.start + offset, self.stop)
        stop = min(start + self.rows_per_shard, self.stop)
        return Shard(shard_id(number), self.path, start, stop, self.fingerprint, self.revision)


@dataclass(frozen=True, slots=True)
class Redo:
    """One committed shard planned once more."""

    shard: int
    revision: int
    codes: tuple[str, ...] | None = None  # only failed answers with these codes; None: all


class Plan:
    """All spans, the newest revision of each."""

    def __init__(
        self,
        spans: Iterable[Span],
        num_parts: int,
        redos: Iterable[Redo] = (),
        moves: Sequence[tuple[str, str]] = (),
    ) -> None:
        newest: dict[tuple[int, str, bool], Span] = {}
        for span in spans:
            key = (span.first_shard, span.path, span.num_shards > 0)
            if key not in newest or span.revision > newest[key].revision:
                newest[key] = span
        self.spans = sorted(newest.values(), key=lambda span: span.first_shard)
        self.num_parts = num_parts
        self._moves = moves
        self._redos: dict[int, list[Redo]] = {}
        for redo in redos:
            self._redos.setdefault(redo.shard, []).append(redo)
        self._numbered = [span for span in self.spans if span.num_shards]
        self._firsts = [span.first_shard for span in self._numbered]

    @property
    def num_shards(self) -> int:
        return sum(span.num_shards for span in self.spans)

    @property
    def has_revisions(self) -> bool:
        """Whether any shard was planned anew."""
        return bool(self._redos) or any(span.revision for span in self.spans)

    @property
    def num_rows(self) -> int:
        return sum(span.stop - span.start for span in self.spans)

    def __iter__(self) -> Iterator[Shard]:
        for span in self.spans:
            for number in range(span.first_shard, span.first_shard + span.num_shards):
                yield self._revised(span.shard(number))

    def __len__(self) -> int:
        return self.num_shards

    def numbers(self) -> Iterator[int]:
        for span in self.spans:
            yield from range(span.first_shard, span.first_shard + span.num_shards)

    def ids(self) -> Iterator[str]:
        return map(shard_id, self.numbers())

    def shard(self, id_: str) -> Shard:
        """Raises: KeyError."""
        number = shard_number(id_)
        index = bisect.bisect_right(self._firsts, number) - 1
        span = self._numbered[index] if index >= 0 else None
        if span is None or number >= span.first_shard + span.num_shards:
            raise KeyError(id_)
        return self._revised(span.shard(number))

    def __contains__(self, id_: str) -> bool:
        try:
            self.shard(id_)
        except (KeyError, ValueError):
            return False
        return True

    def files(self) -> dict[str, list[Span]]:
        """Spans by input file, in order of their rows."""
        files: dict[str, list[Span]] = {}
        for span in self.spans:
            files.setdefault(span.path, []).append(span)
        for spans in files.values():
            spans.sort(key=lambda span: span.start)
        return files

    def is_same_file(self, old: str, path: str) -> bool:
        """Whether `path` is what the plan once knew as `old`."""
        for before, after in self._moves:
            old = after if old == before else old
        return old == path

    def missing(self, files: Iterable[InputFile]) -> list[str]:
        """Planned files that the input no longer has."""
        return sorted(self.files().keys() - {file.path for file in files})

    def changed(
        self, files: Iterable[InputFile], still_holds: StillHolds | None = None
    ) -> list[str]:
        """Planned files that are no longer what they were, with or without rows behind them."""
        known = self.files()
        differ = [f for f in files if f.path in known and not _same(known[f.path], f)]
        if still_holds is None:
            return [file.path for file in differ]
        return [f.path for f in differ if not still_holds(f.path, _newest(known[f.path]) or "")]

    def redo_revision(self, number: int) -> int:
        """The highest revision that a shard was given by itself; 0 when none."""
        return max((redo.revision for redo in self._redos.get(number, ())), default=0)

    def redo_codes(self, shard: Shard, above: int) -> frozenset[str] | None:
        """Codes of failed answers to do again on top of revision `above`; None: do all again."""
        redos = [r for r in self._redos.get(shard_number(shard.id), ()) if r.revision > above]
        if not redos or any(redo.codes is None for redo in redos):
            return None
        return frozenset(code for redo in redos for code in redo.codes or ())

    def _revised(self, shard: Shard) -> Shard:
        revision = self.redo_revision(shard_number(shard.id)) if self._redos else 0
        return replace(shard, revision=revision) if revision > shard.revision else shard


def load_plan(paths: RunPaths) -> Plan:
    """Read all parts. Raises: UserError when one is damaged."""
    spans: list[Span] = []
    redos: list[Redo] = []
    moves: list[tuple[str, str]] = []
    num_parts = 0
    for records in read_parts(paths):
        num_parts += 1
        for record in records:
            kind = record.pop("kind")
            if kind == "span":
                spans.append(Span(**record))
            elif kind == "redo":
                codes = record.pop("codes")
                redos.append(Redo(**record, codes=None if codes is None else tuple(codes)))
            else:
                old, new = record["old"], record["new"]
                moves.append((old, new))
                spans = [replace(s, path=new) if s.path == old else s for s in spans]
    return Plan(spans, num_parts, redos, moves)


def grow_plan(
    paths: RunPaths,
    files: Sequence[InputFile],
    rows_per_shard: int,
    *,
    limit: int | None = None,
    changed: str = "refuse",
    still_holds: StillHolds | None = None,
) -> Plan:
    """Plan the rows that no shard holds yet; safe while others do the same.

    `changed`: `refuse`, or `redo` to plan the shards of changed files anew. A file that has only
    grown is not changed. Raises: UserError for changed files.
    """
    for _ in range(MAX_RACES):
        plan = load_plan(paths)
        moves = _moves(plan, files)
        if moves:
            write_part(paths, plan.num_parts, moves)
            continue
        bad = plan.changed(files, still_holds)
        if bad and changed != "redo":
            raise _changed(bad)
        news = _new_spans(plan, files, rows_per_shard, limit, bad)
        if not news:
            return plan
        records = [{"kind": "span", **asdict(span)} for span in news]
        if write_part(paths, plan.num_parts, records):
            log.info("planned %d shards", sum(span.num_shards for span in news))
    raise StorageError(f"{paths.plan_folder} grew {MAX_RACES} times while it was read")


def redo_shards(
    paths: RunPaths, shards: Sequence[str], codes: Collection[str] | None = None
) -> Plan:
    """Plan committed shards once more, each with the next revision; safe while others do it.

    `codes`: do only failed answers with these codes again; None does all rows again.
    """
    named = None if codes is None else tuple(sorted(codes))
    for _ in range(MAX_RACES):
        plan = load_plan(paths)
        todo = [plan.shard(id_) for id_ in shards]
        redos = [Redo(shard_number(s.id), s.revision + 1, named) for s in todo]
        records = [{"kind": "redo", **asdict(redo)} for redo in redos]
        if not records:
            return plan
        if write_part(paths, plan.num_parts, records):
            return load_plan(paths)
    raise StorageError(f"{paths.plan_folder} grew {MAX_RACES} times while it was read")


def _changed(paths: Sequence[str]) -> UserError:
    more = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
    return UserError(
        f"The input file {paths[0]}{more} has changed since its rows were planned: put it back, "
        "or run with --changed redo to do its rows again."
    )


def _new_spans(
    plan: Plan,
    files: Sequence[InputFile],
    rows_per_shard: int,
    limit: int | None,
    bad: Collection[str],
) -> list[Span]:
    known = plan.files()
    next_shard = plan.num_shards
    left = limit
    news: list[Span] = []
    for file in files:
        num_rows = file.num_rows if left is None else min(file.num_rows, left)
        left = None if left is None else left - num_rows
        spans = known.get(file.path, [])
        if file.path in bad:
            news += [_redone(span, plan, file, num_rows) for span in spans if span.num_shards]
        start = max((span.stop for span in spans), default=0)
        if file.path in bad:
            start = min(start, num_rows)
        if num_rows > start or (not spans and not file.num_rows):
            span = _span(file, start, num_rows, next_shard, rows_per_shard)
            next_shard += span.num_shards
            news.append(span)
    return news


def _moves(plan: Plan, files: Sequence[InputFile]) -> list[dict[str, Any]]:
    """Planned files that are gone, and stand under a new name with the same content."""
    known = plan.files()
    gone: dict[str, list[str]] = {}
    for path in reversed(plan.missing(files)):
        spans = [span for span in known[path] if span.num_shards]
        if spans:
            gone.setdefault(spans[-1].fingerprint, []).append(path)
    moves = []
    for file in files:
        if file.path not in known and gone.get(file.fingerprint):
            old = gone[file.fingerprint].pop()
            moves.append({"kind": "move", "old": old, "new": file.path})
    return moves


def _span(file: InputFile, start: int, stop: int, first_shard: int, rows_per_shard: int) -> Span:
    return Span(
        path=file.path,
        fingerprint=file.fingerprint,
        start=start,
        stop=stop,
        first_shard=first_shard,
        num_shards=-(-(stop - start) // rows_per_shard),
        rows_per_shard=rows_per_shard,
        num_bytes=getattr(file, "num_bytes", 0),
    )


def _redone(span: Span, plan: Plan, file: InputFile, num_rows: int) -> Span:
    """The same shards over the file's new content."""
    numbers = range(span.first_shard, span.first_shard + span.num_shards)
    single = max(map(plan.redo_revision, numbers), default=0)
    return replace(
        span,
        fingerprint=file.fingerprint,
        start=min(span.start, num_rows),
        stop=min(span.stop, num_rows),
        revision=max(span.revision, single) + 1,
        num_bytes=getattr(file, "num_bytes", 0),
    )


def _same(spans: Sequence[Span], file: InputFile) -> bool:
    """Whether a file is still what its rows were planned from; one without shards always is."""
    return _newest(spans) in (file.fingerprint, None)


def _newest(spans: Sequence[Span]) -> str | None:
    """The fingerprint of a file when its last rows were planned; None where it had none."""
    return next((span.fingerprint for span in reversed(spans) if span.num_shards), None)
