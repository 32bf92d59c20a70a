"""Run one benchmark and print what came out: `python -m benchmarks NAME`."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.harness import CaseReport, Entry, Outcome, Pictured, Report, compare, entries, environment, measure


def options(arguments: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Run one benchmark; the exit status is 1 if a target was missed. Without a name, list them.",
    )
    parser.add_argument("name", nargs="?", default="list", help="a benchmark, or `list`")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write samples, medians, ratios and targets here")
    parser.add_argument("--rounds", type=positive, metavar="N", help="how often each side runs (what the case says)")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="measure nothing, draw the benchmark's picture here")
    parser.add_argument("--quick", action="store_true", help="small cases, to see that everything runs")
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    """Read a number of rounds."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number of rounds")
    return number


def amount(value: float, unit: str) -> str:
    """Write a figure with its unit, seconds with the prefix that fits."""
    if unit != "s":
        return f"{value:,.4g} {unit}"
    for factor, prefixed in ((1, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {prefixed}"
    return f"{value * 1e9:.3g} ns"


def verdict(outcome: Outcome, unit: str) -> str:
    """Write the target of a side and whether it was met."""
    target = outcome.target
    if target is None:
        return ""
    bounds = [("≤", target.at_most), ("≥", target.at_least)]
    asked = " ".join(
        f"{sign} {f'{bound:.2f}' if target.of == 'ratio' else amount(bound, unit)}"
        for sign, bound in bounds
        if bound is not None
    )
    return f"[green]{asked} met[/]" if outcome.met else f"[bold red]{asked} missed[/]"


def counted(rounds: int) -> str:
    """Write a number of rounds."""
    return "1 round" if rounds == 1 else f"{rounds} rounds"


def footnotes(case: CaseReport) -> Iterator[str]:
    """Say what the ratios refer to, and which sides ran fewer rounds than the others."""
    yield f"ratio to: {case.reference}"
    most = max(len(outcome.samples) for outcome in case.outcomes)
    for outcome in case.outcomes:
        if outcome.against != case.reference:
            yield f"* to: {outcome.against}"
        if len(outcome.samples) < most:
            yield f"{outcome.side}: {counted(len(outcome.samples))}"


def table(case: CaseReport) -> Table:
    """Draw one case."""
    rounds = max(len(outcome.samples) for outcome in case.outcomes)
    each = f", each the mean of {case.inner:,} runs" if case.inner > 1 else ""
    drawn = Table(
        title=f"{case.name} ({case.gauge}, {counted(rounds)}{each})",
        caption=escape("\n".join(footnotes(case))),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        collapse_padding=True,
    )
    drawn.add_column("side", no_wrap=True)
    for heading in ("median", "min", "max", "ratio"):
        drawn.add_column(heading, justify="right", no_wrap=True)
    drawn.add_column("target", no_wrap=True)
    for seen in case.outcomes:
        figures = [amount(figure, case.unit) for figure in (seen.median, seen.low, seen.high)]
        ratio = f"{seen.ratio:.2f}{' ' if seen.against == case.reference else '*'}"
        drawn.add_row(escape(seen.side), *figures, ratio, verdict(seen, case.unit))
    return drawn


def list_entries(console: Console) -> None:
    """Print the benchmarks there are."""
    drawn = Table("name", "what it compares", box=box.SIMPLE_HEAD)
    for name, _, description in entries():
        drawn.add_row(name, escape(description))
    console.print(drawn)


def run(name: str, entry: Entry, chosen: argparse.Namespace, console: Console) -> Report:
    """Measure all cases of a benchmark and print each as soon as it is there."""
    where = environment()
    console.print(
        f"{name}: Python {where.python}, langchain-core {where.langchain_core}, {where.cpus} CPUs", highlight=False
    )
    cases = []
    for case in entry.benchmark(quick=chosen.quick):
        with console.status(case.name):
            cases.append(compare(case, measure(case, chosen.rounds)))
        console.print(table(cases[-1]), "")
    return Report(name, where, cases)


def plot(name: str, entry: Entry, chosen: argparse.Namespace, console: Console) -> int:
    """Draw the picture of a benchmark, if it has one, and return the exit status."""
    if not isinstance(entry, Pictured):
        console.print(f"{name} has no picture", style="red")
        return 2
    entry.plot(chosen.plot, quick=chosen.quick)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Do what the command line asks for and return the exit status."""
    chosen = options(arguments)
    console = Console()
    if chosen.name == "list":
        list_entries(console)
        return 0
    found = {name: entry for name, entry, _ in entries()}
    if chosen.name not in found:
        console.print(f"no benchmark {chosen.name!r}; there are: {', '.join(found)}", style="red")
        return 2
    if chosen.plot:
        return plot(chosen.name, found[chosen.name], chosen, console)
    report = run(chosen.name, found[chosen.name], chosen, console)
    if chosen.json:
        chosen.json.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    for missed in report.missed:
        console.print(f"target missed: {missed}", style="red")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
