"""Permits: each call's place at a limiter, from the moment it asks until it has ended.

A context runs under a chain of permits, the innermost first. The chain says which call a `with limiter` ends, and which
calls a thread or a task holds.
"""

from __future__ import annotations

import threading
import weakref
from _thread import get_ident
from asyncio import AbstractEventLoop, Future
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from contextvars import ContextVar, Token
from typing import Any, Protocol, Self

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
    """The limiter that has issued a permit, and takes its place back."""

    def _give_back(self, permit: Permit, error: BaseException | None) -> None:
        """Take back the place of a call that has ended."""
        ...

    def _give_up(self, permit: Permit) -> None:
        """Take back the place of a call that will never start, whether it still waits or has been admitted."""
        ...

    def _give_back_other(self, error: BaseException | None) -> None:
        """Take back the place of some call inside, as it is not known which one has ended."""
        ...

    def _call_off(self, permit: Permit) -> None:
        """Wake a call that still waits, so that it gives up."""
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
        """Return how many calls inside must be stuck for none to be admitted; infinity if that would prove nothing."""
        ...

    def _waiting_on(self, loop: AbstractEventLoop) -> list[Future[None]]:
        """Return the futures that tasks of a loop wait on without a timeout."""
        ...


innermost: ContextVar[Permit | None] = ContextVar("asyncify_permit", default=None)
"""The permit under which this context runs; its `outer` is the next one around it, and so on."""

