"""A SCSI disk against a model of one: a bytearray, and what SBC-3 says of each command."""

from __future__ import annotations

import struct
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from support.scsi_driver import CHECK_CONDITION, GOOD, ScsiDriver

from pyvmm.backends.disk import open_image
from pyvmm.backends.scsi.command import CommandThread
from pyvmm.backends.scsi.disk import ScsiDisk
from pyvmm.virtio.scsi import VirtioScsi

BLOCKS = 64
BLOCK = 512
OUT_OF_RANGE, MISCOMPARE, INVALID_FIELD = (5, 0x21, 0), (0xE, 0x1D, 0), (5, 0x24, 0)

READ, WRITE, VERIFY = (
    {6: 0x08, 10: 0x28, 12: 0xA8, 16: 0x88},
    {6: 0x0A, 10: 0x2A, 12: 0xAA, 16: 0x8A},
    {10: 0x2F, 12: 0xAF, 16: 0x8F},
)
WRITE_SAME = {10: 0x41, 16: 0x93}


class Operation(NamedTuple):
    kind: str
    size: int  # of the CDB
    lba: int
    blocks: int
    fill: int
    flag: bool
    cut: int  # where the buffers are divided


def operations() -> st.SearchStrategy[Operation]:
    return st.builds(
        Operation,
        st.sampled_from(("read", "write", "verify", "same", "unmap", "flush")),
        st.sampled_from((6, 10, 12, 16)),
        st.integers(0, BLOCKS + 2),
        st.integers(0, 20),
        st.integers(0, 3),
        st.booleans(),
        st.integers(0, 5000),
    )


def cdb_of(opcode: int, size: int, lba: int, blocks: int, flags: int) -> bytes:
    if size == 6:
        return bytes((opcode,)) + lba.to_bytes(3) + bytes((blocks, 0))
    if size == 10:
        return struct.pack(">BBIxHx", opcode, flags, lba, blocks)
    if size == 12:
        return struct.pack(">BBIIxx", opcode, flags, lba, blocks)
    return struct.pack(">BBQIxx", opcode, flags, lba, blocks)


class Model:
    """Executes operations on a device and on a bytearray, and compares what comes of it."""

    def __init__(self, driver: ScsiDriver) -> None:
        self.driver = driver
        self.contents = bytearray(BLOCKS * BLOCK)

    def run(self, operation: Operation) -> None:
        kind, size, lba, blocks, fill, flag, _ = operation
        start, end = lba * BLOCK, (lba + blocks) * BLOCK
        beyond = lba + blocks > BLOCKS
        data = bytes((fill,)) * (blocks * BLOCK)
        if kind == "read":
            if size == 6 and blocks == 0:
                return  # stands for 256
            flags = 0x08 if flag else 0
            expected = b"" if beyond else bytes(self.contents[start:end])
            cdb = cdb_of(READ[size], size, lba, blocks, flags)
            self.check(operation, cdb, OUT_OF_RANGE if beyond else None, expected=expected)
        elif kind == "write":
            if size == 6 and blocks == 0:
                return
            flags = 0x18 if flag else 0
            cdb = cdb_of(WRITE[size], size, lba, blocks, flags)
            self.check(operation, cdb, OUT_OF_RANGE if beyond else None, out=data)
            if not beyond:
                self.contents[start:end] = data
        elif kind == "verify":
            size = max(size, 10)
            cdb = cdb_of(VERIFY[size], size, lba, blocks, 0x02 if flag else 0)
            refusal = None
            if beyond:
                refusal = OUT_OF_RANGE
            elif flag and data != self.contents[start:end]:
                refusal = MISCOMPARE
            self.check(operation, cdb, refusal, out=data if flag else b"")
        elif kind == "same":
            size = 16 if size > 10 else 10
            cdb = cdb_of(WRITE_SAME[size], size, lba, blocks, 0x08 if flag else 0)
            refusal = INVALID_FIELD if blocks == 0 else OUT_OF_RANGE if beyond else None
            self.check(operation, cdb, refusal, out=bytes((fill,)) * BLOCK)
            if refusal is None:
                self.contents[start:end] = data
        elif kind == "unmap":
            ranges = [(lba, blocks), (0, fill)]
            listed = b"".join(struct.pack(">QIxxxx", *each) for each in ranges)
            body = struct.pack(">HHxxxx", len(listed) + 6, len(listed)) + listed
            cdb = struct.pack(">BxxxxxxHx", 0x42, len(body))
            self.check(operation, cdb, OUT_OF_RANGE if beyond else None, out=body)
            if not beyond:
                # Whole blocks of the file system become zero; ours are smaller, and all do here.
                for first, count in ranges:
                    self.contents[first * BLOCK : (first + count) * BLOCK] = bytes(count * BLOCK)
        else:
            cdb = struct.pack(">BBIxHx", 0x35, 0x02 if flag else 0, lba, blocks)
            self.check(operation, cdb, OUT_OF_RANGE if beyond else None)

    def check(
        self,
        operation: Operation,
        cdb: bytes,
        refusal: tuple[int, int, int] | None,
        *,
        out: bytes = b"",
        expected: bytes = b"",
    ) -> None:
        into = operation.blocks * BLOCK if operation.kind == "read" else 0
        cut = operation.cut
        reply = self.driver.command(
            cdb,
            out=(out[:cut], out[cut:]),
            into=(min(cut, into), into - min(cut, into)),
        )
        assert reply.response == 0
        if refusal is None:
            assert (reply.status, reply.transferred) == (GOOD, len(out) + len(expected))
            assert reply.data == expected
        else:
            assert (reply.status, reply.code) == (CHECK_CONDITION, refusal)
            assert reply.transferred == 0


@settings(max_examples=60, deadline=None)
@given(st.lists(operations(), max_size=25))
def test_a_disk_is_a_row_of_blocks(sequence: list[Operation]) -> None:
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        path = Path(directory) / "disk.img"
        path.write_bytes(bytes(BLOCKS * BLOCK))
        image = stack.enter_context(open_image(path))
        commands = CommandThread()
        stack.callback(commands.close)
        unit = ScsiDisk(image, commands, serial="model")
        stack.callback(unit.close)
        device = VirtioScsi()
        device.plug(0, 0, unit)
        driver = stack.enter_context(ScsiDriver(device))
        driver.settle()
        model = Model(driver)
        for operation in sequence:
            model.run(operation)
        assert path.read_bytes() == bytes(model.contents)
