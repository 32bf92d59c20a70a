"""The real clock: one thread for all timers of the process, for as long as there are any."""

import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from asyncify import clock as clock_module
from asyncify.clock import MonotonicClock
from tests.waiting import SAFETY_NET, wait_until


def timer_threads() -> list[threading.Thread]:
    """Return the timer threads that live."""
    return [thread for thread in threading.enumerate() if thread.name == "asyncify-timer"]


@pytest.fixture
def hectic() -> Iterator[None]:
    """Let threads take turns as often as can be, so that they meet where they hardly ever do."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


class TestTimerThread:
    @pytest.mark.usefixtures("hectic")
    def test_every_timer_fires_however_short_its_time(self) -> None:
        """One whose time is up while the thread lies down to sleep does not let it sleep for ever."""
        clock, fired, is_over = MonotonicClock(), threading.Event(), threading.Event()

        def be_in_the_way() -> None:
            while not is_over.is_set():
                pass

        with ThreadPoolExecutor(3) as threads:
            for _ in range(3):
                threads.submit(be_in_the_way)
            try:
                for number in range(3000):
                    clock.call_at(clock.now() + number % 20 * 1e-6, fired.set)
                    assert fired.wait(SAFETY_NET)
                    fired.clear()
            finally:
                is_over.set()

    def test_it_ends_when_idle_and_comes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Without timers the thread ends; the next timer starts another."""
        monkeypatch.setattr(clock_module, "_IDLE_SECONDS", 0.01)
        clock = MonotonicClock()
        before = set(timer_threads())
        for _ in range(2):
            fired = threading.Event()
            clock.call_at(clock.now(), fired.set)
            assert fired.wait(SAFETY_NET)
            wait_until(lambda: set(timer_threads()) <= before)

    def test_it_waits_for_a_later_timer_after_an_earlier_one(self) -> None:
        """Timers run in the order of their times, whatever the order that they were set in; a cancelled one never."""
        clock = MonotonicClock()
        order: list[str] = []
        done = threading.Event()
        now = clock.now()
        clock.call_at(now + 0.2, done.set)
        clock.call_at(now + 0.1, lambda: order.append("second"))
        clock.call_at(now + 0.15, lambda: order.append("never")).cancel()
        clock.call_at(now + 0.05, lambda: order.append("first"))

        assert done.wait(SAFETY_NET)
        assert order == ["first", "second"]

    def test_a_timer_in_a_thousand_years_keeps_none_of_the_others_waiting(self) -> None:
        """No system sleeps that long in one go; the thread looks again in between."""
        clock = MonotonicClock()
        far = clock.call_at(clock.now() + 1e11, lambda: None)
        time.sleep(0.01)  # in which the thread begins to wait for it
        fired = threading.Event()
        clock.call_at(clock.now(), fired.set)

        assert fired.wait(SAFETY_NET)
        far.cancel()
        clock.call_at(clock.now(), lambda: None)  # wakes the thread, which need not sleep any more

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_a_thread_that_has_died_is_followed_by_another(self) -> None:
        """A callback must not raise; if one does, the timers of the others go on all the same."""

        def fail() -> None:
            raise ValueError

        clock, before = MonotonicClock(), set(timer_threads())
        clock.call_at(clock.now(), fail)
        wait_until(lambda: not clock._running and set(timer_threads()) <= before)
        fired = threading.Event()
        clock.call_at(clock.now(), fired.set)

        assert fired.wait(SAFETY_NET)

    def test_a_thread_that_can_not_start_is_tried_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Whoever asked is told; the next one may have better luck."""

        def refuse(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        clock, fired = MonotonicClock(), threading.Event()
        with monkeypatch.context() as crowded:
            crowded.setattr(threading.Thread, "start", refuse)
            with pytest.raises(RuntimeError, match="can't start"):
                clock.call_at(clock.now(), lambda: None)
        clock.call_at(clock.now(), fired.set)

        assert fired.wait(SAFETY_NET)

    def test_cancelled_timers_do_not_pile_up(self) -> None:
        """Ten thousand waits that ended early leave no ten thousand timers."""
        clock = MonotonicClock()
        kept = [clock.call_at(clock.now() + 3600, lambda: None) for _ in range(10)]
        for _ in range(10_000):
            clock.call_at(clock.now() + 3600, lambda: None).cancel()

        assert len(clock._timers) < 200
        assert sum(not timer.cancelled for _, _, timer in clock._timers) == len(kept)

    def test_a_timer_in_front_of_the_others_is_not_late(self) -> None:
        """A thread that sleeps until a far timer is woken for a near one."""
        clock = MonotonicClock()
        far = clock.call_at(clock.now() + 3600, lambda: None)
        wait_until(lambda: bool(timer_threads()))
        near = threading.Event()
        clock.call_at(clock.now() + 0.01, near.set)

        assert near.wait(SAFETY_NET)
        far.cancel()

    def test_one_thread_serves_all(self) -> None:
        """A thousand timers start one thread."""
        clock = MonotonicClock()
        before = len(timer_threads())
        timers = [clock.call_at(clock.now() + 3600 - number, lambda: None) for number in range(1000)]

        assert len(timer_threads()) <= before + 1
        for timer in timers:
            timer.cancel()
