"""The spool keeps encoded images once a shard and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys
from hashlib import blake2b
from pathlib import Path

import pytest

from pipeline import scratch
from pipeline.errors import EngineError
from pipeline.spool import Spool


def _read(path: str, offset: int, num_bytes: int) -> bytes:
    with open(path, "rb") as file:
        return os.pread(file.fileno(), num_bytes, offset)


def test_bytes_come_back_and_are_kept_once(tmp_path: Path) -> None:
    with Spool(str(tmp_path)) as spool:
        one = spool.add("a", b"first")
        two = spool.add("a", b"second")
        assert spool.add("a", b"first") == one
        other = spool.add("b", b"first")
        assert one.digest == other.digest == blake2b(b"first", digest_size=16).digest()
        assert (one.path, one.path != other.path) == (two.path, True)
        for kept, data in ((one, b"first"), (two, b"second"), (other, b"first")):
            assert _read(*kept[1:]) == data
        assert spool.num_bytes == 16


def test_forgetting_a_shard_frees_its_file_only(tmp_path: Path) -> None:
    with Spool(str(tmp_path)) as spool:
        spool.add("a", b"first")
        kept = spool.add("b", b"second")
        spool.forget("a")
        spool.forget("a")
        assert spool.num_bytes == 6
        assert _read(*kept[1:]) == b"second"
        assert spool.add("a", b"again").offset == 0


def test_open_readers_finish_after_forgetting() -> None:
    with Spool() as spool:
        kept = spool.add("a", b"data")
        with open(kept.path, "rb") as file:
            spool.forget("a")
            assert file.read() == b"data"


def test_nothing_is_left_behind_even_by_a_kill(tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "from pipeline.spool import Spool\n"
        "spool = Spool(sys.argv[1])\n"
        "print(open(spool.add('a', b'data').path).read())\n"
        "os.kill(os.getpid(), 9)\n"
    )
    command = [sys.executable, "-u", "-c", code, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout == "data\n"
    assert os.listdir(tmp_path) == []


def test_named_files_where_nameless_ones_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scratch, "_opens", lambda path: False)
    with Spool(str(tmp_path)) as spool:
        kept = spool.add("a", b"data")
        assert Path(kept.path).parent == tmp_path
        assert _read(*kept[1:]) == b"data"
    assert os.listdir(tmp_path) == []
    memory = scratch.ScratchFile()
    assert os.path.exists(memory.path)
    memory.close()
    assert not os.path.exists(memory.path)


def test_a_full_disk_ends_the_attempt_and_leaves_no_gap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Spool(str(tmp_path)) as spool:
        spool.add("a", b"first")

        def full(*_: object) -> int:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", full)
            with pytest.raises(EngineError, match="No space left"):
                spool.add("a", b"second")
        kept = spool.add("a", b"third")
        assert kept.offset == 5
        assert _read(*kept[1:]) == b"third"
    with pytest.raises(EngineError, match="cannot keep images"):
        Spool(str(tmp_path / "nowhere")).add("a", b"x")
