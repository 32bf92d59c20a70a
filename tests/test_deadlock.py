"""A pair that waits for itself: told when it is certain, through every way that a pair can call a pair."""

import asyncio
import contextvars
import gc
import os
import queue
import threading
import time
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import RunnableLambda

from asyncify import DeadlockError, Dual, Limiter, LimitTimeout, concurrency, dual
from asyncify.deadlock.holds import Link
from asyncify.testing import FakeClock
from tests.waiting import SAFETY_NET, timeout_once, until, wait_until

LIMIT = 2
"""Calls at once; a call nested more deeply than that waits for itself."""


def _ancestors() -> tuple[Any, Any]:
    """Return a pair that calls itself so many times more, by `invoke` and by `ainvoke`, and its limiter."""
    limiter = Limiter(limit=LIMIT, name="family")

    async def adescend(generations: int) -> int:
        return await pair.ainvoke(generations - 1) + 1 if generations else 0

    def descend(generations: int) -> int:
        return pair.invoke(generations - 1) + 1 if generations else 0

    pair = concurrency(limiter=limiter)(dual(sync=descend, async_=adescend))
    return pair, limiter


def test_a_nested_invoke_that_fits_is_admitted() -> None:
    """As many generations as there are slots wait for nobody."""
    pair, limiter = _ancestors()

    assert pair.invoke(LIMIT - 1) == LIMIT - 1
    assert limiter.stats().in_flight == 0


async def test_a_nested_ainvoke_that_fits_is_admitted() -> None:
    """The async twin."""
    pair, limiter = _ancestors()

    assert await pair.ainvoke(LIMIT - 1) == LIMIT - 1
    assert limiter.stats().in_flight == 0


def test_a_nested_invoke_that_waits_for_itself_is_told() -> None:
    """The call that finds all slots held by its own callers gets the error, and the slots come back."""
    pair, limiter = _ancestors()
    with pytest.raises(DeadlockError, match=r"limiter family: all slots \(2\)"):
        pair.invoke(LIMIT)

    assert limiter.stats().in_flight == 0


async def test_a_nested_ainvoke_that_waits_for_itself_is_told() -> None:
    """The async twin: each call is a task of its own, and its caller waits for it and for nothing else."""
    pair, limiter = _ancestors()
    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError, match=r"limiter family: all slots \(2\)"):
            await pair.ainvoke(LIMIT)

    assert limiter.stats().in_flight == 0


async def test_an_ainvoke_through_a_pipe_that_waits_for_itself_is_told() -> None:
    """A pipe of pairs awaits its steps one by one, so a step that waits for the pipe's caller is certain."""
    limiter = Limiter(limit=1)

    async def pass_on(word: str) -> str:
        return word

    async def call_pipe(word: str) -> str:
        return str(await pipe.ainvoke(word))

    inner: Any = concurrency(limiter=limiter)(pass_on)
    pipe: Any = dual(str.strip, name="strip") | inner
    outer: Any = concurrency(limiter=limiter)(call_pipe)
    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError):
            await outer.ainvoke("a")

    assert limiter.stats().in_flight == 0


BRIDGES: dict[str, Callable[[Any], Any]] = {
    "a thread's invoke": lambda pair: pair.sync_calls_sync,
    "invoke on the event loop": lambda pair: pair.async_calls_sync,
}


class _Mixed:
    """Functions with one side, that call each other over the bridges."""

    def __init__(self, limiter: Limiter) -> None:
        def sync_calls_sync(generations: int) -> int:
            return int(self.sync_calls_sync.invoke(generations - 1)) if generations else 0

        async def async_calls_sync(generations: int) -> int:
            return int(self.async_calls_sync.invoke(generations - 1)) if generations else 0

        limited = concurrency(limiter=limiter)
        self.sync_calls_sync: Any = limited(sync_calls_sync)
        self.async_calls_sync: Any = limited(async_calls_sync)


@pytest.mark.parametrize("bridge", BRIDGES)
async def test_a_call_over_a_bridge_that_waits_for_itself_is_told(bridge: str) -> None:
    """Who waits for a bridged call waits for nothing else, in whichever thread it runs."""
    limiter = Limiter(limit=1)
    pair = BRIDGES[bridge](_Mixed(limiter))
    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError):
            await pair.ainvoke(1)

    assert limiter.stats().in_flight == 0


class _Watcher(BaseCallbackHandler):
    """Watches, so that a call is a run of LangChain's."""


def _first_of_stream(inner: Any) -> Any:
    return next(inner.stream(1))


CALLS: dict[str, Callable[[Any], Any]] = {
    "call": lambda inner: inner.call(1),
    "invoke": lambda inner: inner.invoke(1),
    "bound": lambda inner: inner.bind().invoke(1),
    "pipe": lambda inner: (inner | inner).invoke(1),
    "between": lambda inner: Dual(inner.invoke).invoke(1),
    "stream": _first_of_stream,
    "batch of one": lambda inner: inner.batch([1]),
    "observed": lambda inner: inner.invoke(1, {"callbacks": [_Watcher()]}),
    "lambda": lambda inner: RunnableLambda(inner.invoke).invoke(1),
    "pipe of LangChain's": lambda inner: (RunnableLambda(abs) | inner).invoke(1),
    "context": lambda inner: contextvars.Context().run(inner.call, 1),
    "bridged between": lambda inner: _awaiting(inner).invoke(1),
}
"""Ways to wait for a pair in a thread."""


def _awaiting(inner: Any) -> Any:
    """Return a pair whose function awaits another one."""

    async def wait(value: int) -> int:
        result: int = await inner.acall(value)
        return result

    return dual(wait)


def _told(run: Callable[[], Any]) -> bool:
    """Tell whether this call, in a thread of its own, ends with a DeadlockError; it may also hang."""
    errors: list[BaseException] = []

    def guarded() -> None:
        try:
            run()
        except DeadlockError as error:
            errors.append(error)

    thread = threading.Thread(target=guarded, daemon=True)
    thread.start()
    thread.join(SAFETY_NET)
    return len(errors) == 1


