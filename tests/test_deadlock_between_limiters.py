"""Calls that hold a slot of one limiter and wait for another, where those inside wait for the first."""

import asyncio
import contextvars
import gc
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Collection, Coroutine, Sequence
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from typing import Any

import pytest

from asyncify import DeadlockError, Dual, Limiter, LimitTimeout, aeach, concurrency, dual, each
from asyncify.deadlock import detection
from asyncify.deadlock.crews import Hand
from asyncify.deadlock.proofs import Proof
from asyncify.fanout import Threads
from asyncify.permits import Permit
from tests.at_once import are_looked_at, is_free, limited
from tests.waiting import SAFETY_NET, until, wait_until


def two() -> tuple[Limiter, Limiter]:
    """Return two limiters of one slot each."""
    return Limiter(limit=1, name="left"), Limiter(limit=1, name="right")


def told(ends: Sequence[Any]) -> list[str]:
    """Return what those were told that got a DeadlockError; the others must have got in."""
    errors = [str(end) for end in ends if isinstance(end, DeadlockError)]
    assert [end for end in ends if end != "in"] == [end for end in ends if isinstance(end, DeadlockError)]
    return errors


def ends_in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Run each in a thread and a context of its own; return what comes of them: results, or errors."""
    ends: dict[int, Any] = {}

    def run(at: int, work: Callable[[], Any]) -> None:
        try:
            ends[at] = contextvars.Context().run(work)
        except (Exception, asyncio.CancelledError) as error:  # noqa: BLE001  (it is looked at)
            ends[at] = error

    threads = [threading.Thread(target=run, args=each, daemon=True) for each in enumerate(works)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SAFETY_NET)
    assert len(ends) == len(works)
    return [ends[at] for at in range(len(works))]


async def ends_of_tasks(*works: Callable[[], Awaitable[Any]]) -> list[Any]:
    """Run each in a task and a context of its own; return what comes of them: results, or errors."""

    async def run(work: Callable[[], Awaitable[Any]]) -> Any:
        return await work()

    loop = asyncio.get_running_loop()
    tasks = [loop.create_task(run(work), context=contextvars.Context()) for work in works]
    return await asyncio.gather(*tasks, return_exceptions=True)  # a timeout here might end their waits


class TestInThreads:
    def nest(self, outer: Limiter, inner: Limiter, barrier: threading.Barrier) -> str:
        """Take a slot of one limiter, and when all have theirs one of another."""
        with outer:
            barrier.wait(SAFETY_NET)
            with inner:
                return "in"

    def test_two_that_take_two_limiters_crosswise(self) -> None:
        """The last to come is told, by way of which limiter it waits for itself, and the other gets in."""
        left, right = two()
        barrier = threading.Barrier(2)

        ends = ends_in_threads(partial(self.nest, left, right, barrier), partial(self.nest, right, left, barrier))

        (message,) = told(ends)
        waited, other = (right, left) if isinstance(ends[0], DeadlockError) else (left, right)
        assert message == (
            f"limiter {waited.name}: all slots (1) are held by calls that wait, by way of limiter {other.name}, for a "
            "slot of this very limiter, so none can ever come free. Have all calls take slots of these limiters in the "
            "same order."
        )
        assert waited.stats().rejected == 1
        assert other.stats().rejected == 0
        assert is_free(left)
        assert is_free(right)

    @pytest.mark.parametrize("size", [3, 5])
    def test_a_ring(self, size: int) -> None:
        """One of them is told, however many there are and whoever comes last, and sets the others free."""
        for _ in range(5):
            limiters = [Limiter(limit=1, name=str(at)) for at in range(size)]
            barrier = threading.Barrier(size)

            ends = ends_in_threads(
                *(partial(self.nest, limiters[at], limiters[at - 1], barrier) for at in range(size)),
            )

            assert len(told(ends)) == 1
            assert all(map(is_free, limiters))

    def test_a_long_ring_is_not_named_as_a_whole(self) -> None:
        """Of its limiters five are, and how many more there are."""
        limiters = [Limiter(limit=1, name=str(at)) for at in range(8)]
        barrier = threading.Barrier(8)

        ends = ends_in_threads(*(partial(self.nest, limiters[at], limiters[at - 1], barrier) for at in range(8)))

        (message,) = told(ends)
        assert message.count("limiter ") == 1 + 5  # its own, and those of its way
        assert " and 2 others, for a slot" in message

    def test_two_keys_of_one_limit_crosswise(self) -> None:
        """Each key has a limiter for itself, so that is the same."""
        barrier = threading.Barrier(2)

        @concurrency(limit=1, key=lambda given: given["account"], name="accounts")
        def transfer(account: str, to: str) -> str:
            if not to:
                return "in"
            barrier.wait(SAFETY_NET)
            return transfer(to, "")

        ends = ends_in_threads(partial(transfer, "ann", "bob"), partial(transfer, "bob", "ann"))

        (message,) = told(ends)
        assert "by way of limiter accounts['" in message

    def test_limiters_with_several_slots(self) -> None:
        """Nobody is told as long as one call inside may end; when it waits too, it is told."""
        left, right = Limiter(limit=2), Limiter(limit=1)
        barrier = threading.Barrier(3)

        def last() -> str:
            with left:
                barrier.wait(SAFETY_NET)
                wait_until(lambda: are_looked_at(left, 1) and are_looked_at(right, 1))
                with right:
                    return "in"

        ends = ends_in_threads(partial(self.nest, left, right, barrier), partial(self.nest, right, left, barrier), last)

        assert len(told(ends)) == 1
        assert isinstance(ends[2], DeadlockError)

    def test_a_call_inside_one_of_them_that_goes_on_is_no_proof(self) -> None:
        """It gives its slot back in the end."""
        left, right = Limiter(limit=1), Limiter(limit=2)
        barrier = threading.Barrier(3)

        def goes_on() -> str:
            with right:
                barrier.wait(SAFETY_NET)
                wait_until(lambda: left.stats().waiting == right.stats().waiting == 1)
                return "in"

        ends = ends_in_threads(
            partial(self.nest, left, right, barrier), partial(self.nest, right, left, barrier), goes_on
        )

        assert told(ends) == []

    def test_a_wait_with_a_timeout_is_no_proof(self) -> None:
        """When it is over the other gets in."""
        left, right = two()
        barrier = threading.Barrier(2)

        def gives_up() -> None:
            with left:
                barrier.wait(SAFETY_NET)
                right._enter(timeout=0.2)

        def nest() -> str:
            with right:
                barrier.wait(SAFETY_NET)
                wait_until(lambda: any(permit.timer for permit in list(right._queue)))
                with left:
                    return "in"

        gave_up, end = ends_in_threads(gives_up, nest)

        assert isinstance(gave_up, LimitTimeout)
        assert end == "in"

    def test_calls_at_once(self) -> None:
        """Each caller waits for all of its calls, which wait for the other's caller."""
        left, right = two()
        barrier = threading.Barrier(2)

        def nest(outer: Limiter, inner: Limiter) -> str:
            with outer:
                barrier.wait(SAFETY_NET)
                limited(inner).batch([1, 2])
            return "in"

        assert len(told(ends_in_threads(partial(nest, left, right), partial(nest, right, left)))) == 1
        wait_until(lambda: is_free(left) and is_free(right))

    def test_calls_at_once_of_which_one_goes_on_are_no_proof(self) -> None:
        """It fails, and so sets its caller free."""
        left, right = two()
        barrier = threading.Barrier(2)
        inner = limited(right)

        def call(value: int) -> None:
            if value:
                inner.invoke(value)
            wait_until(lambda: left.stats().waiting == right.stats().waiting == 1)
            raise ValueError("failed")

        def fails() -> None:
            with left:
                barrier.wait(SAFETY_NET)
                Dual(call).batch([0, 1])

        failed, end = ends_in_threads(fails, partial(self.nest, right, left, barrier))

        assert str(failed) == "failed"
        assert end == "in"

    def test_over_a_bridge(self) -> None:
        """The coroutine waits for what its caller's slot keeps."""
        left, right = two()
        barrier = threading.Barrier(2)

        def nest(outer: Limiter, inner: Limiter) -> str:
            async def over(value: int) -> str:
                async with inner:
                    return "in"

            with outer:
                barrier.wait(SAFETY_NET)
                return Dual(over).invoke(1)

        assert len(told(ends_in_threads(partial(nest, left, right), partial(nest, right, left)))) == 1

    def test_a_limiter_is_kept_by_nobody_who_has_waited_for_it(self) -> None:
        """Nor by the limiter within whose calls that was."""
        left, right = two()
        known = weakref.ref(right)
        permit = right._enter()
        permit.step_out()
        timer = threading.Timer(0.05, permit.end)
        timer.start()
        with left, right:
            pass
        timer.join()
        del permit, timer, right
        gc.collect()

        assert known() is None


