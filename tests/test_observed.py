"""Whoever watches a run sees all of it: each way to watch, with a real watcher, against what it sees of lambdas."""

import asyncio
import builtins
import functools
import inspect
import os
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any, cast
from unittest import mock

import pytest
import wrapt
from langchain_core.callbacks import AsyncCallbackManager, BaseCallbackHandler, BaseCallbackManager, CallbackManager
from langchain_core.callbacks import manager as callback_managers
from langchain_core.globals import set_debug
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda, RunnableParallel, RunnableSequence
from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tracers.context import (
    _configure_hooks,
    collect_runs,
    register_configure_hook,
    tracing_v2_enabled,
)
from langsmith import utils as langsmith_utils
from langsmith.run_helpers import get_tracing_context, tracing_context
from langsmith.run_trees import RunTree

from asyncify import Dual
from asyncify import runs as asyncify_runs
from asyncify.runs import observed

Run = Callable[[Runnable[Any, Any]], Any]


def _double(x: int) -> int:
    return 2 * x


async def _adouble(x: int) -> int:
    return 2 * x


def _merge(parts: dict[str, int]) -> int:
    return sum(parts.values())


async def _amerge(parts: dict[str, int]) -> int:
    return sum(parts.values())


def _single(make: Any) -> Runnable[Any, Any]:
    return cast("Runnable[Any, Any]", make(_double, _adouble))


def _piped(make: Any) -> Runnable[Any, Any]:
    return cast("Runnable[Any, Any]", make(_double, _adouble) | make(_double, _adouble))


def _branched(make: Any) -> Runnable[Any, Any]:
    return cast("Runnable[Any, Any]", {"a": make(_double, _adouble)} | make(_merge, _amerge))


@pytest.fixture(params=[_single, _piped, _branched], ids=["pair", "pipe", "dict"])
def shape(request: pytest.FixtureRequest) -> Callable[[Any], Runnable[Any, Any]]:
    """Return how a runnable is composed of what makes its parts."""
    return cast("Callable[[Any], Runnable[Any, Any]]", request.param)


@pytest.fixture(params=["sync", "async"])
def run(request: pytest.FixtureRequest) -> Run:
    """Run a runnable on one of the paths."""
    if request.param == "sync":
        return lambda runnable: runnable.invoke(1)
    return lambda runnable: asyncio.run(runnable.ainvoke(1))


