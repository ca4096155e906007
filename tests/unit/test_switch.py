"""Switches: who gets which frame, what is done for those that take less, who joins and how."""

from __future__ import annotations

import os
import random
import socket
import stat
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.guest_stack import GuestStack

import pyvmm
from pyvmm._core import lib
from pyvmm.backends.switch import Switch, SwitchPort
from pyvmm.errors import UsageError

HEADER_SIZE = 12
NOTHING = bytes(HEADER_SIZE)
BROADCAST = b"\xff" * 6
ALL_OFFLOADS = lib.NET_SWITCH_OFFLOADS
NEEDS_CSUM, DATA_VALID = 1, 2
TCPV4, TCPV6, UDP, ECN = 1, 4, 3, 0x80
FIN, PSH, ACK, CWR = 1, 8, 0x10, 0x80
MIB = 1 << 20


class Station:
    """A port with a MAC address, without a guest."""

    def __init__(self, path: str, number: int) -> None:
        self.port = SwitchPort(path)
        self.mac = bytes([0x52, 0x54, 0, 0, 0, number])
        self.socket = socket.socket(fileno=os.dup(self.port.fds[0]))
        self.socket.settimeout(10)

    def send(self, to: bytes, data: bytes, header: bytes = NOTHING) -> None:
        self.socket.send(header + to + self.mac + data)

    def receive(self) -> bytes:
        return self.socket.recv(1 << 17)

    def receives_nothing(self) -> bool:
        self.socket.settimeout(0.05)
        try:
            self.socket.recv(1 << 17)
            return False
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(10)

    def close(self) -> None:
        self.socket.close()
        self.port.close()


Join = Callable[[], Station]


@pytest.fixture
def switch() -> Iterator[Switch]:
    with Switch() as switch:
        yield switch


@pytest.fixture
def join(switch: Switch) -> Iterator[Join]:
    with ExitStack() as stack:
        numbers = iter(range(1, 255))

        def new() -> Station:
            station = Station(switch.path, next(numbers))
            stack.callback(station.close)
            return station

        yield new


def wait_for(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.005)


