"""The ten promises of a limiter, for threads and for tasks, under a clock that moves only when told."""

import asyncio
import contextvars
import gc
import threading
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any, Protocol

import httpx
import pytest
from langchain_core.language_models.fake_chat_models import GenericFakeChatModel
from langchain_core.messages import AIMessage

from asyncify.adaptive import Adaptive
from asyncify.errors import DeadlockError, LimitTimeout
from asyncify.limiter import Limiter, LimiterStats
from asyncify.meter import Meter
from asyncify.permits import Permit
from asyncify.testing import FakeClock

SAFETY_NET = 30  # seconds after which a wait that should have ended is a failure


async def until(holds: Callable[[], bool]) -> None:
    """Wait until something holds that other threads or tasks bring about."""
    async with asyncio.timeout(SAFETY_NET):
        while not holds():  # noqa: ASYNC110  (other threads bring it about, which can't set an asyncio.Event)
            await asyncio.sleep(0.0005)


class Call(Protocol):
    """One call through a limiter, on a thread or in a task."""

    name: str
    admitted: bool
    over: bool
    error: BaseException | None

    def finish(self, error: BaseException | None = None) -> None:
        """End the call, with the error that it raises."""
        ...


class ThreadCall:
    def __init__(self, crowd: "Crowd", name: str, **how: Any) -> None:
        self.name = name
        self.admitted = self.over = False
        self.error: BaseException | None = None
        self._crowd, self._how = crowd, how
        self._end = threading.Event()
        self._raises: BaseException | None = None
        self._thread = threading.Thread(target=contextvars.Context().run, args=(self._run,), daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            permit = self._crowd.limiter.enter(**self._how)
            self._crowd.admitted(self)
            self._end.wait(SAFETY_NET)
            permit.leave(self._raises)
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            self.error = error
        self.over = True

    def finish(self, error: BaseException | None = None) -> None:
        self._raises = error
        self._end.set()


class TaskCall:
    def __init__(self, crowd: "Crowd", name: str, **how: Any) -> None:
        self.name = name
        self.admitted = self.over = False
        self.error: BaseException | None = None
        self._crowd, self._how = crowd, how
        self._end = asyncio.Event()
        self._raises: BaseException | None = None
        self.task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    async def _run(self) -> None:
        try:
            permit = await self._crowd.limiter.aenter(**self._how)
            self._crowd.admitted(self)
            await self._end.wait()
            permit.leave(self._raises)
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            self.error = error
        self.over = True

    def finish(self, error: BaseException | None = None) -> None:
        self._raises = error
        self._end.set()


class Crowd:
    """Calls that come to one limiter, each from a thread or a task of its own."""

    def __init__(self, kind: type[ThreadCall] | type[TaskCall]) -> None:
        self.kind = kind
        self.clock = FakeClock()
        self.order: list[str] = []
        self.calls: list[ThreadCall | TaskCall] = []

    def limiter_of(self, **limits: Any) -> Limiter:
        self.limiter = Limiter(clock=self.clock, **limits)
        return self.limiter

    def admitted(self, call: ThreadCall | TaskCall) -> None:
        self.order.append(call.name)
        call.admitted = True

    async def come(self, name: str = "", **how: Any) -> ThreadCall | TaskCall:
        """Let a call come, and wait until it is in, in the queue, or turned away."""
        before = self.limiter.stats()
        call = self.kind(self, name, **how)
        self.calls.append(call)
        await until(lambda: call.admitted or call.over or self.limiter.stats().waiting > before.waiting)
        return call

    async def come_all(self, names: str, **how: Any) -> list[ThreadCall | TaskCall]:
        return [await self.come(name, **how) for name in names]

    async def finish(self, call: ThreadCall | TaskCall, error: BaseException | None = None) -> None:
        call.finish(error)
        await until(lambda: call.over)
        await self.all_woken()

    async def advance(self, seconds: float) -> None:
        self.clock.advance(seconds)
        await self.all_woken()

    async def all_woken(self) -> None:
        """Wait until everybody who was admitted knows it."""
        await until(lambda: len(self.order) == self.limiter.stats().admitted)

    async def disperse(self) -> None:
        """Let everybody go, and see that nothing is left behind."""

        def are_gone() -> bool:
            for call in self.calls:
                call.finish()
            self.clock.advance(100)  # each time: a thread may be slow to end, and the next call waits for the pace
            return all(call.over for call in self.calls)

        await until(are_gone)
        stats = self.limiter.stats()
        assert (stats.in_flight, stats.waiting) == (0, 0)


@pytest.fixture(params=[ThreadCall, TaskCall], ids=["threads", "tasks"])
async def crowd(request: pytest.FixtureRequest) -> AsyncIterator[Crowd]:
    """A crowd of threads, then a crowd of tasks: the same behaviour on both paths."""
    crowd = Crowd(request.param)
    yield crowd
    await crowd.disperse()


@pytest.fixture
def clock() -> FakeClock:
    """A clock for a limiter."""
    return FakeClock()


async def start_times(crowd: Crowd, count: int, step: float = 0.01) -> list[float]:
    """Return when so many calls that came together were admitted, ending each as soon as it is."""
    calls = await crowd.come_all("x" * count)
    times = [0.0] * crowd.limiter.stats().admitted
    while len(times) < count:
        for call in [call for call in calls if call.admitted and not call.over]:
            await crowd.finish(call)
        await crowd.advance(step)
        times += [crowd.clock.now()] * (crowd.limiter.stats().admitted - len(times))
    return times


class TestSlots:
    async def test_never_more_than_the_limit(self, crowd: Crowd) -> None:
        """Calls beyond the limit wait, and each that ends lets one in."""
        limiter = crowd.limiter_of(limit=3)
        calls = await crowd.come_all("abcde")
        assert limiter.stats().in_flight == 3
        await crowd.finish(calls[1])

        assert crowd.order == ["a", "b", "c", "d"]
        assert limiter.stats().in_flight == 3
        assert limiter.stats().waiting == 1

    async def test_threads_and_two_loops_share_the_slots(self) -> None:
        """A slot held by a thread is missing to both loops, and goes to whoever came first."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1)
        holder = ThreadCall(crowd, "thread")
        await until(lambda: holder.admitted)

        async def other_loop() -> None:
            async with limiter:
                crowd.order.append("other loop")

        other = threading.Thread(target=lambda: asyncio.run(other_loop()))
        other.start()
        await until(lambda: limiter.stats().waiting == 1)
        here = await crowd.come("this loop")
        holder.finish()
        await until(lambda: here.admitted)
        await asyncio.to_thread(other.join)
        await crowd.disperse()

        assert crowd.order == ["thread", "other loop", "this loop"]

    async def test_an_error_gives_the_slot_back(self, crowd: Crowd) -> None:
        """A call that fails leaves as well as one that succeeds."""
        limiter = crowd.limiter_of(limit=1)
        call = await crowd.come()
        await crowd.finish(call, ValueError("bad"))

        assert limiter.stats().in_flight == 0

    def test_with_holds_a_slot(self) -> None:
        """Inside the block a slot is held, after it, be it by an error, it is free."""
        limiter = Limiter(limit=2)
        with pytest.raises(KeyError), limiter:  # noqa: PT012  (what is inside the block is what is tested)
            assert limiter.stats().in_flight == 1
            raise KeyError

        assert limiter.stats().in_flight == 0

    async def test_async_with_holds_a_slot(self) -> None:
        """Inside the block a slot is held, after it, be it by an error, it is free."""
        limiter = Limiter(limit=2)
        with pytest.raises(KeyError):  # noqa: PT012  (what is inside the block is what is tested)
            async with limiter:
                assert limiter.stats().in_flight == 1
                raise KeyError

        assert limiter.stats().in_flight == 0

    def test_with_waits_and_is_woken(self) -> None:
        """A thread that waits at the `with` goes on when the slot is free."""
        limiter = Limiter(limit=1)
        done = threading.Event()

        def wait() -> None:
            with limiter:
                done.set()

        with limiter:
            thread = threading.Thread(target=wait)
            thread.start()
            while not limiter.stats().waiting:
                done.wait(0.001)
            assert not done.is_set()
        thread.join(SAFETY_NET)

        assert done.is_set()

    async def test_async_with_waits_and_is_woken(self) -> None:
        """A task that waits at the `async with` goes on when the slot is free."""
        limiter = Limiter(limit=1)

        async def wait() -> str:
            async with limiter:
                return "in"

        async with limiter:
            task = asyncio.get_running_loop().create_task(wait(), context=contextvars.Context())
            await until(lambda: limiter.stats().waiting == 1)

        assert await task == "in"

    def test_each_exit_leaves_its_own_limiter(self) -> None:
        """Also where the outer one is left first."""
        outer, inner = Limiter(limit=1), Limiter(limit=1)
        outer.__enter__()
        inner.__enter__()
        outer.__exit__(None, None, None)
        assert (outer.stats().in_flight, inner.stats().in_flight) == (0, 1)
        inner.__exit__(None, None, None)

        assert inner.stats().in_flight == 0

    async def test_each_aexit_leaves_its_own_limiter(self) -> None:
        """Also where the outer one is left first."""
        outer, inner = Limiter(limit=1), Limiter(limit=1)
        await outer.__aenter__()
        await inner.__aenter__()
        await outer.__aexit__(None, None, None)
        assert (outer.stats().in_flight, inner.stats().in_flight) == (0, 1)
        await inner.__aexit__(None, None, None)

        assert inner.stats().in_flight == 0

    def test_leaving_what_was_not_entered_is_an_error(self) -> None:
        """A limiter that this context has not entered can't be left."""
        limiter = Limiter(limit=2, name="quotes")

        with pytest.raises(RuntimeError, match=r"^limiter quotes: this context is not inside a call"):
            limiter.__exit__(None, None, None)


class TestRates:
    async def test_no_window_is_over_and_calls_start_evenly(self, crowd: Crowd) -> None:
        """At 4 per second, ten calls that come together start 0.25 s apart."""
        crowd.limiter_of(per_second=4)

        times = await start_times(crowd, 10, step=0.125)

        assert times == [n / 4 for n in range(10)]

    async def test_a_burst_starts_back_to_back(self, crowd: Crowd) -> None:
        """With burst=3, three start at once, and the second still holds four."""
        crowd.limiter_of(per_second=4, burst=3)

        times = await start_times(crowd, 8, step=0.125)

        assert times == [0, 0, 0, 0.25, 1.0, 1.0, 1.0, 1.25]

    async def test_slot_and_token_come_in_one_moment(self, crowd: Crowd) -> None:
        """Calls that waited long for slots do not start together when the slots come free."""
        crowd.limiter_of(limit=3, per_second=10)
        calls = await crowd.come_all("abc")
        await crowd.advance(0.1)
        await crowd.advance(0.1)
        await crowd.come_all("defg")
        await crowd.advance(30)
        for call in calls:
            await crowd.finish(call)
        assert crowd.order == list("abcd")
        await crowd.advance(0.1)

        assert crowd.order == list("abcde")

    async def test_a_rate_under_one_is_a_call_in_several_seconds(self, crowd: Crowd) -> None:
        """per_second=0.5 admits one call every two seconds."""
        crowd.limiter_of(per_second=0.5)

        assert await start_times(crowd, 3, step=0.5) == pytest.approx([0, 2, 4])

    async def test_cost_takes_its_share_of_the_rate(self, crowd: Crowd) -> None:
        """A call of cost 5 at 10 per second delays the next by half a second."""
        crowd.limiter_of(per_second=10)
        await crowd.come("heavy", cost=5)
        await crowd.come("light")
        await crowd.advance(0.49)
        assert crowd.order == ["heavy"]
        await crowd.advance(0.01)

        assert crowd.order == ["heavy", "light"]

    async def test_a_cost_that_can_never_be_admitted_is_told(self, crowd: Crowd) -> None:
        """The error names both figures, and nobody is queued."""
        limiter = crowd.limiter_of(per_second=100, per_minute=20, name="tokens")
        call = await crowd.come(cost=21)

        assert isinstance(call.error, ValueError)
        assert str(call.error) == "limiter tokens: a cost of 21 can never be admitted, as the limit is 20 per minute"
        assert limiter.stats().waiting == 0

    async def test_it_is_told_behind_a_queue_too(self, crowd: Crowd) -> None:
        """It does not wait for its turn, which would hold up everybody behind it."""
        limiter = crowd.limiter_of(per_minute=20)
        await crowd.come_all("ab")
        call = await crowd.come(cost=21)

        assert isinstance(call.error, ValueError)
        assert limiter.stats().waiting == 1


class TestOrder:
    async def test_first_come_first_served(self, crowd: Crowd) -> None:
        """Waiters are admitted in the order of their coming."""
        crowd.limiter_of(limit=1)
        calls = await crowd.come_all("abcdef")
        for call in calls:
            await crowd.finish(call)

        assert crowd.order == list("abcdef")

    async def test_a_light_call_does_not_overtake_a_heavy_one(self, crowd: Crowd) -> None:
        """While a heavy call waits for its budget, light ones behind it wait as well."""
        crowd.limiter_of(per_minute=60, burst=60)
        await crowd.come("a", cost=50)
        await crowd.come("heavy", cost=60)
        await crowd.come("light", cost=1)
        await crowd.advance(59)
        assert crowd.order == ["a"]
        await crowd.advance(1)
        assert crowd.order == ["a", "heavy"]
        await crowd.advance(60)

        assert crowd.order == ["a", "heavy", "light"]

    async def test_a_newcomer_does_not_overtake(self, crowd: Crowd) -> None:
        """A call that comes when there is room for it, but not for the one ahead, waits its turn."""
        limiter = crowd.limiter_of(per_minute=10, burst=10)
        await crowd.come("a", cost=8)
        await crowd.come("b", cost=5)
        await crowd.come("c", cost=1)

        assert limiter.stats().waiting == 2

    async def test_a_frozen_loop_at_the_front_delays_only_itself(self) -> None:
        """A loop that does not run is admitted all the same, and whoever is behind it gets the next slot."""
        crowd = Crowd(ThreadCall)
        limiter = crowd.limiter_of(limit=2)
        first, second = await crowd.come_all("ab")
        frozen = threading.Event()
        thaw = threading.Event()

        async def freeze() -> None:
            task = asyncio.create_task(limiter.aenter())
            await until(lambda: limiter.stats().waiting == 1)
            frozen.set()
            thaw.wait(SAFETY_NET)
            (await task).leave()

        loop = threading.Thread(target=lambda: asyncio.run(freeze()))
        loop.start()
        await until(frozen.is_set)
        behind = await crowd.come("c")
        first.finish()
        await until(lambda: first.over)
        second.finish()
        await until(lambda: behind.admitted)
        thaw.set()
        await asyncio.to_thread(loop.join)

        await crowd.disperse()

    async def test_the_rate_alone_passes_those_who_wait_for_a_slot(self, crowd: Crowd) -> None:
        """Who needs no slot is not held up by full slots, and still waits for the rate in its turn."""
        crowd.limiter_of(limit=1, per_second=10)
        await crowd.come("slot")
        await crowd.come("waits")
        await crowd.come("rate 1", slots=0)
        await crowd.come("rate 2", slots=0)
        await crowd.advance(0.1)
        assert crowd.order == ["slot", "rate 1"]
        await crowd.advance(0.1)

        assert crowd.order == ["slot", "rate 1", "rate 2"]

    async def test_the_rate_alone_passes_at_once(self, crowd: Crowd) -> None:
        """With slots full and the rate free, a call for the rate alone does not wait."""
        limiter = crowd.limiter_of(limit=1, per_second=10)
        await crowd.come("slot")
        await crowd.come("waits")
        await crowd.advance(5)
        await crowd.come("rate", slots=0)

        assert crowd.order == ["slot", "rate"]
        assert limiter.stats().waiting == 1

    async def test_the_rate_alone_does_not_pass_those_who_wait_for_the_rate(self, crowd: Crowd) -> None:
        """With a free slot, the queue is one: nobody overtakes."""
        crowd.limiter_of(limit=5, per_second=10)
        await crowd.come("a")
        await crowd.come("b")
        await crowd.come("rate", slots=0)
        await crowd.advance(0.1)

        assert crowd.order == ["a", "b"]

    async def test_the_rate_alone_does_not_pass_a_heavier_call(self, crowd: Crowd) -> None:
        """With a free slot, even a call for which there would be room waits its turn."""
        crowd.limiter_of(limit=5, per_minute=10, burst=10)
        await crowd.come("a", cost=8)
        await crowd.come("heavy", cost=5)
        await crowd.come("rate", slots=0)

        assert crowd.order == ["a"]


class TestGivingUp:
    async def test_a_timeout_says_how_long_and_behind_how_many(self, crowd: Crowd) -> None:
        """LimitTimeout is a TimeoutError that names the limiter, the wait and the calls ahead."""
        limiter = crowd.limiter_of(limit=1, name="quotes")
        await crowd.advance(100)
        await crowd.come()
        await crowd.come()
        late = await crowd.come(timeout=2.5)
        crowd.clock.advance(2.4)
        assert limiter.stats().waiting == 2
        crowd.clock.advance(0.1)
        await until(lambda: late.over)

        assert isinstance(late.error, LimitTimeout)
        assert str(late.error) == (
            "limiter quotes: not admitted within 2.5 s; 1 calls were ahead of it when it came. Raise timeout= or the "
            "limit, or send less."
        )
        assert limiter.stats().waiting == 1
        assert limiter.stats().rejected == 1

    async def test_those_who_have_left_are_not_ahead(self, crowd: Crowd) -> None:
        """A waiter that gave up is not counted, though its place in the queue may be empty still."""
        crowd.limiter_of(limit=1)
        await crowd.come_all("ab")
        gone = await crowd.come("c", timeout=1)
        await crowd.come("d")
        crowd.clock.advance(1)
        await until(lambda: gone.over)
        late = await crowd.come("e", timeout=1)
        crowd.clock.advance(1)
        await until(lambda: late.over)

        assert "; 2 calls were ahead of it" in str(late.error)

    async def test_the_limiters_own_timeout_is_the_default(self, crowd: Crowd) -> None:
        """A call that names no timeout has the limiter's; one that names its own has that."""
        crowd.limiter_of(limit=1, timeout=1)
        await crowd.come()
        usual, patient = await crowd.come(), await crowd.come(timeout=5)
        crowd.clock.advance(1)
        await until(lambda: usual.over)
        crowd.clock.advance(3.9)
        assert not patient.over
        crowd.clock.advance(0.1)
        await until(lambda: patient.over)

        assert isinstance(usual.error, LimitTimeout)
        assert isinstance(patient.error, LimitTimeout)
        assert crowd.limiter.stats().rejected == 2

    async def test_those_behind_a_timeout_move_up(self, crowd: Crowd) -> None:
        """A heavy call that gives up lets the light one behind it in at once."""
        crowd.limiter_of(per_minute=10, burst=10)
        await crowd.come("a", cost=5)
        heavy = await crowd.come("heavy", cost=10, timeout=1)
        await crowd.come("light", cost=5)
        crowd.clock.advance(1)
        await until(lambda: heavy.over)
        await crowd.all_woken()

        assert crowd.order == ["a", "light"]

    async def test_a_call_that_is_admitted_has_no_timeout(self, crowd: Crowd) -> None:
        """The timeout is for waiting: it does not end a call, and its timer is gone."""
        crowd.limiter_of(limit=1)
        first, second = await crowd.come(), await crowd.come(timeout=5)
        await crowd.finish(first)
        assert repr(crowd.clock) == "<FakeClock 0 s, 0 timers>"
        await crowd.advance(10)

        assert second.admitted
        assert not second.over

    def test_a_call_admitted_while_it_times_out_keeps_its_slot(self, clock: FakeClock) -> None:
        """Whichever comes first counts: no call runs with a slot that was given back."""
        limiter = Limiter(limit=1, clock=clock)
        holder = limiter.enter()
        outcome: list[object] = []

        def wait() -> None:
            try:
                outcome.append(limiter.enter(timeout=1))
            except LimitTimeout as error:
                outcome.append(error)

        thread = threading.Thread(target=contextvars.Context().run, args=(wait,))
        thread.start()
        while not limiter.stats().waiting:
            thread.join(0.001)
        while not clock._timers:
            thread.join(0.001)
        lock = limiter._lock

        class Meddler:
            """A lock that lets another call end at the very moment when the expiry lets go of it."""

            def __enter__(self) -> None:
                lock.acquire()

            def __exit__(self, *_: object) -> None:
                limiter._lock = lock
                lock.release()
                holder.leave()

        limiter._lock = Meddler()  # type: ignore[assignment]  # the with statement is all that the expiry uses
        clock.advance(1)
        thread.join(SAFETY_NET)

        assert isinstance(outcome[0], LimitTimeout)
        assert limiter.stats().in_flight == 0

    async def test_a_waiter_that_times_out_and_is_cancelled_leaves_once(self, clock: FakeClock) -> None:
        """Both at the same moment count as one who has left, and those behind it are still there."""
        limiter = Limiter(limit=1, clock=clock)
        permit = await limiter.aenter()
        late, patient = [
            asyncio.create_task(limiter.aenter(timeout=timeout), context=contextvars.Context()) for timeout in (1, None)
        ]
        await until(lambda: limiter.stats().waiting == 2)
        clock.advance(1)
        late.cancel()
        await asyncio.wait([late])
        assert (limiter.stats().waiting, limiter.stats().rejected) == (1, 1)
        permit.leave()

        assert (await patient).at == 1

    def test_all_who_leave_meanwhile_are_taken_back(self) -> None:
        """Those who leave while another has the lock, be it that they wait or that they are inside."""
        limiter = Limiter(limit=Adaptive(min=1, max=9, start=2))
        inside = [contextvars.Context().run(limiter.enter) for _ in range(2)]
        waiting = Permit(limiter, 1, 1)
        limiter._admit(waiting)
        with limiter._lock:
            waiting.give_up()
            for permit in inside:
                permit.end()

        stats = limiter.stats()
        assert (stats.waiting, stats.in_flight) == (0, 0)

    @pytest.mark.parametrize("limit", [1, Adaptive(min=1, max=1)], ids=["fixed", "adaptive"])
    def test_who_leaves_before_the_next_has_queued_lets_it_in(
        self, monkeypatch: pytest.MonkeyPatch, limit: int | Adaptive
    ) -> None:
        """Who leaves just after the slot was asked for sees no queue, so the one who queues looks again."""
        limiter = Limiter(limit=limit)
        permit = limiter.enter()
        admit = Meter.admit

        def racing(*args: Any) -> float:
            at = admit(*args)
            permit.end()
            return at

        monkeypatch.setattr(Meter, "admit", racing)
        waiting = Permit(limiter, 1, 1)
        limiter._admit(waiting)

        assert waiting.at is not None

    def test_who_leaves_while_another_queues_lets_the_next_in(self) -> None:
        """The other has the lock, and looks once more after letting go of it."""
        inside: list[Permit] = []

        class Meddling(FakeClock):
            """A clock on which a call ends when somebody looks at it."""

            def now(self) -> float:
                while inside:
                    inside.pop().end()
                return super().now()

        limiter = Limiter(limit=1, clock=Meddling())
        permit = limiter.enter()
        first, second = Permit(limiter, 1, 1), Permit(limiter, 1, 1)
        limiter._admit(first)
        inside.append(permit)
        limiter._admit(second)

        assert first.at is not None

    async def test_a_cancelled_waiter_gives_its_place_back(self) -> None:
        """Those behind it move up, and neither its place nor its timer is left."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1)
        first = await crowd.come("a")
        cancelled = await crowd.come("b", timeout=60)
        await crowd.come("c")
        assert isinstance(cancelled, TaskCall)
        cancelled.task.cancel()
        await until(lambda: cancelled.over)
        assert limiter.stats().waiting == 1
        assert repr(crowd.clock) == "<FakeClock 0 s, 0 timers>"
        await crowd.finish(first)

        assert crowd.order == ["a", "c"]
        await crowd.disperse()

    async def test_a_waiter_cancelled_when_already_admitted_gives_all_back(self) -> None:
        """A task that is cancelled between its admission and its running costs neither slot nor token."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1, per_minute=2, burst=2)
        first = await crowd.come("a")
        cancelled = await crowd.come("b")
        assert isinstance(cancelled, TaskCall)
        limiter._settle()
        first.finish()
        while limiter.stats().admitted < 2:
            await asyncio.sleep(0)
            if limiter.stats().waiting == 0:
                cancelled.task.cancel()
        await until(lambda: cancelled.over)
        assert isinstance(cancelled.error, asyncio.CancelledError)
        third = await crowd.come("c")

        assert third.admitted
        await crowd.disperse()

    async def test_a_thread_that_is_interrupted_gives_its_place_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """An error that strikes a waiting thread, as Ctrl-C does, takes it out of the queue."""
        limiter = Limiter(limit=1)
        permit = limiter.enter()

        def interrupt(*_: object) -> bool:
            raise KeyboardInterrupt

        monkeypatch.setattr(limiter, "_must_wait", interrupt)
        with pytest.raises(KeyboardInterrupt):
            contextvars.Context().run(limiter.enter)
        permit.leave()

        assert limiter.stats().waiting == 0
        assert limiter.stats().in_flight == 0


class TestDeadlock:
    def test_nested_in_a_thread(self) -> None:
        """A call that waits for the slot that it holds is told so, and the limiter is as it was."""
        limiter = Limiter(limit=1, per_second=1, name="quotes", clock=FakeClock())
        with limiter:
            assert not limiter.acquire(blocking=False)
            with pytest.raises(DeadlockError) as caught:
                limiter.enter()

        assert str(caught.value) == (
            "limiter quotes: all 1 slots are held by calls that wait for a slot of this very limiter, so none can "
            "ever come free. Give the inner function a limiter of its own, or call its unlimited .func or .afunc."
        )
        assert limiter.stats().in_flight == 0
        assert limiter.stats().waiting == 0
        assert limiter.stats().rejected == 2

    async def test_nested_in_a_task(self) -> None:
        """A call that waits for the slot that it holds is told so, and the limiter is as it was."""
        limiter = Limiter(limit=1)
        async with limiter:
            with pytest.raises(DeadlockError, match=r"^limiter: all 1 slots are held by calls that wait"):
                await limiter.aenter()

        assert limiter.stats().in_flight == 0
        assert limiter.stats().waiting == 0

    async def test_a_sync_wait_inside_an_async_call(self) -> None:
        """A task that holds the slot and then waits with its whole loop is certain to wait for ever."""
        limiter = Limiter(limit=1)
        async with limiter:
            with pytest.raises(DeadlockError):
                limiter.enter()

        assert limiter.stats().in_flight == 0

    async def test_two_slots_nested_twice(self) -> None:
        """Two tasks that each hold one of two slots and wait for another: the second to wait is told."""
        limiter = Limiter(limit=2)
        both_in = asyncio.Barrier(2)

        async def nest() -> str:
            async with limiter:
                await both_in.wait()
                async with limiter:
                    return "in"

        results = await asyncio.gather(nest(), nest(), return_exceptions=True)

        assert [type(result) for result in results if result != "in"] == [DeadlockError]
        assert "in" in results

    def test_one_thread_nested_three_deep(self) -> None:
        """Two slots that one thread holds are held by one who waits."""
        limiter = Limiter(limit=2)

        with limiter, limiter, pytest.raises(DeadlockError):
            limiter.enter()

        assert limiter.stats().in_flight == 0

    async def test_nesting_with_a_slot_to_spare_is_no_deadlock(self) -> None:
        """While another call holds a slot and may end, a nested one waits for it."""
        limiter = Limiter(limit=2)
        other = contextvars.Context().run(limiter.enter)

        async def nest() -> str:
            async with limiter, limiter:
                return "in"

        task = asyncio.create_task(nest())
        await until(lambda: limiter.stats().waiting == 1)
        other.end()

        assert await task == "in"

    async def test_a_slot_of_another_limiter_is_no_proof(self) -> None:
        """A call inside one limiter may wait for another whose slots will come free."""
        outer, inner = Limiter(limit=1), Limiter(limit=1)
        other = contextvars.Context().run(inner.enter)

        async def nest() -> str:
            async with outer, inner:
                return "in"

        task = asyncio.create_task(nest())
        await until(lambda: inner.stats().waiting == 1)
        other.end()

        assert await task == "in"

    async def test_a_wait_that_is_over_is_no_proof(self) -> None:
        """A call that had nested, and is now about to end, is no longer counted among those that wait."""
        limiter = Limiter(limit=2)
        nested, go_on = asyncio.Event(), asyncio.Event()
        other = contextvars.Context().run(limiter.enter)

        async def first() -> None:
            async with limiter:
                async with limiter:
                    pass
                nested.set()
                await go_on.wait()

        async def second() -> str:
            async with limiter, limiter:
                return "in"

        tasks = [asyncio.create_task(first())]
        await until(lambda: limiter.stats().waiting == 1)
        other.end()
        await nested.wait()
        tasks.append(asyncio.create_task(second()))  # type: ignore[arg-type]  # another kind of result
        await until(lambda: limiter.stats().waiting == 1 or tasks[1].done())
        go_on.set()

        assert (await asyncio.gather(*tasks))[1] == "in"

    async def test_a_background_task_is_no_proof(self) -> None:
        """A task that has inherited the context of a call may outlive it: it waits, and gets the slot."""
        limiter = Limiter(limit=1)

        async def inside() -> str:
            async with limiter:
                return "in"

        async with limiter:
            task = asyncio.create_task(inside())
            await until(lambda: limiter.stats().waiting == 1)

        assert await task == "in"

    def test_a_background_thread_is_no_proof(self) -> None:
        """A thread that has inherited the context of a call may outlive it: it waits, and gets the slot."""
        limiter = Limiter(limit=1)
        outcome: list[str] = []

        def inside() -> None:
            with limiter:
                outcome.append("in")

        with limiter:
            thread = threading.Thread(target=contextvars.copy_context().run, args=(inside,))
            thread.start()
            while not limiter.stats().waiting:
                thread.join(0.001)
        thread.join(SAFETY_NET)

        assert outcome == ["in"]

    async def test_a_waiter_that_will_time_out_is_no_proof(self) -> None:
        """Its call will end, so another that nests waits for that and is not told of a deadlock."""
        clock = FakeClock()
        limiter = Limiter(limit=2, clock=clock)

        async def nest(timeout: float | None) -> str:
            async with limiter:
                await both_in.wait()
                permit = await limiter.aenter(timeout=timeout)
                permit.leave()
                return "in"

        both_in = asyncio.Barrier(2)
        patient = asyncio.create_task(nest(None))
        impatient = asyncio.create_task(nest(1))  # the last to come to the barrier is the first to go on
        await until(lambda: limiter.stats().waiting == 2)
        clock.advance(1)

        with pytest.raises(LimitTimeout):
            await impatient
        assert await patient == "in"

    async def test_a_call_that_waits_for_the_rate_alone_is_no_proof(self) -> None:
        """It will get the rate and end, so another that nests is not told of a deadlock."""
        clock = FakeClock()
        limiter = Limiter(limit=2, per_second=10, clock=clock)

        async def hold(then: Callable[[], Any]) -> str:
            async with limiter:
                await both_in.wait()
                permit = await then()
                permit.leave()
                return "in"

        both_in = asyncio.Barrier(2)
        nested = asyncio.create_task(hold(limiter.aenter))
        rate = asyncio.create_task(hold(lambda: limiter.aenter(slots=0)))
        await asyncio.sleep(0)
        clock.advance(0.1)
        await until(lambda: limiter.stats().waiting == 2)
        clock.advance(0.1)
        assert await rate == "in"
        clock.advance(0.1)

        assert await nested == "in"

    async def test_one_call_counted_twice_is_no_proof(self) -> None:
        """Two waits that keep the same call from ending leave the other slot out of the count."""
        limiter = Limiter(limit=2)
        other = contextvars.Context().run(limiter.enter)
        told: list[type] = []

        async def stop_the_loop() -> None:
            await until(lambda: limiter.stats().waiting == 1)
            try:
                limiter.enter(timeout=0.01)
            except (DeadlockError, LimitTimeout) as error:
                told.append(type(error))
            other.end()

        async with limiter:
            blocker = asyncio.create_task(stop_the_loop())
            nested = await limiter.aenter()
            nested.leave()
            await blocker

        assert told == [LimitTimeout]

    async def test_the_rate_inside_a_call_while_others_wait_for_slots(self, clock: FakeClock) -> None:
        """A call that holds the only slot gets the rate, past those who wait for that slot."""
        limiter = Limiter(limit=1, per_second=10, clock=clock)
        async with limiter:
            waiting = asyncio.get_running_loop().create_task(limiter.aenter(), context=contextvars.Context())
            await until(lambda: limiter.stats().waiting == 1)
            clock.advance(0.1)
            assert await limiter.aacquire()
        clock.advance(0.1)

        (await waiting).leave()


class ServerError(Exception):
    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        super().__init__(status)
        self.status_code = status
        self.response = httpx.Response(status, headers=headers)


class TestPause:
    async def test_retry_after_in_seconds_pauses_everyone(self, crowd: Crowd) -> None:
        """Those who wait and those who come are held until then; then calls start at the pace."""
        crowd.limiter_of(limit=3, per_second=10)
        call = await crowd.come("a")
        await crowd.advance(1)
        await crowd.finish(call, ServerError(429, {"Retry-After": "3"}))
        await crowd.come_all("bcd")
        await crowd.advance(2.9)
        assert crowd.order == ["a"]
        await crowd.advance(0.1)
        assert crowd.order == ["a", "b"]
        await crowd.advance(0.1)

        assert crowd.order == ["a", "b", "c"]

    async def test_retry_after_as_a_date_pauses_everyone(self, crowd: Crowd) -> None:
        """A date is as good as a number of seconds."""
        crowd.limiter_of(limit=3)
        call = await crowd.come("a")
        date = format_datetime(datetime.now(UTC) + timedelta(seconds=3600), usegmt=True)
        await crowd.finish(call, ServerError(503, {"retry-after": date}))
        await crowd.come("b")
        await crowd.advance(3500)
        assert crowd.order == ["a"]
        await crowd.advance(100)

        assert crowd.order == ["a", "b"]

    def test_a_pause_that_nobody_waits_for_counts_from_the_refusal(self, clock: FakeClock) -> None:
        """That is noted when the call fails, and not when the next one comes."""
        limiter = Limiter(limit=3, clock=clock)
        limiter.enter().leave(ServerError(429, {"Retry-After": "5"}))
        clock.advance(3)
        waiting = Permit(limiter, 1, 1)
        assert not limiter._admit(waiting)
        clock.advance(2)

        assert waiting.at == 5

    async def test_a_pause_counts_from_the_refusal(self, crowd: Crowd) -> None:
        """When nobody was there to hear of it, it is over all the same when its time has passed."""
        crowd.limiter_of(limit=3)
        call = await crowd.come("a")
        await crowd.finish(call, ServerError(429, {"Retry-After": "3"}))
        await crowd.advance(2)
        await crowd.come("b")
        await crowd.advance(0.9)
        assert crowd.order == ["a"]
        await crowd.advance(0.1)

        assert crowd.order == ["a", "b"]

    async def test_another_error_pauses_nobody(self, crowd: Crowd) -> None:
        """Only a 429 or a 503 tells to wait, whatever its headers."""
        crowd.limiter_of(limit=3)
        call = await crowd.come("a")
        await crowd.finish(call, ServerError(500, {"Retry-After": "3"}))
        await crowd.come("b")

        assert crowd.order == ["a", "b"]

    def test_with_passes_the_error_on(self, clock: FakeClock) -> None:
        """An error inside the block pauses the limiter."""
        limiter = Limiter(limit=3, clock=clock)
        with pytest.raises(ServerError), limiter:
            raise ServerError(429, {"Retry-After": "3"})

        assert not limiter.acquire(blocking=False)
        clock.advance(3)
        assert limiter.acquire(blocking=False)

    async def test_async_with_passes_the_error_on(self, clock: FakeClock) -> None:
        """An error inside the block pauses the limiter."""
        limiter = Limiter(limit=3, clock=clock)
        with pytest.raises(ServerError):
            async with limiter:
                raise ServerError(429, {"Retry-After": "3"})

        assert not await limiter.aacquire(blocking=False)
        clock.advance(3)
        assert await limiter.aacquire(blocking=False)


class TestResize:
    async def test_more_slots_let_those_who_wait_in(self, crowd: Crowd) -> None:
        """A raised limit is filled from the queue at once."""
        limiter = crowd.limiter_of(limit=1)
        await crowd.come_all("abcd")
        limiter.resize(limit=3)
        await crowd.all_woken()

        assert sorted(crowd.order) == list("abc")

    async def test_fewer_slots_wait_until_enough_have_ended(self, crowd: Crowd) -> None:
        """A lowered limit ends no call, and admits none before there is room under it."""
        limiter = crowd.limiter_of(limit=3)
        calls = await crowd.come_all("abcd")
        limiter.resize(limit=1)
        await crowd.finish(calls[0])
        await crowd.finish(calls[1])
        assert crowd.order == list("abc")
        await crowd.finish(calls[2])

        assert crowd.order == list("abcd")

    async def test_a_faster_rate_holds_for_those_who_wait(self, crowd: Crowd) -> None:
        """Nobody waits for a turn that the old rate had given."""
        limiter = crowd.limiter_of(per_hour=1)
        await crowd.come_all("abc")
        await crowd.advance(1)
        limiter.resize(per_hour=3600)
        await crowd.all_woken()
        assert crowd.order == ["a", "b"]
        await crowd.advance(1)

        assert crowd.order == ["a", "b", "c"]

    async def test_a_cost_above_the_new_limit_is_turned_away(self, crowd: Crowd) -> None:
        """A waiter that could never be admitted any more is told, and those behind it move up."""
        limiter = crowd.limiter_of(per_minute=100, burst=100)
        await crowd.come("a", cost=10)
        heavy = await crowd.come("heavy", cost=95)
        await crowd.come("light", cost=10)
        just = await crowd.come("just", cost=50)
        limiter.resize(per_minute=50, burst=50)
        await until(lambda: heavy.over)
        await crowd.all_woken()

        assert isinstance(heavy.error, ValueError)
        assert str(heavy.error) == "limiter: a cost of 95 can never be admitted, as the limit is 50 per minute"
        assert crowd.order == ["a", "light"]
        assert not just.over
        assert limiter.stats().rejected == 1

    def test_what_is_not_named_stays(self) -> None:
        """Each limit is changed alone; None takes it away."""
        limiter = Limiter(limit=3, per_second=10, per_hour=99, burst=2)
        limiter.resize(per_second=20)
        assert repr(limiter) == "<Limiter 0/3 in flight, 20 per second, 99 per hour, 0 waiting>"
        assert limiter.limits.burst == 2
        limiter.resize(limit=None, per_minute=50, per_hour=None, burst=None)

        assert repr(limiter) == "<Limiter 20 per second, 50 per minute, 0 waiting>"
        assert limiter.limits.burst == 1

    def test_who_leaves_gives_its_own_slot_back(self) -> None:
        """Those who are still inside are the others, also where each end is learnt from."""
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=20))
        permits = [contextvars.Context().run(limiter.enter) for _ in range(20)]
        for permit in permits[:10]:
            permit.end()
        limiter.stats()

        assert limiter._meter.inside == set(permits[10:])

    async def test_one_who_does_not_wait_yet_keeps_nobody_from_being_woken(self) -> None:
        """Of two who are let in at once the first has queued and not begun to wait: it sees that by itself."""
        limiter = Limiter(limit=2)
        inside = [contextvars.Context().run(limiter.enter) for _ in range(2)]
        early = Permit(limiter, 1, 1)
        limiter._admit(early)
        waiting = asyncio.create_task(limiter.aenter(), context=contextvars.Context())
        await until(lambda: limiter.stats().waiting == 2)
        with limiter._lock:
            for permit in inside:
                permit.end()
        limiter.stats()

        assert early.at is not None
        (await asyncio.wait_for(waiting, SAFETY_NET)).leave()

    async def test_a_refused_change_keeps_nobody_waiting(self) -> None:
        """Who leaves just when a change of the limits is refused lets the next one in."""
        limiter = Limiter(limit=1)
        permit = await limiter.aenter()
        waiting = asyncio.create_task(limiter.aenter(), context=contextvars.Context())
        await until(lambda: limiter.stats().waiting == 1)

        class Meddling(float):
            """A number that ends a call when somebody compares it with 0."""

            def __gt__(self, other: object) -> bool:
                permit.leave()
                return False

        with pytest.raises(ValueError, match="per_second"):
            limiter.resize(per_second=Meddling(1))

        (await asyncio.wait_for(waiting, SAFETY_NET)).leave()

    def test_nothing_left_to_limit_is_an_error(self) -> None:
        """A refused change leaves the limiter as it was."""
        limiter = Limiter(limit=3)
        with pytest.raises(TypeError, match=r"^nothing to limit"):
            limiter.resize(limit=None)

        assert repr(limiter) == "<Limiter 0/3 in flight, 0 waiting>"
        assert limiter.acquire(blocking=False)

    def test_an_adaptive_limit_may_take_the_place_of_a_number(self) -> None:
        """A resize to Adaptive begins where that begins; a resize of something else keeps it."""
        limiter = Limiter(limit=3)
        limiter.resize(limit=Adaptive(min=2, max=9, start=5))
        limiter.resize(per_second=10)

        assert limiter.stats().limit == 5
        with limiter:
            pass
        with pytest.raises(ServerError), limiter:
            raise ServerError(429)
        assert limiter.stats().limit == 2


