"""ACPI tables: read back byte by byte, and by Intel's own tools (acpica-tools)."""

from __future__ import annotations

import itertools
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from support.kernel_images import Memory

from pyvmm import layout
from pyvmm.boot.acpi import VirtioSlot, build_tables, waking_vector

ROOT = Path(__file__).parent.parent.parent
SLOTS = [
    VirtioSlot(layout.VIRTIO_MMIO_BASE, 16, False),
    VirtioSlot(layout.VIRTIO_MMIO_BASE + 0x1000, 5, True),
    VirtioSlot(layout.VIRTIO_MMIO_BASE + 0x2000, 5, True),
]


def needs(tool: str) -> pytest.MarkDecorator:
    reason = f"{tool} is not installed (Debian package acpica-tools)"
    return pytest.mark.skipif(shutil.which(tool) is None, reason=reason)


class Tables(NamedTuple):
    """All tables of a machine, found as a guest finds them."""

    rsdp: bytes
    by_signature: dict[str, bytes]
    gpas: dict[str, int]


def read_tables(cpus: int = 2, virtio: list[VirtioSlot] = SLOTS) -> Tables:
    memory = Memory(1 << 20)
    rsdp_gpa = build_tables(memory, cpus=cpus, virtio=virtio)
    assert rsdp_gpa % 16 == 0
    assert 0xE0000 <= rsdp_gpa < 0x100000  # where kernels search (5.2.5.1)
    rsdp = memory.read(rsdp_gpa, 36)
    tables = Tables(rsdp, {}, {})

    def read(gpa: int) -> bytes:
        signature, length = struct.unpack("<4sI", memory.read(gpa, 8))
        tables.gpas[signature.decode()] = gpa
        table = memory.read(gpa, length)
        tables.by_signature[signature.decode()] = table
        return table

    xsdt = read(struct.unpack_from("<Q", rsdp, 24)[0])
    for (gpa,) in struct.iter_unpack("<Q", xsdt[36:]):
        read(gpa)
    fadt = tables.by_signature["FACP"]
    read(struct.unpack_from("<I", fadt, 36)[0])
    read(struct.unpack_from("<Q", fadt, 140)[0])
    return tables


def test_checksums_and_places() -> None:
    tables = read_tables()
    assert tables.rsdp[:8] == b"RSD PTR "
    assert sum(tables.rsdp[:20]) & 0xFF == 0
    assert sum(tables.rsdp) & 0xFF == 0
    assert set(tables.by_signature) == {"XSDT", "FACP", "APIC", "DSDT", "SSDT", "FACS"}
    for signature, table in tables.by_signature.items():
        if signature != "FACS":  # the only one without
            assert sum(table) & 0xFF == 0
    assert tables.gpas["FACS"] % 64 == 0
    spans = sorted((gpa, gpa + len(tables.by_signature[s])) for s, gpa in tables.gpas.items())
    assert spans[0][0] >= layout.ACPI_RSDP + 36
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] <= layout.ACPI_TABLES_END


def test_fadt_names_the_ports_of_the_platform() -> None:
    fadt = read_tables().by_signature["FACP"]
    assert len(fadt) == 276
    assert struct.unpack_from("<H", fadt, 46)[0] == layout.ACPI_SCI_GSI
    assert struct.unpack_from("<I", fadt, 56)[0] == layout.PM1_EVENT_PORT
    assert struct.unpack_from("<I", fadt, 64)[0] == layout.PM1_CONTROL_PORT
    io_space = 1
    assert fadt[116] == io_space
    assert struct.unpack_from("<Q", fadt, 120)[0] == layout.RESET_PORT
    assert fadt[128] == layout.RESET_VALUE


def test_fadt_tells_of_the_clock() -> None:
    fadt = read_tables().by_signature["FACP"]
    assert fadt[108] == layout.CMOS_CENTURY
    no_rtc, fix_rtc = 1 << 5, 1 << 6
    assert not struct.unpack_from("<H", fadt, 109)[0] & no_rtc
    assert not struct.unpack_from("<I", fadt, 112)[0] & fix_rtc, "its alarm wakes"


@pytest.mark.parametrize(
    ("written", "vector"),
    [(0, None), (0x9_9000, 0x9_9000), (0xF_FFFF, 0xF_FFFF), (0x10_0000, None), (1 << 31, None)],
)
def test_waking_vector(written: int, vector: int | None) -> None:
    memory = Memory(1 << 20)
    assert waking_vector(memory) is None, "a machine without tables"
    build_tables(memory, cpus=1, virtio=[])
    memory.write(layout.ACPI_FACS + 12, written.to_bytes(4, "little"))
    assert waking_vector(memory) == vector


