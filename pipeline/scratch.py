"""Temporary files that worker processes open by path and that vanish with their owner.

On Linux such a file has no name: its path is /proc/<pid>/fd/<n>, so nothing is left behind when
the owner is killed. Elsewhere it has a name until `close`. Knows nothing of what is stored.
"""

from __future__ import annotations

import contextlib
import os
import tempfile


class ScratchFile:
    """An open temporary file: in memory, or in `folder` when one is given."""

    def __init__(self, folder: str | None = None) -> None:
        self._name: str | None = None
        if folder is None and hasattr(os, "memfd_create"):
            self.fd = os.memfd_create("vlm-batch", os.MFD_CLOEXEC)
        else:
            self.fd, self._name = tempfile.mkstemp(prefix="vlm-batch-", dir=folder)
        self.path = f"/proc/{os.getpid()}/fd/{self.fd}"
        if _opens(self.path):
            self._unlink()
            return
        if self._name is None:  # no /proc: a file in memory could not be opened by others
            os.close(self.fd)
            self.fd, self._name = tempfile.mkstemp(prefix="vlm-batch-")
        self.path = self._name

    def close(self) -> None:
        """Frees the file once no process holds it open."""
        os.close(self.fd)
        self._unlink()

    def _unlink(self) -> None:
        if self._name is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._name)
            self._name = None


def _opens(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDWR))
    except OSError:
        return False
    return True
