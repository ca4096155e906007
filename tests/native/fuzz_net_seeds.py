"""Writes the first inputs of fuzz_net into a directory: good buffers and frames of each kind."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

RX, TX, PEER = range(3)
WITH_HEADER, SIXTEENTHS, WITH_ROOM = 0x40, 0x08, 0x10
EVENT_IDX, INDIRECT, MERGEABLE, VNET_HDR, STREAM, OFFLOADS, RAW, FILTER = (1 << n for n in range(8))
ENGINE = 1 << 8
CSUM = struct.pack("<BBHHHHH", 1, 0, 0, 0, 34, 16, 0)
TSO = struct.pack("<BBHHHHH", 1, 1, 54, 100, 34, 16, 0)


def buffers(*lengths: int) -> bytes:
    return bytes([RX, (len(lengths) - 1) | SIXTEENTHS, *lengths])


def transmit(*lengths: int, header: bytes = b"") -> bytes:
    shape = (len(lengths) - 1) | WITH_ROOM | (WITH_HEADER if header else 0)
    return bytes([TX, shape]) + header + bytes(lengths)


def peer(size: int, start: bytes = b"") -> bytes:
    return struct.pack("<BBH", PEER, 8 if start else 0, size) + start.ljust(30 if start else 0)


def main() -> None:
    directory = Path(sys.argv[1])
    steps = {
        "rx": buffers(100) + peer(80),
        "rx-merged": buffers(4) + buffers(4) + buffers(90) + peer(200),
        "rx-spilled": buffers(4) + peer(1500) + buffers(200) + peer(60),
        "rx-parts": buffers(1, 2, 100) + peer(700, TSO + b"\x52\x54\0\1\2\3"),
        "tx": transmit(60) + transmit(0, 200) + transmit(3, 4, 90),
        "tx-offloads": transmit(200, header=CSUM) + transmit(0, 250, header=TSO),
    }
    for setup in (0, EVENT_IDX | MERGEABLE, VNET_HDR | OFFLOADS | MERGEABLE, FILTER | MERGEABLE):
        for framing in (0, STREAM, ENGINE):
            for name, step in steps.items():
                content = struct.pack("<H", setup | framing) + step * 2
                (directory / f"{name}-{setup | framing}").write_bytes(content)
    (directory / "raw").write_bytes(struct.pack("<H", RAW) + bytes(range(60)))


main()
