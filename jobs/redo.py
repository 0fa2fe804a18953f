"""What a redone shard keeps of its committed part: all answers that were not to be done again.

Knows how a part is read back; not how shards are chosen for redoing.
"""

from __future__ import annotations

import logging
from pathlib import Path

from jobs.part import PartDamaged, check_part, read_part
from jobs.paths import RunPaths
from jobs.plan import Plan, Shard
from jobs.table import answers_of
from pipeline.rows import Answer

log = logging.getLogger(__name__)
AnswerKey = tuple[int, str]


def kept_answers(
    paths: RunPaths, plan: Plan, shard: Shard
) -> tuple[dict[AnswerKey, Answer], dict[AnswerKey, str]]:
    """Answers of the shard's committed part that stay, and the attempts that made them.

    Empty for a shard that is new, for one whose input file has changed, and for a part that is
    gone or damaged: then all is done again.
    """
    if not shard.revision:
        return {}, {}
    local = paths.local(paths.part(shard.id))
    try:
        data: bytes | Path = local or paths.storage.read(paths.part(shard.id))
        info = check_part(data)
        made_from = tuple(info.input[key] for key in ("fingerprint", "start", "stop"))
        if made_from != (shard.fingerprint, shard.start, shard.stop):
            return {}, {}
        codes = plan.redo_codes(shard, above=info.revision)
        return ({}, {}) if codes is None else answers_of(read_part(data), shard.id, codes)
    except FileNotFoundError:
        return {}, {}
    except PartDamaged as error:
        log.warning("%s: its part is damaged (%s): all rows are done again", shard.id, error)
        return {}, {}