class TestForwarding:
    def test_to_all_then_to_the_one_that_answered(self, join: Join) -> None:
        a, b, c = (join() for _ in range(3))
        a.send(BROADCAST, b"who?")
        for other in (b, c):
            assert other.receive() == NOTHING + BROADCAST + a.mac + b"who?"
        b.send(a.mac, b"me")
        assert a.receive()[HEADER_SIZE:] == a.mac + b.mac + b"me"
        a.send(b.mac, b"hello")
        assert b.receive()[HEADER_SIZE:] == b.mac + a.mac + b"hello"
        assert c.receives_nothing()
        assert a.receives_nothing()

    def test_to_a_station_that_nobody_knows(self, join: Join) -> None:
        a, b, c = (join() for _ in range(3))
        a.send(b"\2\0\0\0\0\7", b"anybody?")
        assert b.receive() == c.receive()

    def test_multicast_goes_to_all_though_it_is_somebodys_source(
        self, switch: Switch, join: Join
    ) -> None:
        a, b, c = (join() for _ in range(3))
        group = b"\1\0\x5e\0\0\1"
        b.socket.send(NOTHING + BROADCAST + group + b"a group does not send")
        wait_for(lambda: switch.counters["malformed"] == 1)
        a.send(group, b"news")
        assert b.receive() == c.receive()

    def test_a_station_that_moves_is_followed(self, join: Join) -> None:
        a, b, c = (join() for _ in range(3))
        b.send(BROADCAST, b"here")
        a.receive(), c.receive()
        c.socket.send(NOTHING + BROADCAST + b.mac + b"now here")
        a.receive(), b.receive()
        a.send(b.mac, b"there?")
        assert c.receive()[HEADER_SIZE + 12 :] == b"there?"
        assert b.receives_nothing()

    def test_what_a_port_sends_to_itself_goes_nowhere(self, join: Join) -> None:
        a, b = join(), join()
        a.send(BROADCAST, b"here")
        b.receive()
        a.send(a.mac, b"me")
        assert b.receives_nothing()
        assert a.receives_nothing()

    def test_a_port_that_left_is_forgotten(self, switch: Switch, join: Join) -> None:
        a, b, c = (join() for _ in range(3))
        b.send(BROADCAST, b"here")
        a.receive(), c.receive()
        b.close()
        wait_for(lambda: switch.counters["ports"] == 2)
        a.send(b.mac, b"there?")
        assert c.receive()[HEADER_SIZE + 12 :] == b"there?"

    def test_the_longest_frame(self, join: Join) -> None:
        a, b = join(), join()
        data = random.Random(1).randbytes(2 + 4 + 65535)
        a.send(BROADCAST, data)
        assert b.receive() == NOTHING + BROADCAST + a.mac + data

    def test_what_is_no_frame_is_counted(self, switch: Switch, join: Join) -> None:
        a, b = join(), join()
        malformed = [b"\0", NOTHING, NOTHING + bytes(13), bytes(12 + 18 + 65536)]
        for message in malformed:
            a.socket.send(message)
        a.send(BROADCAST, b"good")
        assert b.receive()[HEADER_SIZE + 12 :] == b"good"
        assert switch.counters["malformed"] == len(malformed)

    def test_frames_of_many_come_in_order(self, join: Join) -> None:
        target, *senders = (join() for _ in range(5))
        target.send(BROADCAST, b"here")
        count = 2000

        def send(sender: Station) -> None:
            for number in range(count):
                sender.send(target.mac, struct.pack("!I", number))

        threads = [threading.Thread(target=send, args=(each,)) for each in senders]
        for thread in threads:
            thread.start()
        got: dict[bytes, list[int]] = {sender.mac: [] for sender in senders}
        for _ in range(count * len(senders)):
            frame = target.receive()[HEADER_SIZE:]
            got[frame[6:12]] += struct.unpack("!I", frame[12:])
        for thread in threads:
            thread.join()
        assert all(numbers == list(range(count)) for numbers in got.values())


def test_a_slow_port_loses_its_own_frames_alone(switch: Switch, join: Join) -> None:
    a, slow, quick = (join() for _ in range(3))
    frame = bytes(60000)
    for number in range(500):
        a.send(BROADCAST, struct.pack("!I", number) + frame)
        assert quick.receive()[HEADER_SIZE + 12 :][:4] == struct.pack("!I", number)
    dropped = switch.counters["dropped"]
    assert 200 < dropped < 490  # the rest is in the switch and in the socket
    for number in range(500 - dropped):  # it has the oldest, in order
        assert slow.receive()[HEADER_SIZE + 12 :][:4] == struct.pack("!I", number)
    assert slow.receives_nothing()
    a.send(BROADCAST, b"and goes on")
    assert slow.receive()[HEADER_SIZE + 12 :] == b"and goes on"


# Offloads


def checksum(data: bytes) -> int:
    data += b"\0" * (len(data) % 2)
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def pseudo(v6: bool, protocol: int, size: int) -> bytes:
    addresses = bytes(range(32)) if v6 else bytes([10, 0, 0, 1, 10, 0, 0, 2])
    return addresses + struct.pack("!II", size, protocol)


def ip_header(v6: bool, protocol: int, size: int, ident: int = 0x1234) -> bytes:
    addresses = bytes(range(32)) if v6 else bytes([10, 0, 0, 1, 10, 0, 0, 2])
    if v6:
        return struct.pack("!IHBB", 6 << 28, size, protocol, 64) + addresses
    start = struct.pack("!BBHHHBB", 0x45, 0, 20 + size, ident & 0xFFFF, 0x4000, 64, protocol)
    return start + struct.pack("!H", checksum(start + b"\0\0" + addresses)) + addresses


