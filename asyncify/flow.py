"""`each` and `aeach`: any runnable over any iterable, as a stream of results.

The two drivers, `_drive` and `_adrive`, are built alike. A source gives inputs as there is room for them, a fan-out
runs them, a journal skips inputs that a checkpoint has and records the others, and a line hands out the results in
order.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import AsyncExitStack, ExitStack
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

from langchain_core.runnables.base import Runnable
from langchain_core.runnables.config import RunnableConfig, get_config_list

from asyncify.arguments import check_bound
from asyncify.background import background
from asyncify.batches import Items, layers
from asyncify.checkpoint import Checkpoint, Codec
from asyncify.fanout import BlockingFan, Ended, Tasks, Threads, Width, outcome, raise_or_note
from asyncify.fingerprints import work_of
from asyncify.journal import Journal, Key
from asyncify.loop_tasks import LoopTasks
from asyncify.pools import ThreadPool
from asyncify.progress import Report, reporting
from asyncify.signatures import is_async

__all__ = ["aeach", "each"]

Input = TypeVar("Input")
Output = TypeVar("Output")

_DEFAULT_WINDOW = 64
"""The window where neither `window`, nor `max_concurrency`, nor a limit sets one."""


class _Line:
    """Results that wait for their turn, in the order of their inputs, or else in the order in which they were put."""

    def __init__(self, *, ordered: bool) -> None:
        self._ordered = ordered
        self._results: dict[int, Ended] = {}
        self._put = 0
        self._popped = 0

    def put(self, *group: Ended) -> None:
        for ended in group:
            self._results[ended[0] if self._ordered else self._put] = ended
            self._put += 1

    def is_ready(self) -> bool:
        """Tell whether the next result in turn is there."""
        return self._popped in self._results

    def pop(self, tell: Callable[[int, int], None]) -> Ended:
        """Return the next result in turn, and report it to the progress function."""
        ended = self._results.pop(self._popped)
        self._popped += 1
        tell(1, ended[2] is not None)
        return ended


@overload
def each(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[True] = True,
    window: int | None = None,
    return_exceptions: Literal[False] = False,
    via: Literal["threads", "async"] = "threads",
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> Generator[Output]: ...


@overload
def each(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[True] = True,
    window: int | None = None,
    return_exceptions: bool,
    via: Literal["threads", "async"] = "threads",
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> Generator[Output | Exception]: ...


@overload
def each(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[False],
    window: int | None = None,
    return_exceptions: Literal[False] = False,
    via: Literal["threads", "async"] = "threads",
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> Generator[tuple[int, Output]]: ...


@overload
def each(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[False],
    window: int | None = None,
    return_exceptions: bool,
    via: Literal["threads", "async"] = "threads",
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> Generator[tuple[int, Output | Exception]]: ...


def each(
    runnable: Runnable[Any, Any],
    inputs: Iterable[Any],
    *,
    config: RunnableConfig | None = None,
    ordered: bool = True,
    window: int | None = None,
    return_exceptions: bool = False,
    via: Literal["threads", "async"] = "threads",
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Key | None = None,
    codec: Codec = "json",
) -> Generator[Any]:
    """Run a runnable on each input and yield the outputs, while further inputs are in flight.

    The source is read in the caller's thread, and only while there is room in the window; it may be endless. An error
    in the source is raised once the results of all inputs before it have been yielded. Leaving the loop ends the
    calls in flight, waits for them, and closes the source if it is a generator.

    Args:
        runnable: anything that LangChain can run.
        inputs: any iterable.
        config: the config of every run.
        ordered: yield the outputs in the order of the inputs; otherwise yield index and output, as each input ends.
        window: the most inputs that may be in flight or have a result that is not yet yielded; by default twice the
            pair's limit, or twice `max_concurrency`, or else 64.
        return_exceptions: yield an exception in the place of the output, instead of raising it; a `CheckpointError`
            in the place of an output that the checkpoint can't keep.
        via: run the sync side in threads; or the async side on a background event loop.
        progress: show a bar; or a function that is called after every result with a `Progress`.
        checkpoint: an SQLite file that records each input that has ended. An input whose output it has is not run
            again; an input that has failed is.
        key: a function that returns the string by which the checkpoint knows an input; by default the input
            itself, if it is short, or else a digest of it.
        codec: how the checkpoint keeps outputs: "json", or "pickle", which runs code when it is read.

    Raises:
        TypeError, ValueError: an argument is invalid; raised by the call itself, before anything is iterated.
        CheckpointError: the file belongs to other work or is damaged, or can't keep an output.
    """
    if isinstance(inputs, AsyncIterable) and not _is_iterable(inputs):
        raise TypeError("each() takes an iterable, and this is an async one; write `async for output in aeach(...)`")
    if via not in ("threads", "async"):
        raise ValueError(f'via={via!r}: must be "threads" or "async"')
    options = _Options(
        runnable,
        inputs,
        config=config,
        window=window,
        progress=progress,
        checkpoint=checkpoint,
        key=key,
        codec=codec,
    )
    return _drive(options, inputs, via, ordered=ordered, return_exceptions=return_exceptions)


@overload
def aeach(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input] | AsyncIterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[True] = True,
    window: int | None = None,
    return_exceptions: Literal[False] = False,
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> AsyncGenerator[Output]: ...


@overload
def aeach(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input] | AsyncIterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[True] = True,
    window: int | None = None,
    return_exceptions: bool,
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> AsyncGenerator[Output | Exception]: ...


@overload
def aeach(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input] | AsyncIterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[False],
    window: int | None = None,
    return_exceptions: Literal[False] = False,
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> AsyncGenerator[tuple[int, Output]]: ...


@overload
def aeach(
    runnable: Runnable[Input, Output],
    inputs: Iterable[Input] | AsyncIterable[Input],
    *,
    config: RunnableConfig | None = None,
    ordered: Literal[False],
    window: int | None = None,
    return_exceptions: bool,
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Callable[[Input], str] | None = None,
    codec: Codec = "json",
) -> AsyncGenerator[tuple[int, Output | Exception]]: ...


def aeach(
    runnable: Runnable[Any, Any],
    inputs: Iterable[Any] | AsyncIterable[Any],
    *,
    config: RunnableConfig | None = None,
    ordered: bool = True,
    window: int | None = None,
    return_exceptions: bool = False,
    progress: bool | Report = False,
    checkpoint: str | PathLike[str] | None = None,
    key: Key | None = None,
    codec: Codec = "json",
) -> AsyncGenerator[Any]:
    """Run a runnable on each input and yield the outputs, while further inputs are in flight.

    Like `each`, with the same options except `via`: it runs the async side, in a task for each input. The source may be
    async too; a task of its own reads it, so results come out even while the source takes its time.
    """
    options = _Options(
        runnable,
        inputs,
        config=config,
        window=window,
        progress=progress,
        checkpoint=checkpoint,
        key=key,
        codec=codec,
    )
    return _adrive(options, inputs, ordered=ordered, return_exceptions=return_exceptions)


class _Options:
    """The arguments of `each` or `aeach`, checked when it is called and used when it is iterated."""

    def __init__(
        self,
        runnable: Runnable[Any, Any],
        inputs: object,
        *,
        config: RunnableConfig | None,
        window: int | None,
        progress: bool | Report,
        checkpoint: str | PathLike[str] | None,
        key: Key | None,
        codec: Codec,
    ) -> None:
        _check_runnable(runnable)
        if not _is_iterable(inputs) and not isinstance(inputs, AsyncIterable):
            raise TypeError(f"inputs={inputs!r}: must be an iterable of inputs, as in [{inputs!r}]")
        _check_config(config)
        _check_progress(progress)
        _check_checkpoint(checkpoint, key, codec)
        self.name = runnable.get_name()
        self.progress = progress
        self.key = key
        self.open_checkpoint: Callable[[], Checkpoint] | None = None
        if checkpoint is not None:
            path = Path(checkpoint).absolute()  # now: the working directory may have changed when it is opened
            self.open_checkpoint = partial(Checkpoint, path, work_of(runnable), codec, has_key=key is not None)
        self._inputs: Any = inputs
        self._asked_window = check_bound("window", window)
        config = _bounded(config, runnable)
        self.items = partial(Items, runnable, config, get_config_list(config, 2), {})
        """Makes the object that runs the inputs, in the context in which this is called."""
        self.items()  # raises at once for a wrong max_concurrency

    def total(self) -> int | None:
        """Return the number of inputs, if it is known and a progress is shown: to count them may fetch them all."""
        if self.progress is False:
            return None
        try:
            return len(self._inputs)
        except TypeError:  # a wrapper of a generator may have a `__len__` that fails
            return None

    def window(self, items: Items) -> float:
        """Return how many inputs may be in flight or waiting to be yielded at this moment."""
        if self._asked_window is not None:
            return self._asked_window
        bound = items.bound()
        return _DEFAULT_WINDOW if bound is None else 2 * bound


class _Inputs:
    """An iterable that is read one input at a time, by its owner's thread."""

    def __init__(self, inputs: Iterable[Any]) -> None:
        values = iter(inputs)
        self._values = values
        self._close = values.close if isinstance(values, Generator) else None
        self._read = 0
        self._error: Exception | None = None
        self.is_done = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        self._error = None  # its traceback holds this object
        if self._close is not None:
            try:
                self._close()
            except Exception as closing:  # noqa: BLE001  (it is raised, or noted)
                raise_or_note(closing, error)

    def read(self) -> tuple[int, Any] | None:
        """Return the index and the value of the next input; None at the end or after an error."""
        try:
            value = next(self._values)
        except StopIteration:
            self.is_done = True
            return None
        except Exception as error:  # noqa: BLE001  (it is raised when its turn comes)
            self.fail(error)
            return None
        self._read += 1
        return self._read - 1, value

    def fail(self, error: Exception) -> None:
        """End the source with an error, which is raised when its turn comes."""
        self.is_done = True
        self._error = error

    def raise_error(self) -> None:
        """Raise the error that has ended the source, if one has."""
        if self._error is not None:
            raise self._error


