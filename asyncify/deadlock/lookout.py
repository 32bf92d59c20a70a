"""The lookout: all tasks of a loop that wait at limiters are looked at together, for a deadlock among them.

A task that begins to wait looks which tasks await it, as these can't go on before. But it may come to be awaited later,
or be a part of a join whose other parts begin to wait later, and asyncio gives no sign of that. So the waiting tasks
are looked at again: in the next turn of the event loop, and then each time their wait has doubled.
"""

from __future__ import annotations

import weakref
from asyncio import AbstractEventLoop, Task, Timeout, _get_running_loop, all_tasks, current_task, get_running_loop
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Mapping
from contextvars import Context, ContextVar
from functools import partial
from itertools import chain, islice
from math import inf
from typing import Any

from asyncify.deadlock.holds import Waiter, callbacks_of, waiting_for
from asyncify.deadlock.joins import Join, join_of, leader_of
from asyncify.permits import Permit

__all__ = ["SHARE", "HeldUp", "Lookout", "closes_generators", "shares_context"]

_PAUSE = 0.05
"""Minimal seconds between two looks if no task has begun to wait between them."""

_CANDIDATES = 10
"""How many waiters one look considers for the error; the others are left to a later look."""

SHARE = 20
"""After a look the next one waits for this many times as long as the look took."""


Look = Callable[[AbstractEventLoop, list[Permit]], bool]
"""Looks at waiting permits, in the order in which they began to wait; returns whether one of them got an error."""


class Lookout:
    """The waits in tasks of one event loop, and the time of the next look at them; used in the loop's thread only."""

    def __init__(self) -> None:
        self._waiting: list[weakref.ref[Permit]] = []
        self._last_came = 0.0
        self._next_at = inf
        self._not_before = 0.0

    def note(self, permit: Permit, loop: AbstractEventLoop, look: Look) -> None:
        """Add a permit that has begun to wait, and schedule a look."""
        self._waiting.append(weakref.ref(permit))
        self._last_came = loop.time()
        self._look_at(max(self._last_came, self._not_before), loop, look)

    def _look_at(self, at: float, loop: AbstractEventLoop, look: Look) -> None:
        if at >= self._next_at:
            return
        self._next_at = at  # a later look is outdated by that, not by cancelling its handle, which would keep the loop
        context = Context()  # an empty one: the timer would keep the caller's context alive
        if at <= loop.time():
            loop.call_soon(self._turn, at, look, context=context)
        else:
            loop.call_at(at, self._turn, at, look, context=context)

    def _turn(self, at: float, look: Look) -> None:
        if at != self._next_at:
            return
        self._next_at = inf
        loop = get_running_loop()
        start = loop.time()
        waiting = [permit for known in self._waiting if (permit := known()) is not None and permit.queue is not None]
        self._waiting = [weakref.ref(permit) for permit in waiting]
        if not waiting:
            return
        has_told = look(loop, waiting)
        end = loop.time()
        self._not_before = end if has_told else end + SHARE * (end - start)
        pause = 0 if has_told else max(_PAUSE, end - self._last_came)
        self._look_at(max(end + pause, self._not_before), loop, look)


