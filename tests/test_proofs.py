"""What is a proof of a deadlock and what is none, where calls wait at once, in threads and in tasks."""

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Callable, Collection
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import pytest
import uvloop

from asyncify import DeadlockError, Dual, Limiter, LimitTimeout
from asyncify.deadlock import detection
from asyncify.deadlock.crews import Crew, Hand
from asyncify.deadlock.holds import held_by_this_thread
from asyncify.deadlock.proofs import Held, Proof
from asyncify.fanout import Threads, gather
from asyncify.permits import Permit
from asyncify.scopes import CancelScope
from asyncify.turnstile import Turnstile
from tests.at_once import are_looked_at, end_of, is_free, limited, one_besides
from tests.waiting import SAFETY_NET, timeout_once, until, wait_until


def _noted(notes: list[Any], note: Any, then: Any) -> Any:
    notes.append(note)
    return then


def test_a_call_at_once_that_will_give_up_is_told_no_deadlock_of_others() -> None:
    """Its error calls off one of them, and so frees a slot for the other."""
    limiter = Limiter(limit=2)

    def call(value: int) -> None:
        if value:
            wait_until(lambda: are_looked_at(limiter, 2))
            limiter._enter(timeout=0.05)
        else:
            with limiter, limiter:
                pass

    with one_besides(limiter, 1) as besides:
        end = end_of(lambda: Dual(call).batch([0, 1]))

    assert isinstance(end, LimitTimeout)
    assert besides == ["in"]


def test_calls_at_once_that_hold_slots_are_told_when_one_ends() -> None:
    """Each keeps its own slot from coming free, and together that of their caller."""
    limiter = Limiter(limit=3)
    all_inside = threading.Barrier(2)

    def call(value: int) -> None:
        if value:
            with limiter:
                all_inside.wait(SAFETY_NET)
                with limiter:
                    pass
        else:
            wait_until(lambda: limiter.stats().waiting == 2)
            time.sleep(0.05)

    outer = limited(limiter, Dual(call).batch)

    assert isinstance(end_of(lambda: outer.invoke([1, 0, 1])), DeadlockError)
    assert limiter.stats().rejected == 1
    wait_until(lambda: is_free(limiter))


def test_calls_at_once_that_wait_for_their_caller_on_a_loop_are_told_so_when_one_ends() -> None:
    """That their caller holds up an event loop is not the reason."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    def call(value: int) -> int:
        if value:
            return int(inner.invoke(value))
        time.sleep(0.05)
        return 0

    async def main() -> None:
        async with limiter:
            Dual(call).batch([1, 0, 1])

    end = end_of(lambda: asyncio.run(main()))

    assert isinstance(end, DeadlockError)
    assert "wait for a slot of this very limiter" in str(end)


def test_calls_at_once_of_which_one_waits_elsewhere_are_no_proof_when_another_ends() -> None:
    """It is admitted to another limiter, and fails then."""
    limiter, other = Limiter(limit=1), Limiter(limit=1)
    inner = limited(limiter)

    def call(value: str) -> None:
        if value == "inner":
            inner.invoke(value)
        elif value == "other":
            with other:
                raise ValueError("failed")
        else:
            wait_until(lambda: limiter.stats().waiting == other.stats().waiting == 1)

    outer = limited(limiter, Dual(call).batch)
    permit = other._enter()
    timer = threading.Timer(0.3, permit.end)
    timer.start()

    assert str(end_of(lambda: outer.invoke(["inner", "other", ""]))) == "failed"
    assert limiter.stats().rejected == other.stats().rejected == 0
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("asked", ["acall", "ainvoke"])
def test_calls_at_once_that_wait_at_once_over_a_bridge_are_told(asked: str) -> None:
    """Each waits for several tasks of the background loop, and the caller for all of them."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    async def over(value: int) -> int:
        return sum(await asyncio.gather(*(getattr(inner, asked)(value) for _ in range(2))))

    outer = limited(limiter, Dual(over).batch)

    assert isinstance(end_of(lambda: outer.invoke([1, 2])), DeadlockError)
    wait_until(lambda: is_free(limiter))


