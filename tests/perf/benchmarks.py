"""What is measured. Each case yields the samples of one run of one monitor, by row name."""

from __future__ import annotations

import contextlib
import functools
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from perf.guests import LINUX_KERNELS, Guests
from perf.monitors import (
    MEMORY_MIB,
    Balloon,
    Disk,
    Guest,
    Net,
    pyvmm_command,
    qemu_command,
    set_qemu_balloon,
)
from perf.process import GuestFailed, MonitorProcess
from pyvmm.images import run_parameter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Samples = dict[str, dict[str, list[float]]]
    Targets = dict["Work", float | None]

MONITORS = ("pyvmm", "QEMU")

_GUEST_SECONDS = 120.0  # no guest here takes nearly as long, even in an emulated machine
_WORK_MS = 3000
_WARM_UP_MS = 300
_BALLOON_MS = 60000  # at most
_ATTEMPTS = 3
# What the words of a guest may take to get here, and the wait for datagrams that may still come.
_ANSWER_SECONDS = 0.2
_TAP = "pyvmm-bench"


class Row(NamedTuple):
    """A line of the table. ``target`` is for the ratio pyvmm/QEMU, or, if ``absolute``, for pyvmm.

    ``more_is_better``: whether more is better, and the target a least value.
    """

    benchmark: str
    name: str
    unit: str
    target: float | None = None
    more_is_better: bool = False
    absolute: bool = False


class Work(NamedTuple):
    """What a guest is told to do (a line for guest-images/bench/bench.c), and the rows of it.

    ``scale`` makes the first row's value of a rate per second, or, if ``latency``, of the seconds
    that one takes; ``per`` so many things is the second row's CPU time.
    """

    name: str
    command: str
    unit: str
    scale: float
    per: float
    latency: bool = False

    def rows(self, case: str, target: float | None) -> Iterator[Row]:
        what = "GiB" if self.per == 1 << 30 else "million"
        yield Row(case, f"{case} {self.name}", self.unit, target, not self.latency)
        yield Row(case, f"{case} {self.name}, CPU", f"s per {what}", 1.0)

    def values(self, count: int, seconds: float, cpu: float) -> Iterator[float]:
        yield seconds / count * self.scale if self.latency else count / seconds * self.scale
        yield cpu / count * self.per


def _requests(pattern: str, operation: str, kib: int, depth: int) -> Work:
    name = f"{pattern} {operation}s {kib} KiB, depth {depth}"
    return Work(name, f"{operation} {pattern} {kib << 10} {depth}", "/s", 1, 1e6)


_STREAM_UP = Work("TCP to the host", "stream-up", "MB/s", 1e-6, 1 << 30)
_STREAM_DOWN = Work("TCP to the guest", "stream-down", "MB/s", 1e-6, 1 << 30)
_ECHO = Work("TCP round trip of a byte", "echo", "us", 1e6, 1e6, latency=True)
_DATAGRAMS = Work("UDP to the host, 64 bytes", "datagrams", "/s", 1, 1e6)
_PORT_UP = Work("stream to the host", "port-up", "MB/s", 1e-6, 1 << 30)
_PORT_DOWN = Work("stream to the guest", "port-down", "MB/s", 1e-6, 1 << 30)
_PORT_ECHO = Work("round trip of a byte", "port-echo", "us", 1e6, 1e6, latency=True)

# Each with its target.
_ONE_BY_ONE: Targets = {
    _requests("random", "read", 4, 1): 1.0,
    _requests("random", "write", 4, 1): 1.0,
}
_MANY: Targets = {
    _requests("random", "read", 4, 32): 1.1,
    _requests("random", "write", 4, 32): 1.1,
    _requests("sequential", "read", 128, 8): 1.0,
    _requests("sequential", "write", 128, 8): 1.0,
}
_ON_TAP: Targets = {_STREAM_UP: 1.1, _STREAM_DOWN: 1.1, _ECHO: 0.9, _DATAGRAMS: None}
_ON_PORT: Targets = {_PORT_UP: 1.0, _PORT_DOWN: 1.0, _PORT_ECHO: 1.0}
_ON_USER: Targets = {_STREAM_UP: 1.0, _STREAM_DOWN: 1.0, _ECHO: 1.0, _DATAGRAMS: 1.0}


# Of a guest with `MEMORY_MIB`, which has as much free.
_BALLOON_MIB = 96
_BALLOON: Targets = {
    Work("inflated", f"inflate {_BALLOON_MIB}", "GiB/s", 2**-30, 1 << 30): 1.0,
    Work("deflated", f"deflate {_BALLOON_MIB}", "GiB/s", 2**-30, 1 << 30): 1.0,
}


class DiskCase(NamedTuple):
    bus: str
    queues: int
    work: Targets


class NetCase(NamedTuple):
    tap: bool
    vhost: bool
    work: Targets


