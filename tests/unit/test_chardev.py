"""Character devices on real pipes, files, sockets and terminals."""

from __future__ import annotations

import fcntl
import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.mmio_driver import wait_until

from pyvmm.backends.chardev import Chardev, open_chardev
from pyvmm.backends.terminal import EscapeFilter
from pyvmm.errors import UsageError

ECHO = [sys.executable, str(Path(__file__).parents[1] / "support/stdio_echo.py")]


@contextmanager
def opened(kind: str, path: Path | None = None) -> Iterator[Chardev]:
    chardev = open_chardev(kind, str(path) if path else None)
    try:
        yield chardev
    finally:
        chardev.close()


def send(chardev: Chardev, data: bytes) -> None:
    """Writes as a device does: waits where the output would block."""
    assert chardev.output_fd is not None
    while data:
        assert select.select([], [chardev.output_fd], [], 10)[1], "the host takes no more"
        data = data[os.write(chardev.output_fd, data) :]


def receive(chardev: Chardev, size: int) -> bytes:
    assert chardev.input_fd is not None
    return read(chardev.input_fd, size)


def read(fd: int, size: int) -> bytes:
    """The next `size` bytes, or those up to the end."""
    data = b""
    while len(data) < size:
        assert select.select([fd], [], [], 10)[0], f"after {data!r} nothing more came"
        more = os.read(fd, size - len(data))
        if not more:
            break
        data += more
    return data


@contextmanager
def no_busy_loop() -> Iterator[None]:
    """Nothing in this process may spin meanwhile."""
    before = resource.getrusage(resource.RUSAGE_SELF)
    yield
    time.sleep(0.3)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.1


# none and file


def test_none_has_neither_side() -> None:
    with opened("none") as chardev:
        assert chardev.input_fd is None
        assert chardev.output_fd is None
        assert chardev.size() is None
        assert chardev.description == ""


def test_a_file_is_emptied_and_filled(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("of an older run, and longer")
    with opened("file", path) as chardev:
        assert chardev.input_fd is None
        send(chardev, b"first\n")
        send(chardev, b"second\n")
    assert path.read_bytes() == b"first\nsecond\n"


def test_a_fifo_without_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match=r"no program reads the FIFO .*/fifo: start one first"):
        open_chardev("file", str(tmp_path / "fifo"))


