"""Calls at once, or awaited only later, that wait for their own caller: told when none of them can go on."""

import asyncio
import contextvars
import gc
import operator
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from functools import partial
from typing import Any

import anyio
import pytest
from langchain_core.runnables import RunnableLambda

from asyncify import DeadlockError, Dual, Limiter, LimitTimeout, aeach, concurrency, dual, each
from asyncify.testing import FakeClock
from tests.at_once import are_looked_at, one_besides
from tests.waiting import SAFETY_NET, until, wait_until


async def _identity(value: int) -> int:
    return value


def _inner(limiter: Limiter) -> Any:
    return concurrency(limiter=limiter)(_identity)


def _outer(limiter: Limiter, body: Callable[[Any], Awaitable[int]]) -> Any:
    async def call(value: Any) -> int:
        return await body(value)

    return concurrency(limiter=limiter)(call)


def _told(error: Any) -> bool:
    """Tell whether this is the error of a deadlock, or a group of such errors."""
    if isinstance(error, BaseExceptionGroup):
        return all(map(_told, error.exceptions))
    return isinstance(error, DeadlockError)


async def _gather(*calls: Awaitable[int]) -> int:
    return sum(await asyncio.gather(*calls))


async def _gather_all(*calls: Awaitable[int]) -> int:
    ends = await asyncio.gather(*calls, return_exceptions=True)
    return sum(end for end in ends if isinstance(end, int))


async def _group(*calls: Coroutine[Any, Any, int]) -> int:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(call) for call in calls]
    return sum(task.result() for task in tasks)


async def _anyio_group(*calls: Coroutine[Any, Any, int]) -> int:
    found: list[int] = []

    async def run(call: Coroutine[Any, Any, int]) -> None:
        found.append(await call)

    async with anyio.create_task_group() as group:
        for call in calls:
            group.start_soon(run, call)
    return sum(found)


async def _wait(*calls: Coroutine[Any, Any, int]) -> int:
    done, _ = await asyncio.wait([asyncio.create_task(call) for call in calls])
    return await _gather(*done)


async def _as_completed(*calls: Coroutine[Any, Any, int]) -> int:
    return sum([await end for end in asyncio.as_completed(calls)])


async def _shield(*calls: Coroutine[Any, Any, int]) -> int:
    return sum(await asyncio.gather(*map(asyncio.shield, calls)))


Together = Callable[..., Coroutine[Any, Any, int]]

ENDED_BY_AN_ERROR: dict[str, Together] = {
    "gather": _gather,
    "TaskGroup": _group,
    "anyio's group": _anyio_group,
    "shield": _shield,
}
"""Ways to await several coroutines, to the end or to the first error."""

TOGETHER: dict[str, Together] = {
    **ENDED_BY_AN_ERROR,
    "gather with errors": _gather_all,
    "wait": _wait,
    "as_completed": _as_completed,
}
"""Ways to await several coroutines."""


def _by(together: Together) -> Callable[[Any, list[int]], Coroutine[Any, Any, int]]:
    return lambda pair, values: together(*map(pair.acall, values))


async def _abatch(pair: Any, values: list[int], **how: Any) -> int:
    return sum(end for end in await pair.abatch(values, **how) if isinstance(end, int))


async def _abatch_as_completed(pair: Any, values: list[int]) -> int:
    return sum([end async for _, end in pair.abatch_as_completed(values)])


async def _aeach(pair: Any, values: list[int]) -> int:
    return sum([end async for end in aeach(pair, values)])


async def _branches(pair: Any, values: list[int], kind: Any = Dual) -> int:
    branches = {f"{at}": kind(operator.itemgetter(at)) | pair for at in range(len(values))}
    return sum((await (kind(list) | branches).ainvoke(values)).values())


async def _in_a_row(pair: Any, values: list[int]) -> int:
    """Await one after the other tasks that all have begun."""
    tasks = [asyncio.create_task(pair.acall(value)) for value in values]
    try:
        return sum([await task for task in tasks])
    finally:
        await asyncio.gather(*tasks, return_exceptions=True)


MANY: dict[str, Callable[[Any, list[int]], Coroutine[Any, Any, int]]] = {
    **{name: _by(together) for name, together in TOGETHER.items()},
    "abatch": _abatch,
    "abatch with errors": partial(_abatch, return_exceptions=True),
    "abatch of two at once": partial(_abatch, config={"max_concurrency": 2}),
    "abatch of a binding": lambda pair, values: _abatch(pair.with_config(tags=["bound"]), values),
    "abatch_as_completed": _abatch_as_completed,
    "aeach": _aeach,
    "a dict of pairs": _branches,
    "a dict of lambdas": partial(_branches, kind=RunnableLambda),
    "tasks in a row": _in_a_row,
}
"""Ways to call a pair several times at once."""


