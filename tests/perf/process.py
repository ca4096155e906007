"""A monitor as a process: what it prints, how long it lives, what it costs."""

from __future__ import annotations

import os
import re
import select
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")


class GuestFailed(Exception):
    """A guest that fell silent, or did something else than it was told."""


class MonitorProcess:
    """A monitor whose guest's console is on its stdin and stdout. Leaving the context ends it."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._output = b""
        self.started = time.perf_counter()
        self._process = subprocess.Popen(
            command,
            env=environment,
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            assert stream is not None
            stream.close()

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())

    def first_byte(self, timeout: float) -> float:
        """Waits for any output; the seconds from the start to it."""
        self._read(time.perf_counter() + timeout)
        return time.perf_counter() - self.started

    def expect(self, word: str, timeout: float) -> str:
        """Waits for a line that starts with ``word``, and returns the rest of it."""
        deadline = time.perf_counter() + timeout
        while True:
            line, newline, rest = self._output.partition(b"\n")
            if not newline:
                self._read(deadline)
                continue
            self._output = rest
            text = line.decode(errors="replace").strip()
            if text.startswith(word):
                return text.removeprefix(word).strip()
            if text.startswith("error:"):
                raise GuestFailed(f"the guest says {text}")

    def wait(self, timeout: float) -> float:
        """Waits for the monitor to end with status 0; the seconds from its start to its end."""
        try:
            status = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise self._failure(f"did not end within {timeout:g} s") from None
        seconds = time.perf_counter() - self.started
        if status != 0:
            raise self._failure(f"ended with status {status}")
        return seconds

    def cpu_seconds(self) -> float:
        """What the process has used of CPUs, without the time in which its guest's code ran."""
        fields = self._proc("stat").rpartition(")")[2].split()  # from field 3 of proc(5) on
        user, system, guest = (int(fields[number - 3]) for number in (14, 15, 43))
        return (user + system - guest) / _TICKS

    def own_memory(self, guest_memory: int) -> int:
        """Bytes that are resident in all mappings but that of the guest's memory."""
        pattern = re.compile(r"^Size: +(\d+) kB$.*?^Rss: +(\d+) kB$", re.MULTILINE | re.DOTALL)
        mappings = pattern.findall(self._proc("smaps"))
        guest = [int(size) for size, _ in mappings if int(size) << 10 >= guest_memory]
        if len(guest) != 1:
            raise self._failure(f"has {len(guest)} mappings that could be the guest's memory")
        return sum(int(rss) << 10 for size, rss in mappings if int(size) << 10 < guest_memory)

    def _proc(self, name: str) -> str:
        return Path(f"/proc/{self._process.pid}/{name}").read_text()

    def _read(self, deadline: float) -> None:
        assert self._process.stdout is not None
        left = max(0.0, deadline - time.perf_counter())
        if not select.select([self._process.stdout], [], [], left)[0]:
            raise self._failure("fell silent")
        data = os.read(self._process.stdout.fileno(), 65536)
        if not data:
            raise self._failure("ended too early")
        self._output += data

    def _failure(self, what: str) -> GuestFailed:
        self._errors.seek(0)
        errors = self._errors.read().decode(errors="replace").strip()
        output = self._output.decode(errors="replace").strip()
        return GuestFailed(f"{what}; stderr: {errors or 'empty'}; console: {output or 'empty'}")
