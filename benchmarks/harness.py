"""The one harness of all benchmarks: runs the sides of a case in turn and compares their medians.

A benchmark is a module of this package with a one-line docstring and a function `benchmark(quick)` that returns its
cases. With `quick` the cases are small enough for a test. If it has a picture, `plot(path, quick)` draws it.
"""

import asyncio
import gc
import importlib
import inspect
import os
import pkgutil
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from importlib.metadata import version
from itertools import repeat
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import benchmarks
from asyncify.errors import AsyncifyWarning


class Gauge(Enum):
    """What a sample is: seconds by one of two clocks, or the number that the side itself returns."""

    WALL = "wall seconds"
    CPU = "CPU seconds of the process"
    RETURNED = "as returned"


@dataclass(frozen=True, slots=True)
class Target:
    """A bound for a side's ratio to its reference, or for its own median."""

    at_most: float | None = None
    at_least: float | None = None
    of: Literal["ratio", "median"] = "ratio"

    def met(self, *, median: float, ratio: float) -> bool:
        """Tell whether the figure that this target speaks of lies within its bounds."""
        figure = ratio if self.of == "ratio" else median
        above = self.at_least is None or figure >= self.at_least
        return above and (self.at_most is None or figure <= self.at_most)


@dataclass(frozen=True, slots=True)
class Side:
    """One way to do the work of a case.

    `run` is a function or an async function without parameters. `against` names another reference than the case's;
    `rounds` lets a slow side sit out the later rounds, and `warm=False` the warm-up.
    """

    name: str
    run: Callable[[], object]
    target: Target | None = None
    against: str | None = None
    rounds: int | None = None
    warm: bool = True


@dataclass(frozen=True, slots=True)
class Case:
    """The same work done by several sides, one of them the reference.

    `inner` is how often a side runs within one sample: the sample is then the cost of one run.
    """

    name: str
    sides: Sequence[Side]
    reference: str
    rounds: int = 5
    warmups: int = 1
    inner: int = 1
    gauge: Gauge = Gauge.WALL
    unit: str = "s"

    def __post_init__(self) -> None:
        """Refuse a case whose sides share a name, or refer to a side that is not there."""
        names = [side.name for side in self.sides]
        if len(set(names)) < len(names):
            raise ValueError(f"{self.name}: two sides share a name: {names}")
        for side in self.sides:
            if self.reference_of(side) not in names:
                raise ValueError(f"{self.name}: no side is called {self.reference_of(side)!r}, only {names}")

    def reference_of(self, side: Side) -> str:
        """Return the name of the side that this one is compared with."""
        return side.against or self.reference


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one side showed: its samples, their median, and how that stands to the reference and the target."""

    side: str
    samples: Sequence[float]
    median: float
    low: float
    high: float
    against: str
    ratio: float
    target: Target | None
    met: bool | None


@dataclass(frozen=True, slots=True)
class CaseReport:
    """The outcomes of one case, in the order of its sides."""

    name: str
    reference: str
    gauge: str
    unit: str
    inner: int
    outcomes: Sequence[Outcome]


@dataclass(frozen=True, slots=True)
class Environment:
    """What the figures depend on."""

    python: str
    langchain_core: str
    platform: str
    cpus: int
    started: str


@dataclass(frozen=True, slots=True)
class Report:
    """The whole run of one benchmark."""

    benchmark: str
    environment: Environment
    cases: Sequence[CaseReport]

    @property
    def missed(self) -> list[str]:
        """The sides that missed a target, each with its case."""
        return [f"{case.name}: {seen.side}" for case in self.cases for seen in case.outcomes if seen.met is False]


class Entry(Protocol):
    """A module that holds a benchmark."""

    def benchmark(self, *, quick: bool) -> Sequence[Case]:
        """Return the cases, small ones if `quick`."""
        ...  # pragma: no cover


@runtime_checkable
class Pictured(Protocol):
    """A benchmark that can draw what it measures."""

    def plot(self, path: Path, *, quick: bool) -> None:
        """Measure what the picture needs, little if `quick`, and draw it to a file, whose suffix says the format."""
        ...  # pragma: no cover


# Discovery


def entries() -> Iterator[tuple[str, Entry, str]]:
    """Yield name, module and description of every benchmark in this package, sorted by name."""
    for found in sorted(pkgutil.iter_modules(benchmarks.__path__), key=lambda found: found.name):
        if found.name in {"__main__", "harness"}:
            continue
        module = importlib.import_module(f"{benchmarks.__name__}.{found.name}")
        if hasattr(module, "benchmark"):
            yield found.name, cast("Entry", module), (module.__doc__ or "").partition("\n")[0]


# Measuring


@contextmanager
def quiet_memory() -> Iterator[None]:
    """Collect garbage now and none until the end, as `timeit` does."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def clock_of(gauge: Gauge) -> Callable[[], float]:
    """Return the clock that a gauge reads."""
    return time.process_time if gauge is Gauge.CPU else time.perf_counter


