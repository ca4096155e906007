"""One command in the emulated machine: its streams, terminal, signals and status."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import stat
import struct
import termios
import threading
import time
import tty
from typing import TYPE_CHECKING

from pyvmm.errors import GuestTimeout, NoKvmError
from pyvmm.nested.machine import CONTROL, STDERR, STDIN, STDOUT, TERMINAL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from types import FrameType

    from pyvmm.nested.machine import Machine

# Record layout and kinds of nested_protocol.h.
_RECORD = struct.Struct("<IIQQQ")
_SIGNAL, _WINDOW, _END, _CLOSED, _HELLO, _ALIVE, _EXIT = range(1, 8)

_START_SECONDS = 90.0
_SILENCE_SECONDS = 90.0
_POLL_SECONDS = 2.0
_READ_SIZE = 65536
# poll(2) promises no more room than this in a pipe or terminal, and a blocked write would keep
# signals from the command.
_WRITE_SIZE = select.PIPE_BUF

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)

# Names whose values point at sockets and sessions of the host that are not in the machine.
_HOST_ONLY = (
    "DBUS_",
    "DISPLAY",
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_",
    "NOTIFY_SOCKET",
    "SSH_AUTH_SOCK",
    "TMUX",
    "WAYLAND_",
    "XAUTHORITY",
    "XDG_RUNTIME_DIR",
    "XDG_SESSION_",
)


class MachineFailed(NoKvmError):
    """The emulated machine did not come up, or broke down under its command."""


class Interrupted(Exception):
    """A signal that ends the machine: before the command started, or the second one after."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Stream:
    """One direction of one stream; ``count`` bytes of it have been read so far.

    It reads only when nothing is pending, so a slow reader holds up its writer and nothing else.
    """

    def __init__(self, source: int, target: int, write_size: int = _READ_SIZE) -> None:
        self.source = source
        self.target = target
        self.count = 0
        self.ended = False
        self.broken = False
        self._pending = b""
        self._write_size = write_size

    @property
    def idle(self) -> bool:
        return not self._pending

    def wants(self) -> Iterator[tuple[int, int]]:
        """What to poll for: (file descriptor, event)."""
        if self._pending:
            yield self.target, select.POLLOUT
        elif not self.ended:
            yield self.source, select.POLLIN

    def advance(self, ready: set[int]) -> None:
        if self._pending and self.target in ready:
            try:
                written = os.write(self.target, self._pending[: self._write_size])
            except BlockingIOError:
                return
            except OSError:
                self.broken = True
                self.ended = True
                written = len(self._pending)
            self._pending = self._pending[written:]
        elif not self._pending and self.source in ready and not self.ended:
            try:
                self._pending = os.read(self.source, _READ_SIZE)
            except BlockingIOError:
                return
            except OSError:
                self._pending = b""
            self.ended = not self._pending
            self.count += len(self._pending)


