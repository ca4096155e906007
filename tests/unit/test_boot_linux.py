"""Kernel, initrd, command line and boot parameters in guest memory; every bad file there is."""

from __future__ import annotations

import gzip
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import kernel_images as images
from support.kernel_images import LOAD_GPA, Load, Memory

from pyvmm import layout
from pyvmm.boot import entry, linux
from pyvmm.boot._generated_uapi import boot_params
from pyvmm.boot.linux import load_kernel, resolve_kernel
from pyvmm.errors import UsageError

MIB = 1 << 20
SEGMENTS = (
    Load(LOAD_GPA, b"\x90" * 5000),
    Load(LOAD_GPA + 0x10000, b"data" + bytes(300_000) + b"more data", size=400_000),
)
VMLINUX = images.elf(SEGMENTS, entry=LOAD_GPA + 16)
KERNEL_END = LOAD_GPA + 0x10000 + 400_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of flat kernels, empty at first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyvmm" / "kernels"


@pytest.fixture
def memory() -> Memory:
    return Memory(32 * MIB)


def zero_page(memory: Memory) -> boot_params:
    return boot_params.from_buffer_copy(memory.read(layout.ZERO_PAGE, layout.PAGE_SIZE))


def check_vmlinux_loaded(memory: Memory) -> None:
    for load in SEGMENTS:
        size = max(load.size, len(load.data))
        assert memory.read(load.gpa, size) == load.data.ljust(size, b"\0")


# What works


def test_vmlinux(tmp_path: Path, memory: Memory) -> None:
    state = load_kernel(memory, images.file(tmp_path, VMLINUX), None, "console=ttyS0")
    assert state.rip == LOAD_GPA + 16
    assert state.rsi == layout.ZERO_PAGE
    check_vmlinux_loaded(memory)
    header = zero_page(memory).hdr
    assert header.header == int.from_bytes(b"HdrS", "little")
    assert header.boot_flag == 0xAA55
    assert header.type_of_loader == 0xFF
    assert header.loadflags & 1
    assert memory.read(header.cmd_line_ptr, 14) == b"console=ttyS0\0"
    assert (header.ramdisk_image, header.ramdisk_size) == (0, 0)


def test_bzimage_is_unpacked_and_its_vmlinux_entered(tmp_path: Path, memory: Memory) -> None:
    image = images.bzimage(gzip.compress(VMLINUX), cmdline_size=255)
    state = load_kernel(memory, images.file(tmp_path, image), None, "", acpi_rsdp=0xE0000)
    assert state.rip == LOAD_GPA + 16
    check_vmlinux_loaded(memory)
    params = zero_page(memory)
    assert params.hdr.cmdline_size == 255  # the image's own header is passed on
    assert params.acpi_rsdp_addr == 0xE0000
    assert params.sentinel == 0


def test_bzimage_entered_itself(tmp_path: Path, memory: Memory, cache: Path) -> None:
    image = images.bzimage(b"payload that only the guest can unpack", setup_sects=3)
    state = load_kernel(memory, images.file(tmp_path, image), None, "", boot="bzimage")
    assert state.rip == LOAD_GPA + 0x200
    code = image[4 * images.SECTOR :]
    assert memory.read(LOAD_GPA, len(code)) == code
    assert not cache.exists()


def test_zero_setup_sectors_mean_four(tmp_path: Path, memory: Memory) -> None:
    image = images.bzimage(b"payload", setup_sects=0)
    load_kernel(memory, images.file(tmp_path, image), None, "", boot="bzimage")
    assert memory.read(LOAD_GPA + 0x240, 7) == b"payload"


def test_signature_after_the_kernel_is_no_part_of_it(tmp_path: Path, memory: Memory) -> None:
    image = images.bzimage(b"payload") + b"a secure boot signature"
    load_kernel(memory, images.file(tmp_path, image), None, "", boot="bzimage")
    size = len(images.bzimage(b"payload")) - 2 * images.SECTOR
    assert memory.read(LOAD_GPA + size, 8) == bytes(8)


