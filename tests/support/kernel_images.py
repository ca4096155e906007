"""Tiny kernel files, as correct or as damaged as a test wants them, and RAM to load them into."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

SECTOR = 512
LOAD_GPA = 0x100_0000
EM_386 = 3
EM_X86_64 = 62
ET_EXEC = 2
ET_DYN = 3


class Memory:
    """Guest RAM in a bytearray: ``size`` bytes from 0, and optionally some from 4 GiB."""

    def __init__(self, size: int, high: int = 0) -> None:
        self.ram = [(0, size)] + ([(1 << 32, high)] if high else [])
        self._bytes = memoryview(bytearray(size))

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        self.view(gpa, len(data))[:] = data

    def view(self, gpa: int, size: int) -> memoryview:
        if gpa + size > len(self._bytes):
            raise ValueError(f"{size} bytes at {gpa:#x} are not RAM")
        return self._bytes[gpa : gpa + size]

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.view(gpa, size))


class Load(NamedTuple):
    """A PT_LOAD segment: ``data``, then zeroes up to ``size`` bytes (0: no more than the data)."""

    gpa: int
    data: bytes
    size: int = 0


def elf(
    loads: Iterable[Load] = (Load(LOAD_GPA, b"kernel code"),),
    *,
    entry: int = LOAD_GPA,
    machine: int = EM_X86_64,
    file_type: int = ET_EXEC,
) -> bytes:
    """An ELF-64 file without sections (ELF-64 object file format, version 1.5)."""
    loads = list(loads)
    header_size, entry_size = 64, 56
    offset = header_size + entry_size * len(loads)
    headers = data = b""
    for load in loads:
        size = max(load.size, len(load.data))
        headers += struct.pack(
            "<IIQQQQQQ", 1, 7, offset + len(data), load.gpa, load.gpa, len(load.data), size, 1
        )
        data += load.data
    ident = b"\x7fELF" + bytes([2, 1, 1]) + bytes(9)
    header = ident + struct.pack(
        "<HHIQQQIHHHHHH",
        file_type,
        machine,
        1,
        entry,
        header_size,
        0,
        0,
        header_size,
        entry_size,
        len(loads),
        64,
        0,
        0,
    )
    return header + headers + data


def elf32() -> bytes:
    """The header of a 32-bit x86 executable."""
    ident = b"\x7fELF" + bytes([1, 1, 1]) + bytes(9)
    fields = (ET_EXEC, EM_386, 1, LOAD_GPA, 52, 0, 0, 52, 32, 0, 40, 0, 0)
    return ident + struct.pack("<HHIIIIIHHHHHH", *fields)


def bzimage(
    payload: bytes,
    *,
    version: int = 0x20F,
    xloadflags: int = 1,
    init_size: int = 1 << 20,
    pref_address: int = LOAD_GPA,
    cmdline_size: int = 2047,
    initrd_addr_max: int = 0x7FFF_FFFF,
    setup_sects: int = 1,
    payload_offset: int = 0x240,
) -> bytes:
    """A bzImage around ``payload`` (Documentation/arch/x86/boot.rst of the Linux kernel)."""
    code = bytes(payload_offset) + payload
    code += bytes(-len(code) % 16)
    head = bytearray((1 + (setup_sects or 4)) * SECTOR)
    head[0x1F1] = setup_sects
    struct.pack_into("<I", head, 0x1F4, len(code) // 16)
    struct.pack_into("<H", head, 0x1FE, 0xAA55)
    head[0x200:0x202] = b"\xeb\x6a"
    struct.pack_into("<4sH", head, 0x202, b"HdrS", version)
    struct.pack_into("<I", head, 0x22C, initrd_addr_max)
    struct.pack_into("<H", head, 0x236, xloadflags)
    struct.pack_into("<I", head, 0x238, cmdline_size)
    struct.pack_into("<II", head, 0x248, payload_offset, len(payload))
    struct.pack_into("<QI", head, 0x258, pref_address, init_size)
    return bytes(head) + code


def with_length(compress: Callable[[bytes], bytes], data: bytes) -> bytes:
    """A payload as the kernel's build makes it: compressed, then the unpacked length."""
    return compress(data) + struct.pack("<I", len(data))


def file(directory: Path, data: bytes, name: str = "kernel") -> str:
    """The path of a new file with these contents."""
    path = directory / name
    path.write_bytes(data)
    return str(path)
