"""An adaptive limit against the market server, over sockets: how near it comes to a capacity that changes.

The server is `examples/market_server.py`, in a process of its own: it answers in 0.33 s, and refuses with HTTP 429
what it can't serve at once. It says nothing of how long to wait, as a server can't know when a place comes free; a
`Retry-After: 1` would pause all calls for a second at each try above the capacity. 100 tasks send calls for as long as
the run takes, by a function whose only limit is `Adaptive(min=1, max=100)`, which starts at 1. The server's capacity
changes twice. All figures are of one run; those of the throughput leave out its first 10 s and the first 10 s after
each change. What the server can answer is its capacity over the time that an answer took on average, which on a busy
machine is more than 0.33 s.
"""

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from matplotlib.figure import Figure

from asyncify import Adaptive, Limiter, concurrency
from benchmarks.harness import Case, Gauge, Side, Target
from examples.forex import market_server

TASKS = 100
NO_RATE = 1_000_000  # requests per second
GREY, GREEN, RED = "#8a8a8a", "#2f9e58", "#e0605a"  # can be read on white and on black


@dataclass(frozen=True, slots=True)
class Plan:
    """What the server can take: so many calls at once for so many seconds, then the next number."""

    capacities: Sequence[int]
    phase: float
    settling: float
    latency: float

    def start_of(self, phase: int) -> float:
        """Return when a phase begins, in seconds from the start of the run."""
        return phase * self.phase


@dataclass(slots=True)
class Run:
    """What one run showed; times are in seconds from its start."""

    plan: Plan
    answered: list[tuple[float, float]] = field(default_factory=list[tuple[float, float]])  # when, and after how long
    refused: list[float] = field(default_factory=list[float])
    limits: list[tuple[float, int]] = field(default_factory=list[tuple[float, int]])

    def throughput(self, phase: int) -> float:
        """Return the calls answered in a phase, once settled, in per cent of what the server can answer."""
        start = self.plan.start_of(phase) + self.plan.settling
        end = self.plan.start_of(phase + 1)
        times = [took for at, took in self.answered if start <= at < end]
        if not times:
            return 0.0
        possible = self.plan.capacities[phase] * (end - start) / statistics.mean(times)
        return 100 * len(times) / possible

    def share_refused(self) -> float:
        """Return how many of the calls were refused after the run had settled, in per cent."""
        answered = sum(at >= self.plan.settling for at, _ in self.answered)
        refused = sum(at >= self.plan.settling for at in self.refused)
        return 100 * refused / max(answered + refused, 1)

    def limit_at(self, moment: float) -> int:
        """Return the limit at a moment."""
        return max((at, limit) for at, limit in self.limits if at <= moment)[1]