def test_fields_younger_than_the_kernel(tmp_path: Path, memory: Memory) -> None:
    image = bytearray(images.bzimage(gzip.compress(VMLINUX), version=0x20C))
    image[0x201] = 0x62  # the header ends at 0x264
    image[0x264:0x270] = b"\xcc" * 12
    load_kernel(memory, images.file(tmp_path, bytes(image)), None, "")
    header = zero_page(memory).hdr
    assert header.init_size == MIB
    assert (header.handover_offset, header.kernel_info_offset) == (0, 0)


def test_registers_and_tables_of_the_64_bit_entry(tmp_path: Path, memory: Memory) -> None:
    state = load_kernel(memory, images.file(tmp_path, VMLINUX), None, "")
    assert state.cr0 & (1 << 31 | 1) == 1 << 31 | 1  # paging, protected mode
    assert state.cr4 == 1 << 5  # PAE
    assert state.efer == 1 << 8 | 1 << 10  # LME, LMA
    assert state.rflags & 1 << 9 == 0  # interrupts off
    assert (state.code.selector, state.data.selector) == (0x10, 0x18)
    gdt = struct.unpack("<6Q", memory.read(state.gdt_base, state.gdt_limit + 1))
    # Flat 64-bit code, flat data (APM vol. 2, 4.8), accessed; a busy TSS of 64 KiB at 0.
    assert gdt == (0, 0, 0x00AF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF, 0x8B00_0000_FFFF, 0)
    for gpa in (0, layout.ZERO_PAGE, LOAD_GPA, KERNEL_END, (1 << 30) - 1):
        assert translate(memory, state.cr3, gpa) == gpa
    assert translate(memory, state.cr3, 1 << 30) is None


def translate(memory: Memory, cr3: int, address: int) -> int | None:
    """The 4-level page walk of a CPU; None where a page is not present."""
    table = cr3
    for shift in (39, 30, 21):
        index = address >> shift & 511
        page = int.from_bytes(memory.read(table + 8 * index, 8), "little")
        if not page & 1:
            return None
        assert page & 2, "not writable"
        table = page & ~0xFFF & (1 << 52) - 1
        if page & 0x80:
            return table & -(1 << shift) | address & (1 << shift) - 1
    raise AssertionError("only large pages are expected")


def test_kernel_above_1_gib_is_mapped() -> None:
    assert len(entry._identity_map((2 << 30) + 1)) == 5 * layout.PAGE_SIZE


@pytest.mark.parametrize("high", [0, 1 << 30])
def test_memory_map(tmp_path: Path, high: int) -> None:
    memory = Memory(32 * MIB, high)
    load_kernel(memory, images.file(tmp_path, VMLINUX), None, "")
    params = zero_page(memory)
    areas = [(e.addr, e.size, e.type) for e in params.e820_table[: params.e820_entries]]
    ram, reserved = 1, 2
    assert areas == [
        (0, 0x9FC00, ram),
        (0x9FC00, 0x60400, reserved),
        (0x100000, 31 * MIB, ram),
        *([(1 << 32, high, ram)] if high else []),
    ]


@pytest.mark.parametrize(
    ("ram", "addr_max", "size", "gpa"),
    [
        (32 * MIB, 0x7FFF_FFFF, 5000, 32 * MIB - 2 * 4096),  # as high as RAM goes
        (32 * MIB, 24 * MIB - 1, 4096, 24 * MIB - 4096),  # as high as the kernel allows
        (20 * MIB, 0x7FFF_FFFF, 15 * MIB, MIB),  # fits only below the kernel
    ],
)
def test_initrd_place(tmp_path: Path, ram: int, addr_max: int, size: int, gpa: int) -> None:
    memory = Memory(ram)
    kernel = images.bzimage(gzip.compress(VMLINUX), initrd_addr_max=addr_max)
    initrd = os.urandom(size)
    paths = images.file(tmp_path, kernel), images.file(tmp_path, initrd, "initrd")
    load_kernel(memory, *paths, "")
    header = zero_page(memory).hdr
    assert (header.ramdisk_image, header.ramdisk_size) == (gpa, size)
    assert memory.read(gpa, size) == initrd
    check_vmlinux_loaded(memory)


