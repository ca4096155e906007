"""Character devices whose other side comes and goes: sockets, pseudo-terminals, this program.

A device gets the very descriptor of who is there (see `chardev.Chardev`), so that no byte takes a
detour; a thread of each of them waits for the next one while nobody is.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from contextlib import suppress

from pyvmm.backends.chardev import Chardev
from pyvmm.backends.unix_socket import check_path, listen
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

_RECONNECT_SECONDS = 0.5
_REOPEN_SECONDS = 10.0
_IN_OPEN = 0x20  # linux/inotify.h


class Peer(Chardev):
    """Waits, on a thread of its own, for a peer: a descriptor that carries both directions.

    `start` begins with it; subclasses say what a peer is.
    """

    def __init__(self, name: str, description: str) -> None:
        super().__init__(None, None, description)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._closing = False
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Self:
        self._thread.start()
        return self

    def disconnect(self) -> None:
        self.fds = (None, None)
        self._left.set()

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._wake, 1)
        self.disconnect()
        self._thread.join()
        os.close(self._wake)

    # On the thread, for subclasses.

    def wait_for_peer(self) -> int:
        """A descriptor of the next peer; raises _Closing when the device is closed meanwhile."""
        raise NotImplementedError

    def let_go(self) -> None:
        """The device uses the peer no more."""
        raise NotImplementedError

    def cleanup(self) -> None:
        """The thread ends."""

    def wait(self, fd: int = -1, seconds: float | None = None) -> None:
        """Until `fd` is readable or the time is over."""
        poll = select.poll()
        for each in (self._wake, fd):
            if each >= 0:
                poll.register(each, select.POLLIN)
        poll.poll(None if seconds is None else seconds * 1000)
        if self._closing:
            raise _Closing

    def _run(self) -> None:
        try:
            while True:
                fd = self.wait_for_peer()
                self._left.clear()
                if self._closing:
                    break
                self.fds = (fd, fd)
                self.connected()
                self._left.wait()
                self.let_go()
        except _Closing:
            pass
        finally:
            self.cleanup()


class _Closing(Exception):
    """The device is closed."""


class _SocketPeer(Peer):
    """What the socket peers have in common."""

    _socket: socket.socket | None = None

    def let_go(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def cleanup(self) -> None:
        self.let_go()


class ListeningPeer(_SocketPeer):
    """A listening Unix socket (mode 0600), for one client at a time, which may come back.

    UsageError when the host does not allow it.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._listener = listen(path)
        super().__init__("chardev-unix", f"socket {path}")

    def wait_for_peer(self) -> int:
        while True:
            self.wait(self._listener.fileno())
            try:
                self._socket, _ = self._listener.accept()
            except OSError:
                continue  # it left before it was accepted
            self._socket.setblocking(False)
            return self._socket.fileno()

    def cleanup(self) -> None:
        super().cleanup()
        self._listener.close()
        if os.path.exists(self._path):
            os.unlink(self._path)


class ConnectingPeer(_SocketPeer):
    """A connection to somebody's Unix socket, made again whenever that is there.

    UsageError when `path` can be no socket to connect to.
    """

    def __init__(self, path: str) -> None:
        check_path(path, "connect to")
        self._path = path
        try:
            self._socket = self._connect()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ECONNREFUSED, errno.EAGAIN):
                raise UsageError(f"cannot connect to {path}: {error.strerror}") from error
        super().__init__(
            "chardev-connect",
            f"socket {path}" if self._socket else f"socket {path}, once somebody listens there",
        )

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.setblocking(False)
            connection.connect(self._path)
        except OSError:
            connection.close()
            raise
        return connection

    def wait_for_peer(self) -> int:
        while self._socket is None:
            # Also before the first try: who listens and hangs up at once must not keep us busy.
            self.wait(seconds=_RECONNECT_SECONDS)
            with suppress(OSError):
                self._socket = self._connect()
        return self._socket.fileno()


class PtyPeer(Peer):
    """A pseudo-terminal; its peer is whoever has it open."""

    def __init__(self) -> None:
        from pyvmm.backends.terminal import make_raw

        try:
            self._master, slave = os.openpty()
        except OSError as error:
            raise UsageError(f"cannot create a pseudo-terminal: {error.strerror}") from error
        os.set_blocking(self._master, False)
        path = os.ttyname(slave)
        super().__init__("chardev-pty", f"pseudo-terminal {path}")
        make_raw(slave)  # else it would echo the guest's output back as input
        os.close(slave)  # from now on it is hung up
        self._opened = _watch_opens(path)

    def wait_for_peer(self) -> int:
        while self._is_hung_up():
            self.wait(self._opened)
            os.read(self._opened, 4096)
        return self._master

    def _is_hung_up(self) -> bool:
        """Also false for one that left, if what it wrote is still to be read."""
        poll = select.poll()
        poll.register(self._master, select.POLLIN)
        events = dict(poll.poll(0)).get(self._master, 0)
        return events & (select.POLLHUP | select.POLLIN) == select.POLLHUP

    def let_go(self) -> None:
        pass

    def cleanup(self) -> None:
        os.close(self._opened)
        os.close(self._master)


