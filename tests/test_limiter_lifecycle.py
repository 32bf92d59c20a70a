"""Forks, loops that come and go, exits and garbage: what a limiter lives through."""

import asyncio
import contextvars
import gc
import os
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import pytest

from asyncify import LimitTimeout, aeach, concurrency, forks
from asyncify.clock import MonotonicClock
from asyncify.forks import at_fork
from asyncify.limiter import Limiter
from asyncify.permits import Permit
from asyncify.testing import FakeClock
from tests.interrupts import At, interrupt
from tests.waiting import SAFETY_NET, run_program, wait_until

FORK = """
import contextvars, os, threading, time
from asyncify.keyed import KeyedLimiter
from asyncify.limiter import Limiter

def apart(call):
    return threading.Thread(target=contextvars.Context().run, args=(call,), daemon=True)

def in_child(check):
    pid = os.fork()
    if pid == 0:
        try:
            check()
        except BaseException as error:
            print(repr(error), flush=True)
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    print("child", os.waitstatus_to_exitcode(status), flush=True)
"""


class TestFork:
    def test_a_child_has_a_state_of_its_own(self) -> None:
        """Waiters and holders of the parent are not in the child, whose own calls are admitted and limited."""
        program = """
limiter = Limiter(limit=2)
permits = [contextvars.Context().run(limiter.enter) for _ in range(2)]
threads = [apart(lambda: limiter.enter().leave()) for _ in range(3)]
for thread in threads:
    thread.start()
while limiter.stats().waiting < 3:
    time.sleep(0.001)

def check():
    assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0), limiter
    with limiter, limiter:
        assert limiter.stats().in_flight == 2
        limiter.resize(limit=2)
    for permit in permits:
        permit.end()  # the parent's: nothing to the child
    assert limiter.stats().in_flight == 0

in_child(check)
assert (limiter.stats().in_flight, limiter.stats().waiting) == (2, 3)
for permit in permits:
    permit.end()
for thread in threads:
    thread.join()
print(limiter)
"""
        assert run_program(FORK + program, warnings="error") == "child 0\n<Limiter 0/2 in flight, 0 waiting>\n"

    def test_a_child_keeps_the_calls_that_it_is_inside_of(self) -> None:
        """A fork inside a call runs on inside it, and gives the slot back in its own process."""
        program = """
limiter, another = Limiter(limit=2), Limiter(limit=2)
other = contextvars.Context().run(limiter.enter)

def check():
    assert (limiter.stats().in_flight, another.stats().in_flight) == (1, 0), limiter
    limiter.__exit__(None, None, None)
    assert limiter.stats().in_flight == 0

with limiter:
    in_child(check)
    assert limiter.stats().in_flight == 2
other.end()
print(limiter)
"""
        assert run_program(FORK + program, warnings="error") == "child 0\n<Limiter 0/2 in flight, 0 waiting>\n"

    def test_a_child_has_nothing_that_another_thread_was_to_leave(self) -> None:
        """What was taken by `enter()` may be given back by a thread that is not in the child."""
        program = """
limiter = Limiter(limit=2)
permits = [limiter.enter(), limiter.enter()]

def check():
    assert limiter.stats().in_flight == 0, limiter
    permits[0].leave()
    with limiter, limiter:
        permits[1].leave(ValueError("it failed"))
        assert limiter.stats().in_flight == 2, limiter

in_child(check)
for permit in permits:
    permit.leave()
print(limiter)
"""
        assert run_program(FORK + program, warnings="error") == "child 0\n<Limiter 0/2 in flight, 0 waiting>\n"

    def test_a_lock_held_by_another_thread_is_free_in_the_child(self) -> None:
        """A fork in the middle of somebody else's admission leaves the child a limiter that works."""
        program = """
limiter = Limiter(limit=2, per_second=1000)
keyed = KeyedLimiter(lambda key: key, limit=1)
held = threading.Event()

def hold():
    with limiter._lock, keyed._lock, limiter._clock._lock:
        held.set()
        time.sleep(30)

apart(hold).start()
held.wait()

def check():
    for _ in range(3):
        limiter.enter(timeout=20).leave()
    keyed.enter("a", 1, None).finish()

in_child(check)
"""
        assert run_program(FORK + program, warnings="error") == "child 0\n"

    def test_timers_run_in_the_child(self) -> None:
        """The timer thread stays in the parent; the child starts its own."""
        program = """
limiter = Limiter(per_second=100)
limiter.enter().leave()
limiter.enter().leave()

def check():
    for _ in range(3):
        limiter.enter(timeout=20).leave()

in_child(check)
"""
        assert run_program(FORK + program, warnings="error") == "child 0\n"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
    def test_a_worker_forked_within_a_call_is_outside_of_it(self) -> None:
        """A pool forks its workers at its first call, often within another; they never come back to that one."""
        program = """
import multiprocessing, sys
from concurrent.futures import ProcessPoolExecutor
from asyncify import Limiter, concurrency
api = Limiter(limit=1)
@concurrency(limiter=api)
def fetch(value): return 2 * value
@concurrency(limiter=api)
async def afetch(value): return 2 * value
if __name__ == "__main__":
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as workers:
        with api:
            first = workers.submit(abs, -1)
        print(first.result(), [workers.submit(pair.batch, [1, 2]).result(20) for pair in (fetch, afetch)], api)
"""
        assert run_program(program) == "1 [[2, 4], [2, 4]] <Limiter 0/1 in flight, 0 waiting>\n"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
    def test_a_worker_forked_in_the_middle_of_anything_is_in_the_middle_of_nothing(self) -> None:
        """Not of a call, a fan-out, a stream, a wait over a bridge, nor of a call of a pool of threads."""
        program = """
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from contextvars import copy_context
from asyncify import Limiter, permits, pools, scopes
from asyncify.deadlock import holds
def context():
    names = (permits.innermost, scopes.current_scope, holds._link, holds._steps, pools._inside)
    return [variable.get() for variable in names]
if __name__ == "__main__":
    Limiter(limit=1).enter()
    scopes.CancelScope().enter()
    holds.Link().begin()
    holds.Steps(copy_context()).begin()
    pools._inside.set((pools.ThreadPool(1, "pool"),))
    assert all(context())
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as workers:
        print(workers.submit(context).result(20))
"""
        assert run_program(program) == "[None, None, None, None, ()]\n"

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="no process forks here")
    @pytest.mark.parametrize(
        "begun",
        [
            "numbers.stream(9)",
            "each(bridged, range(999), via='async')",
            "native.batch_as_completed(list(range(999)), {'max_concurrency': 2})",
        ],
    )
    def test_what_threads_of_the_parent_do_is_not_waited_for_in_a_child(self, begun: str) -> None:
        """Who reads on there is told, and may close it."""
        program = f"""
import os, signal, time
from asyncify import dual, each
async def count(upto):
    for number in range(upto):
        yield number
numbers = dual(count)
async def work(value):
    return value
bridged = dual(work)
native = dual(lambda value: time.sleep(0.001), name="native")
results = {begun}
next(results)
if (child := os.fork()) == 0:
    signal.alarm(20)  # which ends it
    try:
        list(results)
    except RuntimeError as error:
        print(error, flush=True)
    results.close()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
results.close()
"""
        assert "was begun in the process that this one was forked from" in run_program(program)


