"""The contract of `RunnableLambda`: a pair keeps each line of it, observed or not, on both paths.

Where pair and lambda agree, a test runs for both kinds, so that it holds LangChain to the contract as well.
"""

import asyncio
import functools
import pickle
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar
from typing import Any, cast

import pytest
from langchain_core.callbacks import (
    AsyncCallbackManager,
    AsyncCallbackManagerForChainRun,
    BaseCallbackHandler,
    CallbackManager,
    CallbackManagerForChainRun,
    adispatch_custom_event,
    dispatch_custom_event,
)
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableParallel, ensure_config
from langchain_core.runnables.base import RunnableGenerator
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tools import tool
from pydantic import BaseModel

from asyncify import Dual, Limiter, concurrency

Make = Callable[..., Runnable[Any, Any]]
Run = Callable[..., Any]

make_pair = cast("Make", Dual)
make_lambda = cast("Make", RunnableLambda)

color: ContextVar[str] = ContextVar("color", default="none")


@pytest.fixture(params=[Dual, RunnableLambda], ids=["pair", "lambda"])
def make(request: pytest.FixtureRequest) -> Make:
    """Make a runnable, ours or theirs."""
    return cast("Make", request.param)


@pytest.fixture(params=["unobserved", "observed"])
def watchers(request: pytest.FixtureRequest) -> list[BaseCallbackHandler]:
    """Return the handlers of a run: none, or one."""
    return [BaseCallbackHandler()] if request.param == "observed" else []


@pytest.fixture
def watched(watchers: list[BaseCallbackHandler]) -> RunnableConfig:
    """Return a config with the watchers in it."""
    return {"callbacks": watchers} if watchers else {}


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest, watched: RunnableConfig) -> Run:
    """Run a runnable to its end on one of the paths."""

    def invoke(runnable: Runnable[Any, Any], value: Any, config: Any = None, **kwargs: Any) -> Any:
        return runnable.invoke(value, {**watched, **(config or {})}, **kwargs)

    def ainvoke(runnable: Runnable[Any, Any], value: Any, config: Any = None, **kwargs: Any) -> Any:
        return asyncio.run(runnable.ainvoke(value, {**watched, **(config or {})}, **kwargs))

    return invoke if request.param == "sync" else ainvoke