@pytest.mark.parametrize("way", MANY)
async def test_calls_at_once_that_all_wait_for_their_caller_are_told(way: str) -> None:
    """None of them can fail, so the caller waits for ever; one hears of it, and the caller by that."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    outer = _outer(limiter, lambda values: MANY[way](inner, values))
    task = asyncio.ensure_future(outer.ainvoke([1, 2, 3]))
    await asyncio.wait([task], timeout=SAFETY_NET)

    assert task.done()
    assert _told(task.exception()) or ("errors" in way and task.result() == 0)
    assert limiter.stats().rejected >= 1
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)


def _tree(way: str, limiter: Limiter) -> Any:
    """Return a pair that calls itself twice at once, and so on, for so many generations."""

    async def descend(generations: int) -> int:
        await asyncio.sleep(0)
        return await MANY[way](tree, [generations - 1] * 2) if generations else 1

    tree: Any = concurrency(limiter=limiter)(descend)
    return tree


@pytest.mark.parametrize("way", MANY)
async def test_a_tree_of_calls_that_fits_is_admitted(way: str) -> None:
    """There is a slot for each that waits for others."""
    limiter = Limiter(limit=4)

    assert await _tree(way, limiter).ainvoke(2) == 4
    assert limiter.stats().rejected == 0


@pytest.mark.parametrize("way", [way for way in MANY if "errors" not in way])
async def test_a_tree_of_calls_that_waits_for_itself_is_told(way: str) -> None:
    """Each slot is held by a call whose own calls all wait."""
    limiter = Limiter(limit=3)
    task = asyncio.ensure_future(_tree(way, limiter).ainvoke(3))
    await asyncio.wait([task], timeout=SAFETY_NET)

    assert task.done()
    assert _told(task.exception())
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)


@pytest.mark.parametrize("way", [way for way in MANY if "errors" not in way])
async def test_trees_of_calls_at_once_that_wait_for_themselves_are_told(way: str) -> None:
    """More of them than there are slots, so that some wait which are within no call."""
    limiter = Limiter(limit=2)
    tree = _tree(way, limiter)
    task: asyncio.Task[int] = asyncio.create_task(MANY[way](tree, [3] * 4))
    await asyncio.wait([task], timeout=SAFETY_NET)

    assert task.done()
    assert _told(task.exception())
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)


async def _fail(*_: object) -> int:
    await asyncio.sleep(0.05)
    raise ValueError("failed")


async def _end(*_: object) -> int:
    await asyncio.sleep(0.05)
    return 0


@pytest.mark.parametrize("together", ENDED_BY_AN_ERROR)
async def test_calls_at_once_of_which_one_may_fail_are_no_proof(together: str) -> None:
    """It sets their caller free."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    outer = _outer(limiter, lambda value: ENDED_BY_AN_ERROR[together](inner.acall(value), _fail(), inner.acall(value)))
    task = asyncio.ensure_future(outer.ainvoke(1))
    await asyncio.wait([task], timeout=SAFETY_NET)
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)

    assert not _told(task.exception())
    assert limiter.stats().rejected == 0


@pytest.mark.parametrize("together", TOGETHER)
async def test_calls_at_once_of_which_one_ends_are_told_then(together: str) -> None:
    """Nothing happens at the limiter when it ends; so they are looked at again."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    outer = _outer(limiter, lambda value: TOGETHER[together](inner.acall(value), _end(), inner.acall(value)))
    task = asyncio.ensure_future(outer.ainvoke(1))
    await asyncio.wait([task], timeout=SAFETY_NET)

    assert task.done()
    assert limiter.stats().rejected >= 1
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)


async def _timed(call: Awaitable[int]) -> int:
    async with asyncio.timeout(0.05):
        return await call


async def _timed_by_anyio(call: Awaitable[int]) -> int:
    with anyio.fail_after(0.05):
        return await call


async def _timed_by_anyio_further_out(call: Awaitable[int]) -> int:
    """A scope takes its task out of those around it."""
    with anyio.fail_after(0.05), anyio.CancelScope():
        return await call
    raise AssertionError("nobody cancels the scope")


async def _waited_for(call: Awaitable[int]) -> int:
    return await asyncio.wait_for(call, 0.05)


async def _cancelled(call: Awaitable[int]) -> int:
    task: Any = asyncio.current_task()
    asyncio.get_running_loop().call_later(0.05, task.cancel)
    return await call


@pytest.mark.parametrize("together", ENDED_BY_AN_ERROR)
@pytest.mark.parametrize("timed", [_timed, _timed_by_anyio, _timed_by_anyio_further_out, _waited_for])
async def test_calls_at_once_of_which_one_will_give_up_are_no_proof(timed: Callable[[Any], Any], together: str) -> None:
    """By a timeout, which sets their caller free."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    outer = _outer(limiter, lambda value: ENDED_BY_AN_ERROR[together](timed(inner.acall(value)), inner.acall(value)))
    task = asyncio.ensure_future(outer.ainvoke(1))
    await asyncio.wait([task], timeout=SAFETY_NET)
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)

    assert not _told(task.exception())
    assert limiter.stats().rejected == 0


