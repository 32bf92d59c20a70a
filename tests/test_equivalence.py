"""A tree of pairs does what the same tree of lambdas does: result, error, what is seen inside and by watchers."""

import asyncio
import copy
import functools
import operator
import selectors
import uuid
import zlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Executor
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import (
    AsyncCallbackHandler,
    AsyncCallbackManager,
    BaseCallbackHandler,
    adispatch_custom_event,
    dispatch_custom_event,
)
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import var_child_runnable_config

from asyncify import Dual

Spec = tuple[Any, ...]
Make = Callable[..., Any]

mark: ContextVar[str] = ContextVar("mark", default="unset")


make_lambda = cast("Make", RunnableLambda)
make_pair = cast("Make", Dual)


class Abort(BaseException):
    """What no `except Exception` catches."""


ERRORS = {error.__name__: error for error in (ValueError, KeyError, TimeoutError, StopIteration, Abort)}


class _Skipping(selectors.DefaultSelector):
    """A selector that, instead of waiting for a time to come, says that it has come."""

    now = 0.0
    threads = 0

    def select(self, timeout: float | None = None) -> Any:
        if self.threads or not timeout:
            return super().select(None if self.threads and timeout else timeout)
        events = super().select(0)
        if not events:
            self.now += timeout
        return events


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop on which sleep takes no time, so that what races does so in the order of its sleeps alone.

    How many steps of the loop a run takes is nobody's promise, and not the same for a pair and a lambda.
    """

    def __init__(self) -> None:
        self._skipping = _Skipping()
        super().__init__(self._skipping)

    def time(self) -> float:
        return self._skipping.now

    def run_in_executor(self, executor: Executor | None, func: Any, *args: Any) -> Any:  # type: ignore[override]
        self._skipping.threads += 1
        future = super().run_in_executor(executor, func, *args)
        future.add_done_callback(self._thread_ended)
        return future

    async def shutdown_default_executor(self, *limit: float | None) -> None:
        self._skipping.threads += 1  # or the 300 s that Python 3.12 and later give the pool's threads are skipped too
        try:
            await super().shutdown_default_executor(*limit)
        finally:
            self._skipping.threads -= 1

    def _thread_ended(self, _: object) -> None:
        self._skipping.threads -= 1


def _run_skipping(main: Coroutine[Any, Any, Any]) -> Any:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(main)


class Notes:
    """What a handler is told of runs, each by its name and with the name of its parent."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._names: dict[Any, str] = {None: "nobody"}

    def start(self, serialized: Any, inputs: Any, run_id: Any, parent_run_id: Any, given: Any) -> None:
        self._names[run_id] = given["name"]
        about = (given["name"], self._of(parent_run_id), inputs, sorted(given["tags"]), given["metadata"], serialized)
        self.seen.append(repr(("start", *about, given.get("run_type"))))

    def end(self, outputs: Any, run_id: Any) -> None:
        shown = outputs if isinstance(outputs, int | dict) else type(outputs).__name__
        self.seen.append(repr(("end", self._of(run_id), shown)))

    def error(self, error: BaseException, run_id: Any) -> None:
        self.seen.append(repr(("error", self._of(run_id), _shown_error(error))))

    def event(self, name: str, data: Any, run_id: Any, given: Any) -> None:
        self.seen.append(repr((name, data, self._of(run_id), sorted(given["tags"] or ()), given["metadata"])))

    def _of(self, run_id: Any) -> str:
        return self._names.get(run_id, "unknown")