def _inner(limiter: Limiter) -> Any:
    @concurrency(limiter=limiter)
    @dual
    def inner(value: int) -> int:
        return value

    return inner


@pytest.mark.parametrize("way", CALLS)
def test_a_sync_call_within_a_call_over_a_bridge_that_waits_for_itself_is_told(way: str) -> None:
    """Whoever invokes the outer one holds its slot, in another thread; and the inner one holds up that one's loop."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> int:
        result: int = CALLS[way](inner)
        return result

    assert _told(lambda: outer.invoke(1))
    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("way", CALLS)
def test_a_sync_call_within_a_stream_over_a_bridge_that_waits_for_itself_is_told(way: str) -> None:
    """Who reads the stream waits for the chunk."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> AsyncIterator[int]:
        yield value
        yield CALLS[way](inner)

    assert _told(lambda: list(outer.stream(1)))
    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("way", CALLS)
@pytest.mark.parametrize("kind", ["function", "generator", "executor"])
async def test_a_sync_call_within_a_call_in_a_thread_that_waits_for_itself_is_told(way: str, kind: str) -> None:
    """The task that holds the slot waits for that thread; what the thread calls may run in another context."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @dual(name=f"{way} in a function")
    def between(value: int) -> int:
        result: int = CALLS[way](inner)
        return result

    @dual(name=f"{way} in a generator")
    def chunks(value: int) -> Iterator[int]:
        yield value
        yield CALLS[way](inner)

    with ThreadPoolExecutor(1) as threads:
        by_executor = dual(between.func, name=f"{way} in an executor", bridge=threads)
        outer: Any = {"function": between, "generator": chunks, "executor": by_executor}[kind]
        async with asyncio.timeout(SAFETY_NET), limiter:
            with pytest.raises(DeadlockError, match="held by calls that wait for a slot of this very limiter"):
                await _last(outer.astream(1))

    assert limiter.stats().in_flight == 0


async def _last(chunks: AsyncIterator[Any]) -> Any:
    return [chunk async for chunk in chunks][-1]


AWAITED: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "acall": lambda inner: inner.acall(1),
    "ainvoke": lambda inner: inner.ainvoke(1),
    "bound": lambda inner: inner.bind().ainvoke(1),
    "pipe": lambda inner: (inner | inner).ainvoke(1),
    "stream": lambda inner: _last(inner.astream(1)),
    "stream of a pipe": lambda inner: _last((inner | inner).astream(1)),
    "observed": lambda inner: inner.ainvoke(1, {"callbacks": [_Watcher()]}),
    "observed pipe": lambda inner: (inner | inner).ainvoke(1, {"callbacks": [_Watcher()]}),
    "observed stream": lambda inner: _last(inner.astream(1, {"callbacks": [_Watcher()]})),
    "lambda": lambda inner: RunnableLambda(inner.ainvoke).ainvoke(1),
    "pipe of LangChain's": lambda inner: (RunnableLambda(abs) | inner).ainvoke(1),
    "retry": lambda inner: inner.with_retry(stop_after_attempt=1).ainvoke(1),
    "task": lambda inner: asyncio.create_task(inner.acall(1)),
}
"""Ways to wait for a pair, and for nothing else, in a task."""


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in ("async", "bridged") for way in AWAITED]
    + [("generator", way) for way in AWAITED if way not in ("acall", "task")],
)
async def test_an_async_call_that_waits_for_itself_is_told(kind: str, way: str) -> None:
    """However the pair is run, the task that holds the slot awaits it, or a task that does."""
    limiter = Limiter(limit=1)

    async def echo(value: int) -> int:
        return value

    async def echoes(value: int) -> AsyncIterator[int]:
        yield value

    made: dict[str, Any] = {"async": echo, "bridged": abs, "generator": echoes}
    inner = concurrency(limiter=limiter)(dual(made[kind], name=f"{way} {kind}"))

    async with asyncio.timeout(SAFETY_NET), limiter:
        with pytest.raises(DeadlockError):
            await AWAITED[way](inner)

    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("way", AWAITED)
def test_an_async_call_within_a_call_over_a_bridge_that_waits_for_itself_is_told(way: str) -> None:
    """The thread that holds the slot waits for the task that awaits the pair."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> int:
        result: int = await AWAITED[way](inner)
        return result

    assert _told(lambda: outer.invoke(1))
    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("config", [{}, {"callbacks": [_Watcher()]}], ids=["unobserved", "observed"])
@pytest.mark.parametrize("way", AWAITED)
async def test_an_async_call_within_a_stream_that_waits_for_itself_is_told(way: str, config: Any) -> None:
    """A stream takes its steps in a context of its own, within the task that reads it."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> AsyncIterator[int]:
        yield value
        yield await AWAITED[way](inner)

    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError):
            await _last(outer.astream(1, config))

    assert limiter.stats().in_flight == 0


def test_a_sync_call_that_holds_up_the_loop_of_a_call_over_a_bridge_is_told() -> None:
    """A stranger to the call inside may hold up the loop that it needs."""
    limiter = Limiter(limit=1, name="quotes")
    inner = _inner(limiter)
    is_in, has_gone = threading.Event(), threading.Event()

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> int:
        is_in.set()
        await until(has_gone.is_set)
        return value

    @dual
    async def stranger(value: int) -> int:
        return int(inner.invoke(value))

    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(outer.invoke, 1)
        assert is_in.wait(SAFETY_NET)
        with pytest.raises(DeadlockError, match="run on the event loop which this one holds up while it waits"):
            stranger.invoke(2)
        has_gone.set()

        assert result.result(SAFETY_NET) == 1
    assert limiter.stats().in_flight == 0


def test_the_reader_of_a_stream_over_a_bridge_waits_only_for_its_chunks() -> None:
    """In between it holds the slot and goes on: a sync call on that loop has only to wait for it."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> AsyncIterator[int]:
        yield value
        yield value

    @dual
    async def stranger(value: int) -> int:
        return int(inner.invoke(value))

    chunks = outer.stream(1)
    assert next(chunks) == 1
    with ThreadPoolExecutor(1) as threads:
        result = threads.submit(stranger.invoke, 2)
        wait_until(lambda: limiter.stats().waiting == 1)
        limiter.resize(limit=2)

        assert result.result(SAFETY_NET) == 2
    assert list(chunks) == [1]
    assert limiter.stats().in_flight == 0