async def test_calls_at_once_of_which_one_will_be_cancelled_are_no_proof() -> None:
    """By a timer of the loop."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    outer = _outer(limiter, lambda value: _gather(_cancelled(inner.acall(value)), inner.acall(value)))
    with pytest.raises(asyncio.CancelledError):
        await outer.ainvoke(1)
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)

    assert limiter.stats().rejected == 0


async def test_calls_at_once_of_which_one_has_a_timeout_of_the_limiter_are_no_proof() -> None:
    """It gives up, and sets their caller free."""
    clock = FakeClock()
    limiter = Limiter(limit=1, clock=clock)
    inner = _inner(limiter)
    patient: Any = concurrency(limiter=limiter, timeout=1)(_identity)
    outer = _outer(limiter, lambda value: _gather(patient.acall(value), inner.acall(value)))
    asyncio.get_running_loop().call_later(0.1, clock.advance, 1)
    with pytest.raises(LimitTimeout):
        await outer.ainvoke(1)
    await until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0)

    assert limiter.stats().rejected == 1


@pytest.mark.parametrize("together", ["gather", "TaskGroup", "anyio's group"])
async def test_a_timeout_around_calls_at_once_changes_nothing(together: str) -> None:
    """It would cancel those who wait together with their caller; so they hear of the deadlock, and at once."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    async def call(values: list[int]) -> int:
        async with asyncio.timeout(SAFETY_NET):
            return await MANY[together](inner, values)

    outer: Any = concurrency(limiter=limiter)(call)
    task = asyncio.ensure_future(outer.ainvoke([1, 2]))
    await asyncio.wait([task])

    assert _told(task.exception())


@pytest.mark.parametrize("kept", ["shield", "wait"])
async def test_a_timeout_that_leaves_those_who_wait_alone_is_no_proof(kept: str) -> None:
    """It sets their caller free, and they go on."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    started: list[asyncio.Task[int]] = []

    async def call(value: int) -> int:
        started.append(asyncio.create_task(inner.acall(value)))
        async with asyncio.timeout(0.05):
            await (asyncio.shield(started[0]) if kept == "shield" else asyncio.wait(started))
        return value

    outer: Any = concurrency(limiter=limiter)(call)
    with pytest.raises(TimeoutError):
        await outer.ainvoke(1)

    assert await started[0] == 1
    assert limiter.stats().rejected == 0


async def test_calls_of_a_group_that_is_not_at_its_end_are_no_proof() -> None:
    """Its block goes on, and gives the slot back."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    async with asyncio.timeout(SAFETY_NET), asyncio.TaskGroup() as group, limiter:
        tasks = [group.create_task(inner.acall(value)) for value in (1, 2)]
        await asyncio.sleep(0.1)
        assert limiter.stats().waiting == 2

    assert [task.result() for task in tasks] == [1, 2]


async def test_a_call_in_the_background_is_not_told_in_the_place_of_others() -> None:
    """It came last, and gets its slot when the others have heard of their deadlock."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    background: list[asyncio.Task[int]] = []

    async def call(value: int) -> int:
        tasks = [asyncio.create_task(inner.acall(value)) for _ in range(2)]
        background.append(asyncio.create_task(inner.acall(value)))
        return sum(await asyncio.gather(*tasks))

    outer: Any = concurrency(limiter=limiter)(call)
    async with asyncio.timeout(SAFETY_NET):
        with pytest.raises(DeadlockError):
            await outer.ainvoke(1)

        assert await background[0] == 1


async def test_calls_at_once_wait_for_who_is_on_another_event_loop() -> None:
    """A slot is held there, by a call that goes on."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)
    outer = _outer(limiter, lambda values: _by(_gather)(inner, values))
    may_go = threading.Event()

    async def hold() -> None:
        async with limiter:
            while not may_go.is_set():  # noqa: ASYNC110  (another thread sets it)
                await asyncio.sleep(0.001)

    thread = threading.Thread(target=lambda: asyncio.run(hold()))
    thread.start()
    await until(lambda: limiter.stats().in_flight == 1)
    asyncio.get_running_loop().call_later(0.1, may_go.set)
    async with asyncio.timeout(SAFETY_NET):
        assert await outer.ainvoke([1, 2]) == 3
    thread.join()

    assert limiter.stats().rejected == 0