DISK_CASES = {
    "io:blk": DiskCase("blk", 1, _ONE_BY_ONE | _MANY),
    "io:scsi": DiskCase("scsi", 1, _ONE_BY_ONE | _MANY),
    "io:blk-2q": DiskCase("blk", 2, _MANY),
    "io:scsi-2q": DiskCase("scsi", 2, _MANY),
}
NET_CASES = {
    "net:tap": NetCase(tap=True, vhost=False, work=_ON_TAP),
    "net:vhost": NetCase(tap=True, vhost=True, work=_ON_TAP),
    "net:user": NetCase(tap=False, vhost=False, work=_ON_USER),
}


def _rows() -> Iterator[Row]:
    yield Row("start", "exec to exit, small vmlinux", "s", 0.9)
    yield Row("start", "exec to exit, Debian's bzImage", "s", 0.8)
    yield Row("first-byte", "exec to the guest's first byte", "ms", 0.7)
    yield Row("memory", "memory beyond the guest's", "MiB", 40, absolute=True)
    for name, case in (DISK_CASES | NET_CASES).items():
        for work, target in case.work.items():
            yield from work.rows(name, target)
    for work, target in _BALLOON.items():
        yield from work.rows("balloon", target)
    for work, target in _ON_PORT.items():
        yield from work.rows("serial", target)


ROWS = tuple(_rows())


class Bench:
    """Runs cases with one pyvmm (``program``) and one QEMU; both see ``environment``."""

    def __init__(self, program: Path, guests: Guests, environment: Mapping[str, str]) -> None:
        self._program = program
        self._guests = guests
        self._environment = environment
        self.failures: list[str] = []

    def run(self, names: list[str], rounds: int, samples: Samples) -> Iterator[None]:
        """Adds to ``samples[row][monitor]``, and stops after each round. The monitors take turns,
        and in each round the other begins. A guest that works warms up by itself; where only its
        start counts, a first round, which fills caches, does not."""
        for name in names:
            for number in range(0 if name in _COLD else 1, rounds + 1):
                print(f"{name}: round {number} of {rounds}", file=sys.stderr, flush=True)
                for monitor in MONITORS if number % 2 else reversed(MONITORS):
                    values = self._attempt(name, monitor)
                    for row, value in values.items() if number else ():
                        samples.setdefault(row, {}).setdefault(monitor, []).append(value)
                yield

    def _attempt(self, name: str, monitor: str) -> dict[str, float]:
        """One run. A guest that fails is run again, and after the third time left out; the report
        tells of each."""
        case = CASES[name]
        for _ in range(_ATTEMPTS):
            try:
                return dict(case(self, monitor))
            except GuestFailed as failure:
                self.failures.append(f"{name}: {monitor} {failure}")
                print(self.failures[-1], file=sys.stderr, flush=True)
        return {}

    def _start(self, monitor: str, guest: Guest) -> MonitorProcess:
        ours = monitor == "pyvmm"
        command = pyvmm_command(self._program, guest) if ours else qemu_command(guest)
        return MonitorProcess(command, self._environment)

    @contextlib.contextmanager
    def _serve(self, monitor: str, guest: Guest) -> Iterator[MonitorProcess]:
        with self._start(monitor, guest) as process:
            process.expect("ready", _GUEST_SECONDS)
            yield process

    def power_off_at_once(self, monitor: str) -> Iterator[tuple[str, float]]:
        initrd = self._guests.small.initrd
        kernels = (self._guests.small.vmlinux, self._guests.bzimage)
        for title, kernel in zip(LINUX_KERNELS.values(), kernels, strict=True):
            with self._start(monitor, Guest(kernel, initrd, "quiet")) as process:
                yield f"exec to exit, {title}", process.wait(_GUEST_SECONDS)

    def first_byte(self, monitor: str) -> Iterator[tuple[str, float]]:
        with self._start(monitor, Guest(self._guests.micro, linux=False)) as process:
            milliseconds = process.first_byte(_GUEST_SECONDS) * 1000
            yield "exec to the guest's first byte", milliseconds

    def memory(self, monitor: str) -> Iterator[tuple[str, float]]:
        with self._serve(monitor, self._disk_guest(DISK_CASES["io:blk"])) as process:
            _work(process, "disk /dev/vda read random 4096 32 1", 500, counts=False)
            yield "memory beyond the guest's", process.own_memory(MEMORY_MIB << 20) / (1 << 20)

    def disk(self, monitor: str, name: str) -> Iterator[tuple[str, float]]:
        case = DISK_CASES[name]
        device = "/dev/sda" if case.bus == "scsi" else "/dev/vda"
        with self._serve(monitor, self._disk_guest(case)) as process:
            for work in case.work:
                command = f"disk {device} {work.command} {case.queues}"
                yield from _measure(process, name, work, command)

    def _disk_guest(self, case: DiskCase) -> Guest:
        disk = Disk(self._guests.disk, case.bus, case.queues)
        kernel, initrd = self._guests.stock if case.bus == "scsi" else self._guests.small
        append = _stock_append("") if case.bus == "scsi" else "quiet -- serve"
        return Guest(kernel, initrd, append, disk, cpus=case.queues)

    def balloon(self, monitor: str) -> Iterator[tuple[str, float]]:
        with tempfile.TemporaryDirectory() as directory:
            balloon = Balloon(_BALLOON_MIB, Path(directory, "qmp"))
            guest = Guest(*self._guests.stock, _stock_append(""), balloon=balloon)
            with self._start(monitor, guest) as process:
                if monitor == "QEMU":
                    set_qemu_balloon(balloon, _GUEST_SECONDS)
                process.expect("ready", _GUEST_SECONDS)
                # The driver has filled it at its start.
                _work(process, f"deflate {_BALLOON_MIB}", _BALLOON_MS, counts=False)
                for work in _BALLOON:
                    yield from _sample(process, "balloon", work, work.command, _BALLOON_MS)

    def network(self, monitor: str, name: str) -> Iterator[tuple[str, float]]:
        case = NET_CASES[name]
        _ip("link set lo up")  # which it is not in a new network namespace
        with contextlib.ExitStack() as stack:
            if case.tap:
                own, host = "10.77.0.2", "10.77.0.1"
                stack.enter_context(_tap(f"{host}/24"))
            else:
                own, host = "10.0.2.15", "10.0.2.2"
            address = host if case.tap else "127.0.0.1"
            command = [str(self._guests.program), "peer", address]
            peer = stack.enter_context(MonitorProcess(command, self._environment))
            port = peer.expect("port", _GUEST_SECONDS)
            set_up = f"ip address add {own}/24 dev eth0; ip link set eth0 up; "
            net = Net(_TAP if case.tap else None, case.vhost)
            guest = Guest(*self._guests.stock, _stock_append(set_up), net=net)
            process = stack.enter_context(self._serve(monitor, guest))
            for work in case.work:
                yield from _measure(process, name, work, f"{work.command} {host} {port}")

    def serial(self, monitor: str) -> Iterator[tuple[str, float]]:
        with tempfile.TemporaryDirectory(prefix="pyvmm-bench-") as directory:
            guest = Guest(*self._guests.stock, _stock_append(""), port=Path(directory, "port"))
            with self._serve(monitor, guest) as process:
                command = [str(self._guests.program), "port-peer", str(guest.port)]
                with MonitorProcess(command, self._environment) as peer:
                    peer.expect("ready", _GUEST_SECONDS)
                    for work in _ON_PORT:
                        yield from _measure(
                            process, "serial", work, f"{work.command} /dev/vport0p1"
                        )


