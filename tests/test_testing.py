"""The fake clock: time that moves only when it is told to."""

import math
from typing import Any

import pytest

from asyncify.limiter import Limiter
from asyncify.testing import FakeClock


def test_time_stands_still_until_it_is_moved() -> None:
    """It begins where it is told to, and passes by as much as it is told."""
    clock = FakeClock(start=5)
    assert clock.now() == 5
    clock.advance(2.5)
    clock.advance(0)

    assert clock.now() == 7.5


def test_timers_run_in_order_each_at_its_own_time() -> None:
    """Whatever the order that they were set in, and the first come first at the same time."""
    clock = FakeClock()
    seen: list[tuple[str, float]] = []
    for name, when in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("b2", 2.0), ("late", 3.1)):
        clock.call_at(when, lambda name=name: seen.append((name, clock.now())))  # type: ignore[misc]  # bound now
    clock.advance(3)

    assert seen == [("a", 1), ("b", 2), ("b2", 2), ("c", 3)]
    assert clock.now() == 3


def test_a_timer_may_set_another() -> None:
    """One that falls into the same step runs in it; one that is overdue runs at once."""
    clock = FakeClock()
    seen: list[float] = []

    def note(when: float) -> None:
        clock.call_at(when, lambda: seen.append(clock.now()))

    clock.call_at(1, lambda: note(2))
    clock.call_at(3, lambda: note(0))
    clock.advance(10)

    assert seen == [2, 3]


def test_a_cancelled_timer_never_runs() -> None:
    """Neither does its cancelling a second time hurt."""
    clock = FakeClock()
    seen: list[str] = []
    timer = clock.call_at(1, lambda: seen.append("ran"))
    timer.cancel()
    timer.cancel()
    clock.advance(2)

    assert seen == []


def test_a_timer_may_let_time_pass() -> None:
    """It does not go back when the step that ran the timer has ended."""
    clock = FakeClock()
    clock.call_at(1, lambda: clock.advance(10))
    clock.advance(2)

    assert clock.now() == 11


@pytest.mark.parametrize(
    ("seconds", "error"),
    [
        *[(bad, ValueError) for bad in (-1, math.nan, math.inf)],
        pytest.param(10**400, ValueError, id="10**400"),
        *[(bad, TypeError) for bad in ("3", True, None)],
    ],
)
def test_time_does_not_go_back(seconds: Any, error: type[Exception]) -> None:
    """A negative step, one to no time at all, or one that is no number is an error, and nothing has moved."""
    clock = FakeClock(start=5)
    with pytest.raises(error, match=r"^seconds=.*: must be .*, as in advance\(0\.5\)$"):
        clock.advance(seconds)
    with pytest.raises(error, match=r"^start=.*: must be .*, as in FakeClock\(start=5\)$"):
        FakeClock(seconds)

    assert clock.now() == 5


def test_repr_tells_the_time_and_the_timers() -> None:
    """Cancelled timers are not counted."""
    clock = FakeClock(start=1.5)
    clock.call_at(2, lambda: None)
    clock.call_at(3, lambda: None).cancel()

    assert repr(clock) == "<FakeClock 1.5 s, 1 timers>"


def test_a_limit_is_tested_without_a_real_second() -> None:
    """What the class is for: an hour passes at once."""
    clock = FakeClock()
    limiter = Limiter(per_hour=1, clock=clock)
    assert limiter.acquire(blocking=False)
    assert not limiter.acquire(blocking=False)
    clock.advance(3600)

    assert limiter.acquire(blocking=False)
