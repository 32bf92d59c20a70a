"""Permits: each call's place at a limiter, from the moment it asks until it has ended.

A context runs under a chain of them, the innermost first: it says which call a `with limiter` ends, and which calls a
thread or a task holds.
"""

from __future__ import annotations

import threading
import weakref
from _thread import get_ident
from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar, Token
from typing import Any, Protocol

from asyncify.clock import Timer
from asyncify.forks import at_fork
from asyncify.scopes import CancelScope
from asyncify.wakeups import Wakeups

__all__ = [
    "FREE_PASS",
    "Issuer",
    "Pass",
    "Permit",
    "get_innermost",
    "innermost",
    "keep",
    "let_go",
    "permits",
    "set_innermost",
]


class Issuer(Protocol):
    """The limiter that has issued a permit, and that it gives its place back to."""

    def _give_back(self, permit: Permit, error: BaseException | None) -> None:
        """Take back the place of a call that has ended."""
        ...

    def _give_up(self, permit: Permit) -> None:
        """Take back the place of a call that will never start, be it waiting still or admitted already."""
        ...

    def _give_back_other(self, error: BaseException | None) -> None:
        """Take back the place of some call inside, as it is not known of which."""
        ...

    def _call_off(self, permit: Permit) -> None:
        """Wake a call that still waits, to give up."""
        ...

    def _count_rejected(self) -> None:
        """Count a call that is turned away."""
        ...

    def _title(self) -> str:
        """Return what errors call it."""
        ...

    def _inside(self) -> frozenset[Permit]:
        """Return the calls inside at this moment."""
        ...

    def _places(self) -> float:
        """Return how many of them have to be stuck for nobody to be let in; infinity if that would prove nothing."""
        ...

    def _waiting_on(self, loop: AbstractEventLoop) -> list[Future[None]]:
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
        "issuer",
        "kept_by",
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
        "within",
    )

    outer: Permit | None
    ended: bool

    at: float | None
    """When it was admitted; None while it waits, and when its place has been taken back."""

    token: Token[Permit | None]

    kept_by: set[weakref.ref[Any]]
    """What may keep it from ending: calls that wait within it, and crews. There as soon as there has been one."""

    # Only a call that has to wait has these:
    since: float
    ahead: int
    queue: deque[Permit] | None
    """Where it waits; None when it does so no longer."""
    blocks: tuple[Any, ...]
    """The calls that can't end before its wait does, and the crews that have it in one of their threads."""
    within: tuple[Permit, ...] | None
    """The calls that may be kept by it: these, and those around it. None until they are noted, as these are by then."""
    scope: CancelScope | None
    """What its wait may be called off with; there as soon as it is noted what it blocks."""
    is_called_off: bool
    told: Exception | None
    """What it is to raise, as it waits for itself or has become too dear to be let in."""
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
        self.thread: int = get_ident()  # in which it goes on and ends; 0 if that is not known
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
        self.within = None
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
        else:
            self.end(error)  # this context runs under another, which may end later

    def leave_innermost(self, error: BaseException | None) -> None:
        """End the call, in a context that is known to run under it."""
        try:
            innermost.reset(self.token)
        except (ValueError, RuntimeError, AttributeError):  # the last if an interrupt came before it was kept
            innermost.set(self.outer)
        if not self.ended:  # `end()`, without a call
            self.ended = True
            if self.outer is not None:
                self.skip_ended()
            self.issuer._give_back(self, error)
        elif self.taken:
            self.taken = False  # before any call, at which another thread may come in between
            self.issuer._give_back_other(error)

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
            self.issuer._give_back(self, error)
        elif self.taken:
            self.taken = False  # before any call, at which another thread may come in between
            self.issuer._give_back_other(error)

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

    def has_been_kept(self) -> bool:
        """Tell whether anything has ever kept it from ending."""
        return hasattr(self, "kept_by")

    def keepers(self) -> list[Any]:
        """Return what may keep it from ending now."""
        known = [ref() for ref in list(getattr(self, "kept_by", ()))]  # copied in one step
        return [keeper for keeper in known if keeper is not None and keeper.is_waiting()]

    def is_waiting(self) -> bool:
        """Tell whether it waits."""
        return self.queue is not None

    def keeps(self, call: Permit) -> bool:
        """Tell whether a call can't end before its wait does."""
        return call in self.blocks

    def wait_within(self, calls: Iterable[Permit]) -> None:
        """Note, as a wait begins, the calls that may be kept by it."""
        self.within = tuple(call for call in calls if call.slots)
        keep(self.within, self)

    def end_wait(self) -> None:
        """Note that it waits no longer, and so keeps nobody."""
        within, self.within, self.blocks = self.within, (), ()
        let_go(within or (), self)

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
            self.issuer._give_up(self)

    def call_off(self) -> None:
        """Wake whoever waits with it, to give up; of no effect when it waits no longer."""
        self.issuer._call_off(self)

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


def keep(calls: Iterable[Permit], keeper: Any) -> None:
    """Note what may keep these calls from ending."""
    ref = weakref.ref(keeper)
    for call in calls:
        if not hasattr(call, "kept_by"):
            nobody: set[weakref.ref[Any]] = set()
            with _first_keeper:  # another thread may be about to do the same
                call.kept_by = getattr(call, "kept_by", nobody)
        call.kept_by.add(ref)


def let_go(calls: Iterable[Permit], keeper: Any) -> None:
    """Note that it keeps these calls no longer."""
    ref = weakref.ref(keeper)
    for call in calls:
        if hasattr(call, "kept_by"):  # else an interrupt came before there was one
            call.kept_by.discard(ref)


_first_keeper = threading.Lock()


def _after_fork() -> None:
    global _first_keeper  # noqa: PLW0603  (another thread may have held it)
    _first_keeper = threading.Lock()


at_fork(after_in_child=_after_fork)
