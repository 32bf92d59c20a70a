"""The threads of a bridged async side, and the loop of a bridged sync side."""

import asyncio
import contextlib
import inspect
import signal
import sys
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import aclosing, closing
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import pytest

from asyncify import Dual, Limiter, concurrency, pools
from asyncify.background import BackgroundLoop
from asyncify.pools import DEFAULT_THREADS, OnEnd, ThreadPool
from asyncify.sources import Source
from tests.waiting import SAFETY_NET, run_program, until, wait_until

colour = ContextVar("colour", default="none")


class BoomError(Exception):
    """What the functions of these tests raise."""


def nothing() -> None:
    """Do no work."""


def fail() -> None:
    """Raise, in the thread."""
    raise BoomError


async def afail() -> None:
    """Raise, when it is awaited."""
    raise BoomError


def unnoticed(error: BaseException | None) -> None:
    """Take no note of an end."""


async def acall(pool: ThreadPool, work: Callable[[], Any], ended: OnEnd = unnoticed) -> Any:
    """Call as an entry does."""
    return await pool.call(work, ended, copy_context())


def astream(pool: ThreadPool, chunks: Any, ended: OnEnd = unnoticed) -> Any:
    """Stream as an entry does."""
    return aclosing(pool.stream(chunks, ended, copy_context()))


@pytest.fixture
def pool() -> ThreadPool:
    """Return a pool of two threads."""
    return ThreadPool(2, "pair")


@pytest.fixture
def loop() -> Iterator[BackgroundLoop]:
    """Return a background loop of the test's own."""
    loop = BackgroundLoop()
    yield loop
    loop.close()


class Blocker:
    """Work that stays in its thread until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Semaphore(0)
        self.go = threading.Event()
        self.lock = threading.Lock()
        self.inside = 0
        self.most = 0
        self.calls = 0

    def __call__(self) -> str:
        with self.lock:
            self.calls += 1
            self.inside += 1
            self.most = max(self.most, self.inside)
        self.started.release()
        assert self.go.wait(SAFETY_NET)
        with self.lock:
            self.inside -= 1
        return "done"

    async def until_started(self, calls: int = 1) -> None:
        for _ in range(calls):
            assert await asyncio.to_thread(self.started.acquire, timeout=SAFETY_NET)


@pytest.fixture
def blocker() -> Iterator[Blocker]:
    """Return work that blocks, and let it go in the end."""
    blocker = Blocker()
    yield blocker
    blocker.go.set()


# --- threads: a task waits for a call ---


async def test_a_call_gives_its_result(pool):
    """What the function returns in its thread is what the task gets."""
    assert await acall(pool, lambda: threading.current_thread() is not threading.main_thread()) is True


async def test_no_more_calls_than_threads(pool, blocker):
    """A pool of two runs two calls at once, and the others when those have ended."""
    calls = [asyncio.create_task(acall(pool, blocker)) for _ in range(6)]
    await blocker.until_started(2)
    waiting = blocker.calls
    blocker.go.set()

    assert await asyncio.gather(*calls) == ["done"] * 6
    assert (waiting, blocker.most) == (2, 2)


async def test_a_pool_without_a_size_runs_all_at_once(blocker):
    """Where something else bounds the calls, each has a thread at once."""
    unbounded = ThreadPool(None, "pair")
    calls = [asyncio.create_task(acall(unbounded, blocker)) for _ in range(100)]
    await blocker.until_started(100)
    blocker.go.set()
    await asyncio.gather(*calls)

    assert blocker.most == 100


@pytest.mark.parametrize(
    ("given", "later", "most"),
    [
        pytest.param({"limit": 2}, {"limit": None}, DEFAULT_THREADS, id="no limit any more"),
        pytest.param({}, {"limit": DEFAULT_THREADS + 30}, DEFAULT_THREADS + 30, id="a limit only now"),
    ],
)
async def test_a_limiter_that_is_resized_resizes_the_pairs_threads(blocker, given, later, most):
    """There are as many as its limit says now, or 64 where it has none."""
    limiter = Limiter(**given, per_hour=1_000_000, burst=1000)
    pair = concurrency(limiter=limiter, warn=False)(Dual(lambda _: blocker()))
    limiter.resize(**later)
    calls = asyncio.gather(*(pair.ainvoke(number) for number in range(most + 20)))
    await blocker.until_started(most)
    blocker.go.set()
    await calls

    assert blocker.most == most


async def test_waiting_calls_run_in_order():
    """First come, first served."""
    seen: list[int] = []
    await asyncio.gather(*(acall(ThreadPoolOfOne, partial(seen.append, number)) for number in range(50)))

    assert seen == list(range(50))


ThreadPoolOfOne = ThreadPool(1, "one")


async def test_a_thread_carries_the_name_of_the_pool_while_it_works(pool):
    """A debugger sees which pair a thread works for, and that an idle one works for none."""
    thread = await acall(pool, threading.current_thread)
    name = await acall(pool, lambda: threading.current_thread().name)

    assert name == "pair"
    await until(lambda: thread.name == "asyncify")


async def test_context_variables_are_carried_into_the_thread(pool):
    """The function sees the caller's context variables, and what it sets stays its own."""

    def paint() -> str:
        before = colour.get()
        colour.set("red")
        return before

    colour.set("blue")

    assert await acall(pool, paint) == "blue"
    assert colour.get() == "blue"