class TestInTasks:
    async def nest(self, outer: Limiter, inner: Limiter, barrier: asyncio.Barrier) -> str:
        """Take a slot of one limiter, and when all have theirs one of another."""
        async with outer:
            await barrier.wait()
            async with inner:
                return "in"

    async def test_two_that_take_two_limiters_crosswise(self) -> None:
        """The last to come is told, by way of which limiter it waits for itself, and the other gets in."""
        left, right = two()
        barrier = asyncio.Barrier(2)

        ends = await ends_of_tasks(partial(self.nest, left, right, barrier), partial(self.nest, right, left, barrier))

        (message,) = told(ends)
        waited, other = (right, left) if isinstance(ends[0], DeadlockError) else (left, right)
        assert (
            f"limiter {waited.name}: all slots (1) are held by calls that wait, by way of limiter {other.name}"
            in message
        )
        assert waited.stats().rejected == 1
        assert other.stats().rejected == 0
        assert is_free(left)
        assert is_free(right)

    @pytest.mark.parametrize("size", [3, 5])
    async def test_a_ring(self, size: int) -> None:
        """One of them is told, however many there are and whoever comes last, and sets the others free."""
        limiters = [Limiter(limit=1, name=str(at)) for at in range(size)]
        barrier = asyncio.Barrier(size)

        ends = await ends_of_tasks(
            *(partial(self.nest, limiters[at], limiters[at - 1], barrier) for at in range(size)),
        )

        assert len(told(ends)) == 1
        assert all(map(is_free, limiters))

    async def test_two_keys_of_one_limit_crosswise(self) -> None:
        """Each key has a limiter for itself, so that is the same."""
        barrier = asyncio.Barrier(2)

        @concurrency(limit=1, key=lambda given: given["account"], name="accounts")
        async def transfer(account: str, to: str) -> str:
            if not to:
                return "in"
            await barrier.wait()
            return await transfer(to, "")

        ends = await ends_of_tasks(partial(transfer, "ann", "bob"), partial(transfer, "bob", "ann"))

        (message,) = told(ends)
        assert "by way of limiter accounts['" in message

    async def test_limiters_with_several_slots(self) -> None:
        """Nobody is told as long as one call inside may end; when it waits too, it is told."""
        left, right = Limiter(limit=2), Limiter(limit=1)
        barrier = asyncio.Barrier(3)

        async def last() -> str:
            async with left:
                await barrier.wait()
                await until(lambda: left.stats().waiting == right.stats().waiting == 1)
                async with right:
                    return "in"

        ends = await ends_of_tasks(
            partial(self.nest, left, right, barrier), partial(self.nest, right, left, barrier), last
        )

        assert len(told(ends)) == 1
        assert isinstance(ends[2], DeadlockError)

    async def test_a_call_inside_one_of_them_that_goes_on_is_no_proof(self) -> None:
        """It gives its slot back in the end."""
        left, right = Limiter(limit=1), Limiter(limit=2)
        barrier = asyncio.Barrier(3)

        async def goes_on() -> str:
            async with right:
                await barrier.wait()
                await until(lambda: left.stats().waiting == right.stats().waiting == 1)
                await asyncio.sleep(0.2)
                return "in"

        ends = await ends_of_tasks(
            partial(self.nest, left, right, barrier), partial(self.nest, right, left, barrier), goes_on
        )

        assert told(ends) == []

    async def test_a_wait_with_a_timeout_is_no_proof(self) -> None:
        """When it is over the other gets in."""
        left, right = two()
        barrier = asyncio.Barrier(2)

        async def gives_up() -> None:
            async with left:
                await barrier.wait()
                await right._aenter(timeout=0.2)

        async def nest() -> str:
            async with right:
                await barrier.wait()
                await until(lambda: right.stats().waiting == 1)
                async with left:
                    return "in"

        gave_up, end = await ends_of_tasks(gives_up, nest)

        assert isinstance(gave_up, LimitTimeout)
        assert end == "in"

    async def test_a_wait_that_a_timer_of_its_caller_may_end_is_no_proof(self) -> None:
        """When it is over the other gets in."""
        left, right = two()
        barrier = asyncio.Barrier(2)

        async def gives_up() -> str:
            async with asyncio.timeout(0.2):
                return await self.nest(left, right, barrier)

        async def nest() -> str:
            async with right:
                await barrier.wait()
                await until(lambda: right.stats().waiting == 1)
                async with left:
                    return "in"

        gave_up, end = await ends_of_tasks(gives_up, nest)

        assert isinstance(gave_up, TimeoutError)
        assert end == "in"

    async def test_calls_at_once(self) -> None:
        """Each caller waits for all of its calls, which wait for the other's caller."""
        left, right = two()
        barrier = asyncio.Barrier(2)

        async def nest(outer: Limiter, inner: Limiter) -> str:
            async with outer:
                await barrier.wait()
                await limited(inner).abatch([1, 2])
            return "in"

        assert len(told(await ends_of_tasks(partial(nest, left, right), partial(nest, right, left)))) == 1
        assert is_free(left)
        assert is_free(right)

    async def test_calls_at_once_of_which_one_goes_on_are_no_proof(self) -> None:
        """It fails, and so sets its caller free."""
        left, right = two()
        barrier = asyncio.Barrier(2)
        inner = limited(right)

        async def call(value: int) -> None:
            if value:
                await inner.ainvoke(value)
            await until(lambda: left.stats().waiting == right.stats().waiting == 1)
            await asyncio.sleep(0.2)
            raise ValueError("failed")

        async def fails() -> None:
            async with left:
                await barrier.wait()
                await Dual(call).abatch([0, 1])

        failed, end = await ends_of_tasks(fails, partial(self.nest, right, left, barrier))

        assert str(failed) == "failed"
        assert end == "in"

    async def test_over_a_bridge(self) -> None:
        """The thread waits for what its caller's slot keeps."""
        left, right = two()
        barrier = asyncio.Barrier(2)

        async def nest(outer: Limiter, inner: Limiter) -> str:
            def over(value: int) -> str:
                with inner:
                    return "in"

            async with outer:
                await barrier.wait()
                return await Dual(over).ainvoke(1)

        assert len(told(await ends_of_tasks(partial(nest, left, right), partial(nest, right, left)))) == 1

    async def test_a_limiter_is_kept_by_nobody_who_has_waited_for_it(self) -> None:
        """Nor by the limiter within whose calls that was."""
        left, right = two()
        known = weakref.ref(right)
        permit = right._enter()
        asyncio.get_running_loop().call_later(0.05, permit.end)
        permit.step_out()
        async with left, right:
            pass
        del permit, right
        await asyncio.sleep(0)
        gc.collect()

        assert known() is None


