"""Another run folder's answers beside a first one's, row by row of their common input.

Rows meet by input file and row number, and their ids must agree; shards may be cut differently.
Memory is that of two parts. Knows no output format.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import pyarrow as pa

from jobs.commit import pending_shards
from jobs.manifest import require_manifest
from jobs.part import read_part
from jobs.paths import RunPaths
from jobs.plan import Shard, load_plan
from pipeline.errors import UserError

STATE_COLUMNS = ("status", "error_code", "error")
_LABEL = re.compile(r"(\w+)=(.+)")


class Joined:
    """One run folder to take answers from."""

    def __init__(self, address: str, *, meta: bool, partial: bool) -> None:
        match = _LABEL.fullmatch(address)
        self.path = match[2] if match else address
        self.label = match[1] if match else _label(address)
        self._paths = RunPaths(self.path)
        self.manifest = require_manifest(self._paths)
        config = self.manifest.job_config()
        self._prompts = tuple(config.prompt_names())
        self._states = (*STATE_COLUMNS, *(("meta",) if meta else ()))
        self._has_ids = config.input.id is not None
        self._partial = partial
        self._shards = self._committed()
        self._last: tuple[str, pa.Table] | None = None

    def names(self, taken: Sequence[str]) -> dict[str, str]:
        """New name by own name. Raises: UserError for a name that is taken."""
        names = {n: f"{n}_{self.label}" if n in taken else n for n in self._prompts}
        names |= {n: f"{n}_{self.label}" for n in self._states}
        for name in names.values():
            if name in taken:
                raise UserError(f"the column {name!r} stands twice; write --join NAME={self.path}.")
        return names

    def answers(self, shard: Shard, row_ids: pa.ChunkedArray) -> pa.Table:
        """The own columns of the rows of another folder's shard. Raises: UserError."""
        pieces = list(self._pieces(shard))
        table = pa.concat_tables(pieces, promote_options="default") if pieces else None
        if table is None or table.num_rows != shard.num_rows:
            raise self._missing(shard)
        differ = pa.compute.not_equal(table.column("row_id"), row_ids)
        if pa.compute.any(differ).as_py():
            raise UserError(
                f"{self.path} has other ids for rows {shard.start} to {shard.stop} of "
                f"{shard.path}: the two folders do not come from the same input."
            )
        return table.select([*self._prompts, *self._states])

    def _pieces(self, shard: Shard) -> Iterator[pa.Table]:
        at = shard.start
        for other in self._shards.get(shard.path, ()):
            if other.stop <= at or other.start >= shard.stop:
                continue
            if other.fingerprint != shard.fingerprint and not self._has_ids:
                raise UserError(
                    f"{self.path} was made from another content of {shard.path}, and without an "
                    "id column its rows cannot be told apart."
                )
            yield from self._gap(shard, other.start - at)
            start, stop = max(at, other.start), min(shard.stop, other.stop)
            yield self._table(other.id).slice(start - other.start, stop - start)
            at = stop
        yield from self._gap(shard, shard.stop - at)

    def _gap(self, shard: Shard, num_rows: int) -> Iterator[pa.Table]:
        """Rows that the other folder has not answered yet, as nulls."""
        if num_rows > 0:
            if not self._partial or not self._shards:
                raise self._missing(shard)
            shards = next(iter(self._shards.values()))
            schema = self._table(shards[0].id).schema.remove_metadata()
            yield pa.table({f.name: pa.nulls(num_rows, f.type) for f in schema})

    def _missing(self, shard: Shard) -> UserError:
        return UserError(
            f"{self.path} lacks answers for rows of {shard.path} from {shard.start} to "
            f"{shard.stop}: run its job first, or export what is there with --partial."
        )

    def _table(self, shard: str) -> pa.Table:
        if self._last is None or self._last[0] != shard:
            name = self._paths.part(shard)
            data = self._paths.local(name) or self._paths.storage.read(name)
            table = read_part(data).replace_schema_metadata(None)
            self._last = (shard, table.select(["row_id", *self._prompts, *self._states]))
        return self._last[1]

    def _committed(self) -> dict[str, list[Shard]]:
        """Committed shards by input file, in order of their rows."""
        plan = load_plan(self._paths)
        pending = {shard.id for shard in pending_shards(self._paths, plan)}
        shards: dict[str, list[Shard]] = {}
        for shard in plan:
            if shard.id not in pending and shard.num_rows:
                shards.setdefault(shard.path, []).append(shard)
        for found in shards.values():
            found.sort(key=lambda shard: shard.start)
        return shards


def _label(address: str) -> str:
    """A suffix for columns out of a folder's name."""
    last = address.rstrip("/").rsplit("/", 1)[-1]
    return re.sub(r"\W", "_", last) or "joined"
