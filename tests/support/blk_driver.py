"""A driver of virtio-blk for tests: requests in, status and data out (virtio 1.2, 5.2.6)."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.blk import VirtioBlk
from support.mmio_driver import MmioDriver, wait_until

IN, OUT, FLUSH = uapi.VIRTIO_BLK_T_IN, uapi.VIRTIO_BLK_T_OUT, uapi.VIRTIO_BLK_T_FLUSH
GET_ID, DISCARD = uapi.VIRTIO_BLK_T_GET_ID, uapi.VIRTIO_BLK_T_DISCARD
WRITE_ZEROES = uapi.VIRTIO_BLK_T_WRITE_ZEROES
OK, IOERR, UNSUPP = uapi.VIRTIO_BLK_S_OK, uapi.VIRTIO_BLK_S_IOERR, uapi.VIRTIO_BLK_S_UNSUPP
UNMAP = uapi.VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP
UNTOUCHED = 0xEE  # what a status byte holds before the device writes it


class Reply(NamedTuple):
    status: int
    data: bytes
    written: int


class Disk:
    """A driver of the device over `image`."""

    def __init__(self, device: VirtioBlk, path: Path) -> None:
        self.device = device
        self.path = path
        self.driver = MmioDriver(device)

    def request(
        self,
        kind: int,
        sector: int = 0,
        *,
        readable: tuple[bytes, ...] = (),
        writable: tuple[int, ...] = (),
        queue: int = 0,
    ) -> Reply:
        """One request with its usual framing: header, data, status."""
        header = struct.pack("<IIQ", kind, 0, sector)
        return self.chain((header, *readable), (*writable, 1), queue=queue)

    def chain(
        self, readable: tuple[bytes, ...], writable: tuple[int, ...], *, queue: int = 0
    ) -> Reply:
        """Any chain; its last device-writable byte is taken for the status."""
        ring = self.driver.queues[queue]
        assert ring is not None
        head = ring.add(readable, writable)
        buffers = ring._in_flight[head].writable
        for buffer in buffers:
            ring.write(buffer.gpa, bytes([UNTOUCHED]) * buffer.length)
        if ring.publish():
            self.driver.notify(queue)
        used: list[int] = []
        wait_until(lambda: used.extend(u.written for u in ring.collect()) or used)
        data = b"".join(ring.read(*buffer) for buffer in buffers)
        return Reply(data[-1] if data else UNTOUCHED, data[:-1], used[0])

    def read(self, sector: int, length: int) -> bytes:
        reply = self.request(IN, sector, writable=(length,))
        assert (reply.status, reply.written) == (OK, length + 1)
        return reply.data

    def write(self, sector: int, data: bytes) -> None:
        assert self.request(OUT, sector, readable=(data,)).status == OK

    def segments(self, kind: int, *segments: tuple[int, int, int]) -> int:
        data = b"".join(struct.pack("<QII", *segment) for segment in segments)
        return self.request(kind, readable=(data,)).status

    @property
    def contents(self) -> bytes:
        return self.path.read_bytes()

    @property
    def allocated(self) -> int:
        return self.path.stat().st_blocks * 512

    def config(self) -> uapi.virtio_blk_config:
        return uapi.virtio_blk_config.from_buffer_copy(self.device.read_config())


@contextlib.contextmanager
def started(device: VirtioBlk, path: Path, without: int = 0) -> Iterator[Disk]:
    """The device with a driver that has initialized it, with all features but `without`."""
    disk = Disk(device, path)
    with disk.driver:
        disk.driver.start(without)
        yield disk