def test_who_comes_before_others_have_looked_is_not_told_in_their_place(monkeypatch: pytest.MonkeyPatch) -> None:
    """It waits for who waits for itself, and gets in when that is told."""
    limiter, elsewhere = two()
    looks, has_noted = detection._stuck_by, threading.Event()

    def look_late(permit: Permit, *args: Any) -> Any:
        if permit.outer is not None and permit.outer.issuer is limiter:
            has_noted.set()
            time.sleep(0.2)
        return looks(permit, *args)

    monkeypatch.setattr(detection, "_stuck_by", look_late)

    def nest() -> None:
        with limiter, limiter:
            pass

    def besides() -> str:
        with elsewhere:
            has_noted.wait(SAFETY_NET)
            with limiter:
                return "in"

    end, end_besides = ends_in_threads(nest, besides)

    assert isinstance(end, DeadlockError)
    assert end_besides == "in"


def test_of_two_that_look_at_once_one_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other finds that this one does not wait any more."""
    left, right = two()
    inside, both_wait, looking = (threading.Barrier(2) for _ in range(3))
    is_needed = detection._is_needed

    def look_together(*args: Any) -> bool:
        with suppress(threading.BrokenBarrierError):  # one of them looks alone, as it has to
            looking.wait(0.3)
        return is_needed(*args)

    monkeypatch.setattr(detection, "is_anybody_free", lambda *_: both_wait.wait(SAFETY_NET) < 0)
    monkeypatch.setattr(detection, "_is_needed", look_together)
    nest = TestInThreads().nest

    assert len(told(ends_in_threads(partial(nest, left, right, inside), partial(nest, right, left, inside)))) == 1


@pytest.mark.parametrize("is_one_of_them", [True, False])
def test_a_wait_that_is_called_off_during_a_look(monkeypatch: pytest.MonkeyPatch, *, is_one_of_them: bool) -> None:
    """It is no proof any more; and of no matter if it was none."""
    left, right, elsewhere = *two(), Limiter(limit=1)
    inside = threading.Barrier(2)
    may_look = threading.Event()
    others: list[Permit] = []
    looks: list[Limiter] = []
    places = Limiter._places

    def call_off_late(limiter: Limiter) -> float:
        if limiter is right and threading.current_thread().name == "last":
            looks.append(limiter)
            for wait in others if len(looks) == 2 else ():  # in the look that counts, when they have been seen
                wait.call_off()
        return places(limiter)

    def last() -> str:
        with right:
            inside.wait(SAFETY_NET)
            may_look.wait(SAFETY_NET)
            threading.current_thread().name = "last"
            with left:
                return "in"

    def besides() -> None:
        wait_until(lambda: are_looked_at(right, 1))
        with elsewhere:
            threading.Thread(target=note, daemon=True).start()
            with left:
                pass

    def note() -> None:
        wait_until(lambda: are_looked_at(left, 1))
        others.extend((right if is_one_of_them else left)._queue)
        may_look.set()

    monkeypatch.setattr(Limiter, "_places", call_off_late)
    ends = ends_in_threads(partial(TestInThreads().nest, left, right, inside), last, besides)

    assert isinstance(ends[1], DeadlockError) != is_one_of_them
    assert ends[0] == "in" or is_one_of_them


@pytest.mark.parametrize("what", ["ends", "waits elsewhere", "ends in a batch of a batch"])
def test_an_item_of_a_batch_whose_siblings_can_not_call_it_off_any_more_is_told(what: str) -> None:
    """When the last of them ends, or comes to wait."""
    left, right, elsewhere = *two(), Limiter(limit=1)
    is_in_left, is_in_right = threading.Event(), threading.Event()

    def item(value: int) -> str:
        if value:
            with left:
                is_in_left.set()
                is_in_right.wait(SAFETY_NET)
                with right:
                    return "in"
        if what == "waits elsewhere":
            is_in_right.wait(SAFETY_NET)
            with elsewhere:
                return "in"
        wait_until(lambda: are_looked_at(left, 1))
        time.sleep(0.05)
        return "in"

    def batch() -> str:
        if what == "ends in a batch of a batch":
            return str(Dual(lambda value: Dual(item).batch([1, 0])[0] if value else "in").batch([1, 0])[0])
        return str(Dual(item).batch([1, 0])[0])

    def besides() -> str:
        with elsewhere if what == "waits elsewhere" else nullcontext(), right:
            is_in_right.set()
            is_in_left.wait(SAFETY_NET)
            wait_until(lambda: are_looked_at(right, 1))
            if what == "waits elsewhere":
                wait_until(lambda: are_looked_at(elsewhere, 1))
            with left:
                return "in"

    assert len(told(ends_in_threads(batch, besides))) == 1


def test_a_wait_looks_no_further_than_to_the_first_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many wait where it does, each within a call elsewhere."""
    outer, middle, inner = Limiter(limit=99), Limiter(limit=9), Limiter(limit=1)
    looks: list[Permit] = []
    from_wait = Proof._from_wait

    def look(proof: Proof, wait: Permit) -> Any:
        looks.append(wait)
        return from_wait(proof, wait)

    monkeypatch.setattr(Proof, "_from_wait", look)
    permit = inner._enter()
    permit.step_out()

    def nest(*limiters: Limiter) -> str:
        with ExitStack() as stack:
            for limiter in limiters:
                stack.enter_context(limiter)
        return "in"

    def let_in() -> str:
        wait_until(lambda: middle.stats().waiting == 50)
        permit.end()
        return "in"

    assert told(ends_in_threads(let_in, *[partial(nest, outer, middle, inner)] * 59)) == []
    assert len(looks) <= 59


