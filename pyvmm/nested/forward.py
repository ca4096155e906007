"""A socket of the host that leads to one in the emulated machine, through a virtio-serial port.

Both ends are a `Forwarder`: the host's accepts connections, the machine's makes the same ones
there. What passes between them is records: a header, and what a connection sent. Each end keeps
what the other side of a connection has not taken yet; one that lets too much pile up is cut.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time
from typing import TYPE_CHECKING

from pyvmm.backends.unix_socket import listen
from pyvmm.nested.machine import SOCKETS

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    from pyvmm.nested.machine import Machine

# A record: what it is, the number of the connection, how many bytes follow.
_HEADER = struct.Struct("<III")
_OPEN, _DATA, _END, _CUT = range(1, 5)

_CHUNK = 1 << 14
_ENOUGH = 1 << 16  # that wait for the channel: no more is read from connections
_MOST = 4 << 20  # that wait for one connection
_BACKLOG = 32
_LAST_WORDS = 1.0  # seconds that they get
_INTERVAL = 50  # ms
_GONE = select.POLLHUP | select.POLLERR


class _Connection:
    """One connection, at one end."""

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket = connected
        self.output = bytearray()
        self.source_ended = False  # it sends no more
        self.sink_ended = False  # the other end sends no more

    def wants(self, hears: bool) -> int:
        reads = hears and not self.source_ended
        return (select.POLLIN if reads else 0) | (select.POLLOUT if self.output else 0)

    def flush(self) -> None:
        """OSError when nobody takes it any more."""
        try:
            while self.output:
                del self.output[: self.socket.send(self.output)]
        except BlockingIOError:
            return
        if self.sink_ended:
            self.socket.shutdown(socket.SHUT_WR)


class Forwarder:
    """Passes connections on through `channel`, a descriptor of a stream to the other end.

    They come from `listener` at the host's end, and go to the Unix socket at `target` at the
    machine's. A thread does the work from `start` to `close`.
    """

    def __init__(
        self, channel: int, *, listener: socket.socket | None = None, target: str = ""
    ) -> None:
        self._channel = channel
        os.set_blocking(channel, False)
        self._listener = listener
        self._target = target
        self._connections: dict[int, _Connection] = {}
        self._next = 0  # number of a connection
        self._input = bytearray()
        self._output = bytearray()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._deadline: float | None = None  # of the last words, once it is to end
        self._thread = threading.Thread(target=self._run, name="forwarder", daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def close(self) -> None:
        """Passes on what the machine's end still says, for a second at most, and cuts the rest."""
        os.eventfd_write(self._wake, 1)
        self._thread.join()
        for connection in self._connections.values():
            connection.socket.close()
        os.close(self._wake)

    def _run(self) -> None:
        while self._step():
            pass

    def _is_done(self) -> bool:
        """Whether the last words have passed."""
        if self._deadline is None:
            return False
        over = not self._output and all(
            each.source_ended if self._listener is None else each.sink_ended and not each.output
            for each in self._connections.values()
        )
        return over or time.monotonic() > self._deadline

    def _step(self) -> bool:
        """Does what can be done next; False when it is time to end."""
        poll = select.poll()
        if self._deadline is None:
            poll.register(self._wake, select.POLLIN)
        poll.register(self._channel, select.POLLIN | (select.POLLOUT if self._output else 0))
        hears = len(self._output) < _ENOUGH
        if hears and self._listener is not None:
            poll.register(self._listener, select.POLLIN)
        by_fd = {each.socket.fileno(): number for number, each in self._connections.items()}
        for fd, number in by_fd.items():
            poll.register(fd, self._connections[number].wants(hears))
        for fd, events in poll.poll(None if self._deadline is None else _INTERVAL):
            if fd == self._wake:
                self._deadline = time.monotonic() + _LAST_WORDS
            elif fd == self._channel:
                if not self._receive():
                    return False
            elif fd in by_fd:
                self._advance(by_fd[fd], events)
            else:
                self._accept()
        return self._flush() and not self._is_done()

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connected, _ = self._listener.accept()
        except OSError:
            return  # it has left
        self._next += 1
        self._connections[self._next] = _Connection(connected)
        self._send(_OPEN, self._next)

    def _advance(self, number: int, events: int) -> None:
        connection = self._connections.get(number)
        if connection is None:
            return  # it ended in this step
        try:
            if events & (select.POLLIN | _GONE) and not connection.source_ended:
                data = connection.socket.recv(_CHUNK)
                connection.source_ended = not data
                self._send(_DATA if data else _END, number, data)
            connection.flush()
        except BlockingIOError:
            pass
        except OSError:
            self._cut(number)
            return
        self._end_if_over(number)

    def _cut(self, number: int) -> None:
        self._connections.pop(number).socket.close()
        self._send(_CUT, number)

    def _end_if_over(self, number: int) -> None:
        connection = self._connections[number]
        if connection.source_ended and connection.sink_ended and not connection.output:
            del self._connections[number]
            connection.socket.close()

    # The channel

    def _send(self, kind: int, number: int, data: bytes = b"") -> None:
        self._output += _HEADER.pack(kind, number, len(data)) + data

    def _flush(self) -> bool:
        try:
            while self._output:
                del self._output[: os.write(self._channel, self._output[: _CHUNK * 4])]
        except BlockingIOError:
            pass
        except OSError:
            return False
        return True

    def _receive(self) -> bool:
        try:
            data = os.read(self._channel, 1 << 16)
        except BlockingIOError:
            return True
        except OSError:
            return False
        self._input += data
        while len(self._input) >= _HEADER.size:
            kind, number, size = _HEADER.unpack_from(self._input)
            if len(self._input) < _HEADER.size + size:
                break
            payload = bytes(self._input[_HEADER.size : _HEADER.size + size])
            del self._input[: _HEADER.size + size]
            self._take(kind, number, payload)
        return bool(data)

    def _take(self, kind: int, number: int, payload: bytes) -> None:
        if kind == _OPEN:
            self._connect(number)
        connection = self._connections.get(number)
        if connection is None:
            return  # it was cut here
        if kind == _CUT:
            connection.socket.close()
            del self._connections[number]
            return
        connection.output += payload if kind == _DATA else b""
        connection.sink_ended |= kind == _END
        try:
            connection.flush()
        except OSError:
            self._cut(number)
            return
        if len(connection.output) > _MOST:
            self._cut(number)
            return
        self._end_if_over(number)

    def _connect(self, number: int) -> None:
        connected = socket.socket(socket.AF_UNIX)
        try:
            connected.connect(self._target)
        except OSError:
            connected.close()
            self._send(_CUT, number)
        else:
            self._connections[number] = _Connection(connected)


