"""Puts a Linux kernel, its initrd, command line and boot parameters into guest memory.

Source: Linux, Documentation/arch/x86/boot.rst (64-bit boot protocol) and zero-page.rst. A vmlinux
is entered in the same state as a bzImage, at its ELF entry point, to which the kernel's own
decompressor would have jumped.
"""

from __future__ import annotations

import os

from pyvmm import layout
from pyvmm.boot._generated_uapi import LOADED_HIGH, boot_e820_entry, boot_params
from pyvmm.boot.bzimage import BzImage, is_bzimage
from pyvmm.boot.entry import prepare_entry
from pyvmm.boot.files import open_file, read_into
from pyvmm.boot.flat import flat_kernel
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from typing import Literal

    from pyvmm.boot.elf import Segment
    from pyvmm.boot.entry import EntryState
    from pyvmm.boot.memory import GuestMemory

    BootMode = Literal["auto", "bzimage"]

_ELF_MAGIC = b"\x7fELF"
_HEAD_SIZE = 4096  # of a kernel file: the setup header is in it
_ENTRY_64 = 0x200  # boot.rst: the 64-bit entry point, from the start of the loaded code
_HOST_KERNELS = "/boot"
_MIB = 1 << 20

# A vmlinux comes without a setup header that would tell these (arch/x86/boot/header.S).
_CMDLINE_SIZE = 2047
_INITRD_ADDR_MAX = 0x7FFF_FFFF
_BOOT_PROTOCOL = 0x20F

# Documentation/arch/x86/boot.rst
_BOOT_FLAG = 0xAA55
_HEADER_MAGIC = int.from_bytes(b"HdrS", "little")
_LOADER_UNDEFINED = 0xFF
_VID_MODE_NORMAL = 0xFFFF
_E820_RAM = 1
_E820_RESERVED = 2


def load_kernel(
    memory: GuestMemory,
    kernel_path: str,
    initrd_path: str | None,
    command_line: str,
    *,
    boot: BootMode = "auto",
    acpi_rsdp: int | None = None,
) -> EntryState:
    """Fills ``memory``, which must be all zero, for a boot and returns how vCPU 0 starts.

    ``kernel_path`` is a bzImage or an ELF vmlinux. With ``boot="auto"`` a bzImage is unpacked here
    and its vmlinux entered, with ``"bzimage"`` the guest does that itself. ``acpi_rsdp`` is the gpa
    of the ACPI root pointer, None without ACPI.

    Raises UsageError when a file, the command line or the size of the memory cannot work.
    """
    fd = open_file(kernel_path, "kernel")
    try:
        file_size = os.fstat(fd).st_size
        head = os.pread(fd, _HEAD_SIZE, 0).ljust(_HEAD_SIZE, b"\0")
        image: BzImage | None = None
        if is_bzimage(head):
            image = BzImage(head, file_size, kernel_path)
        elif not head.startswith(_ELF_MAGIC):
            raise UsageError(
                f"kernel '{kernel_path}' is neither a Linux bzImage nor an ELF vmlinux"
            )
        elif boot == "bzimage":
            raise UsageError(
                f"kernel '{kernel_path}' is an ELF file, and --boot=bzimage wants a bzImage"
            )
        if image and boot == "bzimage":
            entry, start, end = _load_bzimage(memory, fd, image, kernel_path)
        else:
            entry, start, end = _load_vmlinux(memory, fd, image, file_size, kernel_path)
    finally:
        os.close(fd)

    cmdline_size, initrd_addr_max = _CMDLINE_SIZE, _INITRD_ADDR_MAX
    if image:
        cmdline_size, initrd_addr_max = image.header.cmdline_size, image.header.initrd_addr_max
    initrd = (0, 0)
    if initrd_path is not None:
        initrd = _load_initrd(memory, initrd_path, start, end, initrd_addr_max)
    _write_command_line(memory, command_line, cmdline_size)
    memory.write(layout.ZERO_PAGE, bytes(_zero_page(image, initrd, acpi_rsdp, _e820_map(memory))))
    return prepare_entry(memory, entry, end)


def _load_bzimage(memory: GuestMemory, fd: int, image: BzImage, path: str) -> tuple[int, int, int]:
    """Loads the protected-mode code; returns its 64-bit entry point and the range it needs."""
    start = image.header.pref_address
    end = start + max(image.header.init_size, image.code_size)
    _check_fits(memory, start, end, path)
    read_into(fd, memory.view(start, image.code_size), image.code_offset, path)
    return start + _ENTRY_64, start, end


def _load_vmlinux(
    memory: GuestMemory, fd: int, image: BzImage | None, file_size: int, path: str
) -> tuple[int, int, int]:
    """Loads the vmlinux in a bzImage or ELF file; returns its entry point and its range."""

    def unpacked() -> tuple[mmap.mmap, int, list[Segment]]:
        import mmap

        from pyvmm.boot.elf import parse_vmlinux

        if image:
            from pyvmm.boot.payload import unpack

            payload = bytearray(image.payload_size)
            read_into(fd, memoryview(payload), image.payload_offset, path)
            vmlinux = unpack(payload, path)
        else:
            vmlinux = mmap.mmap(fd, file_size, access=mmap.ACCESS_READ)
        return vmlinux, *parse_vmlinux(vmlinux, path)

    kernel = flat_kernel(fd, unpacked)
    try:
        _check_fits(memory, kernel.start, kernel.end, path)
        kernel.load(memory)
    finally:
        kernel.close()
    return kernel.entry, kernel.start, kernel.end


