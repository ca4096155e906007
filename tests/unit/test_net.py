"""virtio-net from the registers down to a port, over each framing (virtio 1.2, section 5.1)."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mmio_driver import CONFIG, NEEDS_RESET, VRING, MmioDriver, wait_until

from pyvmm._core import ffi, lib
from pyvmm.backends.net import NetPort
from pyvmm.backends.pcap import create_pcap
from pyvmm.errors import UsageError
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio import net
from pyvmm.virtio.net import VirtioNet

MAC = bytes.fromhex("525400123456")
PEER = bytes.fromhex("525400999999")
BROADCAST = b"\xff" * 6
GROUP = bytes.fromhex("01005e000001")

TSO4, NEEDS_CSUM = uapi.VIRTIO_NET_HDR_GSO_TCPV4, uapi.VIRTIO_NET_HDR_F_NEEDS_CSUM
DATA_VALID = uapi.VIRTIO_NET_HDR_F_DATA_VALID
OK, ERR = uapi.VIRTIO_NET_OK, uapi.VIRTIO_NET_ERR
ALL = 0x7F
MRG_RXBUF = 1 << uapi.VIRTIO_NET_F_MRG_RXBUF
STATUS_REGISTER = uapi.VIRTIO_MMIO_CONFIG + 6


class Header(NamedTuple):
    """``struct virtio_net_hdr_v1``."""

    flags: int = 0
    gso_type: int = 0
    hdr_len: int = 0
    gso_size: int = 0
    csum_start: int = 0
    csum_offset: int = 0
    num_buffers: int = 0

    def pack(self) -> bytes:
        return struct.pack("<BBHHHHH", *self)

    @classmethod
    def unpack(cls, data: bytes) -> Header:
        return cls(*struct.unpack("<BBHHHHH", data[:12]))


PLAIN = Header()


def frame(size: int = 60, to: bytes = MAC, *, vlan: int | None = None) -> bytes:
    """A frame of `size` bytes with contents that differ from each other."""
    tag = b"" if vlan is None else struct.pack(">HH", 0x8100, vlan)
    data = to + PEER + tag + b"\x88\xb5"
    return (data + os.urandom(32) * (size // 32 + 1))[:size]


class Peer:
    """The other end of a port: packets or a stream, with a virtio_net_hdr or without."""

    def __init__(self, framing: int, vnet_hdr: bool, count: int = 1) -> None:
        kind = socket.SOCK_STREAM if framing == lib.NET_FRAMING_STREAM else socket.SOCK_SEQPACKET
        pairs = [socket.socketpair(socket.AF_UNIX, kind) for _ in range(count)]
        self.sockets = [theirs for _, theirs in pairs]
        self.framing = framing
        self.vnet_hdr = vnet_hdr
        self.port = RecordingPort([ours.detach() for ours, _ in pairs], framing, vnet_hdr)
        for each in self.sockets:
            each.settimeout(10)
            each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)

    def send(self, data: bytes, header: Header = PLAIN, queue: int = 0) -> None:
        message = (header.pack() if self.vnet_hdr else b"") + data
        if self.framing == lib.NET_FRAMING_STREAM:
            message = struct.pack(">I", len(message)) + message
        self.sockets[queue].sendall(message)

    def receive(self, queue: int = 0) -> tuple[Header, bytes]:
        if self.framing == lib.NET_FRAMING_STREAM:
            (size,) = struct.unpack(">I", self._exactly(4, queue))
            message = self._exactly(size, queue)
        else:
            message = self.sockets[queue].recv(1 << 17)
        if not self.vnet_hdr:
            return Header(), message
        return Header.unpack(message), message[12:]

    def _exactly(self, size: int, queue: int) -> bytes:
        data = b""
        while len(data) < size:
            data += self.sockets[queue].recv(size - len(data))
        return data

    @property
    def has_frames(self) -> bool:
        return bool(select.select(self.sockets, [], [], 0.05)[0])


class RecordingPort(NetPort):
    """Notes what it is told."""

    def __init__(self, fds: list[int], framing: int, vnet_hdr: bool) -> None:
        offloads = ALL if vnet_hdr else 0
        super().__init__(fds, framing, vnet_hdr=vnet_hdr, takes=offloads, gives=offloads, mtu=1500)
        self.told: list[tuple[str, int]] = []

    def set_offloads(self, offloads: int) -> None:
        self.told.append(("offloads", offloads))

    def set_queue_pairs(self, count: int) -> None:
        self.told.append(("pairs", count))

    def set_link(self, up: bool) -> None:
        self.told.append(("link", up))


class Nic:
    """A driver of the device, and the peer of its port."""

    def __init__(self, peer: Peer, **arguments: Any) -> None:
        self.peer = peer
        self.device = VirtioNet(peer.port, mac=MAC, **arguments)
        self.driver = MmioDriver(self.device)
        self.features = 0
        self._used: dict[int, list[Any]] = {}

    def queue(self, index: int) -> Any:
        return self.driver.queues[index]

    def transmit(
        self, *parts: bytes, header: Header = PLAIN, queue: int = 0, indirect: bool = False
    ) -> None:
        """A frame in `parts`, led by the header in a buffer of its own."""
        self.transmit_raw(header.pack(), *parts, queue=queue, indirect=indirect)

    def transmit_raw(self, *parts: bytes, queue: int = 0, indirect: bool = False) -> None:
        ring = self.queue(2 * queue + 1)
        ring.add(parts, (), indirect)
        if ring.publish():
            self.driver.notify(2 * queue + 1)

    def returned(self, count: int = 1, queue: int = 0) -> None:
        """Waits until the device has returned so many frames."""
        ring = self.queue(2 * queue + 1)
        done: list[object] = []
        wait_until(lambda: done.extend(ring.collect()) or len(done) >= count)
        assert len(done) == count

    def fill_port(self, frames: list[bytes]) -> int:
        """Transmits frames until one has to wait; how many that are."""
        ring = self.queue(1)
        for sent, data in enumerate(frames, 1):
            self.transmit(data)
            wait_until(lambda: ring.collect() or self.counters["tx_waits"])
            if self.counters["tx_waits"]:
                return sent
        raise AssertionError("it takes everything")

    def offer(self, *sizes: int, count: int = 1, queue: int = 0) -> None:
        """Receive buffers, each of parts of these sizes."""
        ring = self.queue(2 * queue)
        for _ in range(count):
            ring.add((), sizes)
        if ring.publish():
            self.driver.notify(2 * queue)

    def received(self, queue: int = 0) -> tuple[Header, bytes]:
        """The next frame, put together of its buffers."""
        ring = self.queue(2 * queue)
        used = self._used.setdefault(queue, [])
        wait_until(lambda: used.extend(ring.collect()) or used)
        header = Header.unpack(used[0].data)
        wait_until(lambda: used.extend(ring.collect()) or len(used) >= header.num_buffers)
        buffers = [used.pop(0) for _ in range(header.num_buffers)]
        return header, b"".join(each.data for each in buffers)[12:]

    def control(self, class_: int, command: int, data: bytes = b"", *, queue: int = -1) -> int:
        index = len(self.driver.queues) - 1 if queue < 0 else queue
        self.driver.request(index, (bytes([class_, command]), data), (1,))
        (reply,) = self.driver.replies(index)
        return reply[0]

    @property
    def counters(self) -> dict[str, int]:
        return self.device.counters

    def counts(self, name: str, count: int = 1) -> None:
        wait_until(lambda: self.counters[name] >= count)
        assert self.counters[name] == count


@contextlib.contextmanager
def started(peer: Peer, without: int = 0, **arguments: Any) -> Iterator[Nic]:
    """The device with a driver that has initialized it, with all features but `without`."""
    nic = Nic(peer, **arguments)
    with nic.driver:
        nic.features = nic.driver.start(without)
        yield nic
    peer.port.close()
    for each in peer.sockets:
        each.close()


KINDS = {
    "packet": (lib.NET_FRAMING_PACKET, False),
    "packet with headers": (lib.NET_FRAMING_PACKET, True),
    "stream": (lib.NET_FRAMING_STREAM, False),
    "stream with headers": (lib.NET_FRAMING_STREAM, True),
}


@pytest.fixture(params=KINDS)
def peer(request: pytest.FixtureRequest) -> Peer:
    return Peer(*KINDS[request.param])


@pytest.fixture
def headers() -> Peer:
    return Peer(lib.NET_FRAMING_PACKET, True)


@pytest.fixture
def nic(peer: Peer) -> Iterator[Nic]:
    with started(peer) as nic:
        yield nic


class TestTransmit:
    def test_a_frame(self, nic: Nic, peer: Peer) -> None:
        data = frame()
        nic.transmit(data)
        assert peer.receive() == (Header(), data)
        nic.returned()
        nic.counts("tx_frames")
        assert nic.counters["tx_bytes"] == len(data)
        assert nic.driver.interrupted() == VRING

    def test_any_framing_of_the_chain(self, nic: Nic, peer: Peer) -> None:
        data = frame(200)
        whole = Header().pack() + data
        for cuts in ((), (12,), (5,), (3, 4, 11, 30), (1, 12, 13), (60, 100)):
            edges = (0, *cuts, len(whole))
            parts = [whole[a:b] for a, b in itertools.pairwise(edges)]
            for indirect in (False, True):
                nic.transmit_raw(*parts, indirect=indirect)
                assert peer.receive() == (Header(), data)
                nic.returned()

    def test_order_and_contents_of_many(self, nic: Nic, peer: Peer) -> None:
        for round_ in range(20):
            frames = [frame(60 + 131 * (round_ + n) % 3000) for n in range(7)]
            for data in frames:
                nic.transmit(data)
            assert [peer.receive()[1] for _ in frames] == frames
            nic.returned(len(frames))

    def test_a_full_port_holds_frames_back_and_loses_none(self, nic: Nic, peer: Peer) -> None:
        frames = [frame(8000) for _ in range(400)]
        sent = nic.fill_port(frames)
        for data in frames[:sent]:
            assert peer.receive()[1] == data
        nic.counts("tx_frames", sent)
        nic.transmit(frames[0])
        assert peer.receive()[1] == frames[0]

    @pytest.mark.parametrize("size", [0, 1, 11, 12, 12 + 13, 12 + 70000])
    def test_too_short_or_too_long(self, nic: Nic, peer: Peer, size: int) -> None:
        nic.transmit_raw(*([bytes(size)] if size else []), b"")
        nic.returned()
        nic.counts("tx_dropped")
        nic.transmit(data := frame())
        assert peer.receive()[1] == data

    def test_a_chain_with_a_writable_part(self, nic: Nic, peer: Peer) -> None:
        data = frame()
        ring = nic.queue(1)
        ring.add((Header().pack(), data), (100,))
        ring.publish()
        nic.driver.notify(1)
        assert peer.receive()[1] == data
        used: list[Any] = []
        wait_until(lambda: used.extend(ring.collect()) or used)
        assert used[0].written == 0

    def test_the_largest_frame(self, headers: Peer) -> None:
        with started(headers) as nic:
            data = frame(65550)
            header = Header(NEEDS_CSUM, TSO4, 54, 1448, 34, 16)
            nic.transmit(data, header=header)
            assert headers.receive() == (header, data)


BAD_HEADERS = {
    "checksum beyond the frame": Header(NEEDS_CSUM, csum_start=50, csum_offset=9),
    "checksum far beyond": Header(NEEDS_CSUM, csum_start=0xFFFF, csum_offset=0xFFFF),
    "segments without checksums": Header(0, TSO4, 54, 1448, 34, 16),
    "segments of nothing": Header(NEEDS_CSUM, TSO4, 54, 0, 34, 16),
    "unknown segments": Header(NEEDS_CSUM, 7, 54, 1448, 34, 16),
    "no such type": Header(NEEDS_CSUM, 0x7F, 54, 1448, 34, 16),
}


class TestHeaders:
    @pytest.mark.parametrize("header", BAD_HEADERS.values(), ids=BAD_HEADERS.keys())
    def test_bad_ones_are_dropped_both_ways(self, headers: Peer, header: Header) -> None:
        with started(headers) as nic:
            nic.transmit(frame(60), header=header)
            nic.returned()
            nic.counts("tx_dropped")
            nic.offer(2000)
            headers.send(frame(60), header)
            nic.counts("rx_dropped")
            headers.send(data := frame())
            assert nic.received() == (Header(num_buffers=1), data)
            assert nic.counters["tx_frames"] == 0

    @pytest.mark.parametrize(
        ("header", "feature"),
        [
            (Header(NEEDS_CSUM, 0, 0, 0, 34, 16), "CSUM"),
            (Header(NEEDS_CSUM, TSO4, 54, 1448, 34, 16), "TSO4"),
            (Header(NEEDS_CSUM, uapi.VIRTIO_NET_HDR_GSO_TCPV6, 74, 1448, 54, 16), "TSO6"),
            (Header(NEEDS_CSUM, TSO4 | 0x80, 54, 1448, 34, 16), "ECN"),
            (Header(NEEDS_CSUM, uapi.VIRTIO_NET_HDR_GSO_UDP, 42, 1448, 34, 6), "UFO"),
            (Header(NEEDS_CSUM, 5, 42, 1448, 34, 6), "USO"),
        ],
    )
    def test_only_what_was_negotiated(self, headers: Peer, header: Header, feature: str) -> None:
        tx = {"CSUM": uapi.VIRTIO_NET_F_CSUM, "USO": net.VIRTIO_NET_F_HOST_USO}
        rx = {"CSUM": [uapi.VIRTIO_NET_F_GUEST_CSUM]}
        rx["USO"] = [net.VIRTIO_NET_F_GUEST_USO4, net.VIRTIO_NET_F_GUEST_USO6]
        if feature not in tx:
            tx[feature] = getattr(uapi, f"VIRTIO_NET_F_HOST_{feature}")
            rx[feature] = [getattr(uapi, f"VIRTIO_NET_F_GUEST_{feature}")]
        data = frame(3000)
        with started(headers) as nic:
            nic.transmit(data, header=header)
            assert headers.receive() == (header, data)
            nic.offer(4000)
            headers.send(data, header)
            assert nic.received() == (header._replace(num_buffers=1), data)
        other = Peer(lib.NET_FRAMING_PACKET, True)
        with started(other, 1 << tx[feature] | sum(1 << bit for bit in rx[feature])) as nic:
            nic.transmit(data, header=header)
            nic.returned()
            nic.counts("tx_dropped")
            nic.offer(4000)
            other.send(data, header)
            nic.counts("rx_dropped")

    def test_what_a_receiver_ignores_is_cleared(self, headers: Peer) -> None:
        with started(headers) as nic:
            odd = Header(0xFF ^ NEEDS_CSUM, 0, 999, 77, 5, 6, 1234)
            nic.transmit(frame(), header=odd)
            assert headers.receive()[0] == Header()
            nic.offer(2000)
            headers.send(frame(), odd)
            assert nic.received()[0] == Header(DATA_VALID, num_buffers=1)
            long = Header(NEEDS_CSUM, TSO4, 0xFFFF, 1448, 34, 16)
            nic.transmit(frame(3000), header=long)
            assert headers.receive()[0] == long._replace(hdr_len=0)

    def test_without_checksums_there_are_no_flags(self, headers: Peer) -> None:
        with started(headers, 1 << uapi.VIRTIO_NET_F_GUEST_CSUM) as nic:
            assert headers.port.told[0] == ("offloads", 0)
            nic.offer(2000)
            headers.send(frame(), Header(DATA_VALID))
            assert nic.received()[0] == Header(num_buffers=1)


class TestReceive:
    def test_a_frame(self, nic: Nic, peer: Peer) -> None:
        nic.offer(2000)
        peer.send(data := frame())
        assert nic.received() == (Header(num_buffers=1), data)
        assert nic.driver.interrupted() == VRING
        nic.counts("rx_frames")
        assert nic.counters["rx_bytes"] == len(data)

    def test_frames_wait_for_buffers(self, nic: Nic, peer: Peer) -> None:
        frames = [frame(100 + n) for n in range(5)]
        for data in frames:
            peer.send(data)
        time.sleep(0.02)
        for data in frames:
            nic.offer(2000)
            assert nic.received()[1] == data

    def test_no_busy_loop_without_buffers(self, nic: Nic, peer: Peer) -> None:
        peer.send(frame())
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.3)
        assert time.process_time() - before < 0.1

    def test_merged_buffers(self, nic: Nic, peer: Peer) -> None:
        nic.offer(512, count=10)
        for size in (20, 60, 499, 500, 501, 988, 1500, 4000):
            peer.send(data := frame(size))
            header, got = nic.received()
            assert (header.num_buffers, got) == (-(-(size + 12) // 512), data)
            nic.offer(512, count=header.num_buffers)

    def test_buffers_in_parts_of_any_size(self, nic: Nic, peer: Peer) -> None:
        for parts in ((1, 1, 1, 9, 100), (12, 1500), (5, 7, 60), (30, 1, 1, 1, 1)):
            for size in (20, 60, 300):
                nic.offer(*parts, count=3)
                nic.offer(1000)
                peer.send(data := frame(size))
                assert nic.received()[1] == data
                nic.driver.reset()
                nic.driver.start()

    def test_one_that_is_longer_than_was_expected(self, nic: Nic, peer: Peer) -> None:
        """It is continued where it has to wait for more buffers, and copied from there."""
        peer.send(data := frame(9000))
        nic.offer(1000, count=3)
        time.sleep(0.02)
        assert nic.queue(0).collect() == []
        nic.offer(1000, count=4)
        nic.offer(5000, count=2)
        header, got = nic.received()
        assert (header.num_buffers, got) == (8, data)

    def test_one_longer_than_all_buffers_there_can_be(self, nic: Nic, peer: Peer) -> None:
        nic.offer(100, count=16)
        peer.send(frame(2000))
        peer.send(data := frame(60))
        assert nic.received()[1] == data
        assert nic.counters["rx_dropped"] == 1

    def test_without_merging(self, peer: Peer) -> None:
        with started(peer, MRG_RXBUF) as nic:
            nic.offer(12, 1514)
            peer.send(frame(1515))
            peer.send(data := frame(1514))
            assert nic.received() == (Header(num_buffers=1), data)
            assert nic.counters["rx_dropped"] == 1

    def test_big_buffers(self, headers: Peer) -> None:
        with started(headers, MRG_RXBUF) as nic:
            nic.offer(*[4096] * 15, 5000)
            header = Header(NEEDS_CSUM, TSO4, 54, 1448, 34, 16)
            headers.send(data := frame(65500), header)
            assert nic.received() == (header._replace(num_buffers=1), data)

    def test_too_short(self, nic: Nic, peer: Peer) -> None:
        nic.offer(2000)
        for size in (1, 13):
            peer.send(bytes(size))
        nic.counts("rx_dropped", 2)
        peer.send(data := frame())
        assert nic.received()[1] == data

    def test_too_long(self, headers: Peer) -> None:
        with started(headers) as nic:
            nic.offer(2000, count=8)
            headers.send(bytes(66000))
            nic.counts("rx_dropped")
            headers.send(data := frame())
            assert nic.received()[1] == data

    def test_buffers_that_are_none(self, nic: Nic, peer: Peer) -> None:
        """Too small for the header, or not writable: returned empty."""
        ring = nic.queue(0)
        ring.add((b"read only",), ())
        ring.add((), (11,))
        ring.add((b"both",), (2000,))
        ring.publish()
        nic.driver.notify(0)
        peer.send(data := frame())
        used: list[Any] = []
        wait_until(lambda: used.extend(ring.collect()) or len(used) == 3)
        assert [each.written for each in used] == [0, 0, 12 + len(data)]
        assert used[2].data[12:] == data

    def test_both_ways_at_once(self, nic: Nic, peer: Peer) -> None:
        for _ in range(200):
            nic.offer(2000, count=2)
            out, back = frame(1000), [frame(600), frame(70)]
            nic.transmit(out)
            for each in back:
                peer.send(each)
            assert peer.receive()[1] == out
            assert [nic.received()[1] for _ in back] == back
            nic.returned()


class TestStream:
    def test_frames_in_pieces(self) -> None:
        peer = Peer(lib.NET_FRAMING_STREAM, False)
        with started(peer) as nic:
            frames = [frame(60), frame(1400), frame(61)]
            data = b"".join(struct.pack(">I", len(each)) + each for each in frames)
            nic.offer(2000, count=3)
            for start in range(0, len(data), 37):
                peer.sockets[0].sendall(data[start : start + 37])
                time.sleep(0.0005)
            assert [nic.received()[1] for _ in frames] == frames

    def test_a_reset_in_the_middle_of_a_frame(self) -> None:
        """The next driver finds the beginnings of frames, and so does the peer."""
        peer = Peer(lib.NET_FRAMING_STREAM, True)
        with started(peer) as nic:
            for got in (1, 3, 4, 5, 500, 1011, 1012, 1013, 1015):
                old, new = frame(1000), frame(600)
                message = struct.pack(">I", 1012) + Header().pack() + old
                message += struct.pack(">I", 612) + Header().pack() + new
                nic.offer(2000)
                peer.sockets[0].sendall(message[: 4 + got])
                time.sleep(0.02)
                nic.driver.reset()
                nic.driver.start()
                nic.offer(2000, count=2)
                peer.sockets[0].sendall(message[4 + got :])
                assert nic.received()[1] == new
            nic.fill_port([frame(8001)] * 1000)
            nic.driver.reset()
            nic.driver.start()
            nic.transmit(data := frame(777))
            sizes = set()
            while (got_frame := peer.receive()[1]) != data:
                sizes.add(len(got_frame))
            assert sizes == {8001}

    @pytest.mark.parametrize("length", [0, 70000, 0xFFFFFFFF])
    def test_nonsense_ends_it(self, length: int) -> None:
        peer = Peer(lib.NET_FRAMING_STREAM, False)
        with started(peer) as nic:
            peer.sockets[0].sendall(struct.pack(">I", length) + bytes(100))
            wait_until(lambda: not nic.device.link_up)


class TestPeerGone:
    def test_link_goes_down_and_frames_are_dropped(
        self, nic: Nic, peer: Peer, caplog: pytest.LogCaptureFixture
    ) -> None:
        nic.offer(2000)
        nic.transmit(data := frame())
        assert peer.receive()[1] == data
        nic.returned()
        nic.driver.interrupted()
        peer.sockets[0].close()
        wait_until(lambda: not nic.device.link_up)
        wait_until(lambda: nic.driver.read(uapi.VIRTIO_MMIO_INTERRUPT_STATUS) & CONFIG)
        for _ in range(3):
            nic.transmit(frame())
        nic.returned(3)
        assert nic.counters["tx_dropped"] == 3
        assert "net: what it was connected to has gone; its link is down" in caplog.text
        assert not nic.driver.status & NEEDS_RESET


class TestBrokenRings:
    @pytest.mark.parametrize("queue", [0, 1])
    def test_an_index_out_of_reach(self, nic: Nic, peer: Peer, queue: int) -> None:
        peer.send(frame())
        nic.queue(queue).write_avail_idx(1000)
        nic.driver.notify(queue)
        wait_until(lambda: nic.driver.status & NEEDS_RESET)
        nic.driver.reset()
        nic.driver.start()
        nic.transmit(data := frame())
        assert peer.receive()[1] == data


class TestLifeCycle:
    def test_pause_and_resume(self, nic: Nic, peer: Peer) -> None:
        for _ in range(3):
            nic.device.pause()
            nic.device.pause()
            nic.transmit(data := frame())
            assert not peer.has_frames
            nic.device.resume()
            nic.device.resume()
            assert peer.receive()[1] == data
            nic.returned()

    def test_reset_while_busy(self, nic: Nic, peer: Peer) -> None:
        for _ in range(20):
            nic.offer(600, count=10)
            for _ in range(5):
                nic.transmit(frame(500))
                peer.send(frame(1000))
            nic.driver.reset()
            nic.driver.start()

    def test_a_driver_that_uses_one_direction(self, nic: Nic) -> None:
        driver = nic.driver
        driver.reset()
        features = driver.negotiate()
        driver.set_up_queue(0, features)
        driver.add_status(uapi.VIRTIO_CONFIG_S_DRIVER_OK)
        assert not driver.status & NEEDS_RESET


class TestConfig:
    def test_features_follow_the_port(self, peer: Peer) -> None:
        with started(peer) as nic:
            assert bool(nic.features & 1 << uapi.VIRTIO_NET_F_CSUM) == peer.vnet_hdr
            assert bool(nic.features & 1 << net.VIRTIO_NET_F_HOST_USO) == peer.vnet_hdr
            assert bool(nic.features & 1 << uapi.VIRTIO_NET_F_CTRL_GUEST_OFFLOADS) == peer.vnet_hdr
            assert nic.features & 1 << uapi.VIRTIO_NET_F_MTU
            assert not nic.features & 1 << uapi.VIRTIO_NET_F_MQ
            assert peer.port.told == [("offloads", ALL if peer.vnet_hdr else 0), ("pairs", 1)]

    def test_space(self, nic: Nic) -> None:
        config = struct.unpack("<6sHHH", nic.device.read_config())
        assert config == (MAC, uapi.VIRTIO_NET_S_LINK_UP, 1, 1500)


class TestLink:
    def test_down_and_up(self, nic: Nic, peer: Peer) -> None:
        nic.device.set_link(False)
        assert nic.driver.interrupted() & CONFIG
        assert nic.driver.read(STATUS_REGISTER) & 0xFFFF == 0
        nic.transmit(frame())
        nic.returned()
        peer.send(frame())
        nic.counts("rx_filtered")
        assert not peer.has_frames
        nic.device.set_link(True)
        up = uapi.VIRTIO_NET_S_LINK_UP | uapi.VIRTIO_NET_S_ANNOUNCE
        assert nic.driver.read(STATUS_REGISTER) & 0xFFFF == up
        assert nic.control(uapi.VIRTIO_NET_CTRL_ANNOUNCE, 0) == OK
        assert nic.driver.read(STATUS_REGISTER) & 0xFFFF == uapi.VIRTIO_NET_S_LINK_UP
        nic.transmit(data := frame())
        assert peer.receive()[1] == data
        nic.offer(2000)
        peer.send(data := frame())
        assert nic.received()[1] == data
        assert peer.port.told[-2:] == [("link", False), ("link", True)]

    def test_no_announcement_of_a_driver_that_cannot(self, peer: Peer) -> None:
        with started(peer, 1 << uapi.VIRTIO_NET_F_GUEST_ANNOUNCE) as nic:
            nic.device.set_link(False)
            nic.device.set_link(True)
            assert nic.driver.read(STATUS_REGISTER) & 0xFFFF == uapi.VIRTIO_NET_S_LINK_UP
            assert nic.control(uapi.VIRTIO_NET_CTRL_ANNOUNCE, 0) == ERR


RX, MAC_CLASS, VLAN = 0, 1, 2
PROMISC, ALLMULTI, ALLUNI, NOMULTI, NOUNI, NOBCAST = range(6)


class TestFilter:
    def passes(self, nic: Nic, peer: Peer, *frames: bytes) -> list[bool]:
        """Which of the frames come through; a last one that does shows the end."""
        end = frame(64, nic.device._mac)
        for each in (*frames, end):
            peer.send(each)
        got: list[bytes] = []
        while end not in got:
            nic.offer(2000)
            got.append(nic.received()[1])
        return [each in got for each in frames]

    def test_modes(self, nic: Nic, peer: Peer) -> None:
        frames = [frame(60, to) for to in (MAC, PEER, GROUP, BROADCAST)]
        assert self.passes(nic, peer, *frames) == [True, True, True, True]
        for mode, on, expected in (
            (PROMISC, 0, "1001"),
            (ALLMULTI, 1, "1011"),
            (ALLUNI, 1, "1111"),
            (NOMULTI, 1, "1101"),
            (NOBCAST, 1, "1100"),
            (ALLUNI, 0, "1000"),
            (PROMISC, 1, "1111"),
        ):
            assert nic.control(RX, mode, bytes([on])) == OK
            passes = self.passes(nic, peer, *frames)
            assert passes == [each == "1" for each in expected], (mode, on)
        assert nic.control(RX, PROMISC, b"\0") == nic.control(RX, NOUNI, b"\1") == OK
        expected = nic.counters["rx_filtered"] + 1
        nic.offer(2000)
        peer.send(frames[0])
        nic.counts("rx_filtered", expected)

    def test_tables(self, nic: Nic, peer: Peer) -> None:
        def table(*macs: bytes) -> bytes:
            return struct.pack("<I", len(macs)) + b"".join(macs)

        other = bytes.fromhex("01005e000002")
        frames = [frame(60, to) for to in (MAC, PEER, GROUP, other)]
        assert nic.control(RX, PROMISC, b"\0") == OK
        for unicast, multicast, expected in (
            (table(), table(), "1000"),
            (table(PEER), table(), "1100"),
            (table(), table(GROUP), "1010"),
            (table(MAC, PEER), table(other, GROUP), "1111"),
            (table(), table(*[bytes([1, 2, 3, 4, 5, n]) for n in range(64)]), "1000"),
            (table(), table(*[bytes([1, 2, 3, 4, 5, n]) for n in range(65)]), "1011"),
        ):
            assert nic.control(MAC_CLASS, 0, unicast + multicast) == OK
            passes = self.passes(nic, peer, *frames)
            assert passes == [each == "1" for each in expected]

    def test_its_own_address(self, nic: Nic, peer: Peer) -> None:
        assert nic.control(RX, PROMISC, b"\0") == OK
        assert nic.control(MAC_CLASS, 1, PEER) == OK
        assert nic.device.read_config()[:6] == PEER
        assert self.passes(nic, peer, frame(60, MAC), frame(60, PEER)) == [False, True]
        nic.driver.reset()
        assert nic.device.read_config()[:6] == MAC

    def test_vlans(self, nic: Nic, peer: Peer) -> None:
        assert nic.control(RX, PROMISC, b"\0") == OK
        frames = [frame(64, MAC, vlan=vlan) for vlan in (0, 5, 0x6005, 4095)]
        assert self.passes(nic, peer, *frames) == [True, False, False, False]
        for vlan in (5, 4095):
            assert nic.control(VLAN, 0, struct.pack("<H", vlan)) == OK
        assert self.passes(nic, peer, *frames) == [True, True, True, True]
        assert nic.control(VLAN, 1, struct.pack("<H", 5)) == OK
        assert self.passes(nic, peer, *frames) == [True, False, False, True]
        assert nic.control(VLAN, 0, struct.pack("<H", 4096)) == ERR

    def test_none_without_the_feature(self, peer: Peer) -> None:
        with started(peer, 1 << uapi.VIRTIO_NET_F_CTRL_VLAN) as nic:
            assert nic.control(RX, PROMISC, b"\0") == OK
            assert self.passes(nic, peer, frame(64, MAC, vlan=9)) == [True]
            assert nic.control(VLAN, 0, struct.pack("<H", 4)) == ERR


class TestControl:
    def test_commands_that_are_none(self, nic: Nic) -> None:
        for class_, command, data in (
            (RX, 6, b"\0"),
            (RX, PROMISC, b""),
            (RX, PROMISC, b"\0\0"),
            (MAC_CLASS, 0, b""),
            (MAC_CLASS, 0, struct.pack("<I", 1)),
            (MAC_CLASS, 0, struct.pack("<I", 0xFFFFFFFF) + MAC),
            (MAC_CLASS, 0, bytes(8) + b"x"),
            (MAC_CLASS, 1, MAC[:5]),
            (MAC_CLASS, 2, MAC),
            (VLAN, 2, b"\0\0"),
            (4, 0, struct.pack("<H", 1)),
            (200, 0, b""),
        ):
            assert nic.control(class_, command, data) == ERR, (class_, command, data)

    def test_malformed_requests_fail_alone(self, nic: Nic) -> None:
        index = len(nic.driver.queues) - 1
        nic.driver.request(index, (b"\0",), (1,))
        assert nic.driver.replies(index) == [bytes([ERR])]
        nic.driver.request(index, (b"\0\0\0",), ())
        assert nic.driver.replies(index) == [b""]
        nic.driver.request(index, (), (4,))
        assert nic.driver.replies(index) == [bytes([ERR])]
        assert nic.control(RX, PROMISC, b"\1") == OK

    def test_guest_offloads(self, headers: Peer) -> None:
        with started(headers) as nic:
            tso = Header(NEEDS_CSUM, TSO4, 54, 1448, 34, 16)
            csum = 1 << uapi.VIRTIO_NET_F_GUEST_CSUM
            assert nic.control(5, 0, struct.pack("<Q", csum)) == OK
            assert headers.port.told[-1] == ("offloads", lib.NET_OFFLOAD_CSUM)
            nic.offer(4000)
            headers.send(frame(3000), tso)
            nic.counts("rx_dropped")
            everything = nic.features & sum(net._RX_FEATURES)
            assert nic.control(5, 0, struct.pack("<Q", everything)) == OK
            headers.send(data := frame(3000), tso)
            assert nic.received()[1] == data
            assert nic.control(5, 0, struct.pack("<Q", 1 << uapi.VIRTIO_NET_F_CSUM)) == ERR
            assert nic.control(5, 0, struct.pack("<Q", 1 << 63)) == ERR


class TestQueuePairs:
    @pytest.fixture
    def several(self) -> Peer:
        return Peer(lib.NET_FRAMING_PACKET, True, count=3)

    def test_as_many_as_the_driver_asks_for(self, several: Peer) -> None:
        with started(several) as nic:
            assert nic.device.max_pairs == 3
            assert nic.features & 1 << uapi.VIRTIO_NET_F_MQ
            assert several.port.told[-1] == ("pairs", 1)
            for count in (3, 1, 2, 3):
                assert nic.control(4, 0, struct.pack("<H", count)) == OK
                assert several.port.told[-1] == ("pairs", count)
                for queue in range(count):
                    nic.transmit(data := frame(), queue=queue)
                    assert several.receive(queue)[1] == data
                    nic.returned(queue=queue)
                    nic.offer(2000, queue=queue)
                    several.send(data := frame(), queue=queue)
                    assert nic.received(queue)[1] == data
            for count in (0, 4, 0x8000):
                assert nic.control(4, 0, struct.pack("<H", count)) == ERR
            nic.driver.reset()
            nic.driver.start()
            assert several.port.told[-1] == ("pairs", 1)

    def test_a_driver_without_them_has_its_control_queue_third(self, several: Peer) -> None:
        with started(several, 1 << uapi.VIRTIO_NET_F_MQ) as nic:
            assert nic.control(RX, PROMISC, b"\0", queue=2) == OK
            nic.transmit(data := frame())
            assert several.receive()[1] == data


class TestPcap:
    def blocks(self, path: Path) -> list[tuple[int, bytes]]:
        data, blocks = path.read_bytes(), []
        while data:
            kind, length = struct.unpack("<II", data[:8])
            assert length % 4 == 0 and data[length - 4 : length] == data[4:8]
            blocks.append((kind, data[8 : length - 4]))
            data = data[length:]
        return blocks

    def test_both_directions(self, peer: Peer, tmp_path: Path) -> None:
        path = tmp_path / "net.pcapng"
        fd = create_pcap(str(path), "net7")
        out, back = frame(61), frame(1202)
        before = time.time_ns()
        with started(peer, pcap_fd=fd) as nic:
            nic.transmit(out)
            assert peer.receive()[1] == out
            nic.offer(500, count=4)
            peer.send(back)
            assert nic.received()[1] == back
        os.close(fd)
        section, interface, *packets = self.blocks(path)
        assert (section[0], interface[0]) == (0x0A0D0D0A, 1)
        assert b"net7" in interface[1]
        seen = []
        for kind, body in packets:
            assert kind == 6
            _, high, low, captured, original = struct.unpack("<IIIII", body[:20])
            assert before <= high << 32 | low <= time.time_ns()
            assert captured == original
            options = body[20 + -(-captured // 4) * 4 :]
            code, length, flags, end = struct.unpack("<HHII", options)
            assert (code, length, end) == (2, 4, 0)
            seen.append((flags, body[20 : 20 + captured]))
        assert seen == [(2, out), (1, back)]

    def test_a_full_disk_ends_the_recording_alone(self, peer: Peer) -> None:
        if not Path("/dev/full").exists():
            pytest.skip("there is no /dev/full")
        fd = os.open("/dev/full", os.O_WRONLY | os.O_APPEND)
        with started(peer, pcap_fd=fd) as nic:
            for _ in range(2):
                nic.transmit(data := frame())
                assert peer.receive()[1] == data
        os.close(fd)

    def test_a_file_that_cannot_be_written(self) -> None:
        with pytest.raises(UsageError) as error:
            create_pcap("/nonexistent/x", "net0")
        assert str(error.value) == (
            "the recording /nonexistent/x cannot be written: No such file or directory"
        )

    def test_tcpdump_reads_it(self, headers: Peer, tmp_path: Path) -> None:
        try:
            subprocess.run(["tcpdump", "--version"], capture_output=True, check=True)
        except OSError:
            pytest.skip("tcpdump is not installed: apt install tcpdump")
        path = tmp_path / "x.pcapng"
        fd = create_pcap(str(path), "net0")
        with started(headers, pcap_fd=fd) as nic:
            nic.transmit(frame())
            headers.receive()
        os.close(fd)
        text = subprocess.run(
            ["tcpdump", "-e", "-n", "-r", path], capture_output=True, check=True, text=True
        ).stdout
        assert "52:54:00:99:99:99 > 52:54:00:12:34:56, ethertype Unknown (0x88b5)" in text


def _header_is_proper(header: Header, size: int) -> bool:
    """5.1.6.2.2 in other words than the C code's, all offloads negotiated."""
    gso = header.gso_type & ~0x80
    needs = bool(header.flags & NEEDS_CSUM)
    if needs and header.csum_start + header.csum_offset + 2 > size:
        return False
    if gso == 0:
        return True
    return needs and gso in (1, 3, 4, 5) and header.gso_size > 0


