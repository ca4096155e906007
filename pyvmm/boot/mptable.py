"""The machine for kernels without ACPI: an MP table, and a parameter for each virtio device.

Source: Intel MultiProcessor Specification 1.4, chapter 4.
"""

from __future__ import annotations

import struct

from pyvmm import layout
from pyvmm.boot.acpi import IOAPIC_ID

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from pyvmm.boot.acpi import VirtioSlot
    from pyvmm.boot.memory import GuestMemory

_SPEC_REVISION = 4

# Entry types (4.3) and their flags.
_PROCESSOR = 0
_BUS = 1
_IO_APIC = 2
_IO_INTERRUPT = 3
_LOCAL_INTERRUPT = 4
_CPU_ENABLED = 1 << 0
_CPU_BOOT = 1 << 1
_IO_APIC_ENABLED = 1 << 0
_AS_THE_BUS_DOES = 0  # ISA: edge-triggered, active high

# Interrupt types (table 4-11).
_INT = 0
_NMI = 1
_EXTINT = 3

_LOCAL_APIC_VERSION = 0x14
_IO_APIC_VERSION = 0x11
_CPU_SIGNATURE = 0x600  # family 6; kernels ask CPUID instead
_CPU_FEATURES = 1 << 9 | 1 << 0  # APIC and FPU
_ISA_BUS = 0
_ISA_IRQS = set(range(16)) - {2}  # 2 is where the second PIC is connected
_ALL_LOCAL_APICS = 0xFF


def write_mp_table(memory: GuestMemory, *, cpus: int, virtio: Sequence[VirtioSlot]) -> None:
    """Writes the MP tables of ``cpus`` processors (at most 255) and ``virtio`` devices.

    The floating pointer goes to layout.MP_TABLE, where the last KiB of base memory starts: the
    second place that a kernel searches (chapter 4).
    """
    entries = [
        struct.pack(
            "<BBBBII8x",
            _PROCESSOR,
            cpu,
            _LOCAL_APIC_VERSION,
            _CPU_ENABLED | (0 if cpu else _CPU_BOOT),
            _CPU_SIGNATURE,
            _CPU_FEATURES,
        )
        for cpu in range(cpus)
    ]
    entries += [
        struct.pack("<BB6s", _BUS, _ISA_BUS, b"ISA   "),
        struct.pack(
            "<BBBBI",
            _IO_APIC,
            IOAPIC_ID,
            _IO_APIC_VERSION,
            _IO_APIC_ENABLED,
            layout.IOAPIC_BASE,
        ),
    ]
    # Interrupts above 15 are no ISA interrupts, but their devices behave as if they were.
    for gsi in sorted(_ISA_IRQS | {slot.gsi for slot in virtio}):
        entries.append(_interrupt(_IO_INTERRUPT, _INT, gsi, IOAPIC_ID, gsi))
    for kind, lint in ((_EXTINT, 0), (_NMI, 1)):
        entries.append(_interrupt(_LOCAL_INTERRUPT, kind, 0, _ALL_LOCAL_APICS, lint))

    body = b"".join(entries)
    header_size = 44
    table = bytearray(
        struct.pack(
            "<4sHBB8s12sIHHII",
            b"PCMP",
            header_size + len(body),
            _SPEC_REVISION,
            0,
            b"PYVMM   ",
            b"PYVMM       ",
            0,
            0,
            len(entries),
            layout.LOCAL_APIC_BASE,
            0,
        )
        + body
    )
    table[7] = -sum(table) & 0xFF
    pointer = bytearray(
        struct.pack("<4sIBBB5x", b"_MP_", layout.MP_CONFIG_TABLE, 1, _SPEC_REVISION, 0)
    )
    pointer[10] = -sum(pointer) & 0xFF
    memory.write(layout.MP_TABLE, pointer)
    memory.write(layout.MP_CONFIG_TABLE, table)


def _interrupt(entry: int, kind: int, irq: int, apic: int, pin: int) -> bytes:
    """4.3.4 and 4.3.5: interrupt ``irq`` of the ISA bus arrives at ``pin`` of ``apic``."""
    return struct.pack("<BBHBBBB", entry, kind, _AS_THE_BUS_DOES, _ISA_BUS, irq, apic, pin)


def virtio_mmio_parameters(slots: Iterable[VirtioSlot]) -> list[str]:
    """The parameters that tell a kernel with VIRTIO_MMIO_CMDLINE_DEVICES of its devices."""
    size = layout.VIRTIO_MMIO_STRIDE >> 10
    return [f"virtio_mmio.device={size}K@{slot.gpa:#x}:{slot.gsi}" for slot in slots]
