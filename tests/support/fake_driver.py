"""The driver side of a split virtqueue, as a Linux guest would do it, and as one never should.

`FakeDriver` offers buffers, notifies, and takes used buffers back, and checks on the way what a
device owes to a driver: only heads that are in flight, each once, and no more bytes than fit. The
`write_...` methods put anything into the rings.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NamedTuple

from pyvmm.virtio.reference import (
    AVAIL_F_NO_INTERRUPT,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    DESC_SIZE,
    USED_F_NO_NOTIFY,
    Buffer,
    GuestMemory,
    RingConfig,
    need_event,
)


class Used(NamedTuple):
    """A chain that came back: what the device wrote, of each device-writable buffer in order."""

    head: int
    written: int
    data: bytes


class _InFlight(NamedTuple):
    descriptors: list[int]
    writable: list[Buffer]


def ring_config(
    size: int = 16, base: int = 0x1000, *, event_idx: bool = False, indirect: bool = False
) -> RingConfig:
    """The three areas of a queue one after the other from `base` on, which is 16-aligned."""
    avail = base + DESC_SIZE * size
    used = (avail + 6 + 2 * size + 3) & ~3
    return RingConfig(base, avail, used, size, event_idx, indirect)


class FakeDriver:
    """Drives a queue in `memory`; buffers and indirect tables are taken from `buffers`.

    `memory` is shared with the device (see `native_ring.native_memory` for a C device). Both rings
    begin at index `start`, as they are after so many chains.
    """

    def __init__(
        self, memory: GuestMemory, config: RingConfig, buffers: Buffer, start: int = 0
    ) -> None:
        self.memory = memory
        self.config = config
        self.size = config.size
        self.avail_idx = start
        self.used_idx = start
        self._published_avail = start
        self._buffers = buffers
        self._next_buffer = buffers.gpa
        self._free = list(range(config.size))
        self._in_flight: dict[int, _InFlight] = {}
        self.write_avail_idx(start)
        self._write(config.used_gpa + 2, "<H", start)

    @property
    def in_flight(self) -> int:
        """Chains offered and not yet taken back."""
        return len(self._in_flight)

    # Offering buffers (2.7.13).

    def add(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), indirect: bool = False
    ) -> int:
        """Puts a chain into the available ring and returns its head.

        `readable` are the contents of the device-readable buffers, `writable` the lengths of the
        device-writable ones. The device sees the chain after `publish`.
        """
        out = [self.buffer(data) for data in readable]
        into = [self.buffer(bytes(length)) for length in writable]
        chain = [(buffer, 0) for buffer in out] + [(buffer, DESC_F_WRITE) for buffer in into]
        taken = 1 if indirect else len(chain)
        if taken > len(self._free):
            raise BufferError(f"no {taken} free descriptors")
        descriptors = [self._free.pop(0) for _ in range(taken)]
        if indirect:
            table = self.buffer(bytes(DESC_SIZE * len(chain)))
            self.write_desc(descriptors[0], *table, DESC_F_INDIRECT, 0)
            self._write_chain(table.gpa, range(len(chain)), chain)
        else:
            self._write_chain(self.config.desc_gpa, descriptors, chain)
        head = descriptors[0]
        self._in_flight[head] = _InFlight(descriptors, into)
        self.write_avail(self.avail_idx, head)
        self.avail_idx = (self.avail_idx + 1) % 65536
        return head

    def _write_chain(
        self, table_gpa: int, indices: Sequence[int], chain: Sequence[tuple[Buffer, int]]
    ) -> None:
        for place, (buffer, flags) in enumerate(chain):
            following = 0
            if place + 1 < len(chain):
                flags |= DESC_F_NEXT
                following = indices[place + 1]
            self._write(table_gpa + DESC_SIZE * indices[place], "<QIHH", *buffer, flags, following)

    def publish(self) -> bool:
        """Shows the device all that was added; whether it wants a notification (2.7.13.4)."""
        old, self._published_avail = self._published_avail, self.avail_idx
        self.write_avail_idx(self.avail_idx)
        if self.config.event_idx:
            (avail_event,) = self._read(self.config.used_gpa + 4 + 8 * self.size, "<H")
            return need_event(avail_event, self.avail_idx, old)
        (flags,) = self._read(self.config.used_gpa, "<H")
        return not flags & USED_F_NO_NOTIFY

    def submit(
        self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), indirect: bool = False
    ) -> int:
        """Adds and publishes one chain; returns its head."""
        head = self.add(readable, writable, indirect)
        self.publish()
        return head

    def buffer(self, data: bytes) -> Buffer:
        """A buffer in guest memory with `data` in it.

        Buffers are free again once `collect` has left no chain in flight.
        """
        gpa = self._next_buffer
        if gpa + len(data) > self._buffers.gpa + self._buffers.length:
            raise BufferError(f"no room for a buffer of {len(data)} bytes")
        self._next_buffer = (gpa + len(data) + 15) & ~15
        self.write(gpa, data)
        return Buffer(gpa, len(data))

    # Taking used buffers back (2.7.14).

    def collect(self) -> list[Used]:
        """All chains that the device returned since the last call."""
        (idx,) = self._read(self.config.used_gpa + 2, "<H")
        returned = []
        while self.used_idx != idx:
            slot = self.config.used_gpa + 4 + 8 * (self.used_idx % self.size)
            head, written = self._read(slot, "<II")
            assert head in self._in_flight, f"head {head} came back but is not in flight"
            chain = self._in_flight.pop(head)
            room = sum(buffer.length for buffer in chain.writable)
            assert written <= room, f"{written} bytes written into {room}"
            data = b"".join(self.read(*buffer) for buffer in chain.writable)
            returned.append(Used(head, written, data[:written]))
            self._free.extend(chain.descriptors)
            self.used_idx = (self.used_idx + 1) % 65536
        if not self._in_flight:
            self._next_buffer = self._buffers.gpa
        return returned

    def enable_interrupts(self) -> bool:
        """Asks for an interrupt after the next used buffer; True when one is there already."""
        if self.config.event_idx:
            self.write_used_event(self.used_idx)
        else:
            self.write_avail_flags(0)
        (idx,) = self._read(self.config.used_gpa + 2, "<H")
        return bool(idx != self.used_idx)

    def disable_interrupts(self) -> None:
        """Asks for none; with EVENT_IDX that is an index that was passed long ago."""
        if self.config.event_idx:
            self.write_used_event((self.used_idx - self.size - 1) % 65536)
        else:
            self.write_avail_flags(AVAIL_F_NO_INTERRUPT)

    # Anything else a guest can write.

    def write_desc(self, index: int, addr: int, length: int, flags: int, following: int) -> None:
        self._write(
            self.config.desc_gpa + DESC_SIZE * index, "<QIHH", addr, length, flags, following
        )

    def write_avail(self, slot: int, head: int) -> None:
        """Writes an entry of the available ring; `slot` is taken modulo the queue size."""
        self._write(self.config.avail_gpa + 4 + 2 * (slot % self.size), "<H", head)

    def write_avail_idx(self, idx: int) -> None:
        self._write(self.config.avail_gpa + 2, "<H", idx)

    def write_avail_flags(self, flags: int) -> None:
        self._write(self.config.avail_gpa, "<H", flags)

    def write_used_event(self, event: int) -> None:
        self._write(self.config.avail_gpa + 4 + 2 * self.size, "<H", event)

    def write(self, gpa: int, data: bytes) -> None:
        """Writes bytes anywhere in guest memory."""
        area = self.memory.at(gpa, len(data))
        assert area is not None, f"{len(data)} bytes at {gpa:#x} are not in guest memory"
        area[:] = data

    def read(self, gpa: int, length: int) -> bytes:
        """Reads bytes from anywhere in guest memory."""
        area = self.memory.at(gpa, length)
        assert area is not None, f"{length} bytes at {gpa:#x} are not in guest memory"
        return bytes(area)

    def _write(self, gpa: int, layout: str, *values: int) -> None:
        self.write(gpa, struct.pack(layout, *values))

    def _read(self, gpa: int, layout: str) -> tuple[int, ...]:
        return struct.unpack(layout, self.read(gpa, struct.calcsize(layout)))