class Watcher(BaseCallbackHandler):
    """A handler that notes what it is told."""

    def __init__(self) -> None:
        self.notes = Notes()

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        self.notes.start(serialized, inputs, run_id, parent_run_id, kwargs)

    def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.notes.end(outputs, run_id)

    def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.notes.error(error, run_id)

    def on_custom_event(self, name: str, data: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.notes.event(name, data, run_id, kwargs)


class AsyncWatcher(AsyncCallbackHandler):
    """The async twin."""

    def __init__(self) -> None:
        self.notes = Notes()

    async def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        self.notes.start(serialized, inputs, run_id, parent_run_id, kwargs)

    async def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.notes.end(outputs, run_id)

    async def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.notes.error(error, run_id)

    async def on_custom_event(self, name: str, data: Any, *, run_id: Any, **kwargs: Any) -> None:
        self.notes.event(name, data, run_id, kwargs)


@dataclass
class Tree:
    """Builds a tree of one kind of runnables, and keeps what its functions see, by their place in the tree."""

    make: Make
    is_async: bool = False
    threads: bool = True  # the loop that skips time does not wait for those of a bridge
    streams: bool = False
    watchers: list[Any] = field(default_factory=list)
    seen: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    runs: dict[Any, str] = field(default_factory=dict)
    running: int = 0
    cut_short: list[str] = field(default_factory=list)  # the calls that were cancelled

    def build(self, spec: Spec, place: str = "0") -> Any:
        """Return the runnable that a specification describes."""
        kind, *rest = spec
        return getattr(self, f"_{kind}")(place, *rest)

    def _runnable(self, place: str, sides: str, sync: Callable[..., Any], async_: Callable[..., Any]) -> Any:
        sync.__name__ = async_.__name__ = f"leaf_{place}"
        if sides == "sync" and (self.threads or not self.is_async):
            return self.make(sync)
        return self.make(async_) if sides == "async" and self.is_async else self.make(sync, async_)

    def _of(self, place: str, sides: str, sync: Callable[..., Any]) -> Any:
        """Return the runnable of a function, whose async twin sleeps for a time of its own and then does the same."""

        @functools.wraps(sync)
        async def async_(x: Any, *args: Any, **kwargs: Any) -> Any:
            await self._sleep(place)
            return sync(x, *args, **kwargs)

        return self._runnable(place, sides, sync, async_)

    async def _sleep(self, place: str) -> None:
        try:
            await asyncio.sleep(1 + zlib.crc32(place.encode()) / 2**32)
        except asyncio.CancelledError:
            self.cut_short.append(place)
            raise

    def _note(self, place: str, *values: Any) -> None:
        """Note what a function sees around it, and write to the context that it runs in."""
        ambient = var_child_runnable_config.get()
        self.seen[place].append((*values, mark.get(), _shown(ambient)))
        self.runs[_parent_in(ambient)] = place
        mark.set(place)

    def _add(self, place: str, sides: str, number: int) -> Any:
        def sync(x: int, by: int = 1) -> int:
            self._note(place, x, by)
            return x + number * by

        return self._of(place, sides, sync)

    def _foreign(self, place: str, sides: str, number: int) -> Any:
        """Return a lambda, in a tree of pairs too."""
        return Tree._add(cast("Any", _Foreign(self)), place, sides, number)

    def _fail(self, place: str, sides: str, times: int, error: str) -> Any:
        def sync(x: int, by: int = 1) -> int:
            self._note(place, x, by)
            self.calls[place] += 1
            if self.calls[place] <= times:
                raise ERRORS[error](f"call {self.calls[place]} of {place}")
            return x

        return self._of(place, sides, sync)

    def _wait(self, place: str, sides: str) -> Any:
        """Return what the async side never leaves before it is cancelled."""

        def sync(x: int, by: int = 1) -> int:
            self._note(place, x, by)
            return x

        async def async_(x: int, by: int = 1) -> int:
            await self._sleep(place)
            self._note(place, x, by)
            self.running += 1
            try:
                await asyncio.sleep(TOO_LONG)
            except asyncio.CancelledError:
                self.seen[place].append("cancelled")
                self.cut_short.append(place)
                raise
            finally:
                self.running -= 1
            return x

        return self._runnable(place, sides, sync, async_)

    def _config(self, place: str, sides: str) -> Any:
        def sync(x: int, config: RunnableConfig, by: int = 1) -> int:
            same_run = _parent_in(config) == _parent_in(var_child_runnable_config.get())
            self._note(place, x, by, _shown(config), same_run)
            config.get("tags", []).append("written by the function")
            config.get("metadata", {})["written"] = "by the function"
            config.get("configurable", {})["written"] = "by the function"
            manager: Any = config.get("callbacks")
            manager.add_tags(["added by the function"])
            manager.add_metadata({"added": "by the function"})
            self._note(place, "behind the writing")
            return x

        async def async_(x: int, config: RunnableConfig, by: int = 1) -> int:
            await self._sleep(place)
            return sync(x, config, by)

        return self._runnable(place, sides, sync, async_)

    def _run_manager(self, place: str, sides: str) -> Any:
        def sync(x: int, run_manager: Any, by: int = 1) -> int:
            manager = run_manager
            same_run = manager.run_id == _parent_in(var_child_runnable_config.get())
            parent = manager.parent_run_id and self.runs.get(manager.parent_run_id, "unknown")
            handed_down = sorted(manager.inheritable_tags), manager.inheritable_metadata
            kind = hasattr(manager, "get_sync")
            self._note(place, x, by, sorted(manager.tags), manager.metadata, handed_down, parent, same_run, kind)
            return x

        async def async_(x: int, run_manager: Any, by: int = 1) -> int:
            await self._sleep(place)
            return sync(x, run_manager, by)

        return self._runnable(place, sides, sync, async_)

    def _event(self, place: str, sides: str) -> Any:
        def sync(x: int, by: int = 1) -> int:
            self._note(place, x, by)
            dispatch_custom_event(f"event of {place}", {"x": x})
            return x

        async def async_(x: int, by: int = 1) -> int:
            await self._sleep(place)
            self._note(place, x, by)
            await adispatch_custom_event(f"event of {place}", {"x": x})
            return x

        return self._runnable(place, sides, sync, async_)

    def _generate(self, place: str, sides: str, count: int) -> Any:
        if self.streams:  # where a lambda raises: behind a generator of nothing, and for a sync one on the async path
            sides, count = "both", max(count, 1)

        def sync(x: int, by: int = 1) -> Iterator[int]:
            self._note(place, x, by)
            yield from range(x, x + count)

        async def async_(x: int, by: int = 1) -> AsyncIterator[int]:
            for chunk in sync(x, by):
                await self._sleep(place)
                yield chunk

        return self._runnable(place, sides, sync, async_) | self._of(f"{place}i", "both", lambda x: x or 0)

    def _hand_on(self, place: str, sides: str, inner: Spec) -> Any:
        returned = self.build(inner, f"{place}r")

        def sync(x: int, by: int = 1) -> Any:
            self._note(place, x, by)
            return returned

        return self._of(place, sides, sync)

    def _nest(self, place: str, sides: str, inner: Spec, config: RunnableConfig | None) -> Any:
        called = self._called_on(sides, inner, f"{place}n")

        def sync(x: int, by: int = 1) -> Any:
            self._note(place, x, by)
            result = called.invoke(x, self._given(config), by=by)
            self._note(place, "behind the call")
            return result

        async def async_(x: int, by: int = 1) -> Any:
            self._note(place, x, by)
            result = await called.ainvoke(x, self._given(config), by=by)
            self._note(place, "behind the call")
            return result

        return self._runnable(place, sides, sync, async_)

    def _called_on(self, sides: str, inner: Spec, place: str) -> Runnable[Any, Any]:
        """Return what a function calls: on the sync path, if it is called so, where a lambda needs its sync side."""
        is_async = self.is_async
        self.is_async = is_async and not (sides == "sync" and self.threads)
        called: Runnable[Any, Any] = self.build(inner, place)
        self.is_async = is_async
        return called

    def _pass_on(self, place: str, sides: str, inner: Spec) -> Any:
        called = self._called_on(sides, inner, f"{place}p")

        def sync(x: int, config: RunnableConfig, by: int = 1) -> Any:
            self._note(place, x, by)
            return called.invoke(x, config)

        async def async_(x: int, config: RunnableConfig, by: int = 1) -> Any:
            self._note(place, x, by)
            return await called.ainvoke(x, config)

        return self._runnable(place, sides, sync, async_)

    def _pipe(self, place: str, steps: list[Spec]) -> Any:
        return functools.reduce(operator.or_, [self.build(step, f"{place}{i}") for i, step in enumerate(steps)])

    def _dict(self, place: str, branches: list[Spec]) -> Any:
        merge = self._of(f"{place}m", "both", lambda parts: sum(parts.values()))
        return {f"k{i}": self.build(branch, f"{place}k{i}") for i, branch in enumerate(branches)} | merge

    def _retry(self, place: str, inner: Spec) -> Any:
        return self.build(inner, place).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)

    def _fall_back(self, place: str, inner: Spec, other: Spec) -> Any:
        return self.build(inner, f"{place}f").with_fallbacks([self.build(other, f"{place}g")])

    def _configured(self, place: str, inner: Spec, config: RunnableConfig) -> Any:
        return self.build(inner, place).with_config(self._given(config))

    def _bound(self, place: str, inner: Spec, by: int) -> Any:
        return self.build(inner, place).bind(by=by)

    def _given(self, config: Any) -> Any:
        """Return a config with the watchers in it, if it says so: a part of a tree may be watched by itself."""
        if not config or not config.get("watched"):
            return config
        return {**{key: value for key, value in config.items() if key != "watched"}, "callbacks": self.watchers}