def _check_fits(memory: GuestMemory, start: int, end: int, path: str) -> None:
    if start < layout.HIGH_MEMORY_START:
        raise UsageError(
            f"kernel '{path}' wants to be loaded at {start:#x}, and the first MiB is taken by boot"
            " data: link it at 1 MiB or above"
        )
    size = memory.ram[0][1]
    if end > size:
        raise UsageError(
            f"the guest has {size // _MIB} MiB of memory below 4 GiB, and kernel '{path}' needs"
            f" {-(-end // _MIB)} MiB to start: give it more with --memory"
        )


def _load_initrd(
    memory: GuestMemory, path: str, kernel_start: int, kernel_end: int, addr_max: int
) -> tuple[int, int]:
    """Loads the initrd as high as allowed, or else below the kernel; returns its gpa and size."""
    fd = open_file(path, "initrd")
    try:
        size = os.fstat(fd).st_size
        if size == 0:
            raise UsageError(f"initrd '{path}' is empty")
        limit = min(memory.ram[0][1], addr_max + 1)
        for start, end in ((kernel_end, limit), (layout.HIGH_MEMORY_START, kernel_start)):
            gpa = (end - size) & -layout.PAGE_SIZE
            if gpa >= start:
                read_into(fd, memory.view(gpa, size), 0, path)
                return gpa, size
    finally:
        os.close(fd)
    raise UsageError(
        f"initrd '{path}' ({size / _MIB:.1f} MiB) does not fit beside the kernel into"
        f" {limit // _MIB} MiB of guest memory: give it more with --memory"
    )


def _write_command_line(memory: GuestMemory, command_line: str, limit: int) -> None:
    data = command_line.encode(errors="surrogateescape")  # the bytes of the command line
    if b"\0" in data:
        raise UsageError("the kernel command line must not contain a NUL character")
    if len(data) > limit:
        raise UsageError(
            f"the kernel command line has {len(data)} bytes, and this kernel takes at most {limit}:"
            " shorten --append"
        )
    memory.write(layout.COMMAND_LINE, data + b"\0")


def _e820_map(memory: GuestMemory) -> list[tuple[int, int, int]]:
    """(gpa, size, type) of each area of the guest's memory map, as the BIOS call would tell it."""
    low_size = memory.ram[0][1]
    areas = [
        (0, layout.LOW_RAM_USABLE_END, _E820_RAM),
        # ACPI and MP tables, where a PC has its BIOS.
        (
            layout.LOW_RAM_USABLE_END,
            layout.HIGH_MEMORY_START - layout.LOW_RAM_USABLE_END,
            _E820_RESERVED,
        ),
        (layout.HIGH_MEMORY_START, low_size - layout.HIGH_MEMORY_START, _E820_RAM),
    ]
    areas += [(gpa, size, _E820_RAM) for gpa, size in memory.ram[1:]]
    return areas


def _zero_page(
    image: BzImage | None,
    initrd: tuple[int, int],
    acpi_rsdp: int | None,
    e820: list[tuple[int, int, int]],
) -> boot_params:
    """The boot parameters, to be put at layout.ZERO_PAGE."""
    params = boot_params()
    header = params.hdr
    if image:
        params.hdr = image.header
    else:
        header.boot_flag = _BOOT_FLAG
        header.header = _HEADER_MAGIC
        header.version = _BOOT_PROTOCOL
    header.vid_mode = _VID_MODE_NORMAL
    header.type_of_loader = _LOADER_UNDEFINED
    header.loadflags = LOADED_HIGH
    header.ramdisk_image, header.ramdisk_size = initrd
    header.cmd_line_ptr = layout.COMMAND_LINE
    params.acpi_rsdp_addr = acpi_rsdp or 0
    params.e820_entries = len(e820)
    for i, area in enumerate(e820):
        params.e820_table[i] = boot_e820_entry(*area)
    return params


def resolve_kernel(kernel: str) -> str:
    """``kernel`` itself, or for ``"host"`` the path of the newest kernel in /boot.

    Only the kernel: the host's initrd is made for the host's own root file system.
    Raises UsageError when there is none, or when it may not be read.
    """
    if kernel != "host":
        return kernel
    try:
        names = [name for name in os.listdir(_HOST_KERNELS) if name.startswith("vmlinuz-")]
    except OSError:
        names = []
    if not names:
        raise UsageError(
            f"there is no kernel {_HOST_KERNELS}/vmlinuz-*: give --kernel the path of one"
        )
    path = f"{_HOST_KERNELS}/{max(names, key=_version_key)}"
    if not os.access(path, os.R_OK):
        raise UsageError(
            f"kernel '{path}' may not be read by this user (some distributions keep it to root):"
            f" run 'sudo chmod a+r {path}', or give --kernel a readable copy"
        )
    return path


def _version_key(name: str) -> list[tuple[int, str]]:
    """Sorts 6.12.9 before 6.12.10: runs of digits by value, what is between them as text."""
    import re

    return [(int(run or 0), text) for run, text in re.findall(r"(\d+)|(\D+)", name)]