# The user's mistakes


def refused(memory: Memory, kernel: str, initrd: str | None = None, **options: object) -> str:
    """The message with which these files are refused."""
    command_line = str(options.pop("command_line", ""))
    with pytest.raises(UsageError) as caught:
        load_kernel(memory, kernel, initrd, command_line, **options)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("what", ["kernel", "initrd"])
def test_files_that_cannot_be_read(tmp_path: Path, memory: Memory, what: str) -> None:
    kernel = images.file(tmp_path, VMLINUX)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path / "missing", f"cannot open {what} '{tmp_path}/missing': No such file"),
        (tmp_path, f"{what} '{tmp_path}' is not a regular file"),
        (fifo, f"{what} '{fifo}' is not a regular file"),
    ):
        files = (str(path), None) if what == "kernel" else (kernel, str(path))
        assert message in refused(memory, *files)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_forbidden_kernel(tmp_path: Path, memory: Memory) -> None:
    path = images.file(tmp_path, VMLINUX)
    Path(path).chmod(0)
    assert "Permission denied" in refused(memory, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "neither a Linux bzImage nor an ELF vmlinux"),
        (b"#!/bin/sh\n", "neither a Linux bzImage nor an ELF vmlinux"),
        (os.urandom(8192), "neither a Linux bzImage nor an ELF vmlinux"),
        (images.elf32(), "is not an x86-64 kernel"),
        (images.elf(machine=183), "is not an x86-64 kernel"),
        (images.elf(file_type=images.ET_DYN), "not an executable with loadable segments"),
        (images.elf(loads=()), "not an executable with loadable segments"),
        (images.elf(entry=0xFFFF_FFFF_8100_0000), "entry point 0xffffffff81000000 outside"),
        (images.elf(loads=[Load(0x1000, b"x")], entry=0x1000), "wants to be loaded at 0x1000"),
        (images.elf(loads=[Load(1 << 60, b"x")], entry=1 << 60), "goes to 0x1000000000000000"),
        (VMLINUX[:20], "damaged ELF file"),
        (VMLINUX[:100], "damaged ELF file"),
        (VMLINUX[:-1], "truncated"),
        (images.bzimage(b"payload", xloadflags=0), "is a 32-bit kernel"),
        (images.bzimage(b"payload", version=0x20B), "boot protocol 2.11"),
        (images.bzimage(b"payload" * 100)[:-100], "truncated"),
        (images.bzimage(b"payload")[:0x210], "truncated"),
        (images.bzimage(b"payload" * 9, payload_offset=0)[:-64] + bytes(64), "unknown way"),
        (images.bzimage(gzip.compress(VMLINUX)[:-9] + bytes(9)), "gzip payload cannot be unpacked"),
        (images.bzimage(gzip.compress(b"no ELF file")), "damaged ELF file"),
    ],
)
def test_bad_kernel(tmp_path: Path, memory: Memory, content: bytes, message: str) -> None:
    path = images.file(tmp_path, content)
    assert message in refused(memory, path)
    assert f"kernel '{path}'" in refused(memory, path)


def test_payload_outside_of_the_image(tmp_path: Path, memory: Memory) -> None:
    image = bytearray(images.bzimage(b"payload"))
    struct.pack_into("<I", image, 0x24C, 1 << 20)
    assert "corrupt" in refused(memory, images.file(tmp_path, bytes(image)))


def test_vmlinux_with_boot_bzimage(tmp_path: Path, memory: Memory) -> None:
    path = images.file(tmp_path, VMLINUX)
    assert "--boot=bzimage wants a bzImage" in refused(memory, path, boot="bzimage")