class TestAdaptive:
    def test_a_congestion_shrinks_and_other_errors_do_not(self) -> None:
        """A 429 halves what was in flight; a plain error changes nothing."""
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=10), clock=FakeClock())
        permits = [limiter.enter() for _ in range(8)]
        permits.pop().leave(ValueError())
        assert limiter.stats().limit == 10
        permits.pop().leave(ServerError(429))

        assert limiter.stats().limit == 3
        for permit in permits:
            permit.leave()

    def test_successes_grow_it(self) -> None:
        """As many successes as there are slots, while they are used, raise the limit for those who wait."""
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=2), clock=FakeClock())
        permits = [limiter.enter(), limiter.enter()]
        for permit in permits:
            permit.leave()

        assert limiter.acquire()
        assert limiter.stats().limit in (3, 4)

    def test_taking_the_rate_alone_is_no_success(self) -> None:
        """An `acquire` says nothing of how the call ended."""
        limiter = Limiter(limit=Adaptive(min=2, max=20), clock=FakeClock())
        with limiter:
            for _ in range(9):
                limiter.acquire()

            assert limiter.stats().limit == 2

    @pytest.mark.parametrize(("pause", "seconds"), [(0, 6), (2, 8)])
    def test_a_refusal_that_pauses_puts_the_next_try_off(self, pause: int, seconds: int) -> None:
        """So many seconds after a congestion the limit is above what hurt, unless each try costs a pause."""
        clock = FakeClock()
        limiter = Limiter(limit=Adaptive(min=1, max=99, start=8), clock=clock)
        permits = [contextvars.Context().run(limiter.enter) for _ in range(8)]
        permits[0].end(ServerError(429, {"Retry-After": str(pause)}))
        for permit in permits[1:]:
            permit.end()
        for _ in range(10 * seconds):
            clock.advance(0.1)
            if clock.now() > pause:
                permits = [contextvars.Context().run(limiter.enter) for _ in range(limiter.limits.limit or 0)]
                for permit in permits:
                    permit.end()

        assert ((limiter.stats().limit or 0) > 8) is (pause == 0)

    def test_it_recovers_after_a_congestion(self) -> None:
        """Time and successes, while the slots are in use, raise a limit that was shrunk."""
        clock = FakeClock()
        limiter = Limiter(limit=Adaptive(min=1, max=20, start=10), clock=clock)
        permits = [limiter.enter() for _ in range(8)]
        permits.pop().leave(ServerError(429))
        shrunk = limiter.stats().limit or 0
        while limiter.stats().in_flight >= shrunk:
            permits.pop().leave()
        for _ in range(30):
            clock.advance(1)
            limiter.enter().leave()

        assert 0 < shrunk < (limiter.stats().limit or 0)
        for permit in permits:
            permit.leave()


