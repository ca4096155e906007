"""Character devices: what a guest's serial port or console is connected to on the host.

======== ======================================================================================
stdio    standard input and output. A terminal is in raw mode and Ctrl-A is the escape key (see
         ``terminal.py``); anything else passes every byte, and its end is the end of input.
pty      a new pseudo-terminal. Output is dropped while no program has it open.
file     output alone; the file is emptied first. Also a FIFO or a device.
unix     a listening Unix socket (mode 0600), for one client at a time, which may leave and come
         back. Output is dropped while there is none.
connect  a connection to somebody's Unix socket, made again when it is lost. Output is dropped
         while there is none.
pipe     two pipes, whose other ends this program holds (`PipeChardev`).
program  a socket, whose other end this program holds (`peer.ProgramPeer`).
none     no input; output is dropped.
======== ======================================================================================
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading

from pyvmm.backends.relay import Relay
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.backends.peer import Peer
    from pyvmm.backends.terminal import RawTerminal


# How often a process in the background looks whether it has the terminal, in milliseconds.
_FOREGROUND_INTERVAL = 500


class Chardev:
    """The host's side of a byte stream.

    `fds` are `input_fd` and `output_fd` (None: there is none), two descriptors that never block,
    for one reader and one writer; input can be polled; output may be a regular file, which cannot.
    They stay the same and open until `close`, before which the device must let go of them.

    Where `open_chardev` was asked for `direct`, and the host's other side is one that comes and
    goes, both are None while it is not there, and while it is they are the same descriptor, which
    may be a socket that blocks. `on_connect` tells, on another thread, that it came. The device,
    which sees the end of it, lets go of the descriptor and then calls `disconnect`.

    `description` tells the user where to connect; it is empty where that is no question.
    `on_resize`, if set, is called from another thread when `size` changed.
    """

    def __init__(self, input_fd: int | None, output_fd: int | None, description: str = "") -> None:
        self.fds = (input_fd, output_fd)
        self.description = description
        self.on_resize: Callable[[], None] | None = None
        self.on_connect: Callable[[], None] | None = None

    def connected(self) -> None:
        """Somebody came."""
        if self.on_connect is not None:
            self.on_connect()

    def disconnect(self) -> None:
        """The device has let go of the descriptors of who was there. Any thread."""

    def guest_opened(self, open: bool) -> None:
        """A program in the guest opened its side of a port, or closed it. Any thread."""

    @property
    def input_fd(self) -> int | None:
        return self.fds[0]

    @property
    def output_fd(self) -> int | None:
        return self.fds[1]

    def size(self) -> tuple[int, int] | None:
        """(columns, rows) of the terminal; None where that makes no sense."""
        return None

    def hang_up(self) -> None:
        """The guest is gone for good, and so is the device: tells a program that waits for more.

        Idempotent.
        """

    def close(self) -> None:
        """Delivers what was written, for a second at most, and lets go of the host's side."""
        if self.output_fd is not None:
            os.close(self.output_fd)


class PipeChardev(Chardev):
    """Two pipes: what the guest prints comes out of `reader`, what goes into `writer` is its input.

    Both are blocking descriptors for this program, closed with the rest by `close`. A full pipe
    stops the guest's output until it is read. When the guest is gone, `reader` ends.
    """

    def __init__(self) -> None:
        input_fd, self.writer = os.pipe2(os.O_CLOEXEC)
        self.reader, output_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(input_fd, False)
        os.set_blocking(output_fd, False)
        super().__init__(input_fd, output_fd)

    def hang_up(self) -> None:
        if self.output_fd is not None:
            os.close(self.output_fd)
            self.fds = (self.input_fd, None)

    def close(self) -> None:
        self.hang_up()
        for fd in (self.input_fd, self.reader, self.writer):
            assert fd is not None
            os.close(fd)