class HeldUp:
    """What can't go on while some futures that tasks of one event loop await are not set: a wait-for graph.

    Attributes:
        permits: the permits that can't end before, each with the futures that keep it, or some of them if many do.
    """

    def __init__(self, futures: Iterable[Any]) -> None:
        self.permits: dict[Permit, tuple[Any, ...]] = {}
        self._known: dict[int, Any] = {}
        self._takes_along: defaultdict[int, list[Any]] = defaultdict(list)  # by id, those whose cancellation cancels it
        self._above: defaultdict[int, list[Any]] = defaultdict(list)  # by id, those that await it, alone or by a join
        self._below: defaultdict[int, list[Any]] = defaultdict(list)  # by id, those that it awaits
        self._holders: dict[Permit, Any] = {}
        self._siblings: defaultdict[int, list[Any]] = defaultdict(list)  # a join's parts, cancelled if one fails
        self._open: dict[int, tuple[Join, float, tuple[Any, ...]]] = {}  # joins with parts that may go on
        self._chain: list[tuple[Any, tuple[Any, ...]]] = [(future, (future,)) for future in futures]
        self._walk(0)
        stuck = len(self._chain)
        for join, _, _ in tuple(self._open.values()):  # their waiters may go on, but may also cancel the parts
            if join.cancels_parts:
                self._add(join.whole, ())
        self._walk(stuck)

    def _walk(self, start: int) -> None:
        """Add whatever awaits the chain's elements, directly or indirectly, each with the futures that keep it."""
        for awaited, keepers in islice(self._chain, start, None):
            if isinstance(awaited, Waiter):  # a thread
                self._note(awaited, awaited.held, keepers)
            for callback, context in callbacks_of(awaited):
                waiter, held = waiting_for(awaited, callback, context)
                self._note(awaited if waiter is None else waiter, held, keepers)
                if waiter is not None:
                    self._put(waiter, awaited)
                    self._takes_along[id(awaited)].append(waiter)
                    self._add(waiter, keepers)
                elif not held and (join := join_of(callback)) is not None:
                    self._come_to(join, awaited, keepers)

    def _come_to(self, join: Join, part: Any, keepers: tuple[Any, ...]) -> None:
        key = id(join.whole)
        self._put(join.whole, part)
        if join.cancels_parts:
            self._takes_along[id(part)].append(join.whole)
        if join.fails_at_once:
            self._siblings[key].append(part)
        _, left, others = self._open.get(key, (join, join.parts, ()))
        left, others = left - bool(keepers), (*others, *keepers)[-_CANDIDATES:]
        if left:
            self._open[key] = join, left, others
            if not keepers and join.cancels_parts:
                self._add(join.whole, ())
        else:
            self._open.pop(key, None)
            self._add(join.whole, others)

    def _note(self, holder: Any, held: Iterable[Permit], keepers: tuple[Any, ...]) -> None:
        for permit in held if keepers else ():
            self.permits[permit] = keepers
            self._holders[permit] = holder

    def _put(self, above: Any, below: Any) -> None:
        self._above[id(below)].append(above)
        self._below[id(above)].append(below)

    def _add(self, waiter: Any, keepers: tuple[Any, ...]) -> None:
        if id(waiter) not in self._known:
            self._known[id(waiter)] = waiter
            self._chain.append((waiter, keepers))

    def doomed(self, loop: AbstractEventLoop, futures: Iterable[Any], calls: Iterable[Permit]) -> Any:
        """Return the first of these futures that certainly nothing will set; None if there is none.

        A future may be set in the end if a timer of the loop or a failing sibling ends one of these calls, or a wait
        that keeps one, unless that also cancels the future's own wait. Futures whose own wait no timer cancels are
        preferred.
        """
        timers = _timers(loop)
        if timers is None:
            return None  # the timers of this kind of loop can't be read
        taken = {future: _reached(self._takes_along, [future]) for future in islice(futures, _CANDIDATES)}
        candidates = [future for future in taken if timers.isdisjoint(taken[future])] or list(taken)
        kept = _reached(self._below, (self._holders[call] for call in calls))
        above = _reached(self._above, [*kept.values(), *taken]).keys()
        groups = {key: join.whole for key, (join, *_) in self._open.items() if join.leader is not None}
        for more in (dict, partial(self._groups_in_block, loop)):  # the second one is slow: it looks at all tasks
            may_end = self._may_end(timers, groups | more()) & above
            candidates = [future for future in candidates if may_end <= taken[future].keys()]
            if not candidates:
                return None
        return candidates[0]

    def _groups_in_block(self, loop: AbstractEventLoop) -> dict[int, Any]:
        """Return, by id, the task groups whose leaders wait inside the group's block, not for its tasks yet."""
        ended = [handle._callback for handle in _ready(loop)]  # done callbacks of tasks that have just ended
        callbacks = [callback for task in all_tasks(loop) for callback, _ in callbacks_of(task)]
        joins = map(join_of, ended + callbacks)
        return {id(join.whole): join.whole for join in joins if join is not None and id(join.leader) in self._known}

    def _may_end(self, timers: set[int], groups: Mapping[int, Any]) -> set[int]:
        """Return the ids of all that a timer may end, and of all that is cancelled when a part of a join fails.

        A failing part cancels the join's other parts, and the leader of a task group that is still inside its block.
        """
        stuck = {id(waiter) for waiter, keepers in self._chain if keepers}
        together = {key: {id(part) for part in parts} for key, parts in self._siblings.items()}
        may_fail = {key for key in together if key in self._open}
        for key, group in groups.items():
            together[key] = {id(part) for part in (*group._tasks, leader_of(group))}
            (may_fail.discard if together[key] <= stuck else may_fail.add)(key)
        fails_by: defaultdict[int, list[int]] = defaultdict(list)  # the joins with a part that fails if this ends
        for key, parts in together.items():
            known = [self._known[part] for part in parts if part in self._known]
            for part in parts.union(_reached(self._below, known)):
                fails_by[part].append(key)
        failed = list(may_fail.union(*(fails_by[timer] for timer in timers if timer in fails_by)))
        for key in failed:
            failed += {other for part in together[key] for other in fails_by[part]}.difference(failed)
        return timers.union(*(together[key] for key in failed))