class TestStats:
    async def test_counts(self, crowd: Crowd) -> None:
        """Who is inside, who waits, who came in and who was turned away."""
        limiter = crowd.limiter_of(limit=2, per_second=100, burst=100)
        calls = await crowd.come_all("abcd")
        await crowd.finish(calls[0])
        late = await crowd.come(timeout=1)
        crowd.clock.advance(1)
        await until(lambda: late.over)

        stats = limiter.stats()
        assert (stats.in_flight, stats.waiting, stats.admitted, stats.rejected, stats.limit) == (2, 1, 3, 1, 2)

    async def test_waits(self, crowd: Crowd) -> None:
        """Percentiles are over all admissions, those that did not wait included, in seconds."""
        limiter = crowd.limiter_of(limit=1)
        calls = await crowd.come_all("abcd")
        for call in calls[:3]:
            await crowd.advance(2)
            await crowd.finish(call)

        stats = limiter.stats()
        assert (stats.wait_p50, stats.wait_p95, stats.wait_p99) == (4, 6, 6)

    def test_waits_are_of_the_last_thousand(self, clock: FakeClock) -> None:
        """A wait long ago is forgotten after a thousand admissions more."""
        limiter = Limiter(limit=1, clock=clock)
        permit = limiter.enter()
        thread = threading.Thread(target=contextvars.Context().run, args=(lambda: limiter.enter().end(),))
        thread.start()
        while not limiter.stats().waiting:
            thread.join(0.001)
        clock.advance(9)
        permit.leave()
        thread.join(SAFETY_NET)
        for _ in range(49):
            limiter.enter().leave()
        assert limiter.stats().wait_p99 == 9
        assert limiter.stats().wait_p50 == 0
        for _ in range(950):
            limiter.enter().leave()
        assert limiter.stats().wait_p99 == 0
        assert 9 in [wait for _, wait in limiter._waits]
        limiter.enter().leave()

        assert limiter.stats() == LimiterStats(0, 0, 1002, 0, 1, 0.0, 0.0, 0.0)

    def test_the_oldest_of_the_last_thousand_counts_and_the_one_before_it_does_not(self) -> None:
        """The 99th percentile of a thousand is the longest wait but nine: here the shortest of ten that count."""
        limiter = Limiter(limit=1)
        limiter._waits.extend((number, 12.0 - number) for number in range(1, 12))
        limiter._admitted = 1001

        assert limiter.stats().wait_p99 == 1

    def test_no_more_than_a_thousand_waits_are_kept(self) -> None:
        """A limiter that is always busy keeps no more of them than it will ever look at."""
        limiter = Limiter(limit=1)
        permit = limiter.enter()
        for _ in range(1005):
            waiting = Permit(limiter, 1, 1)
            limiter._admit(waiting)
            permit.end()
            permit = waiting

        assert len(limiter._waits) == 1000

    async def test_percentiles_of_the_last_thousand(self) -> None:
        """The 50th, 95th and 99th of a hundred waits; and of a thousand, to the very call."""
        crowd = Crowd(TaskCall)
        limiter = crowd.limiter_of(limit=1)
        await crowd.advance(50)
        calls = await crowd.come_all("x" * 11)
        for call in calls:
            await crowd.finish(call)
            await crowd.advance(1)
        for _ in range(89):
            limiter.enter().leave()
        stats = limiter.stats()
        assert (stats.wait_p50, stats.wait_p95, stats.wait_p99) == (0, 5, 9)
        for _ in range(901):
            limiter.enter().leave()
        assert limiter.stats().wait_p99 == 0
        assert (limiter.stats().admitted, len([w for _, w in limiter._waits if w])) == (1001, 9)

    def test_nothing_has_happened(self) -> None:
        """A fresh limiter has waited for nothing; without slots there is no limit to tell."""
        assert Limiter(per_second=1).stats() == LimiterStats(0, 0, 0, 0, None, 0.0, 0.0, 0.0)

    async def test_repr_tells_the_state(self, crowd: Crowd) -> None:
        """Name, slots, rates and queue."""
        limiter = crowd.limiter_of(limit=1, per_second=50, per_minute=500, name="quotes")
        await crowd.come_all("abc")

        assert repr(limiter) == "<Limiter quotes 1/1 in flight, 50 per second, 500 per minute, 2 waiting>"


