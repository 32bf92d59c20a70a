"""Held permits: which calls can't end while a thread or a task waits.

A permit that a context has inherited proves nothing: a task left running in the background has inherited it too. Nor
does a permit of `enter()`, as whoever it is given to may leave it. These are proofs:

- A thread holds the permits that were entered in it or have moved to it.
- A task holds the permits that were entered in its own context. A token can be reset only in the context that it was
  made in, and every task has a context of its own, so the token tells whether this very task has entered. (If tasks
  share a context, no deadlock is certain.)
- A task also holds the permits of the tasks that await it and nothing else; its done callbacks lead to them.
  (A task that awaits several at once is found by `lookout`, which looks at all of these together.)
- A waiter hands its permits on to the work that it waits for in another thread or task, by a `Link`.
- A thread that waits for several others can't go on once all of them are stuck: each has a `Hand` for it (`crews`).
- An event loop that is held up stops all its tasks: a `Standstill` stands for their permits.
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from _thread import get_ident
from asyncio import _get_running_loop, base_events
from collections.abc import Collection, Iterable
from contextlib import suppress
from contextvars import Context, ContextVar, Token
from typing import Any, Self, cast

from asyncify.forks import in_worker
from asyncify.permits import Issuer, Permit, get_innermost, innermost, permits

__all__ = [
    "Link",
    "Standstill",
    "Steps",
    "Waiter",
    "callbacks_of",
    "hands_of_this_thread",
    "held_by_this_task",
    "held_by_this_thread",
    "held_by_waiters_for",
    "loose",
    "stopped_with",
    "waiting_for",
]


def held_by_this_thread() -> list[Permit]:
    """Return the permits that can't end while this thread is held up."""
    thread = get_ident()
    held = [permit for permit in permits() if permit.thread == thread]
    for link in tuple(_here.links):
        held += link.alive()
    held += tuple(_here.hands)
    return list(dict.fromkeys(held))


def held_by_this_task() -> list[Permit]:
    """Return the permits that can't end while this task is held up."""
    if innermost.get() is None and _link.get() is None:
        return []
    held = _held_by_this_context() + held_by_waiters_for(asyncio.current_task())
    if held:
        loop_of[get_ident()] = asyncio.get_running_loop()
    return list(dict.fromkeys(held))


def _held_by_this_context() -> list[Permit]:
    """Return the permits that were entered in this very context or handed over to it."""
    entered: list[Permit] = []
    for permit in permits():
        token = getattr(permit, "token", None)  # an interrupt may have come before the token was stored
        if isinstance(permit, Standstill) or token is None or not _is_own(innermost, token):
            break
        entered.append(permit)
    for permit in reversed(entered):
        permit.begin()  # the check has spent the tokens: enter again
    held = [permit for permit in entered if permit.thread]  # 0 for those of `enter()`, which anybody may leave
    link = _link.get()
    if link is not None and link.is_waited_for and _is_own(_link, link.token):
        link.begin()
        held += link.alive()
    return held


def held_by_waiters_for(future: Any) -> list[Permit]:
    """Return the permits that can't end before this future has ended.

    They belong to the tasks that await it and nothing else, to the tasks that await these in turn, and to a thread
    that runs an event loop until one of these tasks has ended.
    """
    held: list[Permit] = []
    chain = [future]
    for awaited in chain:
        for callback, context in callbacks_of(awaited):
            waiter, its = waiting_for(awaited, callback, context)
            held += its
            if waiter is not None:
                chain.append(waiter)
    return list(dict.fromkeys(held))


def callbacks_of(awaited: Any) -> Iterable[tuple[Any, Context]]:
    """Return the done callbacks of a task or a future, each with its context."""
    return getattr(awaited, "_callbacks", None) or ()


def waiting_for(awaited: Any, callback: Any, context: Context) -> tuple[Any, list[Permit]]:
    """Return the task that awaits `awaited` and nothing else, if this is its callback, and the permits that it holds.

    For the callback that ends `run_until_complete`, the permits are a standstill for those of the loop's thread.
    """
    waiter = getattr(callback, "__self__", None)
    if getattr(waiter, "_fut_waiter", None) is awaited:
        return waiter, _held_by_another(context)
    if callback is _end_of_loop and (around := context.run(held_by_this_thread)):
        return None, [_LoopRun(awaited, around)]
    return None, []


_end_of_loop = getattr(base_events, "_run_until_complete_cb", None)
"""The done callback of `run_until_complete`, and so of `asyncio.run`; its context is a copy of the caller's."""


