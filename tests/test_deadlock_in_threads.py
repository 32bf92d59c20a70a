"""Calls at once in threads that wait for their own caller: the sync twins of test_deadlock_at_once."""

import asyncio
import contextvars
import gc
import signal
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncify import DeadlockError, Dual, Limiter, LimitTimeout, each
from asyncify.permits import Permit
from asyncify.scopes import current_scope
from tests.at_once import MANY, are_looked_at, end_of, identity, is_free, limited, one_besides
from tests.waiting import SAFETY_NET, run_program, timeout_once, until, wait_until


@pytest.mark.parametrize("way", MANY)
def test_calls_at_once_that_all_wait_for_their_caller_are_told(way: str) -> None:
    """None of them can fail, so the caller waits for ever; one hears of it, and the caller by that."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    outer = limited(limiter, partial(MANY[way], inner))
    end = end_of(lambda: outer.invoke([1, 2, 3]))

    assert isinstance(end, DeadlockError) or ("errors" in way and end == 0)
    assert limiter.stats().rejected == (3 if "errors" in way else 1)
    wait_until(lambda: is_free(limiter))


def _tree(way: str, limiter: Limiter) -> Any:
    """Return a pair that calls itself twice at once, and so on, for so many generations."""

    def descend(generations: int) -> int:
        return MANY[way](tree, [generations - 1] * 2) if generations else 1

    tree: Any = limited(limiter, descend)
    return tree


@pytest.mark.parametrize("way", MANY)
def test_a_tree_of_calls_that_fits_is_admitted(way: str) -> None:
    """There is a slot for each that waits for others."""
    limiter = Limiter(limit=4)

    assert end_of(lambda: _tree(way, limiter).invoke(2)) == 4
    assert limiter.stats().rejected == 0


@pytest.mark.parametrize("way", [way for way in MANY if "errors" not in way])
def test_a_tree_of_calls_that_waits_for_itself_is_told(way: str) -> None:
    """Each slot is held by a call whose own calls all wait."""
    limiter = Limiter(limit=2)

    assert isinstance(end_of(lambda: _tree(way, limiter).invoke(4)), DeadlockError)
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("way", [way for way in MANY if "errors" not in way])
def test_trees_of_calls_at_once_that_wait_for_themselves_are_told(way: str) -> None:
    """More of them than there are slots, so that some wait which are within no call."""
    limiter = Limiter(limit=2)
    tree = _tree(way, limiter)

    assert isinstance(end_of(lambda: MANY[way](tree, [4] * 4)), DeadlockError)
    wait_until(lambda: is_free(limiter))


UNOBSERVED = sorted(way for way in MANY if "observed" not in way)
"""Those where a dict of pairs among the calls is not run by LangChain."""

Tree = tuple[bool, str, list[Any]]
"""Whether it is a call of the limiter, how it calls its parts, and these."""

trees: st.SearchStrategy[Tree] = st.recursive(
    st.tuples(st.booleans(), st.just("batch"), st.just([])),
    lambda parts: st.tuples(st.booleans(), st.sampled_from(UNOBSERVED), st.lists(parts, min_size=1, max_size=3)),
    max_leaves=8,
)


def _depth(tree: Tree) -> int:
    return tree[0] + max(map(_depth, tree[2]), default=0)


def _size(tree: Tree) -> int:
    return tree[0] + sum(map(_size, tree[2]))


@settings(deadline=None)
@given(tree=trees, slots=st.integers(1, 4))
def test_any_tree_of_calls_comes_to_an_end(tree: Tree, slots: int) -> None:
    """It is told if it can't be admitted, and is not if it fits whatever the order."""
    limiter = Limiter(limit=slots)

    def run(tree: Tree) -> int:
        return MANY[tree[1]](any_call, tree[2]) + 1 if tree[2] else 1

    with_limit, without = limited(limiter, run), Dual(run)
    any_call: Any = Dual(lambda tree: (with_limit if tree[0] else without).invoke(tree))
    end = end_of(lambda: any_call.invoke(tree))
    told = limiter.stats().rejected

    wait_until(lambda: is_free(limiter))
    assert isinstance(end, int) or (isinstance(end, DeadlockError) and told)
    if _depth(tree) > slots:
        assert told
    if _size(tree) <= slots:
        assert not told