def test_a_call_over_a_bridge_that_has_ended_is_no_proof() -> None:
    """Who waited for it goes on, and may end its own call, while tasks that it has left behind wait on its loop."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    results: queue.SimpleQueue[int] = queue.SimpleQueue()
    go_on = threading.Event()

    async def left_behind() -> None:
        await until(go_on.is_set)
        results.put(inner.invoke(3))

    tasks: set[Any] = set()

    @dual
    async def outer(value: int) -> int:
        tasks.add(asyncio.create_task(left_behind()))
        return value

    with limiter:
        assert outer.invoke(1) == 1
        go_on.set()
        wait_until(lambda: limiter.stats().waiting == 1)
    assert results.get(timeout=SAFETY_NET) == 3


def test_a_sync_call_within_a_call_over_a_bridge_that_has_a_slot_is_admitted() -> None:
    """With one more slot nothing waits."""
    limiter = Limiter(limit=2)

    @concurrency(limiter=limiter)
    @dual
    def inner(value: int) -> int:
        return value + 1

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> int:
        return inner.invoke(value)

    assert outer.invoke(1) == 2
    assert outer.batch([1, 2, 3], {"max_concurrency": 1}) == [2, 3, 4]
    assert limiter.stats().in_flight == 0


async def test_a_call_left_in_the_background_is_no_proof() -> None:
    """A task that a call has started, and does not wait for, has inherited its context, but holds it up in nothing."""
    limiter = Limiter(limit=1)
    started: list[asyncio.Task[str]] = []

    async def pass_on(word: str) -> str:
        return word

    inner: Any = concurrency(limiter=limiter)(pass_on)

    async def leave_behind(word: str) -> str:
        started.append(asyncio.create_task(inner.ainvoke(word)))
        while not limiter.stats().waiting:  # noqa: ASYNC110  (a limiter sets no event)
            await asyncio.sleep(0)
        return word

    outer: Any = concurrency(limiter=limiter)(leave_behind)
    async with asyncio.timeout(SAFETY_NET):
        assert await outer.ainvoke("a") == "a"
        assert await started[0] == "a"


class _Crowded:
    """Two slots, and calls that hold them until they are told to go: on the event loop, in threads, in an executor."""

    def __init__(self) -> None:
        self.limiter = Limiter(limit=2, name="crowded")
        self.may_go = threading.Event()

        async def arun(word: str) -> str:
            while not self.may_go.is_set():  # noqa: ASYNC110  (another thread may set it)
                await asyncio.sleep(0.001)
            return word

        def run(word: str) -> str:
            self.may_go.wait(SAFETY_NET)
            return word

        def pass_on(word: str) -> str:
            return word

        limited = concurrency(limiter=self.limiter)
        self.on_the_loop: Any = limited(arun)
        self.in_threads: Any = limited(run)
        self.executor = ThreadPoolExecutor(2)
        self.by_an_executor: Any = limited(dual(run, name="by_an_executor", bridge=self.executor))
        self.quick: Any = limited(pass_on)

    async def fill(self, *pairs: Any) -> list[asyncio.Task[str]]:
        """Let one call of each take a slot."""
        tasks = [asyncio.create_task(pair.acall("a")) for pair in pairs]
        while self.limiter.stats().in_flight < len(pairs):  # noqa: ASYNC110  (a limiter sets no event)
            await asyncio.sleep(0)
        return tasks


async def test_an_invoke_that_holds_up_all_who_are_inside_is_told() -> None:
    """A sync call on the event loop, whose tasks hold all slots, would wait for ever: not one of them can go on."""
    crowd = _Crowded()
    tasks = await crowd.fill(crowd.on_the_loop, crowd.on_the_loop)
    with pytest.raises(DeadlockError, match=r"crowded: all slots \(2\) .* await the async side: ainvoke or acall\.$"):
        crowd.quick.invoke("b")
    crowd.may_go.set()

    assert await asyncio.gather(*tasks) == ["a", "a"]
    assert crowd.limiter.stats().in_flight == 0


@pytest.mark.parametrize("elsewhere", ["in_threads", "by_an_executor"])
async def test_an_invoke_on_an_event_loop_waits_for_those_who_are_elsewhere(elsewhere: str) -> None:
    """What runs in a thread goes on while the event loop is held, so its slot comes free."""
    crowd = _Crowded()
    tasks = await crowd.fill(crowd.on_the_loop, getattr(crowd, elsewhere))

    def let_go() -> None:
        while not crowd.limiter.stats().waiting:
            time.sleep(0.001)
        crowd.may_go.set()

    other = threading.Thread(target=let_go)
    other.start()
    assert crowd.quick.invoke("b") == "b"
    other.join()
    assert await asyncio.gather(*tasks) == ["a", "a"]
    crowd.executor.shutdown()


async def test_an_invoke_on_another_event_loop_is_no_proof() -> None:
    """Tasks of a loop in another thread go on, whatever this one does."""
    crowd = _Crowded()
    other = threading.Thread(target=lambda: asyncio.run(fill_and_wait()))

    async def fill_and_wait() -> None:
        tasks = await crowd.fill(crowd.on_the_loop, crowd.on_the_loop)
        while not crowd.limiter.stats().waiting:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        crowd.may_go.set()
        await asyncio.gather(*tasks)

    other.start()
    while crowd.limiter.stats().in_flight < 2:  # noqa: ASYNC110
        await asyncio.sleep(0.001)

    assert crowd.quick.invoke("b") == "b"
    other.join()


class _Bridged:
    """Pairs without a limit and without a sync side, that wait for a call: on a loop, or in a thread, of their own."""

    def __init__(self, quick: Any) -> None:
        @dual(name="function")
        async def function(word: str) -> str:
            return str(await quick.acall(word))

        @dual(name="generator")
        async def generator(word: str) -> AsyncIterator[str]:
            yield await quick.acall(word)

        @dual(name="in_thread")
        def in_thread(word: str) -> str:
            return str(quick.call(word))

        @dual(name="by_way_of_a_thread")
        async def by_way_of_a_thread(word: str) -> str:
            return await in_thread.acall(word)

        self.ways: dict[str, Callable[[str], Any]] = {
            "function": function.invoke,
            "generator": lambda word: next(generator.stream(word)),
            "thread": by_way_of_a_thread.invoke,
            "pipe": (function | in_thread).invoke,
        }


@pytest.mark.parametrize("way", ["function", "generator", "thread", "pipe"])
async def test_an_invoke_over_a_bridge_that_holds_up_all_who_are_inside_is_told(way: str) -> None:
    """It waits for another loop, which waits for tasks of the loop that it holds up: not one of them can go on."""
    crowd = _Crowded()
    tasks = await crowd.fill(crowd.on_the_loop, crowd.on_the_loop)
    with pytest.raises(DeadlockError, match=r"all slots \(2\) .* which this one holds up .* ainvoke or acall\.$"):
        _Bridged(crowd.quick).ways[way]("b")
    crowd.may_go.set()

    assert await asyncio.gather(*tasks) == ["a", "a"]
    assert _Bridged(crowd.quick).ways[way]("b") == "b"
    assert crowd.limiter.stats().in_flight == 0


@pytest.mark.parametrize("way", ["function", "generator", "thread", "pipe"])
async def test_an_invoke_over_a_bridge_waits_for_those_who_are_elsewhere(way: str) -> None:
    """What runs in a thread goes on while the event loop is held, so its slot comes free."""
    crowd = _Crowded()
    tasks = await crowd.fill(crowd.on_the_loop, crowd.in_threads)

    def let_go() -> None:
        wait_until(lambda: crowd.limiter.stats().waiting == 1)
        crowd.may_go.set()

    other = threading.Thread(target=let_go)
    other.start()
    assert _Bridged(crowd.quick).ways[way]("b") == "b"
    other.join()
    assert await asyncio.gather(*tasks) == ["a", "a"]


async def test_what_an_invoke_over_a_bridge_has_left_running_is_no_proof() -> None:
    """It holds up nobody any more."""
    crowd = _Crowded()
    left: list[asyncio.Task[str]] = []

    @dual
    async def leave(word: str) -> str:
        async def later() -> str:
            await until(gone.is_set)
            return str(await crowd.quick.acall(word))

        left.append(asyncio.create_task(later()))
        return word

    gone = threading.Event()
    tasks = await crowd.fill(crowd.on_the_loop, crowd.on_the_loop)
    leave.invoke("b")
    gone.set()
    await until(lambda: crowd.limiter.stats().waiting == 1)
    crowd.may_go.set()

    assert await asyncio.gather(*tasks) == ["a", "a"]
    await until(left[0].done)
    assert left[0].result() == "b"


class _Nesting:
    """A call that asks for a second slot, within its first, when it is told to."""

    def __init__(self, limiter: Limiter) -> None:
        self.is_in, self.may_nest = threading.Event(), threading.Event()
        self._limiter = limiter

    def run(self) -> str:
        """Make the call, in this thread."""
        with self._limiter:
            self.is_in.set()
            assert self.may_nest.wait(SAFETY_NET)
            with self._limiter:
                return "in"


class _Left:
    """A slot that a task of an event loop holds, which is held up only for a while, by a call that gives up."""

    def __init__(self, limit: int = 1, *, over_a_bridge: bool = False) -> None:
        self.limiter = Limiter(limit=limit)
        self.may_wait, self.may_go, self.ended = threading.Event(), asyncio.Event(), threading.Event()
        has_begun = threading.Event()
        self.outcome: list[str] = []

        async def aenter(word: str) -> None:
            await asyncio.to_thread(self.may_wait.wait, SAFETY_NET)
            async with self.limiter:
                self.outcome.append(word)

        def enter(word: str) -> None:
            assert self.may_wait.wait(SAFETY_NET)
            with self.limiter:
                self.outcome.append(word)

        wait: Any = dual(aenter, name="wait").call if over_a_bridge else enter

        @dual(name="left", warn=False)
        def left(word: str) -> str:
            has_begun.set()
            try:
                wait(word)
            except DeadlockError:
                self.outcome.append("told")
            self.ended.set()
            return word

        @dual(name="leave", warn=False)
        async def leave(word: str) -> str:
            try:
                async with timeout_once(has_begun.is_set, 0.05):
                    return await left.ainvoke(word)
            except TimeoutError:
                return "gave up"

        self.leave: Any = leave

    async def hold(self) -> None:
        """Hold a slot until it is let go."""
        async with self.limiter:
            await self.may_go.wait()


@pytest.mark.parametrize("over_a_bridge", [False, True])
async def test_a_thread_that_was_left_while_the_loop_was_held_up_is_no_proof(*, over_a_bridge: bool) -> None:
    """The loop goes on, and so do its tasks."""
    left = _Left(over_a_bridge=over_a_bridge)
    holder = asyncio.create_task(left.hold())
    await asyncio.sleep(0)
    assert left.leave.invoke("in") == "gave up"
    left.may_wait.set()
    await until(lambda: left.limiter.stats().waiting == 1 or left.ended.is_set())
    left.may_go.set()
    await holder
    await until(left.ended.is_set)

    assert left.outcome == ["in"]
    assert left.limiter.stats().in_flight == 0


async def test_a_thread_that_waited_while_the_loop_was_held_up_proves_nothing_to_others() -> None:
    """Whose slots it waited for may come free again, as the loop goes on."""
    left = _Left(limit=2)
    left.may_wait.set()
    holder = asyncio.create_task(left.hold())
    await asyncio.sleep(0)

    nesting = _Nesting(left.limiter)
    nested = asyncio.create_task(asyncio.to_thread(nesting.run))
    await until(nesting.is_in.is_set)
    assert left.leave.invoke("in") == "gave up"
    nesting.may_nest.set()
    await until(lambda: left.limiter.stats().waiting == 2 or nested.done())
    left.may_go.set()

    assert await nested == "in"
    await holder
    await until(left.ended.is_set)
    assert left.outcome == ["in"]
    assert left.limiter.stats().in_flight == 0


async def test_a_stream_that_is_read_on_while_the_loop_runs_is_no_proof() -> None:
    """Its first chunk held the loop up, and the next does not."""
    limiter = Limiter(limit=1)

    async def hold() -> None:
        async with limiter:
            await may_go.wait()

    may_go = asyncio.Event()
    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    chunks = _kinds_of_streams(_inner(limiter))["between"].stream(1)
    assert next(chunks) == 1
    rest = asyncio.create_task(asyncio.to_thread(next, chunks))
    await until(lambda: limiter.stats().waiting == 1 or rest.done())
    may_go.set()

    assert await rest == 1
    await holder
    await asyncio.to_thread(chunks.close)
    assert limiter.stats().in_flight == 0


def test_an_event_loop_that_was_stopped_before_its_task_had_ended_is_no_proof() -> None:
    """The thread that ran it goes on, and what the task waits for is no reason for others not to."""
    limiter = Limiter(limit=2)

    async def wait() -> None:
        async with limiter:
            pass

    nesting = _Nesting(limiter)
    loop = asyncio.new_event_loop()
    try:
        with ThreadPoolExecutor(1) as threads:
            nested = threads.submit(nesting.run)
            assert nesting.is_in.wait(SAFETY_NET)
            with limiter:
                task = loop.create_task(wait())
                loop.call_later(0.01, loop.stop)
                with pytest.raises(RuntimeError, match="stopped before Future completed"):
                    loop.run_until_complete(task)
                nesting.may_nest.set()
                wait_until(lambda: limiter.stats().waiting == 2 or nested.done())
            loop.run_until_complete(task)

            assert nested.result(SAFETY_NET) == "in"
        assert limiter.stats().in_flight == 0
    finally:
        loop.close()


async def test_a_coroutine_that_a_thread_has_returned_is_not_held_up_with_that_thread() -> None:
    """The thread goes on to other work, and may run an event loop of its own there."""
    limiter = Limiter(limit=1)
    begins, may_go = asyncio.Event(), asyncio.Event()
    threads: list[int] = []

    async def rest(word: str) -> str:
        begins.set()
        await may_go.wait()
        return word

    @concurrency(limiter=limiter)
    @dual(name="returns a coroutine")
    def begin(word: str) -> Any:
        threads.append(threading.get_ident())
        return rest(word)

    @dual(name="runs a loop", warn=False)
    def run(word: str) -> str:
        async def enter() -> str:
            with limiter:
                return word

        return asyncio.run(enter()) if threading.get_ident() == threads[0] else "elsewhere"

    async def run_there() -> str:
        while (word := await run.acall("b")) == "elsewhere":
            pass
        return word

    begun = asyncio.create_task(begin.acall("a"))
    await begins.wait()
    running = asyncio.create_task(run_there())
    await until(lambda: limiter.stats().waiting == 1 or running.done())
    may_go.set()

    assert await begun == "a"
    assert await running == "b"


async def test_a_stream_that_is_closed_on_another_loop_is_not_held_up_with_this_one() -> None:
    """Between two chunks it is nobody's, and may end anywhere."""
    limiter = Limiter(limit=1)

    @concurrency(limiter=limiter)
    async def rows(value: int) -> AsyncIterator[int]:
        yield value
        yield value

    def close() -> None:
        wait_until(lambda: limiter.stats().waiting == 1)
        asyncio.run(chunks.aclose())

    chunks: Any = rows(1)
    assert await anext(chunks) == 1
    other = threading.Thread(target=close)
    other.start()
    assert _inner(limiter).invoke(2) == 2
    other.join()
    assert limiter.stats().in_flight == 0