# Python looks up a method of an imported name again at each call, so what every call needs is imported by itself.
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
        "left_by_hand",
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
    """When it was admitted; None while it waits, and after its place has been taken back."""

    token: Token[Permit | None]

    left_by_hand: bool
    """Set, to True, from when it is ended by hand until its `with` block ends."""

    kept_by: set[weakref.ref[Any]]
    """What may keep it from ending: calls that wait within it, and crews. Set when there is a first one."""

    # Only a call that has to wait has these:
    since: float
    ahead: int
    queue: deque[Permit] | None
    """Where it waits; None when it no longer waits."""
    blocks: tuple[Any, ...]
    """The calls that can't end before its wait does, and the crews with a thread in which it waits."""
    within: tuple[Permit, ...] | None
    """The calls that it may keep from ending: what its thread or task holds, and those around it. None until noted."""
    scope: CancelScope | None
    """The scope that may call off its wait; set before `blocks` is."""
    is_called_off: bool
    told: Exception | None
    """What it is to raise, because it is deadlocked or its cost has become too high to be admitted."""
    timer: Timer | None
    ready: Any
    """What it waits on: a lock, or a future of its task's loop."""
    wakeups: Wakeups
    """Those of its task's loop."""

    def ask(self, issuer: Issuer, cost: float, slots: int) -> Self:
        """Ask for a place, in this thread and this context; every permit begins with it.

        It is not an `__init__`, as CPython's detour to one takes 5% of the time of a whole limited call.
        """
        self.issuer: Issuer = issuer
        self.cost: float = cost
        self.slots: int = slots
        self.in_task: bool = False  # if so, it goes on and ends in its loop's thread, unless it steps out
        self.outer = outer = get_innermost()
        self.thread: int = get_ident()  # in which it goes on and ends; 0 if not known
        self.ended: bool = False
        # Whether a `with limiter` has ended it. The `with` finds its permit by the context, and may have ended another
        # call than its own. Then this call, at its own end, gives the other's place back.
        self.taken: bool = False
        if outer is not None:
            self.skip_ended()
        return self

    def queue_up(self, queue: deque[Permit], since: float, ahead: int) -> None:
        """Begin to wait, behind `ahead` others."""
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
        """End the call of an `enter()`, or that of a `with` block before its end; `error` is what it raised."""
        if not self.thread:
            self.finish(error)
        elif not self.ended:
            self.left_by_hand = True
            self.end(error)  # and stay in the context, where the end of the block finds it

    def was_left_by_hand(self) -> bool:
        """Tell whether it was ended before its `with` block, which has yet to end."""
        return hasattr(self, "left_by_hand")

    def may_have_block(self) -> bool:
        """Tell whether a `with` block that ends now may have begun with it."""
        return self.was_left_by_hand() or (not self.ended and self.thread != 0)

    def finish_block(self, error: BaseException | None) -> None:
        """End its `with` block, and the call, if that was not left by hand."""
        if self.was_left_by_hand():
            del self.left_by_hand
        else:
            self.taken = True
        self.finish(error)

    def finish(self, error: BaseException | None = None) -> None:
        """End the call, in the context that entered; `error` is what it raised."""
        if innermost.get() is self:
            self.finish_innermost(error)
        else:
            self.end(error)  # this context runs under another permit, which may end later

    def finish_innermost(self, error: BaseException | None) -> None:
        """End the call, in a context that is known to run under it."""
        try:
            innermost.reset(self.token)
        except (ValueError, RuntimeError, AttributeError):  # the last if an interrupt came before the token was kept
            innermost.set(self.outer)
        if not self.ended:  # `end()`, without a call
            self.ended = True
            if self.outer is not None:
                self.skip_ended()
            self.issuer._give_back(self, error)
        else:
            self.end(error)

    def step_out(self) -> None:
        """Leave this context, until `move_to_this_thread`: the call goes on elsewhere, or is a generator at its yield.

        Another reader may go on with the generator, or none.
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
            if not self.was_left_by_hand():  # else it was left at the moment at which its own block ended
                self.issuer._give_back_other(error)

    def skip_ended(self) -> None:
        """Forget the permits around it that have ended, or a chain of tasks would keep all of them alive.

        Those left by hand are still looked for by the end of their block.
        """
        while self.outer is not None and self.outer.ended and not self.outer.was_left_by_hand():
            self.outer = self.outer.outer

    def around(self) -> Iterator[Permit]:
        """Yield the permits within which it was requested, the innermost first."""
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
        """Tell whether `call` can't end before this wait does."""
        return call in self.blocks

    def wait_within(self, calls: Iterable[Permit]) -> None:
        """Note, as the wait begins, the calls that it may keep from ending."""
        self.within = tuple(call for call in calls if call.slots)
        keep(self.within, self)

    def end_wait(self) -> None:
        """Note that it no longer waits, and so keeps no call from ending."""
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
        """Tell whether it no longer waits, or is about to be woken."""
        ready = self.ready  # read once: another thread may take it away
        is_told = self.in_task and (ready is None or ready.done())
        return self.queue is None or self.ended or self.is_called_off or is_told

    def give_up(self) -> None:
        """Give the place back unused, whether the call still waits or has been admitted."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.ended:
            self.ended = True
            self.issuer._give_up(self)

    def call_off(self) -> None:
        """Wake its waiter, so that it gives up; has no effect when it no longer waits."""
        self.issuer._call_off(self)

    def move_to_this_thread(self) -> None:
        """Note that the call now runs in this thread, in a context of its own."""
        self.thread = get_ident()
        self.begin()


class Pass(Protocol):
    """What a gate grants a call."""

    def finish(self, error: BaseException | None = None) -> None:
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
    """What a call gets from a foreign limiter, or without a limiter: it has no slot, so there is none to give back."""

    __slots__ = ()

    def finish(self, error: BaseException | None = None) -> None:
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
    """Note that `keeper` may keep these calls from ending."""
    ref = weakref.ref(keeper)
    for call in calls:
        if not hasattr(call, "kept_by"):
            nobody: set[weakref.ref[Any]] = set()
            with _first_keeper:  # another thread may be about to do the same
                call.kept_by = getattr(call, "kept_by", nobody)
        call.kept_by.add(ref)


def let_go(calls: Iterable[Permit], keeper: Any) -> None:
    """Note that `keeper` no longer keeps these calls from ending."""
    ref = weakref.ref(keeper)
    for call in calls:
        if hasattr(call, "kept_by"):  # else an interrupt came before it was set
            call.kept_by.discard(ref)


_first_keeper = threading.Lock()


def _after_fork() -> None:
    global _first_keeper  # noqa: PLW0603  (another thread may have held it)
    _first_keeper = threading.Lock()


at_fork(after_in_child=_after_fork)
