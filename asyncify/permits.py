"""Permits: each call's place at a limiter, from the moment it asks until it has ended."""

from __future__ import annotations

import weakref
from _thread import get_ident
from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar, Token
from typing import Any, Protocol

from asyncify.clock import Timer
from asyncify.scopes import CancelScope
from asyncify.wakeups import Wakeups

__all__ = [
    "FREE_PASS",
    "Issuer",
    "Pass",
    "Permit",
    "get_innermost",
    "innermost",
    "permits",
    "set_innermost",
    "wait_within",
]


class Issuer(Protocol):
    """The limiter that has issued a permit, and that it gives its place back to."""

    kept_by: set[weakref.ref[Any]]
    """What may keep calls inside from ending: limiters at which some have come to wait within them, and crews."""

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

    def count_rejected(self) -> None:
        """Count a call that is turned away."""
        ...

    def title(self) -> str:
        """Return what errors call it."""
        ...

    def inside(self) -> frozenset[Permit]:
        """Return the calls inside at this moment."""
        ...

    def places(self) -> float:
        """Return how many of them have to be stuck for nobody to be let in; infinity if that would prove nothing."""
        ...

    def waits(self) -> list[Permit]:
        """Return those who wait and keep others from ending."""
        ...

    def waiting_on(self, loop: AbstractEventLoop) -> list[Future[None]]:
        """Return what those wait on who wait in tasks of a loop, and without an end."""
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
        "is_called_off",
        "is_caller",
        "issuer",
        "outer",
        "queue",
        "ready",
        "scope",
        "since",
        "slots",
        "taken",
        "thread",
        "timer",
        "token",
        "told",
        "wakeups",
    )

    outer: Permit | None
    ended: bool

    at: float | None
    """When it was admitted; None while it waits, and when its place has been taken back."""

    token: Token[Permit | None]

    is_caller: bool
    """There as soon as another call has come to wait within it, or the thread that holds it."""

    # Only a call that has to wait has these:
    since: float
    ahead: int
    queue: deque[Permit] | None
    """Where it waits; None when it does so no longer."""
    blocks: tuple[Any, ...]
    """The calls that can't end before its wait does, and the crews that have it in one of their threads."""
    scope: CancelScope | None
    """What its wait may be called off with; there if it is within another call, or blocks one."""
    is_called_off: bool
    told: Exception | None
    """What it is to raise, as it waits for itself."""
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
        # Whether a `with limiter` has ended it. That goes by the context, and may have been another call's: then this
        # call, at its own end, gives the other's place back.
        self.taken: bool = False
        if outer is not None:
            self.skip_ended()

    def queue_up(self, queue: deque[Permit], since: float, ahead: int) -> None:
        """Begin to wait, behind so many others."""
        self.at = None
        self.since = since
        self.ahead = ahead
        self.blocks = ()
        self.is_called_off = False
        self.timer = self.ready = self.told = None
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
        except (ValueError, RuntimeError, AttributeError):  # the last if an interrupt came before it was kept
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
            except (ValueError, RuntimeError, AttributeError):
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

    def is_of(self, loop: Any) -> bool:
        """Tell whether it waits in a task of this event loop."""
        ready = self.ready if self.in_task else None
        return ready is not None and ready.get_loop() is loop

    def gives_up(self) -> bool:
        """Tell whether it waits no longer, or is about to hear that it need not."""
        ready = self.ready  # read once: another thread may take it away
        is_told = self.in_task and (ready is None or ready.done())
        return self.queue is None or self.ended or self.is_called_off or is_told

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


class Pass(Protocol):
    """What a gate grants a call."""

    def leave(self, error: BaseException | None = None) -> None:
        """End the call, in the context that entered; `error` is what it raised."""
        ...

    def end(self, error: BaseException | None = None) -> None:
        """End the call, from any thread and any context."""
        ...

    def step_out(self) -> None:
        """Leave this context: the call goes on elsewhere, or is a generator at its yield."""
        ...

    def move_to_this_thread(self) -> None:
        """Note that the call now runs in this thread and in this context."""
        ...


class _FreePass:
    """What a foreign limiter grants, or none at all: there are no slots, so there is nothing to give back."""

    __slots__ = ()

    def leave(self, error: BaseException | None = None) -> None:
        """Do nothing."""

    def end(self, error: BaseException | None = None) -> None:
        """Do nothing."""

    def step_out(self) -> None:
        """Do nothing."""

    def move_to_this_thread(self) -> None:
        """Do nothing."""


FREE_PASS = _FreePass()


def permits() -> Iterator[Permit]:
    """Yield the permits under which this context runs, the innermost first."""
    permit = innermost.get()
    if permit is not None:
        if not permit.ended:
            yield permit
        yield from permit.around()


def wait_within(calls: Iterable[Permit], keeper: Any) -> None:
    """Note that a call has come to wait within these calls at a limiter, or a thread that holds them for a crew."""
    for call in calls:
        call.is_caller = True
        if call.slots:
            kept_by = call.issuer.kept_by
            if weakref.ref(keeper) not in kept_by:
                kept_by.add(weakref.ref(keeper, kept_by.discard))