class TestLoops:
    def test_run_again_and_again(self) -> None:
        """One limiter serves one loop after the other, with waiters in each."""
        limiter = Limiter(limit=2)

        async def call() -> None:
            async with limiter:
                await asyncio.sleep(0)

        async def many() -> None:
            await asyncio.gather(*(call() for _ in range(20)))

        for _ in range(10):
            asyncio.run(many())

        assert limiter.stats().admitted == 200
        assert limiter.stats().in_flight == 0

    def test_two_live_loops_hand_slots_to_each_other(self) -> None:
        """With one slot and two loops, each call's end wakes a waiter, on whichever loop that is."""
        limiter = Limiter(limit=1)
        inside: list[int] = []
        most: list[int] = []
        both = threading.Barrier(2)

        async def call() -> None:
            async with limiter:
                inside.append(1)
                most.append(len(inside))
                await asyncio.sleep(0)
                inside.pop()

        async def many() -> None:
            both.wait(SAFETY_NET)
            await asyncio.gather(*(call() for _ in range(200)))

        loops = [threading.Thread(target=lambda: asyncio.run(many())) for _ in range(2)]
        for loop in loops:
            loop.start()
        for loop in loops:
            loop.join(SAFETY_NET)

        assert limiter.stats().admitted == 400
        assert max(most) == 1

    def test_a_loop_closed_with_waiters_in_it(self) -> None:
        """Thousands of waiters that nobody can wake any more lose their places, and whoever is behind gets the slot."""
        limiter = Limiter(limit=1)
        permit = contextvars.Context().run(limiter.enter)
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(limiter.aenter()) for _ in range(3000)]
        loop.call_soon(loop.stop)
        loop.run_forever()
        assert limiter.stats().waiting == 3000
        loop.close()
        done = threading.Event()

        def wait() -> None:
            with limiter:
                done.set()

        thread = threading.Thread(target=wait)
        thread.start()
        wait_until(lambda: limiter.stats().waiting == 1)
        permit.end()
        thread.join(SAFETY_NET)

        assert done.is_set()
        assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # they are meant to be

    def test_a_loop_closed_with_a_call_in_it_that_was_let_in(self) -> None:
        """Its task never hears of its slot, as the loop has had its last turn: the slot is free as that is closed."""
        limiter = Limiter(limit=1)
        permit = contextvars.Context().run(limiter.enter)
        loop = asyncio.new_event_loop()
        tasks = [loop.create_task(limiter.aenter()) for _ in range(3)]
        loop.run_until_complete(asyncio.sleep(0))
        loop.call_soon(loop.stop)
        loop.call_soon(permit.end)
        loop.run_forever()
        assert (limiter.stats().in_flight, limiter.stats().waiting) == (1, 2)
        loop.close()

        assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)
        for task in tasks:
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # they are meant to be

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # a block that can't be left
    @pytest.mark.parametrize("next_one", ["a task", "a thread", "a look"])
    @pytest.mark.parametrize("way", ["gather", "abatch", "aeach"])
    def test_a_loop_closed_with_calls_in_it_that_wait_for_each_other(self, way: str, next_one: str) -> None:
        """Who waits leads to who has a slot, by what awaits both; so neither of them is kept."""
        limiter = Limiter(limit=1)

        @concurrency(limiter=limiter)
        async def fetch(value: int) -> int:
            await asyncio.sleep(30 if value == 0 else 0)
            return value

        async def program() -> None:
            values = [0] * 3
            if way == "gather":
                await asyncio.gather(*map(fetch.acall, values))
            elif way == "abatch":
                await fetch.abatch(values)
            else:
                async for _ in aeach(fetch, values):
                    pass

        def run_a_while() -> None:
            loop = asyncio.new_event_loop()
            tasks = [loop.create_task(program())]
            loop.run_until_complete(asyncio.sleep(0.01))
            tasks += asyncio.all_tasks(loop)
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]  # they are meant to be
            assert limiter.stats().waiting > 0
            loop.close()

        run_a_while()
        if next_one == "a task":
            assert asyncio.run(asyncio.wait_for(fetch.acall(1), SAFETY_NET)) == 1
        elif next_one == "a thread":
            assert limiter.enter(timeout=SAFETY_NET).at is not None
            limiter._give_back_other(None)

        assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)

    def test_a_loop_closed_without_waiters_costs_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing is collected for it, and a finalizer may look in a thread that holds the lock."""
        limiter = Limiter(limit=1)

        async def contend() -> None:
            async with limiter:
                await asyncio.sleep(0)

        async def contend_all() -> None:
            await asyncio.gather(contend(), contend(), contend())

        def refuse() -> None:
            raise AssertionError("collected")

        monkeypatch.setattr("gc.collect", refuse)
        for _ in range(2):
            asyncio.run(contend_all())

        assert limiter._loops
        with limiter._lock:
            run_apart(limiter._drop_closed_loops)
            limiter._drop_closed_loops()
            assert limiter._loops
        limiter._drop_closed_loops()
        assert not limiter._loops

    def test_run_cancels_its_waiters(self) -> None:
        """A program that leaves `asyncio.run` with waiters behind leaves none in the queue."""
        limiter = Limiter(limit=1)
        permit = contextvars.Context().run(limiter.enter)

        async def leave_waiters() -> None:
            tasks = [asyncio.create_task(limiter.aenter()) for _ in range(5)]
            await asyncio.sleep(0)
            assert limiter.stats().waiting == len(tasks)

        asyncio.run(leave_waiters())

        assert limiter.stats().waiting == 0
        permit.end()


class TestExit:
    def test_the_interpreter_exits_with_waiters(self) -> None:
        """Neither a waiting daemon thread nor a timer far ahead keeps a program from ending."""
        program = """