@pytest.mark.parametrize("how", [{}, {"window": 2}, {"ordered": False}, {"ordered": False, "window": 2}])
def test_calls_by_tasks_that_all_wait_for_their_caller_are_told(how: dict[str, Any]) -> None:
    """Their thread waits for the tasks of another, those that are about to start included."""
    limiter = Limiter(limit=1)

    async def nest(value: int) -> int:
        async with limiter:
            return value

    def call(values: list[int]) -> int:
        return len(list(each(Dual(nest), values, via="async", **how)))

    outer = limited(limiter, call)

    assert isinstance(end_of(lambda: outer.invoke([1, 2, 3, 4])), DeadlockError)
    wait_until(lambda: is_free(limiter))
    assert end_of(lambda: call([1, 2, 3, 4])) == 4


@pytest.mark.parametrize("why", ["fails", "ends", "caller"])
def test_calls_by_tasks_are_no_proof_as_long_as_one_goes_on(why: str) -> None:
    """It may fail, and so set the caller free; or end, and the caller does something else, or stops."""
    limiter = Limiter(limit=1)

    async def call(value: int) -> int:
        if value:
            async with limiter:
                return value
        await until(lambda: limiter.stats().waiting == 2)
        await asyncio.sleep(0.2)
        if why == "fails":
            raise ValueError("failed")
        return value

    def first(values: list[int]) -> str:
        for _, end in each(Dual(call), values, via="async", ordered=False):
            if why == "caller":
                time.sleep(0.2)
            return f"{end}"
        return "none"

    assert str(end_of(lambda: limited(limiter, first).invoke([1, 0, 1]))) == ("failed" if why == "fails" else "0")
    assert limiter.stats().rejected == 0
    wait_until(lambda: is_free(limiter))


def test_calls_at_once_of_which_one_may_fail_are_no_proof() -> None:
    """It sets their caller free."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    def call(value: int) -> int:
        if value:
            return int(inner.invoke(value))
        wait_until(lambda: limiter.stats().waiting == 2)
        time.sleep(0.05)
        raise ValueError("failed")

    outer = limited(limiter, Dual(call).batch)

    assert str(end_of(lambda: outer.invoke([1, 0, 1]))) == "failed"
    assert limiter.stats().rejected == 0
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("way", MANY)
def test_calls_at_once_of_which_one_ends_are_told_then(way: str) -> None:
    """Nothing happens at the limiter when it ends; so they are looked at as their caller waits on."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    def call(value: int) -> int:
        if not value:
            time.sleep(0.05)
            return 0
        return int(inner.invoke(value))

    outer = limited(limiter, partial(MANY[way], Dual(call)))
    end = end_of(lambda: outer.invoke([1, 0, 1]))

    assert isinstance(end, DeadlockError) or ("errors" in way and end == 0)
    assert limiter.stats().rejected >= 1
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("first", [0, 1])
def test_calls_at_once_of_which_one_will_give_up_are_no_proof(first: int) -> None:
    """It sets their caller free, whichever of them comes first."""
    limiter = Limiter(limit=1)

    def call(value: int) -> None:
        wait_until(lambda: limiter.stats().waiting == (value != first) or limiter.stats().rejected == 1)
        permit = limiter._enter(timeout=0.05) if value else limiter._enter()
        permit.finish()

    outer = limited(limiter, Dual(call).batch)

    assert isinstance(end_of(lambda: outer.invoke([0, 1])), LimitTimeout)
    assert limiter.stats().rejected == 1
    wait_until(lambda: is_free(limiter))