@pytest.mark.parametrize("last", ["thread", "task"])
def test_a_thread_and_a_task_crosswise(last: str) -> None:
    """Whoever comes last, one of them is told."""
    left, right = two()
    barrier = threading.Barrier(2)

    def in_thread() -> str:
        with left:
            barrier.wait(SAFETY_NET)
            if last == "thread":
                wait_until(lambda: left.stats().waiting == 1)
            with right:
                return "in"

    async def in_task() -> str:
        async with right:
            barrier.wait(SAFETY_NET)
            if last == "task":
                await until(lambda: right.stats().waiting == 1)
            async with left:
                return "in"

    assert len(told(ends_in_threads(in_thread, lambda: asyncio.run(in_task())))) == 1


async def test_the_sides_of_a_pair_crosswise() -> None:
    """A sync side in a thread of its own, whose caller awaits it, and an async one."""
    left, right = two()
    barrier = threading.Barrier(2)

    async def anest(limiters: tuple[Limiter, Limiter]) -> str:
        async with limiters[0]:
            await asyncio.to_thread(barrier.wait, SAFETY_NET)
            async with limiters[1]:
                return "in"

    @dual(async_=anest)
    def nest(limiters: tuple[Limiter, Limiter]) -> str:
        with limiters[0]:
            barrier.wait(SAFETY_NET)
            with limiters[1]:
                return "in"

    ends = await ends_of_tasks(partial(nest.acall, (left, right)), partial(asyncio.to_thread, nest.call, (right, left)))

    assert len(told(ends)) == 1


