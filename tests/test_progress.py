"""Progress: what is told, and how it is shown where."""

import io
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from asyncify import Dual, aeach, each
from asyncify.progress import Progress, reporting

Pair = Dual[Any, Any]


class Clock:
    """A clock that is moved by hand."""

    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def fail_on_odd(value: int) -> int:
    """Return an even value; fail on an odd one."""
    if value % 2:
        raise ValueError(value)
    return value


async def fail_on_odd_async(value: int) -> int:
    """Do the same on the other path."""
    return fail_on_odd(value)


# --- what is told ---


def test_each_tells_a_function_of_ones_own() -> None:
    """It is called with the state after every result, failures among them."""
    told: list[Progress] = []

    list(each(Pair(fail_on_odd), range(4), return_exceptions=True, progress=told.append))

    assert [(state.done, state.failed, state.total) for state in told] == [(1, 0, 4), (2, 1, 4), (3, 1, 4), (4, 2, 4)]


async def test_each_tells_a_function_of_ones_own_a() -> None:
    """The same for `aeach`."""
    told: list[Progress] = []

    pair = Pair(fail_on_odd, fail_on_odd_async)
    async for _ in aeach(pair, range(4), return_exceptions=True, progress=told.append):
        pass

    assert [(state.done, state.failed, state.total) for state in told] == [(1, 0, 4), (2, 1, 4), (3, 1, 4), (4, 2, 4)]


def test_the_total_of_an_iterator_is_unknown() -> None:
    """Without a length there is neither a total nor a time left."""
    told: list[Progress] = []

    list(each(Pair(fail_on_odd), iter([2]), progress=told.append))

    assert (told[0].total, told[0].seconds_left) == (None, None)


class Wrapped:
    """Inputs whose length is asked for at a price, or not there at all, as that of `tqdm(generator)`."""

    def __init__(self, length: int | None) -> None:
        self.length = length
        self.asked = 0

    def __len__(self) -> int:
        self.asked += 1
        if self.length is None:
            raise TypeError("object of type 'generator' has no len()")
        return self.length

    def __iter__(self) -> Iterator[int]:
        return iter([2])


def test_the_length_is_asked_for_only_if_it_is_told() -> None:
    """Without progress nobody wants it, and to count the rows of a query may fetch them all."""
    inputs = Wrapped(1)
    list(each(Pair(fail_on_odd), inputs))

    assert inputs.asked == 0


def test_a_length_that_is_not_there_is_an_unknown_total() -> None:
    """A `__len__` may raise a TypeError, and the inputs be there all the same."""
    told: list[Progress] = []

    assert list(each(Pair(fail_on_odd), Wrapped(None), progress=told.append)) == [2]
    assert told[0].total is None


def test_a_total_that_is_passed_is_known_no_more() -> None:
    """A list may grow while it is read, as one of work to do; nothing is left in less than no time."""
    told: list[Progress] = []
    work = [0, 2]

    outputs = each(Pair(fail_on_odd), work, window=1, progress=told.append)
    next(outputs)
    work.append(4)

    assert list(outputs) == [2, 4]
    assert [(state.done, state.total) for state in told] == [(1, 2), (2, 2), (3, None)]
    assert told[-1].seconds_left is None


def test_results_from_a_checkpoint_count_as_done(tmp_path: Any) -> None:
    """What an earlier run has finished is progress too."""
    told: list[Progress] = []
    file = tmp_path / "run.sqlite"

    list(each(Pair(fail_on_odd), [0, 2], checkpoint=file))
    list(each(Pair(fail_on_odd), [0, 2, 4], checkpoint=file, progress=told.append))

    assert told[-1].done == 3


def test_rate_and_time_left() -> None:
    """They follow from what is done and the seconds it took."""
    state = Progress(done=50, failed=2, total=200, seconds=10.0)

    assert state.rate == 5.0
    assert state.seconds_left == 30.0


@pytest.mark.parametrize(
    ("state", "says"),
    [
        (Progress(1200, 3, 5000, 25.0), "1,200/5,000 done, 3 failed, 48.0 per second, 1:19 left"),
        (Progress(5, 0, None, 2.0), "5 done, 2.5 per second"),
        (Progress(1, 0, 7201, 1.0), "1/7,201 done, 1.0 per second, 2:00:00 left"),
        (Progress(0, 0, 10, 0.0), "0/10 done, 0.0 per second"),
    ],
)
def test_a_state_says_itself_in_a_line(state: Progress, says: str) -> None:
    """What is unknown or zero is left out."""
    assert str(state) == says


# --- how it is shown ---


def show(file: io.StringIO, clock: Clock, *, total: int | None = 100) -> None:
    """Report a hundred results, one a second, two of them failures."""
    with reporting(True, title="fetch", total=total, now=clock, file=file) as tell:  # noqa: FBT003  (as a user does)
        for number in range(100):
            clock.time += 1
            tell(1, int(number < 2))


def test_a_log_file_gets_a_plain_line_now_and_then() -> None:
    """One line every ten seconds and one at the end, without control characters."""
    file = io.StringIO()

    show(file, Clock())

    lines = file.getvalue().splitlines()
    assert lines[0] == "fetch: 10/100 done, 2 failed, 1.0 per second, 1:30 left"
    assert lines[-1] == "fetch: 100/100 done, 2 failed, 1.0 per second, 0:00 left"
    assert len(lines) == 11
    assert file.getvalue().isascii()
    assert "\r" not in file.getvalue()


