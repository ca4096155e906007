"""A driver of virtio-scsi for tests: CDBs in, status, sense and data out (virtio 1.2, 5.6.6)."""

from __future__ import annotations

import struct
from typing import NamedTuple

from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.scsi import CONTROL, EVENTS, FIRST_REQUEST_QUEUE, VirtioScsi
from support.mmio_driver import MmioDriver, wait_until

GOOD, CHECK_CONDITION, RESERVATION_CONFLICT = 0x00, 0x02, 0x18


class Reply(NamedTuple):
    """`transferred` is what the residual leaves of the data buffers; `data` has as much data-in."""

    response: int
    status: int
    sense: bytes
    transferred: int
    data: bytes
    written: int

    @property
    def code(self) -> tuple[int, int, int]:
        """Sense key, additional sense code and qualifier, of either format."""
        if not self.sense:
            return (0, 0, 0)
        if self.sense[0] & 0x7F in (0x72, 0x73):
            return (self.sense[1] & 0xF, self.sense[2], self.sense[3])
        return (self.sense[2] & 0xF, self.sense[12], self.sense[13])

    @property
    def pointer(self) -> tuple[bool, int, int | None]:
        """The field pointer: whether into the CDB, the byte, the bit (None: all of the byte)."""
        at = self.sense[15:18] if self.sense[0] == 0x70 else self.sense[12:15]
        assert at[0] & 0x80, "no field pointer"
        bit = at[0] & 7 if at[0] & 8 else None
        return (bool(at[0] & 0x40), int.from_bytes(at[1:3]), bit)


def flat(target: int, lun: int) -> bytes:
    """An address as Linux writes it."""
    return struct.pack(">BBHxxxx", 1, target, 0x4000 | lun)


class ScsiDriver:
    """Drives `device`; use it as a context manager."""

    def __init__(self, device: VirtioScsi, without: int = 0) -> None:
        self.device = device
        self.driver = MmioDriver(device)
        self.cdb_size = uapi.VIRTIO_SCSI_CDB_DEFAULT_SIZE
        self.sense_size = uapi.VIRTIO_SCSI_SENSE_DEFAULT_SIZE
        self.driver.start(without)
        self._tag = 0

    def __enter__(self) -> ScsiDriver:
        return self

    def __exit__(self, *error: object) -> None:
        self.driver.__exit__(*error)

    def header(self, cdb: bytes, address: bytes, tag: int = 0) -> bytes:
        return struct.pack("<8sQBBB", address, tag, 0, 0, 0) + cdb.ljust(self.cdb_size, b"\0")

    def command(
        self,
        cdb: bytes,
        *,
        out: bytes | tuple[bytes, ...] = (),
        into: int | tuple[int, ...] = (),
        target: int = 0,
        lun: int = 0,
        address: bytes | None = None,
        queue: int = 0,
    ) -> Reply:
        """One command with its usual framing: header, data-out, response, data-in."""
        address = flat(target, lun) if address is None else address
        out = (out,) if isinstance(out, bytes) else out
        into = (into,) if isinstance(into, int) else into
        response = 12 + self.sense_size
        return self.chain(
            (self.header(cdb, address), *(part for part in out if part)),
            (response, *(size for size in into if size)),
            total=sum(map(len, out)) + sum(into),
            queue=queue,
        )

    def start(self, readable: tuple[bytes, ...], writable: tuple[int, ...], queue: int = 0) -> int:
        """Offers a chain to a request queue; returns its head."""
        ring = self.driver.queues[FIRST_REQUEST_QUEUE + queue]
        assert ring is not None
        head = ring.add(readable, writable)
        if ring.publish():
            self.driver.notify(FIRST_REQUEST_QUEUE + queue)
        return head

    def chain(
        self,
        readable: tuple[bytes, ...],
        writable: tuple[int, ...],
        *,
        total: int = 0,
        queue: int = 0,
    ) -> Reply:
        """Any chain; its device-writable part is taken for a response, then data-in."""
        ring = self.driver.queues[FIRST_REQUEST_QUEUE + queue]
        assert ring is not None
        buffers = ring._in_flight[self.start(readable, writable, queue)].writable
        used: list[int] = []
        wait_until(lambda: used.extend(each.written for each in ring.collect()) or used)
        data = b"".join(ring.read(*buffer) for buffer in buffers)
        return self.parse(data, used[0], total)

    def parse(self, data: bytes, written: int, total: int) -> Reply:
        """What a device-writable part says, of a command with `total` bytes of data."""
        size = 12 + self.sense_size
        head = data[:12].ljust(12, b"\xee")
        sense_size, residual, _, status, response = struct.unpack("<IIHBB", head)
        transferred = total - residual
        sense = data[12 : 12 + sense_size] if sense_size <= self.sense_size else b""
        return Reply(response, status, sense, transferred, data[size : max(size, written)], written)

    def control(self, request: bytes, reply_size: int = 1) -> bytes:
        """A request on the control queue; what the device wrote."""
        self.driver.request(CONTROL, (request,), (reply_size,) if reply_size else ())
        return self.driver.replies(CONTROL)[0]

    def manage(self, subtype: int, target: int = 0, lun: int = 0, tag: int = 0) -> int:
        """A task management function; its response."""
        request = struct.pack("<II8sQ", uapi.VIRTIO_SCSI_T_TMF, subtype, flat(target, lun), tag)
        return self.control(request)[0]

    def offer_event_buffers(self, count: int = 1, size: int = 16) -> None:
        for _ in range(count):
            self.driver.request(EVENTS, (), (size,))

    def event(self) -> tuple[int, bytes, int]:
        """The next event: kind, address, reason."""
        event, address, reason = struct.unpack("<I8sI", self.driver.replies(EVENTS)[0])
        return event, address, reason

    def settle(self, target: int = 0, lun: int = 0) -> None:
        """Takes unit attention conditions until there is none left."""
        for _ in range(10):
            if self.command(bytes(6), target=target, lun=lun).code[0] != 6:
                return
        raise AssertionError("unit attention conditions without an end")
