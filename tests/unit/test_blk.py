"""virtio-blk from the registers down to the image, with both engines (virtio 1.2, section 5.2)."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.blk_driver import (
    DISCARD,
    FLUSH,
    GET_ID,
    IN,
    IOERR,
    OK,
    OUT,
    UNMAP,
    UNSUPP,
    UNTOUCHED,
    WRITE_ZEROES,
    Disk,
    started,
)
from support.loop_device import loop_device
from support.mmio_driver import NEEDS_RESET, VRING, wait_until

from pyvmm._core import lib
from pyvmm.backends.disk import DiskImage, open_image
from pyvmm.errors import UsageError
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio import blk
from pyvmm.virtio.blk import VirtioBlk

SIZE = 1 << 20
SECTORS = SIZE // 512
WCE_REGISTER = uapi.VIRTIO_MMIO_CONFIG + uapi.virtio_blk_config.wce.offset

PATTERN = b"".join(struct.pack("<Q", n) for n in range(SIZE // 8))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture
def image(path: Path) -> Iterator[DiskImage]:
    with open_image(path) as image:
        yield image


@pytest.fixture
def disk(engine: str, image: DiskImage, path: Path) -> Iterator[Disk]:
    with started(VirtioBlk(image, serial="0123456789"), path) as disk:
        yield disk


class TestRequests:
    def test_read(self, disk: Disk) -> None:
        assert disk.read(0, 512) == PATTERN[:512]
        assert disk.read(7, 4096) == PATTERN[7 * 512 : 7 * 512 + 4096]
        assert disk.read(SECTORS - 1, 512) == PATTERN[-512:]
        assert disk.driver.interrupted() == VRING

    def test_write(self, disk: Disk) -> None:
        data = os.urandom(8192)
        reply = disk.request(OUT, 3, readable=(data,))
        assert reply == (OK, b"", 1)
        assert disk.contents == PATTERN[:1536] + data + PATTERN[1536 + 8192 :]
        assert disk.read(3, 8192) == data

    def test_scattered_buffers(self, disk: Disk) -> None:
        data = os.urandom(4096)
        cuts = (data[:1], data[1:700], data[700:701], data[701:])
        assert disk.request(OUT, 8, readable=cuts).status == OK
        reply = disk.request(IN, 8, writable=(100, 1, 3995))
        assert (reply.status, reply.data) == (OK, data)

    def test_any_framing(self, disk: Disk) -> None:
        """Header and status may be split and merged with the data (2.7.4)."""
        header = struct.pack("<IIQ", IN, 0, 5)
        expected = PATTERN[2560 : 2560 + 512]
        parts = (header[:3], header[3:4], header[4:])
        for readable in ((header,), parts, (*parts, b"ignored")):
            for writable in ((512, 1), (513,), (10, 503)):
                reply = disk.chain(readable, writable)
                assert reply == (OK, expected, 513)
        data = os.urandom(512)
        header = struct.pack("<IIQ", OUT, 0, 5)
        assert disk.chain((header + data,), (1,)).status == OK
        assert disk.read(5, 512) == data

    def test_an_empty_transfer_succeeds(self, disk: Disk) -> None:
        assert disk.request(IN, 0).status == OK
        assert disk.request(OUT, SECTORS).status == OK

    def test_flush(self, disk: Disk) -> None:
        assert disk.request(FLUSH) == (OK, b"", 1)

    def test_serial(self, disk: Disk) -> None:
        padded = b"0123456789".ljust(20, b"\0")
        assert disk.request(GET_ID, writable=(20,)) == (OK, padded, 21)
        assert disk.request(GET_ID, writable=(7, 13)) == (OK, padded, 21)
        assert disk.request(GET_ID, writable=(4,)) == (OK, b"0123", 5)
        longer = disk.request(GET_ID, writable=(30,))
        assert (longer.status, longer.data[:20], longer.written) == (OK, padded, 20)

    def test_many_in_flight(self, disk: Disk) -> None:
        ring = disk.driver.queues[0]
        assert ring is not None
        for round_ in range(50):
            sectors = {}
            for n in range(5):
                sector = (round_ * 5 + n) * 8 % SECTORS
                header = struct.pack("<IIQ", IN, 0, sector)
                sectors[ring.add((header,), (4096, 1))] = sector
            if ring.publish():
                disk.driver.notify(0)
            used = []
            while len(used) < 5:
                used += ring.collect()
            for each in used:
                start = sectors[each.head] * 512
                assert each.data == PATTERN[start : start + 4096] + bytes([OK])
        counters = disk.device.counters
        assert counters["requests"] == 250
        assert counters["failed"] == counters["malformed"] == 0
        assert 1 <= counters["interrupts"] <= 250


class TestSpace:
    def test_discard(self, disk: Disk) -> None:
        assert disk.segments(DISCARD, (0, SECTORS // 2, 0)) == OK
        assert disk.allocated <= SIZE // 2
        assert disk.contents[SIZE // 2 :] == PATTERN[SIZE // 2 :]
        assert disk.path.stat().st_size == SIZE

    def test_discard_of_several_segments(self, disk: Disk) -> None:
        count = lib.VIRTIO_BLK_MAX_SEGMENTS
        assert disk.segments(DISCARD, *((n * 16, 8, 0) for n in range(count))) == OK
        assert disk.allocated <= SIZE - count * 4096
        too_many = ((n * 16, 8, 0) for n in range(count + 1))
        assert disk.segments(DISCARD, *too_many) == IOERR

    @pytest.mark.parametrize("flags", [0, UNMAP])
    def test_write_zeroes(self, disk: Disk, flags: int) -> None:
        assert disk.segments(WRITE_ZEROES, (8, 800, flags), (1600, 1, flags)) == OK
        expected = bytearray(PATTERN)
        expected[8 * 512 : 808 * 512] = bytes(800 * 512)
        expected[1600 * 512 : 1601 * 512] = bytes(512)
        assert disk.contents == expected
        if flags & UNMAP:
            assert disk.allocated <= SIZE - 99 * 4096

    @pytest.mark.parametrize("kind", [DISCARD, WRITE_ZEROES])
    @pytest.mark.parametrize(
        "data",
        [
            b"",
            bytes(15),
            bytes(17),
            struct.pack("<QII", SECTORS, 1, 0),
            struct.pack("<QII", SECTORS - 1, 2, 0),
            struct.pack("<QII", (1 << 64) - 1, 1, 0),
            struct.pack("<QII", 1 << 55, 8, 0),
            struct.pack("<QII", 0, 0xFFFF_FFFF, 0),
            struct.pack("<QII", 0, 8, 0) + struct.pack("<QII", SECTORS, 8, 0),
        ],
    )
    def test_bad_segments_change_nothing(self, disk: Disk, kind: int, data: bytes) -> None:
        assert disk.request(kind, readable=(data,)).status == IOERR
        assert disk.contents == PATTERN
        assert disk.read(0, 512) == PATTERN[:512]

    def test_unknown_flags(self, disk: Disk) -> None:
        """Unsupported before all other errors (5.2.6.2)."""
        for flags in (2, 0x8000_0000, UNMAP | 4):
            assert disk.segments(WRITE_ZEROES, (0, 8, flags)) == UNSUPP
            assert disk.segments(WRITE_ZEROES, (SECTORS, 8, 0), (0, 8, flags)) == UNSUPP
        assert disk.segments(DISCARD, (0, 8, UNMAP)) == UNSUPP
        assert disk.contents == PATTERN


class TestBadRequests:
    """Each fails alone: afterwards the device serves the next good one."""

    @pytest.fixture(autouse=True)
    def still_alive(self, disk: Disk) -> Iterator[None]:
        yield
        assert disk.read(1, 512) == PATTERN[512:1024]
        assert disk.contents == PATTERN
        assert not disk.driver.status & NEEDS_RESET

    @pytest.mark.parametrize("kind", [IN, OUT])
    @pytest.mark.parametrize(
        "sector, length",
        [
            (SECTORS, 512),
            (SECTORS - 1, 1024),
            (SECTORS + 1, 0),
            ((1 << 64) - 1, 512),
            (1 << 55, 512),
            ((1 << 55) - 1, 1024),
            (0, 511),
            (0, 513),
            (0, 1),
        ],
    )
    def test_out_of_range_or_not_whole_sectors(
        self, disk: Disk, kind: int, sector: int, length: int
    ) -> None:
        readable = (bytes(length),) if kind == OUT and length else ()
        writable = (length,) if kind == IN and length else ()
        reply = disk.request(kind, sector, readable=readable, writable=writable)
        assert reply.status == IOERR
        assert reply.data == bytes([UNTOUCHED]) * len(reply.data)
        assert reply.written == (0 if writable else 1)

    def test_no_header(self, disk: Disk) -> None:
        assert disk.chain((), (512, 1)).status == IOERR

    def test_short_header(self, disk: Disk) -> None:
        assert disk.chain((bytes(15),), (512, 1)).status == IOERR
        assert disk.chain((bytes(1),), (1,)) == (IOERR, b"", 1)

    def test_no_place_for_the_status(self, disk: Disk) -> None:
        header = struct.pack("<IIQ", OUT, 0, 0)
        assert disk.chain((header, bytes(512)), ()).written == 0
        assert disk.device.counters["failed"] == 1

    @pytest.mark.parametrize("kind", [2, 3, 5, 10, 14, 15, 26, 0x8000_0000, 0xFFFF_FFFF])
    def test_unknown_type(self, disk: Disk, kind: int) -> None:
        reply = disk.request(kind, readable=(bytes(512),), writable=(512,))
        assert reply.status == UNSUPP
        assert reply.data == bytes([UNTOUCHED]) * 512

    def test_a_buffer_outside_guest_memory(self, disk: Disk) -> None:
        ring = disk.driver.queues[0]
        assert ring is not None
        head = ring.add((struct.pack("<IIQ", FLUSH, 0, 0),), (1,))
        ring.write_desc(head, 1 << 40, 16, uapi.VRING_DESC_F_NEXT, head + 1)
        ring.publish()
        disk.driver.notify(0)
        used = []
        wait_until(lambda: used.extend(ring.collect()) or used)
        assert used[0][:2] == (head, 0)
        assert disk.device.counters["malformed"] == 1


class TestLifeCycle:
    def test_reset_at_any_time(self, disk: Disk) -> None:
        for _ in range(20):
            ring = disk.driver.queues[0]
            assert ring is not None
            for n in range(5):
                ring.add((struct.pack("<IIQ", IN, 0, n),), (4096, 1))
            ring.publish()
            disk.driver.notify(0)
            disk.driver.reset()
            before = bytes(disk.driver.memory.regions[0])
            time.sleep(0.002)
            assert disk.driver.memory.regions[0] == before
            disk.driver.start()
        assert disk.read(0, 512) == PATTERN[:512]

    def test_pause_and_resume(self, disk: Disk) -> None:
        ring = disk.driver.queues[0]
        assert ring is not None
        for n in range(10):
            disk.device.pause()
            disk.device.pause()
            head = ring.add((struct.pack("<IIQ", IN, 0, n),), (512, 1))
            ring.publish()
            disk.driver.notify(0)
            assert ring.collect() == []
            disk.device.resume()
            disk.device.resume()
            used = []
            wait_until(lambda: used.extend(ring.collect()) or used)  # noqa: B023
            assert used[0].head == head
            assert used[0].data == PATTERN[n * 512 : n * 512 + 512] + bytes([OK])

    def test_reset_while_paused(self, disk: Disk) -> None:
        disk.device.pause()
        disk.driver.reset()
        disk.device.resume()
        disk.driver.start()
        assert disk.read(0, 512) == PATTERN[:512]

    def test_a_ring_that_makes_no_sense(self, disk: Disk) -> None:
        ring = disk.driver.queues[0]
        assert ring is not None
        ring.write_avail_idx(ring.avail_idx + ring.size + 1)
        disk.driver.notify(0)
        wait_until(lambda: disk.driver.status & NEEDS_RESET)
        disk.driver.reset()
        disk.driver.start()
        assert not disk.driver.status & NEEDS_RESET
        assert disk.read(0, 512) == PATTERN[:512]

    def test_the_image_can_be_opened_again_at_once(self, engine: str, path: Path) -> None:
        for _ in range(5):
            with open_image(path) as image, started(VirtioBlk(image), path) as disk:
                assert disk.read(0, 512) == PATTERN[:512]

    def test_several_queues(self, engine: str, image: DiskImage, path: Path) -> None:
        with started(VirtioBlk(image, queues=4), path) as disk:
            assert disk.config().num_queues == 4
            for queue in range(4):
                reply = disk.request(IN, queue, writable=(512,), queue=queue)
                assert reply.data == PATTERN[queue * 512 : queue * 512 + 512]
            assert disk.device.counters["requests"] == 4

    def test_a_killed_process_leaves_no_lock(self, image: DiskImage, path: Path) -> None:
        image.close()
        command = [sys.executable, "-c", SERVE, str(path)]
        support = str(Path(__file__).parents[1])
        with subprocess.Popen(
            command, env={**os.environ, "PYTHONPATH": support}, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"served\n"
            other.kill()
            other.wait()
        with open_image(path):
            pass


# A process that serves a disk until it is killed.
SERVE = """
import struct, sys, time
from support.mmio_driver import MmioDriver
from pyvmm.backends.disk import open_image
from pyvmm.virtio.blk import VirtioBlk