def test_threads_that_each_hold_a_slot_and_wait_for_another_are_told() -> None:
    """One of them is, and the other gets its slot."""
    limiter = Limiter(limit=2)
    all_inside = threading.Barrier(2)
    ends: list[Any] = []

    def call() -> str:
        with limiter:
            all_inside.wait(SAFETY_NET)
            with limiter:
                return "in"

    threads = [threading.Thread(target=lambda: ends.append(end_of(call))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * SAFETY_NET)

    assert [type(end) for end in ends if end != "in"] == [DeadlockError]
    assert limiter.stats().rejected == 1


def test_a_thread_that_holds_a_slot_and_will_give_up_is_no_proof() -> None:
    """It sets its slot free, for another that holds one and waits for one more."""
    limiter = Limiter(limit=2)
    all_inside = threading.Barrier(2)
    ends: list[Any] = []

    def hurry() -> None:
        with limiter:
            all_inside.wait(SAFETY_NET)
            limiter._enter(timeout=0.3)

    def wait() -> str:
        with limiter:
            all_inside.wait(SAFETY_NET)
            wait_until(lambda: ends != [] or any(permit.timer for permit in list(limiter._queue)))
            with limiter:
                return "in"

    thread = threading.Thread(target=lambda: ends.append(end_of(hurry)))
    thread.start()

    assert end_of(wait) == "in"
    thread.join(SAFETY_NET)
    assert [type(end) for end in ends] == [LimitTimeout]


def test_a_call_that_was_ended_from_elsewhere_as_it_waited_for_another_is_no_proof() -> None:
    """Its slot is another's by then, who will end."""
    limiter = Limiter(limit=2)
    first = threading.Event()
    second = threading.Event()
    may_end = threading.Event()
    permits: list[Any] = []
    ends: list[Any] = []

    def end(work: Callable[[], str]) -> None:
        ends.append(end_of(work))

    def has_inside(count: int) -> bool:
        return limiter.stats().in_flight == count

    def nest() -> str:
        permits.append(limiter._enter())
        first.wait(SAFETY_NET)
        with limiter:
            return "nested"

    def wait() -> str:
        with limiter:
            may_end.wait(SAFETY_NET)
            return "waited"

    def nest_late() -> str:
        with limiter:
            second.wait(SAFETY_NET)
            with limiter:
                return "nested late"

    threads = [threading.Thread(target=partial(end, work)) for work in (nest, nest_late, wait)]
    for inside, thread in enumerate(threads[:2], 1):
        thread.start()
        wait_until(partial(has_inside, inside))
    threads[2].start()
    wait_until(lambda: limiter.stats().waiting == 1)
    first.set()
    wait_until(lambda: limiter.stats().waiting == 2)
    permits[0].end()
    second.set()
    wait_until(lambda: limiter.stats().waiting == 2 or len(ends) > 0)
    may_end.set()
    for thread in threads:
        thread.join(SAFETY_NET)

    assert sorted(map(str, ends)) == ["nested", "nested late", "waited"]


def test_calls_at_once_of_which_one_waits_no_longer_for_its_thread_are_no_proof() -> None:
    """It has given up on a thread that waits still, and fails."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    has_given_up = threading.Event()

    async def give_up(value: int) -> None:
        with suppress(TimeoutError):
            async with timeout_once(lambda: limiter.stats().waiting >= 1, 0.05):
                await Dual(inner.invoke).ainvoke(value)
        has_given_up.set()
        await until(lambda: limiter.stats().waiting >= 2)
        await asyncio.sleep(0.05)
        raise ValueError("failed")

    given_up = Dual(give_up)

    def call(value: int) -> None:
        if value:
            given_up.invoke(value)
        else:
            has_given_up.wait(SAFETY_NET)
            inner.invoke(value)

    outer = limited(limiter, Dual(call).batch)

    assert str(end_of(lambda: outer.invoke([0, 1]))) == "failed"
    assert limiter.stats().rejected == 0
    wait_until(lambda: is_free(limiter))


def test_calls_at_once_over_a_bridge_of_which_one_may_be_cancelled_are_no_proof_when_another_ends() -> None:
    """A timer ends its wait, and with that the others."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    async def call(value: int) -> None:
        if value == 0:
            await until(lambda: limiter.stats().waiting >= 2)
            await asyncio.sleep(0.05)
        elif value == 1:
            await inner.acall(value)
        else:
            with suppress(TimeoutError):
                async with asyncio.timeout(0.5):
                    await inner.acall(value)
            raise ValueError("failed")

    outer = limited(limiter, Dual(call).batch)

    assert str(end_of(lambda: outer.invoke([0, 1, 2]))) == "failed"
    assert limiter.stats().rejected == 0
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("way", ["invoke", "batch"])
def test_calls_at_once_that_wait_for_the_same_task_are_told(way: str) -> None:
    """A thread that the task waits for keeps all of them, and so their caller."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    tasks: list[asyncio.Task[Any]] = []
    come: list[int] = []
    in_thread = Dual(lambda _: inner.invoke(1) if way == "invoke" else inner.batch([1, 2]))

    async def work() -> Any:
        await until(lambda: len(come) >= 2)
        await asyncio.sleep(0.05)
        return await in_thread.ainvoke(1)

    async def call(value: int) -> Any:
        come.append(value)
        if not tasks:
            tasks.append(asyncio.create_task(work()))
        return await tasks[0]

    outer = limited(limiter, Dual(call).batch)

    assert isinstance(end_of(lambda: outer.invoke([0, 1])), DeadlockError)
    wait_until(lambda: is_free(limiter))


def test_a_call_at_once_is_told_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not looked at any more by who comes to wait for it before it has raised that."""
    limiter, unrelated = Limiter(limit=1), Limiter(limit=1)
    inner = limited(limiter)
    is_told = threading.Event()
    make_error = detection._deadlock_error

    def tell(*args: Any) -> DeadlockError:
        is_told.set()
        time.sleep(0.2)
        return make_error(*args)

    monkeypatch.setattr(detection, "_deadlock_error", tell)

    def wait(value: int) -> None:
        time.sleep(0.05)  # so that the caller waits already
        inner.invoke(value)

    outer = limited(limiter, Dual(wait).batch)

    def call(value: int) -> None:
        if value:
            outer.invoke([1, 2])
        else:
            is_told.wait(SAFETY_NET)

    end = end_of(lambda: limited(unrelated, Dual(call).batch).invoke([0, 1]))

    assert isinstance(end, DeadlockError)
    assert limiter.stats().rejected == 1
    wait_until(lambda: is_free(limiter))


def test_a_task_of_another_kind_of_loop_that_waits_for_itself_is_told() -> None:
    """Nothing but itself is inside, so it does not matter that the loop shows no timers."""

    async def main() -> None:
        limiter = Limiter(limit=1)
        async with limiter, limiter:
            pass

    assert isinstance(end_of(lambda: uvloop.run(asyncio.wait_for(main(), SAFETY_NET))), DeadlockError)


class _Lock:
    """A lock during which something happens each time that it is held."""

    def __init__(self, lock: Any, happens: Any) -> None:
        self._lock = lock
        self._happens = happens
        self.release = lock.release

    def __enter__(self) -> None:
        self._lock.acquire()
        self._happens()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


async def test_a_slot_that_comes_free_as_others_are_looked_at_is_handed_on() -> None:
    """Whoever holds the lock meanwhile has to see to that."""
    limiter = Limiter(limit=1)
    permit = limiter._enter()
    permit.step_out()
    waiter = asyncio.create_task(limiter._aenter())
    await until(lambda: limiter.stats().waiting == 1)
    monkeypatched = _Lock(limiter._lock, permit.end)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limiter, "_lock", monkeypatched)
        limiter._waiting_on(asyncio.get_running_loop())

    (await asyncio.wait_for(waiter, SAFETY_NET)).end()