async def test_a_task_that_is_awaited_long_after_it_came_to_wait_is_told() -> None:
    """Nothing runs that could look when it is awaited; so it is looked at now and then."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    async with asyncio.timeout(SAFETY_NET), limiter:
        task = asyncio.create_task(inner.acall(1))
        await asyncio.sleep(0.02)
        with pytest.raises(DeadlockError):
            await task

    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("timed", [_timed, _timed_by_anyio, _timed_by_anyio_further_out])
async def test_a_call_that_another_one_holds_up_until_a_timeout_is_admitted_then(
    timed: Callable[[Any], Coroutine[Any, Any, int]],
) -> None:
    """All slots are held by calls that wait, but one of them will not wait for ever."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)

    async def give_up(value: int) -> int:
        await until(lambda: limiter.stats().in_flight == 2)
        return await timed(inner.acall(value))

    async def wait(value: int) -> int:
        await until(lambda: limiter.stats().waiting == 1)
        result: int = await inner.acall(value)
        return result

    async with asyncio.timeout(SAFETY_NET):
        later = asyncio.create_task(concurrency(limiter=limiter)(wait).acall(2))
        with pytest.raises(TimeoutError):
            await concurrency(limiter=limiter)(give_up).acall(1)

        assert await later == 2
    assert limiter.stats().rejected == 0


@pytest.mark.parametrize("together", TOGETHER)
def test_calls_at_once_on_an_event_loop_that_is_run_within_their_caller_are_told(together: str) -> None:
    """Its thread waits until all of them have ended."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)
    outer: Any = concurrency(limiter=limiter)(lambda values: asyncio.run(MANY[together](inner, values)))
    errors: list[BaseException | None] = []

    def call() -> None:
        try:
            outer.invoke([1, 2])
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(SAFETY_NET)

    assert not thread.is_alive()
    assert all(map(_told, errors))
    assert limiter.stats().rejected >= 1


def test_calls_that_have_waited_within_others_keep_neither_their_loop_nor_their_limiter() -> None:
    """Be it that they were told, or admitted in the end."""

    def run() -> tuple[Limiter, weakref.ref[Any]]:
        limiter = Limiter(limit=3)
        tree = _tree("gather", limiter)
        loop = asyncio.new_event_loop()
        assert loop.run_until_complete(tree.ainvoke(1)) == 2
        with pytest.raises(DeadlockError):
            loop.run_until_complete(tree.ainvoke(3))
        loop.run_until_complete(until(lambda: limiter.stats().in_flight == limiter.stats().waiting == 0))
        loop.close()
        return limiter, weakref.ref(loop)

    limiter, loop = run()
    gc.collect()

    assert loop() is None

    gone = weakref.ref(limiter)
    del limiter
    gc.collect()

    assert gone() is None


async def _in_group(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(first)
        group.create_task(other)


async def _in_anyio_group(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(_awaited, first)
        group.start_soon(_awaited, other)


async def _awaited(call: Awaitable[int]) -> int:
    return await call


async def _in_abatch(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    await Dual(_awaited).abatch([first, other])


async def _in_a_dict(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    async def take(calls: list[Any], at: int) -> int:
        return await _awaited(calls[at])

    async def both(calls: list[Any]) -> list[Any]:
        return calls

    await (Dual(both) | {f"{at}": Dual(partial(take, at=at)) for at in range(2)}).ainvoke([first, other])


async def _gathered(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    await asyncio.gather(first, other)


async def _in_a_block(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(first)
        await other


async def _cancelled_by_a_timer(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    gathered = asyncio.gather(first, other)
    asyncio.get_running_loop().call_later(0.1, gathered.cancel)
    await gathered


async def _in_scopes(first: Coroutine[Any, Any, int], other: Coroutine[Any, Any, int]) -> None:
    with anyio.CancelScope():
        await _in_anyio_group(first, other)


Beside = Callable[[Coroutine[Any, Any, int], Coroutine[Any, Any, int]], Coroutine[Any, Any, None]]

FAIL_TOGETHER: list[Beside] = [_in_group, _in_anyio_group, _in_abatch, _in_a_dict, _in_a_block]
"""Ways to have a call run beside another that has it cancelled by failing."""


async def _with_timeout(beside: Beside, first: Any) -> None:
    async with asyncio.timeout(0.1):
        await beside(first, asyncio.sleep(SAFETY_NET, 0))


async def _with_anyio_timeout(beside: Beside, first: Any) -> None:
    with anyio.fail_after(0.1):
        await beside(first, asyncio.sleep(SAFETY_NET, 0))


async def _with_wait_for(beside: Beside, first: Any) -> None:
    await asyncio.wait_for(beside(first, asyncio.sleep(SAFETY_NET, 0)), 0.1)


async def _with_a_failure(beside: Beside, first: Any) -> None:
    await beside(first, _fail())


async def _as_it_is(beside: Beside, first: Any) -> None:
    await beside(first, asyncio.sleep(SAFETY_NET, 0))


ENDS: list[tuple[Callable[[Beside, Any], Coroutine[Any, Any, None]], Beside]] = [
    *((ends, beside) for ends in (_with_timeout, _with_wait_for) for beside in (_gathered, *FAIL_TOGETHER)),
    *((_with_anyio_timeout, beside) for beside in (_gathered, *FAIL_TOGETHER, _in_scopes)),
    *((_with_a_failure, beside) for beside in FAIL_TOGETHER),
    (_as_it_is, _cancelled_by_a_timer),
]


@pytest.mark.parametrize(("ends", "beside"), ENDS)
async def test_a_call_is_no_proof_that_is_going_to_be_cancelled_from_above(
    ends: Callable[[Beside, Any], Coroutine[Any, Any, None]], beside: Beside
) -> None:
    """By a timeout around it and others that run, or by one of these when it fails; then it gives its slot back."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)
    blocked = _outer(limiter, lambda _: _held_until_two(limiter, inner))
    task = asyncio.create_task(ends(beside, blocked.acall(1)))
    async with asyncio.timeout(SAFETY_NET):
        await until(lambda: limiter.stats().in_flight == 1)
        async with limiter:
            await until(lambda: limiter.stats().waiting == 1)
            assert await inner.acall(2) == 2
    await asyncio.wait([task])

    assert task.cancelled() or not _told(task.exception())
    assert limiter.stats().rejected == 0


