"""A SCSI disk as a driver of virtio-scsi sees it, against SPC-4 and SBC-3."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.scsi_driver import (
    CHECK_CONDITION,
    GOOD,
    RESERVATION_CONFLICT,
    Reply,
    ScsiDriver,
    flat,
)

from pyvmm._core import lib
from pyvmm.backends.disk import open_image
from pyvmm.backends.scsi.command import CommandThread
from pyvmm.backends.scsi.disk import ScsiDisk
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio import scsi
from pyvmm.virtio.scsi import FIRST_REQUEST_QUEUE, VirtioScsi

SIZE = 4 << 20
BLOCKS = SIZE // 512
PATTERN = b"".join(struct.pack("<Q", n) for n in range(SIZE // 8))

NO_SENSE = (0, 0, 0)
MEDIUM_READ_ERROR = (3, 0x11, 0)
NOT_READY_STOPPED = (2, 0x04, 0x02)
PARAMETER_LIST_LENGTH = (5, 0x1A, 0)
INVALID_OPCODE = (5, 0x20, 0)
OUT_OF_RANGE = (5, 0x21, 0)
INVALID_IN_CDB = (5, 0x24, 0)
INVALID_IN_LIST = (5, 0x26, 0)
INVALID_RELEASE = (5, 0x26, 0x04)
SAVING_NOT_SUPPORTED = (5, 0x39, 0)
WRITE_PROTECTED = (7, 0x27, 0)
MISCOMPARE = (0xE, 0x1D, 0)
OVERRUN = uapi.VIRTIO_SCSI_S_OVERRUN


class Disk(ScsiDriver):
    """A driver of one disk at 0:0, whose image is at `path`."""

    def __init__(self, device: VirtioScsi, unit: ScsiDisk, path: Path) -> None:
        super().__init__(device)
        self.unit = unit
        self.path = path
        self.settle()

    @property
    def contents(self) -> bytes:
        return self.path.read_bytes()

    def at(self, block: int, count: int = 1) -> bytes:
        return self.contents[block * 512 : (block + count) * 512]

    def ok(self, cdb: bytes, *, out: bytes = b"", into: int = 0) -> bytes:
        """A command that succeeds; its data-in."""
        reply = self.command(cdb, out=out, into=into)
        assert (reply.response, reply.status, reply.code) == (0, GOOD, NO_SENSE)
        return reply.data

    def refused(
        self, cdb: bytes, code: tuple[int, int, int], *, out: bytes = b"", into: int = 0
    ) -> Reply:
        """A command that ends with CHECK CONDITION; no data has moved."""
        reply = self.command(cdb, out=out, into=into)
        assert (reply.response, reply.status, reply.code) == (0, CHECK_CONDITION, code)
        assert reply.transferred == 0
        return reply

    def invalid_cdb(
        self, cdb: bytes, byte: int, bit: int | None, *, out: bytes = b"", into: int = 0
    ) -> None:
        reply = self.refused(cdb, INVALID_IN_CDB, out=out, into=into)
        assert reply.pointer == (True, byte, bit)

    def invalid_list(self, cdb: bytes, out: bytes, byte: int, bit: int | None = None) -> None:
        reply = self.refused(cdb, INVALID_IN_LIST, out=out)
        assert reply.pointer == (False, byte, bit)


@contextmanager
def disk_on(
    path: Path, *, queues: int = 1, readonly: bool = False, writethrough: bool = False
) -> Iterator[Disk]:
    with ExitStack() as stack:
        image = stack.enter_context(open_image(path, readonly=readonly))
        commands = CommandThread()
        stack.callback(commands.close)
        unit = ScsiDisk(image, commands, serial="0123456789", writethrough=writethrough)
        stack.callback(unit.close)
        device = VirtioScsi(queues=queues)
        device.plug(0, 0, unit)
        yield stack.enter_context(Disk(device, unit, path))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture(params=("io_uring", "sync"))
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    name: str = request.param
    error = lib.blk_io_uring_check()
    if name == "io_uring" and error:
        pytest.skip(f"this kernel does not let us use io_uring: {os.strerror(-error)}")
    monkeypatch.setattr(scsi, "choose_engine", lambda in_memory: (name, ""))
    return name


@pytest.fixture
def disk(path: Path) -> Iterator[Disk]:
    with disk_on(path) as disk:
        yield disk


@pytest.fixture
def disk_by(engine: str, path: Path) -> Iterator[Disk]:
    """By each of the engines in turn."""
    with disk_on(path) as disk:
        yield disk


def cdb6(opcode: int, lba: int, count: int) -> bytes:
    return bytes((opcode,)) + lba.to_bytes(3) + bytes((count & 0xFF, 0))


def cdb10(opcode: int, lba: int, count: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIBHB", opcode, flags, lba, 0, count, 0)


def cdb12(opcode: int, lba: int, count: int, flags: int = 0) -> bytes:
    return struct.pack(">BBIIBB", opcode, flags, lba, count, 0, 0)


def cdb16(opcode: int, lba: int, count: int, flags: int = 0) -> bytes:
    return struct.pack(">BBQIBB", opcode, flags, lba, count, 0, 0)


READS = {
    "6": lambda lba, count, flags=0: cdb6(0x08, lba, count),
    "10": lambda lba, count, flags=0: cdb10(0x28, lba, count, flags),
    "12": lambda lba, count, flags=0: cdb12(0xA8, lba, count, flags),
    "16": lambda lba, count, flags=0: cdb16(0x88, lba, count, flags),
}
WRITES = {
    "6": lambda lba, count, flags=0: cdb6(0x0A, lba, count),
    "10": lambda lba, count, flags=0: cdb10(0x2A, lba, count, flags),
    "12": lambda lba, count, flags=0: cdb12(0xAA, lba, count, flags),
    "16": lambda lba, count, flags=0: cdb16(0x8A, lba, count, flags),
}
VERIFIES = {
    "10": lambda lba, count, flags=0: cdb10(0x2F, lba, count, flags),
    "12": lambda lba, count, flags=0: cdb12(0xAF, lba, count, flags),
    "16": lambda lba, count, flags=0: cdb16(0x8F, lba, count, flags),
}
FUA, DPO = 0x08, 0x10


class TestReadsAndWrites:
    @pytest.mark.parametrize("size", READS)
    def test_read(self, disk_by: Disk, size: str) -> None:
        read = READS[size]
        assert disk_by.ok(read(3, 2), into=1024) == PATTERN[1536:2560]
        assert disk_by.ok(read(BLOCKS - 1, 1), into=512) == PATTERN[-512:]

    @pytest.mark.parametrize("size", WRITES)
    def test_write(self, disk_by: Disk, size: str) -> None:
        data = os.urandom(1536)
        disk_by.ok(WRITES[size](5, 3), out=data)
        assert disk_by.contents == PATTERN[:2560] + data + PATTERN[2560 + 1536 :]

    def test_a_length_of_0_is_256_blocks_in_6_bytes_and_none_in_more(self, disk: Disk) -> None:
        disk.refused(READS["6"](BLOCKS - 255, 0), OUT_OF_RANGE, into=512)
        assert disk.command(READS["6"](BLOCKS - 256, 0), into=512).response == OVERRUN
        for size in ("10", "12", "16"):
            assert disk.ok(READS[size](7, 0)) == b""
            assert disk.ok(WRITES[size](BLOCKS, 0)) == b""
        assert disk.contents == PATTERN

    @pytest.mark.parametrize("size", READS)
    def test_beyond_the_end(self, disk: Disk, size: str) -> None:
        for lba, count in ((BLOCKS, 1), (BLOCKS - 1, 2), (BLOCKS + 5, 1)):
            disk.refused(READS[size](lba, count), OUT_OF_RANGE, into=count * 512)
            disk.refused(WRITES[size](lba, count), OUT_OF_RANGE, out=bytes(count * 512))
        if size == "16":
            disk.refused(READS[size](2**64 - 1, 1), OUT_OF_RANGE, into=512)
            disk.refused(READS[size](2**55, 1), OUT_OF_RANGE, into=512)
        assert disk.contents == PATTERN

    def test_fua_and_dpo(self, disk_by: Disk) -> None:
        for size in ("10", "12", "16"):
            assert disk_by.ok(READS[size](1, 1, FUA | DPO), into=512) == PATTERN[512:1024]
            disk_by.ok(WRITES[size](1, 1, FUA | DPO), out=PATTERN[512:1024])

    def test_protection_information_and_groups_are_refused(self, disk: Disk) -> None:
        disk.invalid_cdb(READS["10"](0, 1, 0x20), 1, 5, into=512)
        disk.invalid_cdb(WRITES["16"](0, 1, 0xE0), 1, 7, out=bytes(512))
        group = bytearray(READS["10"](0, 1))
        group[6] = 0x05
        disk.invalid_cdb(bytes(group), 6, 2, into=512)
        naca = bytearray(READS["10"](0, 1))
        naca[9] = 0x04
        disk.invalid_cdb(bytes(naca), 9, 2, into=512)

    def test_longer_than_the_limit(self, disk: Disk) -> None:
        disk.invalid_cdb(READS["16"](0, 65537), 10, 7, into=512)
        disk.invalid_cdb(READS["12"](0, 65537), 6, 7, into=512)

    def test_scattered_buffers(self, disk_by: Disk) -> None:
        data = os.urandom(1024)
        cuts = (data[:1], data[1:300], data[300:])
        assert disk_by.command(WRITES["10"](9, 2), out=cuts).transferred == 1024
        reply = disk_by.command(READS["10"](9, 2), into=(100, 923, 1))
        assert reply.data == data

    def test_write_protection(self, path: Path) -> None:
        with disk_on(path, readonly=True) as disk:
            for write in WRITES.values():
                disk.refused(write(0, 1), WRITE_PROTECTED, out=bytes(512))
            disk.refused(cdb10(0x41, 0, 1), WRITE_PROTECTED, out=bytes(512))
            disk.refused(b"\x04" + bytes(5), WRITE_PROTECTED)
            assert disk.ok(READS["10"](0, 1), into=512) == PATTERN[:512]
            data = disk.ok(b"\x1a\0\x3f\0\xff\0", into=255)
            assert data[2] == 0x90  # WP, DPOFUA
            disk.refused(b"\x42" + bytes(9), INVALID_OPCODE)
            provisioning = disk.ok(b"\x12\x01\xb2\0\xff\0", into=255)
            assert provisioning == b"\x00\xb2\x00\x04\x00\x00\x00\x00"

    def test_an_image_that_became_shorter(self, disk_by: Disk) -> None:
        os.truncate(disk_by.path, SIZE // 2)
        disk_by.refused(READS["10"](BLOCKS - 1, 1), MEDIUM_READ_ERROR, into=512)


class TestDataBuffers:
    def test_more_room_than_needed_is_left_alone(self, disk: Disk) -> None:
        reply = disk.command(READS["10"](2, 1), into=(100, 1000))
        assert (reply.response, reply.transferred, reply.data) == (0, 512, PATTERN[1024:1536])
        assert reply.written == 108 + 512
        reply = disk.command(WRITES["10"](2, 1), out=b"x" * 512 + b"y" * 512)
        assert (reply.response, reply.transferred) == (0, 512)
        assert disk.contents == PATTERN[:1024] + b"x" * 512 + PATTERN[1536:]

    def test_less_than_needed_is_an_overrun(self, disk: Disk) -> None:
        for reply in (
            disk.command(READS["10"](0, 2), into=1023),
            disk.command(READS["10"](0, 1)),
            disk.command(WRITES["10"](0, 2), out=bytes(1023)),
            disk.command(WRITES["10"](0, 1)),
            disk.command(b"\x12\0\0\0\xff\0", into=95),
            disk.command(cdb10(0x41, 0, 1), out=bytes(511)),
            disk.command(b"\x42" + bytes(6) + b"\x00\x18\x00", out=bytes(23)),
        ):
            assert (reply.response, reply.transferred) == (OVERRUN, 0)
        assert disk.contents == PATTERN

    def test_data_in_the_wrong_direction(self, disk: Disk) -> None:
        """A residual tells that none of it was used."""
        reply = disk.command(READS["10"](0, 1), out=bytes(512))
        assert (reply.response, reply.transferred) == (OVERRUN, 0)
        reply = disk.command(WRITES["10"](0, 1), into=512)
        assert (reply.response, reply.transferred) == (OVERRUN, 0)
        reply = disk.command(bytes(6), into=512)
        assert (reply.response, reply.status, reply.transferred) == (0, GOOD, 0)
        reply = disk.command(cdb10(0x35, 0, 0), out=bytes(512))
        assert (reply.response, reply.status, reply.transferred) == (0, GOOD, 0)
        assert disk.contents == PATTERN


class TestVerify:
    @pytest.mark.parametrize("size", VERIFIES)
    def test_the_medium(self, disk_by: Disk, size: str) -> None:
        verify = VERIFIES[size]
        assert disk_by.ok(verify(0, BLOCKS)) == b""
        assert disk_by.ok(verify(0, 0)) == b""
        disk_by.refused(verify(1, BLOCKS), OUT_OF_RANGE)

    @pytest.mark.parametrize("size", VERIFIES)
    def test_bytes(self, disk_by: Disk, size: str) -> None:
        verify, data = VERIFIES[size], PATTERN[512 : 512 + 40 * 512]
        assert disk_by.command(verify(1, 40, 0x02), out=data).transferred == len(data)
        cuts = (data[:700], data[700:701], data[701:])
        assert disk_by.command(verify(1, 40, 0x02), out=cuts).status == GOOD
        wrong = data[:-1] + b"?"
        disk_by.refused(verify(1, 40, 0x02), MISCOMPARE, out=wrong)
        assert disk_by.command(verify(1, 40, 0x02), out=data[:-1]).response == OVERRUN

    def test_many_pieces(self, disk_by: Disk, path: Path) -> None:
        assert disk_by.ok(VERIFIES["16"](3, BLOCKS - 3)) == b""
        os.truncate(path, SIZE // 2)
        disk_by.refused(VERIFIES["16"](3, BLOCKS - 3), MEDIUM_READ_ERROR)

    def test_one_block_against_all(self, disk_by: Disk) -> None:
        block = os.urandom(512)
        disk_by.ok(cdb16(0x93, 8, 1000), out=block)
        disk_by.ok(VERIFIES["10"](8, 1000, 0x06), out=block)
        disk_by.refused(VERIFIES["10"](8, 1001, 0x06), MISCOMPARE, out=block)
        disk_by.refused(VERIFIES["10"](7, 2, 0x06), MISCOMPARE, out=block)

    def test_a_reserved_kind(self, disk: Disk) -> None:
        disk.invalid_cdb(VERIFIES["10"](0, 1, 0x04), 1, 2, out=bytes(512))


class TestWriteSame:
    @pytest.mark.parametrize("opcode", (0x41, 0x93))
    def test_a_pattern(self, disk_by: Disk, opcode: int) -> None:
        block = os.urandom(512)
        cdb = (cdb10 if opcode == 0x41 else cdb16)(opcode, 10, 2000)
        assert disk_by.command(cdb, out=block).transferred == 512
        assert disk_by.contents == PATTERN[:5120] + block * 2000 + PATTERN[5120 + 512 * 2000 :]

    def test_zeroes(self, disk_by: Disk) -> None:
        disk_by.ok(cdb10(0x41, 8, 1024), out=bytes(512))
        assert disk_by.at(7, 1026) == PATTERN[3584:4096] + bytes(1024 * 512) + disk_by.at(1032)

    def test_unmap_gives_space_back_only_for_zeroes(self, disk_by: Disk) -> None:
        before = disk_by.path.stat().st_blocks
        disk_by.ok(cdb16(0x93, 0, 4096, 0x08), out=bytes(512))
        assert disk_by.path.stat().st_blocks <= before - 4096
        disk_by.ok(cdb16(0x93, 4096, 8, 0x08), out=b"\1" * 512)
        assert disk_by.contents == bytes(4096 * 512) + b"\1" * 4096 + PATTERN[4104 * 512 :]

    def test_without_a_data_out_buffer(self, disk_by: Disk) -> None:
        disk_by.ok(cdb16(0x93, 1, 3, 0x01))  # NDOB
        disk_by.ok(cdb16(0x93, 8, 8, 0x09))  # NDOB, UNMAP
        assert disk_by.at(0, 17) == (
            PATTERN[:512] + bytes(1536) + PATTERN[2048:4096] + bytes(4096) + PATTERN[8192:8704]
        )
        disk_by.invalid_cdb(cdb10(0x41, 0, 1, 0x01), 1, 0)

    def test_limits(self, disk: Disk) -> None:
        """WSNZ: a length of 0 does not stand for all that follows."""
        disk.invalid_cdb(cdb10(0x41, 0, 0), 7, 7, out=bytes(512))
        disk.invalid_cdb(cdb16(0x93, 0, 0), 10, 7, out=bytes(512))
        disk.invalid_cdb(cdb16(0x93, 0, (2 << 30) // 512 + 1), 10, 7, out=bytes(512))
        disk.refused(cdb16(0x93, 1, BLOCKS), OUT_OF_RANGE, out=bytes(512))
        disk.invalid_cdb(cdb16(0x93, 0, 1, 0x10), 1, 4, out=bytes(512))  # ANCHOR
        assert disk.contents == PATTERN


def unmap(*descriptors: tuple[int, int], data_length: int | None = None) -> tuple[bytes, bytes]:
    """The CDB and the parameter list of an UNMAP."""
    blocks = b"".join(struct.pack(">QIxxxx", *each) for each in descriptors)
    length = len(blocks) if data_length is None else data_length
    data = struct.pack(">HHxxxx", length + 6, length) + blocks
    return struct.pack(">BBxxxxxHx", 0x42, 0, len(data)), data


class TestUnmap:
    def test_ranges(self, disk_by: Disk) -> None:
        before = disk_by.path.stat().st_blocks
        cdb, data = unmap((8, 1024), (4096, 0), (6000, 2000))
        assert disk_by.command(cdb, out=data).transferred == len(data)
        assert disk_by.path.stat().st_blocks < before - 2000
        assert disk_by.at(8, 1024) == bytes(1024 * 512)
        assert disk_by.at(6000, 2000) == bytes(2000 * 512)
        assert disk_by.at(0, 8) == PATTERN[:4096]

    def test_nothing(self, disk: Disk) -> None:
        disk.ok(b"\x42" + bytes(9))
        cdb, data = unmap()
        disk.ok(cdb, out=data)
        assert disk.contents == PATTERN

    def test_what_is_wrong_is_found_before_anything_is_done(self, disk: Disk) -> None:
        cdb, data = unmap((0, 8), (BLOCKS, 1))
        disk.refused(cdb, OUT_OF_RANGE, out=data)
        cdb, data = unmap((0, 8), (0, (2 << 30) // 512))
        disk.invalid_list(cdb, data, 8 + 16 + 8, 7)
        cdb, data = unmap((0, 8), data_length=32)
        disk.refused(cdb, PARAMETER_LIST_LENGTH, out=data)
        cdb, data = struct.pack(">BBxxxxxHx", 0x42, 0, 7), bytes(7)
        disk.refused(cdb, PARAMETER_LIST_LENGTH, out=data)
        cdb, data = unmap(*[(0, 8)] * 257)
        disk.invalid_cdb(cdb, 7, 7, out=data)
        assert disk.contents == PATTERN

    def test_a_part_of_a_descriptor_is_ignored(self, disk: Disk) -> None:
        cdb, data = unmap((0, 8), (16, 8), data_length=31)
        disk.ok(cdb, out=data)
        assert disk.at(0, 24) == bytes(4096) + PATTERN[4096 : 24 * 512]


class TestSmallCommands:
    def test_test_unit_ready_and_request_sense(self, disk: Disk) -> None:
        assert disk.ok(bytes(6)) == b""
        fixed = disk.ok(b"\x03\0\0\0\xff\0", into=255)
        assert fixed == b"\x70\0\0\0\0\0\0\x0a" + bytes(10)
        assert disk.ok(b"\x03\x01\0\0\xff\0", into=255) == b"\x72" + bytes(7)
        assert disk.ok(b"\x03\0\0\0\x04\0", into=4) == fixed[:4]

    def test_request_sense_takes_a_unit_attention(self, disk: Disk) -> None:
        lib.scsi_attention(disk.unit.native, lib.SCSI_ATTENTION_CAPACITY_CHANGED)
        data = disk.ok(b"\x03\0\0\0\xff\0", into=255)
        assert (data[2], data[12], data[13]) == (6, 0x2A, 0x09)
        assert disk.ok(bytes(6)) == b""

    def test_read_capacity(self, disk: Disk) -> None:
        ten = disk.ok(b"\x25" + bytes(9), into=8)
        assert ten == struct.pack(">II", BLOCKS - 1, 512)
        sixteen = disk.ok(b"\x9e\x10" + bytes(8) + b"\0\0\0\x20\0\0", into=32)
        # 8 logical blocks a physical one; LBPME, LBPRZ
        assert sixteen == struct.pack(">QIBBBB", BLOCKS - 1, 512, 0, 3, 0xC0, 0).ljust(32, b"\0")
        short = disk.ok(b"\x9e\x10" + bytes(8) + b"\0\0\0\x0c\0\0", into=12)
        assert short == sixteen[:12]

    def test_read_capacity_of_more_than_2_tib(self, tmp_path: Path) -> None:
        path = tmp_path / "large.img"
        path.touch()
        os.truncate(path, 3 << 40)
        with disk_on(path) as disk:
            assert disk.ok(b"\x25" + bytes(9), into=8)[:4] == b"\xff\xff\xff\xff"
            sixteen = disk.ok(b"\x9e\x10" + bytes(8) + b"\0\0\0\x20\0\0", into=32)
            assert sixteen[:8] == struct.pack(">Q", (3 << 31) - 1)
            last = (3 << 31) - 8
            disk.ok(WRITES["16"](last, 1), out=b"z" * 512)
            assert disk.ok(READS["16"](last, 1), into=512) == b"z" * 512
            data = disk.ok(b"\x1a\0\x0a\0\xff\0", into=255)
            assert data[4:8] == b"\xff\xff\xff\xff"
            data = disk.ok(b"\x5a\x10\x0a\0\0\0\0\0\xff\0", into=255)
            assert data[4] == 0x01  # LONGLBA
            assert data[8:24] == struct.pack(">QII", 3 << 31, 0, 512)

    def test_synchronize_cache(self, disk_by: Disk) -> None:
        for cdb in (cdb10(0x35, 0, 0), cdb10(0x35, 5, 7, 0x02), cdb16(0x91, BLOCKS, 0)):
            assert disk_by.ok(cdb) == b""
        disk_by.refused(cdb10(0x35, BLOCKS, 1), OUT_OF_RANGE)

    def test_start_stop(self, disk_by: Disk) -> None:
        disk_by.ok(b"\x1b\0\0\0\0\0")
        disk_by.refused(bytes(6), NOT_READY_STOPPED)
        disk_by.refused(READS["10"](0, 1), NOT_READY_STOPPED, into=512)
        disk_by.refused(WRITES["10"](0, 1), NOT_READY_STOPPED, out=bytes(512))
        assert disk_by.ok(b"\x03\0\0\0\xff\0", into=255)[2] == 2
        assert len(disk_by.ok(b"\x12\0\0\0\xff\0", into=255)) == 96
        disk_by.ok(b"\x1b\0\0\0\x01\0")
        assert disk_by.ok(READS["10"](0, 1), into=512) == PATTERN[:512]
        disk_by.invalid_cdb(b"\x1b\0\0\0\x02\0", 4, 1)  # LOEJ
        disk_by.invalid_cdb(b"\x1b\0\0\0\x30\0", 4, 5)  # a power condition

    def test_commands_without_effect(self, disk: Disk) -> None:
        disk.ok(b"\x1e\0\0\0\x01\0")
        disk.ok(b"\x1e\0\0\0\0\0")
        disk.ok(b"\x1d\x04\0\0\0\0")  # SEND DIAGNOSTIC, the default self-test
        disk.invalid_cdb(b"\x1d\x40\0\0\0\0", 1, 6)

    def test_format(self, disk_by: Disk) -> None:
        disk_by.invalid_cdb(b"\x04\x10\0\0\0\0", 1, 4)
        disk_by.ok(b"\x04" + bytes(5))
        assert disk_by.contents == bytes(SIZE)
        assert disk_by.path.stat().st_blocks < 64

    def test_unknown_commands(self, disk: Disk) -> None:
        known = {each.opcode for each in all_opcodes()}
        for opcode in set(range(256)) - known:
            disk.refused(bytes((opcode,)), INVALID_OPCODE)
        disk.invalid_cdb(b"\x9e\x1f", 1, 4)
        disk.refused(b"\x4d" + bytes(9), INVALID_OPCODE)  # LOG SENSE

    def test_each_bit_that_is_not_evaluated_is_refused(self, disk: Disk) -> None:
        for entry in all_opcodes():
            if entry.opcode == 0xA0:
                continue  # test_scsi.py
            cdb = bytearray(entry.size)
            cdb[0] = entry.opcode
            if entry.service_action != lib.SCSI_NO_SERVICE_ACTION:
                cdb[1] = entry.service_action
            for byte in range(1, entry.size):
                for bit in range(8):
                    if entry.usage[byte] >> bit & 1:
                        continue
                    if (entry.opcode, byte) == (0x12, 1) and bit >= 5:
                        continue  # the LUN of SCSI-2
                    wrong = bytearray(cdb)
                    wrong[byte] |= 1 << bit
                    disk.invalid_cdb(bytes(wrong), byte, bit)


def all_opcodes() -> list[object]:
    native = lib.scsi_disk_opcodes()
    return list(native.table[0 : native.count])


def test_the_table_of_commands_is_sorted() -> None:
    keys = [(each.opcode, each.service_action) for each in all_opcodes()]  # type: ignore[attr-defined]
    assert keys == sorted(keys)
    for each in all_opcodes():
        assert each.usage[0] == each.opcode  # type: ignore[attr-defined]


class TestSenseFormats:
    def test_descriptor_format(self, disk: Disk) -> None:
        disk.ok(b"\x15\x10\0\0\x10\0", out=bytes(4) + b"\x0a\x0a\x04\x10" + bytes(8))
        reply = disk.refused(READS["10"](BLOCKS, 1), OUT_OF_RANGE, into=512)
        assert reply.sense == b"\x72\x05\x21\x00" + bytes(4)
        reply = disk.refused(READS["10"](0, 1, 0x40), INVALID_IN_CDB, into=512)
        assert reply.sense == b"\x72\x05\x24\x00\0\0\0\x08\x02\x06\0\0\xce\x00\x01\x00"
        assert reply.pointer == (True, 1, 6)
        disk.manage(uapi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET)
        disk.settle()
        reply = disk.refused(READS["10"](BLOCKS, 1), OUT_OF_RANGE, into=512)
        assert reply.sense[0] == 0x70

    def test_fixed_format(self, disk: Disk) -> None:
        reply = disk.refused(READS["10"](0, 1, 0x40), INVALID_IN_CDB, into=512)
        assert reply.sense == b"\x70\0\x05\0\0\0\0\x0a\0\0\0\0\x24\0\0\xce\0\x01"


class TestInquiry:
    def test_standard_data(self, disk: Disk) -> None:
        data = disk.ok(b"\x12\0\0\0\xff\0", into=255)
        assert len(data) == 96
        assert data[:8] == bytes((0, 0, 6, 0x12, 91, 0, 0, 2))
        assert data[8:32] == b"pyvmm   disk            "
        assert data[58:64] == b"\x00\xa0\x04\x60\x04\xc0"
        assert disk.ok(b"\x12\0\0\0\x05\0", into=5) == data[:5]
        assert disk.ok(b"\x12\0\0\0\0\0") == b""
        # Linux, as long as it does not know what version a unit is of
        assert disk.ok(b"\x12\xa0\0\0\xff\0", into=255) == data

    def test_vital_product_data(self, disk: Disk) -> None:
        def page(code: int) -> bytes:
            data = disk.ok(bytes((0x12, 1, code, 1, 0, 0)), into=256)
            assert data[:2] == bytes((0, code))
            assert int.from_bytes(data[2:4]) == len(data) - 4
            return data[4:]

        assert page(0x00) == b"\x00\x80\x83\xb0\xb1\xb2"
        assert page(0x80) == b"0123456789"
        assert page(0x83) == b"\x02\x01\x00\x12pyvmm   0123456789"
        limits = page(0xB0)
        assert len(limits) == 60
        granularity, transfer = struct.unpack_from(">HI", limits, 2)
        assert (limits[0], granularity, transfer) == (1, 8, 65536)
        lbas, descriptors, grain, aligned = struct.unpack_from(">IIII", limits, 16)
        assert (lbas, descriptors, grain, aligned) == (4194304, 256, 8, 1 << 31)
        assert struct.unpack_from(">Q", limits, 32) == (4194304,)
        assert page(0xB1) == b"\x00\x01" + bytes(58)
        assert page(0xB2) == b"\x00\xe4\x02\x00"

    def test_refusals(self, disk: Disk) -> None:
        disk.invalid_cdb(b"\x12\x01\xb3\0\xff\0", 2, 7, into=255)
        disk.invalid_cdb(b"\x12\x00\x80\0\xff\0", 2, 7, into=255)
        disk.invalid_cdb(b"\x12\x02\0\0\xff\0", 1, 1, into=255)


CACHING = b"\x08\x12\x04" + bytes(17)
CONTROL = b"\x0a\x0a\x00\x10" + bytes(8)
DESCRIPTOR = struct.pack(">II", BLOCKS, 512)


def sense6(page: int, control: int = 0, *, dbd: bool = False, subpage: int = 0) -> bytes:
    return bytes((0x1A, dbd << 3, control << 6 | page, subpage, 0xFF, 0))


def select6(data: bytes, flags: int = 0x10) -> tuple[bytes, bytes]:
    return bytes((0x15, flags, 0, 0, len(data), 0)), data


def select10(data: bytes, flags: int = 0x10) -> tuple[bytes, bytes]:
    return struct.pack(">BBxxxxxHx", 0x55, flags, len(data)), data


class TestModes:
    def test_sense(self, disk: Disk) -> None:
        header = bytes((3 + 8 + 32, 0, 0x10, 8))
        assert disk.ok(sense6(0x3F), into=255) == header + DESCRIPTOR + CACHING + CONTROL
        header = bytes((3 + 20, 0, 0x10, 0))
        assert disk.ok(sense6(0x08, dbd=True), into=255) == header + CACHING
        header = bytes((3 + 12, 0, 0x10, 0))
        assert disk.ok(sense6(0x0A, dbd=True, subpage=0xFF), into=255) == header + CONTROL
        ten = disk.ok(b"\x5a\x08\x3f\0\0\0\0\0\xff\0", into=255)
        assert ten == struct.pack(">HBBBBH", 6 + 32, 0, 0x10, 0, 0, 0) + CACHING + CONTROL
        assert disk.ok(b"\x1a\0\x3f\0\x04\0", into=4) == bytes((43, 0, 0x10, 8))

    def test_changeable_default_and_saved(self, disk: Disk) -> None:
        changeable = disk.ok(sense6(0x3F, 1, dbd=True), into=255)[4:]
        assert changeable == b"\x08\x12\x04" + bytes(17) + b"\x0a\x0a\x04" + bytes(9)
        cdb, data = select6(bytes(4) + b"\x08\x12\x00" + bytes(17))
        disk.ok(cdb, out=data)
        assert disk.ok(sense6(0x08, 0, dbd=True), into=255)[6] == 0
        assert disk.ok(sense6(0x08, 2, dbd=True), into=255)[4:] == CACHING
        disk.refused(sense6(0x3F, 3), SAVING_NOT_SUPPORTED, into=255)

    def test_writethrough_by_default(self, path: Path) -> None:
        with disk_on(path, writethrough=True) as disk:
            assert disk.ok(sense6(0x08, 2, dbd=True), into=255)[6] == 0
            assert disk.ok(sense6(0x08, 0, dbd=True), into=255)[6] == 0
            cdb, data = select10(bytes(8) + CACHING)
            disk.ok(cdb, out=data)
            assert disk.ok(sense6(0x08, 0, dbd=True), into=255)[6] == 4

    def test_unknown_pages(self, disk: Disk) -> None:
        disk.invalid_cdb(sense6(0x1C), 2, 5, into=255)
        disk.invalid_cdb(sense6(0x08, subpage=1), 3, None, into=255)

    def test_select_with_a_block_descriptor(self, disk: Disk) -> None:
        for descriptor in (DESCRIPTOR, struct.pack(">II", 0, 512)):
            cdb, data = select6(bytes((0, 0, 0, 8)) + descriptor + CONTROL)
            disk.ok(cdb, out=data)
        cdb, data = select6(bytes((0, 0, 0, 8)) + struct.pack(">II", BLOCKS - 1, 512))
        disk.invalid_list(cdb, data, 4)
        cdb, data = select6(bytes((0, 0, 0, 8)) + struct.pack(">II", 0, 4096))
        disk.invalid_list(cdb, data, 9)
        cdb, data = select6(bytes((0, 0, 0, 16)) + bytes(16))
        disk.invalid_list(cdb, data, 3)
        long_lba = struct.pack(">HBBBBH", 0, 0, 0, 1, 0, 16) + struct.pack(">QII", BLOCKS, 0, 512)
        cdb, data = select10(long_lba)
        disk.ok(cdb, out=data)

    def test_select_checks_all_before_it_changes_any(self, disk: Disk) -> None:
        off = b"\x08\x12\x00" + bytes(17)
        cdb, data = select6(bytes(4) + off + b"\x0a\x0a\x00\x10\x08" + bytes(7))
        disk.invalid_list(cdb, data, 4 + 20 + 4, 3)
        cdb, data = select6(bytes(4) + off + b"\x1c\x02\0\0")
        disk.invalid_list(cdb, data, 24, 5)
        cdb, data = select6(bytes(4) + off + b"\x0a\x09\x00\x10" + bytes(8))
        disk.invalid_list(cdb, data, 25)
        cdb, data = select6(bytes(4) + off + b"\x4a\x0a\x00\x10" + bytes(8))
        disk.invalid_list(cdb, data, 24, 6)
        for short in (off + CONTROL[:-1], off + CONTROL[:1]):
            cdb, data = select6(bytes(4) + short)
            disk.refused(cdb, PARAMETER_LIST_LENGTH, out=data)
        assert disk.ok(sense6(0x08, dbd=True), into=255)[4:] == CACHING

    def test_select_refusals(self, disk: Disk) -> None:
        cdb, data = select6(bytes(4) + CACHING, flags=0)
        disk.invalid_cdb(cdb, 1, 4, out=data)
        cdb, data = select6(bytes(4) + CACHING, flags=0x11)
        disk.invalid_cdb(cdb, 1, 0, out=data)
        cdb, data = select6(b"\0\1\0\0" + CACHING)
        disk.invalid_list(cdb, data, 1)
        for short in (bytes(3), bytes((0, 0, 0, 8)) + bytes(7)):
            cdb, data = select6(short)
            disk.refused(cdb, PARAMETER_LIST_LENGTH, out=data)
        cdb, data = select6(b"")
        disk.ok(cdb, out=data)
        assert disk.command(select6(bytes(24))[0], out=bytes(23)).response == OVERRUN


class TestReports:
    def test_all_opcodes(self, disk: Disk) -> None:
        data = disk.ok(b"\xa3\x0c\0\0\0\0" + struct.pack(">I", 4096) + bytes(2), into=4096)
        assert int.from_bytes(data[:4]) == len(data) - 4
        listed = [struct.unpack_from(">BxHxBH", data, at) for at in range(4, len(data), 8)]
        none = lib.SCSI_NO_SERVICE_ACTION
        assert listed == [
            (
                each.opcode,
                0 if each.service_action == none else each.service_action,
                int(each.service_action != none),
                each.size,
            )
            for each in all_opcodes()
        ]  # type: ignore[attr-defined]
        timeouts = disk.ok(b"\xa3\x0c\x80\0\0\0" + struct.pack(">I", 4096) + bytes(2), into=4096)
        assert len(timeouts) - 4 == len(listed) * 20
        assert timeouts[4 + 8 : 4 + 20] == b"\x00\x0a" + bytes(10)

    def test_one_opcode(self, disk: Disk) -> None:
        def report(option: int, opcode: int, action: int = 0) -> bytes:
            cdb = struct.pack(">BBBBHIxx", 0xA3, 0x0C, option, opcode, action, 64)
            return disk.ok(cdb, into=64)

        read_10 = b"\x28\x18\xff\xff\xff\xff\x00\xff\xff\x00"
        assert report(1, 0x28) == b"\0\x03\0\x0a" + read_10
        assert report(3, 0x28) == b"\0\x03\0\x0a" + read_10
        assert report(0x81, 0x28) == b"\0\x83\0\x0a" + read_10 + b"\x00\x0a" + bytes(10)
        capacity = b"\x9e\x10" + bytes(8) + b"\xff\xff\xff\xff\0\0"
        assert report(2, 0x9E, 0x10) == b"\0\x03\0\x10" + capacity
        assert report(3, 0x9E, 0x10) == b"\0\x03\0\x10" + capacity
        assert report(2, 0x9E, 0x12) == b"\0\x01\0\0"
        assert report(1, 0x4D) == b"\0\x01\0\0"
        assert report(3, 0x28, 1) == b"\0\x01\0\0"
        for option, opcode in ((1, 0x9E), (2, 0x28), (4, 0x28)):
            cdb = struct.pack(">BBBBHIxx", 0xA3, 0x0C, option, opcode, 0, 64)
            disk.invalid_cdb(cdb, 2, 2, into=64)

    def test_task_management_functions(self, disk: Disk) -> None:
        cdb = b"\xa3\x0d\0\0\0\0\0\0\0\x40\0\0"
        assert disk.ok(cdb, into=64) == b"\xdc\x03\0\0"
        cdb = b"\xa3\x0d\x80\0\0\0\0\0\0\x40\0\0"
        assert disk.ok(cdb, into=64) == b"\xdc\x03\0\x0c" + bytes(12)
        disk.invalid_cdb(b"\xa3\x0d\0\0\0\0\0\0\0\x03\0\0", 6, None, into=64)


REGISTER, RESERVE, RELEASE, CLEAR, PREEMPT, _, REGISTER_AND_IGNORE = range(7)


class TestReservations:
    def change(self, disk: Disk, action: int, key: int, new: int = 0, kind: int = 0) -> int:
        cdb = struct.pack(">BBBxxIx", 0x5F, action, kind, 24)
        return disk.command(cdb, out=struct.pack(">QQ8x", key, new)).status

    def read(self, disk: Disk, action: int) -> bytes:
        return disk.ok(struct.pack(">BBxxxxxHx", 0x5E, action, 255), into=255)

    def test_a_life(self, disk: Disk) -> None:
        assert self.read(disk, 0) == bytes(8)
        assert self.change(disk, RESERVE, 1, kind=1) == RESERVATION_CONFLICT
        assert self.change(disk, REGISTER, 5, 1) == RESERVATION_CONFLICT
        assert self.change(disk, REGISTER, 0, 0) == GOOD
        assert self.read(disk, 0) == bytes(8)
        assert self.change(disk, REGISTER, 0, 0xABC) == GOOD
        assert self.read(disk, 0) == struct.pack(">IIQ", 1, 8, 0xABC)
        assert self.read(disk, 1) == struct.pack(">II", 1, 0)
        assert self.change(disk, RESERVE, 0xABC, kind=5) == GOOD
        assert self.change(disk, RESERVE, 0xABC, kind=5) == GOOD
        assert self.change(disk, RESERVE, 0xABC, kind=1) == RESERVATION_CONFLICT
        assert self.read(disk, 1) == struct.pack(">IIQ5xB2x", 1, 16, 0xABC, 5)
        full = self.read(disk, 3)
        assert full[:28] == struct.pack(">IIQ4xBB4xH", 1, 48, 0xABC, 1, 5, 1)
        assert disk.ok(READS["10"](0, 1), into=512) == PATTERN[:512]
        assert self.change(disk, RELEASE, 0xABC, kind=5) == GOOD
        assert self.change(disk, RELEASE, 0xABC, kind=5) == GOOD
        assert self.change(disk, REGISTER, 0xABC, 0xDEF) == GOOD
        assert self.change(disk, REGISTER_AND_IGNORE, 7, 0x123) == GOOD
        assert self.read(disk, 0) == struct.pack(">IIQ", 3, 8, 0x123)
        assert self.change(disk, CLEAR, 0x123) == GOOD
        assert self.read(disk, 0) == struct.pack(">II", 4, 0)

    def test_preempting_oneself(self, disk: Disk) -> None:
        self.change(disk, REGISTER, 0, 1)
        self.change(disk, RESERVE, 1, kind=1)
        assert self.change(disk, PREEMPT, 1, 2, kind=3) == RESERVATION_CONFLICT
        assert self.change(disk, PREEMPT, 1, 1, kind=3) == GOOD
        assert self.read(disk, 1)[21] == 3
        self.change(disk, RELEASE, 1, kind=3)
        assert self.change(disk, PREEMPT, 1, 1, kind=3) == GOOD
        assert self.read(disk, 0)[4:] == bytes(4)

    def test_capabilities(self, disk: Disk) -> None:
        assert self.read(disk, 2) == b"\x00\x08\x10\x80\xea\x01\x00\x00"

    def test_refusals(self, disk: Disk) -> None:
        cdb = struct.pack(">BBBxxIx", 0x5F, REGISTER, 0, 24)
        for flag in (0x01, 0x04, 0x08):  # APTPL, ALL_TG_PT, SPEC_I_PT
            data = struct.pack(">QQ4xB3x", 0, 1, flag)
            disk.invalid_list(cdb, data, 20, flag.bit_length() - 1)
        short = struct.pack(">BBBxxIx", 0x5F, REGISTER, 0, 23)
        disk.refused(short, PARAMETER_LIST_LENGTH, out=bytes(23))
        self.change(disk, REGISTER, 0, 1)
        data = struct.pack(">QQ8x", 1, 0)
        disk.invalid_cdb(struct.pack(">BBBxxIx", 0x5F, RESERVE, 0x11, 24), 2, 7, out=data)
        disk.invalid_cdb(struct.pack(">BBBxxIx", 0x5F, RESERVE, 0x02, 24), 2, 3, out=data)
        disk.invalid_list(struct.pack(">BBBxxIx", 0x5F, PREEMPT, 1, 24), data, 8)
        self.change(disk, RESERVE, 1, kind=1)
        wrong = struct.pack(">BBBxxIx", 0x5F, RELEASE, 3, 24)
        disk.refused(wrong, INVALID_RELEASE, out=data)
        disk.invalid_cdb(b"\x5f\x07" + bytes(8), 1, 4)
        disk.invalid_cdb(b"\x5e\x04" + bytes(8), 1, 4)

    def test_reservations_of_spc_2(self, disk: Disk) -> None:
        disk.ok(b"\x16\0\0\0\0\0")
        assert disk.command(b"\x5e" + bytes(6) + b"\0\xff\0", into=255).status == (
            RESERVATION_CONFLICT
        )
        assert self.change(disk, REGISTER, 0, 1) == RESERVATION_CONFLICT
        disk.ok(b"\x17\0\0\0\0\0")
        assert self.change(disk, REGISTER, 0, 1) == GOOD
        disk.ok(b"\x56" + bytes(9))  # without effect
        assert self.read(disk, 0)[4:] == struct.pack(">IQ", 8, 1)
        disk.ok(b"\x57" + bytes(9))
        self.change(disk, REGISTER, 1, 0)
        disk.ok(b"\x16\0\0\0\0\0")
        disk.manage(uapi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET)
        disk.settle()
        assert self.change(disk, REGISTER, 0, 1) == GOOD


def test_4096_byte_blocks(tmp_path: Path) -> None:
    """What direct I/O on a disk of such sectors makes of an image."""
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    with open_image(path) as image:
        image.logical_block_size = 4096
        commands = CommandThread()
        unit = ScsiDisk(image, commands, serial="x")
        device = VirtioScsi()
        device.plug(0, 0, unit)
        with Disk(device, unit, path) as disk:
            assert disk.ok(b"\x25" + bytes(9), into=8) == struct.pack(">II", 1023, 4096)
            assert disk.ok(READS["10"](3, 1), into=4096) == PATTERN[12288:16384]
            limits = disk.ok(b"\x12\x01\xb0\0\xff\0", into=255)
            assert struct.unpack_from(">HI", limits, 6) == (1, 8192)
            disk.ok(cdb16(0x93, 1, 100), out=b"ab" * 2048)
            assert path.read_bytes()[4096 : 101 * 4096] == b"ab" * 2048 * 100
        unit.close()
        commands.close()


def test_limits(disk: Disk) -> None:
    """A reset does not wait for what a limit holds; another limit lets it go."""
    lib.blk_limit_set(disk.unit.image.native, 1, 0)
    queue = FIRST_REQUEST_QUEUE
    for _ in range(3):
        disk.start((disk.header(READS["10"](0, 1), flat(0, 0)),), (108, 512))
    disk.driver.reset()
    disk.driver.start()
    disk.settle()
    for _ in range(3):
        disk.start((disk.header(READS["10"](0, 1), flat(0, 0)),), (108, 512))
    lib.blk_limit_set(disk.unit.image.native, 0, 0)
    disk.device.limits_changed()
    replies = disk.driver.replies(queue, 3)
    assert [disk.parse(data, len(data), 512).status for data in replies] == [GOOD] * 3


def test_a_capacity_that_changed(disk: Disk) -> None:
    disk.device.change_capacity(0, 0, lambda: disk.unit.image.resize(SIZE * 2))
    disk.refused(READS["10"](BLOCKS, 1), (6, 0x2A, 0x09), into=512)
    assert disk.ok(READS["10"](BLOCKS, 1), into=512) == bytes(512)
    assert disk.ok(b"\x25" + bytes(9), into=8) == struct.pack(">II", 2 * BLOCKS - 1, 512)
