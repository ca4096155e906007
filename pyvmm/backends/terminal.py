"""The terminal that pyvmm was started in: raw mode, and the keys that are not for the guest."""

from __future__ import annotations

import atexit
import os
import termios

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

ESCAPE = 0x01  # Ctrl-A

HELP = (
    b"\r\nCtrl-A x       end the virtual machine"
    b"\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest"
    b"\r\nCtrl-A h       show this help\r\n"
)


def make_raw(fd: int) -> list[Any]:
    """Switches the terminal `fd` to raw mode (cfmakeraw(3)); returns what it was before."""
    before = termios.tcgetattr(fd)
    iflag, oflag, cflag, lflag, ispeed, ospeed, control = before
    iflag &= ~(termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP)
    iflag &= ~(termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON)
    oflag &= ~termios.OPOST
    cflag = cflag & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    lflag &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    control = control.copy()
    control[termios.VMIN], control[termios.VTIME] = 1, 0
    raw = [iflag, oflag, cflag, lflag, ispeed, ospeed, control]
    termios.tcsetattr(fd, termios.TCSANOW, raw)
    return before


class RawTerminal:
    """Raw mode of the terminal `fd` while this process is in its foreground.

    `restore` brings back what was before; so does the end of the interpreter.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None

    def enter(self) -> bool:
        """Raw mode, also again after the shell changed it. False in the background, where a
        process that touches the terminal would be stopped."""
        if not self._in_foreground():
            return False
        before = make_raw(self._fd)
        if self._before is None:
            self._before = before
            atexit.register(self.restore)
        return True

    def restore(self) -> None:
        """Idempotent."""
        if self._before is None:
            return
        atexit.unregister(self.restore)
        before, self._before = self._before, None
        try:
            if self._in_foreground():
                termios.tcsetattr(self._fd, termios.TCSANOW, before)
        except termios.error:
            return  # the terminal is gone

    def _in_foreground(self) -> bool:
        try:
            return os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:
            return True  # not our controlling terminal: there is no job control on it


class EscapeFilter:
    """Takes Ctrl-A and its commands out of what is typed; other keys after it stay as they are.

    `feed` returns what is for the guest and the commands: ``x`` (end) and ``h`` (help).
    """

    def __init__(self) -> None:
        self._escaped = False

    def feed(self, data: bytes) -> tuple[bytes, list[str]]:
        guest = bytearray()
        commands = []
        for byte in data:
            if not self._escaped:
                if byte == ESCAPE:
                    self._escaped = True
                else:
                    guest.append(byte)
                continue
            self._escaped = False
            if byte in b"xh":
                commands.append(chr(byte))
            elif byte == ESCAPE:
                guest.append(ESCAPE)
            else:
                guest += bytes((ESCAPE, byte))
        return bytes(guest), commands