# The machine's end: the port, and the control socket of the `pyvmm run` that is there.
_DEVICE = f"/dev/vport0p{SOCKETS}"
INSIDE = "/run/pyvmm-qmp"
# The program there, with the command line's words.
MAIN = """\
import os
from pyvmm.cli import main
from pyvmm.nested.forward import inside
with inside():
    status = main()
os._exit(status)
"""


@contextlib.contextmanager
def inside() -> Iterator[None]:
    """In the machine: connections of the host lead to the socket `INSIDE`, once there is one."""
    forwarders: list[Forwarder] = []
    ended = threading.Event()

    def start() -> None:
        while not os.path.exists(INSIDE):
            if ended.wait(0.1):
                return
        channel = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
        forwarders.append(Forwarder(channel, target=INSIDE).start())

    starter = threading.Thread(target=start, name="forwarder-start", daemon=True)
    starter.start()
    try:
        yield
    finally:
        ended.set()
        starter.join()
        for forwarder in forwarders:
            forwarder.close()


# The host's end.


@contextlib.contextmanager
def listening(path: str | None) -> Iterator[socket.socket | None]:
    """A socket that is gone afterwards; None for no path. UsageError."""
    if path is None:
        yield None
        return
    with listen(path, _BACKLOG) as listener:
        try:
            yield listener
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)


@contextlib.contextmanager
def forwarding(listener: socket.socket | None, machine: Machine) -> Iterator[None]:
    """Who connects to `listener`, if there is one, reaches the socket `INSIDE` in the machine."""
    if listener is None:
        yield
        return
    forwarder = Forwarder(machine.ports[SOCKETS].fileno(), listener=listener).start()
    try:
        yield
    finally:
        forwarder.close()
