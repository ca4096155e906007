"""The state of vCPU 0 when it enters the kernel in 64-bit mode.

As the 64-bit boot protocol wants it (Linux, Documentation/arch/x86/boot.rst): paging on with an
identity mapping, flat segments, interrupts off, RSI = the zero page.
"""

from __future__ import annotations

import struct

from pyvmm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.memory import GuestMemory

# AMD64 Architecture Programmer's Manual vol. 2: 3.1 (control registers), 4.8 (long-mode
# descriptors), 5.3 (long-mode page translation).
_CR0_PE = 1 << 0
_CR0_ET = 1 << 4
_CR0_PG = 1 << 31
_CR4_PAE = 1 << 5
_EFER_LME = 1 << 8
_EFER_LMA = 1 << 10
_PAGE_PRESENT_WRITABLE = 0x03
_PAGE_LARGE = 0x80
_LARGE_PAGE_SIZE = 2 << 20
_GIB = 1 << 30


class SegmentRegister:
    """A flat segment register; the fields are those of struct kvm_segment (asm/kvm.h)."""

    __slots__ = ("base", "db", "dpl", "g", "l", "limit", "present", "s", "selector", "type")

    def __init__(self, *, selector: int, type: int, s: int, db: int, long: int, limit: int) -> None:
        self.base = 0
        self.limit = limit  # bytes; the granularity bit follows from it
        self.selector = selector
        self.type = type
        self.present = 1
        self.dpl = 0
        self.db = db
        self.s = s
        self.l = long
        self.g = int(limit > 0xF_FFFF)

    def descriptor(self) -> int:
        """The 8 bytes of its entry in the GDT (AMD64 APM vol. 2, 4.7 and 4.8)."""
        limit = self.limit >> 12 if self.g else self.limit
        access = self.type | self.s << 4 | self.dpl << 5 | self.present << 7
        flags = self.l << 1 | self.db << 2 | self.g << 3
        return limit & 0xFFFF | access << 40 | limit >> 16 << 48 | flags << 52


# boot.rst: selectors __BOOT_CS (0x10), execute/read, and __BOOT_DS (0x18), read/write, both flat.
_CODE = SegmentRegister(selector=0x10, type=0xB, s=1, db=0, long=1, limit=0xFFFF_FFFF)
_DATA = SegmentRegister(selector=0x18, type=0x3, s=1, db=1, long=0, limit=0xFFFF_FFFF)
# VM entry wants a busy 64-bit TSS; nothing uses it before the kernel loads its own.
_TASK = SegmentRegister(selector=0x20, type=0xB, s=0, db=0, long=0, limit=0xFFFF)


class EntryState:
    """The registers of vCPU 0 at the kernel's entry; general registers not named here are 0.

    ``code`` is for CS, ``data`` for DS, ES, FS, GS and SS, ``task`` for TR; the IDT is empty.
    """

    __slots__ = (
        "code",
        "cr0",
        "cr3",
        "cr4",
        "data",
        "efer",
        "gdt_base",
        "gdt_limit",
        "rflags",
        "rip",
        "rsi",
        "rsp",
        "task",
    )

    def __init__(self, rip: int) -> None:
        self.rip = rip
        self.rsi = layout.ZERO_PAGE
        self.rsp = layout.BOOT_STACK
        self.rflags = 0x2  # bit 1 is always set; interrupts are off
        self.cr0 = _CR0_PG | _CR0_ET | _CR0_PE
        self.cr3 = layout.BOOT_PAGE_TABLES
        self.cr4 = _CR4_PAE
        self.efer = _EFER_LMA | _EFER_LME
        self.code = _CODE
        self.data = _DATA
        self.task = _TASK
        self.gdt_base = layout.BOOT_GDT
        self.gdt_limit = len(_GDT) - 1


_GDT = struct.pack("<6Q", 0, 0, _CODE.descriptor(), _DATA.descriptor(), _TASK.descriptor(), 0)


def prepare_entry(memory: GuestMemory, rip: int, mapped_end: int) -> EntryState:
    """Writes the GDT and page tables that map at least 0 to ``mapped_end``; returns the state."""
    memory.write(layout.BOOT_GDT, _GDT)
    memory.write(layout.BOOT_PAGE_TABLES, _identity_map(mapped_end))
    return EntryState(rip)


def _identity_map(end: int) -> bytes:
    """Page tables for BOOT_PAGE_TABLES that map all up to ``end``, in whole GiB, to itself."""
    gibs = -(-end // _GIB)
    pml4 = layout.BOOT_PAGE_TABLES
    directories = pml4 + 2 * layout.PAGE_SIZE
    top = memoryview(bytearray(2 * layout.PAGE_SIZE)).cast("Q")
    top[0] = pml4 + layout.PAGE_SIZE | _PAGE_PRESENT_WRITABLE
    for i in range(gibs):
        top[512 + i] = directories + i * layout.PAGE_SIZE | _PAGE_PRESENT_WRITABLE
    flags = _PAGE_PRESENT_WRITABLE | _PAGE_LARGE
    pages = range(flags, gibs * _GIB, _LARGE_PAGE_SIZE)
    return top.tobytes() + struct.pack(f"<{len(pages)}Q", *pages)
