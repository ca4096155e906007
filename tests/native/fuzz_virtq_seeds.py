"""Writes the first inputs of fuzz_virtq into a directory: queues of a good driver, by shape."""

from __future__ import annotations

import struct
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from support.fake_driver import FakeDriver, ring_config  # noqa: E402

from pyvmm.virtio.reference import Buffer, GuestMemory  # noqa: E402

RAM = 0x800
STEPS = 48  # struct setup of fuzz_virtq.c
POP, PUSH, PUSH_LAST, PUBLISH, DISABLE, ENABLE, ADD, SCRIBBLE = range(8)
PATTERNS = {
    "one-by-one": [DISABLE, POP, PUSH, PUBLISH, ENABLE],
    "batch": [POP, POP, POP, POP, PUSH, PUSH_LAST, PUSH, PUSH, PUBLISH, ENABLE],
    "more": [POP, PUSH, PUBLISH, ADD | 2 << 3, POP, POP, SCRIBBLE | 1 << 3, PUSH | 9 << 3],
}
SHAPES = {
    "direct": ([b"header", b"data"], [1], False),
    "readable": ([b"packet"], [], False),
    "writable": ([], [64, 64], False),
    "indirect": ([b"header", b"data"], [16, 1], True),
}


def main() -> None:
    directory = Path(sys.argv[1])
    for shape, (readable, writable, indirect) in SHAPES.items():
        for pattern, steps in PATTERNS.items():
            for size_log2, features in ((1, 2), (2, 3), (3, 1), (3, 2)):
                ram = bytearray(RAM)
                config = ring_config(1 << size_log2, base=0, event_idx=True, indirect=True)
                buffers = Buffer(0x200, RAM - 0x200)
                driver = FakeDriver(GuestMemory({0: ram}), config, buffers)
                try:
                    while True:
                        driver.submit(readable, writable, indirect)
                except BufferError:
                    pass
                places = (config.desc_gpa, config.avail_gpa, config.used_gpa, RAM - 0x100)
                setup = struct.pack("<BBHHHH", size_log2, features, *places)
                repeated = bytes((steps * STEPS)[:STEPS])
                name = f"{shape}-{pattern}-{size_log2}-{features}"
                (directory / name).write_bytes(setup + repeated + ram)


main()
