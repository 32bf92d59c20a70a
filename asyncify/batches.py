"""The four batch methods of a runnable of ours, over the engine in `fanout`.

They keep LangChain's meaning: order, `return_exceptions`, a config for all or one for each, `run_id` for the first
alone, `max_concurrency` of the first config. They differ in what they leave behind, which is nothing.
"""

from __future__ import annotations

import asyncio
import math
from abc import abstractmethod
from collections.abc import AsyncGenerator, Callable, Generator, Mapping, Sequence
from contextvars import Context, copy_context
from functools import partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Never

from langchain_core.runnables.base import Runnable, RunnableBindingBase
from langchain_core.runnables.config import RunnableConfig, ensure_config, get_config_list

from asyncify.arguments import check_bound
from asyncify.background import background
from asyncify.fanout import Threads, aas_completed, agather, as_completed, gather, run_one
from asyncify.pools import DEFAULT_THREADS
from asyncify.runs import is_reserved, observed
from asyncify.scopes import CancelScope
from asyncify.traps import MANY_BRIDGED

__all__ = ["Batches", "Items", "is_bounded", "layers"]

Configs = RunnableConfig | Sequence[RunnableConfig] | None

_QUEUED = 64
"""Tasks at most that wait at a limiter, so that a slot which comes free is taken at once."""


class Items:
    """How one input after another goes through a runnable: whether it is watched is decided once, if it can be.

    Args:
        runnable: any; one of ours goes its quiet way where nobody watches.
        config: for all inputs, or one for each.
        configs: the same as LangChain understands it; of a config for all, the first and that of the others.
        kwargs: for the function.
    """

    def __init__(
        self,
        runnable: Runnable[Any, Any],
        config: Configs,
        configs: list[RunnableConfig],
        kwargs: dict[str, Any],
    ) -> None:
        self._runnable = runnable
        self._configs = configs
        self._kwargs = kwargs
        self._shared = configs[0] if config and configs else None  # None where there is no config at all
        self._ours = runnable if isinstance(runnable, Batches) and not is_reserved(kwargs) else None
        self._is_one_for_all = not isinstance(config, Sequence)
        unobserved = self._is_one_for_all and not observed(self._shared)
        self._limited = layers(runnable)[-1]  # under its bindings: what has the limit, if anything has
        # The runnable, if it is ours and known now to need no run of LangChain's: on the sync path, on the async one.
        self._quiet = self._ours if unobserved and not self._needs_a_run(is_async=False) else None
        self._aquiet = self._ours if unobserved and not self._needs_a_run(is_async=True) else None
        asked = [check_bound("max_concurrency", each.get("max_concurrency")) for each in configs]
        self._asked = asked[0] if asked else None
        self._context = copy_context()
        self._started = 0
        self._has_told = False

    def fan(self, *, return_exceptions: bool) -> Threads:
        """Return the threads that run a batch."""
        name = self._runnable.get_name()
        return Threads(self.in_threads, self.threads, name=name, return_exceptions=return_exceptions)

    def in_threads(self, scope: CancelScope | None) -> Callable[[int, Any], Any]:
        """Return what runs one input in its caller's thread, in a copy of this context; its waits are in the scope."""
        return partial(self._call, background.context_of_waiter(scope))

    def _call(self, context: Context, index: int, value: Any) -> Any:
        context = context.copy()
        if self._quiet is not None:
            return context.run(self._quiet._run_unobserved, value, self._shared_by(index), self._kwargs)
        return context.run(self._runnable.invoke, value, self._config_of(index), **self._kwargs)

    def start(self, index: int, value: Any) -> asyncio.Task[Any]:
        """Start one input in a task of its own, with a copy of the context in which this object was made.

        What keeps it from being started, such as a config that LangChain can't read, is how it ends.
        """
        self._started += 1
        try:
            if self._aquiet is not None:
                return self._context.run(self._aquiet._start_unobserved, value, self._shared_by(index), self._kwargs)
            return self._context.run(self._start, index, value)
        except Exception as error:  # noqa: BLE001  (whoever takes the item gets it)
            return asyncio.get_running_loop().create_task(_fail(error))

    def tell_of_traps(self) -> None:
        """Tell of the traps that a stream of tasks runs into: where its caller's line can be seen, once there are many.

        A stream has a window, so there is never no limit.
        """
        if self._started >= MANY_BRIDGED and not self._has_told:
            self._has_told = True
            if isinstance(self._limited, Batches):
                self._limited._warn_of_traps(self._started, bounded=True)

    def _start(self, index: int, value: Any) -> asyncio.Task[Any]:
        config = self._config_of(index)
        if self._ours is not None and not self._is_one_for_all and self._is_quiet(config):
            return self._ours._start_unobserved(value, config, self._kwargs)
        return asyncio.get_running_loop().create_task(self._ainvoke(value, config))

    async def _ainvoke(self, value: Any, config: RunnableConfig) -> Any:
        # A runnable of somebody else's may raise where it is called, or give an awaitable that is no coroutine.
        return await self._runnable.ainvoke(value, config, **self._kwargs)

    def _shared_by(self, index: int) -> RunnableConfig | None:
        return self._shared and self._config_of(index)

    def _is_quiet(self, config: RunnableConfig) -> bool:
        return not self._needs_a_run(is_async=True) and not observed(config)

    def _needs_a_run(self, *, is_async: bool) -> bool:
        return self._ours is not None and self._ours._needs_a_run(is_async=is_async)

    def _config_of(self, index: int) -> RunnableConfig:
        return self._configs[min(index, len(self._configs) - 1)]

    def threads(self) -> float:
        """Return how many threads to use, as things stand now."""
        return self.bound() or DEFAULT_THREADS

    def tasks(self) -> float:
        """Return how many tasks to have alive, as things stand now."""
        admitted = self._admitted()
        asked = self._asked or math.inf
        return asked if admitted is None else min(asked, admitted + min(admitted, _QUEUED))

    def bound(self) -> float | None:
        """Return how many inputs can get anywhere at once, None if nothing bounds them."""
        admitted = self._admitted()
        if self._asked is None and admitted is None:
            return None
        return min(self._asked or math.inf, admitted or math.inf)

    def _admitted(self) -> int | None:
        return self._limited._admits() if isinstance(self._limited, Batches) else None


