"""Puts an exported folder into a dataset repository of the Hugging Face hub, as one commit.

Files are uploaded first and become visible together; a hub that is busy or has moved on meanwhile
is asked again, longer and longer. Knows nothing of what the files hold.
"""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from jobs.storage import StorageError
from pipeline.errors import UserError

log = logging.getLogger(__name__)
T = TypeVar("T")

NUM_TRIES = 8
FIRST_DELAY_SEC = 1.0
MAX_DELAY_SEC = 120.0
_BUSY = frozenset({408, 409, 412, 425, 429, 500, 502, 503, 504})
_CLIENTS = frozenset({"httpx", "httpx2", "httpcore", "requests", "urllib3"})
_ADDRESS = re.compile(r"hf://datasets/([\w.-]+/[\w.-]+?)(?:@([^/@\s]+))?/?")


@dataclass(frozen=True)
class HubTarget:
    """A dataset repository, and a branch of it."""

    repo: str
    branch: str | None = None

    @classmethod
    def parse(cls, address: str) -> HubTarget:
        """Raises: UserError."""
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise UserError(
                f"{address} names no dataset of the hub: write hf://datasets/OWNER/NAME, with "
                "@BRANCH behind it for a branch."
            )
        return cls(match[1], match[2])


class HubPush:
    """Uploads to one repository."""

    def __init__(self, target: HubTarget) -> None:
        from huggingface_hub import HfApi

        self.target = target
        self._api = HfApi()
        self._where: dict[str, Any] = {"repo_id": target.repo, "repo_type": "dataset"}

    def check_free(self) -> None:
        """Raises: UserError when the repository holds data already."""
        if any(name.startswith("data/") for name in self._head()[1]):
            raise UserError(
                f"{self.target.repo} holds data already; give another name or --force to replace "
                "it (the old data stays in the repository's history)."
            )

    def push(self, folder: Path, message: str, *, private: bool = False) -> str:
        """Make the repository hold the folder's files and no other data; returns the commit."""
        from huggingface_hub import CommitOperationAdd

        files = sorted(path for path in folder.rglob("*") if path.is_file())
        names = [path.relative_to(folder).as_posix() for path in files]
        self._ask(lambda: self._api.create_repo(**self._where, private=private, exist_ok=True))
        if self.target.branch not in (None, "main"):
            where = self._where | {"branch": self.target.branch}
            self._ask(lambda: self._api.create_branch(**where, exist_ok=True))
        where = self._where | {"revision": self.target.branch}
        additions = [CommitOperationAdd(n, f) for n, f in zip(names, files, strict=True)]
        for addition in additions:
            self._ask(partial(self._api.preupload_lfs_files, additions=[addition], **where))
        return self._ask(lambda: self._commit(additions, set(names), message))

    def _commit(self, additions: list[Any], names: set[str], message: str) -> str:
        """One commit on top of what the repository holds now."""
        from huggingface_hub import CommitOperationDelete

        head, there = self._head()
        stale = [n for n in there if n.startswith("data/") and n not in names]
        done = self._api.create_commit(
            **self._where,
            revision=self.target.branch,
            operations=[*additions, *map(CommitOperationDelete, stale)],
            commit_message=message,
            parent_commit=head,
        )
        return str(done.oid)

    def _head(self) -> tuple[str | None, list[str]]:
        """(commit, file names); nothing of a repository that is not there yet."""
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

        def look() -> tuple[str | None, list[str]]:
            try:
                info = self._api.dataset_info(self.target.repo, revision=self.target.branch)
            except (RepositoryNotFoundError, RevisionNotFoundError):
                return None, []
            return info.sha, [sibling.rfilename for sibling in info.siblings or ()]

        return self._ask(look)

    def _ask(self, request: Callable[[], T]) -> T:
        """`request()`, again while the hub is busy. Raises: UserError, StorageError."""
        for attempt in range(NUM_TRIES):
            try:
                return request()
            except Exception as error:
                delay = min(FIRST_DELAY_SEC * 2**attempt, MAX_DELAY_SEC) * random.uniform(0.5, 1.0)
                if not _is_transient(error) or attempt == NUM_TRIES - 1:
                    raise _translated(self.target, error) from error
                log.warning("%s: %s; trying again", self.target.repo, _sentence(error))
                time.sleep(max(delay, _asked_delay(error)))
        raise AssertionError("unreachable")


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return status in _BUSY
    of_client = type(error).__module__.split(".", 1)[0] in _CLIENTS
    return of_client or isinstance(error, ConnectionError | TimeoutError)


def _translated(target: HubTarget, error: Exception) -> Exception:
    if isinstance(error, UserError | StorageError):
        return error
    if _status(error) in (401, 403):
        return UserError(
            f"the hub refuses to write to {target.repo}: log in with `hf auth login` or set "
            "HF_TOKEN to a token that may write there."
        )
    return StorageError(f"writing to {target.repo} on the hub failed: {_sentence(error)}")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _asked_delay(error: Exception) -> float:
    """The seconds of a `Retry-After` header, within reason."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    told = str(headers.get("retry-after", ""))
    return min(float(told), MAX_DELAY_SEC) if told.isdigit() else 0.0


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