async def test_who_waits_for_them_and_keeps_none_of_them_is_not_the_one_that_is_told() -> None:
    """It would not set them free, and gets in when another is told, though it came last."""
    limiter, elsewhere = Limiter(limit=1), Limiter(limit=1)

    async def nest() -> None:
        async with limiter:
            pass

    async def call() -> None:
        async with limiter:
            await asyncio.gather(nest(), nest(), until(lambda: limiter.stats().waiting == 3))

    async def besides() -> str:
        async with elsewhere:
            await until(lambda: limiter.stats().waiting == 2)
            async with limiter:
                return "in"

    end, end_besides = await ends_of_tasks(call, besides)

    assert isinstance(end, DeadlockError)
    assert end_besides == "in"
    assert limiter.stats().rejected == 1


@pytest.mark.parametrize("how", ["by itself", "in a batch"])
def test_a_call_keeps_nothing_of_what_has_waited_within_it(how: str) -> None:
    """However often that was."""
    left, right = two()
    permits: list[Permit] = []

    def wait(_: object) -> None:
        with right:
            pass

    def nest() -> str:
        with left as permit:
            permits.append(permit)
            if how == "by itself":
                wait(None)
            else:
                Dual(wait).batch([1, 2])
            return "in"

    def let_in() -> str:
        wait_until(lambda: right.stats().waiting == (1 if how == "by itself" else 2))
        elsewhere.end()
        return "in"

    elsewhere = right._enter()
    elsewhere.step_out()

    assert told(ends_in_threads(nest, let_in)) == []
    assert permits[0].kept_by == set()