class TestRecord:
    def test_a_cost_known_afterwards_is_corrected(self, clock: FakeClock) -> None:
        """What was estimated too low counts in full, from inside the call."""
        limiter = Limiter(per_minute=100, burst=100, clock=clock)
        with limiter:
            limiter.record(100)
        assert not limiter.acquire(blocking=False)
        clock.advance(60)

        assert limiter.acquire(blocking=False)

    async def test_arecord_in_a_task(self, clock: FakeClock) -> None:
        """What was estimated too high comes back at once, for those who wait too."""
        limiter = Limiter(per_minute=100, burst=100, clock=clock)
        permit = await limiter.aenter(cost=100)
        waiting = asyncio.get_running_loop().create_task(limiter.aenter(cost=60), context=contextvars.Context())
        await until(lambda: limiter.stats().waiting == 1)
        limiter.record(40)
        (await waiting).leave()
        permit.leave()

        assert limiter.stats().admitted == 2

    def test_the_last_record_counts(self, clock: FakeClock) -> None:
        """A second correction replaces the first."""
        limiter = Limiter(per_minute=100, burst=100, clock=clock)
        with limiter:
            limiter.record(90)
            limiter.record(50)
        with limiter:
            limiter.record(50)

        assert not limiter.acquire(blocking=False)

    def test_the_outer_of_two_limiters_is_corrected(self) -> None:
        """A correction inside a call of another limiter, too, goes to the call of this one."""
        tokens = Limiter(per_minute=10, burst=10, clock=FakeClock())
        with tokens:
            dear = Limiter(per_minute=9, burst=9).enter(cost=9)
            tokens.record(10)
            dear.leave()

        assert not tokens.acquire(blocking=False)

    def test_outside_a_call_is_an_error(self) -> None:
        """There is nothing to correct."""
        with pytest.raises(RuntimeError, match=r"^limiter: this context is not inside a call that it has admitted$"):
            Limiter(per_second=1).record(5)

    @pytest.mark.parametrize(
        ("cost", "error", "message"),
        [
            (-1, ValueError, "cost=-1: must be finite and not negative"),
            (float("inf"), ValueError, "cost=inf: must be finite and not negative"),
            (True, TypeError, "cost=True: must be a number"),
            ("5", TypeError, "cost='5': must be a number"),
        ],
    )
    def test_a_bad_cost_is_told(self, cost: Any, error: type[Exception], message: str) -> None:
        """What was charged stays charged."""
        limiter = Limiter(per_second=1, clock=FakeClock())
        with limiter, pytest.raises(error) as caught:
            limiter.record(cost)

        assert str(caught.value) == message
        assert not limiter.acquire(blocking=False)

    def test_a_call_may_turn_out_to_cost_nothing(self) -> None:
        """Zero is a cost."""
        limiter = Limiter(per_second=1, clock=FakeClock())
        with limiter:
            limiter.record(0)

        assert limiter.acquire(blocking=False)


