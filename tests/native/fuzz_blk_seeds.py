"""Writes the first inputs of fuzz_blk into a directory: good requests of each type and framing."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, UNSUPPORTED = range(7)
WITH_DATA, DATA_WRITABLE, LENGTH_IN_SECTORS = 0x40, 0x10, 0x08
READ_ONLY, WRITETHROUGH, DIRECT, SNAPSHOT = 16, 32, 8, 128


def chain(kind: int, sector: int, *lengths: int, flags: int = 0, data: bytes = b"") -> bytes:
    """In the form that `add_chain` of fuzz_blk.c reads; the header's length comes first."""
    shape = len(lengths) | flags
    if data:
        shape |= WITH_DATA
        data = data.ljust(64, b"\0")
    return bytes([kind, sector, shape]) + data + bytes([0, *lengths])


def requests() -> dict[str, bytes]:
    zeroes = struct.pack("<QII", 8, 16, 1)
    discard = struct.pack("<QII", 0, 8, 0)
    into = DATA_WRITABLE | LENGTH_IN_SECTORS
    return {
        "read": chain(IN, 1, 4, 1, flags=into),
        "read-split": chain(IN, 1, 4, 4, 1, flags=into),
        "write": chain(OUT, 2, 8, 1, flags=LENGTH_IN_SECTORS, data=b"data"),
        "flush": chain(FLUSH, 0, 1),
        "id": chain(GET_ID, 0, 20, 1, flags=DATA_WRITABLE),
        "discard": chain(DISCARD, 0, 32, 1, data=discard * 2),
        "zeroes": chain(WRITE_ZEROES, 0, 16, 1, data=zeroes),
        "unsupported": chain(UNSUPPORTED, 0, 1),
    }


def main() -> None:
    directory = Path(sys.argv[1])
    for setup in (0, 3, READ_ONLY, WRITETHROUGH | 3, DIRECT, SNAPSHOT | 3, SNAPSHOT | DIRECT):
        for name, request in requests().items():
            (directory / f"{name}-{setup}").write_bytes(bytes([setup]) + request * 3)
        (directory / f"all-{setup}").write_bytes(bytes([setup]) + b"".join(requests().values()))


main()