def test_a_fifo_with_a_reader(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    reader = os.open(tmp_path / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    with opened("file", tmp_path / "fifo") as chardev:
        send(chardev, b"through")
        assert read(reader, 7) == b"through"
    os.close(reader)


@pytest.mark.parametrize(("path", "reason"), [(".", "directory"), ("no/such/log", "No such file")])
def test_files_that_cannot_be_written(tmp_path: Path, path: str, reason: str) -> None:
    with pytest.raises(UsageError, match=f"cannot write console output to .*{reason}"):
        open_chardev("file", str(tmp_path / path))


def test_an_unknown_kind_is_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="telnet"):
        open_chardev("telnet")
    with pytest.raises(ValueError, match="file"):
        open_chardev("file")


# unix


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "console.sock"


def connect(path: Path) -> socket.socket:
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(10)
    client.connect(str(path))
    return client


def test_a_socket_carries_both_directions(path: Path) -> None:
    with opened("unix", path) as chardev, connect(path) as client:
        assert chardev.description == f"socket {path}"
        client.sendall(b"typed")
        assert receive(chardev, 5) == b"typed"
        send(chardev, b"printed")
        assert client.recv(100) == b"printed"


def test_a_socket_is_for_its_owner_alone(path: Path) -> None:
    with opened("unix", path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_output_without_a_client_is_dropped(path: Path) -> None:
    with opened("unix", path) as chardev:
        send(chardev, bytes(1 << 20))  # more than any buffer on the way
        wait_until(lambda: pipe_is_empty(chardev))
        with connect(path) as client:
            client.sendall(b"x")
            receive(chardev, 1)
            send(chardev, b"now")
            assert client.recv(100) == b"now"


def test_a_client_that_comes_back(path: Path) -> None:
    with opened("unix", path) as chardev:
        for n in range(3):
            with connect(path) as client:
                client.sendall(b"%d" % n)
                assert receive(chardev, 1) == b"%d" % n
                send(chardev, b"answer")
                assert client.recv(100) == b"answer"


def test_the_second_client_waits_for_the_first(path: Path) -> None:
    with opened("unix", path) as chardev, connect(path) as second:
        second.sendall(b"a")
        assert receive(chardev, 1) == b"a"
        with connect(path) as third:
            third.sendall(b"b")
            assert chardev.input_fd is not None
            assert not select.select([chardev.input_fd], [], [], 0.05)[0]
            second.close()
            assert receive(chardev, 1) == b"b"


def test_a_client_that_only_sends(path: Path) -> None:
    """printf 'poweroff\\n' | nc -UN console.sock"""
    with opened("unix", path) as chardev:
        with connect(path) as client:
            client.sendall(b"poweroff\n")
        assert receive(chardev, 9) == b"poweroff\n"
        with connect(path) as client:
            client.sendall(b"status\n")
            client.shutdown(socket.SHUT_WR)
            assert receive(chardev, 7) == b"status\n"
            with no_busy_loop():
                send(chardev, b"running\n")
            assert client.recv(100) == b"running\n"
        with connect(path) as client:
            client.sendall(b"next")
            assert receive(chardev, 4) == b"next"


def test_a_slow_client_slows_the_guest_down(path: Path) -> None:
    data = os.urandom(1 << 20)
    with opened("unix", path) as chardev, connect(path) as client:
        client.sendall(b"x")
        receive(chardev, 1)
        assert chardev.output_fd is not None
        sent = 0
        while select.select([], [chardev.output_fd], [], 0.2)[1]:
            sent += os.write(chardev.output_fd, data[sent:])
        assert sent < len(data)
        received = b""
        while len(received) < len(data):
            received += client.recv(1 << 20)
            while sent < len(data) and select.select([], [chardev.output_fd], [], 0)[1]:
                sent += os.write(chardev.output_fd, data[sent:])
        assert received == data


def test_a_client_that_leaves_before_it_read(path: Path) -> None:
    with opened("unix", path) as chardev:
        with connect(path) as client:
            client.sendall(b"x")
            receive(chardev, 1)
        send(chardev, bytes(1 << 20))
        with connect(path) as client:
            client.sendall(b"y")
            assert receive(chardev, 1) == b"y"


def test_a_guest_that_reads_nothing(path: Path) -> None:
    with opened("unix", path), connect(path) as client:
        client.setblocking(False)
        sent = 0
        while select.select([], [client], [], 0.2)[1]:
            sent += client.send(bytes(65536))
        assert sent < 1 << 20
        with no_busy_loop():
            client.close()


def test_close_delivers_the_last_output(path: Path) -> None:
    with connect_to_new(path) as (chardev, client):
        send(chardev, b"x" * 30_000 + b"Power down\n")
        chardev.close()
        received = b""
        while more := client.recv(65536):
            received += more
        assert received.endswith(b"Power down\n")
        assert len(received) == 30_011


@contextmanager
def connect_to_new(path: Path) -> Iterator[tuple[Chardev, socket.socket]]:
    chardev = open_chardev("unix", str(path))
    with connect(path) as client:
        client.sendall(b"x")
        receive(chardev, 1)
        yield chardev, client


def test_close_does_not_wait_for_ever_for_a_client(path: Path) -> None:
    with connect_to_new(path) as (chardev, client):
        assert chardev.output_fd is not None
        while select.select([], [chardev.output_fd], [], 0.2)[1]:
            os.write(chardev.output_fd, bytes(65536))
        began = time.monotonic()
        chardev.close()
        assert time.monotonic() - began < 5
        client.close()
        wait_until(lambda: not path.exists())


def test_a_socket_left_behind_is_replaced(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(path))
    with opened("unix", path) as chardev, connect(path) as client:
        client.sendall(b"x")
        assert receive(chardev, 1) == b"x"


@pytest.mark.parametrize("taken_by", ["pyvmm", "file"])
def test_a_path_in_use_is_left_alone(path: Path, taken_by: str) -> None:
    other = open_chardev("unix", str(path)) if taken_by == "pyvmm" else None
    if other is None:
        path.write_text("precious")
    with pytest.raises(UsageError, match=r"it exists and is in use; choose another path"):
        open_chardev("unix", str(path))
    if other is None:
        assert path.read_text() == "precious"
    else:
        other.close()


def test_paths_that_cannot_be_a_socket(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot listen on .*: No such file or directory"):
        open_chardev("unix", str(tmp_path / "no/such/socket"))
    with pytest.raises(UsageError, match="at most 107 bytes; choose a shorter one"):
        open_chardev("unix", str(tmp_path / ("x" * 200)))


# connect


def test_a_connection_carries_both_directions(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))
        server.listen(1)
        with opened("connect", path) as chardev:
            assert chardev.description == f"socket {path}"
            for _ in range(2):  # it is made again
                client, _ = server.accept()
                with client:
                    client.sendall(b"typed")
                    assert receive(chardev, 5) == b"typed"
                    send(chardev, b"printed")
                    assert client.recv(100) == b"printed"


def test_what_cannot_be_connected_to(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(UsageError) as error:
            open_chardev("connect", str(path))
    assert str(error.value) == f"cannot connect to {path}: Protocol wrong type for socket"
    with pytest.raises(UsageError) as error:
        open_chardev("connect", "/" + "x" * 107)
    assert str(error.value) == (
        f"cannot connect to /{'x' * 107}: the path of a socket has at most 107 bytes; "
        "choose a shorter one"
    )


# pty


@pytest.fixture
def pty() -> Iterator[Chardev]:
    with opened("pty") as chardev:
        yield chardev


def open_slave(chardev: Chardev) -> int:
    assert chardev.description.startswith("pseudo-terminal /dev/pts/")
    return os.open(chardev.description.split()[1], os.O_RDWR | os.O_NOCTTY)


def test_a_pty_carries_every_byte(pty: Chardev) -> None:
    slave = open_slave(pty)
    every = bytes(range(256))
    os.write(slave, every)
    assert receive(pty, 256) == every
    send(pty, every)
    assert read(slave, 256) == every
    os.close(slave)


def test_a_pty_that_nobody_opened_drops_output(pty: Chardev) -> None:
    with no_busy_loop():
        send(pty, bytes(1 << 20))
        assert pty.output_fd is not None
        wait_until(lambda: pipe_is_empty(pty))
    slave = open_slave(pty)
    os.write(slave, b"x")
    receive(pty, 1)
    send(pty, b"now")
    assert read(slave, 3) == b"now"
    os.close(slave)


def pipe_is_empty(chardev: Chardev) -> bool:
    """Whether the relay took all that was written."""
    assert chardev.output_fd is not None
    waiting = struct.unpack("i", fcntl.ioctl(chardev.output_fd, termios.FIONREAD, bytes(4)))[0]
    return bool(waiting == 0)


def test_a_pty_can_be_left_and_opened_again(pty: Chardev) -> None:
    for n in range(3):
        slave = open_slave(pty)
        os.write(slave, b"%d" % n)
        assert receive(pty, 1) == b"%d" % n
        send(pty, b"answer")
        assert read(slave, 6) == b"answer"
        os.close(slave)
        with no_busy_loop():
            send(pty, b"to nobody")
            wait_until(lambda: pipe_is_empty(pty))


def test_a_program_that_only_writes_to_the_pty(pty: Chardev) -> None:
    slave = open_slave(pty)
    os.write(slave, b"reboot\n")
    os.close(slave)
    assert receive(pty, 7) == b"reboot\n"


# stdio


def run_echo(**kwargs: Any) -> bytes:
    """What the echo writes to standard output."""
    return bytes(subprocess.run(ECHO, timeout=60, check=True, **kwargs).stdout or b"")


def test_pipes_pass_every_byte() -> None:
    data = os.urandom(300_000) + b"\x01x\x01\x01\x03\x04"
    result = run_echo(input=data, stdout=subprocess.PIPE)
    assert result == data.upper() + b"[end]"


def test_dev_null_is_an_input_that_ends() -> None:
    result = run_echo(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    assert result == b"[end]"


def test_files_as_input_and_output(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(b"from a file\n" * 1000)
    with (tmp_path / "in").open("rb") as stdin, (tmp_path / "out").open("wb") as stdout:
        stdout.write(b"before: ")
        stdout.flush()
        run_echo(stdin=stdin, stdout=stdout)
        stdout.seek(0, os.SEEK_CUR)
        stdout.write(b" after")  # from where the guest's output ended
    expected = b"before: " + b"FROM A FILE\n" * 1000 + b"[end] after"
    assert (tmp_path / "out").read_bytes() == expected


def test_sockets_as_input_and_output() -> None:
    ours, theirs = socket.socketpair()
    with ours, subprocess.Popen(ECHO, stdin=theirs.fileno(), stdout=theirs.fileno()) as child:
        theirs.close()
        ours.settimeout(10)
        ours.sendall(b"hello")
        assert ours.recv(100) == b"HELLO"
        ours.shutdown(socket.SHUT_WR)
        assert ours.recv(100) == b"[end]"
        assert child.wait(10) == 0


def test_closed_input_and_output() -> None:
    run_echo(stdin=subprocess.DEVNULL, preexec_fn=lambda: os.close(0))
    run_echo(stdin=subprocess.DEVNULL, preexec_fn=lambda: os.close(1))


def test_a_reader_that_leaves_does_not_end_it() -> None:
    with subprocess.Popen(ECHO, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdout.close()
        for _ in range(100):
            child.stdin.write(b"to nobody\n" * 1000)
        child.stdin.close()
        assert child.wait(10) == 0


def test_shared_output_stays_blocking() -> None:
    reader, writer = os.pipe()
    with subprocess.Popen(ECHO, stdin=subprocess.PIPE, stdout=writer) as child:
        assert child.stdin is not None
        child.stdin.write(b"a")
        child.stdin.flush()
        assert read(reader, 1) == b"A"
        assert os.get_blocking(writer)
        child.stdin.close()
        assert read(reader, 5) == b"[end]"
    os.close(reader)
    os.close(writer)


class Terminal:
    """The echo on a terminal of its own, as a shell would start it."""

    def __init__(self, *arguments: str, before: str = "") -> None:
        self.fd, self.slave = os.openpty()
        self.cooked = termios.tcgetattr(self.slave)
        self.resize(80, 25)
        # setsid makes the slave its controlling terminal, so that job control is real.
        self.process = subprocess.Popen(
            ["setsid", "--ctty", "--wait", *ECHO, *arguments]
            if not before
            else ["setsid", "--ctty", "--wait", "bash", "-c", before],
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
        )
        self.output = b""

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def expect(self, text: bytes) -> None:
        """Reads until `text` was printed; fails after ten seconds."""
        deadline = time.monotonic() + 10
        while text not in self.output:
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{text!r} is not in {self.output!r}"
            self.output += os.read(self.fd, 4096)
        self.output = self.output[self.output.index(text) + len(text) :]

    def type(self, keys: bytes) -> None:
        os.write(self.fd, keys)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.fd)
        os.close(self.slave)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    terminal = Terminal()
    terminal.expect(b"[ready]")
    yield terminal
    terminal.close()


def test_a_terminal_is_raw_and_every_key_is_for_the_guest(terminal: Terminal) -> None:
    keys = b"ab\r\x03\x04\x1a\x1c\x11\x13\x7f"
    terminal.type(keys)
    terminal.expect(keys.upper())
    assert terminal.process.poll() is None


def test_the_escape_key(terminal: Terminal) -> None:
    terminal.type(b"\x01\x01\x01")
    terminal.type(b"qz")
    terminal.expect(b"\x01\x01QZ")
    terminal.type(b"\x01h")
    terminal.expect(b"Ctrl-A x")
    terminal.type(b"\x01x")
    terminal.expect(b"[quit]")
    assert terminal.process.wait(10) == 0
    assert termios.tcgetattr(terminal.slave) == terminal.cooked


def test_a_crash_restores_the_terminal() -> None:
    terminal = Terminal("crash")
    terminal.expect(b"[ready]")
    assert termios.tcgetattr(terminal.slave) != terminal.cooked
    terminal.type(b"x")
    terminal.expect(b"crashed")
    assert terminal.process.wait(10) == 1
    assert termios.tcgetattr(terminal.slave) == terminal.cooked
    terminal.close()


def test_the_window_size_follows_the_terminal(terminal: Terminal) -> None:
    terminal.resize(132, 43)
    terminal.expect(b"[132 x 43]")


def test_in_the_background_the_terminal_is_the_shells() -> None:
    """``pyvmm run ... &``: it runs without input, and takes the terminal at ``fg``."""
    echo = " ".join(ECHO)
    terminal = Terminal(before=f"set -m; {echo} & read -r line; echo shell: $line; fg; echo [over]")
    terminal.expect(b"[ready]")
    terminal.type(b"hello\n")
    terminal.expect(b"shell: hello")
    wait_until(lambda: termios.tcgetattr(terminal.slave) != terminal.cooked)  # fg
    terminal.type(b"typed\r")
    terminal.expect(b"TYPED\r")
    terminal.type(b"\x01x")
    terminal.expect(b"[over]")
    terminal.process.wait(10)
    terminal.close()


def test_a_terminal_that_is_stopped_and_continued_is_raw_again(terminal: Terminal) -> None:
    terminal.process.send_signal(signal.SIGSTOP)
    termios.tcsetattr(terminal.slave, termios.TCSANOW, terminal.cooked)  # as the shell does
    terminal.process.send_signal(signal.SIGCONT)
    wait_until(lambda: termios.tcgetattr(terminal.slave) != terminal.cooked)
    terminal.type(b"\x03a")
    terminal.expect(b"\x03A")


# The escape key, byte by byte


@pytest.mark.parametrize(
    ("typed", "guest", "commands"),
    [
        (b"plain", b"plain", []),
        (b"\x01x", b"", ["x"]),
        (b"a\x01xb", b"ab", ["x"]),
        (b"\x01\x01x", b"\x01x", []),
        (b"\x01h\x01h", b"", ["h", "h"]),
        (b"\x01b", b"\x01b", []),
        (b"\x01\x1b[A", b"\x01\x1b[A", []),
    ],
)
def test_escape_commands(typed: bytes, guest: bytes, commands: list[str]) -> None:
    assert EscapeFilter().feed(typed) == (guest, commands)


@given(st.lists(st.sampled_from(b"\x01xha"), max_size=12), st.integers(0, 12))
def test_escapes_do_not_depend_on_how_input_is_split(keys: list[int], at: int) -> None:
    typed = bytes(keys)
    halves = EscapeFilter()
    first, second = halves.feed(typed[:at]), halves.feed(typed[at:])
    assert (first[0] + second[0], first[1] + second[1]) == EscapeFilter().feed(typed)
