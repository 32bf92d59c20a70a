"""The documentation is true: its programs run and print what it says."""

import contextlib
import io
import itertools
import re
import sys
import types
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]*)(?:#([^)]*))?\)")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@pytest.fixture(autouse=True, scope="module")
def unhurried() -> None:
    """Tell of sync calls that hold an event loop, as the pages say."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_programs_of_a_page_run_and_print_what_it_says(page: Path) -> None:
    """The Python blocks of a page are one program; a text block behind one is its output, else it prints nothing."""
    blocks = BLOCK.findall(page.read_text())
    module = types.ModuleType(page.stem)
    del module.__spec__  # a module with one that is None must name a loader: so says Python 3.12 when it warns
    sys.modules[page.stem] = module
    try:
        for (language, source), (next_language, expected) in itertools.pairwise([*blocks, ("", "")]):
            if language != "python":
                continue
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(source, page.name, "exec"), module.__dict__)  # noqa: S102  (our own documentation)

            assert printed.getvalue() == (expected if next_language == "text" else "")
    finally:
        del sys.modules[page.stem]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: page.name)
def test_the_links_of_a_page_lead_somewhere(page: Path) -> None:
    """Each relative link names a file of the project, and a heading of it if it names one."""
    links = [(page.parent / name if name else page, anchor) for name, anchor in LINK.findall(page.read_text())]
    missing = [link for link in links if not link[0].exists() or (link[1] and link[1] not in anchors(link[0]))]

    assert missing == []


def anchors(page: Path) -> set[str]:
    """Return what the headings of a page are linked by: in small letters, spaces as hyphens, without punctuation."""
    headings = HEADING.findall(BLOCK.sub("", page.read_text()))
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
