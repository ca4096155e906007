"""The benchmarks' own logic: verdicts, and guests that do not do what they are told."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
from perf.__main__ import _line
from perf.benchmarks import Row
from perf.process import GuestFailed, MonitorProcess

LOW = Row("start", "exec to exit", "s", 0.8)
HIGH = Row("io", "reads", "/s", 1.3, more_is_better=True)
ABSOLUTE = Row("memory", "memory", "MiB", 40, absolute=True)


@pytest.mark.parametrize(
    ("row", "ours", "theirs", "end"),
    [
        (LOW, [7.0, 8.0, 99.0], [10.0] * 3, "0.80  <= 0.8: met"),
        (LOW, [8.1] * 3, [10.0] * 3, "0.81  <= 0.8: MISSED"),
        (HIGH, [1300.0], [1000.0], "1.30  >= 1.3: met"),
        (HIGH, [1290.0], [1000.0], "1.29  >= 1.3: MISSED"),
        (ABSOLUTE, [41.0], [82.0], "0.50  <= 40 MiB: MISSED"),
        (ABSOLUTE, [39.0], [10.0], "3.90  <= 40 MiB: met"),
        (Row("io", "CPU", "s"), [3.0], [4.0], "0.75"),
    ],
)
def test_verdict(row: Row, ours: list[float], theirs: list[float], end: str) -> None:
    assert _line(row, ours, theirs).endswith(end)


def test_line_shows_the_median_and_the_extremes() -> None:
    assert "8.00 (7.00-99.00)" in _line(LOW, [7.0, 8.0, 99.0], [10.0] * 3)


@pytest.fixture
def monitor(request: pytest.FixtureRequest) -> Iterator[MonitorProcess]:
    """A Python program in the place of a monitor."""
    with MonitorProcess([sys.executable, "-u", "-c", request.param], {}) as process:
        yield process


def program(text: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("monitor", [text], indirect=True)


@program("print('noise'); print('done 12 34'); input(); print('ready')")
def test_words_among_others(monitor: MonitorProcess) -> None:
    assert monitor.expect("done", 10) == "12 34"
    monitor.send("go on")
    assert monitor.expect("ready", 10) == ""
    assert monitor.wait(10) > 0


@program("print('error: open: no such disk')")
def test_error_of_the_guest(monitor: MonitorProcess) -> None:
    with pytest.raises(GuestFailed, match="the guest says error: open: no such disk"):
        monitor.expect("ready", 10)


@program("input()")
def test_silence(monitor: MonitorProcess) -> None:
    with pytest.raises(GuestFailed, match="fell silent"):
        monitor.first_byte(0.2)
    with pytest.raises(GuestFailed, match=r"did not end within 0\.2 s"):
        monitor.wait(0.2)


@program("import sys; sys.exit('no such option')")
def test_status(monitor: MonitorProcess) -> None:
    with pytest.raises(GuestFailed, match="ended with status 1; stderr: no such option"):
        monitor.wait(10)


@program(
    "import mmap; m = mmap.mmap(-1, 64 << 20); m[:32 << 20] = bytes(32 << 20); print(); input()"
)
def test_memory_of_the_guest_is_left_out(monitor: MonitorProcess) -> None:
    monitor.first_byte(10)
    assert monitor.own_memory(64 << 20) < 32 << 20
    with pytest.raises(GuestFailed, match="has 0 mappings that could be the guest's memory"):
        monitor.own_memory(128 << 20)


def test_cpu_time_grows() -> None:
    spin = "import time\nwhile time.process_time() < 0.3: pass\nprint(); input()"
    with MonitorProcess([sys.executable, "-u", "-c", spin], {}) as process:
        process.first_byte(30)
        assert 0.25 <= process.cpu_seconds() < 3
