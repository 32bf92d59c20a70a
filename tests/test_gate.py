"""Gates: keys, costs, and limiters of other people, on both paths."""

import asyncio
import contextvars
import copy
import gc
import itertools
import pickle
import random
import re
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

import pytest
from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import BaseRateLimiter, InMemoryRateLimiter
from langchain_core.runnables import RunnableConfig

from asyncify import Dual, PairError, concurrency, dual
from asyncify.adaptive import Adaptive
from asyncify.background import background
from asyncify.errors import LimitTimeout
from asyncify.foreign import ForeignLimiter
from asyncify.gate import Gate, make_gate
from asyncify.keyed import KeyedLimiter
from asyncify.limiter import Limiter
from asyncify.testing import FakeClock
from tests.crowd import ServerError
from tests.waiting import SAFETY_NET, run_program, until


def gate_of(limiter: Any = None, fn: Callable[..., Any] = lambda query: query, **arguments: Any) -> Gate:
    """Make a gate as `concurrency` does, in front of a function."""
    return make_gate(limiter, **{"key": None, "cost": None, "timeout": None, **arguments}).before(fn)


async def pass_through(gate: Gate, path: str, *args: Any, **kwargs: Any) -> None:
    """Enter and leave, on the sync or the async path."""
    permit = gate.enter(args, kwargs) if path == "sync" else await gate.aenter(args, kwargs)
    permit.finish()


def quote(pair: str, tenant: str = "x") -> str:
    """Name a quote."""
    return pair + tenant


def convert(pair: str, amount: float, tenant: str = "x") -> str:
    """Name a conversion."""
    return f"{pair}{amount}{tenant}"


both_paths = pytest.mark.parametrize("path", ["sync", "async"])


async def async_size(value: Any) -> int:
    """Tell a size, too late."""
    return len(value)