async def test_what_tasks_of_other_loops_wait_on_is_not_looked_at() -> None:
    """They run in other threads, and change meanwhile."""
    limiter = Limiter(limit=1)
    holder = limiter.enter()
    waiter = asyncio.create_task(limiter.aenter())
    await until(lambda: limiter.stats().waiting == 1)
    other = asyncio.create_task(asyncio.to_thread(lambda: asyncio.run(limiter.aenter())))
    await until(lambda: limiter.stats().waiting == 2 and all(permit.ready for permit in limiter._queue))

    futures = limiter._waiting_on(asyncio.get_running_loop())
    holder.leave()
    (await waiter).leave()
    (await other).leave()

    assert len(futures) == 1


def test_calls_at_once_are_told_from_the_last_that_came() -> None:
    """The others are called off by its error, or would get what it lets go."""
    limiter = Limiter(limit=1)

    def call(value: int) -> None:
        wait_until(lambda: limiter.stats().waiting == value)
        if value == 6:
            return
        try:
            with limiter:
                pass
        except DeadlockError:
            raise ValueError(value) from None

    outer = limited(limiter, Dual(call).batch)

    assert str(end_of(lambda: outer.invoke(list(range(7))))) == "5"
    assert limiter.stats().rejected == 1
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("ends", [False, True])
def test_calls_at_once_many_levels_below_the_call_that_they_wait_for_are_told(*, ends: bool) -> None:
    """The caller of each level waits for the next, and has no slot itself."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    def descend(levels: int) -> Any:
        if not levels:
            return inner.invoke(1)
        if levels < 0:
            return time.sleep(0.1)
        return Dual(descend).batch([levels - 1, levels - 1, *[-1] * ends])

    outer = limited(limiter, descend)

    assert isinstance(end_of(lambda: outer.invoke(4)), DeadlockError)
    wait_until(lambda: is_free(limiter))


def test_calls_at_once_on_an_event_loop_in_one_of_others_at_once_are_told_that_they_hold_it_up() -> None:
    """The thread that holds up the loop is itself waited for."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)

    async def hold() -> None:
        async with limiter:
            await asyncio.sleep(SAFETY_NET)

    async def main() -> None:
        holder = asyncio.create_task(hold())
        await asyncio.sleep(0)
        try:
            inner.batch([1, 2])
        finally:
            holder.cancel()

    end = end_of(lambda: Dual(lambda value: asyncio.run(main()) if value else None).batch([1, 0]))

    assert isinstance(end, DeadlockError)
    assert "On an event loop, await the async side" in str(end)


