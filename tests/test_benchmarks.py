"""The harness of the benchmarks: turns, figures, comparison, discovery, output."""

import asyncio
import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks.__main__ import amount, main, table
from benchmarks.harness import Case, Gauge, Pictured, Side, Target, asample, compare, entries, measure, sample, turns


def nothing() -> None:
    """Take no time."""


async def anothing() -> None:
    """Take no time, on a loop."""


def case(*sides: Side, **options: Any) -> Case:
    """Make a case whose first side is the reference."""
    return Case("a case", sides, reference=sides[0].name, **options)


# Turns


def test_the_sides_take_turns() -> None:
    """After a warm-up that does not count, the sides run A B C A B C, never A A B B."""
    ran: list[str] = []
    sides = [Side(name, partial(ran.append, name)) for name in "ABC"]

    samples = measure(case(*sides, rounds=2, warmups=1))

    assert "".join(ran) == "ABCABCABC"
    assert {name: len(taken) for name, taken in samples.items()} == {"A": 2, "B": 2, "C": 2}


def test_a_slow_side_sits_out() -> None:
    """A side with rounds of its own leaves after them, and one that is not warmed up joins after the warm-up."""
    sides = [Side("fast", nothing), Side("slow", nothing, rounds=1, warm=False)]

    order = [(side.name, counts) for side, counts in turns(case(*sides), rounds=2)]

    assert order == [("fast", False), ("fast", True), ("slow", True), ("fast", True)]


def test_rounds_may_be_chosen_for_a_run() -> None:
    """The rounds of the command line replace those of the case."""
    assert len(measure(case(Side("A", nothing), rounds=5), rounds=2)["A"]) == 2


def test_async_sides_share_one_loop() -> None:
    """All async sides of a case run on one event loop, a sync side runs on none."""
    loops: list[object] = []

    async def on_loop() -> None:
        loops.append(asyncio.get_running_loop())

    def off_loop() -> None:
        with pytest.raises(RuntimeError, match="no running event loop"):
            asyncio.get_running_loop()

    measure(case(Side("A", on_loop), Side("B", off_loop), Side("C", on_loop)), rounds=2)

    assert len(loops) == 6
    assert len(set(map(id, loops))) == 1


# Figures


def test_a_sample_is_the_cost_of_one_run() -> None:
    """A sync and an async side of 2 ms, run five times a sample, both count for 2 ms, not for 10."""

    async def nap() -> None:
        await asyncio.sleep(0.002)

    per_run = case(Side("A", nothing), inner=5)

    assert 0.002 <= sample(lambda: time.sleep(0.002), per_run) < 0.01
    assert 0.002 <= asyncio.run(asample(nap, per_run)) < 0.01


def test_cpu_time_leaves_out_waiting() -> None:
    """By the CPU clock a sleep costs next to nothing."""
    assert sample(lambda: time.sleep(0.05), case(Side("A", nothing), gauge=Gauge.CPU)) < 0.025


def test_a_side_may_return_its_figure() -> None:
    """Where figures are returned, a sample is the returned number."""
    assert sample(lambda: 99, case(Side("A", nothing), gauge=Gauge.RETURNED)) == 99


def test_a_returned_figure_must_be_a_number() -> None:
    """A side that should return a number and does not is an error that names the case."""
    with pytest.raises(TypeError, match="a case: a side returned None"):
        sample(nothing, case(Side("A", nothing), gauge=Gauge.RETURNED))


def test_an_awaitable_from_a_sync_side_is_refused() -> None:
    """A lambda that returns a coroutine would be measured without being run: that is an error."""
    coroutine = anothing()

    with pytest.raises(TypeError, match="async def"):
        sample(lambda: coroutine, case(Side("A", nothing)))
    coroutine.close()


def test_no_garbage_is_collected_while_the_clock_runs() -> None:
    """The collector is off during a sample and on again after it."""
    seen: list[bool] = []

    sample(lambda: seen.append(gc.isenabled()), case(Side("A", nothing)))

    assert seen == [False]
    assert gc.isenabled()


# Comparison


def test_medians_and_ratios() -> None:
    """A side is shown by its median, lowest and highest sample, and its median over that of the reference."""
    report = compare(case(Side("A", nothing), Side("B", nothing)), {"A": [2, 1, 9], "B": [5, 4, 3]})

    a, b = report.outcomes
    assert (a.median, a.low, a.high, a.ratio) == (2, 1, 9, 1)
    assert (b.median, b.low, b.high, b.ratio) == (4, 3, 5, 2)


def test_a_side_may_have_a_reference_of_its_own() -> None:
    """`against` names another side to be compared with."""
    sides = [Side("A", nothing), Side("B", nothing), Side("C", nothing, against="B")]

    c = compare(case(*sides), {"A": [1], "B": [4], "C": [6]}).outcomes[2]

    assert (c.against, c.ratio) == ("B", 1.5)


