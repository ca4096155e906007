"""A split virtqueue in plain Python: the ring of ``_native/virtq.c``, to read and to test against.

Section numbers are those of the virtio specification, version 1.2. The three areas of a queue,
all little-endian and in guest memory (2.7)::

    descriptor table           available ring (driver)      used ring (device)
    16 bytes each:             le16 flags                   le16 flags
      le64 addr                le16 idx                     le16 idx
      le32 len                 le16 ring[size]              size times: le32 id, le32 len
      le16 flags               le16 used_event              le16 avail_event
      le16 next

The driver puts a buffer into descriptors, chains them, writes the index of the first one (the head)
into ``ring[idx % size]`` of the available ring and increments its idx. The device takes the chain,
does what it asks, and hands the head back through the used ring in the same manner. Both indices
run freely and wrap at 65536.

The driver is not trusted: it may write anything anywhere at any time. Hence the rules here and in
C: each field is read once; nothing is used before it was checked; a chain has at most as many
descriptors as the queue; each kind of nonsense has one outcome, the same in both implementations.
What Python does not show is memory ordering; see the comments in ``virtq.c``.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from mmap import mmap
from typing import NamedTuple

DESC_F_NEXT = 1
DESC_F_WRITE = 2
DESC_F_INDIRECT = 4
AVAIL_F_NO_INTERRUPT = 1
USED_F_NO_NOTIFY = 1

DESC_SIZE = 16
MAX_QUEUE_SIZE = 32768

_DESC = struct.Struct("<QIHH")
_USED_ELEM = struct.Struct("<II")
_LE16 = struct.Struct("<H")


class GuestMemory:
    """Guest RAM: buffers by the guest-physical address at which each one starts."""

    def __init__(self, regions: Mapping[int, bytearray | mmap]) -> None:
        self.regions = {gpa: memoryview(ram) for gpa, ram in regions.items()}

    def at(self, gpa: int, size: int) -> memoryview | None:
        """The `size` bytes at `gpa`, or None unless all of them are in one region."""
        for start, ram in self.regions.items():
            if start <= gpa < start + len(ram) and size <= start + len(ram) - gpa:
                return ram[gpa - start : gpa - start + size]
        return None


class RingConfig(NamedTuple):
    """What the driver configured for a queue; the addresses are guest-physical."""

    desc_gpa: int
    avail_gpa: int
    used_gpa: int
    size: int
    event_idx: bool = False
    """VIRTIO_F_EVENT_IDX was negotiated."""
    indirect: bool = False
    """VIRTIO_F_INDIRECT_DESC was negotiated."""


class Buffer(NamedTuple):
    """A descriptor's part of guest memory."""

    gpa: int
    length: int


class Chain(NamedTuple):
    """A request: what the device may read, then what it may write (2.7.4.2)."""

    head: int
    readable: list[Buffer]
    writable: list[Buffer]


class _Malformed(Exception):
    """The chain breaks a rule: it is handed back with length 0."""