# --- an event loop that is run within a call ---


@pytest.mark.parametrize("way", AWAITED)
@pytest.mark.parametrize("where", ["here", "in a thread"])
def test_an_event_loop_that_is_run_within_a_call_and_waits_for_it_is_told(where: str, way: str) -> None:
    """The thread of the call goes no further until the loop's first task has ended."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @concurrency(limiter=limiter)
    @dual
    def outer(value: int) -> Any:
        async def wait() -> Any:
            return await AWAITED[way](inner)

        return asyncio.run(wait())

    def run() -> None:
        if where == "here":
            outer.invoke(1)
        else:
            asyncio.run(outer.ainvoke(1))

    assert _told(run)
    assert limiter.stats().in_flight == 0


def test_event_loops_that_are_run_within_one_another_are_told() -> None:
    """The second is run in a thread for which a task of the first waits, which is run within a call."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)
    deeper = concurrency(limiter=limiter)(Dual(lambda value: asyncio.run(inner.ainvoke(value)), name="deeper"))
    outer = concurrency(limiter=limiter)(Dual(lambda value: asyncio.run(deeper.ainvoke(value)), name="outer"))

    assert _told(lambda: outer.invoke(1))
    assert limiter.stats().in_flight == 0


def test_a_task_that_an_event_loop_within_a_call_does_not_await_is_no_proof() -> None:
    """The loop ends without it, and so does the call."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @concurrency(limiter=limiter)
    def outer(value: int) -> tuple[int, asyncio.Task[int]]:
        async def leave() -> asyncio.Task[int]:
            task = asyncio.create_task(inner.acall(value))
            await until(lambda: limiter.stats().waiting == 1)
            return task

        return value, asyncio.run(leave())

    value, task = outer.invoke(1)

    assert value == 1
    assert task.cancelled()
    assert limiter.stats() == replace(limiter.stats(), in_flight=0, waiting=0, rejected=0)


def test_an_event_loop_that_is_run_until_a_task_has_ended_runs_the_others_too() -> None:
    """A call in one of them ends, even if the task was made within it."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    async def hold() -> None:
        async with limiter:
            made.append(asyncio.create_task(inner.acall(1)))
            loop.stop()
            await until(lambda: limiter.stats().waiting == 1)

    made: list[asyncio.Task[int]] = []
    loop = asyncio.new_event_loop()
    try:
        holder = loop.create_task(hold())
        loop.run_forever()

        assert loop.run_until_complete(made[0]) == 1
        assert holder.done()
    finally:
        loop.close()