def both(sync: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return a function with an async twin of it that does the same."""

    @functools.wraps(sync)
    async def async_(*args: Any, **kwargs: Any) -> Any:
        return sync(*args, **kwargs)

    return sync, async_


def double(x: int) -> int:
    """Return twice the number."""
    return 2 * x


async def adouble(x: int) -> int:
    """Return twice the number."""
    return 2 * x


# Dispatch


async def achunks(x: int) -> AsyncIterator[int]:
    """Yield the number, twice."""
    yield x
    yield x


class AsyncCallable:
    async def __call__(self, x: int) -> int:
        return 2 * x


@pytest.mark.parametrize(
    "fn",
    [adouble, achunks, functools.partial(adouble), functools.partial(achunks), AsyncCallable()],
    ids=["coroutine function", "async generator", "partial", "partial of a generator", "callable object"],
)
def test_an_async_function_given_alone_is_the_async_side(
    make: Make, watched: RunnableConfig, fn: Callable[..., Any]
) -> None:
    """What returns an awaitable or an async generator is recognised as async; a pair runs it on both paths."""
    runnable = make(fn)

    assert not hasattr(runnable, "func")
    assert asyncio.run(runnable.ainvoke(2, watched)) == 4
    assert make_pair(fn).invoke(2, watched) == 4


async def test_a_sync_function_that_returns_a_coroutine_is_awaited(watched: RunnableConfig) -> None:
    """A pair awaits it; a lambda hands the coroutine back."""
    pair, upstream = make_pair(lambda x: adouble(x)), make_lambda(lambda x: adouble(x))  # noqa: PLW0108

    assert await pair.ainvoke(2, watched) == 4
    coroutine = await upstream.ainvoke(2, watched)
    assert asyncio.iscoroutine(coroutine)
    coroutine.close()


async def test_a_sync_function_that_returns_a_coroutine_returns_it_on_the_sync_path(
    make: Make, watched: RunnableConfig
) -> None:
    """Nothing awaits there, so `invoke` gives what the function gave."""
    coroutine = make(lambda x: adouble(x)).invoke(2, watched)  # noqa: PLW0108

    assert await coroutine == 4


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["to its end", "cancelled"])
async def test_a_coroutine_from_a_sync_function_keeps_the_slot(*, is_cancelled: bool) -> None:
    """The call has ended, and its slot is free, when the coroutine has ended and no earlier."""
    limiter = Limiter(limit=1)
    begun, go_on = asyncio.Event(), asyncio.Event()
    in_flight_at_end: list[int] = []

    async def work() -> None:
        begun.set()
        try:
            await go_on.wait()
        finally:
            in_flight_at_end.append(limiter.stats().in_flight)

    pair: Any = concurrency(limiter=limiter)(lambda _: work())
    call = asyncio.create_task(pair.ainvoke(0))
    await begun.wait()
    if is_cancelled:
        call.cancel()
    go_on.set()
    await asyncio.wait([call])

    assert call.cancelled() == is_cancelled
    assert in_flight_at_end == [1]
    assert limiter.stats().in_flight == 0


@pytest.mark.parametrize("how", ["invoke", "batch", "stream"])
def test_an_async_function_alone_runs_sync(how: str, watched: RunnableConfig) -> None:
    """A pair runs it on the background loop; a lambda raises TypeError."""
    ways: dict[str, Callable[[Runnable[Any, Any]], Any]] = {
        "invoke": lambda runnable: runnable.invoke(2, watched),
        "batch": lambda runnable: runnable.batch([2], watched)[0],
        "stream": lambda runnable: next(runnable.stream(2, watched)),
    }

    assert ways[how](make_pair(adouble)) == 4
    with pytest.raises(TypeError):
        ways[how](make_lambda(adouble))


async def test_a_sync_function_alone_gets_the_context_in_its_thread(make: Make, watched: RunnableConfig) -> None:
    """The thread of a bridged call sees the context variables of the caller."""
    color.set("red")

    assert await make(lambda _: (color.get(), threading.current_thread() is threading.main_thread())).ainvoke(
        0, watched
    ) == ("red", False)


async def test_cancelling_does_not_stop_the_thread(make: Make, watched: RunnableConfig) -> None:
    """The function of a cancelled call runs to its end in its thread."""
    started, go_on, ended = threading.Event(), threading.Event(), threading.Event()

    def work(_: int) -> None:
        started.set()
        go_on.wait(30)
        ended.set()

    call = asyncio.create_task(make(work).ainvoke(0, watched))
    await asyncio.to_thread(started.wait, 30)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    go_on.set()

    assert await asyncio.to_thread(ended.wait, 30)


def stop(_: int) -> None:
    """Raise what ends an iteration."""
    raise StopIteration


async def astop(_: int) -> None:
    """Raise what ends an iteration."""
    raise StopIteration


def test_stop_iteration_passes_through_invoke(make: Make, watched: RunnableConfig) -> None:
    """The sync path raises it as it is."""
    with pytest.raises(StopIteration):
        make(stop, astop).invoke(0, watched)


@pytest.mark.parametrize("sides", [(stop, astop), (stop,)], ids=["coroutine", "thread"])
async def test_stop_iteration_becomes_a_runtime_error(
    make: Make, watched: RunnableConfig, sides: tuple[Callable[..., Any], ...]
) -> None:
    """Neither a coroutine nor a future can raise it."""
    with pytest.raises(RuntimeError):
        await make(*sides).ainvoke(0, watched)


def test_stop_iteration_passes_out_of_a_dict(make: Make, watched: RunnableConfig) -> None:
    """The threads of a dict hand it on, to the sync path, as it is."""
    with pytest.raises(StopIteration):
        ({"a": make(stop, astop)} | make(double)).invoke(0, watched)


# Injection


def test_config_is_injected_by_name(make: Make, run: Run) -> None:
    """A parameter called `config` gets the child config, which is the ambient one, with managers of its own."""
    seen: list[Any] = []

    def fn(_: int, config: RunnableConfig) -> None:
        seen.extend((config, var_child_runnable_config.get()))

    run(make(*both(fn)), 0, {"tags": ["t"], "metadata": {"m": 1}, "configurable": {"c": 2}, "max_concurrency": 7})
    injected, ambient = seen
    without_callbacks = {
        "tags": ["t"],
        "metadata": {"m": 1},
        "configurable": {"c": 2},
        "max_concurrency": 7,
        "recursion_limit": 25,
    }

    for config in (injected, ambient):
        assert {key: value for key, value in config.items() if key != "callbacks"} == without_callbacks
        assert (config["callbacks"].inheritable_tags, config["callbacks"].tags) == (["t"], ["t"])
        assert (config["callbacks"].inheritable_metadata, config["callbacks"].metadata) == ({"m": 1}, {"m": 1})
    assert injected["callbacks"].parent_run_id == ambient["callbacks"].parent_run_id
    assert injected["callbacks"] is not ambient["callbacks"]
    assert injected["tags"] is not ambient["tags"]


def test_nothing_is_injected_into_kwargs(make: Make, run: Run) -> None:
    """`**kwargs` gets neither config nor run manager."""
    assert run(make(*both(lambda _, **kwargs: kwargs)), 0, by=3) == {"by": 3}


@pytest.mark.parametrize("name", ["config", "run_manager"])
def test_an_injected_manager_has_the_colour_of_the_path(make: Make, watched: RunnableConfig, name: str) -> None:
    """A sync function gets sync managers and an async one async managers."""
    kinds: list[type] = []
    sides = {
        "config": (
            lambda _, config: kinds.append(type(config["callbacks"])),
            CallbackManager,
            AsyncCallbackManager,
        ),
        "run_manager": (
            lambda _, run_manager: kinds.append(type(run_manager)),
            CallbackManagerForChainRun,
            AsyncCallbackManagerForChainRun,
        ),
    }
    fn, sync_kind, async_kind = sides[name]
    runnable = make(*both(fn))
    runnable.invoke(0, watched)
    asyncio.run(runnable.ainvoke(0, watched))

    assert issubclass(kinds[0], sync_kind)
    assert issubclass(kinds[1], async_kind)


@pytest.mark.parametrize("name", ["config", "run_manager"])
async def test_a_bridged_sync_function_gets_sync_managers(make: Make, watched: RunnableConfig, name: str) -> None:
    """A sync function can't await, so under `ainvoke` it gets the sync managers."""
    fns: dict[str, Callable[..., Any]] = {
        "config": lambda _, config: isinstance(config["callbacks"], CallbackManager),
        "run_manager": lambda _, run_manager: isinstance(run_manager, CallbackManagerForChainRun),
    }

    assert await make(fns[name]).ainvoke(0, watched)


@pytest.mark.parametrize("name", ["config", "run_manager"])
def test_a_bridged_async_function_gets_async_managers(watched: RunnableConfig, name: str) -> None:
    """An async function awaits what its manager does, so under `invoke` it gets the async ones; a lambda can't run."""

    async def with_config(_: int, config: RunnableConfig) -> bool:
        return isinstance(config.get("callbacks"), AsyncCallbackManager)

    async def with_run_manager(_: int, run_manager: AsyncCallbackManagerForChainRun) -> bool:
        return isinstance(run_manager, AsyncCallbackManagerForChainRun)

    assert make_pair(with_config if name == "config" else with_run_manager).invoke(0, watched)


def test_the_child_config_drops_what_belongs_to_the_run(make: Make, run: Run) -> None:
    """`run_name` and `run_id` are the run's own; a key that is unknown goes to `configurable`."""
    sides = both(lambda _, config: (config, var_child_runnable_config.get()))
    children = run(make(*sides), 0, {"run_name": "once", "run_id": uuid.uuid4(), "thread_id": "t1"})

    for child in children:
        assert "run_name" not in child
        assert "run_id" not in child
        assert child["configurable"] == {"thread_id": "t1"}


def test_the_child_config_names_a_parent(make: Make, run: Run) -> None:
    """The manager that is handed down always has a parent run, and the same one for all that ask."""
    parents: list[Any] = []

    def fn(_: int) -> None:
        parents.extend(ensure_config()["callbacks"].parent_run_id for _ in range(2))  # type: ignore[union-attr]

    run(make(*both(fn)), 0)

    assert isinstance(parents[0], uuid.UUID)
    assert parents[0] == parents[1]


def test_a_run_id_that_is_given_names_the_parent(make: Make, run: Run) -> None:
    """What runs inside finds the id that the caller has given to the run, as its parent's."""
    run_id = uuid.uuid4()
    runnable = make(*both(lambda _, config: (config, ensure_config())))

    parents = [child["callbacks"].parent_run_id for child in run(runnable, 0, {"run_id": run_id})]
    assert parents == [run_id, run_id]


def test_a_run_id_is_that_of_a_pipe_and_a_dict_and_of_no_step(make: Make, run: Run) -> None:
    """The parent that a step hands down is a run of its own."""
    run_id = uuid.uuid4()
    step = make(*both(lambda x: [*x, cast("Any", ensure_config()["callbacks"]).parent_run_id]))
    merge = make(*both(lambda branches: [*branches["a"], *branches["b"]]))

    pipe: Any = step | {"a": step, "b": step} | merge

    of_pipe = run(pipe, [], {"run_id": run_id})
    of_dict = [parent for branch in run(pipe.middle[0], [], {"run_id": run_id}).values() for parent in branch]
    assert run_id not in {*of_pipe, *of_dict}
    assert (len(set(of_pipe)), len(set(of_dict))) == (3, 2)


def test_the_ambient_manager_has_the_colour_of_the_path(make: Make, watched: RunnableConfig) -> None:
    """What runs inside inherits managers that it can call."""
    runnable = make(*both(lambda _: type(ensure_config()["callbacks"])))

    assert issubclass(runnable.invoke(0, watched), CallbackManager)
    assert issubclass(asyncio.run(runnable.ainvoke(0, watched)), AsyncCallbackManager)


def test_tags_of_a_manager_that_is_given_are_handed_down(
    make: Make, run: Run, watchers: list[BaseCallbackHandler]
) -> None:
    """A config may come with a manager, whose tags and metadata what runs inside inherits."""
    given = CallbackManager(watchers, watchers, inheritable_tags=["t"], inheritable_metadata={"m": 1})
    runnable = make(*both(lambda _, config: config["callbacks"]))

    handed_down = run(runnable, 0, {"callbacks": given})
    assert handed_down.inheritable_tags == ["t"]
    assert handed_down.inheritable_metadata == {"m": 1}


def test_what_a_function_adds_to_its_manager_stays_there(make: Make, run: Run) -> None:
    """The ambient manager, which a call inside inherits, is another."""

    def fn(_: int, config: Any) -> Any:
        config["callbacks"].add_tags(["added"])
        config["callbacks"].add_metadata({"added": 1})
        return ensure_config()["callbacks"]

    ambient = run(make(*both(fn)), 0, {"tags": ["t"], "metadata": {"m": 1}})
    assert (ambient.tags, ambient.metadata) == (["t"], {"m": 1})


def test_each_run_is_a_parent_of_its_own(make: Make, run: Run) -> None:
    """Two runs hand down two parents."""
    runnable = make(*both(lambda _, config: config["callbacks"].parent_run_id))

    assert run(runnable, 0) != run(runnable, 0)


def test_a_custom_event_needs_no_handler(make: Make, watched: RunnableConfig) -> None:
    """`dispatch_custom_event` finds its parent run, whether anybody listens or not."""
    runnable = make(lambda _: dispatch_custom_event("event", {"n": 1}))

    assert runnable.invoke(0, watched) is None


async def test_a_custom_event_needs_no_handler_async(make: Make, watched: RunnableConfig) -> None:
    """The async twin."""

    async def dispatch(_: int) -> None:
        await adispatch_custom_event("event", {"n": 1})

    assert await make(dispatch).ainvoke(0, watched) is None


def test_config_is_merged_into_that_around_it(make: Make, run: Run) -> None:
    """A nested call inherits the tags, metadata and configurable of the call around it, and adds its own."""
    inner = make(*both(lambda _, config: (config["callbacks"].tags, config["metadata"], config["configurable"])))

    def outer(_: int) -> Any:
        return inner.invoke(0, {"metadata": {"inner": 1}})

    async def aouter(_: int) -> Any:
        return await inner.ainvoke(0, {"metadata": {"inner": 1}})

    tags, metadata, configurable = run(
        make(outer, aouter), 0, {"tags": ["t"], "metadata": {"outer": 1}, "configurable": {"c": 1}}
    )

    assert tags == ["t"]
    assert metadata == {"inner": 1}
    assert configurable == {"c": 1}


def test_arguments_go_to_the_function(make: Make, run: Run) -> None:
    """Keyword arguments of a call reach the function."""
    assert run(make(*both(lambda x, by: by * x)), 2, by=3) == 6


def test_a_sequence_gives_arguments_to_its_first_step(make: Make, run: Run) -> None:
    """The steps behind the first get none."""
    pipe = make(*both(lambda x, **kwargs: [x, kwargs])) | make(*both(lambda x, **kwargs: [x, kwargs]))

    assert run(pipe, 1, by=3) == [[1, {"by": 3}], {}]


def test_a_dict_drops_arguments(make: Make, run: Run) -> None:
    """No branch of a dict gets the keyword arguments of the call."""
    branch = make(*both(lambda x, **kwargs: [x, kwargs]))
    pipe = {"a": branch, "b": branch} | make(*both(lambda x: x))

    assert run(pipe, 1, by=3) == {"a": [1, {}], "b": [1, {}]}


def outcome(call: Callable[[], Any]) -> Any:
    """Return what a call gives: its result, or the kind of its error."""
    try:
        return call()
    except Exception as error:  # noqa: BLE001  (which it is, is what is compared)
        return type(error)


RESERVED = ["defers_inputs", "func", "input", "input_", "run_manager", "run_type", "serialized", "value"]


def _alone(make: Make) -> Runnable[Any, Any]:
    return make(*both(lambda _, **kwargs: kwargs))


def _in_front_of_a_pipe(make: Make) -> Runnable[Any, Any]:
    return _alone(make) | make(*both(lambda x: x))


WAYS = [
    pytest.param(how, shape, name, id=f"{how}-{name}-{shape.__name__}")
    for how in ("invoke", "batch", "stream")
    for shape in (_alone, _in_front_of_a_pipe)
    for name in RESERVED
    if (how, name) != ("stream", "func")  # a lambda raises TypeError, a pair streams
]


@pytest.mark.parametrize(("how", "shape", "name"), WAYS)
def test_a_reserved_argument_does_what_it_does_upstream(
    watched: RunnableConfig, how: str, shape: Callable[[Make], Runnable[Any, Any]], name: str
) -> None:
    """Names that LangChain takes for itself are dangerous in the same way, observed or not."""
    given: dict[str, Any] = {name: "x"}
    ways: dict[str, Callable[[Runnable[Any, Any]], Any]] = {
        "invoke": lambda runnable: runnable.invoke(1, watched, **given),
        "batch": lambda runnable: runnable.batch([1], watched, **given),
        "stream": lambda runnable: list(runnable.stream(1, watched, **given)),
    }

    assert outcome(lambda: ways[how](shape(make_pair))) == outcome(lambda: ways[how](shape(make_lambda)))


@pytest.mark.parametrize(("how", "shape", "name"), WAYS)
def test_a_reserved_argument_does_what_it_does_upstream_async(
    watched: RunnableConfig, how: str, shape: Callable[[Make], Runnable[Any, Any]], name: str
) -> None:
    """The async twin."""
    given: dict[str, Any] = {name: "x"}

    async def stream(runnable: Runnable[Any, Any]) -> list[Any]:
        return [chunk async for chunk in runnable.astream(1, watched, **given)]

    ways: dict[str, Callable[[Runnable[Any, Any]], Any]] = {
        "invoke": lambda runnable: runnable.ainvoke(1, watched, **given),
        "batch": lambda runnable: runnable.abatch([1], watched, **given),
        "stream": stream,
    }

    async def run(make: Make) -> Any:
        return await ways[how](shape(make))

    assert outcome(lambda: asyncio.run(run(make_pair))) == outcome(lambda: asyncio.run(run(make_lambda)))


def _parent_of(_: Any, run_manager: Any) -> bool:
    return run_manager is not None


async def _aparent_of(_: Any, run_manager: Any) -> bool:
    return run_manager is not None


def _shapes(make: Make, *sides: Callable[..., Any]) -> list[Runnable[Any, Any]]:
    """Return a runnable of these sides alone, behind another, in a dict, and in a pipe in a dict."""
    runnable, same = make(*sides), make(*both(lambda x: x))
    return [
        runnable,
        same | runnable,
        same | {"a": runnable} | make(*both(lambda x: x["a"])),
        same | {"a": same | runnable} | make(*both(lambda x: x["a"])),
    ]


@pytest.mark.parametrize("index", range(4), ids=["alone", "pipe", "dict", "pipe in a dict"])
def test_only_the_side_that_runs_needs_a_run_manager(make: Make, watched: RunnableConfig, index: int) -> None:
    """A side gets a run manager if it asks for one, whatever the other side does."""
    only_sync = _shapes(make, _parent_of, adouble)[index]
    only_async = _shapes(make, double, _aparent_of)[index]

    assert only_sync.invoke(1, watched) is True
    assert asyncio.run(only_sync.ainvoke(1, watched)) == 2
    assert only_async.invoke(1, watched) == 2
    assert asyncio.run(only_async.ainvoke(1, watched)) is True


# Returned runnables


def test_a_returned_runnable_is_run_on_the_input(make: Make, run: Run) -> None:
    """A function may return the runnable to use; it gets the input and a recursion limit that is one lower."""
    inner = make(*both(lambda x, config: (x, config["recursion_limit"])))

    assert run(make(*both(lambda _: inner)), 5, {"recursion_limit": 9}) == (5, 8)


def test_a_runnable_that_returns_itself_hits_the_recursion_limit(make: Make, run: Run) -> None:
    """At a limit of 0 a returned runnable is not run any more."""
    calls: list[int] = []

    def fn(x: int) -> Any:
        calls.append(x)
        return again[0]

    again = [make(*both(fn))]

    with pytest.raises(RecursionError, match="Recursion limit reached when invoking"):
        run(again[0], 1, {"recursion_limit": 3})
    assert len(calls) == 4


def _limit_seen(_: int, config: RunnableConfig) -> int:
    return config.get("recursion_limit", -1)


async def _alimit_seen(_: int, config: RunnableConfig) -> int:
    return config.get("recursion_limit", -1)


def test_a_returned_runnable_is_streamed(make: Make, watched: RunnableConfig) -> None:
    """On `stream` it gets a recursion limit that is one lower, and is not run at 0."""
    runnable = make(lambda _: make(_limit_seen, _alimit_seen))

    assert list(runnable.stream(5, {**watched, "recursion_limit": 9})) == [8]
    with pytest.raises(RecursionError, match="Recursion limit reached when invoking"):
        list(runnable.stream(5, {**watched, "recursion_limit": 0}))


async def test_a_returned_runnable_is_streamed_async(make: Make, watched: RunnableConfig) -> None:
    """The async twin."""
    runnable = make(*both(lambda _: make(_limit_seen, _alimit_seen)))

    assert [chunk async for chunk in runnable.astream(5, {**watched, "recursion_limit": 9})] == [8]
    with pytest.raises(RecursionError, match="Recursion limit reached when invoking"):
        _ = [chunk async for chunk in runnable.astream(5, {**watched, "recursion_limit": 0})]


def test_plain_nested_calls_do_not_count(make: Make, run: Run) -> None:
    """A call made inside the function is no recursion."""
    inner = make(*both(lambda _, config: config["recursion_limit"]))

    async def ainner(_: int) -> Any:
        return await inner.ainvoke(0)

    assert run(make(lambda _: inner.invoke(0), ainner), 0, {"recursion_limit": 0}) == 0


# Context


def test_a_context_variable_does_not_leak_to_the_caller(make: Make, watched: RunnableConfig) -> None:
    """What a function writes is gone when it has ended."""
    make(lambda _: color.set("blue")).invoke(0, watched)

    assert color.get() == "none"


async def test_a_context_variable_does_not_leak_to_the_caller_async(make: Make, watched: RunnableConfig) -> None:
    """The async twin, for a coroutine and for a thread."""
    await make(*both(lambda _: color.set("blue"))).ainvoke(0, watched)
    await make(lambda _: color.set("blue")).ainvoke(0, watched)

    assert color.get() == "none"


def _write_blue(_: int) -> None:
    color.set("blue")


def test_a_context_variable_does_not_leak_to_the_next_step(make: Make, run: Run) -> None:
    """Each step of a pipe, and each branch of a dict, starts from the caller's context."""
    write = make(*both(_write_blue))
    read = make(*both(lambda _: color.get()))

    assert run(write | read, 0) == "none"
    assert run(write | {"a": write, "b": read}, 0) == {"a": None, "b": "none"}


def test_a_function_sees_the_context_of_its_caller(make: Make, run: Run) -> None:
    """The copy is made when the call is."""
    token = color.set("green")
    try:
        assert run(make(*both(lambda _: color.get())), 0) == "green"
    finally:
        color.reset(token)


def test_the_ambient_config_is_gone_after_a_run(make: Make, watched: RunnableConfig) -> None:
    """The child config is the ambient one inside the function alone."""
    make(lambda _: None).invoke(0, watched)

    assert var_child_runnable_config.get() is None


async def test_ainvoke_runs_in_a_task_of_its_own(make: Make, watched: RunnableConfig) -> None:
    """The function's task is not the caller's."""
    tasks: list[Any] = []
    await make(*both(lambda _: tasks.append(asyncio.current_task()))).ainvoke(0, watched)

    assert tasks[0] is not asyncio.current_task()


async def test_ainvoke_yields_to_the_loop(make: Make, watched: RunnableConfig) -> None:
    """Even a function that never suspends lets others run."""
    ran: list[str] = []
    asyncio.get_running_loop().call_soon(ran.append, "another")
    await make(double, adouble).ainvoke(0, watched)

    assert ran == ["another"]


async def test_ainvoke_passes_cancellation_on(make: Make, watched: RunnableConfig) -> None:
    """The function of a cancelled call is cancelled where it waits."""
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def wait(_: int) -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    call = asyncio.create_task(make(wait).ainvoke(0, watched))
    await started.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call

    assert cancelled.is_set()


async def test_ainvoke_recurses_deeply(make: Make, watched: RunnableConfig) -> None:
    """A call may nest 400 deep, for each runs on a stack of its own."""
    runnables: list[Runnable[Any, Any]] = []

    async def count(n: int) -> int:
        return 1 + await runnables[0].ainvoke(n - 1) if n else 0

    runnables.append(make(count))

    assert await runnables[0].ainvoke(400, watched) == 400


# Generators


class Greedy:
    """What adds itself to anything."""

    def __radd__(self, other: object) -> str:
        return f"{other} and more"


GREEDY = Greedy()


@pytest.mark.parametrize(
    ("chunks", "folded"),
    [(["a", "b", "c"], "abc"), ([{"a": 1}, {"b": 2}], {"b": 2}), ([1, 2, 3], 6), ([], None), ([GREEDY], GREEDY)],
    ids=["strings add up", "the last dict wins", "numbers add up", "nothing", "one alone is added to nothing"],
)
def test_the_chunks_of_a_generator_fold(make: Make, run: Run, chunks: list[Any], folded: Any) -> None:
    """Chunks are added up by `+`, or else the last one wins."""

    def generate(_: int) -> Iterator[Any]:
        yield from chunks

    async def agenerate(_: int) -> AsyncIterator[Any]:
        for chunk in chunks:
            yield chunk

    assert run(make(generate, agenerate), 0) == folded


def test_a_generator_function_in_a_pipe_becomes_a_runnable_generator(make: Make) -> None:
    """It gets the iterator of the chunks in front of it, and a runnable of it gets a value."""

    def echo(given: Any) -> Iterator[str]:
        yield type(given).__name__

    piped: Any = make(double, adouble) | cast("Any", echo)

    assert isinstance(piped.last, RunnableGenerator)
    assert piped.invoke(1) != "int"
    assert make(echo).invoke(1) == "int"


# Names, identity, schemas


def test_the_name_is_the_functions(make: Make) -> None:
    """A function gives its name, a given name comes first, and what has none is called by its class."""
    assert make(double, adouble).get_name() == "double"
    assert make(adouble).get_name() == "adouble"
    assert make(double, adouble, "mine").get_name() == "mine"
    assert make(lambda x: x).get_name() == make.__name__
    assert make(functools.partial(double)).get_name() == make.__name__


def test_equality_is_that_of_the_sync_sides(make: Make) -> None:
    """Two runnables of one function are equal, whatever their async sides; without one those decide."""
    assert make(double) == make(double, adouble)
    assert make(adouble) == make(adouble)
    assert make(double) != make(adouble)
    assert make(double) != cast("object", double)


def test_a_pair_is_hashable() -> None:
    """Equal pairs have one hash, and so do pairs of what has none; a lambda has no hash at all."""

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: int) -> int:
            return x

    fn = Unhashable()

    assert hash(make_pair(double)) == hash(make_pair(double, adouble))
    assert isinstance(hash(make_pair(fn)), int)
    with pytest.raises(TypeError):
        hash(make_lambda(double))