async def test_an_error_keeps_its_traceback(pool):
    """The line that raised is in the traceback that the task sees."""
    with pytest.raises(BoomError) as caught:
        await acall(pool, fail)

    assert caught.traceback[-1].name == "fail"


@pytest.mark.usefixtures("uncollected")
async def test_nothing_keeps_an_error_alive(pool):
    """When it has been handled, an error and all that its traceback holds are let go without a garbage collection."""

    async def provoke() -> "weakref.ref[BoomError]":
        try:
            await acall(pool, fail)
        except BoomError as error:
            return weakref.ref(error)
        raise AssertionError

    error = await provoke()

    await until(lambda: error() is None)  # the thread, too, has to leave the call


async def test_stop_iteration_becomes_a_runtime_error(pool):
    """`StopIteration` would end the coroutine that awaits it, so it arrives as the cause of another error."""
    with pytest.raises(RuntimeError, match="raised StopIteration") as caught:
        await acall(pool, partial(next, iter(())))

    assert isinstance(caught.value.__cause__, StopIteration)


async def test_a_coroutine_that_a_function_returns_is_awaited(pool):
    """`lambda: fetch()` over an async function gives the result, and has ended only then."""
    events: list[str] = []

    async def fetch() -> str:
        events.append("awaited")
        return "rate"

    assert await acall(pool, fetch, lambda _: events.append("ended")) == "rate"
    assert events == ["awaited", "ended"]


@pytest.mark.parametrize("work", [fail, afail], ids=["function", "coroutine"])
async def test_the_end_is_told_which_error_it_was(pool, work):
    """A limiter learns from errors, so it hears of them: of one raised in the thread, and of one awaited after it."""
    told: list[BaseException | None] = []
    with pytest.raises(BoomError) as caught:
        await acall(pool, work, told.append)

    assert set(told) == {caught.value}


async def test_the_end_of_a_stream_is_told_which_error_it_was(pool):
    """A limiter learns from errors, so it hears of one that has ended a stream."""
    told: list[BaseException | None] = []

    def chunks() -> Iterator[int]:
        yield 1
        raise BoomError

    with pytest.raises(BoomError) as caught:
        async with astream(pool, chunks(), told.append) as stream:
            [chunk async for chunk in stream]

    await until(lambda: told == [caught.value])


async def test_a_cancelled_wait_leaves_the_thread_running(pool, blocker):
    """The task is free at once; the call counts as running until its thread is done with it."""
    ended = threading.Event()
    call = asyncio.create_task(acall(pool, blocker, lambda _: ended.set()))
    await blocker.until_started()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    still_running = not ended.is_set()
    blocker.go.set()

    assert still_running
    await until(ended.is_set)


@pytest.mark.parametrize("is_loop_closed", [False, True])
def test_a_wait_that_is_dropped_leaves_the_thread_running(pool, blocker, is_loop_closed):
    """A coroutine that is closed, as those of a loop that was given up are, has ended only when its thread has."""
    ended = threading.Event()
    calls: list[Any] = []

    async def begin() -> None:
        calls.append(acall(pool, blocker, lambda _: ended.set()))
        calls[0].send(None)
        await blocker.until_started()
        if not is_loop_closed:
            calls.pop().close()

    asyncio.run(begin())
    for call in calls:
        call.close()
    still_running = not ended.is_set()
    blocker.go.set()

    assert still_running
    assert ended.wait(SAFETY_NET)


async def test_a_call_cancelled_in_the_queue_never_runs(pool, blocker):
    """A call that has no thread yet is dropped when its task is cancelled, and has ended then."""
    calls = [asyncio.create_task(acall(pool, blocker)) for _ in range(2)]
    await blocker.until_started(2)
    ended: list[str] = []
    queued = asyncio.create_task(acall(pool, blocker, lambda _: ended.append("ended")))
    await asyncio.sleep(0)
    queued.cancel()
    with pytest.raises(asyncio.CancelledError):
        await queued
    noted = list(ended)
    blocker.go.set()
    await asyncio.gather(*calls)
    await acall(pool, nothing)

    assert noted == ["ended"]
    assert blocker.calls == 2


async def test_a_coroutine_that_comes_too_late_is_closed(pool, blocker):
    """A function that returns a coroutine to a call that was given up has it closed, without a word of complaint."""
    made: list[Any] = []
    ended: list[str] = []

    def work() -> Any:
        blocker()
        made.append(afail())
        return made[0]

    call = asyncio.create_task(acall(pool, work, lambda _: ended.append("ended")))
    await blocker.until_started()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    blocker.go.set()
    await until(lambda: bool(ended))

    assert inspect.getcoroutinestate(made[0]) == inspect.CORO_CLOSED


def test_a_loop_that_is_closed_while_the_thread_runs(pool, blocker):
    """The thread ends its call quietly when nobody waits for it any more."""
    ended = threading.Event()

    async def abandon() -> None:
        call = asyncio.create_task(acall(pool, blocker, lambda _: ended.set()))
        await blocker.until_started()
        call.cancel()

    asyncio.run(abandon())
    before = ended.is_set()
    blocker.go.set()

    assert ended.wait(SAFETY_NET)
    assert not before


def test_a_coroutine_that_comes_when_the_loop_is_closed_is_closed_too(pool, blocker):
    """Nobody can await it any more, and nobody is told that nobody did."""
    made: list[Any] = []
    ended = threading.Event()

    def work() -> Any:
        blocker()
        made.append(afail())
        return made[0]

    async def abandon() -> None:
        call = asyncio.create_task(acall(pool, work, lambda _: ended.set()))
        await blocker.until_started()
        call.cancel()

    asyncio.run(abandon())
    blocker.go.set()

    assert ended.wait(SAFETY_NET)
    assert inspect.getcoroutinestate(made[0]) == inspect.CORO_CLOSED


