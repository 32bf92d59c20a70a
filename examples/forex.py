"""A bank's desk wants rate, news and analysis for 30 currency pairs: 90 HTTP calls, run four ways.

Run it with `python examples/forex.py`; it takes about 45 s, most of it for the first way. The market is
`market_server.py`, in a process of its own on this machine: it answers in 0.33 s, and refuses with HTTP 429
what is above its quota of 60 requests in any second or 25 at once.

The exit status is 1 if the limited way met a 429 or gained less than `--min-gain` over the first, or if a
sync caller of the same pipe got another answer.
"""

import argparse
import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from langchain_core.runnables import Runnable, RunnableLambda, chain
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from asyncify import Dual, Limiter, concurrency, dual

Json = dict[str, Any]
Results = Sequence[Json | Exception]  # one a currency pair, in the order of the pairs

# ----------------------------------------------------------------------------------------------------------
# The job: three functions written for both sides, one limit around them all, and a pipe


class Market:
    """The market's API, by one sync and one async HTTP client."""

    client: httpx.Client
    aclient: httpx.AsyncClient

    def get(self, path: str) -> Json:
        return checked(self.client.get(path))

    async def aget(self, path: str) -> Json:
        return checked(await self.aclient.get(path))


def checked(response: httpx.Response) -> Json:
    """Return the answer, or raise an `httpx.HTTPStatusError` that names the status and the URL."""
    answer: Json = response.raise_for_status().json()
    return answer


market = Market()
quota = Limiter(limit=20, per_second=50, name="market")


async def fetch_rate_async(pair: str) -> Json:
    return await market.aget(f"/rate/{pair}")


@concurrency(limiter=quota)
@dual(async_=fetch_rate_async)
def fetch_rate(pair: str) -> Json:
    """Fetch a pair's mid, bid and ask."""
    return market.get(f"/rate/{pair}")


async def fetch_news_async(pair: str) -> Json:
    return await market.aget(f"/news/{pair}")


@concurrency(limiter=quota)
@dual(async_=fetch_news_async)
def fetch_news(pair: str) -> Json:
    """Fetch a pair's latest stories."""
    return market.get(f"/news/{pair}")


async def fetch_analysis_async(pair: str) -> Json:
    return await market.aget(f"/analysis/{pair}")


@concurrency(limiter=quota)
@dual(async_=fetch_analysis_async)
def fetch_analysis(pair: str) -> Json:
    """Fetch a pair's trend, volatility and recommendation."""
    return market.get(f"/analysis/{pair}")


@chain
def merge(parts: Json) -> Json:
    """Make one briefing of a pair's rate, news and analysis."""
    return {
        **parts["rate"],
        "headline": parts["news"]["stories"][0]["headline"],
        "trend": parts["analysis"]["trend"],
        "recommendation": parts["analysis"]["recommendation"],
    }


PARTS = {"rate": fetch_rate, "news": fetch_news, "analysis": fetch_analysis}
briefing: Runnable[str, Json] = PARTS | merge

# ----------------------------------------------------------------------------------------------------------
# The four ways to run it


def one_after_the_other(pairs: list[str]) -> Results:
    """Call the plain sync functions in a loop."""
    return [combine({part: fetch.func(pair) for part, fetch in PARTS.items()}) for pair in pairs]


async def sync_lambdas(pairs: list[str]) -> Results:
    """Give the plain sync functions to LangChain, which has threads for a few of them at a time."""
    return await abatch_each({part: RunnableLambda(fetch.func) for part, fetch in PARTS.items()}, pairs)


async def unlimited_pairs(pairs: list[str]) -> Results:
    """Run both sides natively and without a limit, all at once."""
    return await abatch_each({part: Dual(fetch.func, fetch.afunc) for part, fetch in PARTS.items()}, pairs)


async def limited_pairs(pairs: list[str]) -> Results:
    """Run the pipe: as fast as the quota lets it."""
    return await briefing.abatch(pairs, return_exceptions=True)


def limited_pairs_for_a_sync_caller(pairs: list[str]) -> Results:
    """Run the same pipe from code that has no event loop."""
    return briefing.batch(pairs, return_exceptions=True)


async def abatch_each(parts: Mapping[str, Runnable[str, Json]], pairs: list[str]) -> Results:
    """Run one batch a part, side by side, and keep what succeeds."""
    columns = await asyncio.gather(*(part.abatch(pairs, return_exceptions=True) for part in parts.values()))
    return [combine(dict(zip(parts, row, strict=True))) for row in zip(*columns, strict=True)]


def combine(parts: Json) -> Json | Exception:
    """Return the briefing, or the first error among its parts."""
    errors = (part for part in parts.values() if isinstance(part, Exception))
    return next(errors, None) or merge.invoke(parts)