def test_a_runnable_of_module_functions_pickles(make: Make) -> None:
    """Its functions are found by their names."""
    copy = pickle.loads(pickle.dumps(make(double, adouble)))  # noqa: S301

    assert copy.invoke(2) == 4
    assert asyncio.run(copy.ainvoke(2)) == 4


inner_runnable = RunnableLambda(double)


def uses_a_runnable(x: int) -> int:
    """Call a runnable that stands in the module."""
    return inner_runnable.invoke(x)


def test_deps_are_the_runnables_that_a_function_uses(make: Make) -> None:
    """They are read from its source."""
    assert cast("Any", make(uses_a_runnable)).deps == [inner_runnable]


def test_a_callable_without_a_hash_has_no_deps() -> None:
    """A pair of one can be asked for its graph and its schemas; a lambda raises TypeError."""

    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, x: int) -> int:
            return x

    pair: Any = make_pair(Unhashable())

    assert (pair.deps, pair.config_specs) == ([], [])
    with pytest.raises(TypeError):
        _ = cast("Any", make_lambda(Unhashable())).deps


class Question(BaseModel):
    text: str


class Answer(BaseModel):
    text: str


def reply(question: Question) -> "Answer":
    """Answer a question; one annotation is a string."""
    return Answer(text=question.text)


