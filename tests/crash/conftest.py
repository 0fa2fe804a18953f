"""What every crash test gets: a tally of the faults that it injects."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.helpers.crash_summary import KEY
from tests.helpers.tally import Tally


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Iterator[Tally]:
    """Counts the test's faults and rows; the report of its teardown carries them."""
    tally = Tally()
    yield tally
    request.node.user_properties.append((KEY, (dict(tally.faults), dict(tally.rows))))