def tcp(v6: bool, seq: int, flags: int, options: bytes, data: bytes, *, partial: bool) -> bytes:
    words = 5 + len(options) // 4
    start = struct.pack("!HHIIBBH", 80, 1234, seq & 0xFFFFFFFF, 99, words << 4, flags, 500)
    rest = bytes(2) + options + data
    size = len(start) + 2 + len(rest)
    if partial:
        # The sum of the pseudo header alone, not inverted.
        field = ~checksum(pseudo(v6, 6, size)) & 0xFFFF
    else:
        field = checksum(pseudo(v6, 6, size) + start + b"\0\0" + rest)
    return start + struct.pack("!H", field) + rest


def ether_type(v6: bool, vlan: bool) -> bytes:
    return (b"\x81\x00\x00\x07" if vlan else b"") + (b"\x86\xdd" if v6 else b"\x08\x00")


@given(
    v6=st.booleans(),
    vlan=st.booleans(),
    size=st.integers(1, 20000),
    gso_size=st.integers(88, 9000),
    flags=st.sampled_from([ACK, ACK | PSH, ACK | FIN | PSH, ACK | CWR]),
    options=st.sampled_from([b"", b"\1\1\x08\x0a12345678"]),
    seq=st.sampled_from([0, 1000, 0xFFFFFF00]),
)
@settings(max_examples=100, deadline=None)
def test_large_segments_are_cut_for_those_that_do_not_take_them(
    joined: tuple[Station, Station, Station],
    v6: bool,
    vlan: bool,
    size: int,
    gso_size: int,
    flags: int,
    options: bytes,
    seq: int,
) -> None:
    a, takes, plain = joined
    data = random.Random(size).randbytes(size)
    start = ether_type(v6, vlan)
    large = tcp(v6, seq, flags, options, data, partial=True)
    headers = 12 + len(start) + (40 if v6 else 20)
    kind = (TCPV6 if v6 else TCPV4) | (ECN if flags & CWR else 0)
    header = struct.pack("<BBHHHHH", NEEDS_CSUM, kind, 0, gso_size, headers, 16, 0)
    frame = start + ip_header(v6, 6, len(large)) + large
    a.send(BROADCAST, frame, header)
    assert takes.receive() == header + BROADCAST + a.mac + frame
    for index, offset in enumerate(range(0, size, gso_size)):
        part = data[offset : offset + gso_size]
        kept = flags if offset + gso_size >= size else flags & ~(FIN | PSH)
        kept &= ~CWR if index else ~0
        segment = tcp(v6, seq + offset, kept, options, part, partial=False)
        expected = start + ip_header(v6, 6, len(segment), 0x1234 + index) + segment
        assert plain.receive() == NOTHING + BROADCAST + a.mac + expected


@pytest.fixture(scope="module")
def joined() -> Iterator[tuple[Station, Station, Station]]:
    """A sender, a station that takes all offloads, and one that takes none."""
    with Switch() as switch:
        a, takes, plain = (Station(switch.path, number) for number in (1, 2, 3))
        takes.port.set_offloads(ALL_OFFLOADS)
        takes.send(BROADCAST, b"ready")  # behind what it takes, so that this is known
        a.receive(), plain.receive()
        yield a, takes, plain
        for station in (a, takes, plain):
            station.close()


@pytest.mark.parametrize("size", [0, 1, 2, 3, 100, 1471, 1472])
def test_checksums_are_completed(size: int, joined: tuple[Station, Station, Station]) -> None:
    a, takes, plain = joined
    data = random.Random(size).randbytes(size)
    ports = struct.pack("!HHH", 53, 1234, 8 + size)
    whole = pseudo(False, 17, 8 + size)
    partial = ports + struct.pack("!H", ~checksum(whole) & 0xFFFF) + data
    complete = ports + struct.pack("!H", checksum(whole + ports + b"\0\0" + data) or 0xFFFF) + data
    start = ether_type(False, False) + ip_header(False, 17, 8 + size)
    header = struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 34, 6, 0)
    a.send(BROADCAST, start + partial, header)
    assert takes.receive() == header + BROADCAST + a.mac + start + partial
    assert plain.receive() == NOTHING + BROADCAST + a.mac + start + complete


