"""Runs pytest in several emulated machines at once, which share the tests (see tests/conftest.py).

    python -m support.machines tests/microvm tests/linux -k boot

Each machine has one CPU, since QEMU's emulation of several is not to be relied on (docs/nested.md).
A machine that broke down or hangs, which no test can be blamed for, is followed by a new one that
goes on with the test that was running.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

DIRECTORY = Path("build/nested-tests")
MEMORY = 4 << 30
MOST_MACHINES = 4  # there are not many more modules that take long
TRIES = 3
# `pyvmm nested` ends with it when the machine broke down (ExitStatus.NO_KVM).
BROKE_DOWN = 71
# Longer than any test may take (TIME_LIMIT of tests/linux) or a machine may need to come up.
HANG_SECONDS = 720.0
_POLL_SECONDS = 1.0


class Shard(NamedTuple):
    """What one machine after the other does."""

    number: int
    journal: Path
    log: Path
    command: list[str]


def available_memory() -> int:
    """Bytes that programs can have without swapping."""
    line = re.search(r"MemAvailable: +(\d+) kB", Path("/proc/meminfo").read_text())
    assert line is not None
    return int(line[1]) << 10


def count(memory: int) -> int:
    """How many machines this host can feed; ``memory``: bytes that are available."""
    return max(1, min(len(os.sched_getaffinity(0)), memory // (MEMORY + (1 << 30)), MOST_MACHINES))


def shards(
    directory: Path, machines: int, monitor: Sequence[str], tests: Sequence[str]
) -> list[Shard]:
    """One a machine; ``monitor`` is the command that runs another one in it."""
    made = []
    for number in range(1, machines + 1):
        journal = directory / f"{number}.journal"
        # However this process ends, the machine ends with it.
        command = ["setpriv", "--pdeathsig", "KILL", *monitor]
        command += [sys.executable, "-m", "pytest", "--journal", str(journal.absolute())]
        if number % 2 == 0:
            command.append("--from-the-end")
        made.append(Shard(number, journal, directory / f"{number}.log", [*command, *tests]))
    return made


def run(shard: Shard, *, hang_seconds: float = HANG_SECONDS) -> int:
    """Runs the shard to its end, in at most TRIES machines; the exit status of the last one."""
    for machine in range(1, TRIES + 1):
        status = _run_machine(shard, hang_seconds)
        if status != BROKE_DOWN:
            return status
        _say(shard, f"emulated machine number {machine} broke down")
    return BROKE_DOWN


def _run_machine(shard: Shard, hang_seconds: float) -> int:
    """The exit status; one in which nothing ends for so long has broken down."""
    with shard.log.open("ab") as log:
        process = subprocess.Popen(shard.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    watched = _Watched(shard)
    while process.poll() is None:
        time.sleep(_POLL_SECONDS)
        if watched.seconds_without_news() > hang_seconds:
            _say(shard, f"hangs for {hang_seconds:.0f} s")
            process.kill()
            process.wait()
            return BROKE_DOWN
    watched.seconds_without_news()
    return process.returncode


def _say(shard: Shard, text: str) -> None:
    sys.stdout.write(f"[{shard.number}] {text}\n")  # at once, so that no two lines mix
    sys.stdout.flush()


class _Watched:
    """Tells of the tests that end in the machine of a shard, and for how long there is no news."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard
        self._offset = shard.journal.stat().st_size if shard.journal.exists() else 0
        self._last = time.monotonic()

    def seconds_without_news(self) -> float:
        now = time.monotonic()
        lines = self._read_lines()
        for line in lines:
            what, _, test = line.partition(" ")
            if what != "started":
                _say(self._shard, f"{what} {test} ({now - self._last:.0f} s)")
            self._last = now
        return now - self._last

    def _read_lines(self) -> list[str]:
        if not self._shard.journal.exists():
            return []
        with self._shard.journal.open("rb") as journal:
            journal.seek(self._offset)
            whole, newline, _ = journal.read().rpartition(b"\n")
        self._offset += len(whole + newline)
        return whole.decode().splitlines()


def main(tests: Sequence[str]) -> int:
    shutil.rmtree(DIRECTORY, ignore_errors=True)
    DIRECTORY.mkdir(parents=True)
    monitor = ["pyvmm", "nested", "--cpus", "1", "--memory", str(MEMORY), "--"]
    todo = shards(DIRECTORY, count(available_memory()), monitor, tests)
    statuses: dict[int, int] = {}

    def work(shard: Shard) -> None:
        statuses[shard.number] = run(shard)

    threads = [threading.Thread(target=work, args=(shard,), daemon=True) for shard in todo]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for shard in todo:
        print(f"=== emulated machine {shard.number}")
        print(shard.log.read_text(errors="replace"), flush=True)
    return max(statuses.values())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
