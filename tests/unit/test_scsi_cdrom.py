"""A CD drive behind virtio-scsi, from the driver down to the image (SPC-4, MMC-6)."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mmio_driver import wait_until
from support.scsi_driver import CHECK_CONDITION, GOOD, Reply, ScsiDriver

from pyvmm.backends.scsi.cdrom import MediumLocked, ScsiCdrom, open_medium
from pyvmm.backends.scsi.command import CommandThread
from pyvmm.errors import ExitStatus, UsageError
from pyvmm.virtio.scsi import VirtioScsi

BLOCKS = 40
BLOCK = 2048

NO_MEDIUM = (2, 0x3A, 1)
TRAY_OPEN = (2, 0x3A, 2)
INVALID_OPCODE = (5, 0x20, 0)
LBA_OUT_OF_RANGE = (5, 0x21, 0)
INVALID_FIELD = (5, 0x24, 0)
MEDIUM_CHANGED = (6, 0x28, 0)
POWER_ON = (6, 0x29, 0)
INCOMPATIBLE = (5, 0x30, 0)
PREVENTED = (5, 0x53, 2)

EJECT, LOAD = bytes((0x1B, 0, 0, 0, 2, 0)), bytes((0x1B, 0, 0, 0, 3, 0))
PREVENT, ALLOW = bytes((0x1E, 0, 0, 0, 1, 0)), bytes((0x1E, 0, 0, 0, 0, 0))
READY = bytes(6)


class Drive(ScsiDriver):
    """A driver of the drive at 0:0."""

    def __init__(self, device: VirtioScsi, drive: ScsiCdrom) -> None:
        super().__init__(device)
        self.drive = drive

    def good(self, cdb: bytes, into: int = 0) -> bytes:
        """Data-in of a command, whose status must be GOOD."""
        reply = self.command(cdb, into=into)
        assert (reply.response, reply.status) == (0, GOOD), reply
        assert len(reply.data) >= reply.transferred
        return reply.data[: reply.transferred]

    def refused(self, cdb: bytes, into: int = 0) -> tuple[int, int, int]:
        reply = self.command(cdb, into=into)
        assert (reply.response, reply.status) == (0, CHECK_CONDITION), reply
        return reply.code

    def event(self, classes: int = 1 << 4) -> tuple[int, int]:
        """The code of the next event of class media, and the status of the medium."""
        data = self.good(struct.pack(">BBxxBxxHx", 0x4A, 1, classes, 64), 64)
        assert (len(data), data[:2], data[2]) == (8, b"\0\x06", 4)
        return data[4] & 0xF, data[5]


@pytest.fixture
def iso(tmp_path: Path) -> Path:
    return make_iso(tmp_path, "a", BLOCKS)


def make_iso(directory: Path, name: str, blocks: int) -> Path:
    path = directory / f"{name}.iso"
    path.write_bytes(random.Random(name).randbytes(blocks * BLOCK))
    return path


@pytest.fixture
def drive(iso: Path) -> Iterator[Drive]:
    """A drive with a medium, at rest."""
    device = VirtioScsi()
    commands = CommandThread()
    unit = ScsiCdrom(commands, serial="drive-1")
    unit.insert(iso)
    device.plug(0, 0, unit)
    try:
        with Drive(device, unit) as driver:
            driver.settle()
            assert driver.event()[0] == 2
            yield driver
        device.unplug(0, 0)
    finally:
        unit.close()
        commands.close()


@pytest.fixture
def dvd(drive: Drive, tmp_path: Path) -> Drive:
    path = tmp_path / "dvd.iso"
    with path.open("wb") as file:
        file.truncate(2 << 30)
    drive.drive.insert(path)
    drive.settle()
    return drive


def read_10(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIBHB", 0x28, 0, lba, 0, blocks, 0)


def read_12(lba: int, blocks: int) -> bytes:
    return struct.pack(">BBIIBB", 0xA8, 0, lba, blocks, 0, 0)


def read_cd(lba: int, blocks: int, kind: int = 0, what: int = 0x10) -> bytes:
    return struct.pack(">BBI", 0xBE, kind << 2, lba) + blocks.to_bytes(3) + bytes((what, 0, 0))


def toc(what: int, track: int = 0, msf: bool = False, allocated: int = 256) -> bytes:
    return struct.pack(">BBBxxxBHx", 0x43, msf << 1, what, track, allocated)


def mode_sense(page: int, control: int = 0, allocated: int = 256) -> bytes:
    return struct.pack(">BBBxxxxHx", 0x5A, 0, control << 6 | page, allocated)


class TestReading:
    @pytest.mark.parametrize("cdb", [read_10, read_12, read_cd])
    def test_blocks(self, drive: Drive, iso: Path, cdb: object) -> None:
        contents = iso.read_bytes()
        for lba, blocks in ((0, 1), (16, 3), (BLOCKS - 1, 1), (0, BLOCKS), (BLOCKS, 0), (5, 0)):
            data = drive.good(cdb(lba, blocks), blocks * BLOCK)  # type: ignore[operator]
            assert data == contents[lba * BLOCK : (lba + blocks) * BLOCK]

    @pytest.mark.parametrize("cdb", [read_10, read_12, read_cd])
    def test_beyond_the_end(self, drive: Drive, cdb: object) -> None:
        for lba, blocks in ((BLOCKS, 1), (BLOCKS - 1, 2), (0xFFFFFFFF, 1), (BLOCKS + 1, 0)):
            code = drive.refused(cdb(lba, blocks), blocks * BLOCK)  # type: ignore[operator]
            assert code == LBA_OUT_OF_RANGE

    def test_more_than_the_buffers_hold(self, drive: Drive) -> None:
        reply = drive.command(read_10(0, 2), into=BLOCK)
        assert (reply.response, reply.transferred) == (1, 0)  # OVERRUN

    def test_more_than_a_command_may_move(self, drive: Drive) -> None:
        assert drive.refused(read_12(0, 1 << 20), BLOCK) == INVALID_FIELD

    def test_what_an_image_does_not_have(self, drive: Drive) -> None:
        assert drive.refused(read_cd(0, 1, kind=1), 2352) == (5, 0x64, 0)  # audio
        assert drive.refused(read_cd(0, 1, kind=5), 2352) == (5, 0x64, 0)  # mode 2 form 2
        assert drive.refused(read_cd(0, 1, what=0xF8), 2352) == INVALID_FIELD
        assert drive.good(read_cd(0, 1, what=0), BLOCK) == b""
        assert drive.good(read_cd(0, 1, kind=2), BLOCK) != b""

    def test_capacity(self, drive: Drive) -> None:
        data = drive.good(bytes((0x25, *bytes(9))), 8)
        assert struct.unpack(">II", data) == (BLOCKS - 1, BLOCK)

    def test_seek(self, drive: Drive) -> None:
        assert drive.good(struct.pack(">BxIxxxx", 0x2B, BLOCKS - 1)) == b""
        assert drive.refused(struct.pack(">BxIxxxx", 0x2B, BLOCKS)) == LBA_OUT_OF_RANGE

    def test_an_image_that_shrinks(self, drive: Drive, iso: Path) -> None:
        os.truncate(iso, 10 * BLOCK)
        assert drive.refused(read_10(10, 1), BLOCK) == (3, 0x11, 0)
        assert drive.good(read_10(9, 1), BLOCK)

    @pytest.mark.parametrize("opcode", [0x0A, 0x2A, 0xAA, 0x04, 0x35, 0x41, 0x42, 0x5B, 0xA1])
    def test_nothing_writes(self, drive: Drive, opcode: int) -> None:
        assert drive.refused(bytes((opcode, *bytes(15)))) == INVALID_OPCODE


class TestWhatItIs:
    def test_inquiry(self, drive: Drive) -> None:
        data = drive.good(bytes((0x12, 0, 0, 0, 96, 0)), 96)
        assert data[:5] == bytes((0x05, 0x80, 0x06, 0x12, 91))
        assert data[8:32] == b"pyvmm   CD-ROM          "
        pages = drive.good(bytes((0x12, 1, 0, 0, 96, 0)), 96)
        assert pages == bytes((5, 0, 0, 3, 0x00, 0x80, 0x83))
        assert drive.good(bytes((0x12, 1, 0x80, 0, 96, 0)), 96) == b"\x05\x80\0\x07drive-1"
        assert drive.refused(bytes((0x12, 1, 0xB0, 0, 96, 0)), 96) == INVALID_FIELD

    def test_capabilities(self, drive: Drive) -> None:
        data = drive.good(mode_sense(0x2A), 256)
        assert struct.unpack(">HBBxxH", data[:8]) == (len(data) - 2, 0, 0, 0)
        page = data[8:]
        assert page[:2] == bytes((0x2A, len(page) - 2))
        assert page[2] & 0x08  # reads DVDs
        assert page[3] == 0  # writes nothing
        assert page[6] == 0x29  # a tray, ejects, locks
        drive.good(PREVENT)
        assert drive.good(mode_sense(0x2A), 256)[8 + 6] == 0x2B  # locked
        drive.good(ALLOW)

    def test_mode_pages(self, drive: Drive) -> None:
        data = drive.good(mode_sense(0x3F), 256)
        pages, at = [], 8
        while at < len(data):
            pages.append(data[at])
            at += 2 + data[at + 1]
        assert (pages, at) == ([0x01, 0x1A, 0x1D, 0x2A], len(data))
        unchangeable = drive.good(mode_sense(0x2A, control=1), 256)[8:]
        assert unchangeable[2:] == bytes(len(unchangeable) - 2)
        assert drive.refused(mode_sense(0x2A, control=3)) == (5, 0x39, 0)
        assert drive.refused(mode_sense(0x08)) == INVALID_FIELD
        short = drive.good(bytes((0x1A, 8, 0x01, 0, 255, 0)), 255)
        assert short[0] == len(short) - 1
        select = struct.pack(">BBxxxxxHx", 0x55, 0x10, len(data))
        assert drive.command(select, out=b"\0\0" + data[2:]).status == GOOD
        changed = bytearray(data)
        changed[8 + 2] ^= 1
        assert drive.command(select, out=b"\0\0" + changed[2:]).code == (5, 0x26, 0)

    def test_configuration(self, drive: Drive) -> None:
        profile, features = configuration(drive, 0)
        assert profile == 0x0008
        assert sorted(features) == [
            0x0000, 0x0001, 0x0002, 0x0003, 0x0010, 0x001E, 0x001F, 0x0100, 0x0105, 0x0108,
        ]  # fmt: skip
        assert features[0x0000][4:] == b"\0\x10\0\0\0\x08\x01\0"
        assert features[0x0001][4:8] == b"\0\0\0\x01"  # SCSI
        assert features[0x0010][4:8] == struct.pack(">I", BLOCK)
        assert features[0x0108][4:] == b"drive-1 "
        assert features[0x001E][2] & 1
        assert not features[0x001F][2] & 1
        assert 0x001F not in configuration(drive, 1)[1]  # not in effect
        assert sorted(configuration(drive, 0, first=0x0100)[1]) == [0x0100, 0x0105, 0x0108]
        assert sorted(configuration(drive, 2, first=0x0003)[1]) == [0x0003]
        assert configuration(drive, 2, first=0x0004)[1] == {}
        assert drive.refused(bytes((0x46, 3, *bytes(6), 8, 0)), 8) == INVALID_FIELD
        assert len(drive.good(bytes((0x46, 0, *bytes(6), 8, 0)), 8)) == 8  # only the header

    def test_configuration_with_a_dvd(self, dvd: Drive) -> None:
        profile, features = configuration(dvd, 1)
        assert profile == 0x0010
        assert features[0x0000][4:] == b"\0\x10\x01\0\0\x08\0\0"
        assert 0x001F in features
        assert 0x001E not in features

    def test_supported_opcodes(self, drive: Drive) -> None:
        data = drive.good(struct.pack(">BBBBHIxx", 0xA3, 0x0C, 0, 0, 0, 4096), 4096)
        codes = [data[at] for at in range(4, len(data), 8)]
        assert {0x00, 0x28, 0x43, 0x46, 0x4A, 0xA8, 0xBE} < set(codes)
        one = drive.good(struct.pack(">BBBBHIxx", 0xA3, 0x0C, 1, 0xBE, 0, 64), 64)
        assert one[1:4] == b"\x03\0\x0c"

    def test_mechanism(self, drive: Drive) -> None:
        status = bytes((0xBD, *bytes(7), 0, 8, 0, 0))
        assert drive.good(status, 8) == bytes(8)
        drive.good(EJECT)
        assert drive.good(status, 8) == bytes((0, 0x10, 0, 0, 0, 0, 0, 0))

    def test_speed_is_whatever_the_driver_wants(self, drive: Drive) -> None:
        drive.good(struct.pack(">BBHHxxxxxx", 0xBB, 0, 0xFFFF, 0xFFFF))

    @pytest.mark.parametrize(
        ("cdb", "byte", "bit"),
        [
            (bytes((0x43, 0x04, *bytes(8))), 1, 2),
            (bytes((0x1B, 0, 0, 0, 0x08, 0)), 4, 3),
            (bytes((0x25, 0, 0, 0, 0, 0, 0, 0, 0, 4)), 9, 2),
            (bytes((0x4A, 0, 0, 0, 0x10, 0, 0, 0, 8, 0)), 1, 0),
        ],
    )
    def test_reserved_bits(self, drive: Drive, cdb: bytes, byte: int, bit: int) -> None:
        reply = drive.command(cdb, into=8)
        assert (reply.code, reply.pointer) == (INVALID_FIELD, (True, byte, bit))


def configuration(drive: Drive, which: int, first: int = 0) -> tuple[int, dict[int, bytes]]:
    """The current profile, and features by their code."""
    data = drive.good(struct.pack(">BBHxxxHx", 0x46, which, first, 1024), 1024)
    size, profile = struct.unpack(">IxxH", data[:8])
    assert size == len(data) - 4
    features, at = {}, 8
    while at < len(data):
        length = 4 + data[at + 3]
        assert length % 4 == 0
        features[int.from_bytes(data[at : at + 2])] = data[at : at + length]
        at += length
    assert at == len(data)
    return profile, features


class TestMedium:
    def test_toc(self, drive: Drive) -> None:
        data = drive.good(toc(0), 256)
        assert data == struct.pack(">HBB", 18, 1, 1) + struct.pack(
            ">BBBBIBBBBI", 0, 0x14, 1, 0, 0, 0, 0x14, 0xAA, 0, BLOCKS
        )
        assert drive.good(toc(0, track=1), 256) == data
        assert drive.good(toc(0, track=0xAA), 256)[4:] == data[12:]
        assert drive.good(toc(0, allocated=4), 256) == data[:4]
        assert drive.refused(toc(0, track=2), 256) == INVALID_FIELD
        minutes = drive.good(toc(0, msf=True), 256)
        assert minutes[8:12] == bytes((0, 0, 2, 0))
        assert minutes[16:20] == bytes((0, 0, (BLOCKS + 150) // 75, (BLOCKS + 150) % 75))

    def test_sessions(self, drive: Drive) -> None:
        session = struct.pack(">HBBBBBBI", 10, 1, 1, 0, 0x14, 1, 0, 0)
        assert drive.good(toc(1), 256) == session
        # As Linux asks: the format in the last byte.
        assert drive.good(bytes((0x43, 0, 0, 0, 0, 0, 0, 0, 12, 0x40)), 12) == session

    def test_full_toc(self, drive: Drive) -> None:
        data = drive.good(toc(2, msf=True), 256)
        assert data[:4] == struct.pack(">HBB", len(data) - 2, 1, 1)
        rows = [data[at : at + 11] for at in range(4, len(data), 11)]
        assert [row[3] for row in rows] == [0xA0, 0xA1, 0xA2, 1]
        assert rows[0][8] == rows[1][8] == 1
        end = BLOCKS + 150
        assert rows[2][8:] == bytes((end // 4500, end // 75 % 60, end % 75))
        assert rows[3][8:] == bytes((0, 2, 0))

    @pytest.mark.parametrize("what", [3, 4, 5, 15])
    def test_other_formats(self, drive: Drive, what: int) -> None:
        assert drive.refused(toc(what), 256) == INVALID_FIELD

    def test_a_dvd_is_longer_than_minutes_can_tell(self, dvd: Drive) -> None:
        assert dvd.good(toc(0, msf=True), 256)[16:20] == bytes((0, 233, 3, 1))

    def test_disc_information(self, drive: Drive) -> None:
        data = drive.good(struct.pack(">BBxxxxxHx", 0x51, 0, 64), 64)
        assert data[:8] == bytes((0, 32, 0x0E, 1, 1, 1, 1, 0x20))
        assert drive.refused(struct.pack(">BBxxxxxHx", 0x51, 1, 64), 64) == INVALID_FIELD

    def test_track_information(self, drive: Drive) -> None:
        for by, number in ((0, 0), (0, BLOCKS - 1), (1, 1), (2, 1)):
            data = drive.good(struct.pack(">BBIxHx", 0x52, by, number, 64), 64)
            assert data[:4] == bytes((0, 34, 1, 1))
            assert struct.unpack(">I", data[24:28]) == (BLOCKS,)
            assert len(data) == 36
        for by, number in ((0, BLOCKS), (1, 0), (1, 2), (2, 0), (3, 1)):
            assert drive.refused(struct.pack(">BBIxHx", 0x52, by, number, 64)) == INVALID_FIELD

    def test_disc_structure(self, dvd: Drive) -> None:
        def structure(code: int, layer: int = 0) -> bytes:
            return struct.pack(">BBIBBHBx", 0xAD, 0, 0, layer, code, 4096, 0)

        physical = dvd.good(structure(0), 4096)
        assert len(physical) == 2052
        assert struct.unpack(">H", physical[:2]) == (2050,)
        start, end = struct.unpack(">II", physical[8:16])
        assert (start, end - start + 1) == (0x030000, (2 << 30) // BLOCK)
        assert dvd.good(structure(1), 4096) == bytes((0, 6, 0, 0, 0, 0, 0, 0))
        assert len(dvd.good(structure(4), 4096)) == 2052
        assert dvd.good(structure(0xFF), 4096)[4:8] == bytes((0, 0x40, 0x08, 0x04))
        assert dvd.refused(structure(0, layer=1)) == INVALID_FIELD
        assert dvd.refused(structure(0x0E)) == INVALID_FIELD

    def test_a_cd_has_no_structure(self, drive: Drive) -> None:
        assert drive.refused(struct.pack(">BBIBBHBx", 0xAD, 0, 0, 0, 0, 64, 0)) == INCOMPATIBLE


NEEDS_MEDIUM = [
    READY,
    read_10(0, 1),
    read_12(0, 1),
    read_cd(0, 1),
    toc(0),
    bytes((0x25, *bytes(9))),
    bytes((0x2B, *bytes(9))),
    bytes((0x51, *bytes(9))),
    bytes((0x52, *bytes(9))),
    bytes((0xAD, *bytes(11))),
]


class TestTray:
    def test_the_guest_ejects_and_loads(self, drive: Drive) -> None:
        drive.good(EJECT)
        assert (drive.drive.tray_open, drive.event()) == (True, (3, 1))
        for cdb in NEEDS_MEDIUM:
            assert drive.refused(cdb, 64) == TRAY_OPEN
        assert configuration(drive, 0)[0] == 0
        drive.good(EJECT)
        drive.good(LOAD)
        assert (drive.drive.tray_open, drive.event()) == (False, (2, 2))
        assert drive.refused(READY) == MEDIUM_CHANGED
        drive.good(READY)
        drive.good(LOAD)
        drive.good(READY)
        assert drive.event() == (0, 2)

    def test_starting_and_stopping_moves_nothing(self, drive: Drive) -> None:
        for what in (0x00, 0x01, 0x20, 0x30):
            drive.good(bytes((0x1B, 0, 0, 0, what, 0)))
            drive.good(READY)

    def test_a_locked_tray(self, drive: Drive) -> None:
        drive.good(PREVENT)
        assert drive.refused(EJECT) == PREVENTED
        assert not drive.drive.tray_open
        drive.good(ALLOW)
        drive.good(EJECT)
        assert drive.drive.tray_open

    def test_two_locks(self, drive: Drive) -> None:
        drive.good(PREVENT)
        drive.good(bytes((0x1E, 0, 0, 0, 3, 0)))  # persistent
        drive.good(ALLOW)
        assert drive.refused(EJECT) == PREVENTED
        drive.good(bytes((0x1E, 0, 0, 0, 2, 0)))
        drive.good(EJECT)

    def test_a_reset_unlocks(self, drive: Drive) -> None:
        drive.good(PREVENT)
        assert drive.manage(5) == 0  # LOGICAL UNIT RESET
        drive.settle()
        drive.good(EJECT)

    def test_the_host_changes_the_medium(self, drive: Drive, tmp_path: Path) -> None:
        other = make_iso(tmp_path, "other", 20)
        drive.drive.insert(other)
        assert drive.drive.path == str(other)
        assert drive.refused(read_10(0, 1), BLOCK) == MEDIUM_CHANGED
        assert drive.good(read_10(0, 20), 20 * BLOCK) == other.read_bytes()
        assert drive.event() == (2, 2)

    def test_the_host_takes_the_medium(self, drive: Drive) -> None:
        drive.drive.insert(None)
        assert drive.drive.path is None
        assert drive.event() == (3, 0)
        for cdb in NEEDS_MEDIUM:
            assert drive.refused(cdb, 64) == NO_MEDIUM
        assert drive.good(bytes((0x03, 0, 0, 0, 18, 0)), 18)[2] == 2
        drive.good(EJECT)
        assert drive.refused(READY) == TRAY_OPEN
        drive.good(LOAD)
        assert drive.refused(READY) == NO_MEDIUM

    def test_the_host_closes_the_tray_with_a_medium(self, drive: Drive, iso: Path) -> None:
        drive.good(EJECT)
        drive.drive.insert(iso)
        assert not drive.drive.tray_open
        assert drive.refused(READY) == MEDIUM_CHANGED
        drive.good(READY)

    def test_the_host_asks_a_guest_that_locks(self, drive: Drive, tmp_path: Path) -> None:
        other = make_iso(tmp_path, "other", 20)
        drive.good(PREVENT)
        for path in (other, None):
            with pytest.raises(MediumLocked) as caught:
                drive.drive.insert(path)
            assert str(caught.value) == (
                f"the guest has locked the medium {drive.drive.path} in its drive, and was asked "
                "to eject it: unmount it there, or use force"
            )
            assert drive.event() == (1, 2)
        assert len(drive.good(read_10(0, BLOCKS), BLOCKS * BLOCK)) == BLOCKS * BLOCK
        drive.drive.insert(other, force=True)
        assert drive.refused(READY) == MEDIUM_CHANGED
        assert drive.good(read_10(0, 20), 20 * BLOCK) == other.read_bytes()

    def test_a_failed_change_changes_nothing(self, drive: Drive, tmp_path: Path) -> None:
        with pytest.raises(UsageError):
            drive.drive.insert(tmp_path / "missing.iso")
        drive.good(READY)
        assert drive.event() == (0, 2)

    def test_who_listens_is_told_of_the_tray(self, drive: Drive, iso: Path) -> None:
        seen: list[bool] = []
        drive.drive._on_tray = lambda each: seen.append(each.tray_open)
        drive.good(EJECT)
        drive.good(EJECT)
        drive.good(LOAD)
        drive.settle()
        drive.good(EJECT)
        drive.drive.insert(iso)
        assert seen == [True, False, True, False]

    def test_changes_while_it_is_read(self, drive: Drive, tmp_path: Path) -> None:
        """Data are those of one medium or the other."""
        paths = [make_iso(tmp_path, name, 16) for name in ("x", "y")]
        contents = [path.read_bytes() for path in paths]
        ring = drive.driver.queues[2]
        assert ring is not None
        address = bytes((1, 0, 0x40, 0, 0, 0, 0, 0))
        seen = set()
        for round in range(200):
            drive.drive.insert(paths[round % 2])
            drive.settle()
            head = drive.start((drive.header(read_10(0, 16), address),), (108, 16 * BLOCK))
            response, data = ring._in_flight[head].writable
            drive.drive.insert(paths[(round + 1) % 2])
            wait_until(ring.collect)
            if ring.read(*response)[10] == GOOD:
                assert ring.read(*data) == contents[round % 2]
            seen.add(ring.read(*response)[10])
        assert GOOD in seen


class TestEvents:
    def test_classes(self, drive: Drive) -> None:
        def ask(classes: int) -> bytes:
            return drive.good(struct.pack(">BBxxBxxHx", 0x4A, 1, classes, 64), 64)

        assert ask(0x00) == bytes((0, 2, 0x80, 0x16))
        assert ask(0x40) == bytes((0, 2, 0x80, 0x16))
        assert ask(0x02) == bytes((0, 6, 1, 0x16, 0, 0, 0, 0))
        assert ask(0x04) == bytes((0, 6, 2, 0x16, 0, 1, 0, 0))
        drive.good(EJECT)
        assert ask(0xFF) == bytes((0, 6, 4, 0x16, 3, 1, 0, 0))
        assert ask(0xFF)[2] == 1

    def test_the_header_alone_takes_no_event_away(self, drive: Drive) -> None:
        drive.good(EJECT)
        assert drive.good(struct.pack(">BBxxBxxHx", 0x4A, 1, 0x10, 4), 4) == b"\0\x06\x04\x16"
        assert drive.event() == (3, 1)


class TestImages:
    def refusal(self, path: Path) -> str:
        with pytest.raises(UsageError) as caught:
            open_medium(path)
        assert caught.value.exit_status == ExitStatus.USAGE
        return str(caught.value)

    def test_missing(self, tmp_path: Path) -> None:
        path = tmp_path / "no.iso"
        assert self.refusal(path) == f"the CD image {path} does not exist: check its name"

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "empty.iso"
        path.touch()
        assert self.refusal(path) == f"the CD image {path} is empty: fetch or make it again"

    def test_cut_short(self, tmp_path: Path) -> None:
        path = tmp_path / "short.iso"
        for size in (4608, 4097):
            path.write_bytes(bytes(size))
            assert self.refusal(path) == (
                f"the CD image {path} has {size} bytes, which is not a multiple of 2048: "
                "it is cut short, or no ISO image"
            )

    def test_two_machines_read_one(self, iso: Path) -> None:
        with open_medium(iso), open_medium(iso):
            pass


def test_power_on(iso: Path) -> None:
    device, commands = VirtioScsi(), CommandThread()
    unit = ScsiCdrom(commands, serial="x")
    device.plug(0, 0, unit)
    with Drive(device, unit) as drive:
        assert drive.refused(READY) == POWER_ON
        assert drive.refused(READY) == NO_MEDIUM
        reply: Reply = drive.command(bytes((0xA0, *bytes(7), 0, 16, 0, 0)), into=16)
        assert reply.data == struct.pack(">IxxxxQ", 8, 0)
    device.unplug(0, 0)
    unit.close()
    commands.close()