def test_calls_at_once_wait_for_who_is_elsewhere() -> None:
    """A slot that comes free lets one after the other in."""
    limiter = Limiter(limit=2)
    inner = limited(limiter)
    outer = limited(limiter, inner.batch)
    permit = limiter._enter()
    timer = threading.Timer(0.05, permit.end)
    timer.start()

    assert end_of(lambda: outer.invoke([1, 2, 3])) == [1, 2, 3]
    assert limiter.stats().rejected == 0


def test_calls_at_once_whose_reader_is_busy_are_no_proof() -> None:
    """Between two results it may leave the loop."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    def call(value: int) -> int:
        return int(inner.invoke(value)) if value else 0

    def read(values: list[int]) -> int:
        for _, result in Dual(call).batch_as_completed(values):
            wait_until(lambda: limiter.stats().waiting == 2)
            time.sleep(0.05)
            return int(result) + 10
        raise AssertionError("no result")

    assert end_of(lambda: limited(limiter, read).invoke([0, 1, 1])) == 10
    assert limiter.stats().rejected == 0
    wait_until(lambda: is_free(limiter))


def test_calls_at_once_whose_reader_has_waited_outside_are_told_by_where_it_waits() -> None:
    """It is what the reader holds as it waits that counts, not what it held as it began."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    def read() -> int:
        results: Iterator[Any] = each(inner, [1, 2], window=1)
        first = next(results)
        with limiter:
            return int(first) + int(next(results))

    assert isinstance(end_of(read), DeadlockError)
    wait_until(lambda: is_free(limiter))


def test_calls_at_once_that_others_call_off_are_no_proof_for_who_waits_besides() -> None:
    """The call that has begun them is one of a batch of which another fails, and gives its slot back then."""
    limiter = Limiter(limit=2)
    inner = limited(limiter)
    outer = limited(limiter, inner.batch)

    def call(value: int) -> Any:
        if value:
            return outer.invoke([1, 2])
        wait_until(lambda: limiter.stats().waiting == 3 or besides != [])
        time.sleep(0.05)
        raise ValueError("failed")

    with one_besides(limiter, 2) as besides:
        end = end_of(lambda: Dual(call).batch([1, 0]))

    assert isinstance(end, ValueError | DeadlockError)  # who is called off would never have been admitted
    assert besides == ["in"]


@pytest.mark.parametrize("way", MANY)
def test_a_call_at_once_that_nobody_can_call_off_any_more_is_told_with_who_waits_besides(way: str) -> None:
    """Who might have failed beside it has ended, and their caller holds nothing."""
    limiter = Limiter(limit=2)

    def call(value: int) -> int:
        if value:
            with limiter, limiter:
                return 1
        wait_until(lambda: are_looked_at(limiter, 2))
        return 0

    with one_besides(limiter, 1) as besides:
        end = end_of(lambda: MANY[way](Dual(call), [1, 0]))

    assert isinstance(end, DeadlockError) or ("errors" in way and end == 0)
    assert besides == ["in"]
    assert limiter.stats().rejected == 1


def test_calls_at_once_in_batches_of_one_another_are_told() -> None:
    """What could call them off waits itself."""
    limiter = Limiter(limit=2)
    inner = limited(limiter)
    all_inside = threading.Barrier(2)

    def call(values: list[int]) -> Any:
        all_inside.wait(SAFETY_NET)
        return Dual(inner.batch).batch([values, values])

    outer = limited(limiter, call)

    assert isinstance(end_of(lambda: outer.batch([[1, 2], [1, 2]])), DeadlockError)
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("asked", ["acall", "ainvoke"])
def test_calls_at_once_over_a_bridge_that_wait_for_their_caller_are_told(asked: str) -> None:
    """Each waits in a task of the background loop, for which a thread waits, for all of which the caller waits."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    async def over(value: int) -> int:
        return int(await getattr(inner, asked)(value))

    outer = limited(limiter, Dual(over).batch)

    assert isinstance(end_of(lambda: outer.invoke([1, 2])), DeadlockError)
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("slots", [1, 2])
def test_calls_at_once_that_hold_up_an_event_loop_are_told(slots: int) -> None:
    """Tasks of the loop have the slots, and can't go on while a batch holds it up."""
    limiter = Limiter(limit=slots)
    inner = limited(limiter)

    async def hold() -> None:
        async with limiter:
            await asyncio.sleep(SAFETY_NET)

    async def main() -> None:
        holders = [asyncio.create_task(hold()) for _ in range(slots)]
        await asyncio.sleep(0)
        try:
            inner.batch([1, 2])
        finally:
            for holder in holders:
                holder.cancel()

    end = end_of(lambda: asyncio.run(main()))

    assert isinstance(end, DeadlockError)
    assert "On an event loop, await the async side" in str(end)


