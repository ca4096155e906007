"""ACPI tables (ACPI 6.5): RSDP, XSDT, FADT, FACS, MADT, DSDT, and an SSDT of the virtio devices.

A machine with the fixed hardware of chapter 4.8, always in ACPI mode: PM1 registers, power button
and system control interrupt are those of ``pyvmm.platform.power``. Section numbers below are of
ACPI 6.5.
"""

from __future__ import annotations

import struct
from collections import namedtuple

from pyvmm import layout
from pyvmm.boot._generated_aml import DSDT, VIRTIO_MMIO

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.boot.memory import GuestMemory

# What the ID register of KVM's I/O APIC reads. Since the Pentium 4, local APICs have an ID space of
# their own, so that CPU 0 may have the same number.
IOAPIC_ID = 0

_OEM_ID = b"PYVMM "
_CREATOR_ID = b"PYVM"
_REVISION = 1  # of what is in the tables and of their creator
_ALIGNMENT = 16

_HEADER = struct.Struct("<4sIBB6s8sI4sI")  # 5.2.6
_CHECKSUM_OFFSET = 9

# FADT flags (table 5.10) and IA-PC boot architecture flags (table 5.11).
_WBINVD = 1 << 0
_PROC_C1 = 1 << 2
_SLP_BUTTON = 1 << 5  # no sleep button among the fixed hardware; the power button is there
_RESET_REG_SUP = 1 << 10
_LEGACY_DEVICES = 1 << 0  # COM1
_VGA_NOT_PRESENT = 1 << 2

# Latencies in us beyond which C2 and C3 are not supported (table 5.9).
_NO_C2 = 101
_NO_C3 = 1001

# MADT (5.2.12): PCAT_COMPAT, structure types, flags.
_DUAL_8259 = 1 << 0
_LOCAL_APIC = 0
_IO_APIC = 1
_INTERRUPT_SOURCE_OVERRIDE = 2
_LOCAL_APIC_NMI = 4
_LOCAL_APIC_ENABLED = 1 << 0
_ACTIVE_HIGH_LEVEL = 0x1 | 0x3 << 2
_ALL_PROCESSORS = 0xFF
_LINT1 = 1

# The placeholders of firmware/virtio-mmio.asl, as they are in its AML. In the extended interrupt
# descriptor (6.4.3.6) the flags are two bytes before the interrupt number.
_NAME_AT = VIRTIO_MMIO.index(b"VXXX")
_UID_AT = VIRTIO_MMIO.index(0xA1A2A3A4.to_bytes(4, "little"))
_ADDRESS_AT = VIRTIO_MMIO.index(0xB1B2B3B4.to_bytes(4, "little"))
_GSI_AT = VIRTIO_MMIO.index(0xC1C2C3C4.to_bytes(4, "little"))
_FLAGS_AT = _GSI_AT - 2
_SHARED = 1 << 3


class VirtioSlot(namedtuple("VirtioSlot", "gpa gsi shared")):
    """A virtio-mmio register page at ``gpa`` and its interrupt; ``shared``: not alone on it."""

    __slots__ = ()