class Batches:
    """The batch methods, for a runnable whose run can be started when it is known that nobody watches."""

    @abstractmethod
    def _needs_a_run(self, *, is_async: bool) -> bool:
        """Tell whether a part of it, on this path, can't do without a run of LangChain's, observed or not."""

    @abstractmethod
    def _run_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> Any:
        """Run the sync side; the config is that of the caller."""

    @abstractmethod
    def _start_unobserved(self, value: Any, config: RunnableConfig | None, kwargs: dict[str, Any]) -> asyncio.Task[Any]:
        """Start the async side in a task of its own; the config is that of the caller."""

    @abstractmethod
    def _admits(self) -> int | None:
        """Return how many inputs the limits let in at once, None if they don't bound that."""

    @abstractmethod
    def _warn_of_traps(self, calls: int, *, bounded: bool) -> None:
        """Tell of the traps that so many async calls run into; `bounded` if not all run at once."""

    if not TYPE_CHECKING:  # for a type checker the overloads of `Runnable` say what comes out

        def batch(
            self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
        ) -> list[Any]:
            """Run the sync side on every input, in threads, and return the outputs in order.

            There are `max_concurrency` threads, or else as many as the limit admits calls, or else 64. The first
            error stops the batch: calls that run are waited for, those that have not started, or wait for a limiter,
            never do.
            """
            items = _items(self, inputs, config, kwargs)
            if len(inputs) == 1:
                return [run_one(items.in_threads(None), inputs[0], return_exceptions=return_exceptions)]
            return gather(items.fan(return_exceptions=return_exceptions), inputs)

        async def abatch(
            self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
        ) -> list[Any]:
            """Run the async side on every input, in a task each, and return the outputs in order.

            `max_concurrency` tasks are alive at once, or else somewhat more than the limit admits calls, or else
            all. The first error cancels the others and is raised when they have ended.
            """
            self._warn_of_traps(len(inputs), bounded=is_bounded(config))
            items = _items(self, inputs, config, kwargs)
            return await agather(items.start, inputs, items.tasks, return_exceptions=return_exceptions)

        def batch_as_completed(
            self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
        ) -> Generator[tuple[int, Any]]:
            """Run as `batch` does and yield index and output as each input ends; leaving the loop stops the rest."""
            items = _items(self, inputs, config, kwargs)
            return as_completed(items.fan(return_exceptions=return_exceptions), inputs)

        def abatch_as_completed(
            self, inputs: Sequence[Any], config: Configs = None, *, return_exceptions: bool = False, **kwargs: Any
        ) -> AsyncGenerator[tuple[int, Any]]:
            """Run as `abatch` does and yield index and output as each input ends; leaving the loop cancels the rest."""
            self._warn_of_traps(len(inputs), bounded=is_bounded(config))
            items = _items(self, inputs, config, kwargs)
            return aas_completed(items.start, inputs, items.tasks, return_exceptions=return_exceptions)


async def _fail(error: Exception) -> Never:
    try:
        raise error
    finally:
        del error  # its traceback holds this frame


def _items(runnable: Any, inputs: Sequence[Any], config: Configs, kwargs: dict[str, Any]) -> Items:
    return Items(runnable, config, get_config_list(config, _count(config, inputs)), kwargs)


def layers(runnable: object) -> list[Any]:
    """Return the bindings that a runnable is, from the outside in, and last what they bind."""
    its: Any = runnable
    return [its, *layers(its.bound)] if isinstance(runnable, RunnableBindingBase) else [its]


def _count(config: Configs, inputs: Sequence[Any]) -> int:
    """Return how many configs to ask LangChain for, which makes one for each input.

    Where one config serves all, two of them do for any number: the first, which alone keeps the run id, and another.
    A list of configs is taken whole; without inputs it has no length to agree with but its own.
    """
    _check_configs(config)
    return len(inputs) or len(config) if isinstance(config, Sequence) else min(max(len(inputs), 1), 2)


def is_bounded(config: Configs) -> bool:
    """Tell whether a batch with this config, or these, has a bound of its own on the calls in flight."""
    _check_configs(config)
    first = next(iter(config), None) if isinstance(config, Sequence) else config
    return ensure_config(first).get("max_concurrency") is not None


def _check_configs(config: object) -> None:
    """Check that these can be the configs of a batch.

    Raises:
        TypeError: it is neither a config nor a list of them.
    """
    if isinstance(config, str) or not isinstance(config, (Mapping, Sequence, NoneType)):
        raise TypeError(
            f'config={config!r}: must be one config, as in {{"tags": ["t"]}}, or a list of one for each input'
        )
