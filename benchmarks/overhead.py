"""What a call costs when there is nothing to wait for: pairs against lambdas of the same functions.

The figures are CPU time. Each function returns its input, so nearly all of it is the price of the runnable around it.
"""

import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

from langchain_core.callbacks import AsyncCallbackHandler, BaseCallbackHandler
from langchain_core.runnables import Runnable, RunnableConfig, RunnableLambda

import asyncify
from asyncify import Dual
from benchmarks.harness import Case, Gauge, Side, Target

CALLS = 300
Make = Callable[..., Any]


def keep(value: Any) -> Any:
    """Return the input."""
    return value


async def akeep(value: Any) -> Any:
    """Return the input."""
    return value


def single(make: Make) -> Any:
    """Make one runnable of both functions."""
    return make(keep, akeep)


def sync_only(make: Make) -> Any:
    """Make one runnable of the sync function alone."""
    return make(keep)


def pipe(make: Make) -> Any:
    """Pipe three."""
    return single(make) | single(make) | single(make)


def merged_dict(make: Make) -> Any:
    """Pipe a dict of three into one."""
    return {"a": single(make), "b": single(make), "c": single(make)} | single(make)


def sync_case(name: str, composed: Callable[[Make], Runnable[Any, Any]], at_least: float, **options: Any) -> Case:
    """Compare the two kinds by `invoke`."""
    lambdas, pairs = composed(RunnableLambda), composed(Dual)
    return compared(name, partial(lambdas.invoke, 1), partial(pairs.invoke, 1), at_least, **options)


def async_case(name: str, composed: Callable[[Make], Runnable[Any, Any]], at_least: float, **options: Any) -> Case:
    """Compare the two kinds by `ainvoke`."""
    lambdas, pairs = composed(RunnableLambda), composed(Dual)
    return compared(name, partial(lambdas.ainvoke, 1), partial(pairs.ainvoke, 1), at_least, **options)


def compared(
    name: str,
    of_lambdas: Callable[..., object],
    of_pairs: Callable[..., object],
    at_least: float,
    *,
    calls: int,
    rounds: int,
    config: RunnableConfig | None = None,
) -> Case:
    """Say how many times heavier lambdas are."""
    return Case(
        name=name,
        reference="pairs",
        sides=[
            Side("pairs", partial(of_pairs, config)),
            Side("lambdas", partial(of_lambdas, config), target=Target(at_least=at_least)),
        ],
        rounds=rounds,
        inner=calls,
        gauge=Gauge.CPU,
    )


def acall_case(calls: int, rounds: int) -> Case:
    """Compare `acall` with a raw await; both sides loop by themselves, for a call around the call would count."""
    pair = single(Dual)

    async def raw() -> None:
        for _ in repeat(None, calls):
            await akeep(1)

    async def acall() -> None:
        for _ in repeat(None, calls):
            await pair.acall(1)

    return Case(
        name=f"{calls:,} times acall",
        reference="raw await",
        sides=[Side("raw await", raw), Side("acall", acall, target=Target(at_most=5))],
        rounds=rounds,
        gauge=Gauge.CPU,
    )


@functools.cache
def bytecode() -> tempfile.TemporaryDirectory[str]:
    """Return a directory for what the imports compile, which is removed when this process ends."""
    return tempfile.TemporaryDirectory(prefix="asyncify-bytecode-")


def import_seconds(statement: str) -> float:
    """Return the CPU seconds that an import takes in a new interpreter that finds everything compiled."""
    program = f"import time; start = time.process_time(); {statement}; print(time.process_time() - start)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(  # noqa: S603  (the program is ours)
        [sys.executable, "-c", program],
        env={**environment, "PYTHONPYCACHEPREFIX": bytecode().name},
        cwd=Path(asyncify.__file__).parents[1],
        capture_output=True,
        check=True,
        text=True,
    )
    return float(done.stdout)


def import_case(rounds: int) -> Case:
    """Compare the import of the package with that of the class it builds on.

    `import langchain_core.runnables` by itself imports next to nothing: the names in it are looked up late.
    """
    return Case(
        name="import, against that of RunnableLambda",
        reference="RunnableLambda",
        sides=[
            Side("RunnableLambda", partial(import_seconds, "from langchain_core.runnables import RunnableLambda")),
            Side("asyncify", partial(import_seconds, "import asyncify"), target=Target(at_most=1.10)),
        ],
        rounds=rounds,
        gauge=Gauge.RETURNED,
    )


def unobserved(calls: int, rounds: int) -> Iterator[Case]:
    """Yield the cases in which nobody watches."""
    options = {"calls": calls, "rounds": rounds}
    yield sync_case("invoke", single, 20, **options)
    yield async_case("ainvoke", single, 10, **options)
    yield acall_case(100 * calls, rounds)
    yield async_case("ainvoke of a sync function alone", sync_only, 3, **options)
    yield sync_case("pipe of three, invoke", pipe, 12, **options)
    yield async_case("pipe of three, ainvoke", pipe, 10, **options)
    yield async_case("dict of three into one, ainvoke", merged_dict, 6, **options)
    yield sync_case("dict of three into one, invoke", merged_dict, 1, calls=max(1, calls // 4), rounds=rounds)


def observed(calls: int, rounds: int) -> Iterator[Case]:
    """Yield the same cases with one handler."""
    options: dict[str, Any] = {"calls": max(1, calls // 4), "rounds": rounds}
    sync: RunnableConfig = {"callbacks": [BaseCallbackHandler()]}
    async_: RunnableConfig = {"callbacks": [AsyncCallbackHandler()]}
    yield sync_case("invoke, one handler", single, 1, config=sync, **options)
    yield async_case("ainvoke, one handler", single, 1, config=async_, **options)
    yield async_case("ainvoke, one handler that is sync", single, 1, config=sync, **options)
    yield async_case("ainvoke of a sync function alone, one handler", sync_only, 1, config=async_, **options)
    yield sync_case("pipe of three, invoke, one handler", pipe, 1, config=sync, **options)
    yield async_case("pipe of three, ainvoke, one handler", pipe, 1, config=async_, **options)
    yield async_case("dict of three into one, ainvoke, one handler", merged_dict, 1, config=async_, **options)


def benchmark(*, quick: bool) -> Sequence[Case]:
    """Return a case for each way to call, unobserved and with a handler, and one for the import."""
    calls, rounds = (2, 1) if quick else (CALLS, 11)
    return [*unobserved(calls, rounds), *observed(calls, rounds), import_case(rounds)]