class TestChatModels:
    def test_a_chat_model_takes_it_as_its_rate_limiter(self, clock: FakeClock) -> None:
        """A model and the functions beside it draw from one budget."""
        limiter = Limiter(limit=1, per_minute=2, burst=2, clock=clock)
        model = GenericFakeChatModel(messages=replies(), rate_limiter=limiter)
        with limiter:
            assert model.invoke("hi").content == "ok"

        assert not limiter.acquire(blocking=False)
        assert limiter.stats().in_flight == 0

    async def test_a_chat_model_takes_it_as_its_rate_limiter_async(self, clock: FakeClock) -> None:
        """A model and the functions beside it draw from one budget."""
        limiter = Limiter(limit=1, per_minute=2, burst=2, clock=clock)
        model = GenericFakeChatModel(messages=replies(), rate_limiter=limiter)
        async with limiter:
            assert (await model.ainvoke("hi")).content == "ok"

        assert not await limiter.aacquire(blocking=False)
        assert limiter.stats().in_flight == 0

    async def test_a_chat_model_waits_for_the_rate(self, clock: FakeClock) -> None:
        """Two calls of the model start as far apart as the limiter says."""
        limiter = Limiter(per_second=10, clock=clock)
        model = GenericFakeChatModel(messages=replies(), rate_limiter=limiter)
        await model.ainvoke("hi")
        second = asyncio.create_task(model.ainvoke("hi"))
        await until(lambda: limiter.stats().waiting == 1)
        clock.advance(0.1)

        assert (await second).content == "ok"

    def test_by_default_it_waits(self, clock: FakeClock) -> None:
        """`acquire` comes back when the rate is there, and takes no slot."""
        limiter = Limiter(limit=1, per_second=1, clock=clock)
        assert limiter.acquire(blocking=False)
        assert limiter.stats().in_flight == 0
        came: list[bool] = []
        thread = threading.Thread(target=lambda: came.append(limiter.acquire()))
        thread.start()
        while not limiter.stats().waiting and thread.is_alive():
            thread.join(0.001)
        clock.advance(1)
        thread.join(SAFETY_NET)

        assert came == [True]
        assert limiter.stats() == LimiterStats(0, 0, 2, 0, 1, 1.0, 1.0, 1.0)

    async def test_by_default_it_waits_async(self, clock: FakeClock) -> None:
        """`aacquire` comes back when the rate is there, and takes no slot."""
        limiter = Limiter(limit=1, per_second=1, clock=clock)
        assert await limiter.aacquire(blocking=False)
        assert limiter.stats().in_flight == 0
        task = asyncio.create_task(limiter.aacquire())
        await until(lambda: limiter.stats().waiting == 1 or task.done())
        clock.advance(1)

        assert await task
        assert limiter.stats() == LimiterStats(0, 0, 2, 0, 1, 1.0, 1.0, 1.0)

    def test_without_blocking_it_says_whether_it_was_there(self, clock: FakeClock) -> None:
        """A refused try is counted, costs nothing and is not queued."""
        limiter = Limiter(per_second=1, clock=clock)

        assert [limiter.acquire(blocking=False) for _ in range(4)] == [True, False, False, False]
        assert limiter.stats().rejected == 3
        assert limiter.stats().waiting == 0
        clock.advance(1)
        assert limiter.acquire(blocking=True)