class Session:
    """Runs ``argv`` in ``machine``, from the machine's start to the command's end; use once."""

    def __init__(self, machine: Machine, argv: Sequence[str], *, deadline: float | None) -> None:
        self._machine = machine
        self._argv = argv
        self._deadline = deadline
        self._control = machine.ports[CONTROL]
        self._signals: list[int] = []
        self._forwarded = False
        self.started = False
        self._terminals = [fd for fd in range(3) if os.isatty(fd)]

        # The machine's side of every port is open, so that a port which carries nothing idles.
        ports = {port: end.fileno() for port, end in machine.ports.items()}
        for port in (STDIN, STDOUT, STDERR, TERMINAL):
            machine.ports[port].setblocking(False)
        self._input = _Stream(0, ports[TERMINAL if 0 in self._terminals else STDIN])
        self._outputs = {
            port: _Stream(ports[port], fd, _write_size(fd))
            for port, fd in ((STDOUT, 1), (STDERR, 2))
            if fd not in self._terminals
        }
        if self._terminals:
            shown_on = next(fd for fd in (1, 2, 0) if fd in self._terminals)
            self._outputs[TERMINAL] = _Stream(ports[TERMINAL], shown_on, _WRITE_SIZE)

    def await_machine(self) -> None:
        """Returns when the machine is ready for `run`; until then it has run nothing.

        Raises `MachineFailed` when it ends or does not do so in time, and `Interrupted`.
        """
        with self._signal_wakeup() as wakeup:
            limit = time.monotonic() + _START_SECONDS
            while True:
                ready = self._poll([(self._control.fileno(), select.POLLIN)], wakeup)
                if self._signals:
                    raise Interrupted(self._signals[0])
                if ready:
                    kind, _, _ = self._receive()
                    assert kind == _HELLO, kind
                    return
                if time.monotonic() > limit:
                    raise self._failed(f"did not come up in {_START_SECONDS:.0f} s")

    def run(self) -> int:
        """The command's exit status, or 128 + n if signal n ended it.

        Raises `MachineFailed`, `pyvmm.errors.GuestTimeout` at the deadline, and `Interrupted`.
        """
        with self._signal_wakeup() as wakeup, self._raw_terminal():
            self.started = True
            self._control.sendall(self._start_message())
            return self._relay(wakeup)

    def _relay(self, wakeup: int) -> int:
        exit_status: int | None = None
        totals: dict[int, int] = {}
        input_open = True
        heard = checked = time.monotonic()
        while exit_status is None or not all(
            stream.broken or (stream.idle and stream.count >= totals[port])
            for port, stream in self._outputs.items()
        ):
            wanted = [(self._control.fileno(), select.POLLIN)]
            for stream in (self._input, *self._outputs.values()):
                wanted += stream.wants()
            ready = self._poll(wanted, wakeup)
            self._handle_signals()

            now = time.monotonic()
            # A pause as long as this was ours (stopped, suspended), not the machine's.
            heard = now if now - checked > 5 * _POLL_SECONDS else heard
            checked = now
            if self._control.fileno() in ready:
                heard = now
                kind, value, counts = self._receive()
                if kind == _EXIT:
                    exit_status = _exit_status(value)
                    totals = dict(zip((STDOUT, STDERR, TERMINAL), counts, strict=True))
                elif not self._machine.is_whole():
                    raise self._failed("broke down")
            elif not ready and not self._machine.is_whole():
                raise self._failed("broke down")
            elif now - heard > _SILENCE_SECONDS:
                raise self._failed(f"has hung (silent for {_SILENCE_SECONDS:.0f} s)")

            self._input.advance(ready)
            if input_open and self._input.ended and self._input.idle:
                input_open = False
                self._send(_END, STDIN, self._input.count)
            for port, stream in self._outputs.items():
                was_broken = stream.broken
                stream.advance(ready)
                if stream.broken and not was_broken:
                    self._send(_CLOSED, port)
        return exit_status

    def _poll(self, wanted: list[tuple[int, int]], wakeup: int) -> set[int]:
        """The file descriptors of ``wanted`` that are ready (or in error)."""
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise GuestTimeout("the command in the emulated machine ran into its --timeout")
        poll = select.poll()
        poll.register(wakeup, select.POLLIN)
        events: dict[int, int] = {}
        for fd, event in wanted:
            events[fd] = events.get(fd, 0) | event
        for fd, event in events.items():
            poll.register(fd, event)
        timeout = _POLL_SECONDS
        if self._deadline is not None:
            timeout = max(0.0, min(timeout, self._deadline - time.monotonic()))
        ready = {fd for fd, _ in poll.poll(timeout * 1000)}
        if wakeup in ready:
            os.read(wakeup, 512)
        return ready - {wakeup}

    def _send(self, kind: int, value: int, first: int = 0, second: int = 0) -> None:
        with contextlib.suppress(OSError):  # a dead machine is noticed by `_receive`
            self._control.sendall(_RECORD.pack(kind, value, first, second, 0))

    def _receive(self) -> tuple[int, int, tuple[int, ...]]:
        try:
            data = self._control.recv(_RECORD.size, socket.MSG_WAITALL)
        except OSError:
            data = b""
        if len(data) < _RECORD.size:
            raise self._failed("broke down")
        kind, value, *counts = _RECORD.unpack(data)
        return kind, value, tuple(counts)

    def _failed(self, what: str) -> MachineFailed:
        return MachineFailed(f"the emulated machine {what}:\n{self._machine.diagnosis()}")

    def _start_message(self) -> bytes:
        """A u32 length, then NUL-terminated strings: see ``receive_command`` in nested_init.c."""
        mask = umask()
        rows, columns = self._window_size()
        now = time.time_ns()
        fields = [
            *(now // 10**9, now % 10**9),
            sum(1 << fd for fd in self._terminals),
            int(0 in self._terminals),
            *(rows, columns),
            mask,
            socket.gethostname(),
            os.getcwd(),
            *(len(self._argv), *self._argv),
        ]
        inherited = [f"{name}={value}" for name, value in environment().items()]
        fields += [len(inherited), *inherited]
        message = b"".join(os.fsencode(str(field)) + b"\0" for field in fields)
        return struct.pack("<I", len(message)) + message

    def _window_size(self) -> tuple[int, int]:
        for fd in self._terminals:
            with contextlib.suppress(OSError):
                columns, rows = os.get_terminal_size(fd)
                return rows, columns
        return 24, 80

    def _handle_signals(self) -> None:
        while self._signals:
            number = self._signals.pop(0)
            if number == signal.SIGWINCH:
                self._send(_WINDOW, 0, *self._window_size())
            elif self._forwarded:
                raise Interrupted(number)
            else:
                self._forwarded = True
                self._send(_SIGNAL, number)

    @contextlib.contextmanager
    def _signal_wakeup(self) -> Iterator[int]:
        """Collects signals in ``self._signals``; gives a file descriptor that each makes ready.

        Python takes signals in its main thread only: elsewhere none are forwarded.
        """
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        handled: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        old_wakeup = -1

        def remember(number: int, _frame: FrameType | None) -> None:
            self._signals.append(number)

        try:
            if threading.current_thread() is threading.main_thread():
                old_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
                for number in (*_FORWARDED, signal.SIGWINCH):
                    handled[number] = signal.signal(number, remember)
            yield reader
        finally:
            for caught, handler in handled.items():
                signal.signal(caught, handler)
            if handled:
                signal.set_wakeup_fd(old_wakeup)
            os.close(reader)
            os.close(writer)

    @contextlib.contextmanager
    def _raw_terminal(self) -> Iterator[None]:
        if 0 not in self._terminals:
            yield
            return
        settings = termios.tcgetattr(0)
        tty.setraw(0, termios.TCSANOW)
        try:
            yield
        finally:
            termios.tcsetattr(0, termios.TCSADRAIN, settings)


def environment() -> dict[str, str]:
    """The command's environment: the host's, without what names the host's own sessions."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(_HOST_ONLY)}
    path = os.environ.get("PATH", os.defpath)
    return {**kept, "PATH": f"/run/pyvmm:{path}", "PYVMM_NESTED": "1"}


def umask() -> int:
    """This process's umask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _write_size(fd: int) -> int:
    try:
        regular = stat.S_ISREG(os.fstat(fd).st_mode)
    except OSError:
        regular = True
    return _READ_SIZE if regular else _WRITE_SIZE


def _exit_status(wait_status: int) -> int:
    if os.WIFSIGNALED(wait_status):
        return 128 + os.WTERMSIG(wait_status)
    return os.WEXITSTATUS(wait_status)