@pytest.fixture
def keeps_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all keys, only the limiter of the last used is kept whole."""
    monkeypatch.setattr("asyncify.keyed._WHOLE", 1)


class TestKeys:
    @both_paths
    async def test_each_key_has_the_limits_for_itself(self, path: str) -> None:
        """A full key does not hold up another."""
        gate = gate_of(key=lambda query: query[0], limit=1, timeout=0.01)
        held = gate.enter(("a1",), {})
        await pass_through(gate, path, "b1")
        with pytest.raises(LimitTimeout, match=r"^limiter key\['a'\]: not admitted"):
            await contextvars.Context().run(asyncio.ensure_future, pass_through(gate, "async", "a2"))
        held.finish()
        await pass_through(gate, path, "a2")

    def test_a_finalizer_may_look_up_a_key_in_the_middle_of_a_look_up(self) -> None:
        """It runs in the thread that does so, which does not wait for itself."""
        keyed = KeyedLimiter(lambda key: key, limit=1)
        found: list[Limiter] = []

        def look_up_twice() -> None:
            with keyed._lock:
                found.append(keyed["a"])

        thread = threading.Thread(target=look_up_twice, daemon=True)
        thread.start()
        thread.join(10)

        assert found == [keyed["a"]]

    def test_idle_keys_are_forgotten(self) -> None:
        """Twenty thousand keys leave the last thousand in memory, with what their limiters have seen."""
        keyed = KeyedLimiter(lambda key: key, limit=1)
        for key in range(20_000):
            keyed.enter(key, 1, None).finish()

        assert len(keyed) <= 1003
        assert [keyed[key].stats().admitted for key in range(19_999, 19_000, -1)] == [1] * 999
        assert keyed[0].stats().admitted == 0

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_busy_key_does_not_keep_idle_ones(self) -> None:
        """While one key's call runs on and on, those that come and go are forgotten."""
        keyed = KeyedLimiter(lambda key: key, limit=1)
        permit = keyed.enter("busy", 1, None)
        for key in range(1000):
            contextvars.Context().run(lambda key=key: keyed.enter(key, 1, None).finish())  # type: ignore[misc]  # bound now

        assert len(keyed) <= 5
        assert keyed["busy"].stats().in_flight == 1
        permit.finish()

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_key_whose_calls_still_count_is_remembered(self) -> None:
        """Forgetting it would let more through than the rate: only a window later it may go."""
        clock = FakeClock()
        keyed = KeyedLimiter(lambda key: key, per_second=1, clock=clock)
        keyed.enter("a", 1, None).finish()
        for key in range(100):
            keyed.enter(key, 1, None).finish()
        gc.collect()
        assert not keyed["a"].acquire(blocking=False)
        assert len(keyed) == 101
        clock.advance(1)
        for _ in range(200):
            keyed["b"]._state()
        gc.collect()

        assert len(keyed) <= 2

    def test_of_a_key_not_used_lately_only_what_counts_is_kept(self) -> None:
        """Its limiter is made again when it is used, and forgotten when nothing counts any more."""
        clock = FakeClock()
        keyed = KeyedLimiter(lambda key: key, limit=1, per_hour=1, clock=clock)
        for key in range(3000):
            keyed.enter(key, 1, None).finish()
        gc.collect()
        assert len(keyed) == len(list(keyed)) == 3000
        assert len(keyed._alive) <= 1001
        assert 0 in keyed
        assert not any(keyed[key].acquire(blocking=False) for key in range(3000))

        clock.advance(3600)
        for _ in range(3000):
            keyed["b"]._state()
        assert len(keyed) == 1000

    def test_a_key_not_used_lately_stays_paused(self) -> None:
        """As long as the server said."""
        clock = FakeClock()
        keyed = KeyedLimiter(lambda key: key, per_minute=60, clock=clock)
        keyed.enter("acme", 1, None).finish(ServerError(429, {"Retry-After": "1000"}))
        for key in range(3000):
            keyed.enter(key, 1, None).finish()
        gc.collect()
        assert "acme" not in keyed._alive
        clock.advance(999)
        assert not keyed["acme"].acquire(blocking=False)
        clock.advance(1)

        assert keyed["acme"].acquire(blocking=False)

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_key_whose_limiter_somebody_holds_has_no_second_one(self) -> None:
        """Though it was not used lately, its calls count."""
        keyed = KeyedLimiter(lambda key: key, limit=1, clock=FakeClock())
        acme = keyed["acme"]
        for key in range(100):
            keyed.enter(key, 1, None).finish()
        assert "acme" not in keyed._last_used

        with acme:
            assert keyed["acme"] is acme
            assert "acme" in keyed
            assert len(keyed) <= 4

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_key_whose_callers_loop_is_closed_is_forgotten(self) -> None:
        """Its last call waits for another, which will never go on, for the slot that it holds itself."""
        keyed = KeyedLimiter(lambda key: key, limit=1)
        loop = asyncio.new_event_loop()

        async def wait() -> None:
            async with keyed["a"]:
                pass

        async def hold() -> None:
            async with keyed["a"]:
                await loop.create_task(wait(), context=contextvars.Context())

        async def begin() -> None:
            holding = loop.create_task(hold())
            await until(lambda: keyed["a"].stats().waiting == 1)
            assert not holding.done()

        loop.run_until_complete(begin())
        loop.close()
        for key in range(10):
            keyed.enter(key, 1, None).finish()
        gc.collect()

        assert "a" not in keyed._alive

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_key_with_an_adaptive_limit_is_forgotten(self) -> None:
        """Its limiter learns from a call that has ended before it is used again, and is let go."""
        clock = FakeClock()
        keyed = KeyedLimiter(lambda key: key, limit=Adaptive(min=2), clock=clock)
        for key in range(100):
            keyed.enter(key, 1, None).finish()
        for _ in range(2):
            for _ in range(100):
                keyed["b"]._state()
            clock.advance(60)

        assert len(keyed) == len(keyed._alive) == 1

    @pytest.mark.usefixtures("keeps_the_last")
    def test_keys_that_no_longer_count_go_though_new_ones_come(self) -> None:
        """Of a rush of keys none is left when as many others have come, one by one."""
        clock = FakeClock()
        keyed = KeyedLimiter(lambda key: key, per_second=1, clock=clock)
        for key in range(1000):
            keyed.enter(key, 1, None).finish()
        for key in range(1000, 3000):
            clock.advance(0.5)
            keyed.enter(key, 1, None).finish()

        assert len(keyed) <= 5

    def test_finalizers_may_look_up_other_keys_in_the_middle_of_a_look_up(self) -> None:
        """Wherever the garbage is collected: keys that they add disturb no check of those that there are."""
        keyed = KeyedLimiter(lambda key: key, limit=1)
        keys = itertools.count()

        class Garbage:
            def __init__(self) -> None:
                self.me = self

            def __del__(self) -> None:
                keyed[next(keys)]._state()

        before = gc.get_threshold()
        try:
            for number in range(1000):
                gc.set_threshold(1 + number % 20)
                Garbage()
                keyed["a"]._state()
        finally:
            gc.set_threshold(*before)
        gc.collect()

        assert next(keys) == 1000

    @pytest.mark.usefixtures("keeps_the_last")
    def test_what_a_key_admits_counts_however_late(self) -> None:
        """Also if other keys were looked up meanwhile, and its limiter is not held afterwards."""
        keyed = KeyedLimiter(lambda key: key, per_hour=1, clock=FakeClock())
        acme = keyed["acme"]
        for key in range(100):
            keyed.enter(key, 1, None).finish()
        assert acme.acquire(blocking=False)
        del acme
        for key in range(100):
            keyed.enter(key + 100, 1, None).finish()
        gc.collect()

        assert not keyed["acme"].acquire(blocking=False)

    @pytest.mark.usefixtures("keeps_the_last")
    @pytest.mark.parametrize("learned", ["resized", "adapted"])
    def test_what_a_key_has_learned_is_kept(self, learned: str) -> None:
        """Though it was not used lately."""
        keyed = KeyedLimiter(lambda key: key, limit=Adaptive(min=1, max=9, start=9), per_minute=9, clock=FakeClock())
        if learned == "resized":
            keyed["acme"].resize(limit=1)
        else:
            keyed.enter("acme", 1, None).finish(TimeoutError())
        for key in range(100):
            keyed.enter(key, 1, None).finish()
        gc.collect()
        assert "acme" not in keyed._alive

        assert keyed["acme"].stats().limit == 1

    @pytest.mark.usefixtures("keeps_the_last")
    def test_threads_that_use_keys_at_once_make_no_second_limiter(self) -> None:
        """However often limiters are let go and made again, each key admits what its rate allows."""
        keyed = KeyedLimiter(lambda key: key, per_hour=3, burst=3, clock=FakeClock())
        admitted: Counter[int] = Counter()

        def use(seed: int) -> None:
            mine: Counter[int] = Counter()
            for key in random.Random(seed).sample(range(200), 200):
                mine[key] += keyed[key].acquire(blocking=False)
            with lock:
                admitted.update(mine)

        lock = threading.Lock()
        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SAFETY_NET)

        assert admitted == dict.fromkeys(range(200), 3)

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_key_that_was_resized_is_remembered(self) -> None:
        """A new limiter would have the limits of all the others."""
        keyed = KeyedLimiter(lambda key: key, limit=2)
        keyed["acme"].resize(limit=9)
        for key in range(100):
            keyed.enter(key, 1, None).finish()
        gc.collect()

        assert keyed["acme"].stats().limit == 9
        assert len(keyed) <= 4

    @both_paths
    async def test_a_key_that_was_resized_admits_what_the_others_never_could(self, path: str) -> None:
        """A cost is held against the limits of its own key."""
        gate = gate_of(key=lambda query: query[0], cost=len, per_minute=4)
        cast("KeyedLimiter", gate.limiter)["a"].resize(per_minute=9)
        await pass_through(gate, path, "acme 7")

        with pytest.raises(
            ValueError, match=r"\['b'\]: a cost of 6 can never be admitted, as the limit is 4 per minute"
        ):
            await pass_through(gate, path, "beta 7")

    def test_the_keys_can_be_asked_for(self) -> None:
        """To ask for one does not make it; and a limiter without keys is true, as any is."""
        keyed = KeyedLimiter(lambda key: key, per_minute=1)
        assert keyed
        assert "acme" not in keyed
        keyed.enter("acme", 1, None).finish()

        assert "acme" in keyed
        assert "beta" not in keyed
        assert list(keyed) == ["acme"]

    @both_paths
    async def test_functions_may_share_the_limits_of_each_key(self, path: str) -> None:
        """One function's limiter is given to another: a tenant has its limit for both."""
        search: Any = concurrency(limit=1, key=lambda query: query["tenant"])(lambda query: query)
        fetch: Any = concurrency(limiter=search.limiter, timeout=0.01)(lambda query: query)
        held = search.limiter["acme"].enter()
        other = {"tenant": "beta"}
        assert (fetch.invoke(other) if path == "sync" else await fetch.ainvoke(other)) == other

        with pytest.raises(LimitTimeout):
            await pass_through(fetch._gate.before(fetch.func), path, {"tenant": "acme"})
        held.leave()

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_key_forgotten_between_look_up_and_resize_is_remembered_again(self) -> None:
        """Others may use their keys in between, as where the new limit is looked up first."""
        keyed = KeyedLimiter(lambda key: key, limit=1)
        looked_up = keyed["acme"]
        for key in range(100):
            keyed.enter(key, 1, None).finish()
        looked_up.resize(limit=9)
        del looked_up
        gc.collect()

        assert keyed["acme"].stats().limit == 9

    @pytest.mark.usefixtures("keeps_the_last")
    def test_a_key_forgotten_between_look_up_and_admission_still_counts(self) -> None:
        """However other threads interleave, no window of a key is over."""
        clock = FakeClock()
        keyed = KeyedLimiter(lambda key: key, per_second=1, clock=clock)

        class Interloper(FakeClock):
            """A clock that lets others use their keys while this call is about to be admitted."""

            def now(self) -> float:
                if threading.current_thread().name == "slow":
                    threading.current_thread().name = "resumed"
                    for key in ("b", "c", "d"):
                        keyed["a" + key].stats()
                return super().now()

        keyed._arguments["clock"] = Interloper()

        def call() -> None:
            keyed.enter("a", 1, None).finish()

        thread = threading.Thread(target=call, name="slow")
        thread.start()
        thread.join()
        gc.collect()

        assert thread.name == "resumed"
        assert not keyed["a"].acquire(blocking=False)

    def test_the_key_of_several_arguments_is_a_mapping(self) -> None:
        """A function that needs more than one argument gives its key all of them by name, defaults too."""
        seen: list[Any] = []

        def key(query: Any) -> str:
            seen.append(dict(query))
            return "k"

        gate = gate_of(fn=convert, key=key, limit=1)
        gate.enter(("EURUSD", 5), {}).finish()
        gate.enter(("EURUSD",), {"amount": 6, "tenant": "y"}).finish()

        assert seen == [
            {"pair": "EURUSD", "amount": 5, "tenant": "x"},
            {"pair": "EURUSD", "amount": 6, "tenant": "y"},
        ]

    def test_the_key_of_one_argument_is_the_argument(self) -> None:
        """By position or by name."""
        seen: list[Any] = []
        gate = gate_of(fn=quote, key=lambda query: (seen.append(query), "k")[1], limit=1)  # type: ignore[func-returns-value]
        gate.enter(("EURUSD",), {}).finish()
        gate.enter((), {"pair": "GBPUSD"}).finish()

        assert seen == ["EURUSD", "GBPUSD"]

    def test_the_key_of_one_argument_that_is_left_out_is_its_default(self) -> None:
        """As the function itself has it."""
        seen: list[Any] = []
        gate = gate_of(key=seen.append, fn=lambda pair="EURUSD": pair, limit=1)
        gate.enter((), {}).finish()

        assert seen == ["EURUSD"]

    def test_the_key_of_arguments_of_any_name_is_a_mapping(self) -> None:
        """They have no first."""
        seen: list[Any] = []

        def by_name(**options: str) -> None: ...

        gate = gate_of(key=lambda call: seen.append(dict(call)), fn=by_name, limit=1)
        gate.enter((), {"pair": "EUR", "tenant": "acme"}).finish()

        assert seen == [{"pair": "EUR", "tenant": "acme"}]

    def test_the_key_of_no_argument_at_all_is_none(self) -> None:
        """A function that takes any number of them may be called without one."""
        seen: list[Any] = []
        gate = gate_of(key=seen.append, fn=lambda *pairs: pairs, limit=1)
        gate.enter(("EUR", "GBP"), {}).finish()
        gate.enter((), {}).finish()

        assert seen == ["EUR", None]

    @both_paths
    @pytest.mark.parametrize("fn", [quote, convert, lambda pair, **options: pair])
    async def test_a_call_that_lacks_the_argument_asks_for_no_key(self, path: str, fn: Callable[..., Any]) -> None:
        """It fails before it waits, as the function would."""
        seen: list[Any] = []
        gate = gate_of(key=seen.append, fn=fn, limit=1)
        with pytest.raises(TypeError, match="missing a required argument: 'pair'"):
            await pass_through(gate, path, tenant="acme")

        assert seen == []
        assert repr(gate.limiter) == "<KeyedLimiter 0 keys>"

    @both_paths
    async def test_the_key_may_take_from_the_mapping(self, path: str) -> None:
        """It is the key's own."""
        pair: Any = concurrency(limit=1, key=lambda call: call.pop("tenant"))(lambda **options: options)
        given = {"tenant": "acme", "pair": "EUR"}

        assert (pair.call(**given) if path == "sync" else await pair.acall(**given)) == given

    @both_paths
    @pytest.mark.parametrize("stub", [lambda pair, amount: None, lambda pair, amount, config: None])
    async def test_only_one_of_the_functions_may_ask_for_the_config(self, path: str, stub: Any) -> None:
        """The key is of the same arguments then."""
        seen: list[Any] = []

        def fetch(pair: str, amount: int, config: RunnableConfig) -> str:
            return f"{pair}{amount}{config['tags'][0]}"

        async def afetch(pair: str, amount: int) -> str:
            return f"{pair}{amount}t"

        def key(call: Any) -> str:
            seen.append((call["pair"], call["amount"]))
            return "k"

        made: Any = concurrency(limit=1, key=key)(Dual(fetch, afetch))
        made._furnish(wears=stub)
        value, config = {"pair": "EUR", "amount": 3}, {"tags": ["t"]}

        assert (made.invoke(value, config) if path == "sync" else await made.ainvoke(value, config)) == "EUR3t"
        assert seen == [("EUR", 3)]

    @both_paths
    async def test_a_key_without_a_hash_is_told(self, path: str) -> None:
        """The error names the function and shows the key."""
        gate = gate_of(fn=quote, key=lambda query: [query], limit=1)

        with pytest.raises(
            TypeError, match=r"^key= of .*quote.* gave \['a'\], which has no hash; let it give a string"
        ):
            await pass_through(gate, path, "a")

    @both_paths
    @pytest.mark.parametrize("asked", [{"cost": lambda query: query.tokens}, {"key": lambda query: query.tenant}])
    async def test_an_error_in_cost_or_key_tells_of_which_function(self, path: str, asked: dict[str, Any]) -> None:
        """In a pipe of several nobody could see whose it is."""
        gate = gate_of(fn=quote, per_second=1, **asked)

        with pytest.raises(AttributeError) as raised:
            await pass_through(gate, path, "a")
        (note,) = raised.value.__notes__
        assert re.match(rf"in {next(iter(asked))}= of .*quote", note)

    def test_record_finds_the_limiter_of_the_key(self) -> None:
        """A correction inside a call goes to its own key."""
        keyed = KeyedLimiter(lambda key: key, per_minute=10, burst=10, clock=FakeClock())
        permit = keyed.enter("a", 1, None)
        keyed.record(10)
        permit.finish()

        assert not keyed["a"].acquire(blocking=False)
        assert keyed["b"].acquire(blocking=False)

    def test_record_outside_a_call_is_an_error(self) -> None:
        """There is nothing to correct, even inside a call of somebody else."""
        keyed = KeyedLimiter(lambda key: key, limit=1, name="quotes")
        with Limiter(limit=1), pytest.raises(RuntimeError, match=r"^quotes: this context is not inside a call"):
            keyed.record(1)
        with pytest.raises(RuntimeError, match=r"^keyed limiter: this context"):
            KeyedLimiter(lambda key: key, limit=1).record(1)

    def test_repr_tells_how_many_keys(self) -> None:
        """With the name, if it has one; and its limiters are called by name and key."""
        keyed = KeyedLimiter(lambda key: key, name="quotes", limit=3)
        permit = keyed.enter("a", 1, None)

        assert repr(keyed) == "<KeyedLimiter quotes 1 keys>"
        assert repr(keyed["a"]) == "<Limiter quotes['a'] 1/3 in flight, 0 waiting>"
        assert repr(KeyedLimiter(lambda key: key, limit=1)) == "<KeyedLimiter 0 keys>"
        permit.finish()

    def test_limits_of_a_key_do_not_bound_all_calls(self) -> None:
        """A thread pool of a pair can't be sized by them."""
        assert not KeyedLimiter(lambda key: key, limit=3)._bounds_calls

    def test_a_copy_is_the_limiter_itself(self) -> None:
        """As of a `Limiter`: an object that holds the limits of each key can be copied, and shares them."""
        keyed = KeyedLimiter(lambda key: key, name="quotes", limit=3)

        assert copy.copy(keyed) is keyed
        assert copy.deepcopy({"limiter": keyed})["limiter"] is keyed
        with pytest.raises(pickle.PicklingError, match=r"^quotes: holds in one process"):
            pickle.dumps(keyed)