small = st.one_of(st.integers(0, 80), st.integers(0, 0xFFFF))


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.builds(
                Header,
                flags=st.integers(0, 255),
                gso_type=st.one_of(st.integers(0, 6), st.integers(0, 255)),
                hdr_len=small,
                gso_size=small,
                csum_start=small,
                csum_offset=small,
                num_buffers=small,
            ),
            st.integers(0, 100),
            st.lists(st.integers(1, 111), max_size=4),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_frames_of_a_hostile_driver(
    frames: list[tuple[Header, int, list[int]]],
) -> None:
    """Whatever it sends, in whatever pieces: proper frames come out, all chains come back."""
    peer = Peer(lib.NET_FRAMING_PACKET, True)
    expected = []
    with started(peer) as nic:
        for header, size, cuts in frames:
            data = frame(size)
            whole = header.pack() + data
            edges = sorted({0, *(cut for cut in cuts if cut < len(whole)), len(whole)})
            parts = [whole[a:b] for a, b in itertools.pairwise(edges)]
            nic.transmit_raw(*parts, indirect=True)
            nic.returned()
            if size >= 14 and _header_is_proper(header, size):
                expected.append(data)
        assert [peer.receive()[1] for _ in expected] == expected
        assert nic.counters["tx_dropped"] == len(frames) - len(expected)


def test_vhost_interrupts_keep_their_status() -> None:
    """A held bit outlives its acknowledgement, as nobody sets it again (`vhost.py`)."""
    word = ffi.new("uint32_t *")
    irq = ffi.new("struct virtio_irq *", {"status": word, "irqfd": -1})
    lib.virtio_irq_hold(irq, lib.VIRTIO_IRQ_VRING)
    lib.virtio_irq_raise(irq, lib.VIRTIO_IRQ_CONFIG)
    lib.virtio_irq_ack(irq, lib.VIRTIO_IRQ_VRING | lib.VIRTIO_IRQ_CONFIG)
    assert word[0] == lib.VIRTIO_IRQ_VRING
    lib.virtio_irq_hold(irq, 0)
    lib.virtio_irq_ack(irq, lib.VIRTIO_IRQ_VRING)
    assert word[0] == 0
