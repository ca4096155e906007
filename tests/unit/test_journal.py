"""A test run that goes on after the machine it ran in broke down (tests/conftest.py)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = """
import os
from pathlib import Path

def test_passes():
    with Path("runs").open("a") as file:
        file.write("x")

def test_breaks_the_machine():
    path = Path("breaks")
    left = int(path.read_text())
    path.write_text(str(left - 1))
    if left > 0:
        os._exit(71)

def test_fails():
    assert not Path("fail").exists()
"""


def run(directory: Path, *, breaks: int | None = None) -> subprocess.CompletedProcess[str]:
    if breaks is not None:
        (directory / "test_it.py").write_text(TESTS)
        (directory / "conftest.py").write_bytes(
            Path(__file__).parent.parent.joinpath("conftest.py").read_bytes()
        )
        (directory / "breaks").write_text(str(breaks))
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--journal", "journal", "."],
        cwd=directory,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
    )


def test_goes_on_with_the_test_that_was_running(tmp_path: Path) -> None:
    assert run(tmp_path, breaks=1).returncode == 71
    again = run(tmp_path)
    assert again.returncode == 0, again.stdout
    assert "broke the machine that it ran in: test_it.py::test_breaks_the_machine" in again.stdout
    assert "all machines together: 3 passed" in again.stdout
    assert (tmp_path / "runs").read_text() == "x"


def test_a_test_that_breaks_two_machines_has_failed(tmp_path: Path) -> None:
    assert run(tmp_path, breaks=9).returncode == 71
    assert run(tmp_path).returncode == 71
    last = run(tmp_path)
    assert last.returncode == 1
    assert "all machines together: 1 failed, 2 passed" in last.stdout
    assert "FAILED test_it.py::test_breaks_the_machine" in last.stdout
    assert (tmp_path / "breaks").read_text() == "7"


def test_what_failed_before_the_break_still_fails(tmp_path: Path) -> None:
    (tmp_path / "fail").touch()
    run(tmp_path, breaks=0)
    (tmp_path / "fail").unlink()
    again = run(tmp_path)
    assert again.returncode == 1, again.stdout


def test_all_had_passed(tmp_path: Path) -> None:
    assert run(tmp_path, breaks=0).returncode == 0
    assert run(tmp_path).returncode == 0