def test_a_udp_checksum_of_zero_is_written_as_all_ones(
    joined: tuple[Station, Station, Station],
) -> None:
    a, takes, plain = joined
    ports = struct.pack("!HHH", 53, 1234, 10)
    whole = pseudo(False, 17, 10)
    data = struct.pack("!H", checksum(whole + ports + b"\0\0"))
    partial = ports + struct.pack("!H", ~checksum(whole) & 0xFFFF) + data
    start = ether_type(False, False) + ip_header(False, 17, 10)
    header = struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 34, 6, 0)
    a.send(BROADCAST, start + partial, header)
    takes.receive()
    assert plain.receive()[-4:-2] == b"\xff\xff"


def test_checksums_that_were_verified_are_no_news_to_one_who_does_not_ask(
    joined: tuple[Station, Station, Station],
) -> None:
    a, takes, plain = joined
    a.send(BROADCAST, b"data", bytes([DATA_VALID]) + bytes(11))
    assert takes.receive()[0] == DATA_VALID
    assert plain.receive()[0] == 0


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 34, 3000, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, 0, 0, 0, 65535, 65535, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, TCPV4, 0, 0, 34, 16, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, TCPV4, 0, 1, 34, 16, 0),
        struct.pack("<BBHHHHH", 0, TCPV4, 0, 1000, 34, 16, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, TCPV4, 0, 1000, 14, 16, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, TCPV4, 0, 1000, 65535, 16, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, TCPV6, 0, 1000, 54, 16, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, UDP, 0, 1000, 34, 6, 0),
        struct.pack("<BBHHHHH", NEEDS_CSUM, 0x7F, 0, 1000, 34, 6, 0),
    ],
)
def test_a_header_that_cannot_be_is_dropped(header: bytes, switch: Switch, join: Join) -> None:
    a, plain = join(), join()
    segment = tcp(False, 0, ACK, b"", bytes(2000), partial=True)
    a.send(BROADCAST, ether_type(False, False) + ip_header(False, 6, 2020) + segment, header)
    a.send(BROADCAST, b"good")
    assert plain.receive()[HEADER_SIZE + 12 :] == b"good"
    assert switch.counters["malformed"] == 1


# With the kernel's network stack as guests


def test_three_guests(switch: Switch) -> None:
    with ExitStack() as stack:
        guests = []
        for number in (1, 2, 3):
            port = SwitchPort(switch.path)
            stack.callback(port.close)
            try:
                mac = f"52:54:00:00:00:0{number}"
                guest = stack.enter_context(GuestStack(port.fds[0], mac=mac))
            except RuntimeError as error:
                pytest.skip(f"no network namespace: {error}")
            guest.run(f"ip addr add 10.9.8.{number}/24 dev eth0")
            guests.append(guest)
        data = random.Random(0).randbytes(8 * MIB)
        for source in range(3):
            target = (source + 1) % 3
            with guests[target].listen(5000) as listener:
                sender = guests[source].connect(f"10.9.8.{target + 1}", 5000)
                receiver, _ = listener.accept()
            thread = threading.Thread(target=lambda s=sender: (s.sendall(data), s.close()))
            thread.start()
            got = bytearray()
            with receiver:
                while part := receiver.recv(MIB):
                    got += part
            thread.join()
            assert got == data
        assert switch.counters["malformed"] == 0


# Paths


def error_of(start: Callable[[], object]) -> str:
    with pytest.raises(UsageError) as caught:
        start()
    return str(caught.value)


