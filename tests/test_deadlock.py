"""A pair that waits for itself: told when it is certain, through every way that a pair can call a pair."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from asyncify import DeadlockError, Dual, Limiter, concurrency, dual

LIMIT = 2
"""Calls at once; a call nested more deeply than that waits for itself."""

SAFETY_NET = 30
"""Seconds after which a test that hangs fails."""


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


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda inner: inner.call(1), id="call"),
        pytest.param(lambda inner: inner.invoke(1), id="invoke"),
        pytest.param(lambda inner: inner.bind().invoke(1), id="bound"),
        pytest.param(lambda inner: (inner | inner).invoke(1), id="pipe"),
        pytest.param(lambda inner: Dual(inner.invoke).invoke(1), id="between"),
    ],
)
def test_a_sync_call_within_a_call_over_a_bridge_that_waits_for_itself_is_told(call: Callable[[Any], Any]) -> None:
    """Whoever invokes the outer one holds its slot, in another thread; and the inner one holds up that one's loop."""
    limiter = Limiter(limit=1)
    errors: list[BaseException] = []

    @concurrency(limiter=limiter)
    @dual
    def inner(value: int) -> int:
        return value

    @concurrency(limiter=limiter)
    @dual
    async def outer(value: int) -> int:
        result: int = call(inner)
        return result

    def run() -> None:
        try:
            outer.invoke(1)
        except DeadlockError as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SAFETY_NET)

    assert len(errors) == 1
    assert limiter.stats().in_flight == 0


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


async def test_calls_that_are_gathered_are_no_proof() -> None:
    """One of several calls may fail and set its caller free: so nobody is told, and the caller's timeout ends it."""
    limiter = Limiter(limit=1)

    async def pass_on(word: str) -> str:
        return word

    inner: Any = concurrency(limiter=limiter)(pass_on)

    async def call_both(word: str) -> None:
        await asyncio.gather(inner.ainvoke(word), inner.ainvoke(word))

    outer: Any = concurrency(limiter=limiter)(call_both)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await outer.ainvoke("a")

    assert limiter.stats().in_flight == 0
    assert limiter.stats().waiting == 0


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
