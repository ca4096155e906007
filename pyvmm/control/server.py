"""The control socket: a thread that speaks QMP with any number of clients."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque

from pyvmm.backends.unix_socket import listen
from pyvmm.control.commands import Control
from pyvmm.control.protocol import QmpError, Splitter, check_request, encode, failure, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.control.commands import Event, Machine

MAX_CLIENTS = 32
_READ_SIZE = 1 << 16
# A client that does not read is not heard while it has more than this to read, and is dropped when
# events have made it more than that.
_ENOUGH_OUTPUT = 1 << 16
_MOST_OUTPUT = 4 << 20
_MOST_EVENTS = 10_000  # that happen while the thread is busy
_CLOSE_SECONDS = 1.0  # that clients get to take the last words
_GONE = select.POLLHUP | select.POLLERR


class QmpServer:
    """Serves clients on a Unix socket at `path`, of mode 0600; UsageError when it cannot be made.

    It listens at once, and answers from `start` on.
    """

    def __init__(self, path: str, machine: Machine) -> None:
        self._path = path
        self._listener = listen(path, MAX_CLIENTS)
        self._control = Control(machine)
        self._clients: dict[int, _Client] = {}
        self._lock = threading.Lock()  # for the next three
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._events: deque[Event] = deque()
        self._missed_events = False
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="qmp", daemon=True)
        machine.on_event(self._hear)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def close(self) -> None:
        """Sends what is to be sent, for a second at most, and ends; idempotent."""
        if self._wake < 0:
            return
        self._closing = True
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        for client in self._clients.values():
            client.socket.close()
        self._listener.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        with self._lock:
            os.close(self._wake)
            self._wake = -1

    def _hear(self, event: Event) -> None:
        """Any thread, which may hold locks of the machine."""
        with self._lock:
            if self._wake < 0:
                return
            if len(self._events) < _MOST_EVENTS:
                self._events.append(event)
            else:
                self._missed_events = True
            os.eventfd_write(self._wake, 1)

    # The thread

    def _serve(self) -> None:
        while not self._closing:
            self._serve_once(None)
        deadline = time.monotonic() + _CLOSE_SECONDS
        while (left := deadline - time.monotonic()) > 0 and any(
            client.output for client in self._clients.values()
        ):
            self._serve_once(left)

    def _serve_once(self, seconds: float | None) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if len(self._clients) < MAX_CLIENTS:
            poll.register(self._listener, select.POLLIN)
        for fd, client in self._clients.items():
            poll.register(fd, client.wants())
        for fd, events in poll.poll(None if seconds is None else seconds * 1000):
            if fd == self._wake:
                os.eventfd_read(self._wake)
            elif fd == self._listener.fileno():
                self._accept()
            else:
                client = self._clients[fd]
                if events & (select.POLLIN | _GONE):
                    client.receive()
                self._advance(client)
        self._send_events()
        for fd, client in list(self._clients.items()):
            if client.is_done():
                client.socket.close()
                del self._clients[fd]

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            time.sleep(0.01)  # it left, or we have no descriptor left
            return
        connection.setblocking(False)
        client = _Client(connection)
        client.send(self._control.greeting())
        self._clients[connection.fileno()] = client
        self._advance(client)

    def _advance(self, client: _Client) -> None:
        """Does what the client has asked for, as far as it reads the answers."""
        client.flush()
        while not client.is_full():
            try:
                text = client.splitter.next()
                if text is None:
                    break
                self._answer(client, parse(text))
            except QmpError as error:
                client.send(failure(error))
            client.flush()

    def _answer(self, client: _Client, request: Any) -> None:
        mark = {"id": request["id"]} if isinstance(request, dict) and "id" in request else {}
        try:
            name, arguments = check_request(request)
            command, arguments = self._control.find(name, arguments, client.negotiated)
            if command.later:
                client.send({"return": {}, **mark})
                self._control.execute(command, arguments)
                return
            result = self._control.execute(command, arguments)
        except QmpError as error:
            client.send({**failure(error), **mark})
            return
        self._send_events()  # those that it led to come first
        client.negotiated = True  # before that, no other command gets here
        client.send({"return": result, **mark})

    def _send_events(self) -> None:
        while self._events:
            line = encode(self._control.tell(self._events.popleft()))
            for client in self._clients.values():
                if client.negotiated:
                    client.send_line(line)
        with self._lock:
            missed, self._missed_events = self._missed_events, False
        for client in self._clients.values():
            client.broken |= client.negotiated and (missed or len(client.output) > _MOST_OUTPUT)
            client.flush()


class _Client:
    """A connection, what came of it so far, and what is to go."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self.splitter = Splitter()
        self.output = bytearray()
        self.negotiated = False
        self.broken = False
        self._ended = False  # it sends no more

    def wants(self) -> int:
        """The events of poll(2) that it waits for."""
        hears = not self._ended and not self.is_full()
        return (select.POLLIN if hears else 0) | (select.POLLOUT if self.output else 0)

    def is_full(self) -> bool:
        return self.broken or len(self.output) > _ENOUGH_OUTPUT

    def is_done(self) -> bool:
        return self.broken or (self._ended and not self.output)

    def receive(self) -> None:
        if self._ended or self.is_full():
            return
        try:
            data = self.socket.recv(_READ_SIZE)
        except BlockingIOError:
            return
        except OSError:
            self.broken = True
            return
        self._ended = not data
        self.splitter.feed(data)

    def send(self, message: dict[str, Any]) -> None:
        self.send_line(encode(message))

    def send_line(self, line: bytes) -> None:
        self.output += line

    def flush(self) -> None:
        """Sends as much as the client's side takes."""
        try:
            while self.output and not self.broken:
                del self.output[: self.socket.send(self.output)]
        except BlockingIOError:
            pass
        except OSError:
            self.broken = True
            self.output.clear()