async def areply(question: Question) -> "Answer":
    """Answer a question."""
    return Answer(text=question.text)


def test_schemas_come_from_the_signature(make: Make) -> None:
    """A string annotation is resolved in the function's module."""
    ours, theirs = make(reply, areply), make_lambda(reply, areply)

    assert ours.get_input_jsonschema() == theirs.get_input_jsonschema()
    assert ours.get_input_jsonschema()["properties"]["text"]["type"] == "string"


def test_the_schema_of_an_output_is_that_of_its_class() -> None:
    """Of a string annotation too, which a lambda's schema wraps in another."""

    def unquoted(question: Question) -> Answer:
        return reply(question)

    schema = make_lambda(unquoted).get_output_jsonschema()

    assert make_pair(reply, areply).get_output_jsonschema() == schema
    assert make_lambda(reply, areply).get_output_jsonschema()["$defs"] == {"Answer": schema}


def test_a_lambda_around_a_pair_loses_the_async_side() -> None:
    """A pair is callable, so `RunnableLambda(pair)` takes it for a sync function: pipe the pair itself."""
    pair = make_pair(double, adouble)

    assert hasattr(make_lambda(pair), "func")
    assert not hasattr(make_lambda(pair), "afunc")


def shout(words: Any) -> str:
    """Say it loudly; the key that is read becomes the tool's argument."""
    text: str = words["text"]
    return text.upper()