class TestPaths:
    def test_own_path_goes_with_the_switch(self) -> None:
        switch = pyvmm.Switch()
        assert stat.S_IMODE(Path(switch.path).stat().st_mode) == 0o600
        folder = Path(switch.path).parent
        switch.close()
        switch.close()
        assert not folder.exists()

    def test_the_end_of_a_switch_ends_its_ports(self) -> None:
        with Switch() as switch:
            station = Station(switch.path, 1)
        assert station.receive() == b""
        station.port.set_offloads(ALL_OFFLOADS)
        station.close()

    def test_in_use(self, tmp_path: Path) -> None:
        path = tmp_path / "switch"
        with Switch(path):
            assert error_of(lambda: Switch(path)) == (
                f"the switch {path} is there already: join it, or take another path"
            )

    @pytest.mark.parametrize("make", [Switch, SwitchPort])
    def test_no_socket(self, make: Callable[[str], object], tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.write_text("precious")
        assert error_of(lambda: make(str(path))) == (
            f"{path} is there and is no switch: take another path"
        )
        assert path.read_text() == "precious"

    def test_another_program_s_socket(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            assert error_of(lambda: SwitchPort(str(path))) == (
                f"{path} is there and is no switch: take another path"
            )

    def test_too_long(self) -> None:
        path = "/tmp/" + "x" * 103
        assert error_of(lambda: Switch(path)) == (
            f"the path of a switch has at most 107 bytes, unlike {path}: take a shorter one"
        )

    def test_no_folder(self, tmp_path: Path) -> None:
        path = tmp_path / "none" / "switch"
        assert error_of(lambda: SwitchPort(str(path))) == (
            f"the switch {path} cannot be in {path.parent}: No such file or directory"
        )

    def test_forbidden(self) -> None:
        script = """
import _socket, fcntl, os, sys
from pyvmm.backends.switch import Switch, SwitchPort
from pyvmm.errors import UsageError
os.setuid(65534)
for start in (lambda: Switch("/usr/switch"), lambda: SwitchPort(sys.argv[1])):
    try:
        start()
    except UsageError as error:
        print(error)
"""
        if os.getuid():
            pytest.skip("only root can be another user as well")
        with Switch() as switch:
            folder = Path(switch.path).parent
            folder.chmod(0o755)
            done = subprocess.run(
                [sys.executable, "-c", script, switch.path],
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.stdout.splitlines() == [
            "the switch /usr/switch cannot be made (Permission denied): "
            "take a path in a folder of yours",
            f"the switch {switch.path} belongs to another user: take another path",
        ], done.stderr

    def test_what_a_killed_process_left_is_replaced(self, tmp_path: Path) -> None:
        path = tmp_path / "switch"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(str(path))
        with Switch(path) as switch:
            assert switch.counters["ports"] == 0
        assert not path.exists()


class TestSwitchOfItsOwn:
    """Nobody made a switch: the first port starts a process for it."""

    def test_lives_from_the_first_to_the_last_port(self, tmp_path: Path) -> None:
        path = tmp_path / "switch"
        first = Station(str(path), 1)
        second = Station(str(path), 2)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        first.send(BROADCAST, b"hello")
        assert second.receive()[HEADER_SIZE + 12 :] == b"hello"
        first.close()
        third = Station(str(path), 3)
        third.send(BROADCAST, b"first has gone")
        assert second.receive()[HEADER_SIZE + 12 :] == b"first has gone"
        second.close()
        third.close()
        wait_for(lambda: not path.exists())

    def test_many_come_and_go_at_once(self, tmp_path: Path) -> None:
        """However they meet, each is on a switch with all that are there at the time."""
        path = str(tmp_path / "switch")
        failures = []

        def come_and_go(number: int) -> None:
            try:
                for _ in range(5):
                    station = Station(path, number)
                    station.send(BROADCAST, b"hello")
                    station.close()
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=come_and_go, args=(n,)) for n in range(1, 9)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        wait_for(lambda: not Path(path).exists())

    def test_children_are_not_left_behind(self, tmp_path: Path) -> None:
        station = Station(str(tmp_path / "switch"), 1)
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        station.close()


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "switch"
    command = [sys.executable, "-m", "pyvmm", "switch", str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"pyvmm: the switch {path} is there; Ctrl-C ends it\n"
        a, b = Station(str(path), 1), Station(str(path), 2)
        while b.receives_nothing():  # as long as the switch has only the first port
            a.send(BROADCAST, b"hello")
        a.send(BROADCAST, b"good-bye")
        while (data := b.receive()[HEADER_SIZE + 12 :]) != b"good-bye":
            assert data == b"hello"
        a.close()
        b.close()
        assert path.exists()
        process.terminate()
        assert process.wait() == 0
    assert not path.exists()