class _Foreign:
    """A tree that makes lambdas, and notes what their functions see in the tree around it."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        self.make = make_lambda

    def __getattr__(self, name: str) -> Any:
        member = getattr(Tree, name, None)
        return functools.partial(member, self) if callable(member) else getattr(self._tree, name)


TOO_LONG = 10_000.0


def _parent_in(config: RunnableConfig | None) -> Any:
    return config and cast("Any", config["callbacks"]).parent_run_id


def _shown(config: RunnableConfig | None) -> Any:
    """Return what is comparable in a config: all of it, and of its manager its colour and what it hands down."""
    if config is None:
        return None
    manager: Any = config.get("callbacks")
    inherited = (sorted(manager.tags), sorted(manager.inheritable_tags), manager.inheritable_metadata, manager.metadata)
    plain = sorted((key, repr(value)) for key, value in config.items() if key != "callbacks")
    handlers = len(manager.handlers), len(manager.inheritable_handlers)
    return plain, inherited, manager.parent_run_id is None, handlers, isinstance(manager, AsyncCallbackManager)


def _shown_error(error: BaseException) -> Any:
    # The text of a recursion error shows the runnable itself; that of what a thread makes of StopIteration is empty.
    text = "" if isinstance(error.__cause__, StopIteration) else str(error).partition(" when invoking ")[0]
    return type(error), text, type(error.__cause__)


@dataclass
class Outcome:
    """All that the runs of a tree show."""

    results: list[Any]
    seen: dict[str, list[Any]]
    watched: list[list[str]]
    mark: str
    ambient: Any
    config: RunnableConfig
    left_running: int
    cut_short: list[str]


INPUTS = (1, 0)
"""A tree runs twice, for what a run leaves behind may show in the next."""


def _run(make: Make, spec: Spec, config: RunnableConfig, *, observed: bool, streams: bool = False) -> Outcome:
    tree = Tree(make, streams=streams, watchers=[Watcher()])
    runnable, given = tree.build(spec), _with(config, tree, observed=observed)
    mark.set("the caller's")
    results: list[Any] = []
    for value in INPUTS:
        try:
            results.append(list(runnable.stream(value, given)) if streams else runnable.invoke(value, given))
        except (Exception, Abort) as error:  # noqa: BLE001  (it is compared)
            results.append(_shown_error(error))
    return _outcome(tree, spec, results, given, 0)


async def _all_of(runnable: Runnable[Any, Any], value: Any, config: RunnableConfig) -> list[Any]:
    return [chunk async for chunk in runnable.astream(value, config)]


async def _arun(make: Make, spec: Spec, config: RunnableConfig, *, observed: bool, streams: bool = False) -> Outcome:
    races = "dict" in repr(spec) or "wait" in repr(spec)
    tree = Tree(make, is_async=True, threads=not races, streams=streams, watchers=[Watcher(), AsyncWatcher()])
    runnable, given = tree.build(spec), _with(config, tree, observed=observed)
    mark.set("the caller's")
    results: list[Any] = []
    for value in INPUTS:
        try:
            async with asyncio.timeout(TOO_LONG / 2 if races else None):
                results.append(
                    await _all_of(runnable, value, given) if streams else await runnable.ainvoke(value, given)
                )
        except (Exception, Abort) as error:  # noqa: BLE001  (it is compared)
            results.append(_shown_error(error))
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:  # the other branches of a dict of lambdas of which one has failed run on
            await asyncio.wait(left, timeout=100 * TOO_LONG)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    return _outcome(tree, spec, results, given, len(left) + tree.running)


def _with(config: RunnableConfig, tree: Tree, *, observed: bool) -> RunnableConfig:
    given = copy.deepcopy(config)
    return {**given, "callbacks": list(tree.watchers)} if observed else given


def _outcome(tree: Tree, spec: Spec, results: list[Any], config: RunnableConfig, left: int) -> Outcome:
    config.pop("callbacks", None)
    in_order = list if "dict" not in repr(spec) else sorted  # threads race
    watched = [in_order(watcher.notes.seen) for watcher in tree.watchers]
    return Outcome(
        results, dict(tree.seen), watched, mark.get(), var_child_runnable_config.get(), config, left, tree.cut_short
    )


SIDES = st.sampled_from(["both", "sync", "async"])
PARTS: dict[str, Any] = {
    "tags": st.lists(st.sampled_from(["t1", "t2"]), max_size=2, unique=True),
    "metadata": st.dictionaries(st.sampled_from(["m1", "m2"]), st.integers(0, 1), max_size=2),
    "configurable": st.dictionaries(st.sampled_from(["c1", "model"]), st.sampled_from(["v1", "v2"]), max_size=2),
    "run_name": st.just("named"),
    "run_id": st.just(uuid.UUID(int=1)),
    "recursion_limit": st.integers(0, 3),
    "max_concurrency": st.integers(1, 2),
    "unknown": st.just("goes to configurable"),
}
CONFIGS: Any = st.fixed_dictionaries({}, optional=PARTS)
INNER_CONFIGS: Any = st.fixed_dictionaries({}, optional={**PARTS, "callbacks": st.just([]), "watched": st.just("yes")})
LEAVES: Any = st.one_of(
    st.tuples(st.just("add"), SIDES, st.integers(0, 3)),
    st.tuples(st.just("foreign"), SIDES, st.integers(0, 3)),
    st.tuples(st.just("fail"), SIDES, st.integers(1, 2), st.sampled_from(sorted(ERRORS))),
    st.tuples(st.just("wait"), SIDES),
    st.tuples(st.just("config"), SIDES),
    st.tuples(st.just("run_manager"), SIDES),
    st.tuples(st.just("event"), SIDES),
    st.tuples(st.just("generate"), SIDES, st.integers(0, 3)),
)


def _grow_in_line(trees: Any) -> Any:
    return st.one_of(
        st.tuples(st.just("pipe"), st.lists(trees, min_size=2, max_size=3)),
        st.tuples(st.just("retry"), trees),
        st.tuples(st.just("fall_back"), trees, trees),
        st.tuples(st.just("configured"), trees, INNER_CONFIGS),
        st.tuples(st.just("bound"), trees, st.integers(0, 3)),
        st.tuples(st.just("hand_on"), SIDES, trees),
        st.tuples(st.just("nest"), SIDES, trees, st.none() | INNER_CONFIGS),
        st.tuples(st.just("pass_on"), SIDES, trees),
    )


def _grow(trees: Any) -> Any:
    return _grow_in_line(trees) | st.tuples(st.just("dict"), st.lists(trees, min_size=1, max_size=2))


TREES: Any = st.recursive(LEAVES, _grow, max_leaves=6)
STREAMED_TREES: Any = st.recursive(LEAVES, _grow_in_line, max_leaves=6)
"""No dict: the chunks of its branches come as their threads end, and what is behind an error stays open."""


@pytest.mark.parametrize("observed", [False, True], ids=["unobserved", "observed"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=TREES, config=CONFIGS)
def test_a_tree_of_pairs_is_a_tree_of_lambdas(*, spec: Spec, config: RunnableConfig, observed: bool) -> None:
    """On the sync path a random tree of either kind shows the same."""

    def run(make: Make) -> Outcome:
        return copy_context().run(_run, make, spec, config, observed=observed)

    assert run(make_pair) == run(make_lambda)


@pytest.mark.parametrize("observed", [False, True], ids=["unobserved", "observed"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@example(
    spec=("nest", "both", ("dict", [("fail", "both", 1, "Abort"), ("wait", "both")]), {"callbacks": []}), config={}
)
@given(spec=TREES, config=CONFIGS)
def test_a_tree_of_pairs_is_a_tree_of_lambdas_async(*, spec: Spec, config: RunnableConfig, observed: bool) -> None:
    """The async twin, after which no task is left.

    Where a branch of a dict of pairs fails, it cuts the others short; a lambda's run on.
    """
    ours = _run_skipping(_arun(make_pair, spec, config, observed=observed))
    theirs = _run_skipping(_arun(make_lambda, spec, config, observed=observed))

    assert ours.left_running == 0
    watched = observed and "'callbacks': []" not in repr(spec)  # which hides the handlers from what is inside
    if watched or "dict" not in repr(spec) or ours.cut_short == theirs.cut_short:
        assert ours == theirs


@pytest.mark.parametrize("observed", [False, True], ids=["unobserved", "observed"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=STREAMED_TREES, config=CONFIGS)
def test_a_tree_of_pairs_streams_as_a_tree_of_lambdas(*, spec: Spec, config: RunnableConfig, observed: bool) -> None:
    """The chunks of a stream, and all that is seen, are the same."""

    def run(make: Make) -> Outcome:
        return copy_context().run(_run, make, spec, config, observed=observed, streams=True)

    assert run(make_pair) == run(make_lambda)


@pytest.mark.parametrize("observed", [False, True], ids=["unobserved", "observed"])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(spec=STREAMED_TREES, config=CONFIGS)
def test_a_tree_of_pairs_streams_as_a_tree_of_lambdas_async(
    *, spec: Spec, config: RunnableConfig, observed: bool
) -> None:
    """The async twin, after which no task is left."""
    ours = _run_skipping(_arun(make_pair, spec, config, observed=observed, streams=True))

    assert ours == _run_skipping(_arun(make_lambda, spec, config, observed=observed, streams=True))
    assert ours.left_running == 0
