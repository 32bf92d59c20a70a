"""The layers of the package: a module imports only from the levels under its own."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = "asyncify"
ROOT = Path(__file__).parents[1]
ROW = re.compile(r"\| (\d+|edge) \| ((?:`[\w.]+`(?:, )?)+) \|")


def levels() -> dict[str, int]:
    """Return the level of each module, as the table of docs/design.md has it; the edge stands above the core."""
    rows = ROW.findall((ROOT / "docs/design.md").read_text(encoding="utf-8"))
    core = {room: int(level) for level, rooms in rows if level != "edge" for room in re.findall(r"[\w.]+", rooms)}
    edge = [room for level, rooms in rows if level == "edge" for room in re.findall(r"[\w.]+", rooms)]
    return core | {"__init__": max(core.values()) + 1} | dict.fromkeys(edge, max(core.values()) + 2)


# A room is a module, by its name below the package. The core imports nothing of the edge.
LEVELS = levels()


def room(path: str) -> str:
    """Return the room that a file of the package is; a subpackage's `__init__.py` is named by the subpackage."""
    return path.removeprefix(f"{PACKAGE}/").removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def room_of(dotted: str, sources: Mapping[str, str]) -> str:
    """Return the room that a dotted name lies in; a public name lies in `__init__`."""
    rooms = LEVELS.keys() | {room(path) for path in sources}
    below = dotted.split(".")[1:]
    names = (".".join(below[:length]) for length in range(len(below), 0, -1))
    return next((name for name in names if name in rooms), "__init__")


def absolute(node: ast.ImportFrom, path: str) -> str:
    """Return the absolute name of the module that a `from ... import` in the file reads."""
    package = path.removesuffix(".py").split("/")[:-1]
    base = package[: len(package) - node.level + 1] if node.level else []
    return ".".join([*base, *([node.module] if node.module else [])])


def imported(path: str, source: str) -> Iterator[tuple[int, str]]:
    """Yield line and dotted name of each import of a file, wherever in the file it stands."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import():
                yield from ((node.lineno, alias.name) for alias in node.names)
            case ast.ImportFrom():
                module = absolute(node, path)
                yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def wrong_arrows(sources: Mapping[str, str]) -> list[str]:
    """Return a sentence for each module without a level and each import that does not point down."""
    wrong = []
    for path, source in sources.items():
        here = room(path)
        if here not in LEVELS:
            wrong.append(f"{path}: {here} has no level, add it to the table of docs/design.md")
            continue
        for line, name in imported(path, source):
            target = room_of(name, sources)
            if name.split(".")[0] == PACKAGE and target != here and not LEVELS.get(target, 99) < LEVELS[here]:
                wrong.append(f"{path}:{line}: {here} must not import {target}")
    return wrong


def test_the_table_lists_what_there_is() -> None:
    """No row of it speaks of a module that is gone."""
    files = (ROOT / PACKAGE).rglob("*.py")

    assert {room(file.relative_to(ROOT).as_posix()) for file in files} == LEVELS.keys()


def test_every_import_of_the_package_points_down() -> None:
    """No module of the package imports from its own level or from one above, and none is unlisted."""
    files = sorted((ROOT / PACKAGE).rglob("*.py"))
    sources = {file.relative_to(ROOT).as_posix(): file.read_text(encoding="utf-8") for file in files}

    assert f"{PACKAGE}/__init__.py" in sources
    assert wrong_arrows(sources) == []


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        pytest.param(
            "asyncify/limiter.py",
            "import asyncify.runnable",
            ["asyncify/limiter.py:1: limiter must not import runnable"],
            id="up",
        ),
        pytest.param(
            "asyncify/limiter.py",
            "from .runnable import Dual",
            ["asyncify/limiter.py:1: limiter must not import runnable"],
            id="up and relative",
        ),
        pytest.param(
            "asyncify/meter.py",
            "from asyncify.pools import ThreadPool",
            ["asyncify/meter.py:1: meter must not import pools"],
            id="sideways",
        ),
        pytest.param(
            "asyncify/meter.py",
            "from . import errors, watches",
            ["asyncify/meter.py:1: meter must not import watches"],
            id="sideways and from the package",
        ),
        pytest.param(
            "asyncify/pairs.py",
            "def register():\n    from asyncify.decorators import dual",
            ["asyncify/pairs.py:2: pairs must not import decorators"],
            id="lazy",
        ),
        pytest.param(
            "asyncify/pools.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from asyncify.limiter import Limiter",
            ["asyncify/pools.py:3: pools must not import limiter"],
            id="for types only",
        ),
        pytest.param(
            "asyncify/pairs.py",
            "from asyncify import Dual",
            ["asyncify/pairs.py:1: pairs must not import __init__"],
            id="a public name",
        ),
        pytest.param(
            "asyncify/errors.py",
            "import asyncify",
            ["asyncify/errors.py:1: errors must not import __init__"],
            id="the whole package",
        ),
        pytest.param(
            "asyncify/decorators.py",
            "from asyncify.testing import fake",
            ["asyncify/decorators.py:1: decorators must not import testing"],
            id="the edge",
        ),
        pytest.param(
            "asyncify/deadlock/holds.py",
            "from ..limiter import Limiter",
            ["asyncify/deadlock/holds.py:1: deadlock.holds must not import limiter"],
            id="up from a subpackage",
        ),
        pytest.param(
            "asyncify/deadlock/holds.py",
            "from . import proofs",
            ["asyncify/deadlock/holds.py:1: deadlock.holds must not import deadlock.proofs"],
            id="up within a subpackage",
        ),
        pytest.param(
            "asyncify/helpers.py",
            "",
            ["asyncify/helpers.py: helpers has no level, add it to the table of docs/design.md"],
            id="unlisted",
        ),
        pytest.param(
            "asyncify/helpers/text.py",
            "",
            ["asyncify/helpers/text.py: helpers.text has no level, add it to the table of docs/design.md"],
            id="unlisted subpackage",
        ),
    ],
)
def test_the_checker_names_a_wrong_arrow(path: str, source: str, expected: list[str]) -> None:
    """An arrow up or sideways is found however it is written, and so is a module without a level."""
    assert wrong_arrows({path: source}) == expected


@pytest.mark.parametrize(
    ("path", "source"),
    [
        pytest.param("asyncify/runnable.py", "from .fanout import fan\nimport asyncify.errors", id="down"),
        pytest.param("asyncify/testing.py", "from asyncify import registry\nimport asyncify.clock", id="edge"),
        pytest.param("asyncify/deadlock/proofs.py", "from .holds import loose", id="within a subpackage"),
        pytest.param("asyncify/meter.py", "import math\nfrom http import HTTPStatus", id="other packages"),
    ],
)
def test_the_checker_passes_a_right_arrow(path: str, source: str) -> None:
    """An arrow down, within one room or out of the package is no finding."""
    assert wrong_arrows({path: source}) == []


def test_an_import_of_an_unlisted_module_is_a_finding() -> None:
    """Importing a module without a level counts as an arrow up, beside the finding for the module."""
    sources = {"asyncify/limiter.py": "from asyncify.helpers import clamp", "asyncify/helpers.py": ""}

    assert wrong_arrows(sources) == [
        "asyncify/limiter.py:1: limiter must not import helpers",
        "asyncify/helpers.py: helpers has no level, add it to the table of docs/design.md",
    ]