def _first_within(limiter: Limiter, results: Iterator[Any]) -> list[Any]:
    """Wait within a call for the first of some results, and outside of it for the others."""
    with limiter:
        first = next(results)
    return [first, *results]


def test_calls_at_once_over_a_bridge_of_which_one_has_a_timeout_are_no_proof() -> None:
    """It gives up, and so sets free who waits for one of them, and that lets the other in."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    async def call(value: int) -> Any:
        if value:
            await until(lambda: limiter.stats().waiting == 1)
            return await inner.ainvoke(value)
        try:
            async with asyncio.timeout(0.2):
                return await inner.ainvoke(value)
        except TimeoutError:
            return "gave up"

    results = each(Dual(call), [0, 1], ordered=False)

    assert end_of(lambda: _first_within(limiter, results)) == [(0, "gave up"), (1, 1)]
    assert limiter.stats().rejected == 0


def test_a_thread_that_has_waited_for_others_and_goes_on_is_no_proof() -> None:
    """It has had a result, and those that are left are somebody else's to wait for."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    others: list[threading.Thread] = []
    ends: list[Any] = []

    def part(value: int) -> Any:
        if value:
            return inner.invoke(value)
        wait_until(lambda: limiter.stats().waiting == 1)
        return 0

    def call(value: int) -> Any:
        if value:
            wait_until(lambda: others != [])
            return inner.invoke(value)
        parts = each(Dual(part), [0, 1], ordered=False, window=2)
        ends.append(next(parts))
        others.append(threading.Thread(target=lambda: ends.extend(parts)))
        others[0].start()
        wait_until(lambda: limiter.stats().waiting == 2)
        time.sleep(0.05)
        return "goes on"

    results = each(Dual(call), [0, 1], ordered=False)

    assert end_of(lambda: _first_within(limiter, results)) == [(0, "goes on"), (1, 1)]
    others[0].join(SAFETY_NET)
    assert ends == [(0, 0), (1, 1)]
    assert limiter.stats().rejected == 0


async def test_calls_at_once_in_a_thread_that_was_left_are_no_proof() -> None:
    """The event loop that was held up for it goes on, as its task has given up, and with it who has the slot."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    has_begun, is_left = threading.Event(), threading.Event()
    ends: list[Any] = []

    def call(value: int) -> Any:
        has_begun.set()
        is_left.wait(SAFETY_NET)
        return inner.invoke(value)

    def work(value: int) -> None:
        try:
            ends.append(Dual(call).batch([value, value]))
        except DeadlockError as error:
            ends.append(error)

    async def over(value: int) -> None:
        try:
            async with timeout_once(has_begun.is_set, 0.1):
                await Dual(work).acall(value)
        except TimeoutError:
            is_left.set()
        await until(lambda: limiter.stats().waiting > 0)
        await asyncio.sleep(0.05)

    async def hold() -> None:
        async with limiter:
            await asyncio.sleep(0)
            await asyncio.sleep(0)

    holder = asyncio.create_task(hold())
    await asyncio.sleep(0)
    Dual(over).invoke(1)
    await holder
    await until(lambda: ends != [])

    assert ends == [[1, 1]]
    assert limiter.stats().rejected == 0


@pytest.mark.parametrize("way", ["batch", "a dict of pairs"])
def test_a_call_that_comes_to_wait_after_an_error_is_called_off_and_not_told(way: str) -> None:
    """Its caller hears of the error."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    has_failed = threading.Event()
    seen: list[BaseException] = []

    def call(value: int) -> Any:
        if not value:
            has_failed.set()
            raise ValueError("failed")
        has_failed.wait(SAFETY_NET)
        time.sleep(0.05)
        try:
            return inner.invoke(value)
        except BaseException as error:
            seen.append(error)
            raise

    outer = limited(limiter, partial(MANY[way], Dual(call)))

    assert str(end_of(lambda: outer.invoke([1, 0]))) == "failed"
    assert [type(error) for error in seen] == [asyncio.CancelledError]
    assert limiter.stats().rejected == 0


