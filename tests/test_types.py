"""The types that users see: what checkers make of `typed_uses.py`, and that nothing public is without a type."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
USES = "tests/typed_uses.py"

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"

pytestmark = pytest.mark.timeout(600)


def _run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run a module of this environment, which sees the package and what it imports."""
    path = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    command = [sys.executable, "-m", *arguments]
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_mypy_agrees_with_every_typed_use() -> None:
    """Strict mypy infers what is asserted, and finds the marked errors and no others."""
    done = _run("mypy", "--python-version", PYTHON, USES)

    assert done.returncode == 0, done.stdout


def test_pyright_agrees_with_every_typed_use() -> None:
    """Strict pyright infers what is asserted, and finds the marked errors and no others."""
    done = _run("pyright", "--pythonversion", PYTHON, "--pythonpath", sys.executable, USES)

    assert done.returncode == 0, done.stdout


def test_everything_public_has_a_type(tmp_path: Path) -> None:
    """`pyright --verifytypes` finds no public symbol whose type is unknown or left to inference."""
    done = _run(
        "pyright", "--pythonpath", sys.executable, "--verifytypes", "asyncify", "--ignoreexternal", cwd=tmp_path
    )

    assert "Type completeness score: 100%" in done.stdout, done.stdout[:3000]
    assert done.returncode == 0
