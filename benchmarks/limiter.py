"""The limiter against its peers: what an admission costs, the rate it reaches, and what waiting takes.

The peers differ in what they can do: asyncio.Semaphore, anyio and aiologic have slots and no rate, the others a rate
and no slots, and only aiologic and pyrate-limiter serve threads and loops together. The picture shows when calls are
admitted at 50 per second. aiolimiter is given a rate of 50 a second, InMemoryRateLimiter the same and its defaults.
"""

import asyncio
import threading
import time
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import aiologic
import anyio
import pyrate_limiter
from aiolimiter import AsyncLimiter
from langchain_core.rate_limiters import InMemoryRateLimiter
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from asyncify import Limiter
from benchmarks.harness import Case, Gauge, Side, Target

Gate = AbstractAsyncContextManager[object]

OURS = "asyncify"
IN_NO_ONES_WAY = 10_000_000  # slots, or calls per second
NO_DEARER = Target(at_most=1.0)
NO_GROWTH = Target(at_most=1.5)  # more waiters than a cache holds cost its misses; a search would cost many times

# Alone at the gate


def uncontended() -> Case:
    """Compare acquiring and releasing where nobody waits."""
    semaphore, rate = asyncio.Semaphore(IN_NO_ONES_WAY), AsyncLimiter(IN_NO_ONES_WAY, 1)
    limiter = Limiter(limit=IN_NO_ONES_WAY, per_second=IN_NO_ONES_WAY)
    pyrate = pyrate_limiter.Limiter(pyrate_limiter.Rate(IN_NO_ONES_WAY, pyrate_limiter.Duration.SECOND))
    langchain = InMemoryRateLimiter(requests_per_second=IN_NO_ONES_WAY, max_bucket_size=IN_NO_ONES_WAY)
    langchain.acquire()  # its bucket is empty at first
    bounded = threading.BoundedSemaphore(IN_NO_ONES_WAY)

    async def pass_both() -> None:
        async with semaphore, rate:
            pass

    def through(gate: Gate) -> Callable[[], Awaitable[None]]:
        async def call() -> None:
            async with gate:
                pass

        return call

    def through_sync(gate: Limiter | threading.BoundedSemaphore) -> Callable[[], None]:
        def call() -> None:
            with gate:
                pass

        return call

    async def acquire_pyrate() -> None:
        await pyrate.try_acquire_async("call")

    return Case(
        "Acquire and release, nobody waiting",
        sides=[
            Side("Semaphore and aiolimiter", pass_both),
            Side(f"{OURS}, async with", through(limiter), target=NO_DEARER),
            Side(f"{OURS}, with", through_sync(limiter), target=NO_DEARER),
            Side("slots: asyncio.Semaphore", through(semaphore)),
            Side("slots: anyio", through(anyio.CapacityLimiter(IN_NO_ONES_WAY))),
            Side("slots: aiologic", through(aiologic.Semaphore(IN_NO_ONES_WAY))),
            Side("slots: BoundedSemaphore", through_sync(bounded)),
            Side("rate: aiolimiter", through(rate)),
            Side("rate: InMemoryRateLimiter", langchain.aacquire),
            Side("rate: pyrate-limiter", acquire_pyrate),
        ],
        reference="Semaphore and aiolimiter",
        rounds=51,
        inner=600,
    )


# Many at the gate


async def admission(make: Callable[[int], Gate], waiting: int, slots: int = 1) -> float:
    """Return the seconds that one of so many tasks takes from its first step, through one of the slots, to its end."""
    gate, free = make(slots), asyncio.Event()

    async def hold() -> None:
        async with gate:
            await free.wait()

    async def call() -> None:
        async with gate:
            pass

    holders = [asyncio.create_task(hold()) for _ in range(slots)]
    await asyncio.sleep(0)  # they are inside
    start = time.perf_counter()
    tasks = [asyncio.create_task(call()) for _ in range(waiting)]
    await asyncio.sleep(0)  # all of them come and wait
    free.set()
    await asyncio.gather(*holders, *tasks)
    return (time.perf_counter() - start) / waiting


GATES: dict[str, Callable[[int], Gate]] = {
    "asyncio.Semaphore": asyncio.Semaphore,
    OURS: lambda slots: Limiter(limit=slots),
    "aiologic": aiologic.Semaphore,
    "anyio": anyio.CapacityLimiter,
}


def contended(waiting: int, slots: int = 1) -> Case:
    """Compare what an admission costs while so many tasks wait."""
    return Case(
        f"An admission, {waiting:,} tasks waiting for {'one slot' if slots == 1 else f'{slots:,} slots'}",
        sides=[
            Side(name, partial(admission, make, waiting, slots), target=NO_DEARER if name == OURS else None)
            for name, make in GATES.items()
        ],
        reference="asyncio.Semaphore",
        gauge=Gauge.RETURNED,
        rounds=5,
        warmups=0,
    )


