"""The exit codes that scripts rely on; the fourth, 75, belongs to `signals.py`."""

from __future__ import annotations

EXIT_OK, EXIT_FAILED, EXIT_USER = 0, 1, 2
