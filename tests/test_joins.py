"""Waits for several tasks at once, as they are seen from one of these tasks."""

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any

import anyio
import pytest

from asyncify import Dual, aeach
from asyncify.deadlock.joins import Join, Joining, join_of
from asyncify.loop_tasks import LoopTasks
from tests.waiting import SAFETY_NET, wait_until

Parts = list["asyncio.Future[int]"]


async def _gather(parts: Parts) -> None:
    await asyncio.gather(*map(_part, parts), return_exceptions=True)


async def _gather_twice(parts: Parts) -> None:
    """One of them is given twice."""
    await asyncio.gather(*parts, parts[0])


async def _group(parts: Parts) -> None:
    async with asyncio.TaskGroup() as group:
        for part in parts:
            group.create_task(_part(part))


async def _anyio_group(parts: Parts) -> None:
    async with anyio.create_task_group() as group:
        for part in parts:
            group.start_soon(_part, part)


async def _wait(parts: Parts) -> None:
    await asyncio.wait([asyncio.create_task(_part(part)) for part in parts])


async def _wait_for_the_first_error(parts: Parts) -> None:
    await asyncio.wait(parts, return_when=asyncio.FIRST_EXCEPTION)


async def _as_completed(parts: Parts) -> None:
    for part in asyncio.as_completed(parts):
        await part


async def _abatch(parts: Parts) -> None:
    await Dual(_part).abatch(parts)


async def _branches(parts: Parts) -> None:
    async def take(given: Parts, at: int) -> int:
        return await given[at]

    branches = {str(at): Dual(partial(take, at=at)) for at in range(len(parts))}
    pipe: Any = Dual(_identity) | branches
    await pipe.ainvoke(parts)


async def _identity(parts: Parts) -> Parts:
    return parts


async def _part(part: Awaitable[int]) -> int:
    return await part


WAYS: list[Callable[[Parts], Coroutine[Any, Any, None]]] = [
    _gather,
    _gather_twice,
    _group,
    _anyio_group,
    _wait,
    _wait_for_the_first_error,
    _as_completed,
    _abatch,
    _branches,
]


def _joins_above(future: Any) -> list[Join]:
    """Return the waits for several that this is a part of, be it by a task or by tasks of tasks."""
    found: list[Join] = []
    for callback, _ in future._callbacks or ():
        waiter = getattr(callback, "__self__", None)
        if isinstance(waiter, asyncio.Task):
            found += _joins_above(waiter)
        elif (join := join_of(callback)) is not None:
            found.append(join)
    return found


async def _settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.mark.parametrize("way", WAYS)
async def test_a_wait_for_several_counts_those_that_are_left(way: Callable[[Parts], Coroutine[Any, Any, None]]) -> None:
    """Each part leads to the same wait, which ends with the last of them."""
    parts: Parts = [asyncio.get_running_loop().create_future() for _ in range(3)]
    waiting = asyncio.create_task(way(parts))
    await _settle()
    joins = [_joins_above(part) for part in parts]

    assert [[join.parts for join in of_one] for of_one in joins] == [[3]] * 3
    assert len({id(join.whole) for of_one in joins for join in of_one}) == 1
    assert not joins[0][0].whole.done()

    parts[0].set_result(1)
    await _settle()

    assert [[join.parts for join in _joins_above(part)] for part in parts[1:]] == [[2]] * 2

    for part in parts[1:]:
        part.set_result(1)
    await waiting


@pytest.mark.parametrize("way", WAYS)
async def test_a_wait_for_several_tells_whether_they_are_cancelled_with_it(
    way: Callable[[Parts], Coroutine[Any, Any, None]],
) -> None:
    """As all are but those of `asyncio.wait` and `as_completed`."""
    parts: Parts = [asyncio.get_running_loop().create_future() for _ in range(3)]
    waiting = asyncio.create_task(way(parts))
    await _settle()
    ((join,), *_) = map(_joins_above, parts)
    waiting.cancel()
    await asyncio.wait([waiting])

    assert join.cancels_parts == all(part.cancelled() for part in parts)
    assert join.cancels_parts != way.__name__.startswith(("_wait", "_as_completed"))