def replies() -> Iterator[AIMessage]:
    """Yield what the model is to answer, for ever."""
    while True:
        yield AIMessage("ok")


class TestLeftElsewhere:
    """A limiter that is entered in one task and left in another, as a generator does that somebody else closes."""

    async def test_the_slot_comes_back(self) -> None:
        """The place is free, whoever has left it."""
        limiter = Limiter(limit=1)
        await asyncio.create_task(limiter.__aenter__())
        await asyncio.create_task(limiter.__aexit__(None, None, None))

        assert limiter.stats().in_flight == 0

    def test_the_slot_comes_back_in_a_thread(self) -> None:
        """The same, of `with`."""
        limiter = Limiter(limit=1)
        contextvars.Context().run(limiter.__enter__)
        contextvars.Context().run(limiter.__exit__, None, None, None)

        assert limiter.stats().in_flight == 0

    async def test_no_deadlock_is_certain_any_more(self) -> None:
        """Where it was entered the call still looks as if it were inside, so nobody is told."""
        limiter = Limiter(limit=1, timeout=0.01)
        await limiter.aenter()
        await asyncio.create_task(limiter.__aexit__(None, None, None), context=contextvars.Context())

        async with limiter:
            with pytest.raises(LimitTimeout):
                await limiter.aenter()

    async def test_each_exit_gives_one_slot_back(self) -> None:
        """The exit does not tell whose slot it is. The numbers are right all the same, whoever leaves next."""
        limiter = Limiter(limit=5)
        inside = [await asyncio.create_task(limiter.aenter()) for _ in range(5)]
        free: list[int] = []
        for leave in (0, None, 1, 2, None):
            if leave is None:
                await asyncio.create_task(limiter.__aexit__(None, None, None), context=contextvars.Context())
            else:
                inside[leave].leave()
            free.append(5 - limiter.stats().in_flight)

        assert free == [1, 2, 3, 4, 5]

    async def test_who_left_is_not_counted_twice(self) -> None:
        """A call that ends when its slot has been given back for it frees another's, and only once."""
        limiter = Limiter(limit=3)
        inside = [await asyncio.create_task(limiter.aenter()) for _ in range(3)]
        await asyncio.create_task(limiter.__aexit__(None, None, None), context=contextvars.Context())
        for permit in (inside[0], inside[0], inside[1], inside[1]):
            permit.leave()

        assert limiter.stats().in_flight == 0