def _held_by_another(context: Context | None) -> list[Permit]:
    """Return the permits that a waiting task holds in its context and in those of the streams it takes a step of."""
    held: list[Permit] = []
    with suppress(RuntimeError):  # the current task shares that context, so its permits are known already
        while context is not None:
            held += context.run(_held_by_this_context)
            context = context.run(_stepped_in)
    return held


class Waiter:
    """A thread or a task that waits for something, and the permits that can't end while it does.

    Attributes:
        held: the permits that it holds.
        standstill: the one in `held` for the tasks of the event loop that it holds up; None if there is no such loop.
    """

    __slots__ = ("held", "standstill")

    def __init__(self, held: list[Permit] | None = None) -> None:
        self.held: list[Permit] = [] if held is None else held
        self.standstill: Standstill | None = None

    def hold_up_this_thread(self) -> None:
        """Record what this thread, about to wait, holds, and a standstill for the tasks if an event loop runs here."""
        self.held = held_by_this_thread()
        if _get_running_loop() is not None:
            self.standstill = _LoopHeldUp(self)
            self.held.append(self.standstill)

    def let_go(self) -> list[Permit]:
        """Record that the waiter goes on, and return the permits that it held."""
        held, self.held = self.held, []
        self.standstill = None
        return held


class Link(Waiter):
    """Hands the permits of a waiter on to the work that it waits for, which runs in another thread, task or context.

    A sync call that waits for a coroutine on the background loop keeps its permits until the coroutine has ended: so if
    the coroutine waits for a limiter in turn, it holds them too.

    `lead_to` or `begin` puts the work's context at the end of the link, and a `with` in the work's thread puts that
    thread there for as long as the waiter waits. The waiter calls `leave` when it goes on, even if the work still runs;
    the work calls `end` when nothing more will run in its context. A stream has one link for all its chunks: its reader
    sets `held` anew for each chunk, as another reader may ask for the next.
    """

    __slots__ = ("is_waited_for", "token")

    token: Token[Link | None]

    def __init__(self, held: list[Permit] | None = None) -> None:
        super().__init__(held)
        self.is_waited_for: bool = False

    def lead_to(self, context: Context) -> Self | None:
        """Put a context at the link's end: the waiter waits for what will run there, and for nothing else.

        Returns:
            the link, for the work's thread to enter for as long as the work is waited for; None if the waiter holds
            nothing.
        """
        if not self.held:
            return None
        context.run(self.begin)
        return self

    def begin(self) -> None:
        """Put this context at the link's end."""
        self.token = _link.set(self)

    def alive(self) -> list[Permit]:
        """Return the held permits that have not ended; none when the waiter no longer waits."""
        return [permit for permit in self.held if not permit.ended] if self.is_waited_for else []

    def __enter__(self) -> None:
        """Put this thread at the link's end, too, as the work begins."""
        self.is_waited_for = True
        _here.links.add(self)
        if self.held:
            _come_under(next((permit for permit in self.held if not isinstance(permit, Standstill)), _something))

    def __exit__(self, *_: object) -> None:
        """Take this thread off the link's end: the waiter is about to get its answer and to go on."""
        self.is_waited_for = False
        self.let_go()
        _here.links.discard(self)

    def leave(self) -> None:
        """Record that the waiter waits no longer, even if the work still runs."""
        held = self.let_go()
        if self.is_waited_for:
            loose.update(held)

    def end(self) -> None:
        """Break the reference cycle with the context, once nothing more will run in it."""
        del self.token


loop_of: weakref.WeakValueDictionary[int, asyncio.AbstractEventLoop] = weakref.WeakValueDictionary()
"""By thread, the loop that last ran there when one of its tasks was asked what it holds."""

loose: weakref.WeakSet[Permit] = weakref.WeakSet()
"""Permits whose holder went on before the work it had waited for was over: what that work waits for proves nothing."""

_link: ContextVar[Link | None] = ContextVar("asyncify_link", default=None)


class Standstill(Permit):
    """Stands for others' permits that can't end while something lasts: those of the tasks of a loop held up, say.

    `among` looks these permits up, only when a deadlock is looked for. A standstill belongs to no call; it is a
    `Permit` so that it can be listed among held permits, and a context can run under it.
    """

    __slots__ = ()

    def __init__(self) -> None:
        self.ask(cast("Issuer", None), 0, 0)
        self.thread = 0

    def holds_up_loop(self) -> bool:
        """Tell whether it stands for tasks of an event loop that is held up."""
        return False

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        """Return the permits inside a limiter that it stands for; none once the standstill is over."""
        raise NotImplementedError


