"""The benchmarks' own logic: verdicts, and guests that do not do what they are told."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from perf.__main__ import _cases, _line, _table
from perf.benchmarks import _ECHO, _STREAM_UP, ROWS, Row, _work
from perf.guests import build_micro, build_program
from perf.monitors import Balloon, Disk, Guest, Net, pyvmm_command
from perf.process import GuestFailed, MonitorProcess

from pyvmm import cli

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


def test_columns_are_as_wide_as_the_longest_name() -> None:
    names = ["io:blk random reads 4 KiB, depth 1", "io:blk random reads 4 KiB, depth 1, CPU"]
    samples = {name: {"pyvmm": [1.0], "QEMU": [2.0]} for name in names}
    heading, *lines = _table(samples).splitlines()
    assert [line.index("2.00") for line in lines] == [
        heading.index("QEMU") - len("2.00 (2.00-2.00)") + len("QEMU")
    ] * 2
    assert [line.split("0.50")[1] for line in lines] == ["  >= 1: MISSED", "  <= 1: met"]


def test_names_of_rows_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_rates_and_latencies() -> None:
    gib = 1 << 30
    assert list(_STREAM_UP.values(2 * gib, 4.0, 3.0)) == [2 * gib / 4 / 1e6, 1.5]
    assert list(_ECHO.values(1000, 2.0, 0.5)) == [2000.0, 500.0]
    assert [row.more_is_better for row in _ECHO.rows("net:tap", 0.9)] == [False, False]
    assert [row.more_is_better for row in _STREAM_UP.rows("net:tap", 1.1)] == [True, False]


@pytest.mark.parametrize(
    ("benchmarks", "full", "cases"),
    [
        (["io"], False, ["io:blk", "io:scsi"]),
        (["io"], True, ["io:blk", "io:scsi", "io:blk-2q", "io:scsi-2q"]),
        (["net:vhost"], False, ["net:vhost"]),
        (["ring", "net:vhost", "net"], False, ["net:tap", "net:vhost", "net:user", "ring"]),
        (
            [],
            False,
            [
                *("start", "first-byte", "memory", "balloon", "io:blk", "io:scsi"),
                *("net:tap", "net:user", "serial", "ring"),
            ],
        ),
    ],
)
def test_cases(benchmarks: list[str], full: bool, cases: list[str]) -> None:
    assert _cases(benchmarks, full=full) == cases


def test_unknown_benchmark() -> None:
    with pytest.raises(
        ValueError, match=r"^there is no benchmark 'disk': there are start, .*ring, "
    ):
        _cases(["io", "disk"], full=False)


@pytest.mark.parametrize(
    ("devices", "shown"),
    [
        ({"disk": Disk(Path("image"), "blk", 2)}, r"queues ?= ?2"),
        ({"disk": Disk(Path("image"), "scsi", 2)}, r"queues ?= ?2"),
        ({"net": Net("bench0", vhost=True)}, r"vhost ?= ?(true|on)"),
        ({"net": Net()}, 'kind = "user"'),
        ({"balloon": Balloon(96, Path("qmp"))}, 'balloon = "size=96M,'),
    ],
)
def test_pyvmm_takes_its_command(
    devices: dict[str, Any],
    shown: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    build_micro(Path("kernel"))
    Path("image").write_bytes(bytes(4096))
    guest = Guest(Path("kernel"), Path("kernel"), "quiet", cpus=2, **devices)
    command = pyvmm_command(Path("pyvmm"), guest)[1:]
    command[command.index("kvm")] = "nested"  # needs none
    assert cli.main([*command, "--dry-run"]) == 0
    assert re.search(shown, capsys.readouterr().out)


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


@pytest.fixture(scope="module")
def bench_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    program = tmp_path_factory.mktemp("bench") / "bench"
    build_program(program)
    return program


@pytest.fixture
def guest(bench_program: Path) -> Iterator[MonitorProcess]:
    """The program of the guest, without a machine around it."""
    with MonitorProcess([str(bench_program), "serve"], {}) as process:
        process.expect("ready", 10)
        yield process


@pytest.fixture
def peer(bench_program: Path) -> Iterator[str]:
    """Address and port of the program on the host."""
    with MonitorProcess([str(bench_program), "peer", "127.0.0.1"], {}) as process:
        yield f"127.0.0.1 {process.expect('port', 10)}"


def test_networks(guest: MonitorProcess, peer: str) -> None:
    least = {"stream-up": 1 << 20, "stream-down": 1 << 20, "echo": 10, "datagrams": 64}
    for command, count in least.items():
        start = time.perf_counter()
        # However busy the host is, the work lies within the time that passes here.
        done, seconds = _work(guest, f"{command} {peer}", 200, counts=False)
        assert done >= count
        assert 0.1 < seconds < time.perf_counter() - start


def test_no_peer(guest: MonitorProcess, peer: str) -> None:
    with pytest.raises(GuestFailed, match="error: connection to the peer: Connection refused"):
        _work(guest, "echo 127.0.0.2 " + peer.split()[1], 100)


@pytest.mark.parametrize(
    "command", ["disk /dev/vda read", "echo", "nonsense 1 2", "echo host 1", "inflate 0"]
)
def test_wrong_command(guest: MonitorProcess, command: str) -> None:
    with pytest.raises(GuestFailed, match="error: command: Invalid argument"):
        _work(guest, command, 100)


@program("input(); print('start'); print('done 5 3000000'); print('ready')")
def test_clock_that_runs_fast(monitor: MonitorProcess) -> None:
    with pytest.raises(GuestFailed, match=r"measured 3000000 us where this process saw 0\.0"):
        _work(monitor, "read", 3000)
