"""A guest's network on taps of the host: what passes, and what features and commands make of it."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.linux_guest import LinuxGuest, boot_tiny, image, scratch_directory

HOST, GUEST = "10.94.0.1", "10.94.0.2"
VHOST_HOST, VHOST_GUEST = "10.95.0.1", "10.95.0.2"
MIB = 1 << 20
BULK = 8 * MIB
CONNECTIONS = 1000
FOREIGN = bytes.fromhex("525400aaaaaa")

# The programs on the Debian disk, without its systemd.
_MOUNT = """
mkdir -p /mnt
mount /dev/vda /mnt
for name in proc sys dev; do mount --bind /$name /mnt/$name; done
mount -t tmpfs none /mnt/tmp
"""


def _why_not() -> str:
    if os.getuid() != 0:
        return "taps need root"
    return "" if shutil.which("ip") else "ip is not installed: apt install iproute2"


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not())


class Server:
    """An HTTP server of one thread and a connection a request: it serves `data` and the path that
    it is asked for, and takes what is sent. (That of the library takes a tenth of a second for a
    request in the emulated machine.)"""

    def __init__(self, host: str) -> None:
        self.data = os.urandom(1 << 16) * (BULK >> 16)
        self.uploads: list[str] = []
        self.connections = 0
        self._socket = socket.create_server((host, 0), backlog=128)
        self.url = f"http://{host}:{self._socket.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def close(self) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.connections += 1
            with connection:
                connection.settimeout(60)
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        request = b""
        while b"\r\n\r\n" not in request:
            part = connection.recv(4096)
            assert part, "a client closed before it asked for anything"
            request += part
        head, _, rest = request.partition(b"\r\n\r\n")
        method, path = head.split()[:2]
        body = self.data if path == b"/data" else path + b"\n"
        if method == b"PUT":
            if b"100-continue" in head:
                connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
            (length,) = re.findall(rb"Content-Length: (\d+)", head)
            digest, left = hashlib.md5(rest), int(length) - len(rest)
            while left > 0:
                part = connection.recv(min(left, MIB))
                assert part, "a client closed before it had sent everything"
                digest.update(part)
                left -= len(part)
            self.uploads.append(digest.hexdigest())
            body = b""
        head = b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        connection.sendall(head + body)


def _ip(words: str) -> None:
    subprocess.run(["ip", *words.split()], check=True, capture_output=True)


def _boot(
    net: str, name: str, host: str = HOST, address: str = GUEST, **settings: Any
) -> LinuxGuest:
    guest = boot_tiny(
        disks=[{"path": image("debian").disk, "snapshot": True}], nets=[net], **settings
    )
    _ip(f"addr add {host}/24 dev {name}")
    guest.check(f"{_MOUNT}\nip addr add {address}/24 dev eth0\nip link set eth0 up")
    return guest


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@pytest.fixture(scope="module")
def guest(directory: Path) -> Iterator[LinuxGuest]:
    """Two CPUs, two pairs of queues, jumbo frames, and all of it recorded."""
    pcap = directory / "net.pcapng"
    guest = _boot(f"tap=pvt0,queues=2,mtu=9000,pcap={pcap}", "pvt0", cpus=2)
    yield guest
    guest.vm.close()


@pytest.fixture(scope="module")
def server(guest: LinuxGuest) -> Iterator[Server]:
    server = Server(HOST)
    yield server
    server.close()


def _counters(guest: LinuxGuest) -> dict[str, int]:
    return guest.vm.nets[0].counters


def _mean_size(guest: LinuxGuest, way: str, action: Callable[[], object]) -> float:
    """The mean size of the frames that `action` makes pass; `way` is "rx" or "tx"."""
    before = _counters(guest)
    action()
    after = _counters(guest)
    size, frames = (
        after[f"{way}_{what}"] - before[f"{way}_{what}"] for what in ("bytes", "frames")
    )
    return size / frames


def _download(guest: LinuxGuest, server: Server) -> None:
    output = guest.check(f"chroot /mnt curl -sS {server.url}/data | md5sum")
    assert output.split()[0] == hashlib.md5(server.data).hexdigest()


def _upload(guest: LinuxGuest, server: Server) -> None:
    output = guest.check(
        f"test -e /mnt/tmp/data || head -c {BULK} /dev/urandom >/mnt/tmp/data\n"
        f"chroot /mnt curl -sS -T /tmp/data {server.url}/\nmd5sum /mnt/tmp/data"
    )
    assert server.uploads[-1] == output.split()[0]


def _offload(guest: LinuxGuest, words: str) -> None:
    guest.check(f"chroot /mnt ethtool -K eth0 {words}")


class TestTap:
    def test_ping(self, guest: LinuxGuest) -> None:
        assert " 0% packet loss" in guest.check(f"ping -c 3 {HOST}")
        ping = ["busybox", "ping", "-c", "3", GUEST]
        assert " 0% packet loss" in subprocess.run(ping, capture_output=True, text=True).stdout

    def test_large_frames(self, guest: LinuxGuest) -> None:
        assert guest.check("cat /sys/class/net/eth0/mtu") == "9000"
        for size in (1472, 1473, 8972, 8973, 30000):
            assert " 0% packet loss" in guest.check(f"ping -c 1 -s {size} {HOST}")

    def test_bulk_both_ways(self, guest: LinuxGuest, server: Server) -> None:
        assert _mean_size(guest, "rx", lambda: _download(guest, server)) > 9014
        assert _mean_size(guest, "tx", lambda: _upload(guest, server)) > 9014
        counters = _counters(guest)
        assert counters["tx_dropped"] == counters["rx_dropped"] == counters["malformed"] == 0

    def test_several_queues(self, guest: LinuxGuest) -> None:
        assert "Combined:\t2" in guest.check("chroot /mnt ethtool -l eth0")
        pairs: Any = guest.vm.nets[0]._pairs
        guest.check(
            "for cpu in 1 2; do (\n"
            f"  echo $cpu | taskset -p $cpu $$ >/dev/null; ping -c 5 {HOST}\n) & done; wait"
        )
        assert sum(pair.counters["tx_frames"] for pair in pairs) == _counters(guest)["tx_frames"]
        assert all(pair.counters["tx_frames"] > 0 for pair in pairs)
        guest.check("chroot /mnt ethtool -L eth0 combined 1")
        queues = Path("/sys/class/net/pvt0/queues")
        assert len([*queues.glob("tx-*")]) == 1
        guest.check(f"ping -c 2 {HOST}\nchroot /mnt ethtool -L eth0 combined 2")
        assert len([*queues.glob("tx-*")]) == 2
        guest.check(f"ping -c 2 {HOST}")

    def test_without_offloads(self, guest: LinuxGuest, server: Server) -> None:
        _offload(guest, "tx off sg off tso off gso off gro off rx-gro-hw off")
        assert _mean_size(guest, "rx", lambda: _download(guest, server)) <= 9014
        assert _mean_size(guest, "tx", lambda: _upload(guest, server)) <= 9014
        _offload(guest, "tx on sg on tso on gso on gro on rx-gro-hw on")
        assert _mean_size(guest, "rx", lambda: _download(guest, server)) > 9014

    def test_short_connections(self, guest: LinuxGuest, server: Server) -> None:
        before = server.connections
        output = guest.check(
            f"chroot /mnt curl -Z '{server.url}/[1-{CONNECTIONS}]' >/tmp/said 2>/tmp/progress\n"
            "grep -v ^--_curl_-- /tmp/said | sort | uniq | wc -l"
        )
        assert output == str(CONNECTIONS)
        assert server.connections - before == CONNECTIONS

    def test_link(self, guest: LinuxGuest) -> None:
        carriers = "cat /sys/class/net/eth0/carrier"
        host = Path("/sys/class/net/pvt0/carrier")
        for _ in range(2):
            guest.vm.set_link(0, False)
            assert guest.check(f"sleep 1; {carriers}") == host.read_text().strip() == "0"
            assert guest.run(f"ping -c 1 -W 1 {HOST}").status != 0
            guest.vm.set_link(0, True)
            assert guest.check(f"sleep 1; {carriers}") == host.read_text().strip() == "1"
            assert " 0% packet loss" in guest.check(f"ping -c 2 {HOST}")
        status = struct.unpack_from("<H", guest.vm.nets[0].read_config(), 6)
        assert status == (1,)  # the driver has announced itself

    def test_filters(self, guest: LinuxGuest) -> None:
        mac = guest.vm.nets[0].permanent_mac
        tag = struct.pack(">HH", 0x8100, 7)
        with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
            raw.bind(("pvt0", 0))

            def passes(to: bytes, tag: bytes = b"") -> bool:
                before = _counters(guest)
                for _ in range(5):
                    raw.send(to + FOREIGN + tag + b"\x88\xb5" + bytes(50))
                deadline = time.monotonic() + 10
                while time.monotonic() < deadline:
                    after = _counters(guest)
                    if after["rx_filtered"] - before["rx_filtered"] >= 5:
                        return False
                    if after["rx_frames"] - before["rx_frames"] >= 5:
                        return True
                    time.sleep(0.01)
                raise AssertionError("five frames neither passed nor were filtered")

            assert passes(mac) and passes(b"\xff" * 6)
            assert not passes(FOREIGN)
            assert not passes(mac, tag)
            guest.check("ip link set eth0 promisc on")
            assert passes(FOREIGN)
            guest.check("ip link set eth0 promisc off")
            assert not passes(FOREIGN)

    def test_recording(self, guest: LinuxGuest, directory: Path) -> None:
        """What a machine that is still running has recorded so far."""
        data = (directory / "net.pcapng").read_bytes()
        directions, at = [], 0
        while at < len(data):
            kind, length = struct.unpack_from("<II", data, at)
            assert data[at + length - 4 : at + length] == data[at + 4 : at + 8]
            if kind == 6:
                (flags,) = struct.unpack_from("<I", data, at + length - 12)
                directions.append(flags & 3)
            at += length
        counters = _counters(guest)
        assert directions.count(1) >= counters["rx_frames"]
        assert directions.count(2) >= counters["tx_frames"]

    def test_reboot_of_the_driver(self, guest: LinuxGuest) -> None:
        device = guest.check("basename $(readlink /sys/class/net/eth0/device)")
        guest.check(
            f"cd /sys/bus/virtio/drivers/virtio_net; echo {device} >unbind; echo {device} >bind\n"
            f"ip addr add {GUEST}/24 dev eth0; ip link set eth0 up; ping -c 2 {HOST}"
        )


def test_vhost() -> None:
    subprocess.run(["modprobe", "vhost_net"], capture_output=True)
    if not Path("/dev/vhost-net").exists():
        pytest.skip("there is no /dev/vhost-net")
    guest = _boot("tap=pvt1,vhost=on,queues=2", "pvt1", VHOST_HOST, VHOST_GUEST, cpus=2)
    server = Server(VHOST_HOST)
    try:
        assert " 0% packet loss" in guest.check(f"ping -c 3 {VHOST_HOST}")
        _download(guest, server)
        _upload(guest, server)
        guest.check("chroot /mnt ethtool -L eth0 combined 1")
        guest.check(f"ping -c 2 {VHOST_HOST}")
        guest.check(f"chroot /mnt ethtool -L eth0 combined 2; ping -c 2 {VHOST_HOST}")
        guest.vm.set_link(0, False)
        assert guest.check("sleep 1; cat /sys/class/net/eth0/carrier") == "0"
        guest.vm.set_link(0, True)
        assert " 0% packet loss" in guest.check(f"sleep 1; ping -c 2 {VHOST_HOST}")
        assert guest.vm.nets[0].counters == {}
        (line,) = re.findall(r".*virtio\d+$", guest.check("grep virtio1 /proc/interrupts"), re.M)
        assert int(line.split()[1]) + int(line.split()[2]) > 0
        assert guest.poweroff().status == 0
    finally:
        server.close()
        guest.vm.close()
