"""Connections through a port of the emulated machine: both ends of it here, and no machine."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.mmio_driver import wait_until

from pyvmm.errors import UsageError
from pyvmm.nested import forward
from pyvmm.nested.forward import Forwarder, listening

Serve = Callable[[socket.socket], None]


@contextlib.contextmanager
def ends(tmp_path: Path, serve: Serve | None) -> Iterator[tuple[Path, Forwarder, Forwarder]]:
    """The path of the host's socket, and both forwarders; `serve` is called with each connection
    at the machine's end. None: nobody listens there."""
    host, machine = socket.socketpair()
    inner = socket.socket(socket.AF_UNIX)
    inner.bind(str(tmp_path / "inner"))
    if serve is not None:
        inner.listen(64)

    def accept() -> None:
        while True:
            try:
                connection, _ = inner.accept()
            except OSError:
                return
            assert serve is not None
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    with host, machine, listening(str(tmp_path / "outer")) as listener:
        inside = Forwarder(machine.fileno(), target=str(tmp_path / "inner")).start()
        outside = Forwarder(host.fileno(), listener=listener).start()
        try:
            yield tmp_path / "outer", outside, inside
        finally:
            inner.shutdown(socket.SHUT_RDWR) if serve is not None else None
            inner.close()
            accepting.join()
            inside.close()
            outside.close()


def connect(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(20)
    connection.connect(str(path))
    return connection


def echo(connection: socket.socket) -> None:
    with connection:
        while data := connection.recv(1 << 16):
            connection.sendall(data)


def read_all(connection: socket.socket) -> bytes:
    with connection.makefile("rb") as file:
        return file.read()


def test_bytes_pass_both_ways_and_so_does_the_end(tmp_path: Path) -> None:
    with ends(tmp_path, echo) as (path, _, _), connect(path) as connection:
        data = os.urandom(1 << 20)
        sender = threading.Thread(
            target=lambda: (connection.sendall(data), connection.shutdown(socket.SHUT_WR))
        )
        sender.start()
        assert read_all(connection) == data
        sender.join()


def test_many_at_once_are_kept_apart(tmp_path: Path) -> None:
    wrong: list[int] = []

    def use(path: Path, number: int) -> None:
        with connect(path) as connection:
            for _ in range(20):
                text = os.urandom(16).hex().encode()
                connection.sendall(text)
                if connection.recv(32, socket.MSG_WAITALL) != text:
                    wrong.append(number)

    with ends(tmp_path, echo) as (path, outside, inside):
        threads = [threading.Thread(target=use, args=(path, number)) for number in range(10)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wait_until(lambda: not outside._connections and not inside._connections)
    assert wrong == []


def test_where_nobody_listens_a_connection_ends(tmp_path: Path) -> None:
    with ends(tmp_path, None) as (path, _, _), connect(path) as connection:
        assert connection.recv(1) == b""


def test_who_leaves_is_forgotten_at_both_ends(tmp_path: Path) -> None:
    with ends(tmp_path, echo) as (path, outside, inside):
        for _ in range(20):
            with connect(path) as connection:
                connection.sendall(b"x" * 10_000)
        wait_until(lambda: not outside._connections and not inside._connections)


def test_who_does_not_read_is_cut_and_holds_up_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forward, "_MOST", 1 << 18)

    def flood(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            if connection.recv(1) == b"f":
                while True:
                    connection.sendall(bytes(1 << 16))
            connection.sendall(b"pong")

    with ends(tmp_path, flood) as (path, outside, inside), connect(path) as slow:
        slow.sendall(b"f")
        with connect(path) as other:
            other.sendall(b"p")
            assert read_all(other) == b"pong"
        wait_until(lambda: not outside._connections and not inside._connections)
        assert len(read_all(slow)) < 1 << 20


def test_last_words_arrive(tmp_path: Path) -> None:
    """What the machine's end says just before it ends."""
    said = threading.Event()

    def say(connection: socket.socket) -> None:
        with connection:
            connection.recv(1)
            connection.sendall(b"last words" * 10_000)
        said.set()

    with ends(tmp_path, say) as (path, outside, inside), connect(path) as connection:
        connection.sendall(b"x")
        assert said.wait(20)
        inside._deadline = outside._deadline = None
        closing = threading.Thread(target=inside.close)
        closing.start()
        assert read_all(connection) == b"last words" * 10_000
        closing.join()
        inside.close = lambda: None  # type: ignore[method-assign]


def test_the_end_of_the_machine_ends_the_hosts_end(tmp_path: Path) -> None:
    host, machine = socket.socketpair()
    with host, listening(str(tmp_path / "s")) as listener:
        outside = Forwarder(host.fileno(), listener=listener).start()
        with connect(tmp_path / "s") as connection:
            wait_until(lambda: outside._connections)
            machine.close()
            outside.close()
            assert connection.recv(1) == b""
    assert not (tmp_path / "s").exists()


def test_a_path_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("x")
    with pytest.raises(UsageError) as caught, listening(str(tmp_path / "s")):
        pass
    assert str(caught.value) == (
        f"cannot listen on {tmp_path / 's'}: it exists and is in use; choose another path"
    )
    with listening(None) as nothing:
        assert nothing is None