import contextvars, threading, time
from asyncify.limiter import Limiter
limiter = Limiter(limit=1, per_hour=2)
held = limiter.enter()
waiting = [lambda: limiter.enter(timeout=3600), limiter.acquire, limiter.acquire]
for wait in waiting:
    threading.Thread(target=contextvars.Context().run, args=(wait,), daemon=True).start()
while limiter.stats().waiting < 2:
    time.sleep(0.001)
print("end")
"""
        assert run_program(program, warnings="error") == "end\n"

    @pytest.mark.parametrize("way", ["close.batch([1, 2])", "bridged.invoke(1)", "[paced.acquire() for _ in range(3)]"])
    def test_a_finalizer_at_the_very_end_is_told_that_no_thread_runs_any_more(self, way: str) -> None:
        """And does not wait for one for ever, be it a new thread or one that was there."""
        program = f"""
from asyncify import Limiter, dual
close = dual(lambda value: value, name="close")
async def abridged(value): return value
bridged = dual(abridged)
paced = Limiter(per_second=100)
close.batch([1, 2])
bridged.invoke(1)
paced.acquire()
class Client:
    def __del__(self):
        try:
            {way}
        except RuntimeError as error:
            print(error)
client = Client()
"""
        assert run_program(program) == "can't create new thread at interpreter shutdown\n"


def finalize_at_line(number: int, act: Callable[[], Any], finalizer: Callable[[], Any]) -> bool:
    """Run `act`, and at the n-th line of the package's own code that it executes, a finalizer in the same thread."""
    seen = 0
    fired = False

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal seen, fired
        if "/asyncify/" not in frame.f_code.co_filename:
            return None
        if event == "line" and not fired:
            seen += 1
            if seen == number:
                fired = True
                sys.settrace(None)
                finalizer()
        return trace

    sys.settrace(trace)
    try:
        act()
    finally:
        sys.settrace(None)
    return fired