async def _held_until_two(limiter: Limiter, inner: Any) -> int:
    """Wait within a call for the same limiter, as soon as the other slot is taken too."""
    await until(lambda: limiter.stats().in_flight == 2)
    result: int = await inner.acall(1)
    return result


async def test_calls_that_have_waited_within_others_keep_nothing_of_theirs() -> None:
    """A permit leads to the context of its call, and so to whatever that holds."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)
    request: contextvars.ContextVar[Any] = contextvars.ContextVar("request")
    requests: list[weakref.ref[Any]] = []

    class Request:
        pass

    async def call(value: int) -> int:
        request.set(made := Request())
        requests.append(weakref.ref(made))
        return await _gather(inner.acall(value), inner.acall(value))

    outer: Any = concurrency(limiter=limiter)(call)
    for value in range(20):
        assert await asyncio.create_task(outer.acall(value)) == 2 * value
    gc.collect()

    assert len(requests) == 20
    assert sum(kept() is not None for kept in requests) <= 1  # what was read last may be in hand still


def _in_threads(way: str, call: Callable[[], Any], fail: Callable[[], Any]) -> None:
    """Have a call made beside another that fails, so that its wait is called off."""
    beside: Any = dual(lambda value: call() if value else fail(), name="beside")
    if way == "batch":
        beside.batch([1, 0])
    elif way == "each":
        list(each(beside, [1, 0], ordered=False))
    else:
        pipe: Any = Dual(list[int]) | {"call": Dual(lambda _: call()), "fail": Dual(lambda _: fail())}
        if way == "a dict":
            pipe.invoke([1])
        else:
            list(pipe.stream([1]))


@pytest.mark.parametrize("way", ["batch", "each", "a dict", "a dict's stream"])
def test_a_call_is_no_proof_whose_wait_is_called_off_when_a_sibling_in_threads_fails(way: str) -> None:
    """It gives its slot back then, and who waits besides is admitted."""
    limiter = Limiter(limit=2)
    inner: Any = concurrency(limiter=limiter)(dual(lambda value: value, name="inner"))
    blocked: Any = concurrency(limiter=limiter)(dual(inner.call, name="blocked"))

    def fail() -> None:
        wait_until(lambda: are_looked_at(limiter, 2))
        raise ValueError("failed")

    with one_besides(limiter, 1) as besides, pytest.raises(ValueError, match="failed"):
        _in_threads(way, partial(blocked.call, 1), fail)

    assert besides == ["in"]
    assert limiter.stats().rejected == 0


async def test_a_branch_of_a_dict_that_is_streamed_is_no_proof() -> None:
    """Its reader's timeout ends it."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)
    blocked = _outer(limiter, lambda _: _held_until_two(limiter, inner))
    pipe: Any = Dual(_identity) | {"blocked": blocked, "other": Dual(_identity)}

    async def read() -> None:
        async with asyncio.timeout(0.15):
            async for _ in pipe.astream(0):
                pass

    task = asyncio.create_task(read())
    async with asyncio.timeout(SAFETY_NET):
        await until(lambda: limiter.stats().in_flight == 1)
        async with limiter:
            await until(lambda: limiter.stats().waiting == 1)
            assert await inner.acall(2) == 2
    with pytest.raises(TimeoutError):
        await task

    assert limiter.stats().rejected == 0


