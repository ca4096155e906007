"""The network device on the backends that need no root, without a guest."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from support.mmio_driver import MmioDriver, wait_until

from pyvmm.backends.net import NetPort
from pyvmm.backends.switch import Switch, SwitchPort
from pyvmm.backends.user_net import DEFAULT_MTU, UserNet
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.net import VirtioNet

HEADER = bytes(12)
BROADCAST = b"\xff" * 6
GUEST_CSUM = 1 << uapi.VIRTIO_NET_F_GUEST_CSUM
TSO = 1 << uapi.VIRTIO_NET_F_GUEST_TSO4 | 1 << uapi.VIRTIO_NET_F_GUEST_TSO6


class Nic:
    """A device on `port` whose driver takes all features but `without`."""

    def __init__(self, port: NetPort, mac: bytes, without: int, stack: ExitStack) -> None:
        stack.callback(port.close)
        self.mac = mac
        self.device = VirtioNet(port, mac=mac)
        self.driver = stack.enter_context(MmioDriver(self.device))
        self.features = self.driver.start(without)
        receive = self.driver.queues[0]
        for _ in range(8):
            receive.add((), (2048,))
        receive.publish()
        self.driver.notify(0)

    def send(self, frame: bytes, header: bytes = HEADER) -> None:
        transmit = self.driver.queues[1]
        transmit.add((header, frame), ())
        if transmit.publish():
            self.driver.notify(1)

    def receive(self) -> bytes:
        """The next message: a header and a frame."""
        used: list[bytes] = []
        wait_until(
            lambda: used.extend(each.data for each in self.driver.queues[0].collect()) or used
        )
        assert len(used) == 1
        return used[0]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.mark.parametrize("without", [0, GUEST_CSUM | TSO])
def test_user_network(without: int, stack: ExitStack) -> None:
    nic = Nic(UserNet(ipv6=False), b"\x52\x54\0\0\0\1", without, stack)
    mtu_offset = uapi.virtio_net_config.mtu.offset
    assert nic.device.read_config()[mtu_offset:][:2] == struct.pack("<H", DEFAULT_MTU)
    addresses = socket.inet_aton("10.0.2.15"), socket.inet_aton("10.0.2.2")
    for _ in range(3):
        arp = struct.pack(
            "!HHBBH6s4s6s4s", 1, 0x800, 6, 4, 1, nic.mac, addresses[0], bytes(6), addresses[1]
        )
        nic.send(BROADCAST + nic.mac + b"\x08\x06" + arp)
        message = nic.receive()
        assert message[:2] == (b"\0\0" if without else b"\2\0")
        assert message[12:18] == nic.mac
        assert message[40:44] == addresses[1]


@pytest.mark.parametrize("without", [0, GUEST_CSUM | TSO])
def test_switch(without: int, stack: ExitStack) -> None:
    """A frame without checksum passes as it is, or is completed for a driver that wants that."""
    switch = stack.enter_context(Switch())
    one, two = (
        Nic(SwitchPort(switch.path), bytes([0x52, 0x54, 0, 0, 0, n]), lacks, stack)
        for n, lacks in ((1, 0), (2, without))
    )
    two.send(BROADCAST + two.mac + b"\x88\xb5" + b"here")
    assert one.receive()[12:] == BROADCAST + two.mac + b"\x88\xb5" + b"here"
    assert bool(two.features & GUEST_CSUM) != bool(without)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 32, 1, 0, 64, 17, 0, bytes(4), bytes(4))
    udp = struct.pack("!HHHH", 1, 2, 12, 0xFFFF & ~0) + b"data"
    frame = two.mac + one.mac + b"\x08\x00" + ip + udp
    header = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 6, 0)
    one.send(frame, header)
    message = two.receive()
    total = sum(struct.unpack("!6H", udp))
    total = (total & 0xFFFF) + (total >> 16)
    if without:
        assert message[0] == 0
        assert message[12:] == frame[:40] + struct.pack("!H", ~total & 0xFFFF) + b"data"
    else:
        assert message[0] == 1
        assert message[12:] == frame
    assert switch.counters["malformed"] == 0