def _drive(
    options: _Options, inputs: Iterable[Any], via: str, *, ordered: bool, return_exceptions: bool
) -> Generator[Any]:
    with background.waited_for():  # the items' tasks may call sync sides that need a loop
        items = options.items()
    window = partial(options.window, items)
    line = _Line(ordered=ordered)
    held = 0
    with ExitStack() as stack:
        checkpoint = options.open_checkpoint and options.open_checkpoint()
        journal = stack.enter_context(Journal(checkpoint, options.key, line.put, return_exceptions=return_exceptions))
        tell = stack.enter_context(reporting(options.progress, title=options.name, total=options.total()))
        fan = _fan(via, items, window, options.name, ordered=ordered, return_exceptions=return_exceptions)
        stack.callback(lambda: journal.note_last(fan.take_at_once()))
        stack.enter_context(fan)
        source = stack.enter_context(_Inputs(inputs))
        while True:
            if held < window() and not source.is_done and (item := source.read()) is not None:
                try:
                    must_run = journal.must_run(*item)
                except Exception as error:  # noqa: BLE001  (it is raised when its turn comes)
                    source.fail(error)
                else:
                    held += 1
                    if must_run:
                        fan.run([item])
            must_wait = not line.is_ready() and (held >= window() or source.is_done)
            line.put(*journal.settle(fan.take() if must_wait else fan.take_at_once()))
            source.is_done |= fan.is_over
            items.tell_of_traps()
            if line.is_ready():
                held -= 1
                result = outcome(line.pop(tell), return_exceptions=return_exceptions)
                yield result[1] if ordered else result
            elif source.is_done and not held:
                source.raise_error()
                return


