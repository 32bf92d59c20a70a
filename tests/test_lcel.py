"""A pair composes in LCEL wherever a `RunnableLambda` does."""

import asyncio
import gc
import pickle
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.runnables import (
    Runnable,
    RunnableConfig,
    RunnableLambda,
    RunnableParallel,
    RunnablePassthrough,
    RunnableSequence,
)

from asyncify import Dual, Limiter, PairError, concurrency, registry
from tests.waiting import SAFETY_NET, until, wait_until


def _double(x: int) -> int:
    return 2 * x


async def _adouble(x: int) -> int:
    return 2 * x


def _split(x: int) -> dict[str, int]:
    return {"tens": x // 10, "ones": x % 10}


async def _asplit(x: int) -> dict[str, int]:
    return {"tens": x // 10, "ones": x % 10}


def _total(parts: dict[str, int]) -> int:
    return sum(parts.values())


async def _atotal(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _scale(x: int, by: int = 1) -> int:
    return by * x


async def _ascale(x: int, by: int = 1) -> int:
    return by * x


def _plus_one(x: int) -> int:
    return x + 1


def _pair_of(fn: Callable[..., Any], afn: Callable[..., Any]) -> Dual[Any, Any]:
    return Dual(fn, afn)


COMPOSITIONS: list[Any] = [
    pytest.param(_pair_of(_double, _adouble) | _plus_one, 21, 43, id="on the left of a pipe"),
    pytest.param(RunnableLambda(_plus_one) | _pair_of(_double, _adouble), 20, 42, id="on the right of a pipe"),
    pytest.param(
        {"a": _pair_of(_double, _adouble), "b": _plus_one} | _pair_of(_total, _atotal),
        3,
        10,
        id="in a dict and behind one",
    ),
    pytest.param(
        _pair_of(_double, _adouble) | {"a": _pair_of(_double, _adouble), "b": RunnablePassthrough()},
        3,
        {"a": 12, "b": 6},
        id="in front of a dict",
    ),
    pytest.param(
        RunnableParallel(a=_pair_of(_double, _adouble), b=_plus_one), 3, {"a": 6, "b": 4}, id="in a RunnableParallel"
    ),
    pytest.param(
        RunnableSequence(_pair_of(_double, _adouble), _pair_of(_double, _adouble)), 3, 12, id="in a RunnableSequence"
    ),
    pytest.param(_pair_of(_double, _adouble).pipe(_plus_one, _pair_of(_double, _adouble)), 3, 14, id="pipe"),
    pytest.param(_pair_of(_scale, _ascale).bind(by=5), 3, 15, id="bind"),
    pytest.param(_pair_of(_double, _adouble).with_config(tags=["t"], run_name="renamed"), 3, 6, id="with_config"),
    pytest.param(_pair_of(_double, _adouble).with_retry(stop_after_attempt=2), 3, 6, id="with_retry"),
    pytest.param(_pair_of(_double, _adouble).with_fallbacks([RunnableLambda(_plus_one)]), 3, 6, id="with_fallbacks"),
    pytest.param(_pair_of(_double, _adouble).map(), [1, 2, 3], [2, 4, 6], id="map"),
    pytest.param(_pair_of(_split, _asplit).pick("tens"), 42, 4, id="pick"),
    pytest.param(_pair_of(_split, _asplit).pick(["tens"]), 42, {"tens": 4}, id="pick a list"),
    pytest.param(
        _pair_of(_split, _asplit).assign(sum=_pair_of(_total, _atotal)),
        42,
        {"tens": 4, "ones": 2, "sum": 6},
        id="assign around it",
    ),
    pytest.param(
        RunnablePassthrough.assign(sum=_pair_of(_total, _atotal)),
        {"a": 1, "b": 2},
        {"a": 1, "b": 2, "sum": 3},
        id="in an assign",
    ),
    pytest.param(_pair_of(_double, _adouble).with_types(input_type=int), 3, 6, id="with_types"),
]


@pytest.mark.parametrize(("composed", "given", "expected"), COMPOSITIONS)
def test_a_composition_runs(composed: Runnable[Any, Any], given: Any, expected: Any) -> None:
    """A composition with pairs in it gives the result on the sync path, and its batch gives it for each input."""
    assert composed.invoke(given) == expected
    assert composed.batch([given, given]) == [expected, expected]


@pytest.mark.parametrize(("composed", "given", "expected"), COMPOSITIONS)
async def test_a_composition_runs_async(composed: Runnable[Any, Any], given: Any, expected: Any) -> None:
    """The async twin."""
    assert await composed.ainvoke(given) == expected
    assert await composed.abatch([given, given]) == [expected, expected]


@pytest.mark.parametrize(("composed", "given", "expected"), COMPOSITIONS)
def test_a_composition_streams(composed: Runnable[Any, Any], given: Any, expected: Any) -> None:
    """The streamed chunks of a composition add up to its result."""
    chunks = list(composed.stream(given))
    folded = chunks[0]
    for chunk in chunks[1:]:
        folded = folded + chunk

    assert folded == expected


@pytest.mark.parametrize(("composed", "given", "expected"), COMPOSITIONS)
async def test_a_composition_streams_async(composed: Runnable[Any, Any], given: Any, expected: Any) -> None:
    """The async twin."""
    chunks = [chunk async for chunk in composed.astream(given)]
    folded = chunks[0]
    for chunk in chunks[1:]:
        folded = folded + chunk

    assert folded == expected


class Flaky:
    """Both sides of a function that fails the first times it is called."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.calls = 0

    def call(self, x: int) -> int:
        self.calls += 1
        if self.calls <= self.failures:
            raise ValueError(f"call {self.calls}")
        return x

    async def acall(self, x: int) -> int:
        return self.call(x)


def test_with_retry_calls_the_sync_side_again() -> None:
    """A failed call is repeated until it succeeds."""
    flaky = Flaky(failures=2)
    retried = _pair_of(flaky.call, flaky.acall).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)

    assert retried.invoke(7) == 7
    assert flaky.calls == 3


async def test_with_retry_calls_the_async_side_again() -> None:
    """The async twin."""
    flaky = Flaky(failures=2)
    retried = _pair_of(flaky.call, flaky.acall).with_retry(stop_after_attempt=3, wait_exponential_jitter=False)

    assert await retried.ainvoke(7) == 7
    assert flaky.calls == 3


def test_with_fallbacks_runs_the_fallback_of_a_failed_pair() -> None:
    """The fallback, a pair as well, gets the input of the pair that failed."""
    flaky = Flaky(failures=1)

    assert _pair_of(flaky.call, flaky.acall).with_fallbacks([_pair_of(_double, _adouble)]).invoke(7) == 14


async def test_with_fallbacks_runs_the_fallback_of_a_failed_pair_async() -> None:
    """The async twin."""
    flaky = Flaky(failures=1)

    assert await _pair_of(flaky.call, flaky.acall).with_fallbacks([_pair_of(_double, _adouble)]).ainvoke(7) == 14


class Names(BaseCallbackHandler):
    """A handler that notes the names and outputs of the runs it sees."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def on_chain_start(self, serialized: Any, inputs: Any, *, name: str = "", **kwargs: Any) -> None:
        self.seen.append(("start", name, inputs))

    def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.seen.append(("end", outputs))


class AsyncNames(AsyncCallbackHandler):
    """The async twin."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def on_chain_start(self, serialized: Any, inputs: Any, *, name: str = "", **kwargs: Any) -> None:
        self.seen.append(("start", name, inputs))

    async def on_chain_end(self, outputs: Any, **kwargs: Any) -> None:
        self.seen.append(("end", outputs))


PIPE_RUNS = [
    ("start", "RunnableSequence", 3),
    ("start", "_double", 3),
    ("end", 6),
    ("start", "_total_of_one", 6),
    ("end", 6),
    ("end", 6),
]


def _total_of_one(x: int) -> int:
    return x


async def _atotal_of_one(x: int) -> int:
    return x


def test_a_handler_sees_the_runs_of_pairs() -> None:
    """A callback handler is told of the start and end of the pipe and of each pair in it, by name."""
    handler = Names()
    (_pair_of(_double, _adouble) | _pair_of(_total_of_one, _atotal_of_one)).invoke(3, {"callbacks": [handler]})

    assert handler.seen == PIPE_RUNS


@pytest.mark.parametrize("handler", [Names(), AsyncNames()], ids=["sync handler", "async handler"])
async def test_a_handler_sees_the_runs_of_pairs_async(handler: Names | AsyncNames) -> None:
    """The async twin, for handlers of both colours."""
    pipe = _pair_of(_double, _adouble) | _pair_of(_total_of_one, _atotal_of_one)
    await pipe.ainvoke(3, {"callbacks": [handler]})

    assert handler.seen == PIPE_RUNS


STARTS = ["RunnableSequence", "_double", "_total_of_one"]


def test_the_runs_of_a_streamed_pipe_start_in_order() -> None:
    """A step that reads from the one in front of it starts behind it, as upstream."""
    handler = Names()
    pipe = _pair_of(_double, _adouble) | _pair_of(_total_of_one, _atotal_of_one)

    assert list(pipe.stream(3, {"callbacks": [handler]})) == [6]
    assert [seen[1] for seen in handler.seen if seen[0] == "start"] == STARTS


async def test_the_runs_of_a_streamed_pipe_start_in_order_async() -> None:
    """The async twin."""
    handler = AsyncNames()
    pipe = _pair_of(_double, _adouble) | _pair_of(_total_of_one, _atotal_of_one)

    assert [chunk async for chunk in pipe.astream(3, {"callbacks": [handler]})] == [6]
    assert [seen[1] for seen in handler.seen if seen[0] == "start"] == STARTS


async def test_astream_events_shows_pairs() -> None:
    """The events of a pipe of pairs are those of a pipe of lambdas of the same functions."""
    pairs = _pair_of(_double, _adouble) | _pair_of(_total_of_one, _atotal_of_one)
    lambdas = RunnableLambda(_double, _adouble, "_double") | RunnableLambda(
        _total_of_one, _atotal_of_one, "_total_of_one"
    )

    async def events(pipe: Runnable[Any, Any]) -> list[tuple[str, str, Any]]:
        return [(e["event"], e["name"], e["data"]) async for e in pipe.astream_events(3, version="v2")]

    assert await events(pairs) == await events(lambdas)
    assert ("on_chain_stream", "_double", {"chunk": 6}) in await events(pairs)


def test_dual_takes_what_a_runnable_lambda_takes() -> None:
    """`Dual(func, afunc, name)` fills the same attributes as `RunnableLambda(func, afunc, name)`."""
    pair: Dual[Any, Any] = Dual(_double, _adouble, "both")
    runnable = RunnableLambda(_double, _adouble, "both")

    assert (pair.func, pair.afunc, pair.name) == (runnable.func, runnable.afunc, runnable.name)
    assert isinstance(pair, RunnableLambda)


def test_dual_of_an_async_function_alone_runs_sync() -> None:
    """`Dual(afunc)` has no sync side and bridges it; upstream raises TypeError there."""
    pair: Dual[Any, Any] = Dual(_adouble)

    assert pair.invoke(3) == 6
    with pytest.raises(TypeError, match="Cannot invoke a coroutine function synchronously"):
        RunnableLambda(_adouble).invoke(3)


async def test_dual_of_a_sync_function_alone_runs_async() -> None:
    """`Dual(func)` has no async side and bridges it."""
    pair: Dual[Any, Any] = Dual(_double)

    assert await pair.ainvoke(3) == 6


@pytest.mark.parametrize("args", [(_adouble, _adouble), (None,), ("_double",)], ids=["two async", "None", "a string"])
def test_dual_refuses_what_a_runnable_lambda_refuses(args: tuple[Any, ...]) -> None:
    """Bad arguments raise the error that upstream raises for them."""
    with pytest.raises(TypeError) as ours:
        Dual(*args)
    with pytest.raises(TypeError) as theirs:
        RunnableLambda(*args)

    assert str(ours.value) == str(theirs.value)


def test_dual_registers_nothing() -> None:
    """A drop-in pair is unknown to the registry, so that one function can be in many."""
    pair = _pair_of(_double, _adouble)

    assert all(record.pair is not pair for record in registry)


def test_the_same_side_is_not_given_twice() -> None:
    """A pair that has both sides takes no third."""
    pair = _pair_of(_double, _adouble)

    with pytest.raises(PairError, match="has a sync side already"):
        pair.sync(_plus_one)
    with pytest.raises(PairError, match="has an async side already"):
        pair.async_(_ascale)


def test_a_composition_of_pairs_pickles() -> None:
    """A pipe of drop-in pairs of module functions pickles, as one of lambdas of them does."""
    pipe = pickle.loads(pickle.dumps(_pair_of(_double, _adouble) | _pair_of(_double, _adouble)))  # noqa: S301

    assert pipe.invoke(3) == 12


@pytest.mark.filterwarnings("ignore::langchain_core._api.beta_decorator.LangChainBetaWarning")
async def test_as_tool_runs_both_sides() -> None:
    """A pair becomes a tool whose two paths are its two sides."""
    tool = _pair_of(_total, _atotal).as_tool(name="total", description="Add up.", arg_types={"a": int, "b": int})

    assert tool.invoke({"a": 1, "b": 2}) == 3
    assert await tool.ainvoke({"a": 1, "b": 2}) == 3


def test_a_dict_of_pairs_keeps_the_name_it_was_given() -> None:
    """A dict that becomes one of pairs in a pipe is called what it was called before."""
    fan: Any = RunnableParallel(a=Dual(_add_one), b=Dual(_add_one))
    fan.name = "fan"
    pipe: Any = Dual(_add_one) | fan | Dual(_add_one)

    assert type(pipe.middle[0]) is not RunnableParallel
    assert pipe.middle[0].get_name() == "fan"


def test_a_pipe_of_pairs_keeps_the_name_it_was_given() -> None:
    """`pipe(..., name=...)` names it as upstream."""
    pipe: Any = Dual(_add_one).pipe(Dual(_add_one), name="twice")

    assert type(pipe) is not RunnableSequence
    assert pipe.get_name() == "twice"
    assert pipe.get_name("Input", name="once") == "once_input"


def test_a_pipe_and_a_dict_of_pairs_are_serialized_as_langchains_own() -> None:
    """A tracer that reads the id of a runnable knows them."""
    pipe: Any = Dual(_add_one) | {"a": Dual(_add_one)}

    assert type(pipe) is not RunnableSequence
    assert pipe.lc_id() == RunnableSequence.lc_id()
    assert pipe.last.lc_id() == RunnableParallel.lc_id()
    assert type(pipe).lc_id() == RunnableSequence.lc_id()
    assert type(pipe.last).lc_id() == RunnableParallel.lc_id()


def test_a_dict_of_pairs_leaves_no_branch_running_behind_an_error() -> None:
    """On the sync path the error of one branch is raised when the others have ended."""
    begun, raised, ended = threading.Event(), threading.Event(), threading.Event()

    def fail(number: int) -> int:
        begun.wait(30)
        raise ValueError(number)

    def go_on(number: int) -> int:
        begun.set()
        raised.wait(0.05)
        ended.set()
        return number

    pipe: Any = Dual(_add_one) | {"fails": Dual(fail), "goes on": Dual(go_on)}
    with pytest.raises(ValueError, match="2"):
        pipe.invoke(1)

    assert ended.is_set()


async def _pass_on(number: int) -> int:
    return number


@pytest.mark.parametrize("call", ["ainvoke", "abatch"])
async def test_a_dict_of_pairs_leaves_no_branch_running_behind_an_error_async(call: str) -> None:
    """On the async path the others are cancelled, and the error is raised when they have ended."""
    ended: list[str] = []

    async def fail(number: int) -> int:
        await asyncio.sleep(0)
        raise ValueError(number)

    async def go_on(number: int) -> int:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), 30)
        finally:
            await asyncio.sleep(0)
            ended.append("goes on")
        return number

    limiter = Limiter(limit=1)
    behind: Any = {"fails": Dual(fail), "goes on": concurrency(limiter=limiter)(Dual(go_on))}
    pipe: Any = Dual(_pass_on) | behind
    with pytest.raises(ValueError, match="1"):
        await (pipe.ainvoke(1) if call == "ainvoke" else pipe.abatch([1, 1, 1]))

    assert ended == ["goes on"]
    assert (limiter.stats().in_flight, limiter.stats().waiting) == (0, 0)
    assert asyncio.all_tasks() == {asyncio.current_task()}


async def _read(chunks: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in chunks]


@pytest.mark.parametrize("error", [ValueError("failed"), SystemExit()])
@pytest.mark.parametrize("config", [{}, {"max_concurrency": 1}])
def test_every_branch_of_a_dict_of_pairs_runs_though_one_fails_at_once(config: Any, error: BaseException) -> None:
    """As with LangChain's dict, whose branches all start before any can fail."""
    begun: list[int] = []

    def fail(_: object) -> None:
        raise error

    branches: Any = {"a": Dual(fail), "b": Dual(begun.append), "c": Dual(begun.append)}
    for _ in range(20):
        begun.clear()
        with pytest.raises(type(error)):
            (Dual(lambda value: value) | branches).invoke(1, config)

        assert begun == [1, 1]


@pytest.mark.parametrize("call", ["ainvoke", "astream"])
async def test_a_dict_of_pairs_that_is_cancelled_leaves_no_branch_running(call: str) -> None:
    """Who cancels it, twice even, hears of it when all branches have ended, whose clean-ups are not cut off."""
    begun: list[str] = []
    ended: list[str] = []
    complaints: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, complaint: complaints.append(complaint))

    def branch(name: str, steps: int) -> Any:
        async def wait(number: int) -> int:
            begun.append(name)
            try:
                await asyncio.wait_for(asyncio.Event().wait(), 30)
            finally:
                for _ in range(steps):
                    await asyncio.sleep(0)
                ended.append(name)
                if name == "c":
                    raise ValueError("too late")
            return number

        return Dual(wait)

    pipe: Any = Dual(_pass_on) | {"a": branch("a", 1), "b": branch("b", 20), "c": branch("c", 10)}
    running = asyncio.create_task(pipe.ainvoke(1) if call == "ainvoke" else _read(pipe.astream(1)))
    await until(lambda: len(begun) == 3)
    running.cancel()
    for _ in range(5):
        await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running

    assert ended == ["a", "c", "b"]
    assert asyncio.all_tasks() == {asyncio.current_task()}
    del running
    gc.collect()
    assert complaints == []


@contextmanager
def _held(limiter: Limiter) -> Iterator[threading.Event]:
    """A thread that has a limiter's one slot until the event is set."""
    free = threading.Event()
    holder: Any = concurrency(limiter=limiter)(Dual(lambda _: free.wait(SAFETY_NET)))
    thread = threading.Thread(target=holder.invoke, args=(0,))
    thread.start()
    try:
        wait_until(lambda: limiter.stats().in_flight == 1)
        yield free
    finally:
        free.set()
        thread.join()


def test_a_branch_that_ends_lets_another_wait_on() -> None:
    """Only an error calls off what the other branches wait for."""
    limiter = Limiter(limit=1)
    waits: Any = concurrency(limiter=limiter)(Dual(_plus_one))

    def end(number: int) -> int:
        wait_until(lambda: limiter.stats().waiting == 1)
        return number

    with _held(limiter) as free:
        frees = Dual[int, None](lambda _: free.set())  # begins in the thread of the branch that has ended
        branches: Any = {"waits": waits, "ends": Dual(end), "frees": frees}
        outputs = (Dual(_double) | branches).invoke(1, {"max_concurrency": 2})

    assert outputs == {"waits": 3, "ends": 2, "frees": None}


async def test_a_branch_that_ends_lets_another_wait_on_async() -> None:
    """The async twin."""
    limiter, has_ended = Limiter(limit=1), asyncio.Event()
    waits: Any = concurrency(limiter=limiter)(Dual(_pass_on))

    async def end(number: int) -> int:
        await until(lambda: limiter.stats().waiting == 1)
        asyncio.get_running_loop().call_later(0, has_ended.set)
        return number

    with _held(limiter) as free:

        async def let_go(_: int) -> None:
            await has_ended.wait()
            free.set()

        branches: Any = {"waits": waits, "ends": Dual(end), "frees": Dual(let_go)}
        outputs = await (Dual(_adouble) | branches).ainvoke(1)

    assert outputs == {"waits": 2, "ends": 2, "frees": None}


def test_the_error_of_a_branch_is_raised_and_not_that_another_was_called_off() -> None:
    """A branch that waits for its limiter gives up, though it is the first of the dict, and never runs."""
    limiter, ran = Limiter(limit=1), list[int]()
    waits: Any = concurrency(limiter=limiter)(Dual(ran.append))

    def fail(number: int) -> int:
        wait_until(lambda: limiter.stats().waiting == 1)
        raise ValueError(number)

    branches: Any = {"waits": waits, "fails": Dual(fail)}
    with _held(limiter), pytest.raises(ValueError, match="2"):
        (Dual(_double) | branches).invoke(1)

    assert ran == []


async def test_the_error_of_a_branch_is_raised_and_not_that_another_was_cancelled() -> None:
    """The async twin."""
    limiter, ran = Limiter(limit=1), list[int]()

    async def run(number: int) -> None:
        ran.append(number)

    async def fail(number: int) -> int:
        await until(lambda: limiter.stats().waiting == 1)
        raise ValueError(number)

    waits: Any = concurrency(limiter=limiter)(Dual(run))
    branches: Any = {"waits": waits, "fails": Dual(fail)}
    with _held(limiter), pytest.raises(ValueError, match="2"):
        await (Dual(_adouble) | branches).ainvoke(1)

    assert ran == []


async def test_a_dict_of_pairs_that_is_cancelled_behind_an_error_is_cancelled() -> None:
    """While it waits for the branches that the error has cancelled, the cancellation comes first."""
    cleans_up, may_end = asyncio.Event(), asyncio.Event()

    async def clean_up(_: int) -> None:
        try:
            await asyncio.wait_for(asyncio.Event().wait(), SAFETY_NET)
        finally:
            cleans_up.set()
            await may_end.wait()

    async def fail(number: int) -> int:
        raise ValueError(number)

    branches: Any = {"cleans up": Dual(clean_up), "fails": Dual(fail)}
    running = asyncio.create_task((Dual(_pass_on) | branches).ainvoke(1))
    await cleans_up.wait()
    running.cancel()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_dict_without_a_branch_gives_an_empty_dict() -> None:
    """There is nothing to wait for."""
    nothing: Any = {}
    pipe: Any = Dual(_pass_on) | nothing

    assert await pipe.ainvoke(1) == pipe.invoke(1) == {}


async def test_a_dict_without_a_branch_takes_many_inputs() -> None:
    """It has no limit, on either path, rather than one of no calls at once."""
    nothing: Any = {}
    empty = (Dual(_double, _adouble) | nothing).steps[-1]

    async with asyncio.timeout(SAFETY_NET):
        assert await empty.abatch([1, 2]) == empty.batch([1, 2]) == [{}, {}]


def _add_one(number: int) -> int:
    return number + 1


class _Noting(Dual[Any, Any]):
    """A pair that notes each run; it is a class of a user's own."""

    def __init__(self, fn: Callable[..., Any], afn: Callable[..., Any]) -> None:
        super().__init__(fn, afn)
        self.noted: list[Any] = []

    def invoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        self.noted.append(("invoke", input, kwargs))
        return super().invoke(input, config, **kwargs)

    async def ainvoke(self, input: Any, config: RunnableConfig | None = None, **kwargs: Any) -> Any:
        self.noted.append(("ainvoke", input, kwargs))
        return await super().ainvoke(input, config, **kwargs)


def test_a_pipe_a_dict_and_a_batch_run_what_a_subclass_makes_of_invoke() -> None:
    """An `invoke` of its own is called wherever LangChain would call it."""
    pair = _Noting(_scale, _ascale)
    pipe: Any = pair | {"a": pair} | Dual(_total, _atotal)

    assert pipe.invoke(1, by=3) == 3
    assert pair.batch([4]) == [4]
    assert pair.noted == [("invoke", 1, {"by": 3}), ("invoke", 3, {}), ("invoke", 4, {})]


async def test_a_pipe_a_dict_and_a_batch_run_what_a_subclass_makes_of_ainvoke() -> None:
    """The async twin."""
    pair = _Noting(_scale, _ascale)
    pipe: Any = pair | {"a": pair} | Dual(_total, _atotal)

    assert await pipe.ainvoke(1, by=3) == 3
    assert await pair.abatch([4]) == [4]
    assert pair.noted == [("ainvoke", 1, {"by": 3}), ("ainvoke", 3, {}), ("ainvoke", 4, {})]


def test_what_is_written_out_becomes_one_of_pairs_behind_a_pair() -> None:
    """It is the `|` of a pair that makes a pipe decide once; in front of a pair the `|` is LangChain's."""
    pair: Any = Dual(_add_one)
    pipe, fan = type(pair | pair), type((pair | {"a": pair}).last)
    behind: Any = pair | RunnableSequence(pair, pair) | RunnableParallel(a=pair)

    assert (type(behind), type(behind.last)) == (pipe, fan)
    assert type({"a": pair} | pair) is type(pair.pipe(pair)) is pipe
    assert type(RunnableParallel(a=pair) | pair) is type(RunnableSequence(pair, pair) | pair) is RunnableSequence
    assert type(pair | _add_one) is type(pair | {"a": pair, "b": _add_one}) is RunnableSequence