async def test_who_holds_something_that_nobody_wants_is_not_told() -> None:
    """Though it came last, and waits for those who wait for one another."""
    left, right = two()
    elsewhere = Limiter(limit=1)
    barrier = asyncio.Barrier(3)

    async def nest(outer: Limiter, inner: Limiter) -> str:
        async with outer:
            await barrier.wait()
            permits = await asyncio.gather(inner._aenter())
            permits[0].end()
        return "in"

    async def besides() -> str:
        async with elsewhere:
            await barrier.wait()
            for _ in range(2):
                await asyncio.sleep(0)
            async with left:
                return "in"

    ends = await ends_of_tasks(partial(nest, left, right), partial(nest, right, left), besides)

    assert len(told(ends)) == 1
    assert ends[2] == "in"


async def test_who_keeps_others_from_ending_and_waits_for_who_waits_for_itself_is_not_told() -> None:
    """Though it came last: when the other has been told, it gets in, and so do those that it keeps."""
    left, elsewhere = Limiter(limit=1), Limiter(limit=20)
    others = [Limiter(limit=1) for _ in range(20)]

    async def nest(inner: Limiter) -> str:
        async with inner:
            return "in"

    async def call() -> str:
        async with left:
            go_on = until(lambda: left.stats().waiting == 22 and all(other.stats().waiting for other in others))
            await asyncio.gather(nest(left), nest(left), go_on)
        return "in"

    async def keep_others(right: Limiter) -> str:
        async with right:
            await until(lambda: left.stats().waiting >= 2 and right.stats().waiting == 1)
            (end,) = await asyncio.gather(nest(left))
            return end

    async def besides(right: Limiter) -> str:
        async with elsewhere:
            return await nest(right)

    works = [partial(work, other) for other in others for work in (keep_others, besides)]
    ends = await ends_of_tasks(call, *works)

    assert len(told(ends)) == 1
    assert isinstance(ends[0], DeadlockError)


