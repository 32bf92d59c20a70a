"""`watch`: runs async sides step by step under a timer, and tells of steps that held the event loop.

A step is what runs from one await to the next. While it runs, nothing else does on its event loop.
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
"""How often a step is looked at before it has lasted for the threshold, so that the line is that of most of it."""

_KEPT = 1000
"""Records that a watch keeps, for one that is set by the environment lasts as long as the program."""

_FOREIGN = (
    "<frozen ",
    f"{Path(__file__).parent}{os.sep}",
    *{sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")},
)
"""How the names of files begin that hold nobody's own code: this package, the standard library, what was installed."""


@dataclass(frozen=True, slots=True)
class Place:
    """A line of somebody's code."""

    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{self.function} ({Path(self.file).name}:{self.line})"


@dataclass(frozen=True, slots=True)
class HeldLoop:
    """A step of an async side that held its event loop.

    `since` is the await that the step went on from, None at the start of the call. `at` is where it was seen most of
    the time: the innermost line of one's own code, None where nobody could look, as in C code that stops all threads.
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
    """Time each step of every pair's async side while it is on, and warn of those over the threshold.

    A context manager, and a decorator for a `def` or an `async def`. It watches the calls of the whole process that
    begin while it is on, but no tasks that they start, by `asyncio.gather` or a task group say, unless those call a
    pair themselves. Each finding is a `BlockingWarning` and a record. `ASYNCIFY_WATCH=1` in the environment puts one on
    for the whole program.

    Args:
        threshold: seconds that a step may hold its loop.

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
        """Look at the stacks of steps that are under way, again and again, from a thread of its own."""
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
    """What runs one function while there is a watch, and another while there is none."""

    def _set_watched(self, *, on: bool) -> None:
        """Be told which; quickly, for a lock is held."""


_watches: tuple[Watch, ...] = ()
_watchables: WeakValueDictionary[int, Watchable] = WeakValueDictionary()  # by `id`: pairs may be equal
_changing = threading.RLock()  # a finalizer may make a pair in the middle of it


def subscribe(watchable: Watchable) -> None:
    """Tell it now whether there is a watch, and again whenever that changes, for as long as it lives."""
    with _changing:
        _watchables[id(watchable)] = watchable
        watchable._set_watched(on=bool(_watches))


def _set_watches(watches: tuple[Watch, ...]) -> None:
    global _watches  # noqa: PLW0603  (a new tuple each time: steps under way read it without the lock)
    changes = bool(watches) != bool(_watches)
    _watches = watches
    if changes:
        for ref in _watchables.valuerefs():  # a list of its own, unlike what the dictionary iterates over
            if (watchable := ref()) is not None:
                watchable._set_watched(on=bool(watches))


class _Step:
    """What runs from one await to the next."""

    __slots__ = ("began", "inner", "seen")

    def __init__(self) -> None:
        self.inner = 0.0  # seconds of it that are steps of other pairs
        self.seen: Counter[Line] | None = None
        self.began = perf_counter()

    def look(self, thread: int) -> None:
        """Note the line that this step is at; called by another thread."""
        frame = sys._current_frames().get(thread)
        lines: list[Line] = []
        while frame is not None and frame.f_code is not _STEPPED:
            lines.append((frame.f_code, frame.f_lineno))
            frame = frame.f_back
        if lines and frame is not None and _running.get(thread) is self:  # else it has ended meanwhile
            self.seen = self.seen or Counter()
            self.seen[_own_line(lines)] += 1


_running: dict[int, _Step] = {}
"""The innermost step that is under way in each thread."""


@coroutine
def _stepped(steps: Any, body: object, pair: str, *, begun: bool) -> Generator[Any, Any, Any]:
    """Await `steps`, whose code is that of `body`, step by step under the timer."""
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
                hidden = (BlockingWarning,)  # made an error, it would hide the call's own
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
            except BaseException as error:  # noqa: BLE001  (it is the coroutine's)
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
    """Return an async function that does what `fn` does, step by step under the timer."""

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
    """Return where a coroutine that has begun waits, the innermost line first."""
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
    """Return the innermost line of one's own code, or else the outermost, which is the pair's function."""
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


# Nothing is half changed in a child: no other thread changes anything while the process is forked.
at_fork(before=_changing.acquire, after_in_parent=_changing.release, after_in_child=_look_around_again)

if os.environ.get("ASYNCIFY_WATCH", "").lower() not in ("", "0", "false", "no", "off"):
    Watch().__enter__()