async def ashout(words: Any) -> str:
    """Say it loudly."""
    text: str = words["text"]
    return text.upper()


def test_tool_takes_a_pair_as_a_runnable() -> None:
    """`tool` wants a name beside a runnable; the tool has both paths then."""
    made = tool("shout", make_pair(shout, ashout), description="Say it loudly.")

    assert made.invoke({"text": "hi"}) == "HI"
    assert asyncio.run(made.ainvoke({"text": "hi"})) == "HI"


# Calls without a run


async def test_acall_runs_in_the_callers_task() -> None:
    """`acall` is the plain function within its limit: no task, no context of its own."""
    pair: Any = Dual(*both(lambda: (asyncio.current_task(), color.set("mine"))))
    task, _ = await pair.acall()

    assert task is asyncio.current_task()
    assert color.get() == "mine"


def test_call_runs_in_the_callers_context() -> None:
    """The sync twin, with any number of arguments."""
    pair: Any = Dual(*both(lambda a, b=2, *, c=3: (a, b, c)))

    assert pair.call(1) == (1, 2, 3)
    assert asyncio.run(pair.acall(1, 5, c=6)) == (1, 5, 6)


def test_a_dict_of_pairs_obeys_max_concurrency() -> None:
    """On the sync path it bounds the threads of a dict, as upstream does."""
    inside, most, lock = [0], [0], threading.Lock()

    def work(_: int) -> None:
        with lock:
            inside[0] += 1
            most[0] = max(most[0], inside[0])
        threading.Event().wait(0.01)
        with lock:
            inside[0] -= 1

    branch = make_pair(work)
    pipe = {str(n): branch for n in range(4)} | make_pair(lambda x: x)
    pipe.invoke(0, {"max_concurrency": 1})

    assert most == [1]


def test_an_explicit_parallel_of_pairs_runs(run: Run) -> None:
    """A `RunnableParallel` that was written out gives what a dict gives."""
    branch = make_pair(double, adouble)

    assert run(RunnableParallel(a=branch, b=branch) | make_pair(*both(lambda x: x)), 2) == {"a": 4, "b": 4}
