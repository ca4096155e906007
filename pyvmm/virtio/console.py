"""virtio-console: the terminal hvc0 (virtio 1.2, section 5.3), with one port."""

from __future__ import annotations

import os
import select
import struct
from collections import deque

from pyvmm.virtio._generated_uapi import VIRTIO_CONSOLE_F_SIZE, VIRTIO_ID_CONSOLE
from pyvmm.virtio.device import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.virtio.queue import Chain, Virtqueue

    class ByteStream(Protocol):
        """The host's side of a port; see ``pyvmm.backends.chardev``.

        `input_fd` and `output_fd` are non-blocking, None where there is none.
        """

        input_fd: int | None
        output_fd: int | None
        on_resize: Callable[[], None] | None

        def size(self) -> tuple[int, int] | None:
            """(columns, rows) of the terminal, if it is one."""


# What is copied out of guest memory at once.
_OUTPUT_CHUNK = 4096
# readv takes no more parts than this (IOV_MAX).
_INPUT_PARTS = 1024

_COLS_ROWS = struct.Struct("<HH")  # the head of struct virtio_console_config


class Port:
    """One terminal of the console: two queues on one side, a byte stream on the other.

    Neither side is read before the other can take it: a chain with output is completed when the
    host took all of it, and input is read when the driver has room for it.
    """

    def __init__(
        self, console: VirtioConsole, stream: ByteStream, on_output: Callable[[bytes], None] | None
    ) -> None:
        self._console = console
        self._input_fd = stream.input_fd
        self._output_fd = stream.output_fd
        self._on_output = on_output
        self._room: deque[Chain] = deque()
        self._output: deque[Chain] = deque()
        self._unwritten = b""
        self._watching_input = False
        self._watching_output = False

    def forget(self) -> None:
        """The device is stopped: nothing that the driver gave may be used any more."""
        self._room.clear()
        self._output.clear()
        self._unwritten = b""
        self._watching_input = self._watching_output = False

    # Input (receiveq).

    def add_room(self, chain: Chain) -> None:
        """The driver gave a buffer for input."""
        if not chain.writable_bytes:
            chain.complete(0)
            return
        self._room.append(chain)
        if self._input_fd is not None and not self._watching_input:
            self._console.watch(self._input_fd, select.EPOLLIN, self._receive)
            self._watching_input = True

    def _receive(self) -> None:
        assert self._input_fd is not None
        chain = self._room[0]
        try:
            count = os.readv(self._input_fd, chain.writable[:_INPUT_PARTS])
        except BlockingIOError:
            return
        if count:
            self._room.popleft()
            chain.complete(count)
        if not count or not self._room:
            self._console.unwatch(self._input_fd)
            self._watching_input = False
        if not count:
            self._input_fd = None  # its end; there is no more to come

    # Output (transmitq).

    def send(self, chain: Chain) -> None:
        """The driver gave output."""
        self._output.append(chain)
        if not self._watching_output:
            self._transmit()

    def _transmit(self) -> None:
        """Writes until all is written or the host takes no more."""
        while self._output:
            chain = self._output[0]
            while self._unwritten or chain.unread:
                if not self._unwritten:
                    self._unwritten = chain.read(_OUTPUT_CHUNK)
                    if self._on_output is not None:
                        self._on_output(self._unwritten)
                if not self._write():
                    self._watch_output(True)
                    return
            self._output.popleft().complete()
        self._watch_output(False)

    def _write(self) -> bool:
        """Writes what is unwritten, or as much as the host takes. False when it takes no more."""
        if self._output_fd is None:
            self._unwritten = b""
            return True
        try:
            written = os.write(self._output_fd, self._unwritten)
        except BlockingIOError:
            return False
        except OSError:
            # A reader that has gone away, or a full disk, must not stop the guest.
            self._unwritten = b""
            return True
        self._unwritten = self._unwritten[written:]
        return True

    def _watch_output(self, on: bool) -> None:
        if self._output_fd is None or on == self._watching_output:
            return
        if on:
            self._console.watch(self._output_fd, select.EPOLLOUT, self._transmit)
        else:
            self._console.unwatch(self._output_fd)
        self._watching_output = on


class VirtioConsole(PythonDevice):
    """A console whose port 0 is `stream`.

    The window size is offered if the stream has one. ``on_output(data)`` is called, on the
    device's thread, with everything that the guest prints, before the stream gets it; it must
    neither raise nor block.
    """

    device_id = VIRTIO_ID_CONSOLE
    queue_sizes = (64, 64)  # receiveq and transmitq of port 0

    def __init__(
        self, stream: ByteStream, on_output: Callable[[bytes], None] | None = None
    ) -> None:
        super().__init__()
        self._stream = stream
        self._port = Port(self, stream, on_output)
        self._size = stream.size() or (0, 0)
        if stream.size() is not None:
            self.features = 1 << VIRTIO_CONSOLE_F_SIZE
            stream.on_resize = self.config_changed

    def read_config(self) -> bytes:
        self._size = self._stream.size() or self._size
        return _COLS_ROWS.pack(*self._size)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        if queue.index == 0:
            self._port.add_room(chain)
        else:
            self._port.send(chain)

    def stopped(self) -> None:
        self._port.forget()