def _fan(via: str, items: Items, window: Width, name: str, *, ordered: bool, return_exceptions: bool) -> BlockingFan:
    if via == "async":
        return LoopTasks(
            items.start,
            lambda: min(window(), items.tasks()),
            return_exceptions=return_exceptions,
            ordered=ordered,
        )
    return Threads(
        items.in_threads,
        lambda: min(window(), items.bound() or math.inf),
        name=name,
        return_exceptions=return_exceptions,
        ordered=ordered,
    )


async def _adrive(
    options: _Options,
    inputs: Iterable[Any] | AsyncIterable[Any],
    *,
    ordered: bool,
    return_exceptions: bool,
) -> AsyncGenerator[Any]:
    items = options.items()
    line = _Line(ordered=ordered)

    def start(index: int, value: Any) -> asyncio.Task[Any] | None:
        return items.start(index, value) if journal.must_run(index, value) else None

    width, window = items.tasks, partial(options.window, items)
    fan = Tasks(start, inputs, width, window, return_exceptions=return_exceptions, ordered=ordered)
    async with AsyncExitStack() as stack:
        checkpoint = options.open_checkpoint and await _opened(options.open_checkpoint)
        journal = await stack.enter_async_context(
            Journal(checkpoint, options.key, fan.settle, return_exceptions=return_exceptions)
        )
        tell = stack.enter_context(reporting(options.progress, title=options.name, total=options.total()))
        stack.callback(lambda: journal.note_last(fan.take_at_once()))
        await stack.enter_async_context(fan)
        while group := await fan.take():
            line.put(*await journal.asettle(group))
            del group  # an error's traceback holds this frame
            items.tell_of_traps()
            while line.is_ready():
                fan.free()
                result = outcome(line.pop(tell), return_exceptions=return_exceptions)
                yield result[1] if ordered else result