def test_a_reader_of_calls_at_once_that_waits_no_longer_keeps_nothing() -> None:
    """What it held as it waited is not kept by the generator."""
    results: Any = Dual(lambda value: time.sleep(0.05 * value)).batch_as_completed([1, 2, 3])
    next(results)
    permit = Limiter(limit=1).enter()
    known = weakref.ref(permit)
    next(results)
    permit.leave()
    del permit
    gc.collect()

    assert known() is None
    results.close()


def test_calls_at_once_are_looked_at_only_where_their_caller_may_be_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each limiter once as it waits, and not at all if it holds nothing."""
    looks: list[Any] = []
    by = Held.by
    monkeypatch.setattr(Held, "by", lambda permit: _noted(looks, permit, by)(permit))
    limiter, unrelated = Limiter(limit=1), Limiter(limit=1)
    inner = limited(limiter)

    def call(value: int) -> None:
        if value:
            inner.invoke(value)
        else:
            wait_until(lambda: limiter.stats().waiting == 4)
            time.sleep(0.05)

    def looks_of(caller: Limiter | nullcontext[None]) -> int:
        looks.clear()
        permit = limiter._enter()
        permit.step_out()
        counts: list[int] = []

        def let_in() -> None:
            counts.append(len(looks))
            permit.end()

        timer = threading.Timer(0.3, let_in)
        timer.start()
        with caller:
            Dual(call).batch([0, 1, 2, 3, 4])
        timer.join()
        return counts[0]

    assert contextvars.Context().run(looks_of, nullcontext()) == 0  # other tests have left something in this one
    assert contextvars.Context().run(looks_of, unrelated) == 1


def test_who_can_be_no_proof_does_not_look_through_those_who_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call elsewhere has a slot, so a wait within a call costs the same however many wait."""
    looked: list[Any] = []
    monkeypatch.setattr(Proof, "_from_wait", lambda *args: looked.append(args))
    limiter = Limiter(limit=2)
    permit = contextvars.Context().run(limiter.enter)
    permit.step_out()
    timer = threading.Timer(0.1, permit.end)
    timer.start()
    with limiter, limiter:
        pass

    assert looked == []


def test_calls_at_once_of_several_callers_that_wait_for_the_same_task_are_told_that_they_wait() -> None:
    """None of them holds up an event loop, though not all are around the call that is told."""
    limiter = Limiter(limit=2)
    inner = limited(limiter)
    tasks: list[asyncio.Task[Any]] = []
    come: list[int] = []

    async def work() -> Any:
        await until(lambda: len(come) >= 4)
        await asyncio.sleep(0.05)
        return await Dual(inner.invoke).ainvoke(1)

    async def call(value: int) -> Any:
        come.append(value)
        if not tasks:
            tasks.append(asyncio.create_task(work()))
        return await tasks[0]

    outer = limited(limiter, Dual(call).batch)
    end = end_of(lambda: outer.batch([[0, 1], [2, 3]]))

    assert isinstance(end, DeadlockError)
    assert "wait for a slot of this very limiter" in str(end)