# --- a task that is awaited after it has come to wait ---

EAGER: Any = getattr(asyncio, "eager_task_factory", None)  # from Python 3.12 on
BEGINNINGS = ["by its loop"] if EAGER is None else ["by its loop", "eagerly"]
"""Who begins a task that waits before anybody awaits it."""


async def _waiting(inner: Any, beginning: str) -> asyncio.Task[int]:
    """Return a task that has come to wait for a pair."""
    if beginning == "eagerly":
        asyncio.get_running_loop().set_task_factory(EAGER)
    task = asyncio.create_task(inner.acall(1))
    if beginning == "by its loop":
        await asyncio.sleep(0)
    assert inner.limiter.stats().waiting == 1
    return task


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_a_task_that_is_awaited_only_then_is_told(beginning: str) -> None:
    """It waits already, and nothing runs that could look when it is awaited; so that is looked at in the next turn."""
    limiter = Limiter(limit=1)
    async with asyncio.timeout(SAFETY_NET), limiter:
        task = await _waiting(_inner(limiter), beginning)
        with pytest.raises(DeadlockError):
            await task

    assert limiter.stats().in_flight == 0
    assert limiter.stats().waiting == 0


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_a_task_that_is_awaited_only_then_and_will_give_up_gives_up(beginning: str) -> None:
    """Its own timeout ends the wait."""
    clock = FakeClock()
    limiter = Limiter(limit=1, timeout=1, clock=clock)
    async with asyncio.timeout(SAFETY_NET), limiter:
        task = await _waiting(_inner(limiter), beginning)
        asyncio.get_running_loop().call_later(0.01, clock.advance, 1)
        with pytest.raises(LimitTimeout):
            await task

    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_a_task_that_is_not_awaited_even_then_is_no_proof(beginning: str) -> None:
    """Whoever made it goes on, and gives the slot back."""
    limiter = Limiter(limit=1)
    async with asyncio.timeout(SAFETY_NET):
        async with limiter:
            task = await _waiting(_inner(limiter), beginning)
            for _ in range(3):
                await asyncio.sleep(0)
            assert limiter.stats().waiting == 1
        assert await task == 1

    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("beginning", BEGINNINGS)