async def test_a_shielded_wait_is_one_for_a_single_part() -> None:
    """Which is not cancelled with it."""
    part: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    shielded = asyncio.shield(part)
    (join,) = _joins_above(part)

    assert join == Join(shielded, 1, cancels_parts=False)


async def test_a_group_is_an_open_wait_before_the_end_of_its_block() -> None:
    """There may be more of its tasks, and nobody waits for them."""
    part: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    async with asyncio.TaskGroup() as group:
        group.create_task(_part(part))
        await _settle()

        leader = asyncio.current_task()
        assert _joins_above(part) == [Join(group, math.inf, fails_at_once=True, leader=leader)]

        part.set_result(1)


async def test_a_wait_with_a_timeout_is_none() -> None:
    """It ends by itself."""
    part: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def read() -> None:
        for end in asyncio.as_completed([part], timeout=30):
            await end

    waiting = [asyncio.create_task(work) for work in (asyncio.wait([part], timeout=30), read())]
    await _settle()

    assert _joins_above(part) == []

    part.set_result(1)
    await asyncio.wait(waiting)


async def test_who_is_about_to_be_cancelled_does_not_wait_for_the_next_of_several() -> None:
    """It will do something else as soon as it runs."""
    part: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def read() -> None:
        for end in asyncio.as_completed([part]):
            await end

    reading = asyncio.create_task(read())
    await _settle()
    assert [join.parts for join in _joins_above(part)] == [1]

    reading.cancel()

    assert _joins_above(part) == []

    await asyncio.wait([reading])
    part.cancel()


def test_items_by_tasks_are_an_open_wait_unless_their_caller_waits_for_all_that_may_run() -> None:
    """It may be about to take one that has ended, or another may be about to start."""
    widths = [1]

    def start(_: int, __: Any) -> asyncio.Task[None]:
        return asyncio.get_running_loop().create_task(asyncio.sleep(SAFETY_NET))

    with LoopTasks(start, lambda: widths[0], return_exceptions=False) as fan:
        fan.run([(0, None), (1, None)])
        wait_until(lambda: len(fan._alive.items) == 1 and not fan._drain_is_due)
        assert fan.join().parts == math.inf  # nobody waits

        fan._awaited = True
        assert fan.join().parts == 1

        widths[0] = 2
        assert fan.join().parts == math.inf

        widths[0] = 1
        fan._ended.append((0, None, None))
        assert fan.join().parts == math.inf
        fan._awaited = False


async def test_the_next_of_several_is_waited_for_only_while_somebody_does() -> None:
    """Who has the last one may do something else."""
    parts: Parts = [asyncio.get_running_loop().create_future() for _ in range(2)]
    go_on = asyncio.Event()

    async def read() -> None:
        for end in asyncio.as_completed(parts):
            await end
            await go_on.wait()

    reading = asyncio.create_task(read())
    await _settle()
    parts[0].set_result(1)
    await _settle()

    assert _joins_above(parts[1]) == []

    go_on.set()
    await _settle()

    assert [join.parts for join in _joins_above(parts[1])] == [1]

    parts[1].set_result(1)

    assert _joins_above(parts[1]) == []

    await reading


async def test_a_batch_whose_input_goes_on_is_an_open_wait() -> None:
    """More items may come, as their feeder does not wait for a place to come free."""
    part: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    more: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def inputs() -> Any:
        yield part
        yield await more

    async def read() -> list[int]:
        return [result async for result in aeach(Dual(_part), inputs())]

    reading = asyncio.create_task(read())
    await _settle()

    assert [join.parts for join in _joins_above(part)] == [math.inf]

    more.set_result(part)  # type: ignore[arg-type]
    await _settle()

    assert [join.parts for join in _joins_above(part)] == [2, 2]

    part.set_result(1)
    assert await reading == [1, 1]


@pytest.mark.parametrize("callback", [print, partial(print), [].append, lambda _: None, object()])
def test_anything_else_is_no_wait(callback: Any) -> None:
    """Whatever is called back."""
    assert join_of(callback) is None


def test_what_has_a_method_called_back_says_itself_what_it_waits_for() -> None:
    """As the fan-outs of the package do."""
    join = Join(object(), 2)

    class Both(Joining):
        def join(self) -> Join:
            return join

        def note(self) -> None:
            pass

    assert join_of(Both().note) is join