def open_chardev(
    kind: str,
    path: str | None = None,
    *,
    on_quit: Callable[[], None] | None = None,
    direct: bool = False,
) -> Chardev:
    """The character device `kind` of the table above; `path` is that of a file, unix or connect.

    `direct` is for devices that can follow who comes and goes (see `Chardev`); for others a thread
    copies what passes.
    `on_quit` is called, on a thread that must not close the device, when the user of stdio typed
    Ctrl-A x.
    Raises UsageError where the host does not allow it.
    """
    match kind:
        case "none":
            return Chardev(None, None)
        case "stdio":
            return _Stdio(on_quit)
        case "pipe":
            return PipeChardev()
        case "program":
            from pyvmm.backends.peer import ProgramPeer

            return ProgramPeer()
        case "file" if path:
            return Chardev(None, _open_file(path))
        case "pty" | "unix" | "connect" if path or kind == "pty":
            peer = _open_peer(kind, path or "")
            return peer.start() if direct else _Relayed(peer)
    raise ValueError(f"no character device {kind!r}, or its path is missing")


def _open_peer(kind: str, path: str) -> Peer:
    from pyvmm.backends.peer import ConnectingPeer, ListeningPeer, PtyPeer

    if kind == "pty":
        return PtyPeer()
    return ListeningPeer(path) if kind == "unix" else ConnectingPeer(path)


