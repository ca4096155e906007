"""`pyvmm run` as a user starts it: a process with a terminal or pipes, whose console is watched."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import struct
import subprocess
import sys
import termios
from typing import NamedTuple

from support.linux_guest import BOOT_TIMEOUT, WatchedConsole


class _Ends(NamedTuple):
    reader: int
    writer: int


class Monitor:
    """A running ``pyvmm run OPTIONS``.

    Without `terminal` its standard input and output are pipes; with one, (columns, rows), they and
    its controlling terminal are a pseudo-terminal, the slave of which stays open here as
    `terminal_fd`. `console` is our side of either. `stderr` is a pipe.
    """

    def __init__(self, *options: object, terminal: tuple[int, int] | None = None) -> None:
        command = [sys.executable, "-m", "pyvmm", "run", *map(str, options)]
        if terminal is None:
            input_fd, writer = os.pipe()
            reader, output_fd = os.pipe()
            self._ours, theirs = {reader, writer}, (input_fd, output_fd)
        else:
            reader, input_fd = os.openpty()
            writer, output_fd = reader, input_fd
            self._ours, theirs = {reader, input_fd}, ()
            self.terminal_fd = input_fd
            self.resize(terminal)
            # A new session, of which this is the controlling terminal.
            command = ["setsid", "--ctty", *command]
        self.process = subprocess.Popen(
            command, stdin=input_fd, stdout=output_fd, stderr=subprocess.PIPE, text=True
        )
        for fd in theirs:
            os.close(fd)
        self.console = WatchedConsole(_Ends(reader, writer), self._describe)

    def resize(self, terminal: tuple[int, int]) -> None:
        """Gives the terminal another size; its foreground processes get SIGWINCH."""
        columns, rows = terminal
        fcntl.ioctl(self.terminal_fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def wait(self, timeout: float = BOOT_TIMEOUT) -> tuple[int, str]:
        """The exit status, and what was written to stderr."""
        _, stderr = self.process.communicate(timeout=timeout)
        return self.process.returncode, stderr

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """Kills the process if it still runs; idempotent."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
        while self._ours:
            with contextlib.suppress(OSError):
                os.close(self._ours.pop())

    def _describe(self) -> str:
        status = self.process.poll()
        return "while pyvmm runs" if status is None else f"and pyvmm ended with status {status}"