def test_the_last_line_is_there_when_an_error_ends_the_stream() -> None:
    """A log says how far it had come."""
    file = io.StringIO()

    def fail() -> None:
        with reporting(True, title="fetch", total=None, now=Clock(), file=file) as tell:  # noqa: FBT003  (as a user does)
            tell(3, 1)
            raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        fail()

    assert file.getvalue() == "fetch: 3 done, 1 failed, 0.0 per second\n"


def without(*absent: str) -> Callable[[str], object]:
    """Return a stand-in for `find_spec` that does not find these."""
    return lambda name: None if name in absent else object()


def test_a_terminal_gets_the_bar_of_rich(monkeypatch: pytest.MonkeyPatch) -> None:
    """It carries the counts, and ends at the full length."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    file = Terminal()

    show(file, Clock())

    assert "━" in file.getvalue()
    assert "100/100 done, 2 failed" in file.getvalue()


def test_a_bar_shows_a_name_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Brackets in it are no markup."""
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()

    with reporting(True, title="a[b] c[/d]", total=1, file=file) as tell:  # noqa: FBT003  (as a user does)
        tell(1, 0)

    assert "a[b] c[/d]" in file.getvalue()


class Sink:
    """What some programs put in the place of a file: it can be written to, and no more."""

    def __init__(self) -> None:
        self.text = ""

    def write(self, text: str) -> int:
        self.text += text
        return len(text)

    def flush(self) -> None:
        pass


def test_a_stand_in_for_standard_error_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """It need not know whether it is a terminal."""
    sink = Sink()
    monkeypatch.setattr(sys, "stderr", sink)

    list(each(Pair(fail_on_odd, name="even"), [2, 4], progress=True))

    assert sink.text.startswith("even: 2/2 done")


def closed_file() -> io.StringIO:
    """Return a file that is closed."""
    file = io.StringIO()
    file.close()
    return file


@pytest.mark.parametrize("stderr", [None, closed_file()], ids=["none", "closed"])
def test_without_a_console_nothing_is_shown(
    stderr: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A program of windows has no standard error, a daemon a closed one; a function of one's own is called anyway."""
    told: list[Progress] = []
    monkeypatch.setattr(sys, "stderr", stderr)

    assert list(each(Pair(fail_on_odd), [2], progress=True)) == [2]
    assert list(each(Pair(fail_on_odd), [2], progress=told.append)) == [2]
    assert capsys.readouterr().out == ""
    assert len(told) == 1


def test_a_bar_does_without_standard_output(monkeypatch: pytest.MonkeyPatch) -> None:
    """It looks whether that is a terminal, and there may be none."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", None)
    file = Terminal()

    show(file, Clock())

    assert "100/100" in file.getvalue()


def test_a_terminal_gets_the_bar_of_tqdm_where_rich_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tqdm shows the total and the failures in its own way."""
    monkeypatch.setattr("asyncify.progress.find_spec", without("rich"))
    file = Terminal()

    show(file, Clock())

    assert "100/100" in file.getvalue()
    assert "failed=2" in file.getvalue()


def test_a_terminal_gets_lines_where_neither_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has to be installed for progress to be told."""
    monkeypatch.setattr("asyncify.progress.find_spec", without("rich", "tqdm"))
    file = Terminal()

    show(file, Clock())

    assert file.getvalue().splitlines()[-1] == "fetch: 100/100 done, 2 failed, 1.0 per second, 0:00 left"


def test_a_notebook_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook's output is no terminal, and is looked at all the same; rich needs ipywidgets there."""
    shell = SimpleNamespace(config={"IPKernelApp": {}})
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(get_ipython=lambda: shell))
    monkeypatch.setattr("asyncify.progress.find_spec", without("ipywidgets"))
    file = io.StringIO()

    show(file, Clock())

    assert "100/100" in file.getvalue()
    assert "fetch: 100/100 done" not in file.getvalue()


def test_a_bar_without_a_total_still_counts() -> None:
    """A stream of unknown length shows what is done."""
    file = Terminal()

    show(file, Clock(), total=None)

    assert "100 done, 2 failed" in file.getvalue()


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """The output of a program stays its own."""
    list(each(Pair(fail_on_odd, name="even"), [2, 4], progress=True))
    captured = capsys.readouterr()

    assert captured.out == ""
    assert captured.err.startswith("even: 2/2 done")


@pytest.mark.parametrize("absent", [(), ("rich",)], ids=["rich", "tqdm"])
def test_what_a_program_prints_beside_a_bar_arrives(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, absent: tuple[str, ...]
) -> None:
    """A bar in the terminal leaves alone what goes to a file, as in `python run.py > results.txt`."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("asyncify.progress.find_spec", without(*absent))
    file = Terminal()

    with reporting(True, title="fetch", total=1, file=file) as tell:  # noqa: FBT003  (as a user does)
        print("result")  # noqa: T201  (what is tested)
        tell(1, 0)

    assert capsys.readouterr().out == "result\n"
    assert "1/1" in file.getvalue()


def test_without_progress_nothing_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    """Silence is the default."""
    list(each(Pair(fail_on_odd), [2, 4]))
    captured = capsys.readouterr()

    assert captured.out == captured.err == ""