async def test_a_task_that_is_cancelled_as_it_is_told_hears_of_that_alone(
    beginning: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody misses the error, and the slots come back."""
    limiter = Limiter(limit=1)

    async def wait() -> int:
        task = await _waiting(_inner(limiter), beginning)
        asyncio.get_running_loop().call_soon(task.cancel)
        return await task

    async with asyncio.timeout(SAFETY_NET), limiter:
        with pytest.raises(asyncio.CancelledError):
            await asyncio.create_task(wait())
    gc.collect()

    assert caplog.records == []
    assert limiter.stats().in_flight == 0
    assert limiter.stats().waiting == 0


# --- who goes on, and so proves nothing ---


def _kinds_of_streams(inner: Any) -> dict[str, Any]:
    """Return pairs whose second chunk is what `inner` gives."""

    @dual(name="stream in a thread")
    def threaded(value: int) -> Iterator[int]:
        yield value
        yield inner.call(value)

    @dual(name="stream on a loop")
    async def native(value: int) -> AsyncIterator[int]:
        yield value
        yield await inner.acall(value)

    @dual(name="stream of a stream")
    async def between(value: int) -> AsyncIterator[int]:
        async for chunk in native.astream(value):
            yield chunk

    return {"threaded": threaded, "native": native, "between": between}


@pytest.mark.parametrize("inherits", [False, True])
@pytest.mark.parametrize("kind", ["threaded", "native"])
async def test_an_async_stream_that_another_task_reads_on_is_no_proof(kind: str, *, inherits: bool) -> None:
    """Who began to read it, and holds the slot, goes on, though the reader may have inherited its context."""
    limiter = Limiter(limit=1)
    chunks = _kinds_of_streams(_inner(limiter))[kind].astream(1)
    context = contextvars.copy_context()
    async with asyncio.timeout(SAFETY_NET):
        async with limiter:
            assert await anext(chunks) == 1
            rest = asyncio.create_task(_last(chunks), context=None if inherits else context)
            await until(lambda: limiter.stats().waiting == 1)

        assert await rest == 1
    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("kind", ["threaded", "native", "between"])
def test_a_stream_that_another_thread_reads_on_is_no_proof(kind: str) -> None:
    """Who began to read it, and holds the slot, goes on."""
    limiter = Limiter(limit=1)
    chunks = _kinds_of_streams(_inner(limiter))[kind].stream(1)
    with ThreadPoolExecutor(1) as threads:
        with limiter:
            assert next(chunks) == 1
            rest = threads.submit(list, chunks)
            wait_until(lambda: limiter.stats().waiting == 1)

        assert rest.result(SAFETY_NET) == [1]
    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("way", ["stream", "call", "__call__"])
def test_a_generator_with_a_slot_that_another_thread_reads_on_is_no_proof(way: str) -> None:
    """The thread that has read the first chunk, and waits for a slot itself, does not keep it from ending."""
    limiter = Limiter(limit=1)

    @concurrency(limiter=limiter)
    def rows(value: int) -> Iterator[int]:
        yield value
        yield value

    begin = getattr(rows, way)
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        chunks = begin(1)
        assert one.submit(next, chunks).result(SAFETY_NET) == 1
        waiting = one.submit(lambda: list(begin(2)))
        wait_until(lambda: limiter.stats().waiting == 1)
        assert other.submit(list, chunks).result(SAFETY_NET) == [1]
        assert waiting.result(SAFETY_NET) == [2, 2]
    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("way", ["astream", "acall", "__call__"])
async def test_a_generator_with_a_slot_that_another_task_reads_on_is_no_proof(way: str) -> None:
    """The task that has read the first chunk, and waits for a slot itself, does not keep it from ending."""
    limiter = Limiter(limit=1)

    @concurrency(limiter=limiter)
    async def rows(value: int) -> AsyncIterator[int]:
        yield value
        yield value

    async def read_on() -> int:
        await until(lambda: limiter.stats().waiting == 1)
        last: int = await _last(chunks)
        return last

    begin = getattr(rows, way)
    chunks = begin(1)
    async with asyncio.timeout(SAFETY_NET):
        assert await anext(chunks) == 1
        rest = asyncio.create_task(read_on())
        assert [chunk async for chunk in begin(2)] == [2, 2]
        assert await rest == 1
    assert limiter.stats().in_flight == 0


def test_a_generator_with_a_slot_is_read_inside_another_call() -> None:
    """While it makes a chunk it is in its own call, and its reader afterwards in the reader's."""
    outer, limiter = Limiter(per_second=9), Limiter(per_second=9)

    @concurrency(limiter=limiter)
    def rows(value: int) -> Iterator[int]:
        limiter.record(0)
        yield value
        limiter.record(0)
        yield value

    chunks = rows(1)
    assert next(chunks) == 1
    with outer:
        assert next(chunks) == 1
        outer.record(0)
    with outer, pytest.raises(RuntimeError, match="not inside a call"):
        limiter.record(0)


async def test_an_async_generator_with_a_slot_is_read_inside_another_call() -> None:
    """While it makes a chunk it is in its own call, and its reader afterwards in the reader's."""
    outer, limiter = Limiter(per_second=9), Limiter(per_second=9)

    @concurrency(limiter=limiter)
    async def rows(value: int) -> AsyncIterator[int]:
        limiter.record(0)
        yield value
        limiter.record(0)
        yield value

    chunks = rows(1)
    assert await anext(chunks) == 1
    async with outer:
        assert await anext(chunks) == 1
        outer.record(0)
    async with outer:
        with pytest.raises(RuntimeError, match="not inside a call"):
            limiter.record(0)


@pytest.mark.parametrize("kind", ["threaded", "native"])
async def test_a_stream_that_was_begun_outside_and_waits_for_its_reader_is_told(kind: str) -> None:
    """It is who asks for the chunk that waits, and not who asked for the first."""
    limiter = Limiter(limit=1)
    achunks = _kinds_of_streams(_inner(limiter))[kind].astream(1)
    assert await anext(achunks) == 1
    async with asyncio.timeout(SAFETY_NET), limiter:
        with pytest.raises(DeadlockError):
            await anext(achunks)


@pytest.mark.parametrize("kind", ["threaded", "native"])
def test_a_sync_stream_that_was_begun_outside_and_waits_for_its_reader_is_told(kind: str) -> None:
    """It is who asks for the chunk that waits, and not who asked for the first."""
    limiter = Limiter(limit=1)
    chunks = _kinds_of_streams(_inner(limiter))[kind].stream(1)

    def read() -> None:
        assert next(chunks) == 1
        with limiter:
            next(chunks)

    assert _told(read)
    assert limiter.stats().in_flight == 0


def _streams_with_an_end(inner: Any) -> dict[str, Any]:
    """Return pairs that call `inner` as they are closed."""

    @dual(name="end in a thread")
    def threaded(value: int) -> Iterator[int]:
        try:
            yield value
        finally:
            inner.call(value)

    @dual(name="end on a loop")
    async def native(value: int) -> AsyncIterator[int]:
        try:
            yield value
        finally:
            inner.call(value)

    return {"threaded": threaded, "native": native}


@pytest.mark.parametrize("kind", ["threaded", "native"])
async def test_an_async_stream_whose_end_waits_for_who_closes_it_is_told(kind: str) -> None:
    """The generator's `finally` may run in a thread, for which who closes it waits."""
    limiter = Limiter(limit=1)
    chunks: Any = _streams_with_an_end(_inner(limiter))[kind].astream(1)
    assert await anext(chunks) == 1
    async with asyncio.timeout(SAFETY_NET), limiter:
        with pytest.raises(DeadlockError):
            await chunks.aclose()


@pytest.mark.parametrize("kind", ["threaded", "native"])
def test_a_sync_stream_whose_end_waits_for_who_closes_it_is_told(kind: str) -> None:
    """The generator's `finally` may run on the background loop, for which who closes it waits."""
    limiter = Limiter(limit=1)
    chunks = _streams_with_an_end(_inner(limiter))[kind].stream(1)

    def read() -> None:
        assert next(chunks) == 1
        with limiter:
            chunks.close()

    assert _told(read)
    assert limiter.stats().in_flight == 0


async def test_a_stream_that_is_read_under_one_limit_and_then_another_is_told() -> None:
    """By one task, whose second slot is the one that the stream waits for."""
    first, limiter = Limiter(limit=1), Limiter(limit=1)
    chunks = _kinds_of_streams(_inner(limiter))["native"].astream(1)
    async with first:
        assert await anext(chunks) == 1
    async with asyncio.timeout(SAFETY_NET), limiter:
        with pytest.raises(DeadlockError):
            await anext(chunks)


def test_a_step_that_nobody_asked_for_is_no_proof() -> None:
    """A timeout at its yield wakes a generator on the background loop; the reader goes on, with its slot."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    @dual
    async def outer(value: int) -> AsyncIterator[int]:
        try:
            async with asyncio.timeout(0.01):
                yield value
        except TimeoutError:
            yield await inner.acall(2)

    chunks = outer.stream(1)
    with limiter:
        assert next(chunks) == 1
        wait_until(lambda: limiter.stats().waiting == 1)

    assert list(chunks) == [2]


def _by_threads(name: str, work: Callable[[int], int]) -> Any:
    """Return a pair by threads of its own, or by somebody's executor, or one that streams."""

    def chunks(value: int) -> Iterator[int]:
        yield work(value)

    if name == "stream":
        return dual(chunks, name=f"left {name}")
    pair = dual(work, name=f"left {name}", bridge="thread" if name == "thread" else ThreadPoolExecutor(1))
    return concurrency(limit=3)(pair) if name == "executor with a limit" else pair


@pytest.mark.parametrize("bridge", ["thread", "executor", "executor with a limit", "stream"])
async def test_a_caller_that_has_left_is_no_proof(bridge: str) -> None:
    """The thread that it waited for goes on, and waits for the slot that the caller gives back."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    results: queue.SimpleQueue[int] = queue.SimpleQueue()
    has_begun, left = threading.Event(), threading.Event()

    def slow(value: int) -> int:
        has_begun.set()
        assert left.wait(SAFETY_NET)
        results.put(inner.call(value))
        return value

    pair = _by_threads(bridge, slow)
    async with limiter:
        with pytest.raises(TimeoutError):
            async with timeout_once(has_begun.is_set, 0.01):
                await _last(pair.astream(1))
        left.set()
        await until(lambda: limiter.stats().waiting == 1)

    assert await asyncio.to_thread(results.get, timeout=SAFETY_NET) == 1


async def test_a_caller_that_has_left_a_wait_proves_nothing_to_others() -> None:
    """What its thread waits for was noted as it came; the slot comes free all the same."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)
    results: queue.SimpleQueue[int] = queue.SimpleQueue()

    @dual
    def slow(value: int) -> int:
        results.put(inner.call(value))
        return value

    is_in, go_on = asyncio.Event(), asyncio.Event()

    async def nest() -> int:
        async with limiter:
            is_in.set()
            await go_on.wait()
            return int(await inner.acall(7))

    async with asyncio.timeout(SAFETY_NET):
        nested = asyncio.create_task(nest(), context=contextvars.Context())
        await is_in.wait()
        async with limiter:
            with pytest.raises(TimeoutError):
                async with timeout_once(lambda: limiter.stats().waiting == 1, 0.05):
                    await slow.acall(1)
            go_on.set()
            await until(lambda: limiter.stats().waiting == 2)

        assert await nested == 7
    assert await asyncio.to_thread(results.get, timeout=SAFETY_NET) == 1


async def test_a_stream_that_is_dropped_is_no_proof() -> None:
    """The loop closes its generator in one of the next turns."""
    limiter = Limiter(limit=1)

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> AsyncIterator[int]:
        yield value
        yield value

    async with asyncio.timeout(SAFETY_NET):
        async for _ in outer.acall(1):
            break

        assert await _last(outer.acall(1)) == 1
    assert limiter.stats().in_flight == 0


def test_what_a_fork_has_not_taken_with_it_is_no_proof() -> None:
    """Threads that waited for this loop are in the parent alone, and so are their calls."""
    limiter = Limiter(limit=1)
    go_on = threading.Event()

    @dual
    async def outer(value: int) -> int:
        is_in.set()
        await until(go_on.is_set)
        return value

    @dual
    async def forker(value: int) -> int:
        child = os.fork()
        if not child:
            result = 1
            try:
                held = limiter._enter()
                threading.Timer(0.1, held.end).start()
                contextvars.Context().run(limiter.enter)
                result = 0
            finally:
                os._exit(result)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])  # noqa: ASYNC222

    def hold() -> int:
        with limiter:
            return outer.invoke(1)

    is_in = threading.Event()
    with ThreadPoolExecutor(1) as threads, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of threads, as the process is forked
        held = threads.submit(hold)
        assert is_in.wait(SAFETY_NET)
        assert forker.invoke(1) == 0
        go_on.set()

        assert held.result(SAFETY_NET) == 1


