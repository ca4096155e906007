"""Taps: opened, set up, and what is said when that cannot be done."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mmio_driver import MmioDriver, wait_until

from pyvmm._core import lib
from pyvmm.backends import tap
from pyvmm.backends.tap import open_tap
from pyvmm.errors import UsageError
from pyvmm.virtio.net import VirtioNet

MAC = bytes.fromhex("525400123456")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def _why_no_taps() -> str:
    try:
        open_tap("pyvmm-probe").close()
    except UsageError as error:
        return f"no tap can be made here: {error}"
    return ""


needs_taps = pytest.mark.skipif(bool(_why_no_taps()), reason=_why_no_taps())


@pytest.fixture
def name() -> Iterator[str]:
    """A name for an interface; one that is left is deleted."""
    name = f"pyvmm{os.getpid()}"
    yield name
    if Path(f"/sys/class/net/{name}").exists():
        _ip("link", "del", name)


def _attribute(name: str, attribute: str) -> str:
    return Path(f"/sys/class/net/{name}/{attribute}").read_text().strip()


@needs_taps
class TestPort:
    def test_one_that_was_made_is_up_and_goes_again(self, name: str) -> None:
        port = open_tap(name)
        assert int(_attribute(name, "flags"), 16) & 1
        assert (port.framing, port.vnet_hdr, len(port.fds)) == (lib.NET_FRAMING_TAP, True, 1)
        assert (port.mtu, port.remarks, port.vhost_fds) == (1500, [], ())
        port.close()
        port.close()
        assert not Path(f"/sys/class/net/{name}").exists()

    def test_one_that_was_there_stays_as_it_is(self, name: str) -> None:
        _ip("tuntap", "add", "dev", name, "mode", "tap")
        _ip("link", "set", name, "mtu", "4000")
        port = open_tap(name)
        assert port.remarks == [
            f"the tap interface {name} is down: 'ip link set {name} up' mends that"
        ]
        assert port.mtu == 4000
        port.close()
        assert not int(_attribute(name, "flags"), 16) & 1

    def test_mtu(self, name: str) -> None:
        port = open_tap(name, mtu=9000)
        assert (port.mtu, _attribute(name, "mtu")) == (9000, "9000")
        port.close()

    def test_offloads(self, name: str) -> None:
        port = open_tap(name)
        basic = lib.NET_OFFLOAD_CSUM | lib.NET_OFFLOAD_TSO4 | lib.NET_OFFLOAD_TSO6
        assert port.takes & basic == port.gives & basic == basic
        for offloads in (port.gives, lib.NET_OFFLOAD_CSUM | lib.NET_OFFLOAD_USO4, 0):
            port.set_offloads(offloads)
        port.close()
        port = open_tap(name, offloads=False)
        assert port.takes == port.gives == 0
        port.close()

    def test_several_queues_come_and_go(self, name: str) -> None:
        port = open_tap(name, queues=3)
        queues = Path(f"/sys/class/net/{name}/queues")
        for count in (1, 3, 3, 2, 1):
            port.set_queue_pairs(count)
            assert len([*queues.glob("tx-*")]) == count
        port.close()

    def test_one_made_for_several_queues_may_be_used_with_one(self, name: str) -> None:
        _ip("tuntap", "add", "dev", name, "mode", "tap", "multi_queue")
        open_tap(name).close()

    def test_carrier(self, name: str) -> None:
        port = open_tap(name)
        for up in (False, True):
            port.set_link(up)
            assert _attribute(name, "carrier") == f"{up:d}"
        port.close()


@needs_taps
class TestErrors:
    def test_in_use(self, name: str) -> None:
        port = open_tap(name)
        with pytest.raises(UsageError) as error:
            open_tap(name)
        assert str(error.value) == (
            f"the tap interface {name} is in use by another program: end that or take another"
        )
        port.close()

    def test_no_tap(self) -> None:
        with pytest.raises(UsageError) as error:
            open_tap("lo")
        assert str(error.value) == (
            "the network interface lo is no tap: choose another name for a new one"
        )

    def test_a_single_queue(self, name: str) -> None:
        _ip("tuntap", "add", "dev", name, "mode", "tap")
        with pytest.raises(UsageError) as error:
            open_tap(name, queues=2)
        assert str(error.value) == (
            f"the tap interface {name} has a single queue: give queues=1, or have an administrator "
            f"run 'ip link del {name}' and "
            f"'ip tuntap add dev {name} mode tap user {os.getuid()} multi_queue'"
        )

    def test_an_mtu_that_it_cannot_have(self, name: str) -> None:
        with pytest.raises(UsageError) as error:
            open_tap(name, mtu=65530)
        assert str(error.value) == (
            f"the tap interface {name} takes no MTU of 65530 (Invalid argument): "
            "give one from 68 to 65521"
        )


class TestRefusals:
    """What a user without rights meets, whoever runs this."""

    @pytest.fixture
    def refuse(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        def ioctl(fd: int, request: int, *rest: object) -> object:
            if request == tap._TUNSETIFF:
                raise OSError(errno.EPERM, os.strerror(errno.EPERM))
            return fcntl.ioctl(fd, request, *rest)

        monkeypatch.setattr(tap, "TUN", "/dev/null")
        monkeypatch.setattr(tap, "ioctl", ioctl)
        yield

    def test_none_may_be_made(self, refuse: None) -> None:
        with pytest.raises(UsageError) as error:
            open_tap("tap9")
        assert str(error.value) == (
            "the tap interface tap9 does not exist, and this user may make none: have an "
            f"administrator run 'ip tuntap add dev tap9 mode tap user {os.getuid()}', "
            "or use --net user"
        )

    def test_somebody_elses(self, refuse: None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tap, "_tun_flags", lambda name: tap._IFF_TAP)
        with pytest.raises(UsageError) as error:
            open_tap("tap9", queues=2)
        assert str(error.value) == (
            "the tap interface tap9 belongs to somebody else: have an administrator run "
            f"'ip tuntap add dev tap9 mode tap user {os.getuid()} multi_queue', or use --net user"
        )

    def test_no_device_file(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tap, "TUN", "/nonexistent")
        with pytest.raises(UsageError) as error:
            open_tap("tap9")
        assert str(error.value) == (
            "a tap interface needs /nonexistent, which cannot be opened (No such file or "
            "directory): load it with 'modprobe tun', give this user access, or use --net user"
        )

    @needs_taps
    def test_no_vhost(self, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(tap, "VHOST_NET", "/nonexistent")
        with pytest.raises(UsageError) as error:
            open_tap(name, vhost=True)
        assert str(error.value) == (
            "vhost=on needs /nonexistent, which cannot be opened (No such file or directory): "
            "load it with 'modprobe vhost_net', give this user access, or leave vhost=on out"
        )
        assert not Path(f"/sys/class/net/{name}").exists()

    @pytest.mark.parametrize("name", ["a/b", "tap%d", "a b", "ä"])
    def test_no_name(self, name: str) -> None:
        with pytest.raises(UsageError) as error:
            open_tap(name)
        assert str(error.value) == f"{name!r} is not a name that a network interface can have"


@needs_taps
def test_frames_of_a_device_pass_both_ways(name: str) -> None:
    """With the kernel for a peer, and headers that it takes and gives."""
    _ip("tuntap", "add", "dev", name, "mode", "tap")
    if (quiet := Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6")).exists():
        quiet.write_text("1")  # else the kernel has frames of its own to send
    _ip("link", "set", name, "up")
    port = open_tap(name)
    device = VirtioNet(port, mac=MAC)
    frame = MAC + b"\x52\x54\0\0\0\x99" + b"\x88\xb5" + os.urandom(2000)
    with MmioDriver(device) as driver, socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind((name, 0x88B5))
        raw.settimeout(10)
        driver.start()
        driver.request(1, (bytes(12), frame[:1000]))
        assert raw.recv(2000) == frame[:1000]
        for _ in range(12):
            driver.request(0, (), (512,))
        raw.send(frame[:1200])
        buffers: list[bytes] = []
        while not b"".join(buffers).endswith(frame[:1200]):
            buffers += driver.replies(0)
        assert buffers[-3][:12] == struct.pack("<10xH", 3)
        # Cut into segments by the kernel: checksums missing, as the header says.
        header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)
        driver.request(1, (header, frame[:60]))
        assert len(raw.recv(2000)) == 60
        # The kernel refuses a header that contradicts the frame; the queue goes on.
        header = struct.pack("<BBHHHHH", 1, 1, 54, 1448, 34, 16, 0)
        driver.request(1, (header, frame[:60]))
        driver.request(1, (bytes(12), frame[:77]))
        assert len(raw.recv(2000)) in (60, 77)
        wait_until(lambda: device.counters["tx_frames"] + device.counters["tx_dropped"] == 4)
        subprocess.run(["ip", "link", "set", name, "down"], check=True)
        driver.request(1, (bytes(12), frame[:77]))
        wait_until(lambda: device.counters["tx_dropped"] > 0)
        assert device.link_up
        _ip("link", "del", name)
        wait_until(lambda: not device.link_up)
    port.close()