class _CountingGroup(asyncio.TaskGroup):
    """A group that has a method of its own called back at the end of each task."""

    ended = 0

    def create_task(self, coro: Any, **how: Any) -> Any:
        task = super().create_task(coro, **how)
        task.add_done_callback(self.count)
        return task

    def count(self, _: object) -> None:
        self.ended += 1


async def test_a_part_of_a_group_counts_once_whatever_else_is_called_back() -> None:
    """So that one which waits is no proof beside another that will fail."""
    limiter = Limiter(limit=1)
    inner = _inner(limiter)

    async def call(value: int) -> None:
        async with _CountingGroup() as group:
            group.create_task(inner.acall(value))
            group.create_task(_fail())

    outer: Any = concurrency(limiter=limiter)(call)
    with pytest.raises(ExceptionGroup) as raised:
        await outer.acall(1)

    assert not _told(raised.value)
    assert limiter.stats().rejected == 0


@pytest.mark.parametrize("turns", range(5))
async def test_items_that_are_about_to_start_may_fail(turns: int) -> None:
    """Between two items a stream's feeder has been woken, and has not gone on yet; then another call comes to wait."""
    limiter = Limiter(limit=1)
    has_ended = asyncio.Event()

    async def item(value: int) -> int:
        if value == 0:
            await asyncio.sleep(0.02)
            has_ended.set()
        elif value == 1:
            async with limiter:
                pass
        else:
            raise ValueError("failed")
        return value

    async def come_later() -> None:
        await has_ended.wait()
        for _ in range(turns):
            await asyncio.sleep(0)
        async with limiter:
            pass

    async def read() -> None:
        async with aclosing(aeach(Dual(item), range(3), window=2, ordered=False)) as results:
            async for _ in results:
                pass

    async with asyncio.timeout(SAFETY_NET):
        async with limiter:
            later = asyncio.create_task(come_later())
            with pytest.raises(ValueError, match="failed"):
                await read()
        await later

    assert limiter.stats().rejected == 0


@pytest.mark.parametrize("where", ["in a thread", "in a context of its own"])
async def test_a_call_that_is_held_up_by_what_can_not_be_seen_is_no_proof(where: str) -> None:
    """It is not known what may cancel it: here a timeout does."""
    limiter = Limiter(limit=2)
    inner = _inner(limiter)
    in_a_thread: Any = dual(lambda value: inner.call(value), name="in_a_thread")  # noqa: PLW0108

    async def hold() -> None:
        async with limiter, asyncio.timeout(0.15):
            await until(lambda: limiter.stats().in_flight == 2)
            if where == "in a thread":
                await in_a_thread.acall(1)
            else:
                await asyncio.create_task(_within_another(inner), context=contextvars.Context())

    holding = asyncio.create_task(hold())
    async with asyncio.timeout(SAFETY_NET):
        await until(lambda: limiter.stats().in_flight == 1)
        async with limiter:
            await until(lambda: limiter.stats().waiting == 1)
            assert await inner.acall(2) == 2
    await asyncio.wait([holding])

    assert isinstance(holding.exception(), TimeoutError)
    assert limiter.stats().rejected == 0


async def _within_another(inner: Any) -> int:
    async with Limiter(limit=3):
        result: int = await inner.acall(1)
        return result


async def _may_fail(limiter: Limiter, fail: asyncio.Event) -> None:
    await fail.wait()
    raise ValueError


async def _gives_up(limiter: Limiter, fail: asyncio.Event) -> None:
    await limiter._aenter(timeout=0.2)


async def _times_out(limiter: Limiter, fail: asyncio.Event) -> None:
    async with asyncio.timeout(0.2):
        await limiter._aenter()


async def _among_others(limiter: Limiter, fail: asyncio.Event) -> None:
    await asyncio.gather(limiter._aenter(), _may_fail(limiter, fail))


async def _waits(limiter: Limiter, fail: asyncio.Event) -> None:
    async with limiter:
        pass


