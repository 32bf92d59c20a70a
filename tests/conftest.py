"""What holds for all tests."""

import math
from collections.abc import Iterator

import pytest

from asyncify import traps


@pytest.fixture(autouse=True, scope="module")
def unhurried() -> Iterator[None]:
    """Tell of no sync call that held a test's event loop: on a busy machine any may.

    A module that tests just that has a fixture of this name itself.
    """
    before, traps._HELD_SECONDS = traps._HELD_SECONDS, math.inf
    yield
    traps._HELD_SECONDS = before
