"""A tree of pairs does what the same tree of lambdas does: result, error, what is seen inside and by a watcher."""

import asyncio
import functools
import operator
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar, copy_context
from dataclasses import dataclass, field
from typing import Any, cast

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from langchain_core.callbacks import BaseCallbackHandler
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda
from langchain_core.runnables.config import var_child_runnable_config

from asyncify import Dual

Spec = tuple[Any, ...]
Make = Callable[..., Any]

mark: ContextVar[str] = ContextVar("mark", default="unset")


make_lambda = cast("Make", RunnableLambda)
make_pair = cast("Make", Dual)


class Watcher(BaseCallbackHandler):
    """A handler that notes the runs it is told of, each with the name of its parent."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self._names: dict[Any, str] = {None: "nobody"}

    def on_chain_start(
        self, serialized: Any, inputs: Any, *, run_id: Any, parent_run_id: Any = None, **kwargs: Any
    ) -> None:
        self._names[run_id] = kwargs["name"]
        parent = self._names.get(parent_run_id, "unknown")
        self.seen.append(repr(("start", kwargs["name"], parent, inputs, sorted(kwargs["tags"]), kwargs["metadata"])))

    def on_chain_end(self, outputs: Any, *, run_id: Any, **kwargs: Any) -> None:
        shown = outputs if isinstance(outputs, int | dict) else type(outputs).__name__
        self.seen.append(repr(("end", self._names[run_id], shown)))

    def on_chain_error(self, error: BaseException, *, run_id: Any, **kwargs: Any) -> None:
        self.seen.append(repr(("error", self._names[run_id], type(error))))


@dataclass
class Tree:
    """Builds a tree of one kind of runnables, and keeps what its functions see, by their place in the tree."""

    make: Make
    threads: bool = True  # without them the branches of a dict race in one order only, on an event loop
    seen: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    calls: dict[str, int] = field(default_factory=lambda: defaultdict(int))

    def build(self, spec: Spec, place: str = "0") -> Any:
        """Return the runnable that a specification describes."""
        kind, *rest = spec
        return getattr(self, f"_{kind}")(place, *rest)

    def _runnable(self, place: str, sides: str, sync: Callable[..., Any], async_: Callable[..., Any]) -> Any:
        sync.__name__ = async_.__name__ = f"leaf_{place}"
        return self.make(sync) if sides == "sync" and self.threads else self.make(sync, async_)

    def _note(self, place: str, value: Any) -> None:
        """Note what a function sees around it, and write to the context that it runs in."""
        ambient = var_child_runnable_config.get()
        self.seen[place].append((value, mark.get(), _shown(ambient)))
        mark.set(place)

    def _add(self, place: str, sides: str, number: int) -> Any:
        def sync(x: int, by: int = 1) -> int:
            self._note(place, (x, by))
            return x + number * by

        async def async_(x: int, by: int = 1) -> int:
            await asyncio.sleep(0)
            return sync(x, by)

        return self._runnable(place, sides, sync, async_)

    def _fail(self, place: str, sides: str, times: int) -> Any:
        def sync(x: int) -> int:
            self._note(place, x)
            self.calls[place] += 1
            if self.calls[place] <= times:
                raise ValueError(f"call {self.calls[place]} of {place}")
            return x

        async def async_(x: int) -> int:
            return sync(x)

        return self._runnable(place, sides, sync, async_)

    def _config(self, place: str, sides: str) -> Any:
        def sync(x: int, config: RunnableConfig) -> int:
            self._note(place, (x, _shown(config)))
            config.get("tags", []).append("written by the function")
            return x

        async def async_(x: int, config: RunnableConfig) -> int:
            return sync(x, config)

        return self._runnable(place, sides, sync, async_)

    def _run_manager(self, place: str, sides: str) -> Any:
        def sync(x: int, run_manager: Any) -> int:
            self._note(place, (x, sorted(run_manager.tags), run_manager.metadata, run_manager.parent_run_id is None))
            return x

        async def async_(x: int, run_manager: Any) -> int:
            return sync(x, run_manager)

        return self._runnable(place, sides, sync, async_)

    def _generate(self, place: str, sides: str, count: int) -> Any:
        def sync(x: int) -> Iterator[int]:
            self._note(place, x)
            yield from range(x, x + count)

        async def async_(x: int) -> AsyncIterator[int]:
            for chunk in sync(x):
                yield chunk

        return self._runnable(place, sides, sync, async_) | self._int(place)

    def _int(self, place: str) -> Any:
        return self._runnable(f"{place}i", "both", lambda x: x or 0, _async_or_0)

    def _hand_on(self, place: str, sides: str, inner: Spec) -> Any:
        returned = self.build(inner, f"{place}r")

        def sync(x: int) -> Any:
            self._note(place, x)
            return returned

        async def async_(x: int) -> Any:
            return sync(x)

        return self._runnable(place, sides, sync, async_)

    def _nest(self, place: str, inner: Spec, config: RunnableConfig | None) -> Any:
        called: Runnable[Any, Any] = self.build(inner, f"{place}n")

        def sync(x: int) -> Any:
            self._note(place, x)
            return called.invoke(x, config)

        async def async_(x: int) -> Any:
            self._note(place, x)
            return await called.ainvoke(x, config)

        return self._runnable(place, "both", sync, async_)

    def _pipe(self, place: str, steps: list[Spec]) -> Any:
        return functools.reduce(operator.or_, [self.build(step, f"{place}{i}") for i, step in enumerate(steps)])

    def _dict(self, place: str, branches: list[Spec]) -> Any:
        async def amerge(parts: dict[str, int]) -> int:
            return sum(parts.values())

        merge = self._runnable(f"{place}m", "both", lambda parts: sum(parts.values()), amerge)
        return {f"k{i}": self.build(branch, f"{place}k{i}") for i, branch in enumerate(branches)} | merge

    def _retry(self, place: str, inner: Spec) -> Any:
        return self.build(inner, place).with_retry(stop_after_attempt=2, wait_exponential_jitter=False)

    def _fall_back(self, place: str, inner: Spec, other: Spec) -> Any:
        return self.build(inner, f"{place}f").with_fallbacks([self.build(other, f"{place}g")])

    def _configured(self, place: str, inner: Spec, config: RunnableConfig) -> Any:
        return self.build(inner, place).with_config(config)

    def _bound(self, place: str, sides: str, number: int, by: int) -> Any:
        return self._add(place, sides, number).bind(by=by)


async def _async_or_0(x: int) -> int:
    return x or 0


def _shown(config: RunnableConfig | None) -> Any:
    """Return what is comparable in a config: all of it, and of its manager what is handed down."""
    if config is None:
        return None
    manager: Any = config.get("callbacks")
    inherited = (sorted(manager.tags), sorted(manager.inheritable_tags), manager.inheritable_metadata, manager.metadata)
    plain = sorted((key, repr(value)) for key, value in config.items() if key != "callbacks")
    return plain, inherited, manager.parent_run_id is None, len(manager.handlers)


@dataclass
class Outcome:
    """All that a run of a tree shows."""

    result: Any
    seen: dict[str, list[Any]]
    watched: list[str]
    mark: str
    ambient: Any
    left_running: int


def _result_of(error: Exception) -> Any:
    # The text of a recursion error shows the runnable itself.
    return type(error), "" if isinstance(error, RecursionError) else str(error)


def _run(make: Make, spec: Spec, config: RunnableConfig, *, observed: bool) -> Outcome:
    tree, watcher = Tree(make), Watcher()
    runnable = tree.build(spec)
    try:
        result = runnable.invoke(1, _with(config, watcher, observed=observed))
    except Exception as error:  # noqa: BLE001  (it is compared)
        result = _result_of(error)
    return Outcome(result, dict(tree.seen), sorted(watcher.seen), mark.get(), var_child_runnable_config.get(), 0)


async def _arun(make: Make, spec: Spec, config: RunnableConfig, *, observed: bool) -> Outcome:
    tree, watcher = Tree(make, threads="dict" not in repr(spec)), Watcher()
    runnable = tree.build(spec)
    try:
        result = await runnable.ainvoke(1, _with(config, watcher, observed=observed))
    except Exception as error:  # noqa: BLE001  (it is compared)
        result = _result_of(error)
    ambient, marked = var_child_runnable_config.get(), mark.get()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    if left:  # the other branches of a dict of which one has failed run on
        await asyncio.wait(left, timeout=30)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    return Outcome(result, dict(tree.seen), sorted(watcher.seen), marked, ambient, len(left))


def _with(config: RunnableConfig, watcher: Watcher, *, observed: bool) -> RunnableConfig:
    return {**config, "callbacks": [watcher]} if observed else config


SIDES = st.sampled_from(["both", "sync"])
CONFIGS: Any = st.fixed_dictionaries(
    {},
    optional={
        "tags": st.lists(st.sampled_from(["t1", "t2"]), max_size=2, unique=True),
        "metadata": st.dictionaries(st.sampled_from(["m1", "m2"]), st.integers(0, 1), max_size=2),
        "configurable": st.dictionaries(st.sampled_from(["c1", "model"]), st.sampled_from(["v1", "v2"]), max_size=2),
        "run_name": st.just("named"),
        "recursion_limit": st.integers(0, 3),
        "unknown": st.just("goes to configurable"),
    },
)
LEAVES: Any = st.one_of(
    st.tuples(st.just("add"), SIDES, st.integers(0, 3)),
    st.tuples(st.just("fail"), SIDES, st.integers(0, 2)),
    st.tuples(st.just("config"), SIDES),
    st.tuples(st.just("run_manager"), SIDES),
    st.tuples(st.just("generate"), SIDES, st.integers(0, 3)),
    st.tuples(st.just("bound"), SIDES, st.integers(0, 3), st.integers(0, 3)),
)


def _grow(trees: Any) -> Any:
    return st.one_of(
        st.tuples(st.just("pipe"), st.lists(trees, min_size=2, max_size=3)),
        st.tuples(st.just("dict"), st.lists(trees, min_size=1, max_size=2)),
        st.tuples(st.just("retry"), trees),
        st.tuples(st.just("fall_back"), trees, trees),
        st.tuples(st.just("configured"), trees, CONFIGS),
        st.tuples(st.just("hand_on"), SIDES, trees),
        st.tuples(st.just("nest"), trees, st.none() | CONFIGS),
    )


TREES: Any = st.recursive(LEAVES, _grow, max_leaves=6)


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
@given(spec=TREES, config=CONFIGS)
def test_a_tree_of_pairs_is_a_tree_of_lambdas_async(*, spec: Spec, config: RunnableConfig, observed: bool) -> None:
    """The async twin, after which no task is left."""
    ours = asyncio.run(_arun(make_pair, spec, config, observed=observed))

    assert ours == asyncio.run(_arun(make_lambda, spec, config, observed=observed))
    assert ours.left_running == 0
