"""Which calls can't end while this one waits: what a deadlock is told by.

That a context has inherited a permit proves nothing: a task left running in the background has inherited it too. Nor
does one that was entered by `enter()`, as whoever it is given to may leave it. These are proofs:

- A thread holds what was entered in it, and what has moved to it.
- A task holds what was entered in its own context. A token can be reset only in the context that it was made in, and
  every task has a context of its own, so a token tells whether this very task has entered. (Where tasks share one,
  nobody is told.)
- It also holds what those tasks hold that await it and nothing else. They stand among what it calls back when it ends.
  (Who awaits several at once is found by `lookout`, which looks at all of them together.)
- Who waits for work in another thread or task hands on what it holds to that, by a `Link`.
- Who waits for several threads holds what it holds until all of them can't go on: a `Hand` in each says so (`crews`).
- An event loop that is held up stops all its tasks: a `Standstill` stands for what they hold.
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
        token = getattr(permit, "token", None)  # an interrupt may have come before it was kept
        if isinstance(permit, Standstill) or token is None or not _is_own(innermost, token):
            break
        entered.append(permit)
    for permit in reversed(entered):
        permit.begin()  # the tokens are spent: wind up again what was unwound
    held = [permit for permit in entered if permit.thread]  # another may leave those that were entered by `enter()`
    link = _link.get()
    if link is not None and link.is_waited_for and _is_own(_link, link.token):
        link.begin()
        held += link.alive()
    return held


def held_by_waiters_for(future: Any) -> list[Permit]:
    """Return the permits that can't end before this future has ended.

    They are those of the tasks that await it and nothing else, of the tasks that await these, and of a thread that
    runs an event loop for as long as one of them runs.
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
    """Return what a task or a future calls back at its end, each in a context."""
    return getattr(awaited, "_callbacks", None) or ()


def waiting_for(awaited: Any, callback: Any, context: Context) -> tuple[Any, list[Permit]]:
    """Return the task that awaits it and nothing else, if this is the callback of one, and what can't end before."""
    waiter = getattr(callback, "__self__", None)
    if getattr(waiter, "_fut_waiter", None) is awaited:
        return waiter, _held_by_another(context)
    if callback is _end_of_loop and (around := context.run(held_by_this_thread)):
        return None, [_LoopRun(awaited, around)]
    return None, []


_end_of_loop = getattr(base_events, "_run_until_complete_cb", None)
"""What `run_until_complete`, and so `asyncio.run`, has called back in the context of its caller."""


def _held_by_another(context: Context | None) -> list[Permit]:
    """Return what a task holds that waits, by its context and those in which it takes the steps of streams."""
    held: list[Permit] = []
    with suppress(RuntimeError):  # this task shares that context, and so what it holds is known
        while context is not None:
            held += context.run(_held_by_this_context)
            context = context.run(_stepped_in)
    return held


class Waiter:
    """A thread or a task that waits for something, and what can't go on before it does.

    Attributes:
        held: the permits that it holds.
        standstill: that of them which stands for the tasks of an event loop that it holds up; None if there is none.
    """

    __slots__ = ("held", "standstill")

    def __init__(self, held: list[Permit] | None = None) -> None:
        self.held: list[Permit] = [] if held is None else held
        self.standstill: Standstill | None = None

    def hold_up_this_thread(self) -> None:
        """Note what this thread holds, and with it what tasks do if an event loop runs here; it is about to wait."""
        self.held = held_by_this_thread()
        if _get_running_loop() is not None:
            self.standstill = _LoopHeldUp(self)
            self.held.append(self.standstill)

    def let_go(self) -> list[Permit]:
        """Note that it goes on, and return what it held."""
        held, self.held = self.held, []
        self.standstill = None
        return held


class Link(Waiter):
    """Hands on what a waiter holds to the work that it waits for, which runs in another thread, task or context.

    A sync call that waits for a coroutine on the background loop keeps its permits until that has ended: so if the
    coroutine waits for a limiter in its turn, it holds them too.

    The work's context is put at the end of the link, by `lead_to` or `begin`, and so is its thread, by a `with`, for as
    long as the waiter waits. The waiter calls `leave` when it goes on, even if the work still runs; the work calls
    `end` when nothing more will run in its context. A stream has one link for all its chunks: who asks for one says
    each time what it holds, as the next to ask may be another.
    """

    __slots__ = ("is_waited_for", "token")

    token: Token[Link | None]

    def __init__(self, held: list[Permit] | None = None) -> None:
        super().__init__(held)
        self.is_waited_for: bool = False

    def lead_to(self, context: Context) -> Self | None:
        """Put a context at its end: whoever holds these waits for what will run there, and for nothing else.

        Returns:
            what is to be entered, in the thread in which that runs, for as long as it is waited for; None if there is
            nothing to hand over.
        """
        if not self.held:
            return None
        context.run(self.begin)
        return self

    def begin(self) -> None:
        """Put this context at its end."""
        self.token = _link.set(self)

    def alive(self) -> list[Permit]:
        """Return those that have not ended, while their holder waits."""
        return [permit for permit in self.held if not permit.ended] if self.is_waited_for else []

    def __enter__(self) -> None:
        """Have this thread at its end, too: what is waited for runs."""
        self.is_waited_for = True
        _here.links.add(self)
        if self.held:
            _come_under(next((permit for permit in self.held if not isinstance(permit, Standstill)), _something))

    def __exit__(self, *_: object) -> None:
        """Have it no longer there: the holder is about to have its answer, and goes on."""
        self.is_waited_for = False
        self.let_go()
        _here.links.discard(self)

    def leave(self) -> None:
        """Note that the holder waits no longer, whatever of it still runs."""
        held = self.let_go()
        if self.is_waited_for:
            loose.update(held)

    def end(self) -> None:
        """Let go of the context, which holds this, when nothing more will run in it."""
        del self.token