driver = MmioDriver(VirtioBlk(open_image(sys.argv[1])))
driver.start()
driver.request(0, (struct.pack("<IIQ", 0, 0, 0),), (512, 1))
driver.replies()
print("served", flush=True)
time.sleep(60)
"""


class TestBackend:
    def test_an_image_that_became_shorter(self, disk: Disk) -> None:
        os.truncate(disk.path, SIZE // 2)
        assert disk.request(IN, SECTORS - 1, writable=(512,)).status == IOERR
        across = disk.request(IN, SECTORS // 2 - 1, writable=(1024,))
        assert across.status == IOERR
        assert disk.read(0, 512) == PATTERN[:512]

    def test_read_only(self, engine: str, path: Path) -> None:
        with (
            open_image(path, readonly=True) as image,
            started(VirtioBlk(image), path) as disk,
        ):
            assert disk.device.features & 1 << uapi.VIRTIO_BLK_F_RO
            assert disk.request(OUT, 0, readable=(bytes(512),)).status == IOERR
            assert disk.segments(DISCARD, (0, 8, 0)) == IOERR
            assert disk.segments(WRITE_ZEROES, (0, 8, 0)) == IOERR
            assert disk.request(FLUSH).status == OK
            assert disk.read(0, 512) == PATTERN[:512]
            assert disk.contents == PATTERN

    def test_direct_io_with_buffers_that_it_refuses(self, engine: str, path: Path) -> None:
        with (
            open_image(path, direct=True) as image,
            started(VirtioBlk(image), path) as disk,
        ):
            length = 64 << 10
            # Buffers of the driver are 16-aligned: next to none fits.
            cuts = (3, length - 1000, 997)
            reply = disk.request(IN, 16, writable=cuts)
            assert (reply.status, reply.data) == (OK, PATTERN[8192 : 8192 + length])
            data = os.urandom(length)
            assert disk.request(OUT, 32, readable=(data[:5], data[5:])).status == OK
            assert disk.contents[16384 : 16384 + length] == data

    def test_direct_io_in_sectors_of_4096_bytes(self, engine: str, path: Path) -> None:
        with (
            loop_device(path, "--sector-size", "4096") as device,
            open_image(device, direct=True) as image,
            started(VirtioBlk(image), path) as disk,
        ):
            assert disk.config().blk_size == 4096
            assert disk.read(8, 4096) == PATTERN[4096:8192]
            assert disk.request(IN, 1, writable=(4096,)).status == IOERR
            assert disk.request(IN, 0, writable=(512,)).status == IOERR
            assert disk.segments(DISCARD, (8, 1, 0)) == IOERR

    def test_a_block_device(self, engine: str, path: Path) -> None:
        """Discard and zeroes, which files and block devices do in different ways."""
        with (
            loop_device(path) as device,
            open_image(device) as image,
            started(VirtioBlk(image), path) as disk,
        ):
            disk.write(0, b"new!" * 128)
            assert disk.request(FLUSH).status == OK
            assert disk.contents.startswith(b"new!" * 128)
            assert disk.segments(DISCARD, (0, SECTORS // 2, 0)) == OK
            assert disk.allocated <= SIZE // 2
            start = SECTORS // 2
            assert disk.segments(WRITE_ZEROES, (start, 8, 0), (start + 8, 8, UNMAP)) == OK
            assert disk.read(start, 8192) == bytes(8192)
            assert disk.read(start + 16, 512) == PATTERN[SIZE // 2 + 8192 :][:512]

    def test_zeroes_where_the_file_system_has_no_call_for_them(self, engine: str) -> None:
        """A tmpfs has no FALLOC_FL_ZERO_RANGE: the zeroes are written."""
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.truncate(8 * SIZE)
            path = Path(file.name)
            path.write_bytes(PATTERN * 8)
            with open_image(path) as image, started(VirtioBlk(image), path) as disk:
                # More than is written at once, and not a multiple of it.
                assert disk.segments(WRITE_ZEROES, (1, 5 * SECTORS, 0)) == OK
                contents = disk.contents
                assert contents[:512] == PATTERN[:512]
                assert contents[512 : 512 + 5 * SIZE] == bytes(5 * SIZE)
                assert contents[512 + 5 * SIZE :] == (PATTERN * 8)[512 + 5 * SIZE :]
                assert disk.allocated >= 8 * SIZE

    def test_a_full_file_system(self, engine: str, tmp_path: Path) -> None:
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", tmp_path], capture_output=True
        )
        if mounted.returncode:
            pytest.skip("only root may mount a file system")
        try:
            path = tmp_path / "disk.img"
            with path.open("wb") as file:
                file.truncate(SIZE)
            with open_image(path) as image, started(VirtioBlk(image), path) as disk:
                statuses = [
                    disk.request(OUT, n * 128, readable=(bytes(1 << 16),)).status for n in range(8)
                ]
                assert statuses[0] == OK
                assert statuses[-1] == IOERR
                assert disk.read(SECTORS - 1, 512) == bytes(512)
        finally:
            subprocess.run(["umount", tmp_path], check=True)


class TestConfiguration:
    def test_of_a_writable_image(self, image: DiskImage) -> None:
        device = VirtioBlk(image, queue_size=128)
        config = uapi.virtio_blk_config.from_buffer_copy(device.read_config())
        assert config.capacity == SECTORS
        assert config.seg_max == 126
        assert config.blk_size == 512
        assert (config.physical_block_exp, config.min_io_size) == (3, 8)
        assert config.max_discard_sectors == config.max_write_zeroes_sectors == 1 << 22
        assert config.max_discard_seg == config.max_write_zeroes_seg == 32
        assert config.discard_sector_alignment * 512 == image.discard_granularity
        assert config.write_zeroes_may_unmap == 1
        assert config.wce == 1
        assert bytes(config.unused1) == bytes(3)

    def test_the_device_offers_flush_wherever_it_offers_the_cache_mode(
        self, image: DiskImage
    ) -> None:
        features = VirtioBlk(image).features
        assert features & 1 << uapi.VIRTIO_BLK_F_FLUSH
        assert features & 1 << uapi.VIRTIO_BLK_F_CONFIG_WCE

    @pytest.mark.parametrize("serial", ["x" * 21, "München"])
    def test_bad_serial(self, image: DiskImage, serial: str) -> None:
        with pytest.raises(UsageError, match="at most 20 characters"):
            VirtioBlk(image, serial=serial)

    @pytest.mark.parametrize("queues", [0, 65])
    def test_bad_number_of_queues(self, image: DiskImage, queues: int) -> None:
        with pytest.raises(UsageError, match="give 1 to 64"):
            VirtioBlk(image, queues=queues)

    @pytest.mark.parametrize(
        "without, writethrough, stable",
        [
            ((), False, False),
            ((), True, True),
            (("CONFIG_WCE",), False, False),
            (("CONFIG_WCE",), True, True),
            (("FLUSH", "CONFIG_WCE"), False, True),
            (("FLUSH",), False, True),
        ],
    )
    def test_when_writes_are_stable(
        self,
        image: DiskImage,
        path: Path,
        without: tuple[str, ...],
        writethrough: bool,
        stable: bool,
    ) -> None:
        """The three cases of 5.2.6.2."""
        bits = sum(1 << getattr(uapi, f"VIRTIO_BLK_F_{name}") for name in without)
        with started(VirtioBlk(image, writethrough=writethrough), path, without=bits) as disk:
            assert disk.device._device.writethrough == stable
            disk.write(0, bytes(512))

    def test_the_driver_chooses_the_cache_mode(self, disk: Disk) -> None:
        for writeback in (0, 1, 0):
            disk.driver.transport.write(WCE_REGISTER, bytes([writeback]))
            assert disk.driver.transport.read(WCE_REGISTER, 1) == bytes([writeback])
            assert disk.device._device.writethrough == (not writeback)
            disk.write(0, PATTERN[:512])
            assert disk.segments(WRITE_ZEROES, (8, 8, 0)) == OK
        disk.driver.reset()
        assert disk.driver.transport.read(WCE_REGISTER, 1) == b"\1"

    def test_nothing_else_is_writable(self, disk: Disk) -> None:
        before = disk.device.read_config()
        for offset in (0, 8, 33, 34, len(before) - 1):
            disk.driver.transport.write(uapi.VIRTIO_MMIO_CONFIG + offset, b"\x5a")
        assert disk.device.read_config() == before


class TestEngine:
    def test_an_image_in_memory_is_served_without_io_uring(self) -> None:
        assert blk.choose_engine(True) == ("sync", "")

    def test_io_uring_where_it_is_allowed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blk, "lib", _Lib(0))
        assert blk.choose_engine(False) == ("io_uring", "")

    def test_a_fallback_is_said(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(blk, "lib", _Lib(-errno.EPERM))
        engine, remark = blk.choose_engine(False)
        assert engine == "sync"
        assert "Operation not permitted" in remark
        assert "kernel.io_uring_disabled=0" in remark


class _Lib:
    def __init__(self, error: int) -> None:
        self._error = error

    def blk_io_uring_check(self) -> int:
        return self._error