async def test_a_call_within_a_call_never_waits_for_a_thread():
    """A call made by a call of the same pool gets a thread beyond the bound: the outer one waits for it."""
    one = ThreadPool(1, "one")

    def outer() -> Any:
        return asyncio.run(acall(one, lambda: "inner"))

    async with asyncio.timeout(SAFETY_NET):
        assert await asyncio.gather(*(acall(one, outer) for _ in range(3))) == ["inner"] * 3


async def test_a_thread_beyond_the_bound_takes_no_other_call(blocker):
    """The thread that a nested call was given ends with it, and leaves the queue to the pool's own."""
    one = ThreadPool(1, "one")
    queued = Blocker()
    tasks: list[asyncio.Task[Any]] = []

    def outer() -> Any:
        asyncio.run(acall(one, nothing))
        return blocker()

    tasks.append(asyncio.create_task(acall(one, outer)))
    tasks.append(asyncio.create_task(acall(one, queued)))
    await blocker.until_started()
    started_too_early = queued.started.acquire(blocking=False)
    queued.go.set()
    blocker.go.set()
    await asyncio.gather(*tasks)

    assert not started_too_early


async def test_when_the_system_has_no_thread_left_the_call_says_so(pool, monkeypatch):
    """The error reaches the caller, and leaves no place taken."""
    ended: list[str] = []

    def refuse(job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(pools._stock, "start", refuse)
        for _ in range(3):
            with pytest.raises(RuntimeError, match="can't start new thread"):
                await acall(pool, nothing, lambda _: ended.append("ended"))

    assert ended == ["ended"] * 3
    assert await acall(pool, lambda: "fine") == "fine"


def test_submit_is_that_of_an_executor(pool):
    """A pool serves code that knows executors: results, errors, and a future cancelled before its turn."""
    blocker = Blocker()
    busy = [pool.submit(blocker) for _ in range(2)]
    cancelled = pool.submit(blocker)
    was_cancelled = cancelled.cancel()
    failed = pool.submit(lambda: 1 / 0)
    blocker.go.set()

    assert [future.result(SAFETY_NET) for future in busy] == ["done", "done"]
    assert isinstance(failed.exception(SAFETY_NET), ZeroDivisionError)
    assert was_cancelled
    assert blocker.calls == 2


# --- threads: made on demand, let go when idle ---


async def test_idle_threads_are_let_go(monkeypatch):
    """After a rush, the number of threads returns to where it was."""
    monkeypatch.setattr(pools, "_IDLE_SECONDS", 0.01)
    blocker = Blocker()
    rush = ThreadPool(None, "rush")
    calls = [asyncio.create_task(acall(rush, blocker)) for _ in range(50)]
    await blocker.until_started(50)
    threads = await acall(rush, lambda: [thread for thread in threading.enumerate() if thread.name == "rush"])
    blocker.go.set()
    await asyncio.gather(*calls)
    for thread in threads:
        await asyncio.to_thread(thread.join, SAFETY_NET)

    assert len(threads) == 51
    assert not any(thread.is_alive() for thread in threads)


async def test_a_thousand_pools_share_one_thread():
    """Pools that are called one after the other take the same thread from the stock."""
    threads = set()
    for number in range(1000):
        threads.add(await acall(ThreadPool(8, f"pair {number}"), threading.get_ident))
        await until(lambda: bool(pools._stock._idle))  # an answer may overtake its thread on the way back

    assert len(threads) < 100  # one; others where the stock held some of earlier tests


async def test_an_idle_thread_keeps_nothing_of_its_last_call(pool):
    """What a call was given is let go when the call has ended, not when its thread gets another."""

    class Payload:
        def __call__(self) -> None:
            pass

    payload = Payload()
    ref = weakref.ref(payload)
    await acall(pool, payload)
    del payload

    await until(lambda: ref() is None)


async def test_the_default_pool_of_the_loop_is_left_alone(blocker):
    """With every bridge full, `asyncio.to_thread` answers at once, for it has all its threads to itself."""
    pools = [ThreadPool(10, f"pair {number}") for number in range(10)]
    calls = [asyncio.create_task(acall(pool, blocker)) for pool in pools for _ in range(20)]
    await blocker.until_started(100)

    async with asyncio.timeout(SAFETY_NET):
        assert await asyncio.to_thread(lambda: "at once") == "at once"
    assert blocker.calls == 100
    blocker.go.set()
    await asyncio.gather(*calls)


def test_a_blocked_thread_does_not_keep_the_program_from_ending():
    """A program ends although a call that it has given up still sits in its thread."""
    printed = run_program("""
import asyncio, threading
from asyncify import dual

started = threading.Event()

@dual
def stuck(query):
    started.set()
    threading.Event().wait()

async def main():
    call = asyncio.create_task(stuck.acall("x"))
    await asyncio.to_thread(started.wait)
    call.cancel()

asyncio.run(main())
print("the end")
""")

    assert printed == "the end\n"


def test_a_forked_child_has_threads_of_its_own():
    """A pool that was full when the process was forked is empty in the child."""
    printed = run_program("""
import asyncio, os, threading
from contextvars import copy_context
from asyncify.pools import OnEnd, ThreadPool

pool = ThreadPool(1, "pair")
started, go = threading.Event(), threading.Event()

def stuck():
    started.set()
    go.wait()

async def call(work):
    return await pool.call(work, lambda error: None, copy_context())

blocked = threading.Thread(target=lambda: asyncio.run(call(stuck)))
blocked.start()
started.wait()
if os.fork() == 0:
    print("child", asyncio.run(call(lambda: "answered")), flush=True)
    os._exit(0)
os.wait()
go.set()
blocked.join()
print("parent", asyncio.run(call(lambda: "answered")))
""")

    assert printed == "child answered\nparent answered\n"


# --- threads: a stream ---


def count(events: list[Any], upto: int = 3) -> Iterator[int]:
    """Yield some numbers and note who asked."""
    try:
        for number in range(upto):
            events.append((number, threading.get_ident()))
            yield number
    finally:
        events.append(("closed", threading.get_ident()))


async def test_a_stream_yields_what_the_generator_does(pool):
    """Chunks come in order, and the stream ends with the generator."""
    async with astream(pool, count([])) as chunks:
        assert [chunk async for chunk in chunks] == [0, 1, 2]


async def test_a_generator_lives_in_one_thread(pool):
    """All of a generator's code runs in one thread, its end as well, as thread-bound clients need."""
    events: list[tuple[Any, int]] = []
    async with astream(pool, count(events)) as chunks:
        async for _ in chunks:
            await asyncio.gather(*(acall(pool, nothing) for _ in range(3)))

    assert len({thread for _, thread in events}) == 1
    assert threading.get_ident() not in {thread for _, thread in events}


async def test_a_generator_runs_only_when_it_is_asked(pool):
    """No chunk is made before its predecessor is taken."""
    events: list[Any] = []
    made = []
    async with astream(pool, count(events)) as chunks:
        async for _ in chunks:
            await acall(pool, nothing)
            made.append(len(events))

    assert made == [1, 2, 3]


async def test_a_stream_closed_early_closes_the_generator_first(pool):
    """When `aclose` returns, the generator's `finally` has run, in its own thread."""
    events: list[Any] = []
    async with astream(pool, count(events)) as chunks:
        await anext(chunks)

    assert [event for event, _ in events] == [0, "closed"]
    assert events[0][1] == events[1][1]


async def test_a_stream_whose_closing_is_cancelled_is_closed_by_its_thread(pool):
    """Also where the thread has not heard of the closing yet: anyio cancels again at each await."""
    events: list[Any] = []
    ended = threading.Event()
    counting = count(events)  # held, or it would be closed by being dropped
    stream = astream(pool, counting, lambda _: ended.set())
    chunks = await stream.__aenter__()
    await anext(chunks)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(10)  # the thread can't run before this one waits
    try:
        closing: Any = chunks.aclose()
        closing.send(None)
        with pytest.raises(asyncio.CancelledError):
            closing.throw(asyncio.CancelledError())
    finally:
        sys.setswitchinterval(interval)
    await asyncio.to_thread(ended.wait, 5)

    assert [event for event, _ in events] == [0, "closed"]
    assert events[0][1] == events[1][1]


async def test_a_cancelled_stream_leaves_the_generator_to_its_thread(pool, blocker):
    """The task is free at once; the thread closes the generator after the chunk that it is at."""
    ended = threading.Event()
    closed = threading.Event()

    def chunks() -> Iterator[str]:
        try:
            yield blocker()
        finally:
            closed.set()

    async def consume() -> None:
        async with astream(pool, chunks(), lambda _: ended.set()) as stream:
            await anext(stream)

    task = asyncio.create_task(consume())
    await blocker.until_started()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    before = (closed.is_set(), ended.is_set())
    blocker.go.set()

    assert await asyncio.to_thread(ended.wait, SAFETY_NET)
    assert closed.is_set()
    assert before == (False, False)


async def test_an_error_of_a_generator_ends_the_stream(pool):
    """The error comes where the chunk would have, with its traceback, and the stream has ended."""
    ended: list[str] = []

    def chunks() -> Iterator[int]:
        yield 1
        raise BoomError

    async with astream(pool, chunks(), lambda _: ended.append("ended")) as stream:
        first = await anext(stream)
        with pytest.raises(BoomError) as caught:
            await anext(stream)
        with pytest.raises(StopAsyncIteration):
            await anext(stream)

    assert first == 1
    await until(lambda: bool(ended))
    assert caught.traceback[-1].name == "chunks"


async def test_a_generator_keeps_its_context_from_chunk_to_chunk(pool):
    """What a generator sets in a context variable it finds there at its next chunk, and nobody else does."""

    def chunks() -> Iterator[str]:
        for _ in range(2):
            yield colour.get()
            colour.set("red")

    colour.set("blue")
    async with astream(pool, chunks()) as stream:
        seen = [chunk async for chunk in stream]

    assert seen == ["blue", "red"]
    assert colour.get() == "blue"


async def test_a_stream_cancelled_in_the_queue_takes_no_thread(blocker):
    """A stream that is given up before it has a thread gives its place back and never runs its generator."""
    one = ThreadPool(1, "one")
    busy = asyncio.create_task(acall(one, blocker))
    await blocker.until_started()
    events: list[Any] = []
    ended = threading.Event()

    async def consume() -> None:
        async with astream(one, count(events), lambda _: ended.set()) as stream:
            await anext(stream)

    task = asyncio.create_task(consume())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    blocker.go.set()
    await busy

    assert await asyncio.to_thread(ended.wait, SAFETY_NET)
    assert events == []


async def test_when_the_system_has_no_thread_left_a_stream_says_so(pool, monkeypatch):
    """The error reaches the consumer, and leaves no place taken."""
    ended: list[str] = []

    def refuse(job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(pools._stock, "start", refuse)
    async with astream(pool, count([]), lambda _: ended.append("ended")) as stream:
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await anext(stream)

    assert ended == ["ended"]


# --- the loop: a thread waits for a coroutine ---


def run(loop: BackgroundLoop, call: Callable[[], Any]) -> Any:
    """Call as an entry does."""
    return loop.run(call, copy_context())


def test_a_coroutine_gives_its_result(loop):
    """What the coroutine returns on the loop is what the thread gets."""

    async def answer() -> int:
        return 42

    assert run(loop, answer) == 42


async def current_loop() -> asyncio.AbstractEventLoop:
    """Return the loop that this runs on."""
    return asyncio.get_running_loop()


def test_all_calls_share_one_loop(loop):
    """A client that is bound to its event loop lives on from call to call, whichever thread calls."""
    loops = [run(loop, current_loop) for _ in range(3)]
    thread = threading.Thread(target=lambda: loops.append(run(loop, current_loop)))
    thread.start()
    thread.join()

    assert len(set(map(id, loops))) == 1


def test_context_variables_are_carried_into_the_coroutine(loop):
    """The coroutine sees the caller's context variables, and what it sets stays its own."""

    async def paint() -> str:
        before = colour.get()
        colour.set("red")
        return before

    def caller() -> Any:
        colour.set("blue")
        return run(loop, paint), colour.get()

    assert copy_context().run(caller) == ("blue", "blue")


def test_an_error_of_a_coroutine_keeps_its_traceback(loop):
    """The line that raised is in the traceback that the thread sees."""
    with pytest.raises(BoomError) as caught:
        run(loop, afail)

    assert caught.traceback[-1].name == "afail"


def test_a_wrong_argument_raises_and_does_not_hang(loop):
    """An async function that can't even be called raises in the caller's thread."""

    async def fetch(query: str) -> str:
        return query

    with pytest.raises(TypeError, match="unexpected keyword argument 'queri'"):
        run(loop, partial(fetch, queri="x"))  # type: ignore[call-arg]  # that is the point


@pytest.mark.usefixtures("uncollected")
def test_nothing_keeps_the_error_of_a_coroutine_alive(loop):
    """When it has been handled, an error and all that its traceback holds are let go without a garbage collection."""

    def provoke() -> "weakref.ref[BoomError]":
        try:
            run(loop, afail)
        except BoomError as error:
            return weakref.ref(error)
        raise AssertionError

    error = provoke()
    wait_until(lambda: run(loop, current_loop) and error() is None)  # until the loop, too, has left the call


def test_a_coroutine_that_cancels_itself(loop):
    """Cancellation inside the coroutine comes out as cancellation, and the loop goes on."""

    async def cancel() -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(SAFETY_NET)

    with pytest.raises(asyncio.CancelledError):
        run(loop, cancel)
    assert run(loop, current_loop).is_running()


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("where", ["call", "task", "stream"])
def test_an_exit_in_a_coroutine_does_not_end_the_loop_of_all_others(loop, error, where):
    """What stops an event loop, as `sys.exit()` does, reaches its caller; the loop and the other calls go on."""
    started, go = threading.Event(), asyncio.Event()
    outcomes: list[str] = []

    async def other() -> str:
        started.set()
        await go.wait()
        return "goes on"

    async def leave() -> None:
        if where == "call":
            raise error
        task = asyncio.create_task(leave_in_a_task())
        await asyncio.wait([task])
        await task

    async def leave_in_a_task() -> None:
        raise error

    async def chunks() -> AsyncIterator[int]:
        raise error
        yield 1  # type: ignore[unreachable]  # it makes this a generator

    async def let_go() -> None:
        go.set()

    thread = threading.Thread(target=lambda: outcomes.append(run(loop, other)))
    thread.start()
    assert started.wait(SAFETY_NET)
    with pytest.raises(type(error)) as caught:
        list(loop.stream(chunks(), copy_context())) if where == "stream" else run(loop, leave)
    run(loop, let_go)
    thread.join(SAFETY_NET)

    assert caught.value is error
    assert outcomes == ["goes on"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Take Ctrl-C as a program in the foreground does; a shell has one in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupt() -> None:
    """Send the main thread what Ctrl-C sends it."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_cancels_the_coroutine_and_waits_for_its_end(loop):
    """Ctrl-C in the waiting thread reaches the coroutine, which ends before the interrupt goes on."""
    events: list[str] = []

    async def wait() -> None:
        interrupt()
        try:
            await asyncio.sleep(SAFETY_NET)
        finally:
            await asyncio.sleep(0)
            events.append("cleaned up")

    with pytest.raises(KeyboardInterrupt):
        run(loop, wait)

    assert events == ["cleaned up"]


def test_a_call_on_the_loops_own_thread_gets_another_loop(loop):
    """A coroutine on the loop that calls the sync side of a pair does not wait for itself."""

    async def outer() -> Any:
        return asyncio.get_running_loop(), run(loop, current_loop)

    mine, deeper = run(loop, outer)

    assert mine is not deeper


def test_calls_on_the_loops_thread_go_as_deep_as_they_like(loop):
    """A call that was made on the second loop gets a third: the first is held until it has ended."""

    async def call(depth: int) -> int:
        return 1 + run(loop, partial(call, depth - 1)) if depth else 0

    depths: list[int] = []
    thread = threading.Thread(target=lambda: depths.append(run(loop, partial(call, 5))), daemon=True)
    thread.start()
    thread.join(SAFETY_NET)

    assert depths == [5]


HOLDING = """
import asyncio
from asyncify import Dual, each
from langchain_core.callbacks import BaseCallbackHandler

async def double(value):
    return value * 2

pair = Dual(double)
both = pair | {"a": pair, "b": pair}
in_a_thread = Dual(lambda value: pair.invoke(value))

async def to_a_thread(value):
    return await in_a_thread.ainvoke(value), await asyncio.to_thread(pair.invoke, value)

async def hold(way):
    if way == "batch":
        return pair.batch([1, 2])
    if way == "each":
        return list(each(pair, [1, 2]))
    if way == "each via async":
        return list(each(pair, [1, 2], via="async"))
    if way == "each via async, in threads":
        return list(each(in_a_thread, [1, 2], via="async"))
    if way == "dict":
        return both.invoke(1)
    if way == "dict, observed":
        return both.invoke(1, {"callbacks": [BaseCallbackHandler()]})
    if way == "dict, bounded":
        return both.invoke(1, {"max_concurrency": 1})
    if way == "dict, streamed":
        return sorted(map(str, both.stream(1)))
    if way == "there and back":
        return Dual(to_a_thread).invoke(1)
    return Dual(hold).batch(["batch", "each", "dict"])

print(Dual(hold).call(WAY))
"""


@pytest.mark.parametrize(
    ("way", "printed"),
    [
        ("batch", "[2, 4]"),
        ("each", "[2, 4]"),
        ("each via async", "[2, 4]"),
        ("each via async, in threads", "[2, 4]"),
        ("dict", "{'a': 4, 'b': 4}"),
        ("dict, observed", "{'a': 4, 'b': 4}"),
        ("dict, bounded", "{'a': 4, 'b': 4}"),
        ("dict, streamed", "[\"{'a': 4}\", \"{'b': 4}\"]"),
        ("there and back", "(2, 2)"),
        ("nested", "[[2, 4], [2, 4], {'a': 4, 'b': 4}]"),
    ],
)
def test_the_loop_may_be_held_for_threads_that_need_a_loop(way, printed):
    """An async side on the loop may wait for threads that call an async side: those get another loop."""
    assert run_program(HOLDING.replace("WAY", repr(way))) == f"{printed}\n"


async def test_a_call_on_the_thread_of_a_running_loop(loop):
    """Sync code that is called on somebody's event loop can call the sync side of an async function."""
    assert run(loop, current_loop) is not asyncio.get_running_loop()


def test_closing_the_loop_cancels_what_runs_and_closes_its_generators():
    """What still runs is cancelled, async generators are closed, and the thread has ended."""
    loop = BackgroundLoop()
    events: list[str] = []
    kept: list[Any] = []

    async def chunks() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            events.append("generator closed")

    async def leave_behind() -> threading.Thread:
        async def linger() -> None:
            try:
                await asyncio.sleep(SAFETY_NET)
            finally:
                events.append("task cancelled")

        kept.append(asyncio.create_task(linger()))
        kept.append(chunks())
        await anext(kept[1])
        return threading.current_thread()

    thread = run(loop, leave_behind)
    loop.close()

    assert events == ["task cancelled", "generator closed"]
    assert not thread.is_alive()


def test_closing_the_loop_cancels_the_calls_of_other_threads():
    """A thread that waits for a coroutine when the loop is closed is let go."""
    loop = BackgroundLoop()
    started = threading.Event()
    outcomes: list[type[BaseException]] = []

    async def wait() -> None:
        started.set()
        await asyncio.sleep(SAFETY_NET)

    def caller() -> None:
        try:
            run(loop, wait)
        except asyncio.CancelledError as error:
            outcomes.append(type(error))

    thread = threading.Thread(target=caller)
    thread.start()
    assert started.wait(SAFETY_NET)
    loop.close()
    thread.join(SAFETY_NET)

    assert outcomes == [asyncio.CancelledError]


def test_a_closed_loop_is_started_again_by_the_next_call(loop):
    """Closing is no end: a call afterwards finds a new loop."""
    first = run(loop, current_loop)
    loop.close()

    assert run(loop, current_loop) is not first


def test_closing_a_loop_that_was_never_used():
    """There is nothing to close, and no thread is started for it."""
    before = threading.active_count()
    BackgroundLoop().close()

    assert threading.active_count() == before


def test_a_loop_that_can_not_be_made_says_so(loop, monkeypatch):
    """The error is raised where the loop is needed, and the next call tries again."""

    def refuse(runner: asyncio.Runner) -> None:
        raise OSError("too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(asyncio.Runner, "get_loop", refuse)
        with pytest.raises(OSError, match="too many open files"):
            run(loop, current_loop)

    assert run(loop, current_loop).is_running()


def test_a_forked_child_starts_a_loop_of_its_own():
    """The loop's thread does not live in a forked child, so a call there starts another; the parent's goes on."""
    printed = run_program("""
import asyncio, os
from asyncify import dual

@dual
async def fetch(query):
    await asyncio.sleep(0)
    return query

def deep(query):
    return fetch.call(query)

fetch.call("before")
if os.fork() == 0:
    print("child", fetch.call("answered"), flush=True)
    if os.fork() == 0:
        print("grandchild", fetch.call("answered"), flush=True)
        raise SystemExit
    os.wait()
    raise SystemExit
os.wait()
print("parent", fetch.call("answered"))
""")

    assert printed == "child answered\ngrandchild answered\nparent answered\n"


def test_the_loop_is_closed_at_the_end_of_the_program():
    """Async generators that are still open at exit are closed on the loop, where their clients live."""
    printed = run_program("""
import asyncio
from asyncify import dual

async def chunks():
    try:
        yield 1
    finally:
        await asyncio.sleep(0)
        print("closed")

opened = []

@dual
async def open_one(query):
    opened.append(chunks())
    await anext(opened[0])

open_one.call("x")
print("the end")
""")

    assert printed == "the end\nclosed\n"


def test_a_blocked_loop_does_not_keep_the_program_from_ending():
    """A program ends although a coroutine blocks the background loop; it waits for a moment and no longer."""
    printed = run_program("""
import asyncio, threading
from asyncify import background, dual

background._CLOSE_SECONDS = 0.1
started = threading.Event()

@dual
async def stuck(query):
    started.set()
    threading.Event().wait()

threading.Thread(target=stuck.call, args=("x",), daemon=True).start()
started.wait()
print("the end")
""")

    assert printed == "the end\n"


STILL_OPEN = """
import asyncio, time
from asyncify import Dual, each

async def count(upto):
    for number in range(upto):
        yield number

stream = {
    "each": lambda: each(Dual(time.sleep), [0, 1000]),
    "each via async": lambda: each(Dual(asyncio.sleep), [0, 1000], via="async"),
    "batch_as_completed": lambda: iter(Dual(time.sleep).batch_as_completed([0, 1000])),
    "call": lambda: Dual(count).call(2),
}[WAY]()
next(stream)
print("the end")
"""


@pytest.mark.parametrize("way", ["each", "each via async", "batch_as_completed", "call"])
def test_an_open_stream_does_not_keep_the_program_from_ending(way):
    """A program ends, and says nothing, although a stream of results was left open with calls in flight."""
    assert run_program(STILL_OPEN.replace("WAY", repr(way))) == "the end\n"


FORKED = """
import asyncio, os, sys, threading
from asyncify import Dual, each

go = threading.Event()

def wait(value):
    return value if not value or go.wait() else None

async def wait_async(value):
    while value and not go.is_set():
        await asyncio.sleep(0.001)
    return value

async def count(upto):
    for number in range(upto):
        yield number

pair = Dual(wait, wait_async, name="wait")
checkpoint = os.path.join(sys.argv[1], "run.sqlite")
stream = {
    "each": lambda: each(pair, range(3), checkpoint=checkpoint),
    "each via async": lambda: each(pair, range(3), via="async", checkpoint=checkpoint),
    "batch_as_completed": lambda: iter(pair.batch_as_completed([0, 1, 2])),
    "call": lambda: Dual(count).call(3),
}[WAY]()
for number, output in enumerate(stream):
    if number == 0 and os.fork() == 0:
        stream.close()
        sys.exit(3)
    go.set()
print(os.waitstatus_to_exitcode(os.wait()[1]), number)
"""


@pytest.mark.parametrize("way", ["each", "each via async", "batch_as_completed", "call"])
def test_a_child_that_is_forked_within_a_stream_can_leave_it(tmp_path, way):
    """Nothing of the stream runs in the child, so it waits for nothing; the parent's stream goes on."""
    assert run_program(FORKED.replace("WAY", repr(way)), str(tmp_path)) == "3 2\n"
    assert len(list(tmp_path.iterdir())) == way.startswith("each")  # a file that was closed has no log beside it


# --- the loop: a stream ---


async def acount(events: list[Any], upto: int = 3) -> AsyncIterator[int]:
    """Yield some numbers and note in which task."""
    try:
        for number in range(upto):
            events.append((number, asyncio.current_task()))
            yield number
    finally:
        await asyncio.sleep(0)
        events.append(("closed", asyncio.current_task()))


def stream(loop: BackgroundLoop, chunks: Any) -> Any:
    """Stream as an entry does."""
    return closing(loop.stream(chunks, copy_context()))


def test_a_sync_stream_yields_what_the_async_generator_does(loop):
    """Chunks come in order, and the stream ends with the generator."""
    with stream(loop, acount([])) as chunks:
        assert list(chunks) == [0, 1, 2]


def test_an_async_generator_lives_in_one_task(loop):
    """All of its code runs in one task, as timeouts and task groups in it need."""
    events: list[Any] = []
    with stream(loop, acount(events)) as chunks:
        list(chunks)

    assert len({task for _, task in events}) == 1


def test_a_timeout_around_a_yield_fires(loop):
    """A timeout in an async generator belongs to its task, and fires also while the consumer has the chunk."""

    async def chunks(fired: threading.Event) -> AsyncIterator[int]:
        try:
            async with asyncio.timeout(0):
                yield 1
                await asyncio.sleep(SAFETY_NET)
        finally:
            fired.set()

    fired = threading.Event()
    with stream(loop, chunks(fired)) as seen:
        first = next(seen)
        fired_early = fired.wait(SAFETY_NET)
        with pytest.raises(TimeoutError):
            next(seen)

    assert (first, fired_early) == (1, True)


def test_a_task_group_within_an_async_generator(loop):
    """A failed child ends the generator's task group, and the error reaches the consumer at its next chunk."""

    async def chunks() -> AsyncIterator[int]:
        async with asyncio.TaskGroup() as group:
            group.create_task(afail())
            yield 1
            await asyncio.sleep(SAFETY_NET)

    with stream(loop, chunks()) as seen:
        first = next(seen)
        with pytest.raises(ExceptionGroup) as caught:
            next(seen)
        rest = list(seen)

    assert (first, rest) == (1, [])
    assert isinstance(caught.value.exceptions[0], BoomError)


def test_a_stream_on_a_loop_that_is_closed():
    """Closing the loop closes the generator; who asks for another chunk is told that it was cancelled."""
    loop = BackgroundLoop()
    events: list[Any] = []
    with stream(loop, acount(events)) as chunks:
        next(chunks)
        loop.close()
        with pytest.raises((asyncio.CancelledError, RuntimeError)):
            next(chunks)

    assert [event for event, _ in events] == [0, "closed"]


def test_an_async_generator_runs_only_when_it_is_asked(loop):
    """No chunk is made before its predecessor is taken."""
    events: list[Any] = []
    made = []
    with stream(loop, acount(events)) as chunks:
        for _ in chunks:
            run(loop, current_loop)
            made.append(len(events))

    assert made == [1, 2, 3]


def test_a_sync_stream_closed_early_closes_the_async_generator_first(loop):
    """When `close` returns, the generator's `finally` has run, its awaits included."""
    events: list[Any] = []
    with stream(loop, acount(events)) as chunks:
        next(chunks)

    assert [event for event, _ in events] == [0, "closed"]


def test_an_error_of_an_async_generator_ends_the_sync_stream(loop):
    """The error comes where the chunk would have, with its traceback, and the stream has ended."""

    async def chunks() -> AsyncIterator[int]:
        yield 1
        raise BoomError

    with stream(loop, chunks()) as seen:
        first = next(seen)
        with pytest.raises(BoomError) as caught:
            next(seen)
        rest = list(seen)

    assert (first, rest) == (1, [])
    assert caught.traceback[-1].name == "chunks"


@pytest.mark.usefixtures("uncollected")
def test_nothing_keeps_the_error_of_an_async_generator_alive(loop):
    """When it has been handled, an error and all that its traceback holds are let go without a garbage collection."""

    async def chunks() -> AsyncIterator[int]:
        raise BoomError
        yield  # type: ignore[unreachable]  # it makes this a generator

    def provoke() -> "weakref.ref[BoomError]":
        try:
            with stream(loop, chunks()) as seen:
                list(seen)
        except BoomError as error:
            return weakref.ref(error)
        raise AssertionError

    error = provoke()
    wait_until(lambda: run(loop, current_loop) and error() is None)  # until the loop, too, has left the call


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_cancels_the_async_generator(loop):
    """Ctrl-C while a chunk is awaited reaches the generator, which ends before the interrupt goes on."""
    events: list[str] = []

    async def chunks() -> AsyncIterator[int]:
        try:
            interrupt()
            await asyncio.sleep(SAFETY_NET)
            yield 1
        finally:
            events.append("cleaned up")

    with pytest.raises(KeyboardInterrupt), stream(loop, chunks()) as seen:
        next(seen)

    assert events == ["cleaned up"]


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("at_end", [False, True])
def test_an_interrupt_during_a_step_that_computes_is_an_interrupt(loop, *, at_end):
    """The generator hears of it behind that step, or not any more, and no other error takes its place."""

    async def chunks() -> AsyncIterator[int]:
        if at_end:
            yield 1
        interrupt()
        time.sleep(0.1)  # noqa: ASYNC251  (this is what computes)
        if not at_end:
            yield 1

    with pytest.raises(KeyboardInterrupt), stream(loop, chunks()) as seen:
        list(seen)


def test_a_source_that_has_come_to_its_end_can_be_cancelled(loop):
    """There is no generator any more that could hear of it."""

    async def chunks() -> AsyncGenerator[int]:
        yield 1

    async def serve() -> bool:
        source = Source(chunks())
        serving = asyncio.ensure_future(source.serve())
        for _ in range(2):
            source.ask(answer := asyncio.get_running_loop().create_future())
            await answer
        serving.cancel()
        await asyncio.wait([serving], timeout=SAFETY_NET)
        return serving.cancelled()

    assert run(loop, serve)


def test_an_error_of_the_consumer_that_looks_like_the_end(loop):
    """A `StopAsyncIteration` thrown in by the consumer is an error of its own, not the end of the stream."""
    with stream(loop, acount([])) as chunks:
        next(chunks)
        with pytest.raises(StopAsyncIteration):
            chunks.throw(StopAsyncIteration)


def test_a_stream_that_is_dropped_on_the_loop_does_not_block_it(loop):
    """When the last reference to an open stream dies on the loop's own thread, its generator is closed there."""
    events: list[Any] = []
    closed = threading.Event()

    async def chunks() -> AsyncIterator[int]:
        try:
            yield 1
        finally:
            events.append("closed")
            closed.set()

    held = [loop.stream(chunks(), copy_context())]
    next(held[0])

    async def drop() -> None:
        held.clear()

    run(loop, drop)

    assert closed.wait(SAFETY_NET)
    with contextlib.suppress(IndexError):
        held.pop()