def sample(run: Callable[[], object], case: Case) -> float:
    """Run a sync side `inner` times and return its sample."""
    clock = clock_of(case.gauge)
    result: object = None
    with quiet_memory():
        start = clock()
        for _ in repeat(None, case.inner):
            result = run()
        spent = clock() - start
    return figure(result, spent, case)


async def asample(run: Callable[[], Any], case: Case) -> float:
    """Run an async side `inner` times and return its sample; the clock starts inside the event loop."""
    clock = clock_of(case.gauge)
    result: object = None
    with quiet_memory():
        start = clock()
        for _ in repeat(None, case.inner):
            result = await run()
        spent = clock() - start
    return figure(result, spent, case)


def figure(result: object, spent: float, case: Case) -> float:
    """Return what a sample counts for: the seconds of one run, or the number that the last run returned."""
    if inspect.isawaitable(result):
        raise TypeError(f"{case.name}: a side returned an awaitable; make its function an `async def`")
    if case.gauge is not Gauge.RETURNED:
        return spent / case.inner
    if not isinstance(result, int | float):
        raise TypeError(f"{case.name}: a side returned {result!r} where a number is measured")
    return float(result)


def turns(case: Case, rounds: int) -> Iterator[tuple[Side, bool]]:
    """Yield the sides in turn (A B C A B C ...) and whether the turn counts: those of the warm-up do not."""
    for _ in range(case.warmups):
        yield from ((side, False) for side in case.sides if side.warm)
    for turn in range(rounds):
        yield from ((side, True) for side in case.sides if side.rounds is None or turn < side.rounds)


def measure(case: Case, rounds: int | None = None) -> dict[str, list[float]]:
    """Run all turns of a case and return the samples of each side.

    The async sides of a case share one event loop, as they would in a server: making and closing a loop, and the
    threads of its pool, are no part of any figure.
    """
    samples: dict[str, list[float]] = {side.name: [] for side in case.sides}
    with asyncio.Runner() as loop, warnings.catch_warnings():
        warnings.simplefilter("ignore", AsyncifyWarning)  # a benchmark does on purpose what users are warned of
        for side, counts in turns(case, rounds or case.rounds):
            is_async = inspect.iscoroutinefunction(side.run)
            taken = loop.run(asample(side.run, case)) if is_async else sample(side.run, case)
            if counts:
                samples[side.name].append(taken)
    return samples


# Comparing


def compare(case: Case, samples: Mapping[str, Sequence[float]]) -> CaseReport:
    """Work out medians, ratios and targets from the samples of a case."""
    medians = {name: statistics.median(taken) for name, taken in samples.items()}

    def outcome(side: Side) -> Outcome:
        taken, median, against = samples[side.name], medians[side.name], case.reference_of(side)
        ratio = median / medians[against] if medians[against] else float("inf")
        met = side.target.met(median=median, ratio=ratio) if side.target else None
        return Outcome(side.name, tuple(taken), median, min(taken), max(taken), against, ratio, side.target, met)

    outcomes = [outcome(side) for side in case.sides]
    return CaseReport(case.name, case.reference, case.gauge.value, case.unit, case.inner, outcomes)


def environment() -> Environment:
    """Describe this machine, as far as the figures depend on it."""
    return Environment(
        python=sys.version.split()[0],
        langchain_core=version("langchain-core"),
        platform=platform.platform(),
        cpus=os.cpu_count() or 1,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
    )