@pytest.mark.parametrize(
    ("target", "met"),
    [
        (None, None),
        (Target(at_most=1.5), True),
        (Target(at_most=1.49), False),
        (Target(at_least=1.5), True),
        (Target(at_least=1.51), False),
        (Target(at_least=1, at_most=2), True),
        (Target(at_most=3, of="median"), True),
        (Target(at_most=2.9, of="median"), False),
    ],
)
def test_targets(target: Target | None, met: bool | None) -> None:  # noqa: FBT001  (None: there is no target)
    """A target bounds the ratio or the median, bounds included; a side without one neither meets nor misses."""
    sides = [Side("A", nothing), Side("B", nothing, target=target)]

    assert compare(case(*sides), {"A": [2], "B": [3]}).outcomes[1].met is met


def test_a_case_refuses_two_sides_of_one_name() -> None:
    """Two sides of one name would share their samples: that is an error."""
    with pytest.raises(ValueError, match="share a name"):
        case(Side("A", nothing), Side("A", nothing))


def test_a_case_refuses_an_unknown_reference() -> None:
    """A reference that is no side of the case is an error that names it."""
    with pytest.raises(ValueError, match="no side is called 'Z'"):
        case(Side("A", nothing), Side("B", nothing, against="Z"))


# Discovery and output


def test_every_module_with_a_benchmark_is_found() -> None:
    """Every module beside the harness is an entry, described by the first line of its docstring."""
    root = Path(__file__).parents[1] / "benchmarks"
    modules = {file.stem for file in root.glob("*.py")} - {"__init__", "__main__", "harness"}

    found = {name: description for name, _, description in entries()}

    assert set(found) == modules
    assert all(found.values())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (0.1, "100 ms"), (0.00032, "320 µs"), (2.3e-7, "230 ns"), (0.0, "0 ns")],
)
def test_seconds_have_the_prefix_that_fits(seconds: float, text: str) -> None:
    """A figure is written with three digits and its unit."""
    assert amount(seconds, "s") == text


def test_other_units_have_no_prefix() -> None:
    """A figure that is no time keeps its unit."""
    assert amount(1234.0, "calls") == "1,234 calls"


def test_the_table_tells_met_from_missed(capsys: pytest.CaptureFixture[str]) -> None:
    """The table shows each target with what became of it."""
    sides = [
        Side("A", nothing),
        Side("[B]", nothing, target=Target(at_most=3)),
        Side("C", nothing, target=Target(at_most=1.1)),
    ]

    Console(width=120).print(table(compare(case(*sides), {"A": [1], "[B]": [2], "C": [2]})))

    a, b, c = (line for line in capsys.readouterr().out.splitlines() if line.strip().startswith(("A", "[B]", "C")))
    assert "≤" not in a
    assert "≤ 3.00 met" in b
    assert "≤ 1.10 missed" in c


def test_the_table_says_what_is_not_as_in_the_other_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """A side with another reference is marked, and one with fewer rounds is named, under the table."""
    sides = [Side("A", nothing), Side("B", nothing), Side("C", nothing, against="B")]

    Console(width=80).print(table(compare(case(*sides), {"A": [1, 1], "B": [2], "C": [3, 3]})))

    shown = capsys.readouterr().out
    assert "1.50*" in shown
    assert "* to: B" in shown
    assert "B: 1 round" in shown


def test_without_a_name_the_benchmarks_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks` lists the entries."""
    status = main([])

    assert status == 0
    assert "delegation" in capsys.readouterr().out


def test_an_unknown_name_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A name that is no benchmark gives status 2 and the names there are."""
    status = main(["delegatoin"])

    assert status == 2
    assert "delegation" in capsys.readouterr().out


def test_a_benchmark_without_a_picture_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--plot` measures nothing, and gives status 2 where there is nothing to draw."""
    status = main(["delegation", "--plot", str(tmp_path / "picture.svg")])

    assert status == 2
    assert "delegation has no picture" in capsys.readouterr().out


@pytest.mark.parametrize("name", [name for name, entry, _ in entries() if isinstance(entry, Pictured)])
def test_a_picture_is_drawn(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--plot` writes the picture of a benchmark that has one, and prints no table."""
    file = tmp_path / "picture.svg"

    status = main([name, "--quick", "--plot", str(file)])

    assert status == 0
    assert "<svg" in file.read_text(encoding="utf-8")
    assert "median" not in capsys.readouterr().out


def test_rounds_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    """No rounds at all are refused by the command line."""
    with pytest.raises(SystemExit):
        main(["delegation", "--rounds", "0"])

    assert "0 is not a number of rounds" in capsys.readouterr().err


@pytest.mark.parametrize("name", [name for name, _, _ in entries()])
def test_a_quick_run_writes_its_figures(name: str, tmp_path: Path) -> None:
    """Every benchmark runs with `--quick`, and its JSON holds environment, samples, medians, ratios and targets."""
    file = tmp_path / "figures.json"

    main([name, "--quick", "--rounds", "1", "--json", str(file)])

    report = json.loads(file.read_text(encoding="utf-8"))
    assert report["benchmark"] == name
    assert set(report["environment"]) == {"python", "langchain_core", "platform", "cpus", "started"}
    assert report["cases"]
    for outcome in (outcome for shown in report["cases"] for outcome in shown["outcomes"]):
        assert set(outcome) == {
            "side", "samples", "median", "low", "high", "against", "ratio", "target", "met",
        }  # fmt: skip
        assert len(outcome["samples"]) == 1
        assert outcome["median"] >= 0
