"""The setup header of a bzImage: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"."""

from __future__ import annotations

from ctypes import sizeof

from pyvmm.boot._generated_uapi import XLF_KERNEL_64, setup_header
from pyvmm.errors import UsageError

_HEADER_OFFSET = 0x1F1  # of struct setup_header in the file
_JUMP_OFFSET = 0x201  # the operand of a short jump over the header, relative to its own end
_MAGIC_OFFSET = 0x202
_SECTOR = 512
_MIN_VERSION = 0x20C  # the first with xloadflags (Linux 3.8)


def is_bzimage(head: bytes) -> bool:
    """Whether a file that starts with ``head`` carries a Linux/x86 setup header."""
    return head[_MAGIC_OFFSET : _MAGIC_OFFSET + 4] == b"HdrS"


class BzImage:
    """Where the parts of a bzImage are in its file; all offsets and sizes in bytes.

    ``header`` is its setup header, ``code_offset`` and ``code_size`` tell of the protected-mode
    kernel, ``payload_offset`` and ``payload_size`` of the compressed vmlinux in it.
    """

    __slots__ = ("code_offset", "code_size", "header", "payload_offset", "payload_size")

    def __init__(self, head: bytes, file_size: int, path: str) -> None:
        """Parses the first 4 KiB of the image at ``path``.

        Raises UsageError when it is not a whole image of a 64-bit kernel.
        """
        if file_size < _HEADER_OFFSET + sizeof(setup_header):
            raise UsageError(f"kernel '{path}' is truncated: it ends within its setup header")
        # boot.rst: the header ends where the jump at its start goes. Its fields that are younger
        # than the kernel are 0.
        own = head[: _MAGIC_OFFSET + head[_JUMP_OFFSET]].ljust(len(head), b"\0")
        self.header = header = setup_header.from_buffer_copy(own, _HEADER_OFFSET)
        if header.version < _MIN_VERSION:
            version = f"{header.version >> 8}.{header.version & 0xFF:02}"
            raise UsageError(
                f"kernel '{path}' speaks boot protocol {version}, and 2.12 is the oldest that pyvmm"
                " knows: use Linux 3.8 or newer"
            )
        if not header.xloadflags & XLF_KERNEL_64:
            raise UsageError(f"kernel '{path}' is a 32-bit kernel: pyvmm boots x86-64 kernels only")
        # boot.rst: "for backwards compatibility, if the setup_sects field contains 0, the real
        # value is 4".
        self.code_offset = ((header.setup_sects or 4) + 1) * _SECTOR
        self.code_size = header.syssize * 16
        self.payload_offset = self.code_offset + header.payload_offset
        self.payload_size = header.payload_length
        # syssize counts paragraphs of 16 bytes, so that the last one may be short.
        if self.code_offset + self.code_size - 15 > file_size:
            raise UsageError(
                f"kernel '{path}' is truncated: its header tells of"
                f" {self.code_offset + self.code_size} bytes, and it has {file_size}"
            )
        self.code_size = min(self.code_size, file_size - self.code_offset)
        if header.payload_offset + self.payload_size > self.code_size:
            raise UsageError(f"kernel '{path}' is corrupt: its payload lies outside of the file")
