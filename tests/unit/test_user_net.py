"""The user network, with the kernel's own network stack (or bare frames) as its guest."""

from __future__ import annotations

import hashlib
import os
import random
import shlex
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from support.guest_stack import GuestStack
from support.net_bridge import NetBridge

from pyvmm.backends.forward import Forward
from pyvmm.backends.user_net import DEFAULT_MTU, UserNet
from pyvmm.errors import UsageError

HEADER = bytes(12)
GUEST_MAC = bytes.fromhex("525400123456")
HOST, NAME_SERVER, GUEST = "10.0.2.2", "10.0.2.3", "10.0.2.15"
MIB = 1 << 20
ICMP_ECHO, ICMP_ECHO_REPLY = 8, 0

Start = Callable[..., tuple[UserNet, GuestStack]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a user network and a guest on it, which has its address unless `address` is False."""
    with ExitStack() as stack:

        def make(*, address: bool = True, mtu: int = DEFAULT_MTU, **settings: object):
            net = UserNet(mtu=mtu, **settings)
            stack.callback(net.close)
            bridge = stack.enter_context(NetBridge(net))
            try:
                guest = stack.enter_context(GuestStack(bridge.fd, mtu=mtu))
            except RuntimeError as error:
                pytest.skip(f"no network namespace: {error}")
            if address:
                guest.up()
            return net, guest

        yield make


@pytest.fixture
def server() -> Iterator[socket.socket]:
    """A socket that listens on the host's loopback."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        listener.settimeout(20)
        yield listener


def accept(listener: socket.socket) -> socket.socket:
    connection, _ = listener.accept()
    connection.settimeout(20)
    return connection


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


def send_and_digest(connection: socket.socket, size: int, seed: int) -> str:
    block = random.Random(seed).randbytes(MIB)
    digest = hashlib.sha256()
    with connection:
        for start in range(0, size, MIB):
            connection.sendall(block[: size - start])
            digest.update(block[: size - start])
    return digest.hexdigest()


def receive_and_digest(connection: socket.socket) -> tuple[int, str]:
    size, digest = 0, hashlib.sha256()
    with connection:
        while data := connection.recv(MIB):
            size += len(data)
            digest.update(data)
    return size, digest.hexdigest()


def transfer(source: socket.socket, target: socket.socket, size: int) -> None:
    """Sends that many bytes and checks that they arrive, all of them and unchanged."""
    got: list[tuple[int, str]] = []
    reader = threading.Thread(target=lambda: got.append(receive_and_digest(target)))
    reader.start()
    sent = send_and_digest(source, size, seed=size)
    reader.join()
    assert got == [(size, sent)]


class TestTcp:
    @pytest.mark.parametrize("mtu", [1500, DEFAULT_MTU])
    @pytest.mark.parametrize("guest_sends", [True, False])
    def test_bulk(self, mtu: int, guest_sends: bool, start: Start, server: socket.socket) -> None:
        net, guest = start(mtu=mtu)
        in_guest = guest.connect(HOST, server.getsockname()[1])
        on_host = accept(server)
        pair = (in_guest, on_host) if guest_sends else (on_host, in_guest)
        transfer(*pair, size=32 * MIB + 12345)
        assert net.counters["dropped"] == net.counters["malformed"] == 0

    def test_a_guest_that_ignores_the_mtu(self, start: Start, server: socket.socket) -> None:
        _, guest = start()
        guest.run("ip link set eth0 mtu 1500")
        in_guest = guest.connect(HOST, server.getsockname()[1])
        transfer(accept(server), in_guest, size=8 * MIB)

    def test_a_thousand_short_connections(self, start: Start, server: socket.socket) -> None:
        _, guest = start()

        def serve() -> None:
            for _ in range(1000):
                with accept(server) as connection:
                    connection.sendall(connection.recv(100)[::-1])

        thread = threading.Thread(target=serve)
        thread.start()
        for number in range(1000):
            with guest.connect(HOST, server.getsockname()[1]) as connection:
                connection.sendall(b"request %d" % number)
                assert connection.recv(100) == (b"request %d" % number)[::-1]
                assert connection.recv(100) == b""
        thread.join()

    def test_connections_at_once_through_a_forwarded_port(self, start: Start) -> None:
        """libslirp's own backlog of 1 would make all but two of them wait for a second."""
        net, guest = start(forwards=[Forward.from_text("tcp:127.0.0.1:0-:80")])
        began = time.monotonic()
        port = net.forwards[0].host_port
        with guest.listen(80) as listener, ExitStack() as stack:
            for number in range(100):
                client = socket.create_connection(("127.0.0.1", port))
                stack.enter_context(client).sendall(b"%d" % number)
            numbers = set()
            for _ in range(100):
                with accept(listener) as connection:
                    numbers.add(int(connection.recv(10)))
        assert numbers == set(range(100))
        assert time.monotonic() - began < 0.9

    def test_a_reader_that_is_slow_holds_the_sender(
        self, start: Start, server: socket.socket
    ) -> None:
        net, guest = start()
        in_guest = guest.connect(HOST, server.getsockname()[1])
        on_host = accept(server)
        on_host.settimeout(0.5)
        sent = 0
        block = bytes(65536)
        with pytest.raises(TimeoutError):
            while sent < 256 * MIB:
                sent += on_host.send(block)
        received = 0
        on_host.shutdown(socket.SHUT_WR)
        while data := in_guest.recv(MIB):
            received += len(data)
        assert received == sent
        assert net.counters["dropped"] == 0
        in_guest.close()
        on_host.close()

    def test_a_guest_that_is_paused_loses_nothing(
        self, start: Start, server: socket.socket
    ) -> None:
        net, guest = start()
        pairs = []
        for _ in range(50):
            in_guest = guest.connect(HOST, server.getsockname()[1])
            pairs.append((in_guest, accept(server)))
        guest.hold(True)
        digests: dict[int, str] = {}
        threads = []
        for number, (_, on_host) in enumerate(pairs):

            def send(number: int = number, on_host: socket.socket = on_host) -> None:
                digests[number] = send_and_digest(on_host, MIB, seed=number)

            threads.append(threading.Thread(target=send))
            threads[-1].start()
        time.sleep(2)
        guest.hold(False)
        for number, (in_guest, _) in enumerate(pairs):
            size, digest = receive_and_digest(in_guest)
            threads[number].join()
            assert (size, digest) == (MIB, digests[number])
        assert net.counters["dropped"] == 0

    def test_refused(self, start: Start, server: socket.socket) -> None:
        _, guest = start()
        port = server.getsockname()[1]
        server.close()
        with pytest.raises(ConnectionRefusedError):
            guest.connect(HOST, port)

    def test_over_ipv6(self, start: Start) -> None:
        _, guest = start(address=False)
        guest.run("ip addr add fec0::15/64 dev eth0 nodad")
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            in_guest = guest.socket(socket.AF_INET6)
            in_guest.settimeout(20)
            in_guest.connect(("fec0::2", listener.getsockname()[1]))
            transfer(in_guest, accept(listener), size=MIB)


class TestUdp:
    @pytest.mark.parametrize("size", [1, 1400, 8000, 65000])
    def test_echo(self, size: int, start: Start) -> None:
        _, guest = start()
        with (
            guest.socket(kind=socket.SOCK_DGRAM) as client,
            socket.socket(type=socket.SOCK_DGRAM) as echo,
        ):
            echo.bind(("127.0.0.1", 0))
            client.settimeout(10)
            echo.settimeout(10)
            data = random.Random(size).randbytes(size)
            client.sendto(data, (HOST, echo.getsockname()[1]))
            got, sender = echo.recvfrom(1 << 16)
            assert got == data
            echo.sendto(got[::-1], sender)
            assert client.recvfrom(1 << 16) == (data[::-1], (HOST, echo.getsockname()[1]))

    def test_forwarded_port(self, start: Start) -> None:
        net, guest = start(forwards=[Forward.from_text("udp:127.0.0.1:0-:53")])
        with (
            guest.socket(kind=socket.SOCK_DGRAM) as service,
            socket.socket(type=socket.SOCK_DGRAM) as client,
        ):
            service.settimeout(10)
            client.settimeout(10)
            service.bind(("0.0.0.0", 53))
            client.sendto(b"question", ("127.0.0.1", net.forwards[0].host_port))
            question, sender = service.recvfrom(100)
            service.sendto(question + b", answer", sender)
            assert client.recv(100) == b"question, answer"

    def test_a_flood_without_a_reader_is_bounded(self, start: Start) -> None:
        net, guest = start(forwards=[Forward.from_text("udp:127.0.0.1:0-:9")])
        guest.hold(True)
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            for _ in range(5000):
                client.sendto(bytes(30000), ("127.0.0.1", net.forwards[0].host_port))
        guest.hold(False)
        with guest.socket(kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMP) as ping:
            assert echo_reply(ping) == ICMP_ECHO_REPLY


def echo_reply(ping: socket.socket) -> int:
    """The type of the answer to an echo request."""
    ping.settimeout(10)
    header = struct.pack("!BBHHH", ICMP_ECHO, 0, 0, 77, 1)
    data = b"0123456789"
    ping.sendto(
        header[:2] + struct.pack("!H", checksum(header + data)) + header[4:] + data, (HOST, 0)
    )
    while True:
        reply = ping.recv(1000)
        kind, _, _, ident, _ = struct.unpack_from("!BBHHH", reply, 20)
        if ident == 77 and kind != ICMP_ECHO:
            return kind


def test_ping(start: Start) -> None:
    _, guest = start()
    with guest.socket(kind=socket.SOCK_RAW, protocol=socket.IPPROTO_ICMP) as ping:
        assert echo_reply(ping) == ICMP_ECHO_REPLY


class TestForwards:
    def test_of_a_chosen_port_and_a_given_one(self, start: Start) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            given = free.getsockname()[1]
        rules = [f"tcp:127.0.0.1:{given}-:22", "tcp::0-10.0.2.15:80", "udp::0-:80"]
        net, guest = start(forwards=[Forward.from_text(rule) for rule in rules])
        assert net.forwards[0].host_port == given
        assert all(each.host_port for each in net.forwards)
        assert net.remarks == [f"the guest's network forwards {each}" for each in net.forwards[1:]]
        for index, port in enumerate((22, 80)):
            with (
                guest.listen(port) as listener,
                socket.create_connection(("127.0.0.1", net.forwards[index].host_port)) as client,
                accept(listener) as connection,
            ):
                client.sendall(b"%d" % port)
                assert connection.recv(10) == b"%d" % port

    def test_a_port_in_use(self, server: socket.socket) -> None:
        port = server.getsockname()[1]
        with pytest.raises(UsageError) as caught:
            UserNet(forwards=[Forward.from_text(f"tcp::{port}-:22")])
        assert str(caught.value) == (
            f"hostfwd=tcp:127.0.0.1:{port}-:22: port {port} of 127.0.0.1 is in use: "
            "give another one, or 0 for one that is free"
        )

    def test_the_address_of_another_machine(self) -> None:
        with pytest.raises(UsageError) as caught:
            UserNet(forwards=[Forward.from_text("tcp:198.51.100.7:2222-:22")])
        assert str(caught.value) == (
            "hostfwd=tcp:198.51.100.7:2222-:22: 198.51.100.7 is no address of this machine: "
            "give 127.0.0.1, or 0.0.0.0 for all"
        )

    def test_a_port_for_root(self) -> None:
        script = """
import os
from pyvmm.backends.forward import Forward
from pyvmm.backends.user_net import UserNet
from pyvmm.errors import UsageError
if os.getuid() == 0:
    os.setuid(65534)
try:
    UserNet(forwards=[Forward.from_text("tcp::22-:22")])
except UsageError as error:
    print(error)
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        assert done.stdout == (
            "hostfwd=tcp:127.0.0.1:22-:22: port 22 of 127.0.0.1 is for root alone: "
            "give one above 1023, or 0 for one that is free\n"
        )


class TestIsolation:
    def test_restricted(self, start: Start, server: socket.socket) -> None:
        """Nothing but forwarded ports."""
        net, guest = start(restrict=True, forwards=[Forward.from_text("tcp::0-:22")])
        with pytest.raises(OSError):
            guest.connect(HOST, server.getsockname()[1], timeout=1)
        with (
            guest.listen(22) as listener,
            socket.create_connection(("127.0.0.1", net.forwards[0].host_port)) as client,
            accept(listener) as connection,
        ):
            connection.sendall(b"from inside")
            assert client.recv(100) == b"from inside"

    def test_without_loopback(self, start: Start, server: socket.socket) -> None:
        _, guest = start(loopback=False)
        with pytest.raises(OSError):
            guest.connect(HOST, server.getsockname()[1], timeout=1)
        server.settimeout(0)
        with pytest.raises(BlockingIOError):
            server.accept()

    def test_without_ipv6(self, start: Start) -> None:
        _, guest = start(address=False, ipv6=False)
        guest.run("ip addr add fec0::15/64 dev eth0 nodad")
        with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
            in_guest = guest.socket(socket.AF_INET6)
            in_guest.settimeout(1)
            with in_guest, pytest.raises(OSError):
                in_guest.connect(("fec0::2", listener.getsockname()[1]))


class TestDhcp:
    def test_lease(self, start: Start) -> None:
        _, guest = start(address=False, hostname="guest-name")
        offer = dhcp(guest, b"\x35\x01\x01")
        assert offer["yiaddr"] == GUEST
        assert offer[53] == b"\x02"
        asked = b"\x35\x01\x03" + b"\x32\x04" + socket.inet_aton(GUEST) + b"\x36\x04" + offer[54]
        lease = dhcp(guest, asked)
        assert lease["yiaddr"] == GUEST
        assert lease[53] == b"\x05"
        assert lease[1] == socket.inet_aton("255.255.255.0")
        assert lease[3] == socket.inet_aton(HOST)
        assert lease[6] == socket.inet_aton(NAME_SERVER)
        assert lease[12] == b"guest-name"
        assert lease[26] == struct.pack("!H", DEFAULT_MTU)

    def test_lease_in_another_network(self, start: Start) -> None:
        _, guest = start(address=False, network="192.168.76.0/26", restrict=True)
        offer = dhcp(guest, b"\x35\x01\x01")
        assert offer["yiaddr"] == "192.168.76.15"
        assert offer[1] == socket.inet_aton("255.255.255.192")


def dhcp(guest: GuestStack, options: bytes) -> dict[object, object]:
    """Asks as a client without an address; the answer's address and options (RFC 2131)."""
    message = struct.pack("!4BIHH16x6s10x192xI", 1, 1, 6, 0, 4711, 0, 0, GUEST_MAC, 0x63825363)
    with guest.socket(kind=socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"eth0")
        client.bind(("0.0.0.0", 68))
        client.sendto(message + options + b"\xff", ("255.255.255.255", 67))
        reply = client.recv(2000)
    answer: dict[object, object] = {"yiaddr": socket.inet_ntoa(reply[16:20])}
    rest = reply[240:]
    while rest[0] != 255:
        if rest[0] == 0:
            rest = rest[1:]
            continue
        answer[rest[0]] = rest[2 : 2 + rest[1]]
        rest = rest[2 + rest[1] :]
    return answer


RESOLVER = "127.0.0.153"

# In namespaces of its own, where it may replace /etc/resolv.conf and listen on port 53.
ASK_THE_NAME_SERVER = f"""
import socket, struct, sys, threading
sys.path.insert(0, {str(Path(__file__).parents[1])!r})
from pyvmm.backends.user_net import UserNet
from support.guest_stack import GuestStack
from support.net_bridge import NetBridge

def answer(resolver):
    question, sender = resolver.recvfrom(512)
    ident, = struct.unpack_from("!H", question)
    record = b"\\xc0\\x0c" + struct.pack("!HHIH4s", 1, 1, 60, 4, bytes([198, 51, 100, 7]))
    header = struct.pack("!6H", ident, 0x8180, 1, 1, 0, 0)
    resolver.sendto(header + question[12:] + record, sender)

resolver = socket.socket(type=socket.SOCK_DGRAM)
resolver.bind(("{RESOLVER}", 53))
threading.Thread(target=answer, args=(resolver,)).start()
net = UserNet()
with NetBridge(net) as bridge, GuestStack(bridge.fd) as guest:
    guest.up()
    asker = guest.socket(kind=socket.SOCK_DGRAM)
    asker.settimeout(10)
    name = b"\\x07example\\x04test\\0" + struct.pack("!HH", 1, 1)
    asker.sendto(struct.pack("!6H", 4711, 0x0100, 1, 0, 0, 0) + name, ("{NAME_SERVER}", 53))
    reply = asker.recv(512)
    print(struct.unpack_from("!H", reply)[0], socket.inet_ntoa(reply[-4:]))
net.close()
"""


def test_dns(tmp_path: Path) -> None:
    resolv_conf = tmp_path / "resolv.conf"
    resolv_conf.write_text(f"nameserver {RESOLVER}\n")
    setup = f"ip link set lo up; mount --bind {resolv_conf} /etc/resolv.conf; exec "
    command = [sys.executable, "-c", ASK_THE_NAME_SERVER]
    unshare = ["unshare", "--map-root-user", "--mount", "--net", "--"]
    if subprocess.run([*unshare, "true"], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are not permitted here")
    done = subprocess.run(
        [*unshare, "sh", "-e", "-c", setup + shlex.join(command)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "4711 198.51.100.7\n", done.stderr


class TestFrames:
    def test_what_is_no_frame_is_counted_and_dropped(self) -> None:
        net = UserNet()
        rng = random.Random(3)
        with NetBridge(net) as bridge, socket.socket(fileno=os.dup(bridge.fd)) as port:
            port.settimeout(10)
            malformed = [
                bytes(12) + b"\x88\xf8" + bytes(100),  # NC-SI, which libslirp would parse
                bytes(12) + b"\x08\x00" + bytes(65536),
            ]
            for frame in malformed:
                port.send(HEADER + frame)
            hostile = 3000
            for _ in range(hostile):
                kind = rng.choice([b"\x08\x00", b"\x08\x06", b"\x86\xdd"])
                start = rng.choice([b"", b"\x45\x00", b"\x60\x00\x00\x00"])
                body = start + rng.randbytes(rng.choice([0, 1, 19, 20, 28, 40, 60, 1500, 65000]))
                port.send(HEADER + rng.randbytes(12) + kind + body)
            assert arp(port) == bytes.fromhex("52550a000202")
            counters = net.counters
            assert counters["malformed"] == len(malformed)
            assert counters["from_guest"] == len(malformed) + hostile + 1
        net.close()

    def test_close_ends_everything(self) -> None:
        before = open_files(), threading.active_count()
        net = UserNet(forwards=[Forward.from_text("tcp::0-:1"), Forward.from_text("udp::0-:1")])
        net.close()
        net.close()
        assert (open_files(), threading.active_count()) == before

    def test_many_at_once(self) -> None:
        nets = [UserNet(forwards=[Forward.from_text("tcp::0-:1")]) for _ in range(20)]
        for net in nets:
            with NetBridge(net) as bridge, socket.socket(fileno=os.dup(bridge.fd)) as port:
                port.settimeout(10)
                assert arp(port) == bytes.fromhex("52550a000202")
        for net in nets:
            net.close()


def open_files() -> set[str]:
    return {link.name for link in Path("/proc/self/fd").iterdir()}


def arp_reply(port: socket.socket) -> bytes:
    ask = struct.pack(
        "!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, GUEST_MAC, socket.inet_aton(GUEST), bytes(6),
        socket.inet_aton(HOST),
    )  # fmt: skip
    port.send(HEADER + b"\xff" * 6 + GUEST_MAC + b"\x08\x06" + ask)
    while True:
        frame = port.recv(1 << 17)
        if frame[24:26] == b"\x08\x06" and frame[32:34] == b"\0\2":
            return frame


def arp(port: socket.socket) -> bytes:
    """The MAC address of the host, as ARP tells it."""
    return arp_reply(port)[34:40]


def test_without_libslirp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyvmm._slirp", None)
    with pytest.raises(UsageError) as caught:
        UserNet()
    assert str(caught.value) == (
        "a user network needs libslirp, which this pyvmm was built without: install libslirp-dev "
        "and run scripts/setup, or use passt or a tap"
    )
