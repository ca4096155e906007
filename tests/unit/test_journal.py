"""Test runs that go on after the machine they ran in broke down, and that share their tests
(tests/conftest.py, tests/support/machines.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import machines

TESTS_DIRECTORY = Path(__file__).parent.parent

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
            TESTS_DIRECTORY.joinpath("conftest.py").read_bytes()
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


SHARED = """
import os
from pathlib import Path

def test_{name}():
    path = Path("{name}.breaks")
    if path.exists():
        path.unlink()
        {end}
    with Path("runs").open("a") as file:
        file.write("{name} ")
"""


def run_shards(directory: Path, *, end: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    for name in ("one", "two", "three"):
        (directory / f"test_{name}.py").write_text(SHARED.format(name=name, end=end))
    (directory / "conftest.py").write_bytes((TESTS_DIRECTORY / "conftest.py").read_bytes())
    (directory / "two.breaks").touch()
    monkeypatch.chdir(directory)
    monkeypatch.setenv("PYTEST_ADDOPTS", "")
    options = ["-p", "no:cacheprovider", "."]
    return [
        machines.run(shard, hang_seconds=15)
        for shard in machines.shards(directory, 2, ["env"], options)
    ]


@pytest.mark.parametrize("end", ["os._exit(71)", "__import__('time').sleep(60)"])
def test_machines_share_the_tests_and_survive_breaks_and_hangs(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_shards(tmp_path, end=end, monkeypatch=monkeypatch) == [0, 0]
    assert sorted((tmp_path / "runs").read_text().split()) == ["one", "three", "two"]
    told = capsys.readouterr().out
    assert "[1] emulated machine number 1 broke down" in told
    assert "[1] passed test_two.py::test_two" in told
    assert "2 passed" not in (tmp_path / "2.log").read_text()
