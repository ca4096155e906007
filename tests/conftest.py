"""Test runs that survive the machine they run in, and share their tests with others.

`--journal FILE` notes in FILE when each test starts and how it ends. A run that finds such a file
goes on where the other one broke off: tests that ended are not repeated but count as they ended,
and one that did not end is started once more, and fails if it brings the machine down again. What
was broken off and what had failed is in the summary.

Runs whose journals stand in one directory share their tests: each runs the modules that it claims
first. The files whose names end in ``.claim`` tell which; `--from-the-end` has a run begin with the
last one.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path

import pytest

_STARTED = "started"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--journal", type=Path, help="go on with the run that this file tells of")
    parser.addoption("--from-the-end", action="store_true", help="begin with the last module")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("journal")
    if path is not None:
        config.pluginmanager.register(Journal(path), "journal")


class Journal:
    """The plugin. A line of the file is an outcome or ``started``, a blank and the test's name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._outcomes: dict[str, str] = {}
        starts: Counter[str] = Counter()
        for line in path.read_text().splitlines() if path.exists() else []:
            what, _, test = line.partition(" ")
            if what == _STARTED:
                starts[test] += 1
            else:
                self._outcomes[test] = what
        self._modules: dict[Path, bool] = {}
        self._broken = [test for test in starts if test not in self._outcomes]
        for test in self._broken:
            if starts[test] > 1:
                self._note("failed", test)

    def _note(self, what: str, test: str) -> None:
        if what != _STARTED:
            self._outcomes[test] = what
        with self._path.open("a") as file:
            file.write(f"{what} {test}\n")
            file.flush()
            os.fsync(file)

    def _failed(self) -> list[str]:
        return [test for test, outcome in self._outcomes.items() if outcome == "failed"]

    def _claims(self, module: Path) -> bool:
        """Whether this run is the one that runs the tests of `module`."""
        if module not in self._modules:
            # A symbolic link is there with its contents, or not at all.
            claim = self._path.parent / f"{module.parent.name}-{module.stem}.claim"
            with contextlib.suppress(FileExistsError):
                claim.symlink_to(self._path.name)
            self._modules[module] = claim.readlink() == Path(self._path.name)
        return self._modules[module]

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> bool | None:
        return None if self._claims(item.path) else True

    def pytest_collection_modifyitems(
        self, config: pytest.Config, items: list[pytest.Item]
    ) -> None:
        if config.getoption("from_the_end"):
            modules = list(dict.fromkeys(item.path for item in items))
            items.sort(key=lambda item: -modules.index(item.path))
        done = [item for item in items if item.nodeid in self._outcomes]
        if done:
            config.hook.pytest_deselected(items=done)
            items[:] = [item for item in items if item.nodeid not in self._outcomes]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._note(_STARTED, nodeid)
        self._worst = "passed"

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.outcome != "passed" and self._worst != "failed":
            self._worst = report.outcome

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._note(self._worst, nodeid)

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        nothing_left = exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED and self._outcomes
        if self._failed() and (nothing_left or exitstatus == pytest.ExitCode.OK):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        elif nothing_left:
            session.exitstatus = pytest.ExitCode.OK

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for test in self._broken:
            terminalreporter.write_line(f"broke the machine that it ran in: {test}", yellow=True)
        if self._broken:
            counts = Counter(self._outcomes.values())
            told = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
            terminalreporter.write_line(f"all machines together: {told}", yellow=True)
            for test in self._failed():
                terminalreporter.write_line(f"FAILED {test}", red=True)