class Watcher(BaseCallbackHandler):
    """A handler that notes what it is told, and the run that is the parent of each."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self._names: dict[Any, str] = {}

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        self._names[run_id] = kwargs["name"]
        parent = self._names.get(parent_run_id)
        self.seen.append(("start", kwargs["name"], parent, inputs, kwargs["tags"], kwargs["metadata"]))

    def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.seen.append(("end", self._names[run_id], outputs))

    def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.seen.append(("error", self._names[run_id], repr(error)))


@contextmanager
def _by_ambient_config(watcher: Watcher) -> Iterator[None]:
    token = var_child_runnable_config.set({"callbacks": [watcher]})
    yield
    var_child_runnable_config.reset(token)


@contextmanager
def _by_ambient_manager(watcher: Watcher, **managed: Any) -> Iterator[None]:
    token = var_child_runnable_config.set({"callbacks": CallbackManager(**managed)})
    yield
    var_child_runnable_config.reset(token)


@contextmanager
def _by_hook(watcher: Watcher) -> Iterator[None]:
    variable: ContextVar[Any] = ContextVar("hook", default=None)
    register_configure_hook(variable, inheritable=True)
    token = variable.set(watcher)
    yield
    variable.reset(token)
    _configure_hooks.pop()


@contextmanager
def _by_hook_switched_on_by_the_environment(watcher: Watcher) -> Iterator[None]:
    variable: ContextVar[Any] = ContextVar("hook", default=None)

    class Switched(Watcher):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self._names = watcher.seen, watcher._names

    register_configure_hook(variable, inheritable=True, handle_class=Switched, env_var="A_HOOK")
    with mock.patch.dict(os.environ, {"A_HOOK": "true"}):
        yield
    _configure_hooks.pop()


def _constructor_that_adds(watcher: Watcher) -> Callable[..., None]:
    constructor = BaseCallbackManager.__init__

    @functools.wraps(constructor)
    def construct(self: BaseCallbackManager, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        self.add_handler(watcher, inherit=True)

    return construct


@contextmanager
def _by_instrumented_manager(watcher: Watcher) -> Iterator[None]:
    with mock.patch.object(BaseCallbackManager, "__init__", _constructor_that_adds(watcher)):
        yield


@contextmanager
def _by_wrapt(watcher: Watcher) -> Iterator[None]:
    def construct(wrapped: Any, instance: Any, args: Any, kwargs: Any) -> None:
        wrapped(*args, **kwargs)
        instance.add_handler(watcher, inherit=True)

    wrapper = wrapt.FunctionWrapper(BaseCallbackManager.__init__, construct)
    with mock.patch.object(BaseCallbackManager, "__init__", wrapper):
        yield


@contextmanager
def _by_wrapped_configuration(watcher: Watcher) -> Iterator[None]:
    configure = callback_managers._configure

    @functools.wraps(configure)
    def configured(*args: Any, **kwargs: Any) -> BaseCallbackManager:
        manager: BaseCallbackManager = configure(*args, **kwargs)
        manager.add_handler(watcher, inherit=True)
        return manager

    with mock.patch.object(callback_managers, "_configure", configured):
        yield


WAYS: dict[str, Callable[[Watcher], AbstractContextManager[None]]] = {
    "ambient handlers": _by_ambient_config,
    "ambient manager": lambda watcher: _by_ambient_manager(watcher, handlers=[watcher]),
    "ambient manager, inheritable": lambda watcher: _by_ambient_manager(
        watcher, handlers=[watcher], inheritable_handlers=[watcher]
    ),
    "hook": _by_hook,
    "hook by environment": _by_hook_switched_on_by_the_environment,
    "instrumented manager": _by_instrumented_manager,
    "manager instrumented by wrapt": _by_wrapt,
    "wrapped configuration of managers": _by_wrapped_configuration,
}


@pytest.mark.parametrize("way", WAYS)
def test_a_watcher_sees_what_it_sees_of_lambdas(way: str, shape: Callable[[Any], Runnable[Any, Any]], run: Run) -> None:
    """Starts, ends, names, tags and parents are those of a runnable of lambdas."""
    ours, theirs = Watcher(), Watcher()
    with WAYS[way](ours):
        run(shape(Dual))
    with WAYS[way](theirs):
        run(shape(functools.partial(_named_lambda)))

    assert ours.seen == theirs.seen
    assert ours.seen


def _named_lambda(fn: Any, afn: Any) -> Runnable[Any, Any]:
    return RunnableLambda(fn, afn)


@pytest.mark.parametrize("owner", [CallbackManager, AsyncCallbackManager])
def test_a_watcher_in_the_managers_of_one_path_sees_that_path(owner: Any) -> None:
    """The managers of the sync and the async path may be instrumented each by itself."""
    watcher = Watcher()
    with mock.patch.object(owner, "__init__", _constructor_that_adds(watcher)):
        _single(Dual).invoke(1)
        seen_of_sync = len(watcher.seen)
        asyncio.run(_single(Dual).ainvoke(1))
    seen_of_async = len(watcher.seen) - seen_of_sync

    assert (seen_of_sync, seen_of_async) == ((2, 0) if owner is CallbackManager else (0, 2))


@pytest.mark.parametrize("kind", ["list", "manager", "manager with inheritable handlers alone"])
def test_handlers_of_the_config_see_the_run(kind: str, run: Run, shape: Callable[[Any], Runnable[Any, Any]]) -> None:
    """A handler may come in a list or in a manager."""

    def seen(make: Any) -> list[Any]:
        watcher = Watcher()
        callbacks: Any = {
            "list": [watcher],
            "manager": CallbackManager([watcher], [watcher]),
            "manager with inheritable handlers alone": CallbackManager([], [watcher]),
        }[kind]
        run(shape(make).with_config(callbacks=callbacks))
        return watcher.seen

    assert seen(Dual) == seen(_named_lambda)


def test_a_config_without_handlers_outdoes_the_ambient_one(run: Run) -> None:
    """An empty list of callbacks is a choice: the ambient handler sees nothing, as upstream."""
    watcher = Watcher()
    with _by_ambient_config(watcher):
        _single(Dual).invoke(1, {"callbacks": []})
        asyncio.run(_single(Dual).ainvoke(1, {"callbacks": []}))
        _single(_named_lambda).invoke(1, {"callbacks": []})

    assert watcher.seen == []


def test_a_handler_that_a_function_adds_sees_what_is_inside(run: Run) -> None:
    """A function may add a handler to its own config, and the runs that it gives that config to are observed."""

    def seen(make: Any) -> list[Any]:
        watcher = Watcher()

        def outer(x: int, config: RunnableConfig) -> Any:
            cast("BaseCallbackManager", config.get("callbacks")).add_handler(watcher)
            return _single(make).invoke(x, config)

        async def aouter(x: int, config: RunnableConfig) -> Any:
            cast("BaseCallbackManager", config.get("callbacks")).add_handler(watcher)
            return await _single(make).ainvoke(x, config)

        run(cast("Any", make)(outer, aouter))
        return [event[:2] for event in watcher.seen]

    assert seen(Dual) == seen(_named_lambda) == [("start", "_double"), ("end", "_double")]


def test_debug_mode_prints_the_run(
    run: Run, shape: Callable[[Any], Runnable[Any, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """`set_debug(True)` prints the runs of pairs as it prints those of lambdas."""
    printed = []
    set_debug(True)
    try:
        for make in (Dual, _named_lambda):
            run(shape(make))
            printed.append([line for line in capsys.readouterr().out.splitlines() if "start" in line])
    finally:
        set_debug(False)

    assert printed[0] == printed[1] != []


class FakeClient:
    """What a LangSmith client is to its tracer, without a network."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.tracing_queue = None

    def create_run(self, **run: Any) -> None:
        self.started.append(run["name"])

    def update_run(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def fresh_reader() -> Iterator[None]:
    """Have LangSmith forget what it has read of the environment, before and after."""
    cast("Any", langsmith_utils.get_env_var).cache_clear()
    yield
    cast("Any", langsmith_utils.get_env_var).cache_clear()


@pytest.fixture
def langsmith_context() -> Any:
    """Return the module in which LangSmith keeps its variables; its older versions have none."""
    return pytest.importorskip("langsmith._internal._context")


@pytest.fixture
def client() -> Iterator[FakeClient]:
    """Stand in for the LangSmith client of this process."""
    fake = FakeClient()
    with mock.patch("langchain_core.tracers.langchain.get_client", return_value=fake):
        yield fake


def _sees_both_alike(client: FakeClient, run: Run, shape: Callable[[Any], Runnable[Any, Any]]) -> bool:
    """Tell whether LangSmith gets the same runs of pairs and of lambdas, and any at all."""
    run(shape(Dual))
    ours = client.started.copy()
    run(shape(_named_lambda))
    return bool(ours) and client.started == ours + ours


@pytest.mark.parametrize("variable", ["LANGSMITH_TRACING", "LANGSMITH_TRACING_V2", "LANGCHAIN_TRACING_V2"])
def test_langsmith_by_environment_sees_the_run(
    variable: str,
    client: FakeClient,
    run: Run,
    shape: Callable[[Any], Runnable[Any, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The variable that switches LangSmith on makes each run a trace."""
    monkeypatch.setenv(variable, "true")
    assert _sees_both_alike(client, run, shape)


def test_the_environment_is_read_when_langsmith_reads_it(
    client: FakeClient, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LangSmith remembers what it has read of the environment, and the fast path with it."""
    run(_single(Dual))
    monkeypatch.setenv("LANGSMITH_TRACING", "true")
    run(_single(Dual))

    assert client.started == []
    cast("Any", langsmith_utils.get_env_var).cache_clear()
    run(_single(Dual))
    assert client.started == ["_double"]


def test_what_langsmith_has_read_of_the_environment_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    """What LangSmith remembers decides, for it would trace nothing."""
    assert not cast("Any", langsmith_utils).tracing_is_enabled()
    monkeypatch.setenv("LANGSMITH_TRACING", "true")

    assert not observed(None)


def test_langsmith_by_context_sees_the_run(
    client: FakeClient, run: Run, shape: Callable[[Any], Runnable[Any, Any]]
) -> None:
    """`tracing_context(enabled=True)` makes each run a trace."""
    with tracing_context(enabled=True, client=cast("Any", client)):
        assert _sees_both_alike(client, run, shape)


def test_langsmith_configured_for_the_process_sees_the_run(
    client: FakeClient,
    run: Run,
    shape: Callable[[Any], Runnable[Any, Any]],
    langsmith_context: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The setting of `langsmith.configure(enabled=True)` makes each run a trace."""
    monkeypatch.setattr(langsmith_context, "_GLOBAL_TRACING_ENABLED", True)
    assert _sees_both_alike(client, run, shape)


def test_a_langsmith_parent_sees_the_run(
    client: FakeClient, run: Run, shape: Callable[[Any], Runnable[Any, Any]]
) -> None:
    """Inside a traced function a run is its child, without tracing being enabled in any other way."""
    parent = RunTree(name="parent", ls_client=client)
    with tracing_context(parent=parent):
        assert get_tracing_context()["enabled"] is None
        assert _sees_both_alike(client, run, shape)


def test_a_langsmith_parent_may_be_switched_off(client: FakeClient, run: Run) -> None:
    """With `enabled=False` nothing is traced, whatever the parent."""
    parent = RunTree(name="parent", ls_client=client)
    with tracing_context(parent=parent, enabled=False):
        run(_single(Dual))

    assert client.started == []


@pytest.mark.parametrize("kind", ["tags", "metadata"])
def test_ambient_langsmith_tags_and_metadata_make_a_run_observed(kind: str, run: Run) -> None:
    """They go to whatever tracer there is, and the tags to the child config."""
    ambient: dict[str, Any] = {"tags": ["t"]} if kind == "tags" else {"metadata": {"m": 1}}

    def seen(make: Any) -> Any:
        return run(make(_tags_of, _atags_of))

    with tracing_context(**ambient, enabled=False):
        assert seen(Dual) == seen(_named_lambda) == (["t"] if kind == "tags" else [])
        assert observed(None)


def _tags_of(_: int, config: RunnableConfig) -> list[str]:
    return cast("BaseCallbackManager", config.get("callbacks")).inheritable_tags


async def _atags_of(_: int, config: RunnableConfig) -> list[str]:
    return cast("BaseCallbackManager", config.get("callbacks")).inheritable_tags


def test_tracing_v2_enabled_sees_the_run(
    client: FakeClient, run: Run, shape: Callable[[Any], Runnable[Any, Any]]
) -> None:
    """The older context manager makes each run a trace."""
    with tracing_v2_enabled(client=cast("Any", client)):
        assert _sees_both_alike(client, run, shape)


@pytest.mark.parametrize("variable", ["LANGCHAIN_TRACING", "LANGCHAIN_HANDLER"])
def test_the_old_tracer_is_refused_as_upstream(variable: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variables of the first tracer raise the error that they raise for a lambda."""
    monkeypatch.setenv(variable, "yes")

    for make in (Dual, _named_lambda):
        with pytest.raises(RuntimeError, match="LangChainTracerV1 is no longer supported"):
            run(_single(make))


@pytest.mark.parametrize("value", ["", "0", "false"])
def test_a_variable_that_says_no_watches_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable counts as set where LangChain takes it for set."""
    monkeypatch.setenv("LANGCHAIN_TRACING", value)

    assert not observed(None)


def test_another_mapping_may_stand_for_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment is read where `os.environ` is a plain dict."""
    monkeypatch.setattr(os, "environ", {})
    assert not observed(None)

    monkeypatch.setattr(os, "environ", {"LANGCHAIN_TRACING": "yes"})
    assert observed(None)


def test_collect_runs_sees_the_run(run: Run, shape: Callable[[Any], Runnable[Any, Any]]) -> None:
    """It collects the run of a pair as that of a lambda, with the runs inside it."""

    def collected(make: Any) -> list[Any]:
        with collect_runs() as runs:
            run(shape(make))
        return [(root.name, root.outputs, len(root.child_runs)) for root in runs.traced_runs]

    assert collected(Dual) == collected(_named_lambda) != []


@pytest.mark.parametrize("name", ["invoke", "ainvoke"])
@pytest.mark.parametrize("owner", [RunnableLambda, RunnableSequence, RunnableParallel])
def test_a_wrapper_around_a_method_of_langchain_sees_the_run(
    owner: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some tracing products wrap `invoke` and `ainvoke` of LangChain's classes."""
    seen: list[str] = []
    method = getattr(owner, name)

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        seen.append(name)
        return method(*args, **kwargs)

    monkeypatch.setattr(owner, name, wrapper)
    runnable = {RunnableLambda: _single, RunnableSequence: _piped, RunnableParallel: _branched}[owner](Dual)
    if name == "invoke":
        runnable.invoke(1)
    else:
        asyncio.run(runnable.ainvoke(1))

    assert seen


def test_what_was_wrapped_before_is_seen_through() -> None:
    """A method that a product wrapped before this package was imported is known by what is inside; else it is none."""
    method: Any = RunnableLambda.invoke

    @functools.wraps(method)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return method(*args, **kwargs)

    known: list[Any] = [method, wrapper, wrapt.FunctionWrapper(method, lambda *_: None)]
    imitation = mock.Mock(__module__=method.__module__, spec=["__module__", "__call__"])
    unknown: list[Any] = [lambda *_: None, functools.partial(method), imitation]

    assert all(asyncify_runs._original(found) is method for found in known)
    assert all(asyncify_runs._original(found) is None for found in unknown)


@pytest.mark.parametrize("name", ["_invoke", "_ainvoke", "_transform", "_atransform"])
def test_what_langchain_calls_shows_its_signature(name: str) -> None:
    """LangChain gives a method the config and the run manager by what its signature says."""
    method = getattr(Dual(_double, _adouble), name)
    value, *injected = inspect.signature(method).parameters

    assert value in {"input_", "value", "chunks"}
    assert injected == ["run_manager", "config", "kwargs"]


def test_the_stream_of_events_sees_the_run(shape: Callable[[Any], Runnable[Any, Any]]) -> None:
    """`astream_events` shows the pairs inside as it shows lambdas."""

    async def events(make: Any) -> list[tuple[str, str]]:
        return [(event["event"], event["name"]) async for event in shape(make).astream_events(1, version="v2")]

    assert asyncio.run(events(Dual)) == asyncio.run(events(_named_lambda))


# Streams


class StreamWatcher(BaseCallbackHandler):
    """A handler that notes all that it is told of streams: what went in is known at their end."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.inputs_of_errors: list[Any] = []
        self._names: dict[Any, str] = {}

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        self._names[run_id] = kwargs["name"]
        known = run_id == GIVEN_RUN_ID
        about = (kwargs["name"], known, self._names.get(parent_run_id), kwargs["tags"], kwargs["metadata"])
        self.seen.append(("start", inputs, *about, serialized))

    def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.seen.append(("end", self._names[run_id], outputs, kwargs.get("inputs")))

    def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.seen.append(("error", self._names[run_id], repr(error)))
        self.inputs_of_errors.append(kwargs["inputs"])


GIVEN_RUN_ID = uuid.UUID(int=1)
CHUNKS = {"whole": ["a", "b"], "an error behind the first chunk": ["a", ValueError("b")]}


def _stepping(make: Any, chunks: list[Any]) -> Runnable[Any, Any]:
    """Return a runnable of generators, which call another runnable in front of each chunk."""
    inner = _single(make)

    def steps(x: int) -> Iterator[Any]:
        for chunk in chunks:
            inner.invoke(x)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    async def asteps(x: int) -> AsyncIterator[Any]:
        for chunk in chunks:
            await inner.ainvoke(x)
            if isinstance(chunk, Exception):
                raise chunk
            yield chunk

    return cast("Runnable[Any, Any]", make(steps, asteps))


def _streams(runnable: Runnable[Any, Any], config: RunnableConfig) -> list[Any]:
    """Return the chunks of the streams of one input and of two chunks of one, and the errors."""
    chunks: list[Any] = []
    for stream in (runnable.stream(2, config), runnable.transform(iter([1, 3]), config)):
        try:
            chunks.extend(stream)
        except ValueError as error:
            chunks.append(repr(error))
    return chunks


async def _astreams(runnable: Runnable[Any, Any], config: RunnableConfig) -> list[Any]:
    """Do the same on the async path."""

    async def parts() -> AsyncIterator[int]:
        yield 1
        yield 3

    chunks: list[Any] = []
    for stream in (runnable.astream(2, config), runnable.atransform(parts(), config)):
        try:
            async for chunk in stream:
                chunks.append(chunk)  # noqa: PERF401  (what came before an error is wanted)
        except ValueError as error:
            chunks.append(repr(error))
    return chunks


STREAM_CONFIGS: list[RunnableConfig] = [
    {},
    {"run_name": "named", "run_id": GIVEN_RUN_ID, "tags": ["t"], "metadata": {"m": 1}},
]


def _watched_streams(make: Any, path: str, chunks: list[Any], given: RunnableConfig) -> tuple[Any, StreamWatcher]:
    watcher, runnable = StreamWatcher(), _stepping(make, chunks)
    config: RunnableConfig = {**given, "callbacks": [watcher]}
    return _streams(runnable, config) if path == "sync" else asyncio.run(_astreams(runnable, config)), watcher


@pytest.mark.parametrize("given", STREAM_CONFIGS, ids=["no config", "a config"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("path", ["sync", "async"])
def test_a_watcher_of_a_stream_sees_what_it_sees_of_a_lambda(
    path: str, chunks: list[Any], given: RunnableConfig
) -> None:
    """Names, ids, tags, inputs, outputs, errors and the runs inside are the same."""
    (ours, of_ours), (theirs, of_theirs) = (
        _watched_streams(make, path, chunks, given) for make in (Dual, _named_lambda)
    )

    assert ours == theirs
    assert of_ours.seen == of_theirs.seen


@pytest.mark.parametrize("path", ["sync", "async"])
def test_the_error_of_a_stream_comes_with_its_input(path: str) -> None:
    """That of a lambda's comes with the first chunk of it, for LangChain adds up the rest behind the last output."""
    inputs = [
        _watched_streams(make, path, ["a", ValueError("b")], {})[1].inputs_of_errors for make in (Dual, _named_lambda)
    ]

    assert inputs == [[2, 4], [2, 1]]


def test_a_stream_inside_a_run_inherits_from_it(run: Run) -> None:
    """A function that streams gives the stream its tags and its watcher, without handing them on."""

    def seen(make: Any) -> list[Any]:
        watcher, inner = StreamWatcher(), _stepping(make, ["a"])

        def outer(_: int) -> list[Any]:
            return _streams(inner, {})

        async def aouter(_: int) -> list[Any]:
            return await _astreams(inner, {})

        run(cast("Any", make)(outer, aouter).with_config(tags=["t"], metadata={"m": 1}, callbacks=[watcher]))
        return watcher.seen

    assert seen(Dual) == seen(_named_lambda) != []


@pytest.mark.parametrize("path", ["sync", "async"])
def test_the_stream_of_events_shows_the_chunks_of_a_stream_inside(path: str) -> None:
    """A function that reads a stream, on either path, lets `astream_events` see its chunks."""

    async def events(make: Any) -> list[Any]:
        inner = _stepping(make, ["a", "b"])

        def outer(_: int) -> list[Any]:
            return _streams(inner, {})

        async def aouter(_: int) -> list[Any]:
            return await _astreams(inner, {})

        runnable = make(outer if path == "sync" else aouter)
        seen = [event async for event in runnable.astream_events(1, version="v2")]
        return [
            event["data"]["chunk"]
            for event in seen
            if event["name"] in {"steps", "asteps"} and "chunk" in event["data"]
        ]

    assert asyncio.run(events(Dual)) == asyncio.run(events(RunnableLambda)) == ["a", "b"] * 2


# What is unobserved


def test_without_a_watcher_a_run_is_unobserved() -> None:
    """Nothing is on by default, and a config without handlers changes nothing."""
    assert observed(None) is False
    assert observed({}) is False
    assert observed({"tags": ["t"], "callbacks": None}) is False
    assert observed({"callbacks": []}) is False
    assert observed({"callbacks": CallbackManager([])}) is False


@pytest.mark.parametrize(
    "unneeded",
    [
        "asyncify.runs.ensure_config",
        "asyncify.runs._has_handlers",
        "asyncify.runs.env_var_is_set",
        "asyncify.paths.is_reserved",
        "asyncify.pipes.is_reserved",
    ],
)
@pytest.mark.parametrize("runnable", [_single(Dual), _piped(Dual)], ids=["pair", "pipe"])
def test_a_run_without_config_and_arguments_looks_at_none(
    runnable: Runnable[Any, Any], unneeded: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast path merges no config, and asks for no handler, variable of the environment or name of an argument."""
    asked = mock.Mock()
    monkeypatch.setattr(unneeded, asked)

    run(runnable)
    asked.assert_not_called()


def test_what_has_been_found_once_is_not_looked_up_again() -> None:
    """The second decision imports nothing and encodes no name of a variable."""
    observed(None)
    imported, encoded = mock.Mock(), mock.Mock()
    with mock.patch("builtins.__import__", imported), mock.patch.object(os.environ, "encodekey", encoded):
        observed(None)

    imported.assert_not_called()
    encoded.assert_not_called()


@pytest.mark.parametrize("switch", [None, "A_HOOK_THAT_IS_OFF"])
def test_a_hook_that_is_not_set_watches_nothing(switch: str | None) -> None:
    """A hook may have a handler class, with a variable of the environment or without, and be off."""
    register_configure_hook(ContextVar("hook", default=None), inheritable=True, handle_class=Watcher, env_var=switch)
    try:
        assert not observed(None)
    finally:
        _configure_hooks.pop()


@pytest.mark.parametrize(
    "runnable",
    [_single(Dual), _piped(Dual), _branched(Dual), cast("Any", _branched(Dual)).first],
    ids=["pair", "pipe", "pipe with a dict", "dict"],
)
def test_an_unobserved_run_makes_no_callback_manager(
    runnable: Runnable[Any, Any], run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fast path is taken: no manager is configured, for no part of what runs."""
    configured = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(CallbackManager, "configure", configured)
    monkeypatch.setattr("langchain_core.runnables.config.AsyncCallbackManager.configure", configured)

    run(runnable)
    configured.assert_not_called()


def test_arguments_leave_a_run_unobserved(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast path is taken with keyword arguments for the function, too."""
    configured = mock.Mock(side_effect=AssertionError)
    monkeypatch.setattr(CallbackManager, "configure", configured)
    monkeypatch.setattr("langchain_core.runnables.config.AsyncCallbackManager.configure", configured)

    assert run(Dual(_scaled, _ascaled).bind(by=3)) == 3


def _scaled(x: int, by: int) -> int:
    return by * x


async def _ascaled(x: int, by: int) -> int:
    return by * x


def test_the_decision_is_made_once_for_a_pipe(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe of pairs with a dict of pairs in it asks once whether anybody watches."""
    asked = mock.Mock(return_value=False)
    monkeypatch.setattr("asyncify.pipes.observed", asked)
    monkeypatch.setattr("asyncify.paths.observed", asked)
    pair: Any = Dual(_double, _adouble)
    pipe = pair | {"a": pair, "b": pair | pair} | Dual(_merge, _amerge)

    assert run(cast("Runnable[Any, Any]", pipe)) == 12
    asked.assert_called_once()


async def _collected(chunks: AsyncIterator[Any]) -> list[Any]:
    return [chunk async for chunk in chunks]


CALLS: dict[str, Callable[[Runnable[Any, Any]], Any]] = {
    "invoke": lambda runnable: runnable.invoke(1),
    "ainvoke": lambda runnable: asyncio.run(runnable.ainvoke(1)),
    "batch": lambda runnable: runnable.batch([1, 2, 3]),
    "abatch": lambda runnable: asyncio.run(runnable.abatch([1, 2, 3])),
    "batch_as_completed": lambda runnable: list(runnable.batch_as_completed([1, 2, 3])),
    "abatch_as_completed": lambda runnable: asyncio.run(_collected(runnable.abatch_as_completed([1, 2, 3]))),
    "stream": lambda runnable: list(runnable.stream(1)),
    "astream": lambda runnable: asyncio.run(_collected(runnable.astream(1))),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("runnable", [_single(Dual), _piped(Dual)], ids=["pair", "pipe"])
def test_the_decision_is_made_once_for_each_public_call(
    runnable: Runnable[Any, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch decides once for all its inputs; of a pipe that streams each pair is a stream of its own."""
    asked = mock.Mock(return_value=False)
    for module in ("pipes", "paths", "batches"):
        monkeypatch.setattr(f"asyncify.{module}.observed", asked)
    CALLS[name](runnable)

    assert asked.call_count == (2 if "stream" in name and runnable.get_name() == "RunnableSequence" else 1)


# LangSmith's variables


def _langsmith_states() -> Iterator[tuple[str, dict[str, Any]]]:
    yield "nothing", {}
    yield "enabled", {"enabled": True}
    yield "local", {"enabled": "local"}
    yield "disabled", {"enabled": False}
    yield "tags", {"tags": ["t"]}
    yield "metadata", {"metadata": {"m": 1}}
    yield "empty tags", {"tags": []}
    parent = RunTree(name="parent", ls_client=FakeClient())
    yield "parent", {"parent": parent}
    yield "parent, disabled", {"parent": parent, "enabled": False}


@pytest.mark.parametrize("for_process", [None, True, False, "local"])
@pytest.mark.parametrize("in_environment", ["", "true", "false"])
@pytest.mark.parametrize("in_context", dict(_langsmith_states()).values(), ids=dict(_langsmith_states()))
def test_reading_langsmith_gives_what_asking_it_gives(
    in_context: dict[str, Any],
    in_environment: str,
    for_process: Any,
    langsmith_context: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The variables that are read directly say what LangSmith's public functions say."""
    monkeypatch.setenv("LANGSMITH_TRACING", in_environment)
    monkeypatch.setattr(langsmith_context, "_GLOBAL_TRACING_ENABLED", for_process)

    with tracing_context(**in_context):
        assert asyncify_runs._langsmith_reader()() == asyncify_runs._ask_langsmith()


@pytest.fixture
def other_langsmith(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Have the module with LangSmith's variables be none, as in its older versions."""
    import_ = builtins.__import__

    def import_others(name: str, names: Any = None, *rest: Any) -> Any:
        if name == "langsmith._internal" and names and names["__name__"] == asyncify_runs.__name__:
            raise ImportError(name)
        return import_(name, names, *rest)

    monkeypatch.setattr(builtins, "__import__", import_others)
    asyncify_runs._langsmith_reader.cache_clear()
    yield
    asyncify_runs._langsmith_reader.cache_clear()


@pytest.mark.usefixtures("other_langsmith")
def test_a_langsmith_without_the_variables_is_asked(
    client: FakeClient, run: Run, shape: Callable[[Any], Runnable[Any, Any]]
) -> None:
    """Where their module is not to be found, the public functions answer, and whoever watches sees the run."""
    assert not observed(None)
    assert run(_single(Dual)) == 2
    with tracing_context(enabled=True, client=cast("Any", client)):
        assert observed(None)
        assert _sees_both_alike(client, run, shape)
    with tracing_context(tags=["t"], enabled=False):
        assert observed(None)


def test_a_langsmith_with_other_variables_is_asked(langsmith_context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they are not to be found, the public functions answer."""
    monkeypatch.delattr(langsmith_context, "_TAGS")
    asyncify_runs._langsmith_reader.cache_clear()
    try:
        assert asyncify_runs._langsmith_reader() is asyncify_runs._ask_langsmith
    finally:
        asyncify_runs._langsmith_reader.cache_clear()


# What an unobserved run hands down


@pytest.mark.parametrize("config", [None, {"configurable": {"c": 1}}], ids=["none", "some"])
def test_what_nobody_looks_at_is_not_made(config: RunnableConfig | None, run: Run) -> None:
    """The quiet manager holds nothing as long as no function asks for it."""

    def fn(_: int) -> list[str]:
        ambient = cast("RunnableConfig", var_child_runnable_config.get())
        return list(vars(ambient.get("callbacks")))

    async def afn(x: int) -> list[str]:
        return fn(x)

    assert run(Dual(fn, afn).with_config(config)) == []


def test_the_quiet_manager_is_a_manager() -> None:
    """Its attributes are there when they are looked at, stay what they were, and others are none."""
    manager: Any = asyncify_runs.quiet_config(None, is_async=False).get("callbacks")

    assert (manager.handlers, manager.inheritable_handlers, manager.tags, manager.metadata) == ([], [], [], {})
    assert manager.copy().parent_run_id == manager.parent_run_id
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = manager.missing
