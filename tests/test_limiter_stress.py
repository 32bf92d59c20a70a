"""Threads and loops that come, give up and end at random: what a limiter may never do under any of it."""

import asyncio
import contextvars
import random
import threading
from collections import deque
from typing import Any

from asyncify.errors import LimitTimeout
from asyncify.limiter import Limiter

THREADS = 8
LOOPS = 2
LIMIT = 7
PER_SECOND = 5000
CANCELLATIONS = 100_000


class Watch:
    """Counts the calls inside, from every thread."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.inside = 0
        self.peak = 0
        self.admitted_at: list[float] = []
        self.given_up = 0

    def enter(self, at: float | None) -> None:
        assert at is not None
        with self.lock:
            self.inside += 1
            self.peak = max(self.peak, self.inside)
            self.admitted_at.append(at)

    def leave(self) -> None:
        with self.lock:
            self.inside -= 1

    def give_up(self) -> None:
        with self.lock:
            self.given_up += 1


def most_in_a_window(times: list[float], period: float) -> int:
    """Return the most admissions that any window of the period holds."""
    window: deque[float] = deque()
    most = 0
    for time in sorted(times):
        window.append(time)
        while window[0] + period <= time:
            window.popleft()
        most = max(most, len(window))
    return most


def call_from_a_thread(limiter: Limiter, watch: Watch, seed: int, stop: threading.Event) -> None:
    """Call again and again, and give up after as long as chance will have it."""
    chance = random.Random(seed)
    while not stop.is_set():
        try:
            permit = limiter.enter(timeout=chance.choice([0.0001, 0.002, 0.01, None]))
        except LimitTimeout:
            watch.give_up()
            continue
        watch.enter(permit.at)
        watch.leave()
        permit.leave()


async def call_from_a_task(limiter: Limiter, watch: Watch, chance: random.Random) -> None:
    """Call once, and stay for a step of the loop or leave at once."""
    permit = await limiter.aenter()
    watch.enter(permit.at)
    try:
        if chance.random() < 0.3:
            await asyncio.sleep(0)
    finally:
        watch.leave()
        permit.leave()


async def cancel_at_random(limiter: Limiter, watch: Watch, seed: int, count: int) -> None:
    """Start tasks by the five hundred, and cancel them after a random number of steps of the loop."""
    chance = random.Random(seed)
    cancelled = 0
    while cancelled < count:
        tasks = [
            asyncio.get_running_loop().create_task(
                call_from_a_task(limiter, watch, chance), context=contextvars.Context()
            )
            for _ in range(500)
        ]
        for _ in range(chance.randrange(1, 4)):
            await asyncio.sleep(0)
        chance.shuffle(tasks)
        for task in tasks:
            task.cancel()
            if chance.random() < 0.01:
                await asyncio.sleep(0)
        results: list[Any] = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled += sum(isinstance(result, asyncio.CancelledError) for result in results)
        assert not [r for r in results if r is not None and not isinstance(r, asyncio.CancelledError)]


def test_a_hundred_thousand_cancellations_leave_all_slots_free() -> None:
    """Eight threads with timeouts, two loops with cancellations: no peak over, no window over, nothing left."""
    limiter = Limiter(limit=LIMIT, per_second=PER_SECOND, burst=50)
    watch = Watch()
    stop = threading.Event()
    errors: list[BaseException] = []

    def guard(run: Any, *args: Any) -> None:
        try:
            run(*args)
        except BaseException as error:  # noqa: BLE001  (the test looks at it)
            errors.append(error)

    threads = [
        threading.Thread(target=guard, args=(call_from_a_thread, limiter, watch, seed, stop)) for seed in range(THREADS)
    ]
    loops = [
        threading.Thread(
            target=guard,
            args=(lambda seed: asyncio.run(cancel_at_random(limiter, watch, seed, CANCELLATIONS // LOOPS)), seed),
        )
        for seed in range(100, 100 + LOOPS)
    ]
    for thread in threads + loops:
        thread.start()
    for thread in loops:
        thread.join()
    stop.set()
    for thread in threads:
        thread.join()
    stats = limiter.stats()

    assert errors == []
    assert watch.peak <= LIMIT
    assert most_in_a_window(watch.admitted_at, 1.0) <= PER_SECOND
    assert (stats.in_flight, stats.waiting) == (0, 0)
    assert watch.given_up > 0
    free = [limiter.enter(slots=1) for _ in range(LIMIT)]
    assert limiter.stats().in_flight == LIMIT
    for permit in free:
        permit.end()