def _open_file(path: str) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND
    try:
        # Non-blocking for devices and FIFOs; regular files do not know it.
        return os.open(path, flags | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno == errno.ENXIO:
            raise UsageError(f"no program reads the FIFO {path}: start one first") from error
        raise UsageError(f"cannot write console output to {path}: {error.strerror}") from error


class _Relayed(Chardev):
    """A device whose two descriptors are those of a relay."""

    def __init__(self, peer: Peer) -> None:
        self._relay = _PeerRelay(peer)
        super().__init__(self._relay.input_fd, self._relay.output_fd, peer.description)
        self._relay.start()
        peer.start()

    def close(self) -> None:
        self._relay.close()


class _PeerRelay(Relay):
    """Copies to and from whoever is there of `peer`."""

    def __init__(self, peer: Peer) -> None:
        super().__init__("chardev-relay")
        self._peer = peer
        self.extra = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        peer.on_connect = lambda: os.eventfd_write(self.extra, 1)

    def extra_ready(self) -> None:
        os.eventfd_read(self.extra)
        fd = self._peer.input_fd
        self.source = self.sink = -1 if fd is None else fd

    def source_ended(self) -> None:
        # A client may have shut down its half alone, and still read.
        self.source = -1
        self._disconnect()

    def sink_ended(self) -> None:
        # What the client sent before it left is still to be read.
        self.sink = -1
        self._disconnect()

    def _disconnect(self) -> None:
        if self.source < 0 and self.sink < 0:
            self._peer.disconnect()

    def cleanup(self) -> None:
        self._peer.close()
        os.close(self.extra)


class _Stdio(Chardev):
    """Standard input through a relay; standard output directly where that need not block."""

    def __init__(self, on_quit: Callable[[], None] | None) -> None:
        own_output = _reopen_stdout()
        self._relay = _StdioRelay(on_quit, self._signalled, with_output=own_output is None)
        super().__init__(
            self._relay.input_fd, self._relay.output_fd if own_output is None else own_output
        )
        self._own_output = own_output
        self._last_size = self.size()
        self._relay.start()

    def _signalled(self) -> None:
        size, self._last_size = self._last_size, self.size()
        if size != self._last_size and self.on_resize is not None:
            self.on_resize()

    def size(self) -> tuple[int, int] | None:
        for fd in (1, 0):
            if os.isatty(fd):
                columns, rows = os.get_terminal_size(fd)
                return (columns, rows) if columns and rows else None
        return None

    def close(self) -> None:
        self._relay.close()
        if self._own_output is not None:
            os.close(self._own_output)


class _StdioRelay(Relay):
    """Standard input, and standard output where nothing else will do."""

    def __init__(
        self,
        on_quit: Callable[[], None] | None,
        on_signal: Callable[[], None],
        *,
        with_output: bool,
    ) -> None:
        super().__init__("chardev-stdio", with_output=with_output)
        self._on_quit = on_quit
        self._on_signal = on_signal
        self._terminal: RawTerminal | None = None
        if with_output and sys.__stdout__ is not None:
            self.sink = 1
        if sys.__stdin__ is None:  # started with it closed; the number may be another file by now
            self.end_input()
        elif os.isatty(0):
            from pyvmm.backends.terminal import EscapeFilter, RawTerminal

            self._terminal = RawTerminal(0)
            self._escape = EscapeFilter()
            self._take_terminal()
        else:
            self.source = 0
        if os.isatty(0) or os.isatty(1):
            self.extra, self._restore_signals = _watch_signals()

    def close(self) -> None:
        if self.extra >= 0:
            self._restore_signals()
        super().close()
        if self._terminal is not None:
            self._terminal.restore()

    def _take_terminal(self) -> None:
        if self._terminal is not None:
            self.source = 0 if self._terminal.enter() else -1
            # A shell that brings us to the foreground does not tell.
            self.interval = _FOREGROUND_INTERVAL if self.source < 0 else None

    def refresh(self) -> None:
        if self.interval is not None:
            self._take_terminal()

    def extra_ready(self) -> None:
        os.read(self.extra, 4096)
        self._take_terminal()
        self._on_signal()

    def filter(self, data: bytes) -> bytes:
        if self._terminal is None:
            return data
        from pyvmm.backends.terminal import HELP

        data, commands = self._escape.feed(data)
        for command in commands:
            if command == "h":
                os.write(2, HELP)
            elif self._on_quit is not None:
                self._on_quit()
        return data

    def source_ended(self) -> None:
        self.end_input()


# Where Python's signal handler puts a byte for each signal. Never closed: it may come late.
_signal_pipe: tuple[int, int] | None = None


def _watch_signals() -> tuple[int, Callable[[], None]]:
    """A descriptor that can be read after SIGWINCH or SIGCONT, and what undoes this.

    A handler in Python would run too late: only once the main thread does something, and the
    kernel gives SIGCONT to any thread. The descriptor is -1 where it cannot be: signals belong to
    the main thread, or to an event loop in it.
    """
    # Not `signal`, which wraps it in enumerations: 3 ms.
    import _signal  # type: ignore[import-not-found]

    global _signal_pipe
    if threading.current_thread() is not threading.main_thread():
        return -1, lambda: None
    if _signal_pipe is None:
        _signal_pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    reader, writer = _signal_pipe
    other = _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if other not in (-1, writer):
        _signal.set_wakeup_fd(other)
        return -1, lambda: None
    numbers = (_signal.SIGWINCH, _signal.SIGCONT)
    before = [_signal.signal(number, lambda *_: None) for number in numbers]

    def restore() -> None:
        if threading.current_thread() is threading.main_thread():
            _signal.set_wakeup_fd(-1)
            for number, handler in zip(numbers, before, strict=True):
                _signal.signal(number, handler)

    return reader, restore


def _reopen_stdout() -> int | None:
    """A descriptor of standard output that never blocks, or None where there cannot be one.

    Standard output itself may be shared with other programs (all those on a terminal), which
    O_NONBLOCK would upset, so a terminal or pipe is opened anew through /proc.
    """
    if sys.__stdout__ is None:
        return None
    mode = os.fstat(1).st_mode
    if stat.S_ISFIFO(mode) or os.isatty(1):
        try:
            return os.open(
                "/proc/self/fd/1", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
            )
        except OSError:  # no /proc, another user's terminal, a pipe without a reader
            return None
    # Opening a file anew would lose its position.
    return os.dup(1) if stat.S_ISREG(mode) or stat.S_ISCHR(mode) else None
