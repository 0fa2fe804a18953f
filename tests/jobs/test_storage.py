"""The exclusive step and its neighbours on a local filesystem, with races and failing disks."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from jobs import faults, storage, storage_local
from jobs.paths import RunPaths
from jobs.storage import StorageError, is_transient, open_storage, retrying
from jobs.storage_local import LocalStorage
from pipeline.errors import UserError
from tests.helpers.race import race


@pytest.fixture
def local(tmp_path: Path) -> LocalStorage:
    return LocalStorage(str(tmp_path))


def test_read_write_list_delete(local: LocalStorage) -> None:
    assert local.names("a") == []
    assert local.write_exclusive("a/x", b"1")
    assert not local.write_exclusive("a/x", b"2")
    local.replace("a/y", b"22")
    assert local.read("a/x") == b"1"
    assert local.names("a") == ["x", "y"]
    assert [(e.name, e.num_bytes) for e in local.entries("a")] == [("x", 1), ("y", 2)]
    assert local.folders("") == ["a", "tmp"]
    local.delete("a/x")
    local.delete("a/x")
    assert not local.exists("a/x")
    local.delete_folder("a")
    assert local.names("a") == []
    assert local.names("tmp") == []
    with pytest.raises(FileNotFoundError):
        local.read("a/x")


def test_token_changes_with_each_writing(local: LocalStorage) -> None:
    local.replace("a", b"same")
    first = local.token("a")
    local.replace("a", b"same")
    assert local.token("a") != first
    assert local.entries("")[0].token == local.token("a")
    assert local.token("b") is None


def test_one_of_many_wins(local: LocalStorage) -> None:
    for turn in range(5):
        winners = race(8, lambda i, t=turn: local.write_exclusive(f"n{t}", str(i).encode()))
        assert len(winners) == 1
        assert local.read(f"n{turn}") == str(winners[0]).encode()


def test_one_wins_without_hard_links(local: LocalStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    winners = race(8, lambda i: local.write_exclusive("n", str(i).encode()))
    assert len(winners) == 1
    assert local.read("n") == str(winners[0]).encode()


def test_a_link_whose_reply_was_lost_is_ours(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def deaf(*args: object, **options: object) -> None:
        link(*args, **options)  # type: ignore[arg-type]
        raise FileExistsError

    monkeypatch.setattr(os, "link", deaf)
    assert local.write_exclusive("n", b"mine")


def test_a_cleaned_private_file_loses(local: LocalStorage) -> None:
    private = local.make_private("tmp/p")
    assert not local.publish_exclusive(private, "n")
    assert not local.publish_replace(private, "n")


@pytest.mark.parametrize("action", ["enospc", "eio", "edquot", "erofs"])
def test_a_failing_disk_ends_the_attempt(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    monkeypatch.setenv(faults.ENV, f"storage.write:{action}:1+")
    faults.reset()
    with pytest.raises(StorageError, match="injected"):
        local.write_exclusive("n", b"x")
    monkeypatch.delenv(faults.ENV)
    assert not local.exists("n")
    assert local.names("tmp") == []


def test_a_transient_error_is_tried_again(
    local: LocalStorage, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "FIRST_DELAY_SEC", 0.001)
    monkeypatch.setenv(faults.ENV, "storage.write:estale")
    faults.reset()
    assert local.write_exclusive("n", b"x")


def test_retrying_waits_longer_and_gives_up() -> None:
    waits: list[float] = []

    def fail() -> None:
        raise OSError(errno.EBUSY, "busy")

    with pytest.raises(StorageError, match="failed 6 times"):
        retrying("it", fail, sleep=waits.append)
    assert len(waits) == storage.NUM_TRIES - 1
    assert all(0 < wait <= storage.MAX_DELAY_SEC for wait in waits)
    assert waits[-1] > waits[0]
    with pytest.raises(PermissionError):
        retrying("it", lambda: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    assert not is_transient(OSError(errno.ENOSPC, "full"))


def test_a_failed_sync_is_not_repeated(
    local: LocalStorage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def sync(fd: int) -> None:
        calls.append(fd)
        raise OSError(errno.EIO, "lost")

    file = tmp_path / "f"
    file.touch()
    monkeypatch.setattr(os, "fsync", sync)
    with pytest.raises(StorageError, match="syncing"):
        local.sync_file(file)
    assert len(calls) == 1


def test_unwritable_folders_are_the_users_mistake(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (file, file / "inside", Path("/proc/nothing")):
        with pytest.raises(UserError, match=r"output\.path .* cannot be written"):
            LocalStorage(str(path)).check_writable()


def test_a_filesystem_without_an_exclusive_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Libc:
        def renameat2(self, *_: object) -> int:
            storage_local.ctypes.set_errno(errno.EINVAL)
            return -1

    monkeypatch.setattr(storage_local.ctypes, "CDLL", lambda *_, **__: Libc())
    with pytest.raises(UserError, match="exclusive atomic step"):
        storage_local._rename_exclusive(tmp_path / "a", tmp_path / "b")


def test_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_storage("out").url("a") == str(tmp_path / "out" / "a")
    assert open_storage(f"file://{tmp_path}/o").url("a") == f"{tmp_path}/o/a"
    paths = RunPaths("out")
    assert paths.local("x") == tmp_path / "out" / "x"
    with pytest.raises(UserError, match="nosuch://"):
        open_storage("nosuch://bucket/x")


def test_nasty_folder_names(nasty_folder: Path) -> None:
    paths = RunPaths(str(nasty_folder / "run"))
    paths.storage.check_writable()
    assert paths.storage.write_exclusive(paths.part("shard-00000000"), b"x")
    assert paths.storage.names(paths.data_folder) == ["shard-00000000.parquet"]
