"""A spool for each test of the feeder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipeline.spool import Spool


@pytest.fixture
def spool() -> Iterator[Spool]:
    with Spool() as spool:
        yield spool
