"""A thread between a device and a host stream that blocks, comes or goes.

The device always sees two pipes that it can poll and that never block, stay and end only once.
"""

from __future__ import annotations

import os
import select
import threading

CHUNK = 4096  # what a pipe that polls writable takes without blocking (PIPE_BUF)
_CLOSE_TIMEOUT = 1.0  # seconds that a reader gets to take the last output
_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class Relay:
    """Copies bytes from `source` to `input_fd` and from `output_fd` to `sink`.

    `source` and `sink` are file descriptors of the host that subclasses set and change, on the
    relay's thread once `start` was called; -1 is nothing to read from, and nobody to write to,
    when output is dropped. Nothing is read from either side before the other took what was read
    last, so a slow reader slows the writer down.
    """

    def __init__(self, name: str, *, with_output: bool = True) -> None:
        self.source = self.sink = self.extra = -1
        self.interval: int | None = None
        flags = os.O_CLOEXEC | os.O_NONBLOCK
        self.input_fd, self._to_device = os.pipe2(flags)
        self._from_device, self.output_fd = os.pipe2(flags) if with_output else (-1, -1)
        self._close_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Ends the relay; what the device has written still goes out if the reader takes it."""
        self._closing = True
        os.eventfd_write(self._close_fd, 1)
        for fd in (self.input_fd, self.output_fd):
            if fd >= 0:
                os.close(fd)
        self._thread.join(_CLOSE_TIMEOUT)
        if not self._thread.is_alive():  # else the reader is stuck, and so are the descriptors
            os.close(self._close_fd)

    # What subclasses change; all of these run on the thread.

    def refresh(self) -> None:
        """Runs before each wait, the longest of which is `interval` (milliseconds; None: for ever):
        the time to look whether the host's side came or went."""

    def extra_ready(self) -> None:
        """`extra`, another file descriptor to wait for, is readable."""

    def filter(self, data: bytes) -> bytes:
        """What the device gets of the bytes read from `source`."""
        return data

    def source_ended(self) -> None:
        """`source` has no more bytes."""
        self.source = -1

    def sink_ended(self) -> None:
        """`sink` has no more reader."""
        self.sink = -1

    def cleanup(self) -> None:
        """The thread ends."""

    # The thread.

    def _run(self) -> None:
        incoming = outgoing = b""
        while True:
            self.refresh()
            if self.sink < 0:
                outgoing = b""
            if self._closing and self._from_device < 0 and not outgoing:
                break
            ready = self._wait(bool(incoming), bool(outgoing))
            if self._close_fd in ready:
                os.eventfd_read(self._close_fd)
            if self.extra in ready:
                self.extra_ready()
            if incoming:
                incoming = self._write_device(incoming)
            elif ready.get(self.source, 0) & (select.POLLIN | _GONE):
                incoming = self._read_source()
            if outgoing:
                outgoing = self._write_sink(outgoing, ready)
            elif ready.get(self._from_device, 0):
                outgoing = self._read_device()
        self.cleanup()
        if self._to_device >= 0:
            os.close(self._to_device)

    def _wait(self, incoming: bool, outgoing: bool) -> dict[int, int]:
        wanted = {self._close_fd: select.POLLIN, self.extra: select.POLLIN}
        if incoming:
            wanted[self._to_device] = select.POLLOUT
        else:
            wanted[self.source] = select.POLLIN
        if outgoing:
            wanted[self.sink] = wanted.get(self.sink, 0) | select.POLLOUT
        else:
            wanted[self._from_device] = select.POLLIN
            wanted.setdefault(self.sink, 0)  # a reader that goes away is noticed at once
        poll = select.poll()
        for fd, events in wanted.items():
            if fd >= 0:
                poll.register(fd, events)
        ready = dict(poll.poll(self.interval))
        if ready.get(self.sink, 0) & _GONE:
            self.sink_ended()
        return ready

    def _read_source(self) -> bytes:
        try:
            data = os.read(self.source, CHUNK)
        except BlockingIOError:
            return b""
        except OSError:  # the peer vanished
            data = b""
        if data:
            return self.filter(data)
        self.source_ended()
        return b""

    def _write_device(self, data: bytes) -> bytes:
        """Returns what the device did not yet take."""
        try:
            return data[os.write(self._to_device, data) :]
        except BlockingIOError:
            return data
        except BrokenPipeError:  # the device is closed
            return b""

    def _read_device(self) -> bytes:
        data = os.read(self._from_device, CHUNK)
        if not data:
            os.close(self._from_device)
            self._from_device = -1
        return data

    def _write_sink(self, data: bytes, ready: dict[int, int]) -> bytes:
        """Returns what the host did not yet take."""
        if not ready.get(self.sink, 0) & select.POLLOUT:
            return data
        try:
            return data[os.write(self.sink, data) :]
        except BlockingIOError:
            return data
        except OSError:  # the peer vanished
            self.sink_ended()
            return b""

    def end_input(self) -> None:
        """Lets the device see the end of its input."""
        self.source = -1
        os.close(self._to_device)
        self._to_device = -1
