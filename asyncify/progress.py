"""How far a stream has come, told to whoever wants to know."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, TextIO

__all__ = ["Progress", "Report", "reporting"]

_LOG_SECONDS = 10.0
_REDRAW_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stream has come: inputs `done` (the failed among them), of `total` if that is known."""

    done: int
    failed: int
    total: int | None
    seconds: float

    @property
    def rate(self) -> float:
        """Inputs done per second, since the beginning."""
        return self.done / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all is done, at this rate; None if that can't be told."""
        if self.total is None or not self.rate:
            return None
        return (self.total - self.done) / self.rate

    def __str__(self) -> str:
        """Say it in one line: `1,200/5,000 done, 3 failed, 48.1 per second, 1:19 left`."""
        total = "" if self.total is None else f"/{self.total:,}"
        failed = f", {self.failed:,} failed" if self.failed else ""
        left = "" if self.seconds_left is None else f", {_clock(self.seconds_left)} left"
        return f"{self.done:,}{total} done{failed}, {self.rate:,.1f} per second{left}"


Report = Callable[[Progress], object]


@contextmanager
def reporting(
    asked: bool | Report,  # noqa: FBT001  (the user's own argument, handed on)
    *,
    title: str,
    total: int | None,
    now: Callable[[], float] = time.monotonic,
    file: TextIO | None = None,
) -> Generator[Callable[[int, int], None]]:
    """Give a function that is told of inputs done, and of those failed among them; show what it is told.

    A bar of rich in a terminal or a notebook, or else of tqdm if that is what is installed; a line every ten seconds
    where no one looks on. A function of one's own is called with a `Progress` each time.
    """
    where = file or sys.stderr
    is_open = where and not getattr(where, "closed", False)  # a program without a console has no standard error
    if asked is False or (asked is True and not is_open):
        yield lambda more, more_failed: None
        return
    began = now()
    done = failed = 0

    def state() -> Progress:
        known = total if total is None or done <= total else None  # a list may grow while it is read
        return Progress(done, failed, known, now() - began)

    with _shown(asked, title, total, where) as (show, interval):
        due = now() + interval

        def add(more: int, more_failed: int) -> None:
            nonlocal done, failed, due
            done += more
            failed += more_failed
            if now() >= due:
                due = now() + interval
                show(state())

        try:
            yield add
        finally:
            if not callable(asked):
                show(state())  # the last word, whatever has ended the stream


@contextmanager
def _shown(
    asked: bool | Report,  # noqa: FBT001  (the user's own argument, handed on)
    title: str,
    total: int | None,
    file: TextIO,
) -> Generator[tuple[Report, float]]:
    """Give what shows a state, and how many seconds apart it does so at least."""
    if callable(asked):
        yield asked, 0.0
        return
    kind = _kind(file)
    with {"rich": _rich, "tqdm": _tqdm, "log": _log}[kind](title, total, file) as show:
        yield show, _LOG_SECONDS if kind == "log" else _REDRAW_SECONDS


def _kind(file: TextIO) -> Literal["rich", "tqdm", "log"]:
    notebook = _in_notebook()
    if not notebook and not _is_terminal(file):
        return "log"
    if find_spec("rich") and (find_spec("ipywidgets") or not notebook):  # in a notebook rich shows nothing without
        return "rich"
    return "tqdm" if find_spec("tqdm") else "log"


def _is_terminal(file: object) -> bool:
    """Tell whether somebody looks on; what stands in for a file may not know, or be None."""
    return bool(getattr(file, "isatty", bool)())


def _in_notebook() -> bool:
    shell: Any = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


@contextmanager
def _rich(title: str, total: int | None, file: TextIO) -> Generator[Report]:
    from rich.console import Console  # noqa: PLC0415  (an optional library, imported where it is used)
    from rich.progress import BarColumn, TextColumn  # noqa: PLC0415
    from rich.progress import Progress as Bars  # noqa: PLC0415

    title_column = TextColumn("{task.description}", markup=False)  # a name may have brackets
    columns = (title_column, BarColumn(), TextColumn("{task.fields[state]}"))
    # A terminal shows what the program prints above the bar; what goes elsewhere has to arrive there.
    console, stdout = Console(file=file), _is_terminal(sys.stdout)
    with Bars(*columns, console=console, auto_refresh=False, redirect_stdout=stdout) as bars:
        bar = bars.add_task(title, total=total, state="")
        yield lambda progress: bars.update(bar, completed=progress.done, state=str(progress), refresh=True)


@contextmanager
def _tqdm(title: str, total: int | None, file: TextIO) -> Generator[Report]:
    tqdm: Any = import_module("tqdm.auto" if find_spec("ipywidgets") else "tqdm.std").tqdm  # it has no types

    with tqdm(desc=title, total=total, file=file) as bar:

        def show(progress: Progress) -> None:
            if progress.failed:
                bar.set_postfix(failed=progress.failed, refresh=False)
            bar.update(progress.done - bar.n)
            bar.refresh()

        yield show


@contextmanager
def _log(title: str, total: int | None, file: TextIO) -> Generator[Report]:
    yield lambda progress: print(f"{title}: {progress}", file=file, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