class _Something(Standstill):
    """Stands for no permits; a context that runs under it shows that something is held there."""

    __slots__ = ()

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        return set()


_something = _Something()


def stopped_with(held: Collection[Permit], inside: Collection[Permit]) -> set[Permit]:
    """Return the permits inside a limiter that are among `held`, or that a standstill in `held` stands for."""
    standstills = [other for other in held if isinstance(other, Standstill) and other not in loose]
    return set(inside).intersection(held).union(*(standstill.among(inside) for standstill in standstills))


class _LoopHeldUp(Standstill):
    """Stands for the permits of all tasks of the event loop whose thread waits."""

    __slots__ = ("_loop_thread", "_waiter")

    def __init__(self, waiter: Waiter) -> None:
        super().__init__()
        self._waiter = waiter
        self._loop_thread = get_ident()

    def holds_up_loop(self) -> bool:
        return True

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        if self._waiter.standstill is not self:
            return set()
        return {permit for permit in inside if permit.thread == self._loop_thread}


class _LoopRun(Standstill):
    """Stands for the permits of a thread that runs an event loop until a task has ended, or until it is stopped."""

    __slots__ = ("_held", "_task")

    def __init__(self, task: Any, held: list[Permit]) -> None:
        super().__init__()
        self._task = task
        self._held = held

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        if not any(callback is _end_of_loop for callback, _ in self._task._callbacks or ()):
            return set()
        return stopped_with(self._held, inside)


class _Here(threading.local):
    """The links that end in this thread, and its hands: one for each crew that it works for."""

    def __init__(self) -> None:
        self.links: set[Link] = set()
        self.hands: set[Standstill] = set()


_here = _Here()


def hands_of_this_thread() -> set[Standstill]:
    """Return this thread's hands, which stand for the callers of the crews that it works for."""
    return _here.hands


class Steps:
    """The steps of a stream, which are taken in the stream's own context, not in that of the reading task or thread."""

    __slots__ = ("_innermost", "_link", "_reader", "context", "token")

    token: Token[Steps | None]

    def __init__(self, context: Context) -> None:
        self.context: Context = context
        self._link: Link | None = None
        self._reader: weakref.ref[Any] | None = None
        self._innermost: Permit | None = None

    def begin(self) -> None:
        """Record that this context, the reader's, waits for a step, and for nothing else, until `end()`."""
        if (permit := get_innermost()) is not None or self._innermost is not None:
            self._hand_over(permit)
        self.token = _steps.set(self)

    def _hand_over(self, permit: Permit | None) -> None:
        task = None if _get_running_loop() is None else asyncio.current_task()
        if self._link is None:
            self._link = Link()
            self.context.run(self._link.begin)
        is_another = permit is not self._innermost or self._reader is None or self._reader() is not task
        if is_another or _link.get() is not None:  # over a bridge, the reader may have changed too
            self._innermost, self._reader = permit, None if task is None else weakref.ref(task)
            self._link.held = [] if task is None else held_by_this_task()
            self.context.run(_come_under, permit)
        self._link.is_waited_for = True

    def end(self) -> None:
        """Record that the reader no longer waits for a step."""
        if self._link is not None:
            self._link.is_waited_for = False
        try:  # noqa: SIM105  (`suppress` takes four times as long, and this is done for each chunk)
            _steps.reset(self.token)
        except (ValueError, RuntimeError):
            pass  # a garbage collector closes the stream, in whatever context that runs

    def close(self) -> None:
        """Let go of the stream's context."""
        if self._link is not None:
            self._link.end()


def _come_under(permit: Permit | None) -> None:
    """Run this context under a permit if it is under none, as held permits are looked for only under a permit."""
    if next(permits(), None) is None:
        innermost.set(permit)


_steps: ContextVar[Steps | None] = ContextVar("asyncify_steps", default=None)


def _stepped_in() -> Context | None:
    """Return the stream's context in which the task of this context takes a step; None if it takes none."""
    steps = _steps.get()
    if steps is None or not _is_own(_steps, steps.token):
        return None
    steps.token = _steps.set(steps)
    return steps.context


def _is_own(variable: ContextVar[Any], token: Token[Any]) -> bool:
    """Tell whether a token was made in this very context, not in one that this was copied from; spends the token."""
    try:
        variable.reset(token)
    except (ValueError, RuntimeError):
        return False
    return True


def _forget_waits() -> None:
    _link.set(None)
    _steps.set(None)
    _here.hands.clear()


in_worker(_forget_waits)