def growth(waiting: Sequence[int]) -> Case:
    """Compare what our admission costs with more and more tasks waiting."""
    few, *more = [f"{number:,} waiting" for number in waiting]
    return Case(
        f"An admission by {OURS}, more and more waiting",
        sides=[
            Side(name, partial(admission, GATES[OURS], number), target=None if name == few else NO_GROWTH)
            for name, number in zip([few, *more], waiting, strict=True)
        ],
        reference=few,
        gauge=Gauge.RETURNED,
        rounds=5,
        warmups=0,
    )


# The rate under load


class Load:
    """More calls than a rate admits, from four threads and two event loops at once."""

    def __init__(self, per_second: int, seconds: float) -> None:
        self.per_second = per_second
        self.seconds = seconds
        self.fullest = 0.0  # of all runs

    def percent_reached(self) -> float:
        """Run the load; return the admissions per second, in per cent of the rate."""
        moments = self.admissions()
        self.fullest = max(self.fullest, 100 * fullest_second(moments) / self.per_second)
        return 100 * (len(moments) - 1) / (moments[-1] - moments[0]) / self.per_second

    def percent_in_fullest_second(self) -> float:
        """Return the most admissions of any one second in the runs so far, in per cent of the rate."""
        return self.fullest

    def admissions(self) -> list[float]:
        """Return the limiter's own times of admission, as each permit carries it: its clock, read under its lock."""
        limiter = Limiter(per_second=self.per_second)
        end = time.monotonic() + self.seconds
        moments: list[float] = []

        def call_by_thread() -> None:
            while time.monotonic() < end:
                permit = limiter.enter()
                moments.append(permit.at or 0)
                permit.leave()

        async def call_by_task() -> None:
            while time.monotonic() < end:
                permit = await limiter.aenter()
                moments.append(permit.at or 0)
                permit.leave()

        async def call_by_tasks() -> None:
            await asyncio.gather(*(call_by_task() for _ in range(10)))

        run_in_threads([call_by_thread] * 4 + [lambda: asyncio.run(call_by_tasks())] * 2)
        return sorted(moments)


def run_in_threads(functions: Sequence[Callable[[], None]]) -> None:
    """Run each function in a thread of its own, and wait for all."""
    threads = [threading.Thread(target=function) for function in functions]
    with ExitStack() as joined:
        for thread in threads:
            thread.start()
            joined.callback(thread.join)


def fullest_second(moments: Sequence[float]) -> int:
    """Return the most of the sorted moments that lie within one second, wherever it begins."""
    most = first = 0
    for last, moment in enumerate(moments):
        while moment - moments[first] >= 1:
            first += 1
        most = max(most, last + 1 - first)
    return most


def under_load(per_second: int, at_least: int, seconds: float) -> Case:
    """Measure the rate that is reached, and the fullest second, both in per cent of what is allowed."""
    load = Load(per_second, seconds)
    return Case(
        f"{per_second:,} per second, wanted by four threads and two event loops",
        sides=[
            Side("rate reached", load.percent_reached, target=Target(at_least=at_least, of="median")),
            Side("fullest second", load.percent_in_fullest_second, target=Target(at_most=100, of="median")),
        ],
        reference="rate reached",
        gauge=Gauge.RETURNED,
        rounds=2,
        warmups=0,
        unit="%",
    )


# Waiting


async def core_used(acquire: Callable[[], Awaitable[object]], waiting: int, seconds: float) -> float:
    """Return how much of a core, in per cent, the process uses while so many tasks wait."""
    tasks = [asyncio.ensure_future(acquire()) for _ in range(waiting)]
    await asyncio.sleep(0.1 * seconds)  # all of them have come, and the first are admitted
    start, cpu = time.perf_counter(), time.process_time()
    await asyncio.sleep(seconds)
    used = 100 * (time.process_time() - cpu) / (time.perf_counter() - start)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return used


def waiting_calls(waiting: int, seconds: float) -> Case:
    """Compare what it takes to let tasks wait for a rate of one a second."""

    async def ours() -> float:
        return await core_used(Limiter(per_second=1).aacquire, waiting, seconds)

    async def aiolimiter() -> float:
        return await core_used(AsyncLimiter(1, 1).acquire, waiting, seconds)

    async def langchain() -> float:
        return await core_used(InMemoryRateLimiter(requests_per_second=1).aacquire, waiting, seconds)

    return Case(
        f"Of a core, while {waiting:,} tasks wait for one admission a second",
        sides=[
            Side("aiolimiter", aiolimiter),
            Side(OURS, ours, target=Target(at_most=1, of="median")),
            Side("InMemoryRateLimiter", langchain, rounds=1),
        ],
        reference="aiolimiter",
        gauge=Gauge.RETURNED,
        rounds=3,
        warmups=0,
        unit="%",
    )


