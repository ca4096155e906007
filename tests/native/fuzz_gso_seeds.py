"""Writes the first inputs of fuzz_gso into a directory: messages that need some completion."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

NEEDS_CSUM, TCPV4, TCPV6 = 1, 1, 4


def main() -> None:
    directory = Path(sys.argv[1])
    for name, v6, vlan, gso_type in (
        ("checksum", False, False, 0),
        ("tcp4", False, False, TCPV4),
        ("tcp4-vlan", False, True, TCPV4),
        ("tcp6", True, False, TCPV6),
    ):
        tcp = struct.pack("!HHIIBBHHH", 80, 1234, 1, 2, 5 << 4, 0x19, 500, 0, 0) + bytes(400)
        if v6:
            ip = struct.pack("!IHBB32x", 6 << 28, len(tcp), 6, 64)
        else:
            ip = struct.pack("!BBHHHBBH8x", 0x45, 0, 20 + len(tcp), 1, 0, 64, 6, 0)
        ethernet = bytes(12) + (b"\x81\x00\x00\x01" if vlan else b"")
        ethernet += b"\x86\xdd" if v6 else b"\x08\x00"
        start = len(ethernet) + len(ip)
        header = struct.pack("<BBHHHH", NEEDS_CSUM, gso_type, start + 20, 100, start, 16) + b"\0\0"
        (directory / name).write_bytes(header + ethernet + ip + tcp)


if __name__ == "__main__":
    main()