# --- what is kept ---


def _links() -> int:
    gc.collect()
    return sum(type(thing) is Link for thing in gc.get_objects())


async def test_a_stream_keeps_nothing_of_its_readers() -> None:
    """Each reads it under a slot of its own, and goes."""
    limiter = Limiter(limit=2)

    @dual
    async def endless(value: int) -> AsyncIterator[int]:
        while True:
            yield value

    async def read() -> int:
        async with limiter:
            return await anext(chunks)

    before = _links()
    chunks: Any = endless.astream(1)
    readers: list[weakref.ref[Any]] = []
    for _ in range(20):
        task = asyncio.create_task(read())
        readers.append(weakref.ref(task))
        assert await task == 1
        del task
    await asyncio.sleep(0)
    gc.collect()

    assert [reader for reader in readers if reader() is not None] == []
    assert _links() <= before + 1
    await chunks.aclose()


def test_calls_over_a_bridge_keep_nothing() -> None:
    """Neither the thread that they ran in nor a context holds on to who waited for them, nor waits for a collector."""
    limiter = Limiter(limit=2)

    @dual
    async def echo(value: int) -> int:
        return value

    with limiter:
        echo.invoke(1)
        before = _links()
        gc.disable()
        try:
            for _ in range(20):
                assert echo.invoke(1) == 1
            assert sum(type(thing) is Link for thing in gc.get_objects()) <= before + 1
        finally:
            gc.enable()


def test_a_stream_may_be_stepped_without_a_loop() -> None:
    """Nobody is held up then, and nothing is looked for."""
    limiter = Limiter(limit=1)

    @dual
    async def once(value: int) -> AsyncIterator[int]:
        yield value

    with limiter:
        step: Any = once.astream(1).__anext__()
        with pytest.raises(StopIteration) as ended:
            step.send(None)

    assert ended.value.value == 1