class TestCost:
    @both_paths
    async def test_a_function_of_the_input_tells_the_cost(self, path: str) -> None:
        """Each call takes what its input costs."""
        clock = FakeClock()
        gate = gate_of(cost=len, per_minute=10, burst=10, clock=clock, timeout=0.01)
        await pass_through(gate, path, "1234")
        await pass_through(gate, path, "123456")

        assert isinstance(gate.limiter, Limiter)
        assert not gate.limiter.acquire(blocking=False)

    @both_paths
    async def test_a_cost_above_the_limit_is_told_at_once(self, path: str) -> None:
        """The error names the function and both figures."""
        gate = gate_of(fn=quote, cost=len, per_minute=5)

        with pytest.raises(
            ValueError, match=r"quote.*: a cost of 6 can never be admitted, as the limit is 5 per minute$"
        ):
            await pass_through(gate, path, "123456")
        await pass_through(gate, path, "12345")

    @both_paths
    @pytest.mark.parametrize(("cost", "error"), [(-1, ValueError), (float("nan"), ValueError), ("5", TypeError)])
    async def test_a_bad_cost_is_told(self, path: str, cost: Any, error: type[Exception]) -> None:
        """What the function gave is shown, and for which function; nothing was taken."""
        gate = gate_of(fn=quote, cost=lambda _: cost, per_minute=5)

        with pytest.raises(error, match=r"quote.*: cost="):
            await pass_through(gate, path, "x")
        assert isinstance(gate.limiter, Limiter)
        assert gate.limiter.stats().admitted == 0

    @both_paths
    async def test_a_fixed_cost(self, path: str) -> None:
        """Every call takes the same."""
        gate = gate_of(cost=5, per_minute=10, burst=10, clock=FakeClock())
        await pass_through(gate, path, "x")
        await pass_through(gate, path, "x")

        assert isinstance(gate.limiter, Limiter)
        assert not gate.limiter.acquire(blocking=False)