@pytest.mark.parametrize("cpus", [1, 4, 255])
def test_madt(cpus: int) -> None:
    madt = read_tables(cpus).by_signature["APIC"]
    structures = []
    offset = 44
    while offset < len(madt):
        kind, length = madt[offset], madt[offset + 1]
        structures.append((kind, madt[offset + 2 : offset + length]))
        offset += length
    assert [struct.unpack("<BBI", body) for kind, body in structures if kind == 0] == [
        (cpu, cpu, 1) for cpu in range(cpus)
    ]
    assert [struct.unpack("<BBII", body) for kind, body in structures if kind == 1] == [
        (0, 0, layout.IOAPIC_BASE, 0)
    ]
    level_active_high = 0b1101
    assert [struct.unpack("<BBIH", body) for kind, body in structures if kind == 2] == [
        (0, 9, 9, level_active_high)
    ]


def test_machine_without_virtio_devices() -> None:
    assert "SSDT" not in read_tables(virtio=[]).by_signature


def test_more_devices_than_fit() -> None:
    slots = [VirtioSlot(layout.VIRTIO_MMIO_BASE, 16, True)] * 1000
    with pytest.raises(ValueError, match="do not fit"):
        read_tables(virtio=slots)


# With Intel's tools


def run(directory: Path, *command: str) -> str:
    result = subprocess.run(
        command, cwd=directory, capture_output=True, text=True, check=False, timeout=60
    )
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    return output


@needs("iasl")
def test_disassembler_finds_nothing_wrong(tmp_path: Path) -> None:
    for signature, table in read_tables().by_signature.items():
        (tmp_path / f"{signature}.dat").write_bytes(table)
        output = run(tmp_path, "iasl", "-d", f"{signature}.dat")
        for complaint in ("warning", "error", "invalid", "incorrect"):
            assert complaint not in output.lower().replace("0 errors", "")


@needs("iasl")
def test_disassembled_aml_compiles_without_a_warning(tmp_path: Path) -> None:
    tables = read_tables().by_signature
    for signature in ("DSDT", "SSDT"):
        (tmp_path / f"{signature}.dat").write_bytes(tables[signature])
        run(tmp_path, "iasl", "-d", f"{signature}.dat")
        run(tmp_path, "iasl", "-we", "-vi", "-p", "again", f"{signature}.dsl")


@needs("acpiexec")
def test_namespace_loads_and_evaluates(tmp_path: Path) -> None:
    """The interpreter that Linux uses loads the tables and finds the devices."""
    tables = read_tables().by_signature
    for signature in ("DSDT", "SSDT"):
        (tmp_path / f"{signature}.dat").write_bytes(tables[signature])
    script = "; ".join(
        f"evaluate {name}"
        for name in (
            "\\_S3",
            "\\_S5",
            "\\_SB.RTC0._CRS",
            "\\_SB.COM1._CRS",
            "\\_SB.PVPN._HID",
            "\\_SB.PVPN._CRS",
            "\\_SB.V001._HID",
            "\\_SB.V001._UID",
            "\\_SB.V000._CRS",
            "\\_SB.V002._CRS",
        )
    )
    output = run(tmp_path, "acpiexec", "-b", script, "DSDT.dat", "SSDT.dat")
    assert "Exception" not in output
    assert "2 ACPI AML tables successfully acquired and loaded" in output
    answers = [text.split("\n\n")[0] for text in output.split("returned object")[1:]]
    s3, s5, rtc, com1, pvpanic, panic_port, hid, uid, first, last = answers
    assert s3.count(f"[Integer] = {layout.ACPI_S3_SLEEP_TYPE:016X}") == 2
    assert s5.count(f"[Integer] = {layout.ACPI_S5_SLEEP_TYPE:016X}") == 2
    # 6.4.2.5: an I/O port descriptor; 6.4.2.1: an IRQ mask.
    assert "47 01 70 00 70 00 01 02 22 00 01" in rtc
    assert "47 01 F8 03 F8 03 01 08 22 10 00" in com1
    assert "QEMU0001" in pvpanic
    assert "47 01 05 05 05 05 01 01" in panic_port
    assert "LNRO0005" in hid
    assert "[Integer] = 0000000000000001" in uid
    # 6.4.3.4: 4 KiB at the address; 6.4.3.6: consumer, edge, active high, (not) shared, GSI.
    assert resource(first) == (0xD000_0000, 0x1000, 0b0011, 16)
    assert resource(last) == (0xD000_2000, 0x1000, 0b1011, 5)


def resource(answer: str) -> tuple[int, int, int, int]:
    """Address, length, interrupt flags and GSI in a _CRS as acpiexec prints it."""
    lines = [line.split(":")[1].split("//")[0] for line in answer.splitlines() if "//" in line]
    data = bytes.fromhex("".join(lines))
    memory_descriptor, interrupt_descriptor = 0x86, 0x89
    tag, _, _, base, length, interrupt_tag, _, flags, count, gsi = struct.unpack_from(
        "<BHBIIBHBBI", data
    )
    assert (tag, interrupt_tag, count) == (memory_descriptor, interrupt_descriptor, 1)
    return base, length, flags, gsi


@needs("iasl")
def test_committed_aml_is_what_firmware_compiles_to(tmp_path: Path) -> None:
    run(tmp_path, sys.executable, str(ROOT / "scripts" / "build-firmware"), "--check")