def run_apart(run: Callable[[], Any]) -> Any:
    """Run in a thread and a context of its own, whose trace function is nobody else's."""
    result: list[Any] = []
    thread = threading.Thread(target=contextvars.Context().run, args=(lambda: result.append(run()),), daemon=True)
    thread.start()
    thread.join(SAFETY_NET)
    assert not thread.is_alive(), "locked out by itself"
    return result[0]


class TestFinalizers:
    """A finalizer may run in the middle of anything: here at every single line, one after the other."""

    @pytest.mark.parametrize("clock_type", [FakeClock, MonotonicClock])
    def test_a_call_ends_inside_an_admission(self, clock_type: Callable[[], Any]) -> None:
        """The thread that is inside the limiter does not lock itself out, and no place is lost."""
        number = 0
        while True:
            number += 1
            limiter = Limiter(limit=2, per_second=1000, clock=clock_type())
            garbage = [contextvars.Context().run(limiter.enter) for _ in range(1)]

            def act(limiter: Limiter = limiter) -> None:
                limiter.acquire(blocking=False)
                limiter.resize(limit=3)
                limiter.stats()

            fired = run_apart(lambda: finalize_at_line(number, act, garbage[0].end))  # noqa: B023
            if not fired:
                garbage[0].end()
            assert limiter.stats().in_flight == 0, f"at line {number}"
            if not fired:
                break
        assert number > 30

    @pytest.mark.parametrize("clock_type", [FakeClock, MonotonicClock])
    def test_a_call_with_others_behind_it_ends_while_a_timer_is_set(self, clock_type: Callable[[], Any]) -> None:
        """A finalizer that itself has to set a timer does not lock the clock out."""
        number = 0
        while True:
            number += 1
            clock = clock_type()
            limiter = Limiter(limit=1, per_second=1, clock=clock)
            garbage = contextvars.Context().run(limiter.enter)
            loop = asyncio.new_event_loop()
            waiting = loop.create_task(limiter.aenter())
            loop.call_soon(loop.stop)
            loop.run_forever()

            def act(limiter: Limiter = limiter, clock: Any = clock) -> None:
                limiter.acquire(blocking=False)
                limiter.stats()
                for seconds in (300, 200, 100):
                    clock.call_at(clock.now() + seconds, lambda: None).cancel()

            fired = run_apart(lambda: finalize_at_line(number, act, garbage.end))  # noqa: B023
            if not fired:
                garbage.end()
            waiting.cancel()
            loop.call_soon(loop.stop)
            loop.run_forever()
            loop.call_soon(loop.stop)
            loop.run_forever()
            loop.close()
            assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0), f"at line {number}"
            if not fired:
                break
        assert number > 10

    @pytest.mark.parametrize("path", ["sync", "async"])
    def test_the_slot_comes_free_at_any_moment_of_the_wait(self, path: str) -> None:
        """Whenever another call ends while this one begins to wait, this one comes in, and nothing fails."""
        number, fired = 0, True
        while fired:
            number += 1
            limiter = Limiter(limit=1)
            holder = contextvars.Context().run(limiter.enter)

            async def act(limiter: Limiter = limiter) -> None:
                (limiter.enter() if path == "sync" else await limiter.aenter()).leave()

            safety = threading.Timer(0.05, holder.end)  # for when the wait began before the n-th line
            safety.start()
            fired = run_apart(lambda: finalize_at_line(number, lambda: asyncio.run(act()), holder.end))  # noqa: B023
            safety.join()
            assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0), f"at line {number}"
            assert limiter.stats().admitted == 2

        assert number > 30

    def test_a_waiter_is_cancelled_at_any_moment_of_being_let_in(self) -> None:
        """As by Ctrl-C, which cancels the main task of a program in between two lines of it."""
        number, fired = 0, True
        while fired:
            number += 1
            limiter = Limiter(limit=1)

            async def act(limiter: Limiter = limiter, number: int = number) -> bool:
                holder = await limiter.aenter()
                waiter = asyncio.create_task(limiter.aenter())
                await asyncio.sleep(0)
                fired = finalize_at_line(number, holder.end, waiter.cancel)
                waiter.cancel()
                await asyncio.wait([waiter])
                return fired

            fired = run_apart(lambda: asyncio.run(act()))
            assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0), f"at line {number}"

        assert number > 20

    def test_a_generator_under_a_limiter_is_collected_inside_an_admission(self) -> None:
        """It was entered in another context, as in a pool of threads, and is left wherever the collector runs."""
        number, fired = 0, True
        while fired:
            number += 1
            limiter = Limiter(limit=2)

            def stream(limiter: Limiter = limiter) -> Iterator[None]:
                with limiter:
                    yield

            chunks: Any = stream()
            contextvars.Context().run(next, chunks)

            def act(limiter: Limiter = limiter) -> None:
                limiter.acquire(blocking=False)
                limiter.enter().leave()
                limiter.stats()

            fired = run_apart(lambda: finalize_at_line(number, act, chunks.close))  # noqa: B023
            chunks.close()
            assert limiter.stats().in_flight == 0, f"at line {number}"

        assert number > 30

    def test_a_limiter_is_collected_long_before_its_next_admission(self) -> None:
        """No timer keeps it: neither that of the queue, once nobody waits, nor that of who gave up."""
        limiter = Limiter(per_hour=1)
        limiter.acquire()
        with pytest.raises(LimitTimeout):
            limiter.enter(timeout=0.001)
        kept = weakref.ref(limiter)
        del limiter
        gc.collect()

        assert kept() is None

    def test_one_that_is_too_dear_sets_no_timer(self) -> None:
        """It is refused at once, however long nobody is admitted for other reasons."""

        class Busy(Exception):  # noqa: N818  (as it says)
            status_code = 429
            headers: ClassVar = {"Retry-After": "3600"}

        limiter = Limiter(per_hour=10, burst=10)
        with pytest.raises(Busy), limiter:
            raise Busy
        with pytest.raises(ValueError, match="can never be admitted"):
            limiter.enter(cost=11)
        kept = weakref.ref(limiter)
        del limiter
        gc.collect()

        assert kept() is None

    async def test_a_garbage_collected_waiter_leaves_the_queue(self) -> None:
        """A coroutine that is dropped while it waits gives its place back when it is collected."""
        limiter = Limiter(limit=1)
        permit = contextvars.Context().run(limiter.enter)
        coroutine = limiter.aenter()
        coroutine.send(None)
        assert limiter.stats().waiting == 1
        del coroutine
        gc.collect()

        assert limiter.stats().waiting == 0
        permit.end()