async def _opened(open_checkpoint: Callable[[], Checkpoint]) -> Checkpoint:
    """Open a checkpoint in a thread, as opening checks the whole file."""
    opening = ThreadPool(1, "asyncify-checkpoint").submit(open_checkpoint)
    try:
        return await asyncio.wrap_future(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_unused)
        raise


def _close_unused(opening: Future[Checkpoint]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        opening.result().__exit__()


def _check_runnable(runnable: object) -> None:
    if not isinstance(runnable, Runnable):
        raise TypeError(
            f"each() and aeach() take a runnable, not {runnable!r}; make one of a function, as in "
            "each(dual(fetch), inputs)"
        )


def _is_iterable(inputs: object) -> bool:
    """Tell whether a `for` loop takes the inputs, without beginning one."""
    return isinstance(inputs, Iterable) or hasattr(type(inputs), "__getitem__")


def _check_config(config: object) -> None:
    if config is not None and not isinstance(config, dict):
        raise TypeError(
            f'config={config!r}: must be one config for all inputs, as in config={{"tags": ["t"]}}; '
            "a config for each goes to batch"
        )


def _check_progress(progress: object) -> None:
    if isinstance(progress, bool):
        return
    if not callable(progress) or is_async(progress):
        raise TypeError(
            f"progress={progress!r}: must be True, False or a function that is called with a Progress and not awaited, "
            "as in progress=print"
        )


def _check_checkpoint(checkpoint: object, key: object, codec: str) -> None:
    path: Any = checkpoint
    if codec not in ("json", "pickle"):
        raise ValueError(f'codec={codec!r}: must be "json" or "pickle"')
    if key is not None and (not callable(key) or is_async(key)):
        raise TypeError(f'key={key!r}: must be a def of an input, as in key=lambda document: document["id"]')
    if checkpoint is None:
        if key is not None:
            raise TypeError('key= names inputs in a checkpoint; give that too, as in checkpoint="run.sqlite"')
        if codec != "json":
            raise TypeError('codec= is how a checkpoint keeps outputs; give that too, as in checkpoint="run.sqlite"')
    elif not isinstance(checkpoint, (str, PathLike)):
        raise TypeError(f'checkpoint={checkpoint!r}: must be the path of a file, as in checkpoint="run.sqlite"')
    elif fspath(path) in ("", ":memory:"):  # SQLite makes no lasting file of these
        raise ValueError(f'checkpoint={checkpoint!r}: must be the path of a file, as in checkpoint="run.sqlite"')


def _bounded(config: RunnableConfig | None, runnable: object) -> RunnableConfig | None:
    """Return the config, with the `max_concurrency` of the outermost binding that has one if it has none itself."""
    configs: list[RunnableConfig] = [config or {}, *(binding.config for binding in layers(runnable)[:-1])]
    asked = next((bound for one in configs if (bound := one.get("max_concurrency")) is not None), None)
    return config if asked is None else {**(config or {}), "max_concurrency": asked}
