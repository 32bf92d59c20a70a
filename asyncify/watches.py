"""`watch`: runs async sides step by step under a timer, and warns of steps that held the event loop.

A step is the code that runs from one await to the next. While it runs, nothing else runs on its event loop.
"""

from __future__ import annotations

import inspect
import math
import os
import sys
import sysconfig
import threading
import warnings
from _thread import get_ident
from collections import Counter, deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Generator
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from types import AsyncGeneratorType, CodeType, CoroutineType, TracebackType, coroutine
from typing import Any, ParamSpec, Protocol, Self, TypeVar, cast
from weakref import WeakValueDictionary

from asyncify.arguments import check_positive
from asyncify.blocks import Block
from asyncify.errors import BlockingWarning
from asyncify.forks import at_fork
from asyncify.relay import Relay

__all__ = ["HeldLoop", "Place", "Watch", "subscribe", "timed", "watch"]

P = ParamSpec("P")
T = TypeVar("T")
Function = Callable[..., Any]
Line = tuple[CodeType, int]

_LOOKS = 4
"""How many samples of a step's stack are taken within the threshold: the line reported is the most frequent one."""

_KEPT = 1000
"""How many records a watch keeps; a bound, as a watch set by the environment lasts as long as the program."""

_FOREIGN = (
    "<frozen ",
    f"{Path(__file__).parent}{os.sep}",
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
)
"""Prefixes of the names of files that hold no code of the user's own: this package, the stdlib, installed packages."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line of code, with its file and function."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


@dataclass(frozen=True, slots=True)
class HeldLoop:
    """A step of an async side that held its event loop.

    `since` is the await that the step went on from, None if it was the call's first step. `at` is the line where the
    step was seen most often: the innermost line of the user's own code, None if it was never seen, as in C code that
    keeps the GIL.
    """

    pair: str
    seconds: float
    since: Place | None
    at: Place | None

    def __str__(self) -> str:
        where = "" if self.at is None else f" in {self.at}"
        since = "from its start" if self.since is None else f"after the await in {self.since}"
        return (
            f"{self.pair} held the event loop for {self.seconds * 1000:.0f} ms{where}, {since}; await an async client "
            "there, or run it in a thread, as in await asyncio.to_thread(...)"
        )


class Watch(Block):
    """Time each step of every pair's async side while the watch is on, and warn of steps over the threshold.

    A watch is a context manager, and a decorator for a `def` or an `async def`. It watches all calls in the process
    that begin while it is on. It does not watch the tasks that these calls start, by `asyncio.gather` or a task group,
    say, unless a task calls a pair itself. Each finding is a `BlockingWarning` and a record. `ASYNCIFY_WATCH=1` in the
    environment turns a watch on for the whole program.

    Args:
        threshold: the most seconds that a step may hold its loop.

    Attributes:
        held: the findings, the last 1,000 at most.
    """

    def __init__(self, threshold: float = 0.05) -> None:
        self.threshold: float = check_positive("threshold", threshold, "watch(threshold=0.05)")
        self.held: deque[HeldLoop] = deque(maxlen=_KEPT)
        self._entered = 0

    def __enter__(self) -> Self:
        """Begin to watch."""
        with _changing:
            if not self._entered:
                self._look_around()
                _set_watches((*_watches, self))
            self._entered += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Stop watching."""
        with _changing:
            self._entered -= 1
            if self._entered:
                return
            _set_watches(tuple(watch for watch in _watches if watch is not self))
            over, thread = self._over, self._thread
        over.set()
        thread.join()

    def _around_a_call(self) -> Self:
        return self

    def _look_around(self) -> None:
        """Start a thread that samples the stacks of the steps under way, again and again."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(self._over,), name="asyncify-watch", daemon=True)
        self._thread.start()

    def _sample(self, over: threading.Event) -> None:
        while not over.wait(self.threshold / _LOOKS):
            for thread, step in list(_running.items()):
                if perf_counter() - step.began >= self.threshold / _LOOKS:
                    step.look(thread)


watch = Watch


class Watchable(Protocol):
    """An object that runs one function while a watch is on, and another while none is."""

    def _set_watched(self, *, on: bool) -> None:
        """Switch between the two functions; quickly, as a lock is held."""


_watches: tuple[Watch, ...] = ()
_watchables: WeakValueDictionary[int, Watchable] = WeakValueDictionary()  # by `id`: pairs may be equal
_changing = threading.RLock()  # re-entrant: a finalizer may make a pair while it is held


def subscribe(watchable: Watchable) -> None:
    """Tell an object now whether a watch is on, and again at each change for as long as the object lives."""
    with _changing:
        _watchables[id(watchable)] = watchable
        watchable._set_watched(on=bool(_watches))


def _set_watches(watches: tuple[Watch, ...]) -> None:
    global _watches  # noqa: PLW0603  (a new tuple each time: steps under way read it without the lock)
    changes = bool(watches) != bool(_watches)
    _watches = watches
    if changes:
        for ref in _watchables.valuerefs():  # a copy, as the dictionary may change meanwhile
            if (watchable := ref()) is not None:
                watchable._set_watched(on=bool(watches))


class _Step:
    """The code that runs from one await to the next, as it is timed and sampled."""

    __slots__ = ("began", "inner", "seen")

    def __init__(self) -> None:
        self.inner = 0.0  # seconds within it that were steps of other pairs
        self.seen: Counter[Line] | None = None
        self.began = perf_counter()

    def look(self, thread: int) -> None:
        """Count the line that this step is at in its thread; called by the watch's thread."""
        frame = sys._current_frames().get(thread)
        lines: list[Line] = []
        while frame is not None and frame.f_code is not _STEPPED:
            lines.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        if lines and frame is not None and _running.get(thread) is self:  # else the step has ended meanwhile
            self.seen = self.seen or Counter()
            self.seen[_own_line(lines)] += 1