@pytest.mark.parametrize("boot", ["auto", "bzimage"])
def test_memory_too_small_for_the_kernel(tmp_path: Path, boot: str) -> None:
    vmlinux = images.elf([Load(LOAD_GPA, b"code", size=MIB)])
    path = images.file(tmp_path, images.bzimage(gzip.compress(vmlinux), init_size=MIB))
    message = refused(Memory(17 * MIB - 4096), path, boot=boot)
    assert "has 16 MiB" in message
    assert "needs 17 MiB" in message
    load_kernel(Memory(17 * MIB), path, None, "", boot=boot)  # type: ignore[arg-type]


def test_initrd_that_does_not_fit(tmp_path: Path, memory: Memory) -> None:
    kernel = images.file(tmp_path, VMLINUX)
    initrd = images.file(tmp_path, bytes(16 * MIB), "initrd")
    message = refused(memory, kernel, initrd)
    assert f"initrd '{initrd}' (16.0 MiB) does not fit" in message


def test_empty_initrd(tmp_path: Path, memory: Memory) -> None:
    kernel = images.file(tmp_path, VMLINUX)
    assert "is empty" in refused(memory, kernel, images.file(tmp_path, b"", "initrd"))


def test_command_line_limit(tmp_path: Path, memory: Memory) -> None:
    path = images.file(tmp_path, images.bzimage(gzip.compress(VMLINUX), cmdline_size=99))
    load_kernel(memory, path, None, "x" * 99)
    assert memory.read(layout.COMMAND_LINE, 100) == b"x" * 99 + b"\0"
    assert "has 100 bytes" in refused(memory, path, command_line="x" * 100)
    assert "at most 99" in refused(memory, path, command_line="\N{SNOWMAN}" * 34)
    vmlinux = images.file(tmp_path, VMLINUX, "vmlinux")
    assert "at most 2047" in refused(memory, vmlinux, command_line="x" * 2048)
    load_kernel(memory, vmlinux, None, "name=\udce4")  # a byte of argv that is no UTF-8
    assert memory.read(layout.COMMAND_LINE, 7) == b"name=\xe4\0"
    assert "NUL" in refused(memory, vmlinux, command_line="a\0b")


DAMAGE_MEMORY = Memory(32 * MIB)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([VMLINUX[:4096], images.bzimage(gzip.compress(VMLINUX[:4096]))]),
    st.lists(st.tuples(st.integers(0, 0x2FF), st.integers(0, 255)), max_size=6),
    st.integers(0, 8192),
)
def test_damaged_headers(
    tmp_path_factory: pytest.TempPathFactory,
    content: bytes,
    changes: list[tuple[int, int]],
    size: int,
) -> None:
    """A damaged file is refused with a message or loaded; nothing else."""
    damaged = bytearray(content)
    for offset, byte in changes:
        damaged[offset % len(damaged)] = byte
    path = images.file(tmp_path_factory.getbasetemp(), bytes(damaged[:size]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", "/dev/null")  # a cache that cannot be written
        try:
            load_kernel(DAMAGE_MEMORY, path, None, "")
        except UsageError as error:
            assert path in str(error)


# --kernel host


def test_host_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_HOST_KERNELS", str(tmp_path))
    assert resolve_kernel("a/path") == "a/path"
    with pytest.raises(UsageError, match="there is no kernel"):
        resolve_kernel("host")
    for version in ("6.1.0-50-amd64", "6.12.9-amd64", "6.12.10-amd64", "0-rescue-5f3b"):
        (tmp_path / f"vmlinuz-{version}").touch()
    (tmp_path / "initrd.img-6.13").touch()
    assert resolve_kernel("host") == str(tmp_path / "vmlinuz-6.12.10-amd64")


def test_unreadable_host_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_HOST_KERNELS", str(tmp_path))
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    (tmp_path / "vmlinuz-6.8").touch()
    with pytest.raises(UsageError, match=r"vmlinuz-6.8' may not be read.*chmod a\+r"):
        resolve_kernel("host")


def test_no_boot_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linux, "_HOST_KERNELS", str(tmp_path / "missing"))
    with pytest.raises(UsageError, match="there is no kernel"):
        resolve_kernel("host")
