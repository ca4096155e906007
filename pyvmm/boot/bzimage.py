"""The setup header of a bzImage: Documentation/arch/x86/boot.rst, "The Real-Mode Kernel Header"."""

from __future__ import annotations

import struct

from pyvmm.errors import UsageError

# Offsets in the image and in struct boot_params alike.
HEADER_START = 0x1F1
_SETUP_SECTS = 0x1F1
_SYSSIZE = 0x1F4
_JUMP_LENGTH = 0x201  # operand of the short jump over the header: where the header ends
_MAGIC = 0x202
_VERSION = 0x206
_INITRD_ADDR_MAX = 0x22C
_XLOADFLAGS = 0x236
_CMDLINE_SIZE = 0x238
_PAYLOAD_OFFSET = 0x248
_PREF_ADDRESS = 0x258

_SECTOR = 512
_MIN_VERSION = 0x20C  # the first with xloadflags (Linux 3.8)
_XLF_KERNEL_64 = 1 << 0


def is_bzimage(head: bytes) -> bool:
    """Whether a file that starts with ``head`` carries a Linux/x86 setup header."""
    return head[_MAGIC : _MAGIC + 4] == b"HdrS"


class SetupHeader:
    """The fields of the setup header that a 64-bit boot needs.

    ``raw`` is the header itself, to be copied to the same offset of the zero page.
    ``code_offset``/``code_size`` tell where in the file the protected-mode kernel is,
    ``payload_offset``/``payload_size`` where the compressed vmlinux is.
    """

    __slots__ = (
        "cmdline_size",
        "code_offset",
        "code_size",
        "init_size",
        "initrd_addr_max",
        "payload_offset",
        "payload_size",
        "pref_address",
        "raw",
    )

    def __init__(self, head: bytes, file_size: int, path: str) -> None:
        """Parses the first 4 KiB of the image at ``path``.

        Raises UsageError when it is not a whole image of a 64-bit kernel.
        """
        (version,) = struct.unpack_from("<H", head, _VERSION)
        if version < _MIN_VERSION:
            raise UsageError(
                f"kernel '{path}' speaks boot protocol {version >> 8}.{version & 0xFF:02}, and"
                " 2.12 is the oldest that pyvmm knows: use Linux 3.8 or newer"
            )
        (xloadflags,) = struct.unpack_from("<H", head, _XLOADFLAGS)
        if not xloadflags & _XLF_KERNEL_64:
            raise UsageError(f"kernel '{path}' is a 32-bit kernel: pyvmm boots x86-64 kernels only")
        self.raw = head[HEADER_START : _MAGIC + head[_JUMP_LENGTH]]
        # boot.rst: "for backwards compatibility, if the setup_sects field contains 0, the real
        # value is 4".
        self.code_offset = ((head[_SETUP_SECTS] or 4) + 1) * _SECTOR
        self.code_size = struct.unpack_from("<I", head, _SYSSIZE)[0] * 16
        (self.initrd_addr_max,) = struct.unpack_from("<I", head, _INITRD_ADDR_MAX)
        (self.cmdline_size,) = struct.unpack_from("<I", head, _CMDLINE_SIZE)
        offset, self.payload_size = struct.unpack_from("<II", head, _PAYLOAD_OFFSET)
        self.payload_offset = self.code_offset + offset
        self.pref_address, self.init_size = struct.unpack_from("<QI", head, _PREF_ADDRESS)
        # syssize counts paragraphs of 16 bytes and is rounded up, so the last one may be short.
        if self.code_offset + self.code_size - 15 > file_size:
            raise UsageError(
                f"kernel '{path}' is truncated: its header tells of"
                f" {self.code_offset + self.code_size} bytes, and it has {file_size}"
            )
        self.code_size = min(self.code_size, file_size - self.code_offset)
        if self.payload_offset + self.payload_size > self.code_offset + self.code_size:
            raise UsageError(f"kernel '{path}' is corrupt: its payload lies outside of the file")