async def test_who_may_be_cancelled_and_only_waits_for_who_waits_for_itself_hides_nobody() -> None:
    """Its sibling may fail, and so end its wait, which keeps nobody."""
    limiter = Limiter(limit=1)

    async def nest() -> None:
        async with limiter:
            pass

    async def call() -> None:
        async with limiter:
            await until(lambda: limiter.stats().waiting == 1)
            await asyncio.gather(nest(), nest())

    async def besides(value: int) -> None:
        await (nest() if value else asyncio.sleep(2 * SAFETY_NET))

    works = [call(), Dual(besides).abatch([0, 1])]
    tasks = [asyncio.create_task(work, context=contextvars.Context()) for work in works]
    await asyncio.wait(tasks[:1], timeout=SAFETY_NET)

    assert isinstance(tasks[0].exception(), DeadlockError)
    tasks[1].cancel()
    await asyncio.wait(tasks)


async def test_one_of_many_at_once_that_may_be_cancelled_is_no_proof_of_all() -> None:
    """Though only some of them are known to keep their caller."""
    limiter = Limiter(limit=1)

    async def nest() -> None:
        async with limiter:
            pass

    async def hurry() -> None:
        async with asyncio.timeout(0.3):
            await nest()

    async def call() -> None:
        async with limiter:
            await asyncio.gather(hurry(), *(nest() for _ in range(12)))

    assert [type(end) for end in await ends_of_tasks(call)] == [TimeoutError]


def test_a_crew_whose_caller_goes_on_during_a_look_is_no_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has left the call that it was seen in, though it waits again by the time that its threads are looked at."""
    left, right, elsewhere = *two(), Limiter(limit=1)
    may_end, is_out = threading.Event(), threading.Event()
    hands, look = Threads.hands, detection._look
    looks_in: list[int] = []

    def item(value: int) -> str:
        may_end.wait(SAFETY_NET)
        with right if value else nullcontext():
            return "in"

    def look_late(fan: Threads) -> Collection[Hand]:
        if threading.get_ident() in looks_in and not may_end.is_set():
            may_end.set()
            is_out.wait(SAFETY_NET)
            wait_until(lambda: right.stats().waiting == 1 and fan.is_waiting())
        return hands(fan)

    def note_look(*args: Any) -> bool:
        looks_in.append(threading.get_ident())
        try:
            return look(*args)
        finally:
            looks_in.clear()

    def read() -> str:
        results = each(Dual(item), [0, 1])
        with left:
            next(results)
        with elsewhere:  # so that it holds something as it reads on
            is_out.set()
            return str(next(results))

    def ahead() -> str:
        wait_until(lambda: left.stats().in_flight == 1)
        with left:
            time.sleep(0.2)
            return "in"

    async def besides() -> str:
        async with right:
            await until(lambda: left.stats().waiting == 1)
            async with left:
                return "in"

    monkeypatch.setattr(Threads, "hands", look_late)
    monkeypatch.setattr(detection, "_look", note_look)

    assert told(ends_in_threads(read, ahead, lambda: asyncio.run(besides()))) == []
    assert may_end.is_set()


@pytest.mark.parametrize("why", ["a timer", "a thread"])
async def test_who_may_go_on_elsewhere_hides_nobody(why: str) -> None:
    """Those who wait on the same event loop, and for nobody else, are looked at by themselves."""
    left, right = two()
    limiter = Limiter(limit=1)

    async def nest(inner: Limiter) -> None:
        async with inner:
            pass

    async def hurry() -> None:
        async with left:
            await asyncio.gather(nest(left), asyncio.wait_for(nest(left), 2 * SAFETY_NET))

    async def over_a_thread() -> None:
        async with right:
            await Dual(lambda _: left._enter().end()).ainvoke(1)

    async def other() -> None:
        async with left:
            await until(lambda: left.stats().waiting == 1)
            await nest(right)

    async def call() -> None:
        async with limiter:
            await asyncio.gather(nest(limiter), nest(limiter))

    elsewhere = [hurry()] if why == "a timer" else [other(), over_a_thread()]
    tasks = [asyncio.create_task(work, context=contextvars.Context()) for work in elsewhere]
    await until(lambda: left.stats().waiting + right.stats().waiting == 2)
    told_one = asyncio.create_task(call(), context=contextvars.Context())
    await asyncio.wait([told_one], timeout=SAFETY_NET)

    assert isinstance(told_one.exception(), DeadlockError)
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_so_many_that_it_would_take_long_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until they are fewer; those do not count that wait where somebody goes on."""
    monkeypatch.setattr(detection, "_MANY", 2)
    limiter, busy, outer = Limiter(limit=1), Limiter(limit=1), Limiter(limit=10)
    permit = busy._enter()
    permit.step_out()

    async def wait(for_: Limiter) -> None:
        async with outer, for_:
            pass

    async def call(count: int) -> None:
        async with limiter:
            await asyncio.gather(*(limiter._aenter() for _ in range(count)))

    elsewhere = [asyncio.create_task(wait(busy)) for _ in range(5)]
    await until(lambda: busy.stats().waiting == 5)
    many = asyncio.create_task(call(3))
    await asyncio.sleep(0.2)
    assert limiter.stats().rejected == 0
    many.cancel()
    await asyncio.wait([many])

    with pytest.raises(DeadlockError):
        await asyncio.wait_for(call(2), SAFETY_NET)
    permit.end()
    await asyncio.wait(elsewhere)


