"""Writes the first inputs of fuzz_scsi into a directory: each command of a disk and of a CD
drive, with its data.
"""

from __future__ import annotations

import struct
import sys
from pathlib import Path

OUT, LARGE, IN, DATA = 0x01, 0x02, 0x04, 0x40
COMMANDS = 70  # about as many as there are in both tables
READ_ONLY, WRITE_CACHE, DIRECT, BLOCKS_4096 = 16, 32, 8, 4


def chain(
    index: int,
    *,
    lba: int,
    length: int,
    data: bytes = b"",
    into: bool = False,
    address: int = 0,
) -> bytes:
    """In the form that `add_chain` of fuzz_scsi.c reads."""
    shape = LARGE | (OUT | DATA if data else 0) | (IN if into else 0)
    head = bytes([shape, address, 1, index, 0, lba, length])
    head += bytes([8]) if data else b""
    head += bytes([8]) if into else b""
    return head + data.ljust(64, b"\0") if data else head


def main() -> None:
    directory = Path(sys.argv[1])
    unmap = struct.pack(">HHxxxxQIxxxx", 22, 16, 1, 2)
    for setup in (0, 3, READ_ONLY, WRITE_CACHE | 3, DIRECT, BLOCKS_4096):
        for sizes in range(4):
            start = bytes([setup, sizes, 0])
            for index in range(COMMANDS):
                plain = chain(index, lba=1, length=1)
                reading = chain(index, lba=1, length=1, into=True)
                writing = chain(index, lba=1, length=1, data=b"data")
                listing = chain(index, lba=0, length=24, data=unmap)
                from_cdrom = chain(index, lba=1, length=1, into=True, address=7)
                inputs = start + plain + reading + writing + listing + from_cdrom
                (directory / f"{index}-{setup}-{sizes}").write_bytes(inputs)
    (directory / "function").write_bytes(bytes([0, 0, 1, 0x1F]) + chain(3, lba=0, length=1))


main()
