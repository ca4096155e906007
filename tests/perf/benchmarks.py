"""What is measured. Each benchmark yields the samples of one run of one monitor, by row name."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, NamedTuple

from perf.guests import LINUX_KERNELS, Guests
from perf.monitors import MEMORY_MIB, Guest, pyvmm_command, qemu_command
from perf.process import GuestFailed, MonitorProcess

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    Samples = dict[str, dict[str, list[float]]]

MONITORS = ("pyvmm", "QEMU")

_GUEST_SECONDS = 120.0  # no guest here takes nearly as long, even in an emulated machine
_READ_MS = 4000
_ATTEMPTS = 3


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


class Reads(NamedTuple):
    """A command of guest-images/bench/init.c."""

    pattern: str
    size_kib: int
    depth: int

    def __str__(self) -> str:
        return f"{self.pattern} reads {self.size_kib} KiB, depth {self.depth}"


READS = {
    Reads("random", 4, 1): 1.3,
    Reads("random", 4, 32): 1.0,
    Reads("sequential", 128, 8): 1.0,
}

ROWS = (
    Row("start", "exec to exit, small vmlinux", "s", 0.9),
    Row("start", "exec to exit, Debian's bzImage", "s", 0.8),
    Row("first-byte", "exec to the guest's first byte", "ms", 0.7),
    Row("memory", "memory beyond the guest's", "MiB", 40, absolute=True),
    *(Row("io", f"{reads}", "/s", target, True) for reads, target in READS.items()),
    *(Row("io", f"CPU for a million {reads}", "s") for reads in READS),
)


class Bench:
    """Runs benchmarks with one pyvmm (``program``) and one QEMU; both see ``environment``."""

    def __init__(self, program: Path, guests: Guests, environment: Mapping[str, str]) -> None:
        self._program = program
        self._guests = guests
        self._environment = environment
        self.failures: list[str] = []

    def run(self, names: list[str], rounds: int, samples: Samples) -> Iterator[None]:
        """Adds to ``samples[row][monitor]``, and stops after each round. The monitors take turns,
        and in each round the other begins; a first round, which fills caches, does not count."""
        for name in names:
            for number in range(rounds + 1):
                print(f"{name}: round {number} of {rounds}", file=sys.stderr, flush=True)
                for monitor in MONITORS if number % 2 else reversed(MONITORS):
                    values = self._attempt(name, monitor)
                    for row, value in values.items() if number else ():
                        samples.setdefault(row, {}).setdefault(monitor, []).append(value)
                yield

    def _attempt(self, name: str, monitor: str) -> dict[str, float]:
        """One run. A guest that fails is run again, and after the third time left out; the report
        tells of each."""
        benchmark = _BENCHMARKS[name]
        for _ in range(_ATTEMPTS):
            try:
                return dict(benchmark(self, monitor))
            except GuestFailed as failure:
                self.failures.append(f"{name}: {monitor} {failure}")
                print(self.failures[-1], file=sys.stderr, flush=True)
        return {}

    def _start(self, monitor: str, guest: Guest) -> MonitorProcess:
        ours = monitor == "pyvmm"
        command = pyvmm_command(self._program, guest) if ours else qemu_command(guest)
        return MonitorProcess(command, self._environment)

    def _power_off_at_once(self, monitor: str) -> Iterator[tuple[str, float]]:
        for name, title in LINUX_KERNELS.items():
            guest = Guest(self._guests.kernels[name], self._guests.initrd, "quiet")
            with self._start(monitor, guest) as process:
                yield f"exec to exit, {title}", process.wait(_GUEST_SECONDS)

    def _first_byte(self, monitor: str) -> Iterator[tuple[str, float]]:
        with self._start(monitor, Guest(self._guests.micro, linux=False)) as process:
            milliseconds = process.first_byte(_GUEST_SECONDS) * 1000
            yield "exec to the guest's first byte", milliseconds

    def _memory(self, monitor: str) -> Iterator[tuple[str, float]]:
        with self._serve(monitor) as process:
            _read(process, Reads("random", 4, 32), 500)
            yield "memory beyond the guest's", process.own_memory(MEMORY_MIB << 20) / (1 << 20)

    def _io(self, monitor: str) -> Iterator[tuple[str, float]]:
        with self._serve(monitor) as process:
            for reads in READS:
                before = process.cpu_seconds()
                count, seconds = _read(process, reads, _READ_MS)
                cpu = process.cpu_seconds() - before
                yield f"{reads}", count / seconds
                yield f"CPU for a million {reads}", cpu / count * 1e6

    def _serve(self, monitor: str) -> MonitorProcess:
        guest = Guest(
            self._guests.kernels["minimal"],
            self._guests.initrd,
            "quiet -- serve",
            self._guests.disk,
        )
        process = self._start(monitor, guest)
        process.expect("ready", _GUEST_SECONDS)
        return process


def _read(process: MonitorProcess, reads: Reads, milliseconds: int) -> tuple[int, float]:
    """How many reads the guest did, and in how many seconds by this process's clock."""
    process.send(f"read {reads.pattern} {reads.size_kib << 10} {reads.depth} {milliseconds}")
    process.expect("start", _GUEST_SECONDS)
    start = time.perf_counter()
    count, microseconds = process.expect("done", _GUEST_SECONDS).split()
    seconds = time.perf_counter() - start
    # What a guest says is believed if its clock agrees with the host's.
    if not 0.9 < int(microseconds) / 1e6 / seconds < 1.1:
        raise GuestFailed(f"measured {microseconds} us where this process saw {seconds:.2f} s")
    process.expect("ready", _GUEST_SECONDS)
    return int(count), int(microseconds) / 1e6


_BENCHMARKS: dict[str, Callable[[Bench, str], Iterator[tuple[str, float]]]] = {
    "start": Bench._power_off_at_once,
    "first-byte": Bench._first_byte,
    "memory": Bench._memory,
    "io": Bench._io,
}