class TestArguments:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"key": "tenant", "limit": 1}, TypeError, r"^key='tenant': must be a function of the input"),
            (
                {"key": lambda desk, query: query, "limit": 1},
                TypeError,
                r"^key=.*lambda.* with one argument, the input, and takes \(desk, query\); .*key=lambda call: call",
            ),
            ({"cost": lambda: 1, "per_second": 1}, TypeError, r"^cost=.*one argument, the input, and takes \(\); "),
            ({"cost": async_size, "per_second": 1}, TypeError, r"^cost=.*async_size.*: is async; .* so write a def$"),
            ({"key": async_size, "limit": 1}, TypeError, r"^key=.*async_size.*: is async"),
            ({"timeout": 0, "limit": 1}, ValueError, r"^timeout=0: must be above 0 and finite, as in timeout=30$"),
            ({"cost": -1, "per_second": 1}, ValueError, r"^cost=-1: must be finite and not negative, as in cost=20$"),
            ({"cost": True, "per_second": 1}, TypeError, r"^cost=True: must be a number, as in cost=20$"),
            ({"cost": 2, "limit": 1}, ValueError, r"^cost= needs a rate, as in per_minute=90_000, cost=count_tokens$"),
            ({"cost": len, "limit": 1}, ValueError, r"^cost= needs a rate"),
            (
                {"cost": 7, "per_minute": 5, "per_hour": 6},
                ValueError,
                r"^cost=7: a cost of 7 .* limit is 5 per minute$",
            ),
            (
                {"limiter": Limiter(limit=1), "limit": 3},
                TypeError,
                r"^limiter= brings its own limits, so limit can't be",
            ),
            (
                {"limiter": Limiter(limit=1), "key": len},
                TypeError,
                r"^limiter= is one for all calls, so key can",
            ),
            ({"limiter": 5}, TypeError, r"^limiter=5 is no limiter; write limiter=Limiter\(limit=10\), or give an"),
            (
                {"limiter": AsyncLimiter(0.5, 1)},
                ValueError,
                r"^limiter=: AsyncLimiter\(0.5, 1\) can never admit a call, as its max_rate is below 1; write it for",
            ),
            ({"limiter": AsyncLimiter(5), "cost": 2}, TypeError, r"^cost= and timeout= need a limiter of asyncify's"),
            (
                {"limiter": AsyncLimiter(5), "timeout": 2},
                TypeError,
                r"^cost= and timeout= need a limiter of asyncify's",
            ),
            ({}, TypeError, r"^nothing to limit"),
            ({"key": len}, TypeError, r"^nothing to limit"),
        ],
    )
    def test_bad_arguments_are_told(self, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
        """When decorated, not at the first call."""
        with pytest.raises(error, match=message):
            gate_of(**arguments)

    @both_paths
    async def test_the_gates_timeout_counts(self, path: str) -> None:
        """A shared limiter with another timeout is not asked for it."""
        limiter = Limiter(limit=1, timeout=3600)
        gate = gate_of(limiter, timeout=0.01)
        held = contextvars.Context().run(limiter.enter)

        with pytest.raises(LimitTimeout):
            await pass_through(gate, path, "x")
        held.end()

    @pytest.mark.usefixtures("keeps_the_last")
    def test_an_adaptive_limit_serves_each_key(self) -> None:
        """Each key finds its own, and keeps it for a while when it is not used."""
        clock = FakeClock()
        gate = gate_of(key=lambda query: query, limit=Adaptive(min=1, max=9, start=4), clock=clock)
        assert isinstance(gate.limiter, KeyedLimiter)
        with pytest.raises(TimeoutError), gate.limiter["a"]:
            raise TimeoutError
        for _ in range(20):
            gate.enter(("b",), {}).finish()
        assert gate.limiter["a"].stats().limit == 1
        assert gate.limiter["b"].stats().limit != 1
        clock.advance(100)
        for _ in range(20):
            gate.enter(("c",), {}).finish()

        assert gate.limiter["a"].stats().limit == 4


class Turnstile(BaseRateLimiter):
    """Somebody's rate limiter, which counts."""

    def __init__(self) -> None:
        self.passed: list[str] = []

    def acquire(self, *, blocking: bool = True) -> bool:
        self.passed.append("sync")
        return True

    async def aacquire(self, *, blocking: bool = True) -> bool:
        self.passed.append("async")
        return True


class TestForeignLimiters:
    @both_paths
    async def test_a_langchain_limiter_is_asked_on_its_own_path(self, path: str) -> None:
        """Its sync face serves sync calls, its async face async ones."""
        turnstile = Turnstile()
        await pass_through(gate_of(turnstile), path, "x")

        assert turnstile.passed == [path]

    @both_paths
    async def test_langchains_own_limiter_serves(self, path: str) -> None:
        """The bucket is drawn from on both paths."""
        limiter = InMemoryRateLimiter(requests_per_second=1e-6, max_bucket_size=3)
        limiter.acquire(blocking=False)  # it counts from its first call on
        limiter.available_tokens = 3
        gate = gate_of(limiter)
        for _ in range(3):
            await pass_through(gate, path, "x")

        assert limiter.available_tokens < 1

    def test_an_aiolimiter_serves_threads_and_two_loops(self) -> None:
        """Though it belongs to one loop, calls of all of them pass, and none fails."""
        limiter = AsyncLimiter(30, 0.05)
        gate = gate_of(limiter)
        passed: list[str] = []
        errors: list[BaseException] = []

        def on_a_thread() -> None:
            for _ in range(20):
                gate.enter(("x",), {}).finish()
                passed.append("thread")

        async def on_a_loop() -> None:
            async def one() -> None:
                (await gate.aenter(("x",), {})).finish()
                passed.append("loop")

            await asyncio.gather(*(one() for _ in range(20)))

        def guard(run: Callable[[], Any]) -> None:
            try:
                run()
            except BaseException as error:  # noqa: BLE001  (the test looks at it)
                errors.append(error)

        runs: list[Callable[[], Any]] = [on_a_thread, on_a_thread]
        runs += [lambda: asyncio.run(on_a_loop()), lambda: asyncio.run(on_a_loop())]
        threads = [threading.Thread(target=guard, args=(run,)) for run in runs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SAFETY_NET)

        assert errors == []
        assert sorted(passed) == ["loop"] * 40 + ["thread"] * 40

    @pytest.mark.parametrize("first", ["directly", "a call"])
    def test_an_aiolimiter_may_be_used_directly_too(self, first: str) -> None:
        """By code on the event loop that it belongs to, beside calls that wait for it elsewhere."""
        limiter = AsyncLimiter(2, 0.05)
        gate = gate_of(limiter)

        async def directly() -> str:
            async with limiter:
                return "directly"

        async def call() -> str:
            (await gate.aenter(("x",), {})).finish()
            return "a call"

        async def both() -> list[str]:
            ways = [directly, call] if first == "directly" else [call, directly]
            return await asyncio.gather(*(way() for way in ways * 3))

        assert sorted(asyncio.run(both())) == ["a call"] * 3 + ["directly"] * 3

    async def test_an_aiolimiters_bucket_is_full_for_everybody(self) -> None:
        """What was taken directly counts for calls, and what calls have taken for direct use."""
        limiter = AsyncLimiter(2, 3600)
        gate = gate_of(limiter)
        await limiter.acquire()
        await pass_through(gate, "async", "x")
        waiting = asyncio.create_task(gate.aenter(("x",), {}))
        await asyncio.sleep(0.01)

        assert not waiting.done()
        assert not limiter.has_capacity()
        waiting.cancel()

    def test_calls_wait_for_an_aiolimiter_in_a_forked_process_too(self) -> None:
        """Though its parent has waited for it."""
        program = """
import asyncio, os
from aiolimiter import AsyncLimiter
from asyncify import concurrency
limiter = AsyncLimiter(1, 0.02)
call = concurrency(limiter=limiter)(lambda value: value)
async def calls():
    return await asyncio.gather(*(call.ainvoke(value) for value in range(3)))
asyncio.run(calls())
child = os.fork()
results = [call.invoke(value) for value in range(3)], asyncio.run(calls())
os.write(1, f"{results}\\n".encode())  # in one piece
if child:
    os._exit(os.waitpid(child, 0)[1])
os._exit(0)
"""

        assert run_program(program) == "([0, 1, 2], [0, 1, 2])\n" * 2

    async def test_a_wait_for_an_aiolimiter_can_be_cancelled(self) -> None:
        """A call that gives up while it waits for the loop in the background is let go at once."""
        limiter = AsyncLimiter(1, 3600)
        gate = gate_of(limiter)
        await pass_through(gate, "async", "x")
        waiting = asyncio.create_task(gate.aenter(("x",), {}))
        await asyncio.sleep(0.01)
        waiting.cancel()

        with pytest.raises(asyncio.CancelledError):
            await waiting

    def test_a_sync_call_on_the_background_loop_does_not_wait_for_itself(self) -> None:
        """A sync call inside a bridged async one passes an AsyncLimiter as well."""
        gate = gate_of(AsyncLimiter(5))
        passed = threading.Event()

        async def bridged() -> None:
            gate.enter(("x",), {}).finish()
            passed.set()

        thread = threading.Thread(target=lambda: background.run(bridged, contextvars.copy_context()), daemon=True)
        thread.start()
        thread.join(SAFETY_NET)

        assert passed.is_set()

    def test_what_it_grants_needs_no_giving_back(self) -> None:
        """A rate has no slots; a pass of it ends in any way and any order."""
        gate = gate_of(Turnstile())
        granted = gate.enter(("x",), {})

        for end in (granted.finish, granted.end, granted.step_out, granted.move_to_this_thread):
            end()
        assert not gate.limiter._bounds_calls

    def test_both_sides_may_bring_the_same(self) -> None:
        """It is one limit then, and no two."""
        shared = AsyncLimiter(5)

        @concurrency(limiter=shared)
        async def afetch(query: str) -> str:
            return query

        @concurrency(limiter=shared)
        def fetch(query: str) -> str:
            return query

        pair = dual(sync=fetch, async_=afetch, name="both_under_one")

        assert pair.limiter == ForeignLimiter(shared)
        assert hash(pair.limiter) == hash(ForeignLimiter(shared))
        with pytest.raises(PairError, match="have a limit each"):
            dual(sync=fetch, async_=concurrency(limiter=AsyncLimiter(5))(afetch.afunc), name="each_its_own")

    def test_repr_tells_whose_it_is(self) -> None:
        """By its class."""
        assert repr(ForeignLimiter(AsyncLimiter(5))) == "<ForeignLimiter limited by AsyncLimiter>"


async def test_a_builtin_without_a_signature_has_its_first_argument_for_an_input() -> None:
    """That is what `key` and `cost` are asked with: of a call by place or by name, or None of one without any."""
    keyed: list[Any] = []
    priced: list[Any] = []

    def key(value: Any) -> str:
        keyed.append(value)
        return "key"

    def cost(value: Any) -> float:
        priced.append(value)
        return 1

    calls: list[Any] = [
        concurrency(limit=1, key=key, name="keyed_dict")(dict),
        concurrency(per_minute=100, cost=cost, name="priced_dict")(dict),
    ]
    for call in calls:
        assert call.invoke([("a", 1)]) == {"a": 1}
        assert await call.ainvoke([("a", 2)]) == {"a": 2}
        assert call([("a", 3)], b=4) == {"a": 3, "b": 4}
        assert call(a=5, b=6) == {"a": 5, "b": 6}
        assert call() == {}

    assert keyed == priced == [[("a", 1)], [("a", 2)], [("a", 3)], 5, None]


def test_an_error_of_a_builtin_without_a_signature_names_it() -> None:
    """The note says whose `cost` has failed."""
    call: Any = concurrency(per_minute=100, cost=len, name="len_of_dict")(dict)

    with pytest.raises(TypeError, match="has no len") as caught:
        call(a=5)
    assert caught.value.__notes__ == ["in cost= of builtins.dict"]