def test_where_no_process_forks_nothing_is_prepared_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows has no `register_at_fork`; no other module of the package asks for it."""
    monkeypatch.delattr(os, "register_at_fork")
    at_fork(after_in_child=pytest.fail)
    package = Path(forks.__file__).parent

    assert [file.name for file in package.rglob("*.py") if "register_at_fork" in file.read_text()] == ["forks.py"]


class TestInterrupts:
    """Ctrl-C comes between any two steps: here at every place where Python looks for it, one after the other."""

    MODULES = frozenset(("asyncify.turnstile", "asyncify.limiter", "asyncify.permits", "asyncify.wakeups"))

    @pytest.mark.parametrize("call", ["sync", "async", "leaving"])
    def test_an_interrupt_locks_nobody_out(self, call: str) -> None:
        """It may cost the one slot that was just in hand, and whoever comes later gets the others."""
        for number in count(1):
            limiter = Limiter(limit=2)
            loop = asyncio.new_event_loop()
            held = [contextvars.Context().run(limiter.enter) for _ in range(2)]
            tasks = [loop.create_task(_pass(limiter)) for _ in range(2)]
            if call == "leaving":
                _turn(loop)
            else:
                held[0].end()
            with At(number, self.MODULES, interrupt) as at, suppress(KeyboardInterrupt):
                if call == "sync":
                    contextvars.Context().run(_pass_sync, limiter)
                elif call == "leaving":
                    held[0].end()
                _turn(loop)
            held[1].end()
            tasks.append(loop.create_task(_pass(limiter)))
            _turn(loop)
            run_apart(lambda: _pass_sync(limiter))  # noqa: B023

            assert tasks[-1].done(), f"at place {number}"
            assert _end(loop, tasks) <= 1, f"at place {number}"
            assert limiter.stats().in_flight <= 1, f"at place {number}"
            if not at.has_acted():
                break
        assert number > 20

    def test_who_comes_next_finds_a_slot_that_an_interrupt_left_free(self) -> None:
        """All who wait are let in then, although nobody is inside who could let them in."""
        for number in count(1):
            limiter = Limiter(limit=1)
            held = contextvars.Context().run(limiter.enter)
            loop = asyncio.new_event_loop()
            tasks = [loop.create_task(_pass(limiter)) for _ in range(2)]
            _turn(loop)
            with At(number, self.MODULES, interrupt) as at, suppress(KeyboardInterrupt):
                held.end()
            is_free = limiter._meter.inside == set()
            tasks.append(loop.create_task(_pass(limiter)))
            _turn(loop)

            assert _end(loop, tasks) == 0 or not is_free, f"at place {number}"
            if not at.has_acted():
                break
        assert number > 10

    def test_an_interrupt_takes_one_of_many_that_are_let_in(self) -> None:
        """Those let in before it start, and those after it are let in by whoever comes next."""
        for number in count(1):
            limiter = Limiter(limit=1)
            contextvars.Context().run(limiter.enter)
            loop = asyncio.new_event_loop()
            tasks = [loop.create_task(_pass(limiter)) for _ in range(5)]
            _turn(loop)
            with At(number, self.MODULES, interrupt) as at, suppress(KeyboardInterrupt):
                limiter.resize(limit=10)
            if limiter._limits.limit == 1:
                limiter.resize(limit=10)
            tasks.append(loop.create_task(_pass(limiter)))
            _turn(loop)

            assert _end(loop, tasks) <= 1, f"at place {number}"
            if not at.has_acted():
                break
        assert number > 20

    def test_calls_start_in_the_order_in_which_several_threads_let_them_in(self) -> None:
        """Wherever one thread is in letting a call in when another lets the next one in, the first starts first."""
        for number in count(1):
            limiter = Limiter(limit=2)
            held = [contextvars.Context().run(limiter.enter) for _ in range(2)]
            loop = asyncio.new_event_loop()
            started: list[int] = []
            tasks = [loop.create_task(_note(limiter, started, number)) for number in range(2)]
            _turn(loop)

            def end_other(held: list[Permit] = held) -> None:
                run_apart(held[1].end)

            with At(number, self.MODULES, end_other) as at:
                held[0].end()
            _turn(loop)

            assert _end(loop, tasks) == 0 or not at.has_acted(), f"at place {number}"
            assert started in ([0, 1], [0]), f"at place {number}"
            if not at.has_acted():
                break
        assert number > 10


async def _pass(limiter: Limiter) -> None:
    async with limiter:
        pass


def _pass_sync(limiter: Limiter) -> None:
    with limiter:
        pass


async def _note(limiter: Limiter, started: list[int], number: int) -> None:
    await limiter.aenter()
    started.append(number)


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    """Run a loop for some turns, also where an interrupt has come into them before."""
    for _ in range(8):
        loop.call_soon(loop.stop)
        loop.run_forever()


def _end(loop: asyncio.AbstractEventLoop, tasks: Sequence[asyncio.Task[None]]) -> int:
    """Return how many tasks have not ended; end them, and the loop."""
    lost = sum(not task.done() for task in tasks)
    for task in tasks:
        task.cancel()
    _turn(loop)
    for task in tasks:
        task._log_destroy_pending = False  # type: ignore[attr-defined]  # one may be lost
        if task.done() and not task.cancelled():
            task.exception()
    loop.close()
    return lost
