"""The MP table, found and read as a kernel does it, and the parameters of virtio devices."""

from __future__ import annotations

import struct

import pytest
from support.kernel_images import Memory

from pyvmm import layout
from pyvmm.boot.acpi import VirtioSlot
from pyvmm.boot.mptable import virtio_mmio_parameters, write_mp_table

SLOTS = [
    VirtioSlot(0xD000_0000, 16, False),
    VirtioSlot(0xD000_1000, 23, True),
    VirtioSlot(0xD000_2000, 23, True),
    VirtioSlot(0xD000_3000, 5, False),
]
ENTRY_SIZES = {0: 20, 1: 8, 2: 8, 3: 8, 4: 8}


def read_entries(cpus: int) -> list[bytes]:
    memory = Memory(1 << 20)
    write_mp_table(memory, cpus=cpus, virtio=SLOTS)
    # 4: the last KiB of system base memory is searched, on 16-byte boundaries.
    last_kib = memory.read(0x9FC00, 0x400)
    (found,) = [i for i in range(0, 0x400, 16) if last_kib[i : i + 4] == b"_MP_"]
    pointer = last_kib[found : found + 16]
    assert sum(pointer) & 0xFF == 0
    gpa, length, revision = struct.unpack_from("<IBB", pointer, 4)
    assert (length, revision) == (1, 4)
    header = memory.read(gpa, 44)
    signature, size, revision = struct.unpack_from("<4sHB", header)
    assert (signature, revision) == (b"PCMP", 4)
    table = memory.read(gpa, size)
    assert gpa + size <= layout.HIGH_MEMORY_START
    assert sum(table) & 0xFF == 0
    count, local_apic = struct.unpack_from("<HI", header, 34)
    assert local_apic == layout.LOCAL_APIC_BASE
    entries = []
    offset = 44
    while offset < size:
        length = ENTRY_SIZES[table[offset]]
        entries.append(table[offset : offset + length])
        offset += length
    assert offset == size
    assert len(entries) == count
    assert [entry[0] for entry in entries] == sorted(entry[0] for entry in entries)
    return entries


@pytest.mark.parametrize("cpus", [1, 4, 255])
def test_processors(cpus: int) -> None:
    processors = [entry for entry in read_entries(cpus) if entry[0] == 0]
    assert [entry[1] for entry in processors] == list(range(cpus))
    enabled, boot = 1, 2
    assert [entry[3] for entry in processors] == [enabled | boot] + [enabled] * (cpus - 1)


def test_io_apic_and_bus() -> None:
    entries = read_entries(2)
    (bus,) = [entry for entry in entries if entry[0] == 1]
    assert bus[1:] == b"\0ISA   "
    (io_apic,) = [entry for entry in entries if entry[0] == 2]
    assert struct.unpack("<BBBBI", io_apic)[3:] == (1, layout.IOAPIC_BASE)


def test_interrupts() -> None:
    entries = read_entries(1)
    interrupts = [struct.unpack("<BBHBBBB", entry) for entry in entries if entry[0] == 3]
    assert {kind for _, kind, *_ in interrupts} == {0}  # vectored
    assert {flags for _, _, flags, *_ in interrupts} == {0}  # as ISA: edge, active high
    pins = [(irq, pin) for *_, irq, _, pin in interrupts]
    assert pins == [(gsi, gsi) for gsi in (0, 1, *range(3, 16), 16, 23)]
    local = [struct.unpack("<BBHBBBB", entry) for entry in entries if entry[0] == 4]
    ext_int, nmi = 3, 1
    assert [(kind, lint) for _, kind, *_, lint in local] == [(ext_int, 0), (nmi, 1)]


def test_parameters() -> None:
    assert virtio_mmio_parameters(SLOTS[:2]) == [
        "virtio_mmio.device=4K@0xd0000000:16",
        "virtio_mmio.device=4K@0xd0001000:23",
    ]