def benchmark(*, quick: bool) -> Sequence[Case]:
    """Return the cases: alone, many waiting, under load, and at rest."""
    if quick:
        return [uncontended(), contended(200), growth((100, 200)), under_load(500, 99, 0.3), waiting_calls(100, 0.1)]
    return [
        uncontended(),
        contended(20_000),
        contended(100_000),
        contended(20_000, slots=10),
        contended(20_000, slots=100),
        contended(20_000, slots=1_000),
        growth((1_000, 20_000, 100_000)),
        under_load(50, 99, 4),
        under_load(500, 99, 4),
        under_load(5_000, 95, 4),
        waiting_calls(10_000, 3),
    ]


# The picture

RATE = 50
WORKERS = 50
GREY = "#8a8a8a"  # this and the other colours can be read on white and on black


@dataclass(frozen=True, slots=True)
class Drawn:
    """A limiter of the picture: how it is made, and how its line looks; `at` is where its name stands."""

    name: str
    make: Callable[[], Callable[[], Awaitable[object]]]
    colour: str
    width: float
    at: tuple[float, int]


DRAWN = (
    Drawn("aiolimiter", lambda: AsyncLimiter(RATE, 1).acquire, "#e0605a", 1.6, (0.42, 92)),
    Drawn(
        "InMemoryRateLimiter",
        lambda: InMemoryRateLimiter(requests_per_second=RATE).aacquire,
        "#4a90d9",
        1.6,
        (1.6, 31),
    ),
    Drawn(OURS, lambda: Limiter(per_second=RATE).aacquire, "#2f9e58", 2.4, (1.25, 48)),
)


async def admitted(acquire: Callable[[], Awaitable[object]], seconds: float) -> list[float]:
    """Return when, in seconds from the start, calls are admitted that more tasks want than may."""
    start, times = time.monotonic(), list[float]()

    async def worker() -> None:
        while True:
            await acquire()
            times.append(time.monotonic() - start)

    workers = [asyncio.create_task(worker()) for _ in range(WORKERS)]
    await asyncio.sleep(seconds)
    for task in workers:
        task.cancel()
    await asyncio.gather(*workers, return_exceptions=True)
    return times


def draw_sums(axes: Axes, seen: Sequence[Sequence[float]]) -> None:
    """Draw how many calls were admitted so far."""
    for limiter, times in zip(DRAWN, seen, strict=True):
        sums = range(len(times) + 1)
        axes.step([0, *times], sums, where="post", color=limiter.colour, linewidth=limiter.width)
        axes.annotate(limiter.name, limiter.at, color=limiter.colour)
    axes.set(ylim=(0, None), yticks=range(0, 201, 50))
    axes.set_title(f"Calls admitted, by a limit of {RATE} per second", loc="left", fontsize="medium", color=GREY)


def draw_windows(axes: Axes, seen: Sequence[Sequence[float]], seconds: float) -> None:
    """Draw how many calls were admitted in the second before each moment."""
    for limiter, times in zip(DRAWN, seen, strict=True):
        moments = sorted([0, *times, *(at + 1 for at in times if at + 1 < seconds)])
        counts = [bisect_right(times, moment) - bisect_right(times, moment - 1) for moment in moments]
        axes.step(moments, counts, where="post", color=limiter.colour, linewidth=limiter.width)
        if max(counts) > RATE + 1:
            axes.annotate(f"{max(counts)} calls", (1.02, max(counts)), color=limiter.colour, va="top")
    axes.annotate("the limit", (seconds, RATE + 3), color=GREY, ha="right")
    axes.axhline(RATE, color=GREY, linestyle=":", linewidth=1.2, zorder=5)
    axes.set(ylim=(0, 110), yticks=(0, RATE, 2 * RATE), xlabel="seconds")
    axes.set_title("Of these, within the last second", loc="left", fontsize="medium", color=GREY)


def plot(path: Path, *, quick: bool) -> None:
    """Draw the admissions over time of three limiters, each under the same load."""
    seconds = 0.5 if quick else 3.0
    seen = [asyncio.run(admitted(limiter.make(), seconds)) for limiter in DRAWN]
    figure = Figure(figsize=(7, 5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    draw_sums(above, seen)
    draw_windows(below, seen, seconds)
    for axes in (above, below):
        axes.set_xlim(0, seconds)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["bottom", "left"]].set_color(GREY)
        axes.tick_params(colors=GREY)
        axes.xaxis.label.set_color(GREY)
    figure.savefig(path, transparent=True)