class ReferenceVirtqueue:
    """The device side of a split virtqueue. Methods and outcomes are those of ``virtq.h``.

    Raises ValueError when the size is not a power of two up to 32768, an area is misaligned, or
    one is not wholly in guest memory (2.7).
    """

    def __init__(self, memory: GuestMemory, config: RingConfig) -> None:
        size = config.size
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ValueError(f"a queue of {size} is not a power of two up to {MAX_QUEUE_SIZE}")
        self.memory = memory
        self.size = size
        self.event_idx = config.event_idx
        self.indirect = config.indirect
        self._desc = self._area("descriptor table", config.desc_gpa, 16 * size, 16)
        self._avail = self._area("available ring", config.avail_gpa, 6 + 2 * size, 2)
        self._used = self._area("used ring", config.used_gpa, 6 + 8 * size, 4)
        self.broken = False
        self.avail_idx = 0
        self.next_avail = 0
        self.next_used = 0
        self.published_used = 0
        self.chains = 0
        self.malformed = 0

    def _area(self, name: str, gpa: int, size: int, alignment: int) -> memoryview:
        area = self.memory.at(gpa, size)
        if gpa % alignment or area is None:
            raise ValueError(f"{name} at {gpa:#x}: misaligned or not in guest memory")
        return area

    def pop(self) -> Chain | None:
        """The next available chain; None when there is none, or when the ring is `broken`.

        A malformed chain is pushed with length 0 and skipped. A head outside the table cannot
        even be handed back, so it is dropped.
        """
        while not self.broken:
            if self.next_avail == self.avail_idx and not self._read_avail_idx():
                break
            (head,) = _LE16.unpack_from(self._avail, 4 + 2 * (self.next_avail % self.size))
            self.next_avail = (self.next_avail + 1) % 65536
            if head < self.size:
                try:
                    chain = self._walk(head)
                except _Malformed:
                    self.push(head, 0)
                else:
                    self.chains += 1
                    return chain
            self.malformed += 1
        return None

    def _read_avail_idx(self) -> bool:
        """Whether the driver made more chains available.

        Each chain takes a descriptor until its head is handed back, so at most `size` of them
        are on the device's side. An index that says more, or that went back, has no meaning.
        """
        (idx,) = _LE16.unpack_from(self._avail, 2)
        if idx == self.next_avail:
            return False
        unreturned = (self.next_avail - self.published_used) % 65536
        if (idx - self.next_avail) % 65536 > self.size - unreturned:
            self.broken = True
            return False
        self.avail_idx = idx
        return True

    def _walk(self, head: int) -> Chain:
        """Follows the chain (2.7.5), through its indirect table if it has one (2.7.5.3)."""
        table = self._desc
        index = head
        count = 0
        chain = Chain(head, [], [])
        writable_seen = False
        while True:
            if index >= len(table) // DESC_SIZE:
                raise _Malformed("next descriptor outside the table")
            addr, length, flags, index = _DESC.unpack_from(table, DESC_SIZE * index)

            if flags & DESC_F_INDIRECT:
                table = self._indirect_table(table, addr, length, flags)
                index = 0
                continue

            # Buffers only: Linux fills indirect tables of `size`, named by one descriptor more.
            count += 1
            if count > self.size:
                raise _Malformed("a loop, or longer than the queue (2.7.5.3.1)")
            writable = bool(flags & DESC_F_WRITE)
            if writable_seen and not writable:
                raise _Malformed("device-readable after device-writable (2.7.4.2)")
            writable_seen = writable
            if length:  # an empty buffer has no place in guest memory: it is left out
                if self.memory.at(addr, length) is None:
                    raise _Malformed("buffer outside guest memory")
                (chain.writable if writable else chain.readable).append(Buffer(addr, length))
            if not flags & DESC_F_NEXT:
                break
        if sum(buffer.length for buffer in chain.readable + chain.writable) > 0xFFFF_FFFF:
            raise _Malformed("more bytes than a used length can tell")
        return chain

    def _indirect_table(self, table: memoryview, addr: int, length: int, flags: int) -> memoryview:
        """The table that a descriptor names (2.7.5.3). DESC_F_WRITE says nothing here."""
        if not self.indirect:
            raise _Malformed("INDIRECT_DESC was not negotiated")
        if table is not self._desc:
            raise _Malformed("a table within a table")
        if flags & DESC_F_NEXT:
            raise _Malformed("a table in the middle of a chain")
        if length == 0 or length % DESC_SIZE:
            raise _Malformed("not a whole number of descriptors")
        indirect = self.memory.at(addr, length)
        if indirect is None:
            raise _Malformed("table outside guest memory")
        return indirect

    def push(self, head: int, written: int) -> None:
        """Fills a used element (2.7.8); the driver does not see it yet."""
        _USED_ELEM.pack_into(self._used, 4 + 8 * (self.next_used % self.size), head, written)
        self.next_used = (self.next_used + 1) % 65536

    def publish(self) -> bool:
        """Shows the driver all that was pushed; whether it wants an interrupt (2.7.7)."""
        old, new = self.published_used, self.next_used
        if old == new:
            return False
        _LE16.pack_into(self._used, 2, new)
        self.published_used = new
        if self.event_idx:
            (used_event,) = _LE16.unpack_from(self._avail, 4 + 2 * self.size)
            return need_event(used_event, new, old)
        (flags,) = _LE16.unpack_from(self._avail, 0)
        return not flags & AVAIL_F_NO_INTERRUPT

    def disable_notify(self) -> None:
        """Asks for no notifications. With EVENT_IDX they stop by themselves (2.7.10)."""
        if not self.event_idx:
            _LE16.pack_into(self._used, 0, USED_F_NO_NOTIFY)

    def enable_notify(self) -> bool:
        """Asks for a notification of the next chain; True when one came in meanwhile (2.7.10)."""
        if self.broken:
            return False
        if self.event_idx:
            _LE16.pack_into(self._used, 4 + 8 * self.size, self.next_avail)
        else:
            _LE16.pack_into(self._used, 0, 0)
        (idx,) = _LE16.unpack_from(self._avail, 2)
        return bool(idx != self.next_avail)


def need_event(event: int, new: int, old: int) -> bool:
    """Whether an index that went from `old` to `new` passed `event` (2.7.7.1, 2.7.10.1).

    In other words: whether `event` is one of old, old + 1, ..., new - 1, all modulo 65536.
    """
    return (new - event - 1) % 65536 < (new - old) % 65536