class TestMemory:
    async def test_those_who_gave_up_are_forgotten(self) -> None:
        """Also from the middle of a queue whose first still waits."""
        limiter = Limiter(limit=1)
        permit = await limiter.aenter()
        waiting = [asyncio.create_task(limiter.aenter(), context=contextvars.Context()) for _ in range(2000)]
        await until(lambda: limiter.stats().waiting == 2000)
        seen = weakref.WeakSet(permit for permit in gc.get_objects() if isinstance(permit, Permit))
        for task in waiting[1:-1]:
            task.cancel()
        await asyncio.wait(waiting[1:-1])
        del waiting[1:-1]
        gc.collect()

        assert limiter.stats().waiting == 2
        assert len(seen) < 200
        permit.leave()
        (await waiting[0]).leave()
        (await waiting[1]).leave()

    async def test_a_chain_of_tasks_keeps_no_chain_of_permits(self) -> None:
        """A task that starts the next one from inside its call does not keep all calls before it alive."""
        limiter = Limiter(limit=2)
        permits: list[Any] = []
        done = asyncio.Event()

        async def link(number: int) -> None:
            permit = await limiter.aenter()
            permits.append(permit)
            if number:
                task = asyncio.create_task(link(number - 1))
                task.add_done_callback(lambda _: None)
            else:
                done.set()
            await asyncio.sleep(0)
            permit.leave()

        await link(50)
        await done.wait()
        await until(lambda: limiter.stats().in_flight == 0)
        depth = 0
        outer = permits[-1].outer
        while outer is not None:
            depth, outer = depth + (outer.place is limiter), outer.outer
        gc.collect()

        assert depth <= 2


class TestArguments:
    @pytest.mark.parametrize("timeout", [0, -1, float("nan"), float("inf")])
    def test_a_bad_timeout_is_told(self, timeout: float) -> None:
        """A wait of no time, or of no sensible time, can't be meant."""
        with pytest.raises(ValueError, match=f"^timeout={timeout!r}: must be above 0 and finite, as in timeout=30$"):
            Limiter(limit=1, timeout=timeout)

    def test_it_knows_whether_it_bounds_calls(self) -> None:
        """A limit does, a rate does not."""
        assert Limiter(limit=1).bounds_calls
        assert not Limiter(per_second=1).bounds_calls