async def _in_the_block(limiter: Limiter, part: Coroutine[Any, Any, None]) -> None:
    async with limiter, asyncio.TaskGroup() as group:
        group.create_task(part)
        await until(lambda: limiter.stats().waiting > 0 or limiter.stats().in_flight == 2)
        async with limiter:
            pass


async def _in_the_block_of_anyio(limiter: Limiter, part: Coroutine[Any, Any, None]) -> None:
    async with limiter, anyio.create_task_group() as group:
        group.start_soon(lambda: part)
        await until(lambda: limiter.stats().waiting > 0 or limiter.stats().in_flight == 2)
        async with limiter:
            pass


async def _within_itself(limiter: Limiter) -> str:
    async with limiter:
        await until(lambda: limiter.stats().in_flight == 2)
        await until(lambda: limiter.stats().waiting > 0)
        async with limiter:
            return "in"


@pytest.mark.parametrize("part", [_may_fail, _gives_up, _times_out, _among_others])
@pytest.mark.parametrize("block", [_in_the_block, _in_the_block_of_anyio])
async def test_a_call_in_the_block_of_a_group_of_which_a_part_may_fail_is_no_proof_for_others(
    block: Any, part: Any
) -> None:
    """That part would cancel it, and so give its slot to another."""
    limiter, fail = Limiter(limit=2), asyncio.Event()
    leading = asyncio.create_task(block(limiter, part(limiter, fail)))
    other = asyncio.create_task(_within_itself(limiter))
    await until(lambda: are_looked_at(limiter, 2) or other.done())
    fail.set()
    async with asyncio.timeout(SAFETY_NET):
        assert await other == "in"

    with pytest.raises(ExceptionGroup):
        await leading


@pytest.mark.parametrize("block", [_in_the_block, _in_the_block_of_anyio])
async def test_a_call_in_the_block_of_a_group_of_which_a_part_may_fail_is_told_itself(block: Any) -> None:
    """Whatever the part does, this call gets no slot."""
    limiter, fail = Limiter(limit=2), asyncio.Event()
    async with asyncio.timeout(SAFETY_NET):
        ends = asyncio.gather(block(limiter, _may_fail(limiter, fail)), _within_itself(limiter), return_exceptions=True)
        leading, other = await ends

    assert (_told(leading), other) == (True, "in")


@pytest.mark.parametrize("block", [_in_the_block, _in_the_block_of_anyio])
async def test_two_calls_in_the_blocks_of_groups_whose_parts_wait_too_are_told(block: Any) -> None:
    """Each part waits, and so can't fail, nor set the leader of its group free."""
    limiter = Limiter(limit=2)
    blocks = [block(limiter, _waits(limiter, asyncio.Event())) for _ in range(2)]
    async with asyncio.timeout(SAFETY_NET):
        ends = await asyncio.gather(*blocks, return_exceptions=True)

    assert [_told(end) for end in ends if end is not None] == [True]
    assert limiter.stats().in_flight == 0


async def test_a_group_elsewhere_is_no_reason_to_tell_nobody() -> None:
    """What its parts may cancel is no call that others wait for."""
    limiter, told = Limiter(limit=2), asyncio.Event()

    async def lead() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(told.wait())
            await told.wait()

    async def nest() -> str:
        async with limiter:
            await until(lambda: limiter.stats().in_flight == 2)
            async with limiter:
                return "in"

    elsewhere = asyncio.create_task(lead())
    async with asyncio.timeout(SAFETY_NET):
        ends = await asyncio.gather(nest(), nest(), return_exceptions=True)
    told.set()
    await elsewhere

    assert sorted(type(end).__name__ for end in ends) == ["DeadlockError", "str"]


@pytest.mark.parametrize("block", [_in_the_block, _in_the_block_of_anyio])
async def test_a_call_in_the_block_of_a_group_whose_parts_wait_too_is_told(block: Any) -> None:
    """Nobody is left that could fail."""
    limiter = Limiter(limit=2)
    ends = asyncio.gather(
        block(limiter, _waits(limiter, asyncio.Event())), _within_itself(limiter), return_exceptions=True
    )
    async with asyncio.timeout(SAFETY_NET):
        leading, other = await ends

    assert [_told(end) for end in (leading, other) if isinstance(end, BaseException)] == [True]
    assert limiter.stats().in_flight == 0


async def _fails_after(seconds: float) -> None:
    await asyncio.sleep(seconds)
    raise ValueError


async def _waits_for_so_long(limiter: Limiter) -> None:
    async with asyncio.timeout(0.2):
        await _waits(limiter, asyncio.Event())