def test_a_limit_that_is_below_the_calls_inside_is_no_proof_for_a_thread() -> None:
    """It may grow again before they end."""
    limiter = Limiter(limit=2)
    permit = limiter._enter()
    permit.step_out()
    timer = threading.Timer(0.1, lambda: limiter.resize(limit=3))

    def nest() -> str:
        with limiter:
            limiter.resize(limit=1)
            timer.start()
            with limiter:
                return "in"

    assert end_of(nest) == "in"
    permit.end()


async def test_a_task_that_has_been_cancelled_is_no_proof_for_a_thread() -> None:
    """It will give its slot back, though its event loop has not come to that."""
    limiter = Limiter(limit=2)

    async def nest() -> None:
        async with limiter, limiter:
            pass

    may_wait = threading.Event()
    is_inside = threading.Event()
    ends: list[Any] = []

    def nest_in_thread() -> str:
        with limiter:
            is_inside.set()
            may_wait.wait(SAFETY_NET)
            with limiter:
                return "in"

    thread = threading.Thread(target=lambda: ends.append(end_of(nest_in_thread)))
    thread.start()
    is_inside.wait(SAFETY_NET)
    task = asyncio.create_task(nest())
    await until(lambda: limiter.stats().waiting == 1)
    task.cancel()
    may_wait.set()
    wait_until(lambda: limiter.stats().waiting == 2 or ends != [])
    time.sleep(0.05)  # noqa: ASYNC251  (the task is not to hear of it before)
    with suppress(asyncio.CancelledError):
        await task
    await until(lambda: ends != [])
    thread.join()

    assert ends == ["in"]


def test_a_wait_that_is_called_off_as_others_are_looked_at_is_no_proof() -> None:
    """Its call will give its slot back."""
    limiter = Limiter(limit=2)
    is_inside = threading.Event()
    ends: list[Any] = []

    def nest() -> None:
        is_inside.wait(SAFETY_NET)
        try:
            with limiter, limiter:
                pass
        except BaseException as error:  # noqa: BLE001  (it is looked at)
            ends.append(error)

    def nest_too() -> str:
        with limiter:
            is_inside.set()
            wait_until(lambda: limiter.stats().waiting == 1)
            waiting = limiter._queue[0]

            def call_off_first(*args: Any, **rest: Any) -> Any:
                with limiter._lock:  # so that it is taken out of the queue only afterwards
                    waiting.call_off()
                try:
                    return Proof(*args, **rest)
                finally:
                    limiter._settle()

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(detection, "Proof", call_off_first)
                permit = limiter._enter()
            permit.finish()
            return "in"

    thread = threading.Thread(target=nest)
    thread.start()

    assert end_of(nest_too) == "in"
    thread.join(SAFETY_NET)
    assert [type(end) for end in ends] == [asyncio.CancelledError]


def test_a_task_of_a_loop_that_does_not_run_is_no_proof_for_the_thread_that_ran_it() -> None:
    """Another thread may run it on."""
    limiter = Limiter(limit=1)
    loop = asyncio.new_event_loop()

    async def hold() -> None:
        async with limiter:
            await asyncio.sleep(0.01)

    async def begin() -> asyncio.Task[None]:
        task = asyncio.create_task(hold())
        await asyncio.sleep(0)
        return task

    def wait() -> str:
        task = loop.run_until_complete(begin())
        thread = threading.Timer(0.1, loop.run_until_complete, [task])
        thread.start()
        with limiter:
            thread.join()
            return "in"

    assert end_of(wait) == "in"
    loop.close()