@dataclass(frozen=True, slots=True)
class Way:
    """A title, and the function that does the job or returns the coroutine that does."""

    title: str
    start: Callable[[list[str]], Results | Coroutine[Any, Any, Results]]


WAYS = (
    Way("one after the other", one_after_the_other),
    Way("RunnableLambda(sync)", sync_lambdas),
    Way("pairs, no limit", unlimited_pairs),
    Way("pairs under @concurrency", limited_pairs),
)
SYNC_WAY = Way("the same by sync batch", limited_pairs_for_a_sync_caller)

# ----------------------------------------------------------------------------------------------------------
# Running and measuring


@dataclass(frozen=True, slots=True)
class Run:
    """What one way took and gave, and what the server saw of it."""

    title: str
    seconds: float
    results: Results
    seen: Json

    @property
    def refused(self) -> int:
        count: int = self.seen["refused"]
        return count

    @property
    def complete(self) -> int:
        return sum(not isinstance(result, Exception) for result in self.results)

    def gain_over(self, other: "Run") -> float:
        return other.seconds / self.seconds

    def figures(self, baseline: "Run") -> Json:
        """Return the row of `--json`."""
        return {
            "way": self.title,
            "seconds": round(self.seconds, 3),
            "speed_up": round(self.gain_over(baseline), 2),
            "briefings": self.complete,
            **{name: figure for name, figure in self.seen.items() if name != "timeline"},
        }


@contextmanager
def market_server(latency: float, *options: str) -> Iterator[httpx.Client]:
    """Start the server and give a client to control it; leaving closes its standard input, which stops it."""
    program = Path(__file__).with_name("market_server.py")
    command = [sys.executable, str(program), "--latency", str(latency), *options]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline() if process.stdout else ""
        if not line:
            raise RuntimeError(f"{program.name} ended before it listened; its own message is above")
        with httpx.Client(base_url=json.loads(line)["url"], trust_env=False) as control:
            yield control


@contextmanager
def opened(url: httpx.URL, on_answer: Callable[[], None]) -> Iterator[asyncio.Runner]:
    """Open the market's two clients, and give the event loop that the async one lives on."""

    def count(response: httpx.Response) -> None:
        on_answer()

    async def acount(response: httpx.Response) -> None:
        on_answer()

    settings: Json = {"base_url": url, "timeout": 30, "trust_env": False}  # no proxy on the way to loopback
    with (
        asyncio.Runner() as loop,
        httpx.Client(**settings, event_hooks={"response": [count]}) as market.client,
    ):
        market.aclient = httpx.AsyncClient(**settings, event_hooks={"response": [acount]})
        try:
            yield loop
        finally:
            loop.run(market.aclient.aclose())


def measure(way: Way, pairs: list[str], control: httpx.Client, progress: Progress) -> Run:
    """Run the job one way, with fresh connections and a fresh quota."""
    task = progress.add_task(way.title, total=len(PARTS) * len(pairs))
    with opened(control.base_url, lambda: progress.advance(task)) as loop:
        control.post("/reset").raise_for_status()
        start = time.perf_counter()
        work = way.start(pairs)
        results = loop.run(work) if asyncio.iscoroutine(work) else work
        seconds = time.perf_counter() - start
        seen = checked(control.get("/stats"))
    progress.stop_task(task)
    raise_unless_refused(results)
    return Run(way.title, seconds, results, seen)


def raise_unless_refused(results: Results) -> None:
    """Raise the first error that is no 429: those are figures, any other is a fault."""
    for result in results:
        if isinstance(result, httpx.HTTPStatusError) and result.response.status_code == 429:
            continue
        if isinstance(result, Exception):
            raise result


def complaints(runs: Sequence[Run], sync_run: Run, min_gain: float) -> list[str]:
    """Say what makes the program exit with 1."""
    baseline, limited = runs[0], runs[-1]
    found: list[str] = []
    if limited.refused or sync_run.refused:
        found.append(f"the limited runs met {limited.refused} + {sync_run.refused} refusals, expected none")
    if limited.gain_over(baseline) < min_gain:
        found.append(f"{limited.title} gained {limited.gain_over(baseline):.1f}x, expected {min_gain:g}x")
    if not baseline.results == limited.results == sync_run.results:
        found.append("the first way, the limited way and the sync caller got different briefings")
    return found


# ----------------------------------------------------------------------------------------------------------
# The report: a table, a plot, a file of figures

PLOT = Path(__file__).parent.parent / "build" / "forex.svg"
COLUMNS = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())


def table(runs: Sequence[Run]) -> Table:
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    drawn.add_column("way", no_wrap=True)
    for heading in ("wall time", "speed-up", "answered", "429s", "peak at once"):
        drawn.add_column(heading, justify="right")
    for run in runs:
        drawn.add_row(*cells(run, runs[0]), style="bold green" if run is runs[-1] else "")
    return drawn