def _watch_opens(path: str) -> int:
    """A descriptor that can be read after `path` was opened: the master of a pseudo-terminal, which
    is hung up until then, does not tell."""
    from ctypes import CDLL, get_errno

    libc = CDLL(None, use_errno=True)
    fd: int = libc.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0 or libc.inotify_add_watch(fd, os.fsencode(path), _IN_OPEN) < 0:
        raise UsageError(f"cannot watch the pseudo-terminal {path}: {os.strerror(get_errno())}")
    return fd


class ProgramPeer(Chardev):
    """This program, by means of a `PortStream`."""

    def __init__(self) -> None:
        super().__init__(None, None)
        self._changed = threading.Condition()  # of what follows
        self._socket: socket.socket | None = None  # the device's end
        self._guest_open = False

    def open(self) -> PortStream:
        """The program's end. One that was closed just now is waited for, until the guest has read
        what was sent to it; UsageError when there is one already."""
        with self._changed:
            if self._socket is not None and not _has_left(self._socket):
                raise UsageError("the port is open already: close the stream that it was opened as")
            if not self._changed.wait_for(lambda: self._socket is None, _REOPEN_SECONDS):
                raise UsageError(
                    "the guest has not read yet what was sent to the port before it was closed: "
                    "open it later"
                )
            self._socket, own = socket.socketpair()
            self.fds = (self._socket.fileno(),) * 2
        self.connected()
        return PortStream(own, self)

    def disconnect(self) -> None:
        with self._changed:
            self.fds = (None, None)
            if self._socket is not None:
                self._socket.close()
                self._socket = None
            self._changed.notify_all()

    def hang_up(self) -> None:
        self.disconnect()

    def close(self) -> None:
        self.disconnect()

    def guest_opened(self, open: bool) -> None:
        with self._changed:
            self._guest_open = open
            self._changed.notify_all()

    def wait_guest(self, open: bool, timeout: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._guest_open == open, timeout)


def _has_left(end: socket.socket) -> bool:
    """Whether the other end was closed."""
    poll = select.poll()
    poll.register(end, 0)
    return bool(poll.poll(0))


class PortStream:
    """A program's end of a port: bytes to and from a program in the guest.

    The guest's program is stopped by what is not read here, as `write` is by what it does not read.
    The end comes when the guest has ended or the port was removed. A stream is for one thread that
    reads and one that writes.
    """

    def __init__(self, end: socket.socket, peer: ProgramPeer) -> None:
        self._socket = end
        self._peer = peer

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def guest_open(self) -> bool:
        """Whether a program in the guest has the port open."""
        return self._peer.wait_guest(True, 0)

    def wait_open(self, timeout: float | None = None) -> None:
        """Waits until a program in the guest has the port open. Raises TimeoutError."""
        if not self._peer.wait_guest(True, timeout):
            raise TimeoutError(f"no program in the guest opened the port within {timeout:g} s")

    def fileno(self) -> int:
        """The descriptor, which can be polled and blocks."""
        return self._socket.fileno()

    # What GuestConsole needs.
    reader = property(fileno)
    writer = property(fileno)

    def read(self, size: int = 1 << 16, timeout: float | None = None) -> bytes:
        """The next bytes, at most `size`, as soon as there are some; b"" at the end.

        Raises TimeoutError when none came within `timeout` seconds.
        """
        self._wait(select.POLLIN, timeout, "the guest sent nothing")
        try:
            return self._socket.recv(size)
        except ConnectionResetError:  # the guest ended with something unread
            return b""

    def write(self, data: bytes, timeout: float | None = None) -> int:
        """Sends all of `data`; returns how many bytes of it were taken, fewer than all only when
        the others were not within `timeout` seconds.

        Raises BrokenPipeError when the guest has ended or the port was removed.
        """
        from time import monotonic

        view = memoryview(data)
        deadline = None if timeout is None else monotonic() + timeout
        while view:
            left = None if deadline is None else max(0.0, deadline - monotonic())
            try:
                self._wait(select.POLLOUT, left, "")
            except TimeoutError:
                break
            try:
                view = view[self._socket.send(view, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) :]
            except BlockingIOError:
                continue
        return len(data) - len(view)

    def _wait(self, events: int, timeout: float | None, what: str) -> None:
        poll = select.poll()
        poll.register(self._socket, events)
        if not poll.poll(None if timeout is None else timeout * 1000):
            raise TimeoutError(f"{what} within {timeout:g} s")

    async def open_streams(self) -> tuple[Any, Any]:
        """An asyncio.StreamReader and StreamWriter in the place of this object, which must not be
        used any more; closing the writer closes the connection."""
        import asyncio

        return await asyncio.open_connection(sock=self._socket)

    def close(self) -> None:
        """Ends the connection, as the guest sees; idempotent. The port can be opened again."""
        self._socket.close()