_running: dict[int, _Step] = {}
"""By thread, the innermost step that is under way."""


@coroutine
def _stepped(steps: Any, body: object, pair: str, *, begun: bool) -> Generator[Any, Any, Any]:
    """Await `steps`, step by step under the timer; `body` is the coroutine or generator whose code they run."""
    send, value = steps.send, None
    thread = get_ident()
    try:
        while True:
            since = _lines_of(body) if begun else []
            begun = True
            outer = _running.get(thread)
            step = _running[thread] = _Step()
            hidden: tuple[type[Warning], ...] = ()
            try:
                awaited = send(value)
            except StopIteration as stop:
                return stop.value
            except StopAsyncIteration:
                raise
            except BaseException:
                hidden = (BlockingWarning,)  # as an error, by a warnings filter, it would hide the call's own
                raise
            finally:
                seconds = perf_counter() - step.began
                if outer is None:
                    del _running[thread]
                else:
                    outer.inner += seconds
                    _running[thread] = outer
                if seconds - step.inner > min((watch.threshold for watch in _watches), default=math.inf):
                    with suppress(*hidden):
                        _tell(pair, seconds - step.inner, since, step)
            try:
                value = yield awaited
                send = steps.send
            except GeneratorExit:
                raise
            except BaseException as error:  # noqa: BLE001  (it is thrown into the coroutine)
                send, value = steps.throw, error
    finally:
        steps.close()


_STEPPED = _stepped.__code__


async def _watched(fn: Callable[[], Awaitable[T]], pair: str) -> T:
    made = fn()  # only now, or a task that is cancelled before its first step would leave it behind
    return cast("T", await _stepped(made, made, pair, begun=False)) if inspect.iscoroutine(made) else await made


async def _watched_chunks(chunks: AsyncGenerator[T, Any], pair: str) -> AsyncGenerator[T]:
    begun = False
    async with aclosing(chunks):
        relay = Relay(chunks)
        while True:
            try:
                chunk = await _stepped(anext(relay), chunks, pair, begun=begun)
            except StopAsyncIteration:
                return
            begun = True
            with relay:
                relay.sent = yield chunk


def timed(fn: Function, pair: str, *, is_generator: bool) -> Function:
    """Return an async function that runs `fn` step by step under the timer."""

    def run(*args: Any, **kwargs: Any) -> Any:
        return _watched(partial(fn, *args, **kwargs), pair)

    def stream(*args: Any, **kwargs: Any) -> Any:
        return _watched_chunks(fn(*args, **kwargs), pair)

    return stream if is_generator else run


def _tell(pair: str, seconds: float, since: list[Line], step: _Step) -> None:
    at = step.seen.most_common(1)[0][0] if step.seen else None
    held = HeldLoop(pair, seconds, _place(_own_line(since)) if since else None, _place(at) if at else None)
    for watching in _watches:
        if seconds > watching.threshold:
            watching.held.append(held)
    shown = held.at or held.since
    if shown is None:
        warnings.warn(BlockingWarning(str(held)), stacklevel=3)
    else:
        warnings.warn_explicit(BlockingWarning(str(held)), None, shown.file, shown.line)


def _lines_of(body: object) -> list[Line]:
    """Return the lines at which a coroutine or async generator that has begun is suspended, the innermost first."""
    lines: list[Line] = []
    while True:
        if isinstance(body, CoroutineType):
            frame, body = body.cr_frame, body.cr_await
        elif isinstance(body, AsyncGeneratorType):
            frame, body = body.ag_frame, body.ag_await
        else:
            return lines[::-1]
        if frame is not None:
            lines.append((frame.f_code, frame.f_lineno))


def _own_line(lines: list[Line]) -> Line:
    """Return the innermost line of the user's own code, or else the outermost line, which is the pair's function."""
    return next((line for line in lines if not line[0].co_filename.startswith(_FOREIGN)), lines[-1])


def _place(line: Line) -> Place:
    code, number = line
    return Place(code.co_filename, number, code.co_qualname)


def _look_around_again() -> None:
    for thread in _running.keys() - {get_ident()}:
        del _running[thread]
    for watching in _watches:
        watching._look_around()
    _changing.release()


# The lock is held over a fork, so that no other thread leaves the watches half changed in the child.
at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_look_around_again)

if os.environ.get("ASYNCIFY_WATCH", "").lower() not in ("", "0", "false", "no", "off"):
    Watch().__enter__()