async def _awaits_one_that_waits_for_so_long(limiter: Limiter) -> None:
    await asyncio.create_task(_waits_for_so_long(limiter))


async def _leads_one_that_fails(limiter: Limiter) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_fails_after(0.2))
        await asyncio.sleep(0)
        await _waits(limiter, asyncio.Event())


async def _leads_a_leader(limiter: Limiter) -> None:
    async with asyncio.TaskGroup() as group:
        group.create_task(_leads_one_that_fails(limiter))
        await asyncio.sleep(0)
        await _waits(limiter, asyncio.Event())


async def _in_a_batch(limiter: Limiter, nested: Callable[[], Coroutine[Any, Any, str]]) -> None:
    """Run it beside one that waits for a turn further out, for so long."""
    turns = Limiter(limit=1)

    @dual
    async def item(seconds: float | None) -> str:
        async with asyncio.timeout(seconds), turns:
            return await nested()

    await item.abatch([None, 0.2])


@pytest.mark.parametrize(
    "beside",
    [
        _waits_for_so_long,
        _awaits_one_that_waits_for_so_long,
        _leads_one_that_fails,
        _leads_a_leader,
        _in_a_batch,
    ],
)
async def test_a_call_whose_sibling_may_fail_is_no_proof_for_others(beside: Any) -> None:
    """The sibling waits, too, but will be ended; and with it the call, which gives its slot to the other."""
    limiter = Limiter(limit=2)

    async def nest(seconds: float = 0.01) -> str:
        async with limiter:
            await until(lambda: limiter.stats().in_flight == 2)
            await asyncio.sleep(seconds)
            async with limiter:
                return "in"

    async def lead() -> None:
        if beside is _in_a_batch:
            await _in_a_batch(limiter, nest)
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(nest())
            await until(lambda: limiter.stats().in_flight == 2)
            group.create_task(beside(limiter))

    leading, other = asyncio.create_task(lead()), asyncio.create_task(nest(0.05))
    await asyncio.wait([leading, other], timeout=SAFETY_NET)

    assert other.result() == "in"
    assert leading.exception() is not None


async def test_calls_of_which_the_block_of_their_group_awaits_one_are_told() -> None:
    """No other task of the group, nor its block, goes on, so none can fail."""
    limiter = Limiter(limit=2)

    async def nest() -> None:
        async with limiter:
            await until(lambda: limiter.stats().in_flight == 2)
            async with limiter:
                pass

    async def lead() -> None:
        async with asyncio.TaskGroup() as group:
            first, _ = group.create_task(nest()), group.create_task(nest())
            await first

    async with asyncio.timeout(SAFETY_NET):
        (end,) = await asyncio.gather(lead(), return_exceptions=True)

    assert _told(end)
    assert limiter.stats().in_flight == 0


async def test_a_group_whose_only_other_task_has_just_failed_is_no_proof() -> None:
    """The leader, in the block, is about to be cancelled with what waits there; who waits beside that is not told."""
    limiter = Limiter(limit=2)

    @concurrency(limiter=limiter)
    async def nested(_: int) -> None:
        async with limiter:
            pass

    @concurrency(limiter=limiter)
    async def plain(query: str) -> str:
        return query

    async def pass_through() -> None:
        async with limiter, limiter:
            for done in asyncio.as_completed([asyncio.sleep(0)]):
                await done

    async def wait_besides() -> str:
        async with limiter:
            return await plain.ainvoke("in")

    async def fail() -> None:
        async with limiter:
            raise ValueError

    async def lead() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(fail())
            await nested.abatch([1], return_exceptions=True)

    ended: Any = await asyncio.gather(asyncio.gather(pass_through(), wait_besides()), lead(), return_exceptions=True)
    (_, besides), failed = ended

    assert besides == "in"
    assert isinstance(failed, ExceptionGroup)


async def _enter(limiter: Limiter) -> str:
    async with limiter:
        return "in"


@pytest.mark.parametrize("items", [[1], [0, 1], [1, 0], [0, 1, 0]], ids=str)
async def test_a_batch_that_a_timeout_ends_is_no_proof_while_its_reader_is_busy(items: list[int]) -> None:
    """It takes what has ended, and is not seen to wait for the rest; but the timeout is the way out."""
    limiter = Limiter(limit=1)
    besides: list[asyncio.Task[str]] = []

    @concurrency(limiter=limiter)
    async def item(waits: int) -> None:
        if waits:
            besides.append(asyncio.create_task(_enter(limiter)))
            await asyncio.shield(besides[0])

    with suppress(TimeoutError):
        async with asyncio.timeout(0.1):
            await item.abatch(items, return_exceptions=True)

    assert await besides[0] == "in"