def _stock_append(script: str) -> str:
    return f"quiet {run_parameter(f'{script}exec bench serve')}"


@contextlib.contextmanager
def _tap(address: str) -> Iterator[None]:
    """A new tap interface of the name `_TAP`: what one monitor left of it is not the other's."""
    try:
        _ip(f"tuntap add dev {_TAP} mode tap")
        _ip(f"address add {address} dev {_TAP}")
        _ip(f"link set {_TAP} up")
        yield
    finally:
        _ip(f"tuntap del dev {_TAP} mode tap")


def _ip(arguments: str) -> None:
    subprocess.run(["ip", *arguments.split()], check=True)


def _measure(
    process: MonitorProcess, case: str, work: Work, command: str
) -> Iterator[tuple[str, float]]:
    _work(process, command, _WARM_UP_MS, counts=False)
    yield from _sample(process, case, work, command, _WORK_MS)


def _sample(
    process: MonitorProcess, case: str, work: Work, command: str, milliseconds: int
) -> Iterator[tuple[str, float]]:
    before = process.cpu_seconds()
    count, seconds = _work(process, command, milliseconds)
    cpu = process.cpu_seconds() - before
    if not count:
        raise GuestFailed(f"did nothing in {seconds:.2f} s when told: {command}")
    rows = (row.name for row in work.rows(case, None))
    yield from zip(rows, work.values(count, seconds, cpu), strict=True)


def _work(
    process: MonitorProcess, command: str, milliseconds: int, *, counts: bool = True
) -> tuple[int, float]:
    """How much the guest did, and in how many seconds by its clock."""
    process.send(f"{command} {milliseconds}")
    process.expect("start", _GUEST_SECONDS)
    start = time.perf_counter()
    count, microseconds = map(int, process.expect("done", _GUEST_SECONDS).split())
    seconds = time.perf_counter() - start
    # What a guest says is believed if its clock agrees with the host's.
    slack = 0.05 * milliseconds / 1000 + _ANSWER_SECONDS
    if counts and abs(microseconds / 1e6 - seconds) > slack:
        raise GuestFailed(f"measured {microseconds} us where this process saw {seconds:.2f} s")
    process.expect("ready", _GUEST_SECONDS)
    return count, microseconds / 1e6


CASES: dict[str, Callable[[Bench, str], Iterator[tuple[str, float]]]] = {
    "start": Bench.power_off_at_once,
    "first-byte": Bench.first_byte,
    "memory": Bench.memory,
    "balloon": Bench.balloon,
    **{name: functools.partial(Bench.disk, name=name) for name in DISK_CASES},
    **{name: functools.partial(Bench.network, name=name) for name in NET_CASES},
    "serial": Bench.serial,
}
_COLD = ("start", "first-byte")