def cells(run: Run, baseline: Run) -> Iterator[str]:
    """Draw one row; what failed is red."""
    answered, calls = run.seen["served"], len(PARTS) * len(run.results)
    yield run.title
    yield f"{run.seconds:.2f} s"
    yield f"{run.gain_over(baseline):.1f}x"
    yield f"{answered} of {calls}" if answered == calls else f"[red]{answered} of {calls}[/]"
    yield f"[red]{run.refused}[/]" if run.refused else "0"
    yield str(run.seen["peak_concurrency"])


def plot(runs: Sequence[Run], path: Path) -> None:
    """Draw the requests in flight over time, one strip a way, as the server saw them."""
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    strips = figure.subplots(len(runs), 1, sharex=True, sharey=True)
    shown = 1.2 * max(run.seconds for run in runs[1:])  # the first way goes on far beyond the others
    for strip, run in zip(strips, runs, strict=True):
        colour = "tab:green" if run is runs[-1] else "tab:red" if run.refused else "tab:gray"
        draw_strip(strip, run, shown, colour)
    strips[0].set(xlim=(0, shown), ylim=(0, 32))
    strips[0].annotate("the server takes 25 at once", (shown, 25.5), ha="right", va="bottom")
    strips[-1].set_xlabel("seconds")
    figure.supylabel("requests in flight", fontsize="medium")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def draw_strip(strip: Axes, run: Run, shown: float, colour: str) -> None:
    times, in_flight = zip((0, 0), *run.seen["timeline"], strict=True)
    strip.step(times, in_flight, where="post", color=colour)
    strip.fill_between(times, in_flight, step="post", color=colour, alpha=0.25)
    strip.axhline(25, color="black", linestyle=":", linewidth=1)
    strip.set_title(f"{run.title}: {run.seconds:.1f} s, {run.refused} refused", loc="left", fontsize="medium")
    strip.spines[["top", "right"]].set_visible(False)
    if times[-1] > shown:
        strip.annotate(f"until {times[-1]:.0f} s", (shown, 4), ha="right", color=colour)


def report(console: Console, runs: Sequence[Run], sync_run: Run) -> None:
    """Print the table, what a briefing and a refusal look like, and what the sync caller got."""
    console.print("", table(runs), "", sep="\n")
    console.print(f"A briefing: {runs[0].results[0]}", style="dim", markup=False)
    refusals = [result for run in runs for result in run.results if isinstance(result, Exception)]
    if refusals:
        console.print(f"A refusal: {str(refusals[0]).splitlines()[0]}", style="dim", markup=False)
    same = "the same" if sync_run.results == runs[-1].results else "[red]other[/]"
    gave = f"gave {same} {sync_run.complete} briefings in {sync_run.seconds:.2f} s"
    console.print(f"\nFrom sync code, [bold]briefing.batch(pairs)[/] {gave}.")


def write_figures(path: Path, runs: Sequence[Run], sync_run: Run, **more: object) -> None:
    figures = {
        **more,
        "ways": [run.figures(runs[0]) for run in runs],
        "sync": sync_run.figures(runs[0]),
    }
    path.write_text(json.dumps(figures, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------
# The command


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--pairs", type=int, default=30, choices=range(1, 31), metavar="N", help="how many pairs (30)")
    add("--latency", type=float, default=0.33, metavar="S", help="seconds an answer takes (0.33)")
    add("--min-gain", type=float, default=10, metavar="X", help="the speed-up demanded (10)")
    add("--json", type=Path, metavar="FILE", help="write the figures here")
    add("--plot", type=Path, default=PLOT, metavar="FILE", help="SVG, PNG or PDF (build/forex.svg)")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    console = Console(highlight=False)
    with market_server(chosen.latency) as control, Progress(*COLUMNS, console=console) as progress:
        pairs = control.get("/pairs").json()[: chosen.pairs]
        *runs, sync_run = [measure(way, pairs, control, progress) for way in (*WAYS, SYNC_WAY)]
    failures = complaints(runs, sync_run, chosen.min_gain)
    report(console, runs, sync_run)
    plot(runs, chosen.plot)
    console.print(f"Requests in flight over time: {shortest(chosen.plot)}")
    if chosen.json:
        setting = {"market": str(control.base_url), "pairs": len(pairs), "latency": chosen.latency}
        write_figures(chosen.json, runs, sync_run, **setting, failures=failures)
    for failure in failures:
        console.print(f"[bold red]Failed[/]: {failure}")
    return 1 if failures else 0


def shortest(path: Path) -> Path:
    """Return the path from here, where it lies under here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


if __name__ == "__main__":
    sys.exit(main())