async def _in_a_group(calls: list[Coroutine[Any, Any, Any]]) -> None:
    async with asyncio.TaskGroup() as group:
        for call in calls:
            group.create_task(call)


@pytest.mark.parametrize("how", ["abatch", "abatch, with errors", "gather", "group", "aeach"])
async def test_calls_at_once_of_which_some_wait_further_out_are_told(how: str) -> None:
    """There are more of them than the outer limiter has slots for; who has none can't fail before the others end."""
    outer, inner = Limiter(limit=2), Limiter(limit=2)
    both_in = asyncio.Barrier(2)

    async def call(value: int) -> int:
        async with inner:
            if value < 2:
                await both_in.wait()
            async with inner:
                return value

    pair: Any = concurrency(limiter=outer)(call)
    async with asyncio.timeout(SAFETY_NET):
        if how == "abatch":
            with pytest.raises(DeadlockError):
                await pair.abatch([0, 1, 2, 3])
        elif how == "aeach":
            with pytest.raises(DeadlockError):
                _ = [result async for result in aeach(pair, [0, 1, 2, 3], window=4)]
        elif how == "group":
            with pytest.raises(ExceptionGroup):
                await _in_a_group([pair.ainvoke(value) for value in range(4)])
        elif how == "gather":
            with pytest.raises(DeadlockError):
                await asyncio.gather(*map(pair.ainvoke, range(4)))
        else:
            ends = await pair.abatch([0, 1, 2, 3], return_exceptions=True)
            assert [type(end) for end in ends] in ([DeadlockError, int, int, int], [int, DeadlockError, int, int])

    await until(lambda: outer.stats().in_flight == inner.stats().in_flight == 0)
    assert inner.stats().rejected == 1


async def test_calls_of_a_batch_that_keeps_errors_are_told_though_another_goes_on() -> None:
    """By its failure it would set none of them free."""
    limiter = Limiter(limit=2)
    both_in = asyncio.Barrier(2)

    @dual
    async def call(value: int) -> int:
        if value == 2:
            await until(lambda: limiter.stats().rejected == 1)
            return value
        async with limiter:
            await both_in.wait()
            async with limiter:
                return value

    ends = await call.abatch([0, 1, 2], return_exceptions=True)

    assert sorted(type(end).__name__ for end in ends) == ["DeadlockError", "int", "int"]