loop_of: weakref.WeakValueDictionary[int, asyncio.AbstractEventLoop] = weakref.WeakValueDictionary()
"""The loop that last ran in a thread when one of its tasks was asked what it holds."""

loose: weakref.WeakSet[Permit] = weakref.WeakSet()
"""Permits whose holder went on while a thread ran that it had waited for: what that thread waits for proves nothing."""

_link: ContextVar[Link | None] = ContextVar("asyncify_link", default=None)


class Standstill(Permit):
    """Stands for permits of others, which can't end as long as something lasts: those of a held loop's tasks, say.

    Which they are is looked up only when a deadlock is looked for. It belongs to no call, and is a permit so that it
    can stand among those that are held, and a context run under it.
    """

    __slots__ = ()

    def __init__(self) -> None:
        super().__init__(cast("Issuer", None), 0, 0)
        self.thread = 0

    def holds_up_loop(self) -> bool:
        """Tell whether it stands for tasks of an event loop that somebody else holds up."""
        return False

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        """Return those of a limiter's permits that it stands for; none when it lasts no longer."""
        raise NotImplementedError


class _Something(Standstill):
    """Stands for nothing in particular: that a context runs under it says that something is held."""

    __slots__ = ()

    def among(self, inside: Collection[Permit]) -> set[Permit]:
        return set()


_something = _Something()


def stopped_with(held: Collection[Permit], inside: Collection[Permit]) -> set[Permit]:
    """Return those of a limiter's permits that can't end before these, or that they stand for."""
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
    """What leads to this thread: links, and the hands of the crews that it works for."""

    def __init__(self) -> None:
        self.links: set[Link] = set()
        self.hands: set[Standstill] = set()


_here = _Here()


def hands_of_this_thread() -> set[Standstill]:
    """Return what stands in this thread for those who wait for it among others."""
    return _here.hands


class Steps:
    """The steps of a stream, which are taken in a context that is not that of the task or the thread which reads it."""

    __slots__ = ("_innermost", "_link", "_reader", "context", "token")

    token: Token[Steps | None]

    def __init__(self, context: Context) -> None:
        self.context: Context = context
        self._link: Link | None = None
        self._reader: weakref.ref[Any] | None = None
        self._innermost: Permit | None = None

    def begin(self) -> None:
        """Note that this context takes a step now, until `end()`; it waits for the step and for nothing else."""
        if (permit := get_innermost()) is not None or self._innermost is not None:
            self._hand_over(permit)
        self.token = _steps.set(self)

    def _hand_over(self, permit: Permit | None) -> None:
        task = None if _get_running_loop() is None else asyncio.current_task()
        if self._link is None:
            self._link = Link()
            self.context.run(self._link.begin)
        is_another = permit is not self._innermost or self._reader is None or self._reader() is not task
        if is_another or _link.get() is not None:  # by a bridge, too, another may read on
            self._innermost, self._reader = permit, None if task is None else weakref.ref(task)
            self._link.held = [] if task is None else held_by_this_task()
            self.context.run(_come_under, permit)
        self._link.is_waited_for = True

    def end(self) -> None:
        """Note that it does so no longer."""
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
    """Run this context under a permit if it is under none: only where it is under one is looked what a task holds."""
    if next(permits(), None) is None:
        innermost.set(permit)


_steps: ContextVar[Steps | None] = ContextVar("asyncify_steps", default=None)


def _stepped_in() -> Context | None:
    """Return the context in which the task that runs in this one takes a step."""
    steps = _steps.get()
    if steps is None or not _is_own(_steps, steps.token):
        return None
    steps.token = _steps.set(steps)
    return steps.context


def _is_own(variable: ContextVar[Any], token: Token[Any]) -> bool:
    """Tell whether a token was made in this very context, not in one that it was copied from; spends the token."""
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
