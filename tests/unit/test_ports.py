"""The named ports of virtio-console (virtio 1.2, 5.3.6): messages, connections, back-pressure."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mmio_driver import NEEDS_RESET, MmioDriver, wait_until

from pyvmm.backends.chardev import Chardev, open_chardev
from pyvmm.backends.peer import ProgramPeer
from pyvmm.errors import UsageError
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.console import Port, VirtioConsole

ADD, REMOVE = uapi.VIRTIO_CONSOLE_PORT_ADD, uapi.VIRTIO_CONSOLE_PORT_REMOVE
READY, OPEN = uapi.VIRTIO_CONSOLE_PORT_READY, uapi.VIRTIO_CONSOLE_PORT_OPEN
NAME, TERMINAL = uapi.VIRTIO_CONSOLE_PORT_NAME, uapi.VIRTIO_CONSOLE_CONSOLE_PORT
RESIZE = uapi.VIRTIO_CONSOLE_RESIZE
MULTIPORT = 1 << uapi.VIRTIO_CONSOLE_F_MULTIPORT
FROM_DEVICE, TO_DEVICE = 2, 3
# Of port 1 and port 2.
RX, TX = {1: 4, 2: 6}, {1: 5, 2: 7}


class Guest:
    """A driver that has said DEVICE_READY."""

    def __init__(self, device: VirtioConsole) -> None:
        self.driver = MmioDriver(device)
        self.messages: list[tuple[int, int, int, bytes]] = []
        self.start()

    def start(self) -> None:
        self.driver.start()
        for _ in range(8):
            self.driver.request(FROM_DEVICE, writable=(80,))
        self.say(0, uapi.VIRTIO_CONSOLE_DEVICE_READY, 1)

    def close(self) -> None:
        self.driver.transport.close()
        os.close(self.driver.irqfd)

    def say(self, port: int, event: int, value: int) -> None:
        self.driver.request(TO_DEVICE, (struct.pack("<IHH", port, event, value),))
        self.driver.replies(TO_DEVICE)

    def hears(self, count: int = 1) -> list[tuple[int, int, int, bytes]]:
        """The next messages of the device: port, event, value and what follows."""
        heard = []
        for message in self.driver.replies(FROM_DEVICE, count):
            heard.append((*struct.unpack("<IHH", message[:8]), message[8:]))
            self.driver.request(FROM_DEVICE, writable=(80,))
        return heard

    def hears_nothing(self) -> bool:
        time.sleep(0.05)
        queue = self.driver.queues[FROM_DEVICE]
        assert queue is not None
        return queue.collect() == []

    def accept(self, port: int, name: bytes, *, connected: int) -> None:
        """Hears of a port and opens it."""
        assert self.hears() == [(port, ADD, 0, b"")]
        self.say(port, READY, 1)
        wanted = [(port, NAME, 1, name + b"\0"), (port, OPEN, connected, b"")]
        assert self.hears(2) == wanted
        self.say(port, OPEN, 1)


@pytest.fixture
def device() -> VirtioConsole:
    return VirtioConsole(2)


@pytest.fixture
def peer() -> Iterator[ProgramPeer]:
    peer = open_chardev("program")
    assert isinstance(peer, ProgramPeer)
    yield peer
    peer.close()


@pytest.fixture
def guest(device: VirtioConsole, peer: ProgramPeer) -> Iterator[Guest]:
    """With port 1, called a.port, that the guest has open and the host not."""
    device.add_port(Port(peer, "a.port"))
    guest = Guest(device)
    guest.accept(1, b"a.port", connected=0)
    yield guest
    guest.close()


# What the guest is told


def test_the_configuration_space(device: VirtioConsole) -> None:
    with MmioDriver(device) as driver:
        assert driver.start() & MULTIPORT
        assert len(device.queue_sizes) == 8
        config = [driver.read(uapi.VIRTIO_MMIO_CONFIG + offset) for offset in (0, 4)]
        assert config == [0, 3]  # no window; ports 0 (which is not there), 1 and 2


def test_a_driver_that_knows_one_port_only(device: VirtioConsole, peer: ProgramPeer) -> None:
    device.add_port(Port(peer, "a.port"))
    with MmioDriver(device) as driver, peer.open():
        driver.start(without=MULTIPORT)
        driver.request(1, (b"to nobody",))
        assert driver.replies(1) == [b""]


def test_a_terminal_and_its_size(device: VirtioConsole) -> None:
    stream = Chardev(None, None)
    size = (80, 25)
    stream.size = lambda: size  # type: ignore[method-assign]
    device.add_port(Port(stream, "second", terminal=True))
    guest = Guest(device)
    assert guest.hears() == [(1, ADD, 0, b"")]
    guest.say(1, READY, 1)
    assert guest.hears(4) == [
        (1, TERMINAL, 1, b""),
        (1, RESIZE, 0, struct.pack("<HH", 80, 25)),
        (1, NAME, 1, b"second\0"),
        (1, OPEN, 0, b""),
    ]
    size = (132, 43)
    assert stream.on_resize is not None
    stream.on_resize()
    assert guest.hears() == [(1, RESIZE, 0, struct.pack("<HH", 132, 43))]
    guest.close()


def test_ports_come_and_go(device: VirtioConsole, guest: Guest, peer: ProgramPeer) -> None:
    second = open_chardev("program")
    assert isinstance(second, ProgramPeer)
    port = Port(second, "b.port")
    device.add_port(port)
    guest.accept(2, b"b.port", connected=0)
    with pytest.raises(ValueError, match="there are 2 ports already"):
        device.add_port(Port(second, "c.port"))
    stream = second.open()
    assert guest.hears() == [(2, OPEN, 1, b"")]
    guest.driver.request(TX[2], (b"so far",))
    assert stream.read(timeout=10) == b"so far"
    guest.driver.request(RX[2], writable=(16,))
    guest.driver.request(RX[2], writable=(16,))

    device.remove_port(port)
    second.close()
    assert guest.hears() == [(2, REMOVE, 0, b"")]
    assert stream.read(timeout=10) == b""
    with pytest.raises(BrokenPipeError):
        stream.write(b"to nobody")
    stream.close()

    # Its number is free, and the buffers that the guest gave it are still the device's.
    third = open_chardev("program")
    assert isinstance(third, ProgramPeer)
    device.add_port(Port(third, "c.port"))
    guest.accept(2, b"c.port", connected=0)
    with third.open() as stream:
        stream.write(b"again")
        assert guest.driver.replies(RX[2]) == [b"again"]
    device.remove_port(device.ports[2])
    third.close()


# Who is there


def test_each_side_sees_the_other_come_and_go(guest: Guest, peer: ProgramPeer) -> None:
    stream = peer.open()
    assert guest.hears() == [(1, OPEN, 1, b"")]
    assert stream.guest_open
    guest.say(1, OPEN, 0)
    assert not stream.guest_open
    with pytest.raises(TimeoutError, match=r"no program in the guest opened the port within 0\.01"):
        stream.wait_open(0.01)
    guest.say(1, OPEN, 1)
    stream.wait_open(10)
    stream.close()
    assert guest.hears() == [(1, OPEN, 0, b"")]
    with peer.open():
        assert guest.hears() == [(1, OPEN, 1, b"")]


def test_hooks_hear_of_the_guest(device: VirtioConsole, peer: ProgramPeer) -> None:
    heard: list[bool] = []
    device.add_port(Port(peer, "a.port", on_open=heard.append))
    guest = Guest(device)
    guest.accept(1, b"a.port", connected=0)
    guest.say(1, OPEN, 1)
    guest.say(1, OPEN, 0)
    guest.say(1, OPEN, 1)
    guest.driver.reset()
    assert heard == [True, False, True, False]
    guest.close()


def test_a_port_is_open_for_one_program(guest: Guest, peer: ProgramPeer) -> None:
    with peer.open(), pytest.raises(UsageError) as error:
        peer.open()
    for _ in range(20):
        peer.open().close()
    assert str(error.value) == ("the port is open already: close the stream that it was opened as")


def test_a_port_whose_guest_has_not_read_all(
    guest: Guest, peer: ProgramPeer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pyvmm.backends.peer._REOPEN_SECONDS", 0.05)
    with peer.open() as stream:
        stream.write(b"unread")
    with pytest.raises(UsageError) as error:
        peer.open()
    assert str(error.value) == (
        "the guest has not read yet what was sent to the port before it was closed: open it later"
    )
    guest.driver.request(RX[1], writable=(8,))
    guest.driver.replies(RX[1])
    peer.open().close()


def test_what_was_sent_before_the_end_arrives(guest: Guest, peer: ProgramPeer) -> None:
    with peer.open() as stream:
        assert guest.hears() == [(1, OPEN, 1, b"")]
        stream.write(b"0123456789")
    assert guest.hears_nothing()
    for _ in range(3):
        guest.driver.request(RX[1], writable=(4,))
    assert guest.driver.replies(RX[1], 3) == [b"0123", b"4567", b"89"]
    guest.driver.request(RX[1], writable=(4,))
    assert guest.hears() == [(1, OPEN, 0, b"")]


def test_input_waits_for_the_guest_to_open(guest: Guest, peer: ProgramPeer) -> None:
    guest.say(1, OPEN, 0)
    guest.driver.request(RX[1], writable=(8,))
    with peer.open() as stream:
        assert guest.hears() == [(1, OPEN, 1, b"")]
        stream.write(b"early")
    assert guest.hears_nothing()
    assert guest.driver.queues[RX[1]].in_flight == 1  # type: ignore[union-attr]
    guest.say(1, OPEN, 1)
    assert guest.driver.replies(RX[1]) == [b"early"]
    guest.driver.request(RX[1], writable=(8,))
    assert guest.hears() == [(1, OPEN, 0, b"")]


def test_a_visitor_who_left_nothing(guest: Guest, peer: ProgramPeer) -> None:
    guest.say(1, OPEN, 0)
    peer.open().close()
    heard = guest.hears()
    while heard[-1] != (1, OPEN, 0, b""):
        heard += guest.hears()
    # It may be gone before the guest is told that it came.
    assert heard in ([(1, OPEN, 1, b""), (1, OPEN, 0, b"")], [(1, OPEN, 0, b"")])


def test_a_client_that_only_asks_gets_its_answer(device: VirtioConsole, tmp_path: Path) -> None:
    """printf '{"execute":"guest-ping"}' | nc -UN agent.sock"""
    chardev = open_chardev("unix", str(tmp_path / "s"), direct=True)
    device.add_port(Port(chardev, "agent"))
    guest = Guest(device)
    guest.accept(1, b"agent", connected=0)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "s"))
            assert guest.hears() == [(1, OPEN, 1, b"")]
            client.sendall(b"ping")
            client.shutdown(socket.SHUT_WR)
            guest.driver.request(RX[1], writable=(8,))
            assert guest.driver.replies(RX[1]) == [b"ping"]
            guest.driver.request(TX[1], (b"pong",))
            assert client.recv(8) == b"pong"
        assert guest.hears() == [(1, OPEN, 0, b"")]
    guest.close()
    chardev.close()
    assert not (tmp_path / "s").exists()


def test_a_connection_is_made_again(device: VirtioConsole, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    chardev = open_chardev("connect", path, direct=True)
    assert chardev.description == f"socket {path}, once somebody listens there"
    device.add_port(Port(chardev, "agent"))
    guest = Guest(device)
    guest.accept(1, b"agent", connected=0)
    for _ in range(2):
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen(1)
            client, _ = server.accept()
            with client:
                assert guest.hears() == [(1, OPEN, 1, b"")]
                client.sendall(b"hello")
                guest.driver.request(RX[1], writable=(8,))
                assert guest.driver.replies(RX[1]) == [b"hello"]
        Path(path).unlink()
        assert guest.hears() == [(1, OPEN, 0, b"")]
    guest.close()
    chardev.close()


def test_a_pseudo_terminal(device: VirtioConsole) -> None:
    chardev = open_chardev("pty", direct=True)
    device.add_port(Port(chardev, "tty"))
    guest = Guest(device)
    guest.accept(1, b"tty", connected=0)
    for _ in range(2):
        slave = os.open(chardev.description.split()[1], os.O_RDWR | os.O_NOCTTY)
        assert guest.hears() == [(1, OPEN, 1, b"")]
        guest.driver.request(TX[1], (b"printed",))
        assert select.select([slave], [], [], 10)[0]
        assert os.read(slave, 100) == b"printed"
        os.write(slave, b"typed")
        guest.driver.request(RX[1], writable=(8,))
        assert guest.driver.replies(RX[1]) == [b"typed"]
        os.close(slave)
        guest.driver.request(RX[1], writable=(8,))
        assert guest.hears() == [(1, OPEN, 0, b"")]
        guest.driver.request(TX[1], (b"to nobody",))
        guest.driver.replies(TX[1])
    guest.close()
    chardev.close()


def test_a_file_takes_output(device: VirtioConsole, tmp_path: Path) -> None:
    chardev = open_chardev("file", str(tmp_path / "log"))
    device.add_port(Port(chardev, "log"))
    guest = Guest(device)
    guest.accept(1, b"log", connected=1)
    guest.driver.request(TX[1], (b"a line\n",))
    guest.driver.replies(TX[1])
    guest.close()
    chardev.close()
    assert (tmp_path / "log").read_bytes() == b"a line\n"


def test_hearing_twice_of_a_connection(guest: Guest, peer: ProgramPeer) -> None:
    """As when it comes while the port is added."""
    with peer.open() as stream:
        peer.connected()
        guest.driver.request(TX[1], (b"still there",))
        assert stream.read(timeout=10) == b"still there"


# Bytes


def test_a_slow_program_stops_the_guest(guest: Guest, peer: ProgramPeer) -> None:
    sent = b""
    queue = guest.driver.queues[TX[1]]
    assert queue is not None
    with peer.open() as stream:
        while not queue.in_flight:
            assert len(sent) < 1 << 20, "more went out than a socket holds"
            data = os.urandom(50_000)
            guest.driver.request(TX[1], (data[:20_000], data[20_000:]))
            sent += data
            time.sleep(0.02)
            queue.collect()
        received = b""
        while len(received) < len(sent):
            received += stream.read(timeout=10)
        assert received == sent
        assert guest.driver.replies(TX[1]) == [b""]


def test_a_slow_guest_stops_the_program(guest: Guest, peer: ProgramPeer) -> None:
    data = os.urandom(1 << 20)
    with peer.open() as stream:
        written = stream.write(data, timeout=0.1)
        assert written < len(data)
        received = b""
        while len(received) < written:
            guest.driver.request(RX[1], writable=(4096, 4096))
            received += guest.driver.replies(RX[1])[0]
        assert received == data[:written]


def test_reading_with_a_time_limit(guest: Guest, peer: ProgramPeer) -> None:
    with peer.open() as stream:
        with pytest.raises(TimeoutError, match=r"the guest sent nothing within 0\.01 s"):
            stream.read(timeout=0.01)
        guest.driver.request(TX[1], (b"now",))
        assert stream.read(2, timeout=10) == b"no"
        assert stream.read(2, timeout=10) == b"w"


def test_asyncio_streams(guest: Guest, peer: ProgramPeer) -> None:
    async def talk() -> None:
        reader, writer = await peer.open().open_streams()
        writer.write(b"question\n")
        await writer.drain()
        guest.driver.request(RX[1], writable=(64,))
        assert guest.driver.replies(RX[1]) == [b"question\n"]
        guest.driver.request(TX[1], (b"ans", b"wer\n"))
        assert await reader.readline() == b"answer\n"
        writer.close()
        await writer.wait_closed()

    asyncio.run(talk())
    assert guest.hears(2)[-1] == (1, OPEN, 0, b"")


def test_a_connection_outlives_the_driver(guest: Guest, peer: ProgramPeer) -> None:
    with peer.open() as stream:
        assert guest.hears() == [(1, OPEN, 1, b"")]
        guest.driver.reset()
        assert not stream.guest_open
        stream.write(b"hello")
        guest.start()
        guest.accept(1, b"a.port", connected=1)
        guest.driver.request(RX[1], writable=(8,))
        assert guest.driver.replies(RX[1]) == [b"hello"]


# Hostile guests


def test_messages_that_make_no_sense(guest: Guest, device: VirtioConsole) -> None:
    for port, event, value in ((7, READY, 1), (2, OPEN, 1), (0xFFFF_FFFF, OPEN, 1), (1, 99, 1)):
        guest.say(port, event, value)
    guest.driver.request(TO_DEVICE, (b"short",))
    guest.driver.request(TO_DEVICE, writable=(8,))
    guest.driver.request(FROM_DEVICE, readable=(b"no room",))
    assert guest.driver.replies(TO_DEVICE, 2) == [b"", b""]
    guest.say(1, READY, 1)
    assert (1, NAME, 1, b"a.port\0") in guest.hears(2)
    assert device._control.failed_requests == 0


def test_questions_without_room_for_answers_stay_few(
    device: VirtioConsole, peer: ProgramPeer
) -> None:
    device.add_port(Port(peer, "a.port"))
    with MmioDriver(device) as driver:
        driver.start()
        for _ in range(200):
            driver.request(TO_DEVICE, (struct.pack("<IHH", 1, READY, 1),))
            driver.replies(TO_DEVICE)
        assert len(device._control._messages) == 2


def test_a_ring_that_makes_no_sense(guest: Guest) -> None:
    queue = guest.driver.queues[TX[1]]
    assert queue is not None
    queue.write_avail_idx(20_000)
    guest.driver.notify(TX[1])
    wait_until(lambda: guest.driver.status & NEEDS_RESET)
    guest.driver.reset()
    guest.start()
    guest.accept(1, b"a.port", connected=0)


def test_chains_with_nothing_for_us_come_back(guest: Guest, peer: ProgramPeer) -> None:
    with peer.open() as stream:
        for _ in range(3):
            guest.driver.request(TX[1], writable=(4,))
            guest.driver.request(RX[1], readable=(b"what",))
        guest.driver.request(RX[1], writable=(8,))
        guest.driver.request(TX[1], (b"yes",))
        stream.write(b"no")
        assert stream.read(timeout=10) == b"yes"
        assert guest.driver.replies(TX[1], 4) == [b""] * 4
        assert guest.driver.replies(RX[1], 4) == [b""] * 3 + [b"no"]
