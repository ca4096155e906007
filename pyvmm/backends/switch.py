"""Switches: networks of virtual machines, joined by a Unix socket. No root needed.

Frames are passed on in C, by one thread (``_native/net_switch.c``). A switch is there as long as
somebody holds it: a `Switch` object, ``pyvmm switch``, or, where neither was there first, a process
that the first machine to come starts, and that ends when the last one has left.

Who comes, makes or ends a switch holds a lock on the folder of the socket while doing so: nobody
comes to one that is about to end, and no two make it.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from contextlib import closing, contextmanager, suppress

from pyvmm._core import ffi, lib
from pyvmm.backends.net import NetPort
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _socket import socket as Socket
    from collections.abc import Iterator
    from typing import Any, Self

# As much of it as the kernel gives.
_SOCKET_BUFFER = 4 << 20
_BACKLOG = 128
_LONGEST_PATH = 107  # sun_path of unix(7), without the NUL

# The descriptors that `serve` is started with.
_LISTENER, _FIRST_PORT = 3, 4


class Switch:
    """A switch in this process. A virtual machine's network ``switch=PATH`` is a port of it.

    >>> with Switch() as switch:
    ...     one = VM(kernel="host", nets=[f"switch={switch.path}"])
    ...     two = VM(kernel="host", nets=[f"switch={switch.path}"])

    Without a path it has one of its own. Raises UsageError.
    """

    def __init__(self, path: str | os.PathLike[str] | None = None) -> None:
        self._folder = None
        if path is None:
            import tempfile

            self._folder = tempfile.mkdtemp(prefix="pyvmm-")
            path = os.path.join(self._folder, "switch")
        self.path = os.path.abspath(path)
        with _locked(self.path):
            port = _connect(self.path)
            if port is not None:
                port.close()
                raise UsageError(
                    f"the switch {self.path} is there already: join it, or take another path"
                )
            self._listener = _listen(self.path)
        self._native = _create(self._listener.fileno())
        self._thread = threading.Thread(target=self._serve, name="switch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Cuts everybody off; idempotent."""
        if self._native is None:
            return
        with suppress(FileNotFoundError):
            os.unlink(self.path)
        lib.net_switch_stop(self._native)
        self._thread.join()
        lib.net_switch_destroy(self._native)
        self._native = None
        self._listener.close()
        if self._folder is not None:
            os.rmdir(self._folder)

    @property
    def counters(self) -> dict[str, int]:
        """See ``struct net_switch_counters``."""
        counters = lib.net_switch_counters(self._native)
        names = ("ports", "frames", "malformed", "dropped")
        return {name: getattr(counters, name) for name in names}

    def _serve(self) -> None:
        result = lib.net_switch_run(self._native, False)
        if result < 0:
            import logging

            logger = logging.getLogger("pyvmm.backends")
            logger.error("the switch %s stopped: %s", self.path, os.strerror(-result))


class SwitchPort(NetPort):
    """A port of the switch at `path`, which is made if nobody has."""

    def __init__(self, path: str, *, mtu: int = 0, offloads: bool = True) -> None:
        path = os.path.abspath(path)
        with _locked(path):
            connection = _connect(path) or _start(path)
        connection.setsockopt(_sockets().SOL_SOCKET, _sockets().SO_SNDBUF, _SOCKET_BUFFER)
        bits = lib.NET_SWITCH_OFFLOADS if offloads else 0
        super().__init__(
            (connection.detach(),),
            lib.NET_FRAMING_PACKET,
            vnet_hdr=True,
            takes=bits,
            gives=bits,
            mtu=mtu,
        )

    def set_offloads(self, offloads: int) -> None:
        with suppress(ConnectionError):  # the switch has gone
            os.write(self.fds[0], offloads.to_bytes(4, "little"))


