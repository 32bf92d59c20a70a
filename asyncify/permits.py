"""Permits: each call's place at a limiter, and which of them a wait would keep from ending."""

from __future__ import annotations

import asyncio
import threading
import weakref
from _thread import get_ident
from abc import abstractmethod
from asyncio import _get_running_loop, base_events
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import suppress
from contextvars import Context, ContextVar, Token
from typing import Any, ClassVar, Protocol, Self, cast

from asyncify.clock import Timer
from asyncify.wakeups import Wakeups

__all__ = [
    "Issuer",
    "Link",
    "Permit",
    "Standstill",
    "Steps",
    "callbacks_of",
    "get_innermost",
    "held_by_this_task",
    "held_by_this_thread",
    "held_by_waiters_for",
    "innermost",
    "loose",
    "permits",
    "set_innermost",
    "waiting_for",
]


class Issuer(Protocol):
    """The limiter that has issued a permit, and that it gives its place back to."""

    def give_back(self, permit: Permit, error: BaseException | None) -> None:
        """Take back the place of a call that has ended."""
        ...

    def give_up(self, permit: Permit) -> None:
        """Take back the place of a call that will never start, be it waiting still or admitted already."""
        ...

    def give_back_other(self, error: BaseException | None) -> None:
        """Take back the place of some call inside, as it is not known of which."""
        ...

    def call_off(self, permit: Permit) -> None:
        """Wake a call that still waits, to give up."""
        ...


innermost: ContextVar[Permit | None] = ContextVar("asyncify_permit", default=None)
"""The permit under which this context runs; those around it follow by `outer`."""

# Python looks up a method of an imported name anew at each call, so what every call needs is imported by itself.
get_innermost: Callable[[], Permit | None] = innermost.get
set_innermost: Callable[[Permit | None], Token[Permit | None]] = innermost.set


class Permit:
    """One call's place at a limiter, from the moment it asks until it has ended."""

    __slots__ = (
        "__weakref__",
        "ahead",
        "at",
        "blocks",
        "cost",
        "ended",
        "in_task",
        "issuer",
        "outer",
        "queue",
        "ready",
        "since",
        "slots",
        "taken",
        "thread",
        "timer",
        "token",
        "wakeups",
    )

    outer: Permit | None
    ended: bool

    at: float | None
    """When it was admitted; None while it waits, and when its place has been taken back."""

    token: Token[Permit | None]

    # Only a call that has to wait has these:
    since: float
    ahead: int
    queue: deque[Permit] | None
    """Where it waits; None when it does so no longer."""
    blocks: tuple[Permit, ...]
    timer: Timer | None
    ready: Any
    """What it waits on: a lock, or a future of the loop whose task it is in."""
    wakeups: Wakeups
    """Those of that loop."""

    def __init__(self, issuer: Issuer, cost: float, slots: int) -> None:
        self.issuer: Issuer = issuer
        self.cost: float = cost
        self.slots: int = slots
        self.in_task: bool = False  # one goes on and ends in its event loop's thread, unless it steps out
        self.outer = outer = innermost.get()
        self.thread: int = get_ident()  # in which it goes on; 0 if that is not known
        self.ended: bool = False
        self.taken: bool = False  # by the end of a `with`, which may be somebody else's
        if outer is not None:
            self.skip_ended()

    def queue_up(self, queue: deque[Permit], since: float, ahead: int) -> None:
        """Begin to wait, behind so many others."""
        self.at = None
        self.since = since
        self.ahead = ahead
        self.blocks = ()
        self.timer = self.ready = None
        self.queue = queue
        queue.append(self)

    def begin(self) -> None:
        """Run this context under the permit from now on."""
        self.token = innermost.set(self)

    def leave(self, error: BaseException | None = None) -> None:
        """End the call, in the context that entered; `error` is what it raised."""
        if innermost.get() is self:
            self.leave_innermost(error)
        elif self.ended and self.taken:
            self.issuer.give_back_other(error)
        else:
            self.end(error)  # this context runs under another, which may end later

    def leave_innermost(self, error: BaseException | None) -> None:
        """Do the same, where this context is known to run under it."""
        try:
            innermost.reset(self.token)
        except (ValueError, RuntimeError):
            innermost.set(self.outer)
        if not self.ended:  # `end()`, without a call
            self.ended = True
            if self.outer is not None:
                self.skip_ended()
            self.issuer.give_back(self, error)
        elif self.taken:
            self.issuer.give_back_other(error)

    def step_out(self) -> None:
        """Leave this context, until `move_to_this_thread`: the call goes on elsewhere, or is a generator at its yield.

        Who reads that on may be another, or nobody.
        """
        self.thread = 0
        if innermost.get() is self:
            try:
                innermost.reset(self.token)
            except (ValueError, RuntimeError):
                innermost.set(self.outer)

    def end(self, error: BaseException | None = None) -> None:
        """End the call, from any thread and any context, a finalizer's included; only the first time counts."""
        if not self.ended:
            self.ended = True
            if self.outer is not None:
                self.skip_ended()
            self.issuer.give_back(self, error)

    def skip_ended(self) -> None:
        """Forget those around it that have ended, or a chain of tasks would keep all of its permits."""
        while self.outer is not None and self.outer.ended:
            self.outer = self.outer.outer

    def around(self) -> Iterator[Permit]:
        """Yield those within which it was asked for, the innermost first."""
        permit = self.outer
        while permit is not None:
            if not permit.ended:
                yield permit
            permit = permit.outer

    def is_on(self, loops: Collection[Wakeups]) -> bool:
        """Tell whether it waits on one of these loops."""
        return self.in_task and getattr(self, "wakeups", None) in loops

    def gives_up(self) -> bool:
        """Tell whether it waits no longer, or is about to hear that it need not."""
        return self.queue is None or self.ended or (self.in_task and (self.ready is None or self.ready.done()))

    def give_up(self) -> None:
        """Give the place back without having used it, be it waiting still or admitted already."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.ended:
            self.ended = True
            self.issuer.give_up(self)

    def call_off(self) -> None:
        """Wake whoever waits with it, to give up; of no effect when it waits no longer."""
        self.issuer.call_off(self)

    def move_to_this_thread(self) -> None:
        """Note that the call now runs in this thread, in a context of its own."""
        self.thread = get_ident()
        self.begin()


def permits() -> Iterator[Permit]:
    """Yield the permits under which this context runs, the innermost first."""
    permit = innermost.get()
    if permit is not None:
        if not permit.ended:
            yield permit
        yield from permit.around()


# Which calls can't end while this one waits? That a context has inherited a permit proves nothing: a task left
# running in the background has inherited it too. But a token can be reset only in the context that it was made in,
# and every task has a context of its own, so a token tells whether this very task has entered. A task that awaits
# another stands among what the other calls back; it may take its steps in a context that is not its own.


def held_by_this_thread() -> list[Permit]:
    """Return the permits that can't end while this thread is held up."""
    thread = get_ident()
    held = [permit for permit in permits() if permit.thread == thread]
    for link in tuple(_here.links):
        held += link.alive()
    return list(dict.fromkeys(held))


