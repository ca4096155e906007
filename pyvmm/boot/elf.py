"""What of an ELF vmlinux goes where in guest memory (ELF-64 specification; AMD64 psABI)."""

from __future__ import annotations

import mmap
from typing import IO, cast

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from pyvmm.errors import UsageError

_MAX_PHYSICAL = 1 << 52  # AMD64 APM vol. 2, 5.3: no physical address is wider


class Segment:
    """One PT_LOAD: ``file_size`` bytes at ``offset`` of the file, then zeroes up to ``size``."""

    __slots__ = ("file_size", "gpa", "offset", "size")

    def __init__(self, gpa: int, size: int, offset: int, file_size: int) -> None:
        self.gpa = gpa
        self.size = size
        self.offset = offset
        self.file_size = file_size


def parse_vmlinux(image: mmap.mmap, path: str) -> tuple[int, list[Segment]]:
    """The physical entry address of ``image`` and its loadable segments.

    Raises UsageError when it is not the whole ELF file of an x86-64 kernel.
    """
    try:
        elf = ELFFile(cast("IO[bytes]", image))
        machine, file_type, entry = elf["e_machine"], elf["e_type"], elf["e_entry"]
        segments = [
            Segment(s["p_paddr"], s["p_memsz"], s["p_offset"], s["p_filesz"])
            for s in elf.iter_segments("PT_LOAD")
            if s["p_memsz"]
        ]
    # The last two are what seeking to an impossible offset raises.
    except (ELFError, OverflowError, ValueError):
        raise UsageError(
            f"kernel '{path}' is a damaged ELF file: its headers lead nowhere"
        ) from None
    if elf.elfclass != 64 or machine != "EM_X86_64":
        raise UsageError(
            f"kernel '{path}' is not an x86-64 kernel, and pyvmm boots no other"
            f" (ELF class {elf.elfclass}, machine {machine})"
        )
    if file_type != "ET_EXEC" or not segments:
        raise UsageError(
            f"kernel '{path}' is an ELF file, but not an executable with loadable segments: give a"
            " vmlinux or a bzImage"
        )
    for segment in segments:
        if segment.file_size > segment.size or segment.offset + segment.file_size > len(image):
            raise UsageError(
                f"kernel '{path}' is truncated: a segment of its ELF file ends at byte"
                f" {segment.offset + segment.file_size}, and the file has {len(image)}"
            )
        if segment.gpa + segment.size > _MAX_PHYSICAL:
            raise UsageError(
                f"kernel '{path}' is a damaged ELF file: a segment goes to {segment.gpa:#x}"
            )
    if not any(s.gpa <= entry < s.gpa + s.size for s in segments):
        raise UsageError(
            f"kernel '{path}' has its entry point {entry:#x} outside of its segments: it must be a"
            " physical address"
        )
    return entry, segments