def build_tables(memory: GuestMemory, *, cpus: int, virtio: Sequence[VirtioSlot]) -> int:
    """Writes all tables for ``cpus`` processors (at most 255) and ``virtio`` devices.

    Returns the gpa of the RSDP.
    """
    facs = _facs()
    memory.write(layout.ACPI_FACS, facs)
    next_gpa = layout.ACPI_FACS + len(facs)

    def place(table: bytes) -> int:
        nonlocal next_gpa
        gpa = -(-next_gpa // _ALIGNMENT) * _ALIGNMENT
        next_gpa = gpa + len(table)
        if next_gpa > layout.ACPI_TABLES_END:
            raise ValueError("the ACPI tables do not fit below 1 MiB")
        memory.write(gpa, table)
        return gpa

    dsdt = place(_table(b"DSDT", 2, DSDT))
    tables = [place(_fadt(layout.ACPI_FACS, dsdt)), place(_madt(cpus))]
    if virtio:
        devices = b"".join(_virtio_device(index, slot) for index, slot in enumerate(virtio))
        tables.append(place(_table(b"SSDT", 2, devices)))
    xsdt = place(_table(b"XSDT", 1, struct.pack(f"<{len(tables)}Q", *tables)))
    memory.write(layout.ACPI_RSDP, _rsdp(xsdt))
    return layout.ACPI_RSDP


def waking_vector(memory: GuestMemory) -> int | None:
    """Where vCPU 0 goes on after S3, in real mode (5.2.10); None unless the guest set it to an
    address that real mode reaches.

    The 64-bit vector, which would be entered in protected mode, is not looked at: Linux clears it.
    """
    signature, vector = struct.unpack("<4s8xI", memory.view(layout.ACPI_FACS, 16))
    return vector if signature == b"FACS" and 0 < vector < 1 << 20 else None


def _checksum(data: bytes | bytearray) -> int:
    """What makes the sum of all bytes 0 when it takes the place of a 0."""
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """``body`` after the header that all tables but RSDP and FACS have."""
    table = bytearray(
        _HEADER.pack(
            signature,
            _HEADER.size + len(body),
            revision,
            0,
            _OEM_ID,
            b"PYVMM" + signature[:3],
            _REVISION,
            _CREATOR_ID,
            _REVISION,
        )
        + body
    )
    table[_CHECKSUM_OFFSET] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    """5.2.5.3. There is no RSDT: its address is 0."""
    rsdp = bytearray(struct.pack("<8sB6sBIIQI", b"RSD PTR ", 0, _OEM_ID, 2, 0, 36, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _facs() -> bytes:
    """5.2.10: version 2, no hardware signature, no waking vector, global lock free."""
    return struct.pack("<4sIIIIIQB31x", b"FACS", 64, 0, 0, 0, 0, 0, 2)


def _io_register(port: int, size: int, access: int) -> bytes:
    """5.2.3.2: a generic address structure for ``size`` bytes of I/O space."""
    return struct.pack("<BBBBQ", 1, size * 8, 0, access, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    """5.2.9. SMI_CMD is 0: there is no legacy mode to leave."""
    none = bytes(12)
    byte_access, word_access = 1, 2
    body = struct.pack("<IIBBHIBBBB", facs, dsdt, 0, 0, layout.ACPI_SCI_GSI, 0, 0, 0, 0, 0)
    # PM1a event, PM1b event, PM1a control, PM1b control, PM2, timer, GPE0, GPE1; their lengths.
    body += struct.pack("<8I", layout.PM1_EVENT_PORT, 0, layout.PM1_CONTROL_PORT, 0, 0, 0, 0, 0)
    body += struct.pack("<8B", 4, 2, 0, 0, 0, 0, 0, 0)
    # C2 and C3 latency, flush size and stride, duty offset and width, day and month alarm, century.
    body += struct.pack("<HHHHBBBBB", _NO_C2, _NO_C3, 0, 0, 0, 0, 0, 0, layout.CMOS_CENTURY)
    body += struct.pack("<HB", _LEGACY_DEVICES | _VGA_NOT_PRESENT, 0)
    # Without FIX_RTC: the RTC's alarm wakes through the PM1 registers.
    body += struct.pack("<I", _WBINVD | _PROC_C1 | _SLP_BUTTON | _RESET_REG_SUP)
    body += _io_register(layout.RESET_PORT, 1, byte_access)
    # Reset value, ARM boot flags, minor version, X_FIRMWARE_CTRL (0: the FACS is below 4 GiB).
    body += struct.pack("<BHBQQ", layout.RESET_VALUE, 0, 5, 0, dsdt)
    body += _io_register(layout.PM1_EVENT_PORT, 4, word_access) + none
    body += _io_register(layout.PM1_CONTROL_PORT, 2, word_access) + none
    # PM2, timer, GPE0, GPE1, sleep control, sleep status, hypervisor vendor identity.
    body += 6 * none + b"PYVMM".ljust(8, b"\0")
    return _table(b"FACP", 6, body)


def _madt(cpus: int) -> bytes:
    """5.2.12. ISA interrupts are on the pins of the I/O APIC that have their numbers.

    That is KVM's default routing also for the PIT's interrupt 0, so no override moves it to pin 2.
    """
    body = struct.pack("<II", layout.LOCAL_APIC_BASE, _DUAL_8259)
    for cpu in range(cpus):
        body += struct.pack("<BBBBI", _LOCAL_APIC, 8, cpu, cpu, _LOCAL_APIC_ENABLED)
    body += struct.pack("<BBBBII", _IO_APIC, 12, IOAPIC_ID, 0, layout.IOAPIC_BASE, 0)
    body += struct.pack(
        "<BBBBIH",
        _INTERRUPT_SOURCE_OVERRIDE,
        10,
        0,
        layout.ACPI_SCI_GSI,
        layout.ACPI_SCI_GSI,
        _ACTIVE_HIGH_LEVEL,
    )
    body += struct.pack("<BBBHB", _LOCAL_APIC_NMI, 6, _ALL_PROCESSORS, 0, _LINT1)
    return _table(b"APIC", 5, body)


def _virtio_device(index: int, slot: VirtioSlot) -> bytes:
    """The AML of one virtio-mmio device, named V000, V001, ..."""
    aml = bytearray(VIRTIO_MMIO)
    aml[_NAME_AT : _NAME_AT + 4] = b"V%03X" % index
    struct.pack_into("<I", aml, _UID_AT, index)
    struct.pack_into("<I", aml, _ADDRESS_AT, slot.gpa)
    struct.pack_into("<I", aml, _GSI_AT, slot.gsi)
    if slot.shared:
        aml[_FLAGS_AT] |= _SHARED
    return bytes(aml)