def serve(path: str) -> None:
    """The process of a switch that a machine made: passes frames on until the last port leaves."""
    hub = _create(_LISTENER)
    lib.net_switch_add(hub, _FIRST_PORT)
    listener = _sockets().socket(fileno=_LISTENER)
    while lib.net_switch_run(hub, True) == lib.NET_SWITCH_EMPTY:
        with _locked(path):
            try:
                fd, _ = listener._accept()
            except BlockingIOError:
                with suppress(FileNotFoundError):
                    os.unlink(path)
                return
        lib.net_switch_add(hub, fd)


def _sockets() -> Any:
    # Not `socket`, which wraps it in enumerations: 5 ms.
    import _socket

    return _socket


def _create(listener: int) -> Any:
    native = lib.net_switch_create(listener)
    if native == ffi.NULL:
        raise OSError(ffi.errno, os.strerror(ffi.errno))
    return native


@contextmanager
def _locked(path: str) -> Iterator[None]:
    """While this runs nobody else joins, makes or ends the switch there. UsageError."""
    import fcntl

    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise UsageError(
            f"the path of a switch has at most {_LONGEST_PATH} bytes, unlike {path}: "
            "take a shorter one"
        )
    folder = os.path.dirname(path)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"the switch {path} cannot be in {folder}: {os.strerror(error.errno or 0)}"
        ) from None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _connect(path: str) -> Socket | None:
    """A port of the switch; None if there is none (and nothing left of one)."""
    connection = _new_socket()
    try:
        connection.connect(path)
        return connection
    except OSError as error:
        connection.close()
        if error.errno == errno.ENOENT:
            return None
        if error.errno == errno.ECONNREFUSED and stat.S_ISSOCK(os.stat(path).st_mode):
            os.unlink(path)  # what a killed process left behind
            return None
        raise UsageError(_why_not_joined(path, error)) from None


def _why_not_joined(path: str, error: OSError) -> str:
    if error.errno == errno.EACCES:
        return f"the switch {path} belongs to another user: take another path"
    if error.errno in (errno.ECONNREFUSED, errno.EPROTOTYPE):
        return f"{path} is there and is no switch: take another path"
    return f"the switch {path} cannot be joined: {os.strerror(error.errno or 0)}"


def _new_socket() -> Socket:
    sockets = _sockets()
    made: Socket = sockets.socket(sockets.AF_UNIX, sockets.SOCK_SEQPACKET | sockets.SOCK_CLOEXEC)
    return made


def _listen(path: str) -> Socket:
    listener = _new_socket()
    listener.setblocking(False)
    os.fchmod(listener.fileno(), 0o600)  # bind gives the socket's mode to the file
    try:
        listener.bind(path)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise UsageError(
            f"the switch {path} cannot be made ({os.strerror(error.errno or 0)}): take a path in a "
            "folder of yours"
        ) from None
    return listener


def _start(path: str) -> Socket:
    """Starts a process for the switch at `path`; its first port."""
    from fcntl import F_DUPFD_CLOEXEC, fcntl

    sockets = _sockets()
    ours: Socket
    ours, theirs = sockets.socketpair(sockets.AF_UNIX, sockets.SOCK_SEQPACKET)
    with closing(_listen(path)) as listener, closing(theirs):
        # Out of the way first, as the numbers they get may be those they have.
        passed = [fcntl(each.fileno(), F_DUPFD_CLOEXEC, 10) for each in (listener, theirs)]
    code = f"from pyvmm.backends.switch import serve; serve({path!r})"
    null = [(os.POSIX_SPAWN_OPEN, fd, os.devnull, os.O_RDWR, 0) for fd in (0, 1, 2)]
    targets = zip(passed, (_LISTENER, _FIRST_PORT), strict=True)
    try:
        shell = os.posix_spawn(
            "/bin/sh",
            # The shell leaves at once, so that the switch is nobody's child.
            ["sh", "-c", '"$@" &', "sh", sys.executable, "-P", "-c", code],
            os.environ,
            file_actions=[*null, *((os.POSIX_SPAWN_DUP2, fd, to) for fd, to in targets)],
            setsid=True,
        )
    finally:
        for fd in passed:
            os.close(fd)
    os.waitpid(shell, 0)
    return ours