@pytest.mark.parametrize("why", ["a call elsewhere", "a sibling that goes on", "a timer"])
async def test_tasks_that_can_be_no_proof_are_looked_at_only_now_and_then(
    why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in each turn of the event loop."""
    looks: list[Any] = []
    look = detection._look
    monkeypatch.setattr(detection, "_look", lambda *args: _noted(looks, args, look)(*args))
    limiter = Limiter(limit=1 + (why == "a call elsewhere"))
    elsewhere = contextvars.Context().run(limiter.enter) if why == "a call elsewhere" else None

    async def nest() -> None:
        async with limiter:
            pass

    async def call() -> None:
        async with limiter:
            if why == "a sibling that goes on":
                await asyncio.gather(nest(), asyncio.sleep(SAFETY_NET))
            elif why == "a timer":
                await asyncio.gather(nest(), asyncio.wait_for(nest(), SAFETY_NET))
            else:
                await asyncio.gather(nest(), nest())

    task = asyncio.create_task(call())
    await asyncio.sleep(0.3)
    assert len(looks) <= 10
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    if elsewhere is not None:
        elsewhere.end()


def test_calls_over_a_bridge_that_others_call_off_are_no_proof_for_who_waits_besides() -> None:
    """One of a batch fails, and so another of it gives its slot back."""
    limiter = Limiter(limit=2)
    is_inside = threading.Event()

    async def nest(value: int) -> str:
        async with limiter:
            if value:
                is_inside.set()
                await until(lambda: limiter.stats().waiting >= 1)
            async with limiter:
                return "in"

    bridged = Dual(nest)

    def call(value: int) -> None:
        if value:
            bridged.invoke(0)
        else:
            wait_until(lambda: limiter.stats().waiting == 2)
            time.sleep(0.2)
            raise ValueError("failed")

    ends: list[Any] = []
    thread = threading.Thread(target=lambda: ends.append(end_of(lambda: bridged.invoke(1))))
    thread.start()
    is_inside.wait(SAFETY_NET)
    end = end_of(lambda: Dual(call).batch([0, 1]))
    thread.join(SAFETY_NET)

    assert str(end) == "failed"
    assert ends == ["in"]


async def test_tasks_at_once_are_told_from_the_last_that_came() -> None:
    """Who came first is told when that one has heard of it."""
    limiter = Limiter(limit=1)
    told: list[int] = []

    async def call(value: int) -> None:
        try:
            async with limiter:
                pass
        except DeadlockError:
            told.append(value)

    async with limiter:
        await asyncio.gather(*map(call, range(4)))

    assert told == [3, 2, 1, 0]


async def test_a_task_that_is_cancelled_as_it_is_told_leaves_no_error_unheard(monkeypatch: pytest.MonkeyPatch) -> None:
    """The event loop would report it."""
    loop = asyncio.get_running_loop()
    reports: list[Any] = []
    loop.set_exception_handler(lambda loop, context: reports.append(context))
    limiter = Limiter(limit=1)
    make_error = detection._deadlock_error

    def tell(*args: Any) -> DeadlockError:
        loop.call_soon(task.cancel)
        return make_error(*args)

    monkeypatch.setattr(detection, "_deadlock_error", tell)

    async def nest() -> None:
        async with limiter:
            pass

    async def call() -> None:
        async with limiter:
            await asyncio.gather(nest(), nest())

    task = asyncio.create_task(call())
    await asyncio.wait([task])
    gc.collect()

    assert task.cancelled()
    assert reports == []


async def test_places_left_empty_are_dropped_when_they_are_most_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not each time that one more is, which would take a time that grows with the square of their number."""
    drops: list[int] = []
    close_up = Turnstile._close_up
    monkeypatch.setattr(
        Turnstile, "_close_up", lambda turnstile: _noted(drops, turnstile._abandoned, close_up)(turnstile)
    )
    limiter = Limiter(limit=1)
    permit = limiter._enter()
    tasks = [asyncio.create_task(limiter._aenter()) for _ in range(400)]
    await until(lambda: limiter.stats().waiting == 400)
    for task in tasks[100:250]:
        task.cancel()
    await until(lambda: limiter.stats().waiting == 250)
    assert drops == []
    for task in tasks[250:350]:
        task.cancel()
    await until(lambda: limiter.stats().waiting == 150)
    assert drops == [201]
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    permit.finish()


def test_calls_at_once_that_were_told_when_one_ended_keep_nothing() -> None:
    """The error that another thread made for it does not hold the frame that raised it."""

    class Document:
        """An input."""

    limiter = Limiter(limit=1)
    inner = limited(limiter)
    gone = threading.Event()

    def call(value: Any) -> None:
        if value is None:
            wait_until(lambda: limiter.stats().waiting == 2)
            time.sleep(0.05)
        else:
            inner.invoke(value)

    def run() -> None:
        documents = [Document(), None, Document()]
        weakref.finalize(documents[0], gone.set)
        with limiter, suppress(DeadlockError):
            Dual(call).batch(documents)

    gc.collect()
    gc.disable()
    try:
        run()
        assert limiter.stats().rejected == 1
        assert gone.wait(SAFETY_NET)
    finally:
        gc.enable()


def test_calls_at_once_of_which_one_has_given_up_are_told_with_who_waits_besides() -> None:
    """The other of them waits still, and so does their caller."""
    limiter = Limiter(limit=2)
    inner = limited(limiter)
    is_over = threading.Event()

    async def give_up(value: int) -> None:
        await until(lambda: limiter.stats().waiting >= 1)
        with suppress(TimeoutError):
            async with asyncio.timeout(0.1):
                await inner.acall(value)
        is_over.set()

    given_up = Dual(give_up)
    outer = limited(limiter, Dual(lambda value: inner.invoke(value) if value else given_up.invoke(value)).batch)
    ends: list[Any] = []

    def nest() -> None:
        with limiter:
            thread.start()
            is_over.wait(SAFETY_NET)
            wait_until(lambda: are_looked_at(limiter, 1) and len(limiter._queue[0].blocks[0].hands()) == 1)
            with limiter:
                pass

    thread = threading.Thread(target=lambda: ends.append(end_of(lambda: outer.invoke([0, 1]))))
    end = end_of(nest)
    thread.join(SAFETY_NET)

    assert isinstance(end, DeadlockError)
    assert [type(end) for end in ends] == [list]


@pytest.mark.parametrize("slots", [1, 2])
def test_calls_that_were_waited_for_are_not_kept(slots: int) -> None:
    """Neither by the limiter nor by who waited."""
    limiter = Limiter(limit=slots)
    permits = [limiter._enter() for _ in range(slots)]
    known = [weakref.ref(permit) for permit in permits]
    with suppress(DeadlockError):
        limiter._enter()
    while permits:
        permits.pop().finish()
    gc.collect()

    assert [permit() for permit in known] == [None] * slots


def test_an_item_that_ends_as_its_caller_is_about_to_wait_is_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller goes on then, and does not stand for one that waits."""
    may_end = threading.Event()
    fan = Threads(lambda _: lambda *_: may_end.wait(SAFETY_NET), lambda: 1, name="item", return_exceptions=False)
    timer = threading.Timer(1, may_end.set)
    with fan:
        fan.run([(0, None)])
        wait_until(lambda: len(fan._at_work) == 1)
        monkeypatch.setattr(fan, "_is_deserted", lambda: fan._ended.append((1, "ended", None)))
        timer.start()
        assert list(fan.take()) == [(1, "ended", None)]
        assert not may_end.is_set()
        assert fan.hands() == ()
        may_end.set()
        monkeypatch.undo()
    timer.cancel()


def test_calls_at_once_of_which_one_reads_the_results_of_others_are_no_proof_while_it_is_busy() -> None:
    """It has waited for them, and goes on with the first."""
    limiter = Limiter(limit=1)
    inner = limited(limiter)
    is_busy = threading.Event()

    def read() -> None:
        for _ in Dual(lambda value: inner.invoke(value) if value else time.sleep(0.05)).batch_as_completed([0, 1, 1]):
            wait_until(lambda: limiter.stats().waiting == 2)
            is_busy.set()
            wait_until(lambda: limiter.stats().waiting == 3)
            time.sleep(0.05)
            raise ValueError("failed")

    def call(value: int) -> None:
        if value:
            is_busy.wait(SAFETY_NET)
            inner.invoke(value)
        else:
            read()

    outer = limited(limiter, Dual(call).batch)

    assert str(end_of(lambda: outer.invoke([0, 1]))) == "failed"
    assert limiter.stats().rejected == 0
    wait_until(lambda: is_free(limiter))


@pytest.mark.parametrize("items", [2, 5])
def test_items_go_on_in_the_threads_that_there_are(items: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system has none left but for one; it is asked again as an item ends, not again and again at once."""
    fan = Threads(lambda _: lambda _, value: value, lambda: 5, name="item", return_exceptions=False)
    start = fan._pool.start
    asked: list[int] = []

    def refuse(*args: Any) -> Any:
        asked.append(len(asked))
        if len(asked) > 50 or len(asked) == 1:
            return start(*args)
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(fan._pool, "start", refuse)

    assert end_of(lambda: gather(fan, range(items))) == list(range(items))
    assert len(asked) <= 2 * items
    assert fan._hired == 0


def test_a_call_that_was_let_in_before_it_could_be_looked_at_is_not_noted_as_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What it has been asked for within would be taken for held up as long as the limiter lives."""
    limiter = Limiter(limit=2)
    elsewhere = limiter._enter()
    elsewhere.step_out()
    permit = limiter._enter()
    known = weakref.ref(permit)

    def held_after_the_slot_came_free() -> Any:
        elsewhere.end()
        return held_by_this_thread()

    monkeypatch.setattr("asyncify.turnstile.held_by_this_thread", held_after_the_slot_came_free)
    limiter._enter().finish()
    permit.finish()
    del permit
    gc.collect()

    assert known() is None


async def test_a_task_that_waits_for_itself_and_for_a_thread_that_does_is_told() -> None:
    """What threads hold that wait is held up, too."""
    limiter = Limiter(limit=2)
    ends: list[Any] = []

    def nest() -> str:
        with limiter, limiter:
            return "in"

    async with limiter:
        thread = threading.Thread(target=lambda: ends.append(end_of(nest)))
        thread.start()
        await until(lambda: limiter.stats().waiting == 1)
        with pytest.raises(DeadlockError):
            await asyncio.wait_for(limiter._aenter(), SAFETY_NET)
    await until(lambda: ends != [])
    thread.join()

    assert ends == ["in"]


@pytest.mark.parametrize("timeout", [None, 0.3])
def test_a_task_of_another_loop_is_no_proof_for_a_thread(timeout: float | None) -> None:
    """Of what ends its wait only its own loop knows, which tells it, as it would not be let in before."""
    limiter = Limiter(limit=2)
    told: list[str] = []

    async def nest() -> None:
        async with limiter:
            await until(lambda: limiter.stats().in_flight == 2)
            try:
                async with asyncio.timeout(timeout), limiter:
                    pass
            except DeadlockError:
                told.append("task")

    def nest_in_thread() -> str:
        with limiter:
            wait_until(lambda: limiter.stats().waiting == 1)
            with limiter:
                return "in"

    thread = threading.Thread(target=lambda: asyncio.run(nest()))
    thread.start()

    assert end_of(nest_in_thread) == "in"
    thread.join(SAFETY_NET)
    assert told == ["task"]
    wait_until(lambda: is_free(limiter))


class _Crew(Crew):
    """Threads that are given, of which one waits for each of some crews or calls."""

    def __init__(self) -> None:
        super().__init__(CancelScope())
        self.its: list[Hand] = []
        self.asked = 0

    def wait_for(self, *others: Any) -> None:
        for other in others:
            hand = Hand(self)
            hand.wait_for(other)
            self.its.append(hand)

    def hands(self) -> Collection[Hand]:
        self.asked += 1
        assert self.asked < 100
        return self.its


def test_crews_that_wait_for_each_other_are_gone_through_once() -> None:
    """An item of each reads what the other yields, say; that is no deadlock of the limiter's."""
    limiter = Limiter(limit=1)
    crews = [_Crew(), _Crew()]
    for crew, other in (crews, reversed(crews)):
        crew.wait_for(other)
    with limiter:
        for crew in crews:
            crew.hold_up_caller()

    assert limiter.stats().rejected == 0


async def test_who_comes_to_wait_first_asks_the_call_that_went_on_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else each of many would go through those that wait inside, until it meets that one."""
    limiter, outer = Limiter(limit=51), Limiter(limit=100)
    asked: list[Permit] = []
    from_call = Proof._from_call
    monkeypatch.setattr(Proof, "_from_call", lambda proof, call: _noted(asked, call, from_call(proof, call)))

    async def nest(around: Limiter) -> None:
        async with around:
            await until(lambda: limiter.stats().in_flight == 51)
            await until(lambda: around is limiter or limiter.stats().waiting >= 50)
            async with limiter:
                pass

    busy = await asyncio.create_task(limiter._aenter(), context=contextvars.Context())
    busy.kept_by = set()  # somebody has waited within it
    async with asyncio.timeout(SAFETY_NET), asyncio.TaskGroup() as group:
        for around in (*[limiter] * 50, *[outer] * 100):
            group.create_task(nest(around))
        await until(lambda: limiter.stats().waiting == 150)
        of_arrivals = len(asked)
        busy.finish()

    assert of_arrivals < 600
