"""Pipes and dicts of pairs: runnables that decide once, for all the pairs in them, whether a run is observed.

A pipe with any other step among its steps is LangChain's own `RunnableSequence`.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Generator, Iterable, Iterator
from contextlib import AsyncExitStack, ExitStack, aclosing, closing
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

from langchain_core.runnables import Runnable, RunnableParallel, RunnableSequence
from langchain_core.runnables.config import RunnableConfig, ensure_config, patch_config
from langchain_core.runnables.utils import AddableDict

from asyncify.arguments import check_bound
from asyncify.background import background
from asyncify.batches import Batches
from asyncify.branches import amerge, merge
from asyncify.deadlock.joins import Join, Joining
from asyncify.fanout import Ended, Threads, attempt, until_ended
from asyncify.pools import ThreadPool
from asyncify.relay import Relay
from asyncify.runs import config_of_steps, is_reserved, observed
from asyncify.scopes import CancelScope
from asyncify.streams import astart_run, astream_run, closable, only, start_run, stream_run

__all__ = ["DualParallel", "DualSequence", "Piped"]

Input = TypeVar("Input")
Output = TypeVar("Output")


class Piped(Batches):
    """A step of a pipe of pairs: a runnable that a pipe which knows itself unobserved can run directly."""

    if not TYPE_CHECKING:  # type checkers use the overloads of `Runnable`

        def __or__(self, other: Any) -> Any:
            """Compose, as `Runnable` does."""
            return _of_pairs(super().__or__(other))

        def __ror__(self, other: Any) -> Any:
            """Compose, as `Runnable` does."""
            return _of_pairs(super().__ror__(other))

        def pipe(self, *others: Any, name: str | None = None) -> Any:
            """Compose, as `Runnable` does."""
            return _of_pairs(super().pipe(*others, name=name))

        # The next four stream by way of `_transform` and `_atransform`, which LangChain's own runnables have, too.

        def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            """Stream the sync side's output for one input; closing the stream closes all generators in it."""
            return self.transform(iter([input]), config, **kwargs)

        def astream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            """Stream the async side's output for one input, in the reader's task; closing works as in `stream`."""
            return self.atransform(only(input), config, **kwargs)

        def transform(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            """Stream the sync side's output for the chunks of an input."""
            if self._is_langchains(kwargs):
                return self._transform_stream_with_config(input, self._transform, ensure_config(config), **kwargs)
            return stream_run(partial(self._transform, **kwargs), input, lambda: self._begin(config))

        def atransform(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            """Stream the async side's output for the chunks of an input."""
            if self._is_langchains(kwargs):
                return super().atransform(input, config, **kwargs)
            return astream_run(partial(self._atransform, **kwargs), input, lambda: self._abegin(config))

        def _is_langchains(self, kwargs: Any) -> bool:
            """Tell whether a stream with these keyword arguments takes LangChain's own way."""
            return is_reserved(kwargs)

        def _begin(self, config: Any) -> Any:
            """Start a streaming run; return the config for what is inside it, and its manager."""
            return start_run(config, self.get_name())

        async def _abegin(self, config: Any) -> Any:
            """Start an async streaming run; return the config for what is inside it, and its manager."""
            return await astart_run(config, self.get_name())


class DualSequence(Piped, RunnableSequence[Input, Output]):
    """A pipe that consists of pairs alone."""

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Run the sync sides one after the other."""
        if (kwargs and is_reserved(kwargs)) or self._needs_a_run(is_async=False) or observed(config):
            return super().invoke(input, config, **kwargs)
        return cast("Output", self._run_unobserved(input, config, kwargs))

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> Output:
        """Run the async sides one after the other, each in a task of its own."""
        if (kwargs and is_reserved(kwargs)) or self._needs_a_run(is_async=True) or observed(config):
            return await super().ainvoke(input, config, **kwargs)
        return cast("Output", await self._arun_unobserved(input, config, kwargs))

    def _needs_a_run(self, *, is_async: bool) -> bool:
        """Tell whether a step can't do without a run of LangChain's."""
        return any(step._needs_a_run(is_async=is_async) for step in _pairs(self.steps))

    def _run_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> Any:
        """Run the sync sides, unobserved; only the first step gets the keyword arguments."""
        config = config_of_steps(config)
        for step in _pairs(self.steps):
            value = step._run_unobserved(value, config, kwargs)
            kwargs = {}
        return value

    async def _arun_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> Any:
        config = config_of_steps(config)
        for step in _pairs(self.steps):
            value = await step._start_unobserved(value, config, kwargs)
            kwargs = {}
        return value

    def _start_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> asyncio.Task[Any]:
        """Start the async sides, unobserved, in a task; only the first step gets the keyword arguments."""
        return asyncio.create_task(self._arun_unobserved(value, config, kwargs))

    def _transform(
        self, inputs: Iterator[Any], run_manager: Any, config: RunnableConfig, **kwargs: Any
    ) -> Generator[Any]:
        chunks: Any = inputs
        with ExitStack() as streams:
            for number, step in enumerate(self.steps, 1):
                config = patch_config(config, callbacks=run_manager.get_child(f"seq:step:{number}"))
                chunks = streams.enter_context(closing(cast("Any", step.transform(chunks, config, **kwargs))))
                kwargs = {}
            yield from chunks

    async def _atransform(
        self, inputs: AsyncIterator[Any], run_manager: Any, config: RunnableConfig, **kwargs: Any
    ) -> AsyncGenerator[Any]:
        chunks: Any = inputs
        async with AsyncExitStack() as streams:
            for number, step in enumerate(self.steps, 1):
                config = patch_config(config, callbacks=run_manager.get_child(f"seq:step:{number}"))
                made = closable(step.atransform(chunks, config, **kwargs))
                await streams.enter_async_context(aclosing(made))
                chunks = Relay(made)
                kwargs = {}
            async for chunk in chunks:
                with chunks:
                    yield chunk

    def _warn_of_traps(self, calls: int, *, bounded: bool) -> None:
        """Warn of the traps that the steps run into."""
        for step in _pairs(self.steps):
            step._warn_of_traps(calls, bounded=bounded)

    def _admits(self) -> int | None:
        """Return the sum of the steps' limits, so how many inputs they admit together; None if a step has no limit."""
        return _sum(step._admits() for step in _pairs(self.steps))

    # LangChain names a run and a serialized object after the class, and should take this class for its own.

    def get_name(self, suffix: str | None = None, *, name: str | None = None) -> str:
        """Return the name that a `RunnableSequence` would have."""
        return super().get_name(suffix, name=name or self.name or RunnableSequence.__name__)

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return the id of `RunnableSequence`."""
        return RunnableSequence.lc_id()


class DualParallel(Piped, RunnableParallel[Input]):
    """A dict in a pipe that holds only pairs, or pipes and dicts of pairs."""

    def _warn_of_traps(self, calls: int, *, bounded: bool) -> None:
        """Warn of the traps that the branches run into."""
        for branch in _pairs(self.steps__.values()):
            branch._warn_of_traps(calls, bounded=bounded)

    def _admits(self) -> int | None:
        """Return the sum of the branches' limits, so how many inputs they admit together; None if one has no limit."""
        return _sum(branch._admits() for branch in _pairs(self.steps__.values()))

    def invoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Run the sync sides, each in a thread; keyword arguments go to none of them."""
        if self._needs_a_run(is_async=False) or observed(config):
            return self._invoke_upstream(input, config)
        return self._run_unobserved(input, config, kwargs)

    def _invoke_upstream(self, value: Any, config: RunnableConfig | None) -> dict[str, Any]:
        with background.waited_for():
            return super().invoke(value, config)

    async def ainvoke(self, input: Input, config: RunnableConfig | None = None, **kwargs: Any) -> dict[str, Any]:
        """Run the async sides, each in a task of its own; keyword arguments go to none of them."""
        if self._needs_a_run(is_async=True) or observed(config):
            return await super().ainvoke(input, config)
        return await self._arun_unobserved(input, config)

    def _needs_a_run(self, *, is_async: bool) -> bool:
        """Tell whether a branch can't do without a run of LangChain's."""
        return any(branch._needs_a_run(is_async=is_async) for branch in _pairs(self.steps__.values()))

    def _run_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Run the sync sides, unobserved; keyword arguments go to none of them."""
        width = _bound(ensure_config(config)) or math.inf
        config, steps = config_of_steps(config), dict(self.steps__)

        def call_in(scope: CancelScope) -> Callable[[int, Piped], Any]:
            context = background.context_of_waiter(scope)

            def run(_: int, step: Piped) -> Any:
                return context.copy().run(step._run_unobserved, value, config, {})

            def call(index: int, step: Piped) -> Ended:
                ended = attempt(run, index, step)
                try:
                    if ended[2] is not None:
                        scope.cancel()  # other branches go on running, but no longer wait for a limiter
                    return ended
                finally:
                    del ended  # an error's traceback holds this frame

            return call

        ended: list[Ended] = []
        failed: list[BaseException] = []
        try:
            with Threads(call_in, lambda: width, name=self.get_name(), return_exceptions=True) as fan:
                fan.run(enumerate(steps.values()))
                ended += sorted((output for _, output, _ in fan.take_all()), key=itemgetter(0))
            failed += [error for _, _, error in ended if error is not None]
            if failed:
                raise next((error for error in failed if not isinstance(error, asyncio.CancelledError)), failed[0])
            return {key: output for key, (_, output, _) in zip(steps, ended, strict=True)}
        finally:
            ended.clear()  # an error's traceback holds this frame
            failed.clear()

    async def _arun_unobserved(self, value: Any, config: RunnableConfig | None) -> dict[str, Any]:
        config, steps = config_of_steps(config), dict(self.steps__)
        tasks = [step._start_unobserved(value, config, {}) for step in _pairs(steps.values())]
        interrupted: asyncio.CancelledError | None = None
        try:
            if tasks:
                (await _Branches(tasks).decisive()).result()
            return {key: task.result() for key, task in zip(steps, tasks, strict=True)}
        except BaseException:  # of a branch, or because this task was cancelled
            for task in tasks:
                task.cancel()
            interrupted = await until_ended(tasks)
            if interrupted is not None:
                raise interrupted from None
            raise
        finally:
            tasks.clear()  # an error's traceback holds this frame
            del interrupted

    def _start_unobserved(
        self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]
    ) -> asyncio.Task[dict[str, Any]]:
        """Start the async sides, unobserved, in a task; keyword arguments go to none of them."""
        return asyncio.create_task(self._arun_unobserved(value, config))

    if not TYPE_CHECKING:

        def stream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            """Stream the branches' outputs for one input as they come; keyword arguments go to none of them."""
            return super().stream(input, config)

        def astream(self, input: Any, config: Any = None, **kwargs: Any) -> Any:
            """Stream the async sides' outputs as they come, each in a task; keyword arguments go to none of them."""
            return super().astream(input, config)

        def _is_langchains(self, kwargs: Any) -> bool:
            """Tell whether there are keyword arguments: a dict takes none, and LangChain's own way refuses them."""
            return bool(kwargs)

    def _transform(self, inputs: Iterator[Any], run_manager: Any, config: RunnableConfig) -> Generator[AddableDict]:
        branches = {
            key: partial(step.transform, config=child) for key, step, child in self._children(run_manager, config)
        }
        pool = ThreadPool(_bound(config), self.get_name())
        with closing(merge(inputs, branches, pool)) as chunks:
            for key, chunk in chunks:
                yield AddableDict({key: chunk})

    def _children(self, run_manager: Any, config: RunnableConfig) -> Iterable[tuple[str, Any, RunnableConfig]]:
        """Yield the key, the branch and the branch's config, for each branch."""
        for key, step in dict(self.steps__).items():
            yield key, step, patch_config(config, callbacks=run_manager.get_child(f"map:key:{key}"))

    async def _atransform(
        self, inputs: AsyncIterator[Any], run_manager: Any, config: RunnableConfig
    ) -> AsyncGenerator[AddableDict]:
        branches = {
            key: partial(step.atransform, config=child) for key, step, child in self._children(run_manager, config)
        }
        async with aclosing(amerge(inputs, branches)) as chunks:
            async for key, chunk in Relay(chunks):  # so that the event loop, as it ends, does not close these as well
                yield AddableDict({key: chunk})

    @classmethod
    def lc_id(cls) -> list[str]:
        """Return the id of `RunnableParallel`."""
        return RunnableParallel.lc_id()


class _Branches(Joining):
    """A join of the branches' tasks: the first to fail decides it, or else the last to end."""

    def __init__(self, tasks: Collection[asyncio.Task[Any]]) -> None:
        self._alive = set(tasks)
        self._decided: asyncio.Future[asyncio.Task[Any]] = asyncio.get_running_loop().create_future()
        for task in tasks:
            task.add_done_callback(self._note)

    def _note(self, task: asyncio.Task[Any]) -> None:
        self._alive.discard(task)
        has_failed = task.cancelled() or task.exception() is not None
        if not self._decided.done() and (has_failed or not self._alive):
            self._decided.set_result(task)

    def join(self) -> Join:
        """Return the join of the tasks."""
        return Join(self._decided, len(self._alive), fails_at_once=True)

    async def decisive(self) -> asyncio.Task[Any]:
        """Return the task that decides; unlike with `gather`, cancelling this wait does not cancel the tasks."""
        return await self._decided


def _bound(config: RunnableConfig) -> int | None:
    """Return how many branches may run at once; None if all may."""
    return check_bound("max_concurrency", config.get("max_concurrency"))


def _sum(limits: Iterable[int | None]) -> int | None:
    """Add up limits; None is no limit, and makes the sum None. So does there being none to add up."""
    found = list(limits)
    return sum(limit for limit in found if limit is not None) if found and None not in found else None


def _pairs(steps: Iterable[Runnable[Any, Any]]) -> Iterable[Piped]:
    return cast("Iterable[Piped]", steps)


def _of_pairs(composed: Any) -> Any:
    """Return a sequence or a dict that holds only pairs as one of pairs, anything else as it is."""
    kind = composed.__class__
    if kind is RunnableSequence:
        steps = [_of_pairs(step) for step in composed.steps]
        return _sequence(*steps, name=composed.name) if _are_pairs(steps) else composed
    if kind is RunnableParallel:
        branches = {key: _of_pairs(branch) for key, branch in composed.steps__.items()}
        return _parallel_of(branches, composed.name) if _are_pairs(branches.values()) else composed
    return composed


def _parallel_of(branches: dict[str, Any], name: str | None) -> Any:
    parallel = _parallel(branches)
    parallel.name = name
    return parallel


def _are_pairs(steps: Iterable[object]) -> bool:
    return all(isinstance(step, Piped) for step in steps)


# Any: type checkers read the constructors' parameters from the models' fields, and so don't see that they take steps.
_sequence: Any = DualSequence
_parallel: Any = DualParallel
