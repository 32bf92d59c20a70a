"""What holds for all tests."""

import gc
import math
from collections.abc import AsyncIterator, Iterator

import pytest

from asyncify import traps
from asyncify.testing import FakeClock
from tests.crowd import Crowd, TaskCall, ThreadCall


@pytest.fixture(autouse=True, scope="module")
def unhurried() -> Iterator[None]:
    """Tell of no sync call that held a test's event loop: on a busy machine any may.

    A module that tests just that has a fixture of this name itself.
    """
    before, traps._HELD_SECONDS = traps._HELD_SECONDS, math.inf
    yield
    traps._HELD_SECONDS = before


@pytest.fixture(params=[ThreadCall, TaskCall], ids=["threads", "tasks"])
async def crowd(request: pytest.FixtureRequest) -> AsyncIterator[Crowd]:
    """A crowd of threads, then a crowd of tasks: the same behaviour on both paths."""
    crowd = Crowd(request.param)
    yield crowd
    await crowd.disperse()


@pytest.fixture
def clock() -> FakeClock:
    """A clock for a limiter."""
    return FakeClock()


@pytest.fixture
def uncollected() -> Iterator[None]:
    """No garbage collection begins by itself: what goes has been let go of."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