def held_by_this_task() -> list[Permit]:
    """Return the permits that can't end while this task is held up."""
    if innermost.get() is None and _link.get() is None:
        return []
    held = _held_by_this_context() + held_by_waiters_for(asyncio.current_task())
    return list(dict.fromkeys(held))


def _held_by_this_context() -> list[Permit]:
    """Return the permits that were entered in this very context or handed over to it."""
    held: list[Permit] = []
    for permit in permits():
        if isinstance(permit, Standstill) or not _is_own(innermost, permit.token):
            break
        held.append(permit)
    for permit in reversed(held):
        permit.begin()  # the tokens are spent: wind up again what was unwound
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
        return None, [_Run(awaited, around)]
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


class Link:
    """Permits whose holder waits for what runs in a context and, while this is entered, for the thread of that.

    Whatever holds up that thread holds up what runs in it: a task, if it is an event loop's, among others. Of a stream
    there is one link; who asks for a chunk says each time what it holds, as the next to ask may be another.
    """

    __slots__ = ("held", "is_waited_for", "standstill", "token")

    token: Token[Link | None]

    def __init__(self, held: list[Permit] | None = None) -> None:
        self.held: list[Permit] = [] if held is None else held
        self.is_waited_for: bool = False
        self.standstill: Standstill | None = None

    def hold_up_this_thread(self) -> None:
        """Note what this thread holds, and with it what tasks do if an event loop runs here; it is about to wait."""
        self.held = held_by_this_thread()
        if _get_running_loop() is not None:
            self.standstill = _LoopHeldUp(self)
            self.held.append(self.standstill)

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
            _come_under(self.held[0])

    def __exit__(self, *_: object) -> None:
        """Have it no longer there: the holder is about to have its answer, and goes on."""
        self.is_waited_for = False
        self.held = []
        self.standstill = None
        _here.links.discard(self)

    def leave(self) -> None:
        """Note that the holder waits no longer, whatever of it still runs."""
        held, self.held = self.held, []
        self.standstill = None
        if self.is_waited_for:
            loose.update(held)

    def end(self) -> None:
        """Let go of the context, which holds this, when nothing more will run in it."""
        del self.token


loose: weakref.WeakSet[Permit] = weakref.WeakSet()
"""Permits whose holder went on while a thread ran that it had waited for: what that thread waits for proves nothing."""

_link: ContextVar[Link | None] = ContextVar("asyncify_link", default=None)


class Standstill(Permit):
    """Stands, among those that are held, for permits which others hold, and which can't end as long as it lasts."""

    __slots__ = ()

    is_of_a_loop: ClassVar[bool]
    """Whether it stands for tasks of an event loop that somebody else holds up."""

    def __init__(self) -> None:
        super().__init__(cast("Issuer", None), 0, 0)
        self.thread = 0

    @abstractmethod
    def among(self, inside: Iterable[Permit]) -> set[Permit]:
        """Return those of a limiter's permits that it stands for; none when it lasts no longer."""


class _LoopHeldUp(Standstill):
    """Stands for the permits of all tasks of the event loop whose thread waits for what a link leads to."""

    __slots__ = ("_link", "_loop_thread")

    is_of_a_loop = True

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link
        self._loop_thread = get_ident()

    def among(self, inside: Iterable[Permit]) -> set[Permit]:
        if self._link.standstill is not self:
            return set()
        return {permit for permit in inside if permit.in_task and permit.thread == self._loop_thread}


class _Run(Standstill):
    """Stands for the permits of a thread that runs an event loop until a task has ended, or until it is stopped."""

    __slots__ = ("_held", "_task")

    is_of_a_loop = False

    def __init__(self, task: Any, held: list[Permit]) -> None:
        super().__init__()
        self._task = task
        self._held = held

    def among(self, inside: Iterable[Permit]) -> set[Permit]:
        lasts = any(callback is _end_of_loop for callback, _ in self._task._callbacks or ())
        return {permit for permit in inside if permit in self._held} if lasts else set()


class _Here(threading.local):
    """The links to this thread."""

    def __init__(self) -> None:
        self.links: set[Link] = set()


_here = _Here()


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
    """Run this context under a permit if it is under none: who waits then looks whom that keeps from ending."""
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
