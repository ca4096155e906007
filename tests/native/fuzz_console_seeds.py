"""Writes the first inputs of fuzz_console into a directory: visits of hosts, good buffers."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

CHAIN, SEND, READ, CONNECT, LEAVE, DISCONNECT, OPEN, RUN = range(8)
EVENT_IDX, INDIRECT, RAW, WATCH = (1 << n for n in range(4))
SECOND_PORT, BY_64 = 0x10, 0x08
SOCKET, INPUT_PIPE = 0x20, 0x40


def receive(*lengths: int, port: int = 0) -> bytes:
    return bytes([CHAIN | port * 0x20, (len(lengths) - 1) | BY_64, *lengths])


def transmit(*lengths: int, port: int = 0) -> bytes:
    return bytes([CHAIN | 0x10 | port * 0x20, (len(lengths) - 1) | BY_64, *lengths])


def sized(step: int, size: int, port: int = 0) -> bytes:
    return struct.pack("<BH", step | port * SECOND_PORT, size)


def main() -> None:
    directory = Path(sys.argv[1])
    socket, pipe, output = CONNECT | SOCKET, CONNECT | INPUT_PIPE, CONNECT
    is_open = OPEN | 0x20
    run = bytes([RUN])
    steps = {
        "input": bytes([socket, is_open])
        + receive(4)
        + receive(8, 8)
        + sized(SEND, 700)
        + run
        + bytes([LEAVE])
        + run
        + receive(50)
        + run,
        "output": bytes([socket]) + transmit(100, 30) + transmit(1) + run + sized(READ, 9000),
        "held-up": bytes([output]) + transmit(255, 255, 255, 255) * 3 + run + sized(READ, 60000),
        "pipe": bytes([pipe, is_open]) + sized(SEND, 100) + receive(20) + run + bytes([LEAVE]),
        "visit": bytes([socket, LEAVE]) + run + bytes([socket, DISCONNECT]) + run,
        "closed": bytes([socket]) + sized(SEND, 10) + bytes([LEAVE]) + run + bytes([is_open]),
    }
    for setup in (0, EVENT_IDX | WATCH, INDIRECT):
        for name, step in steps.items():
            (directory / f"{name}-{setup}").write_bytes(bytes([setup]) + step + run)
    (directory / "raw").write_bytes(bytes([RAW]) + bytes(range(60)))


main()