def closes_generators(loop: AbstractEventLoop) -> bool:
    """Tell whether the loop is closing an async generator or about to, as after a `break` out of an `async for`.

    The generator ends the calls that it is inside of, but in its reader's context they still look entered.
    """
    about_to_begin = chain.from_iterable(handle._args or () for handle in _ready(loop))
    begun: list[Any] = [task.get_coro() for task in all_tasks(loop)]
    return any(type(each) is _CLOSING for each in (*about_to_begin, *begun))


def shares_context(loop: AbstractEventLoop) -> bool:
    """Tell whether tasks of a loop share a context, as those that `create_task` was given one for.

    What one of them has entered looks as if each of them had.
    """
    current = current_task(loop) if loop is _get_running_loop() else None
    mark = object()
    token = _mark.set(mark)  # in the context of the task that runs now, which Python 3.11 does not show
    try:
        contexts = _contexts(all_tasks(loop).difference((current,)), loop)
        is_shared = current is not None and any(context.get(_mark) is mark for context in contexts)
        return is_shared or len(set(map(id, contexts))) < len(contexts)
    finally:
        _mark.reset(token)


_mark: ContextVar[object] = ContextVar("asyncify_mark", default=None)


def _contexts(tasks: set[Any], loop: AbstractEventLoop) -> list[Context]:
    """Return the contexts of tasks that do not run; up to Python 3.11, those with which something is to wake them."""
    if hasattr(Task, "get_context"):
        return [task.get_context() for task in tasks]
    awaited = {id(future): future for task in tasks if (future := getattr(task, "_fut_waiter", None)) is not None}
    wakes = chain.from_iterable(map(callbacks_of, awaited.values()))
    steps = ((handle._callback, handle._context) for handle in _ready(loop))
    # By ids: a callback may be of anything, of a list without a hash, say.
    known = {id(getattr(callback, "__self__", None)): context for callback, context in chain(wakes, steps)}
    return [known[id(task)] for task in tasks if id(task) in known]


def _ready(loop: AbstractEventLoop) -> tuple[Any, ...]:
    """Return the handles that a loop is about to run; copied in one step, as other threads add to them."""
    return tuple(getattr(loop, "_ready", ()))


async def _no_chunks() -> AsyncGenerator[None, None]:
    yield


_closing = _no_chunks().aclose()
_closing.close()
_CLOSING = type(_closing)
"""The type of `aclose()`'s awaitable; asyncio runs one in a task if a generator is dropped that has begun."""


def _reached(edges: Mapping[int, list[Any]], start: Iterable[Any]) -> dict[int, Any]:
    """Return, by id, the start objects and all that the edges lead to from them."""
    chain = list(start)
    found = {id(each): each for each in chain}
    for each in chain:
        for other in edges.get(id(each), ()):
            if id(other) not in found:
                found[id(other)] = other
                chain.append(other)
    return found


def _timers(loop: AbstractEventLoop) -> set[int] | None:
    """Return the ids of all that a loop's timers and ready handles may wake or cancel; None if they can't be read."""
    scheduled: Iterable[Any] | None = getattr(loop, "_scheduled", None)
    if scheduled is None:
        return None
    handles = (*scheduled, *_ready(loop))
    return {id(known) for handle in handles if not handle.cancelled() for known in _woken_by(handle)}


def _woken_by(handle: Any) -> Iterator[Any]:
    """Yield the objects that a handle of a loop may wake or cancel, as a timeout of asyncio or anyio does."""
    owner = getattr(handle._callback, "__self__", None)
    yield owner
    yield from handle._args or ()
    if isinstance(owner, Timeout):
        yield owner._task  # type: ignore[attr-defined]
    elif type(owner).__module__ == "anyio._backends._asyncio":
        yield from _tasks_of(owner)


def _tasks_of(scope: Any) -> Iterator[Any]:
    """Yield the tasks in a cancel scope of anyio and in its inner scopes; only a task's innermost scope lists it."""
    yield from getattr(scope, "_tasks", ())
    for inner in getattr(scope, "_child_scopes", ()):
        yield from _tasks_of(inner)
