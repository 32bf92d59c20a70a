"""Permits: each call's place at a limiter, and which of them a wait would keep from ending."""

from __future__ import annotations

from _thread import get_ident
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import Context, ContextVar, Token
from typing import Any, Protocol

from asyncify.clock import Timer
from asyncify.wakeups import Wakeups

__all__ = [
    "Permit",
    "Place",
    "get_innermost",
    "hand_over",
    "held_by_this_task",
    "held_by_this_thread",
    "innermost",
    "permits",
    "set_innermost",
]


class Place(Protocol):
    """What a permit gives itself back to."""

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
        "outer",
        "place",
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

    def __init__(self, place: Place, cost: float, slots: int) -> None:
        self.place: Place = place
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
            self.place.give_back_other(error)
        else:
            self.end(error)  # this context runs under another, which may end later

    def leave_innermost(self, error: BaseException | None) -> None:
        """Do the same, where this context is known to run under it."""
        try:
            innermost.reset(self.token)
        except (ValueError, RuntimeError):
            self.step_out()
        if not self.ended:  # `end()`, without a call
            self.ended = True
            if self.outer is not None:
                self.skip_ended()
            self.place.give_back(self, error)
        elif self.taken:
            self.place.give_back_other(error)

    def step_out(self) -> None:
        """Leave the context of the call, which goes on elsewhere and ends there."""
        self.thread = 0
        if innermost.get() is self:
            innermost.set(self.outer)

    def end(self, error: BaseException | None = None) -> None:
        """End the call, from any thread and any context, a finalizer's included; only the first time counts."""
        if not self.ended:
            self.ended = True
            if self.outer is not None:
                self.skip_ended()
            self.place.give_back(self, error)

    def skip_ended(self) -> None:
        """Forget those around it that have ended, or a chain of tasks would keep all of its permits."""
        while self.outer is not None and self.outer.ended:
            self.outer = self.outer.outer

    def give_up(self) -> None:
        """Give the place back without having used it, be it waiting still or admitted already."""
        if self.timer is not None:
            self.timer.cancel()
        if not self.ended:
            self.ended = True
            self.place.give_up(self)

    def call_off(self) -> None:
        """Wake whoever waits with it, to give up; of no effect when it waits no longer."""
        self.place.call_off(self)

    def move_to_this_thread(self) -> None:
        """Note that the call now runs in this thread, in a context of its own."""
        self.thread = get_ident()
        self.begin()


def permits() -> Iterator[Permit]:
    """Yield the permits under which this context runs, the innermost first."""
    permit = innermost.get()
    while permit is not None:
        if not permit.ended:
            yield permit
        permit = permit.outer


# Which calls can't end while this one waits? That a context has inherited a permit proves nothing: a task left
# running in the background has inherited it too. But a token can be reset only in the context that it was made in,
# and every task has a context of its own, so a token tells whether this very task has entered.


def held_by_this_thread() -> list[Permit]:
    """Return the permits that can't end while this thread is held up."""
    thread = get_ident()
    return [permit for permit in permits() if permit.thread == thread] + _handed_over()


def held_by_this_task() -> list[Permit]:
    """Return the permits that can't end while this task is held up."""
    held: list[Permit] = []
    for permit in permits():
        if not _is_own(innermost, permit.token):
            break
        held.append(permit)
    for permit in reversed(held):
        permit.begin()  # the tokens are spent: wind up again what was unwound
    return held + _handed_over()


def hand_over(held: list[Permit], context: Context) -> None:
    """Note that whoever holds these permits now waits for what will run in `context`, and for nothing else."""
    if held:
        context.run(_Link(held).begin)


class _Link:
    """Permits whose holder waits for this context."""

    __slots__ = ("held", "token")

    token: Token[_Link | None]

    def __init__(self, held: list[Permit]) -> None:
        self.held = held

    def begin(self) -> None:
        self.token = _link.set(self)


_link: ContextVar[_Link | None] = ContextVar("asyncify_link", default=None)


def _handed_over() -> list[Permit]:
    link = _link.get()
    if link is None or not _is_own(_link, link.token):
        return []
    link.begin()
    return [permit for permit in link.held if not permit.ended]


def _is_own(variable: ContextVar[Any], token: Token[Any]) -> bool:
    """Tell whether a token was made in this very context, not in one that it was copied from; spends the token."""
    try:
        variable.reset(token)
    except (ValueError, RuntimeError):
        return False
    return True
