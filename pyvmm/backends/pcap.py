"""Recordings of frames, as pcapng (draft-ietf-opsawg-pcapng), which Wireshark and tcpdump read."""

from __future__ import annotations

import os
import struct

from pyvmm.errors import UsageError

_SECTION_HEADER = 0x0A0D_0D0A
_INTERFACE_DESCRIPTION = 1
_BYTE_ORDER = 0x1A2B_3C4D
_LENGTH_UNKNOWN = 0xFFFF_FFFF_FFFF_FFFF
_ETHERNET = 1
_IF_NAME, _IF_TSRESOL = 2, 9
_SHB_USERAPPL = 4
_NANOSECONDS = b"\x09"


def create_pcap(path: str, interface: str) -> int:
    """Creates (or empties) the file and begins it; `net_pcap_write` adds frames to the result.

    The descriptor belongs to the caller. UsageError when the file cannot be written.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, 0o600)
    except OSError as error:
        raise UsageError(f"the recording {path} cannot be written: {error.strerror}") from None
    section = struct.pack("<IHHQ", _BYTE_ORDER, 1, 0, _LENGTH_UNKNOWN)
    description = struct.pack("<HHI", _ETHERNET, 0, 0)  # frames are recorded whole
    os.write(
        fd,
        _block(_SECTION_HEADER, section, {_SHB_USERAPPL: b"pyvmm"})
        + _block(
            _INTERFACE_DESCRIPTION,
            description,
            {_IF_NAME: interface.encode(), _IF_TSRESOL: _NANOSECONDS},
        ),
    )
    return fd


def _block(kind: int, body: bytes, options: dict[int, bytes]) -> bytes:
    for code, value in options.items():
        body += struct.pack("<HH", code, len(value)) + value + bytes(-len(value) % 4)
    body += bytes(4)  # the end of the options
    length = struct.pack("<I", 12 + len(body))
    return struct.pack("<I", kind) + length + body + length
