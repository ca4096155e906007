"""A guest in miniature for tests of stdio: sends back what comes in, in capitals.

``python stdio_echo.py [crash]``; `crash` ends with an exception after the first input. What it
writes at the end tells why it ended.
"""

from __future__ import annotations

import os
import select
import sys
import threading

from pyvmm.backends.chardev import Chardev, open_chardev


def main() -> None:
    quit_read, quit_write = os.pipe()
    chardev = open_chardev("stdio", on_quit=lambda: os.close(quit_write))
    assert chardev.output_fd is not None
    chardev.on_resize = lambda: _write(chardev, b"[%d x %d]" % (chardev.size() or (0, 0)))
    if chardev.size() is not None:
        _write(chardev, b"[ready]")
    poll = select.poll()
    poll.register(quit_read, select.POLLHUP)
    assert chardev.input_fd is not None
    poll.register(chardev.input_fd, select.POLLIN)
    why = b""
    while not why:
        ready = dict(poll.poll())
        if quit_read in ready:
            why = b"[quit]"
        elif data := os.read(chardev.input_fd, 65536):
            _write(chardev, data.upper())
            if sys.argv[1:] == ["crash"]:
                raise SystemExit("crashed")
        else:
            why = b"[end]"
    _write(chardev, why)
    chardev.close()
    assert threading.active_count() == 1


def _write(chardev: Chardev, data: bytes) -> None:
    """As the devices do it: they wait where output would block, and forget a reader that left."""
    fd = chardev.output_fd
    if fd is None:
        return
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            select.select([], [fd], [])
        except OSError:
            return


main()