def _each_in_threads(inner: Any) -> Iterator[Any]:
    return each(Dual(lambda value: inner.invoke(value) if value else time.sleep(0.02)), [1, 2, 0], ordered=False)


def _each_in_tasks(inner: Any) -> Iterator[Any]:
    async def part(value: int) -> Any:
        try:
            return await (inner.ainvoke(value) if value else asyncio.sleep(0.02))
        finally:
            inner.limiter.stats()  # which takes the lock

    return each(Dual(part), [1, 2, 0], ordered=False, via="async")


def _dict_in_threads(inner: Any) -> Iterator[Any]:
    part, other = Dual(inner.invoke), Dual(inner.invoke)
    return (Dual(identity) | {"0": Dual(lambda _: 0), "1": part, "2": other}).stream(1)


def _over_a_bridge(inner: Any) -> Iterator[Any]:
    async def chunks(value: int) -> AsyncIterator[int]:
        waiting = [asyncio.create_task(inner.ainvoke(value)) for _ in range(2)]
        yield 0
        await asyncio.gather(*waiting)

    async def last(value: int) -> AsyncIterator[int]:
        try:
            async for chunk in chunks(value):
                yield chunk
        finally:
            await inner.ainvoke(value)

    return Dual(last).stream(1)


@pytest.mark.parametrize("stream", [_each_in_threads, _each_in_tasks, _dict_in_threads, _over_a_bridge])
def test_a_stream_that_is_collected_as_a_call_comes_to_wait_waits_for_nobody(
    stream: Callable[[Any], Iterator[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may run where the limiter's lock is held, which the stream's own calls wait for."""
    limiter = Limiter(limit=2)
    inner = limited(limiter)
    queue_up = Permit.queue_up
    is_inside, is_dropped, is_collected = threading.Event(), threading.Event(), threading.Event()

    def collect(permit: Permit, *args: Any) -> None:
        if threading.current_thread() is thread:
            gc.collect()
            is_collected.set()
        queue_up(permit, *args)

    def drop() -> None:
        chunks = stream(inner)
        next(chunks)
        wait_until(lambda: limiter.stats().waiting == 2)
        cycle: list[Any] = [chunks]
        cycle.append(cycle)

    def wait() -> None:
        with limiter:
            is_inside.set()
            is_dropped.wait(SAFETY_NET)
            with limiter:
                pass

    permit = limiter._enter()
    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    is_inside.wait(SAFETY_NET)
    monkeypatch.setattr(Permit, "queue_up", collect)
    gc.disable()
    try:
        drop()
        is_dropped.set()
        assert is_collected.wait(SAFETY_NET)
    finally:
        gc.enable()
    permit.end()
    thread.join(SAFETY_NET)

    assert not thread.is_alive()
    wait_until(lambda: is_free(limiter))


def scope_of(context: contextvars.Context) -> bool:
    """Tell whether the waits in a context may be called off with others."""
    scope = context.get(current_scope)
    return scope is not None and any(scope._alive())


@pytest.mark.parametrize("stream", [_each_in_threads, _dict_in_threads])
def test_what_a_collected_stream_has_left_running_may_wait_again(stream: Callable[[Any], Iterator[Any]]) -> None:
    """Its waits are called off until its own threads are through, and not for ever."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    contexts: list[contextvars.Context] = []

    def call(value: int) -> Any:
        contexts.append(contextvars.copy_context())
        return inner.invoke(value)

    def drop() -> None:
        chunks = stream(Dual(call))
        next(chunks)
        wait_until(lambda: limiter.stats().waiting == 2)
        cycle: list[Any] = [chunks]
        cycle.append(cycle)

    def wait() -> str:
        with limiter:
            return "in"

    permit = limiter._enter()
    drop()
    gc.collect()
    permit.end()
    wait_until(lambda: is_free(limiter) and not any(scope_of(context) for context in contexts))
    permit = limiter._enter()
    timer = threading.Timer(0.05, permit.end)
    timer.start()

    assert end_of(lambda: contexts[0].run(wait)) == "in"


def test_a_thread_whose_last_item_was_left_by_who_waited_for_it_is_told_by_its_next() -> None:
    """What is not certain of one item is of the others."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    may_end = threading.Event()

    async def leave(_: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(0.05):
                await Dual(lambda _: may_end.wait(SAFETY_NET)).acall(1)

    def call(value: int) -> Any:
        return inner.invoke(value) if value else Dual(leave).invoke(value)

    outer = limited(limiter, partial(MANY["batch of two at once"], Dual(call)))
    try:
        assert isinstance(end_of(lambda: outer.invoke([0, 0, 1, 1])), DeadlockError)
    finally:
        may_end.set()
    wait_until(lambda: is_free(limiter))


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="there are no timers like that")
def test_an_interrupt_during_a_collection_is_heard() -> None:
    """What the collector calls back is none of Python's, in which it would be raised and dropped."""
    program = """
import gc, signal, time
import asyncify
from asyncify.collector import in_collection

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
heap = [[] for _ in range(2_000_000)]
heard = 0
for _ in range(3):
    signal.setitimer(signal.ITIMER_REAL, 0.005)
    try:
        gc.collect()
        time.sleep(1)
    except KeyboardInterrupt:
        heard += 1
print(heard, in_collection())
"""
    assert run_program(program) == "3 False\n"


def test_a_task_that_a_branch_leaves_running_keeps_no_input() -> None:
    """What its context says of who waited for the branch is no way back to the dict."""

    class Document:
        """An input."""

    gone = threading.Event()
    left: list[asyncio.Task[None]] = []

    async def leave(_: object) -> int:
        left.append(asyncio.create_task(asyncio.sleep(SAFETY_NET)))
        return 1

    def call() -> None:
        document = Document()
        weakref.finalize(document, gone.set)
        assert (Dual(identity) | {"a": Dual(leave), "b": Dual(lambda _: 2)}).invoke(document) == {"a": 1, "b": 2}

    gc.collect()
    gc.disable()
    try:
        call()
        assert gone.wait(SAFETY_NET)
    finally:
        gc.enable()
        left[0].get_loop().call_soon_threadsafe(left[0].cancel)


def test_calls_at_once_that_were_told_keep_nothing() -> None:
    """Neither the error nor the threads leave their inputs to a garbage collection."""

    class Document:
        """An input."""

    limiter = Limiter(limit=1)
    inner = limited(limiter)
    gone = threading.Event()

    def call() -> None:
        documents = [Document(), Document()]
        weakref.finalize(documents[0], gone.set)
        with limiter, suppress(DeadlockError):
            inner.batch(documents)

    gc.collect()
    gc.disable()
    try:
        call()
        assert limiter.stats().rejected == 1
        assert gone.wait(SAFETY_NET)  # a thread may still be on its way out
    finally:
        gc.enable()