class Experiment:
    """Makes a run and keeps it for all who ask for its figures."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.run = Run(plan)

    async def afresh(self, figure: Callable[[Run], float]) -> float:
        """Make a new run and return a figure of it."""
        self.run = Run(self.plan)
        options = ("--per-second", str(NO_RATE), "--at-once", str(self.plan.capacities[0]), "--no-retry-after")
        with market_server(self.plan.latency, *options) as control:
            async with httpx.AsyncClient(base_url=control.base_url, trust_env=False, limits=connections) as client:
                await observe(self.run, client, control)
        return figure(self.run)

    def again(self, figure: Callable[[Run], float]) -> float:
        """Return a figure of the last run."""
        return figure(self.run)


connections = httpx.Limits(max_connections=TASKS, max_keepalive_connections=TASKS)


async def observe(run: Run, client: httpx.AsyncClient, control: httpx.Client) -> None:
    """Send calls for as long as the plan says, change the server's capacity, and note what happens."""
    limiter = Limiter(limit=Adaptive(min=1, max=TASKS), name="market")
    run.limits.append((0.0, limiter.stats().limit or 0))
    begun = time.monotonic()

    @concurrency(limiter=limiter)
    async def fetch(pair: str) -> Any:
        admitted = time.monotonic()
        answer = (await client.get(f"/rate/{pair}")).raise_for_status()
        now = time.monotonic()
        run.answered.append((now - begun, now - admitted))
        return answer.json()

    async def send_calls() -> None:
        while True:
            try:
                await fetch.acall("EUR-USD")
            except httpx.HTTPStatusError:
                run.refused.append(time.monotonic() - begun)

    tasks = [asyncio.create_task(send_calls()) for _ in range(TASKS)]
    for phase, capacity in enumerate(run.plan.capacities):
        await asyncio.to_thread(control.post, f"/at-once/{capacity}")
        while (now := time.monotonic() - begun) < run.plan.start_of(phase + 1):
            run.limits.append((now, limiter.stats().limit or 0))
            await asyncio.sleep(0.05)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def near_capacity(experiment: Experiment) -> Case:
    """Compare the throughput of each phase with what the server can answer."""
    capacities = experiment.plan.capacities
    ways = [experiment.afresh, *[experiment.again] * (len(capacities) - 1)]
    sides = [
        Side(
            f"{capacity} at once",
            partial(way, partial(Run.throughput, phase=phase)),
            target=Target(at_least=80, at_most=120, of="median"),
        )
        for phase, (capacity, way) in enumerate(zip(capacities, ways, strict=True))
    ]
    name = "Answers per second, of those that the server can give"
    return Case(name, sides, reference=sides[0].name, gauge=Gauge.RETURNED, rounds=1, warmups=0, unit="%")


def few_refused(experiment: Experiment) -> Case:
    """Tell how many calls were refused."""
    side = Side("refused", partial(experiment.again, Run.share_refused), target=Target(at_most=2, of="median"))
    name = f"Calls refused, after the first {experiment.plan.settling:g} s"
    return Case(name, [side], reference="refused", gauge=Gauge.RETURNED, rounds=1, warmups=0, unit="%")


def over_time(experiment: Experiment, moments: Sequence[float]) -> Case:
    """Tell the limit at some moments of the run."""
    sides = [
        Side(f"after {moment:g} s", partial(experiment.again, partial(Run.limit_at, moment=moment)))
        for moment in moments
    ]
    name = "The limit over time"
    return Case(name, sides, reference=sides[0].name, gauge=Gauge.RETURNED, rounds=1, warmups=0, unit="calls")


FULL = Plan(capacities=(25, 10, 30), phase=20, settling=10, latency=0.33)
QUICK = Plan(capacities=(5, 10), phase=1.5, settling=0.5, latency=0.02)


def benchmark(*, quick: bool) -> Sequence[Case]:
    """Return the cases, all of them about one run."""
    experiment = Experiment(QUICK if quick else FULL)
    step = experiment.plan.phase / 8
    moments = [step * n for n in range(1, 8 * len(experiment.plan.capacities))]
    return [near_capacity(experiment), few_refused(experiment), over_time(experiment, moments)]


def plot(path: Path, *, quick: bool) -> None:
    """Draw the limit over time beside what the server takes at once."""
    experiment = Experiment(QUICK if quick else FULL)
    asyncio.run(experiment.afresh(Run.share_refused))
    run, plan = experiment.run, experiment.plan
    ends = [plan.start_of(phase) for phase in range(len(plan.capacities) + 1)]
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.stairs(plan.capacities, ends, baseline=None, color=GREY, linestyle=":", label="what the server takes at once")
    axes.step(*zip(*run.limits, strict=True), where="post", color=GREEN, linewidth=1.8, label="the limit")
    axes.plot(run.refused, [1] * len(run.refused), "|", color=RED, label="a call refused")
    axes.set(xlim=(0, ends[-1]), ylim=(0, None), xlabel="seconds")
    axes.legend(frameon=False, labelcolor=GREY, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["bottom", "left"]].set_color(GREY)
    axes.tick_params(colors=GREY)
    axes.xaxis.label.set_color(GREY)
    figure.savefig(path, transparent=True)
