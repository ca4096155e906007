"""Disks behind an NBD server, good and bad."""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.blk_driver import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    UNMAP,
    WRITE_ZEROES,
    Disk,
    started,
)
from support.mmio_driver import wait_until
from support.nbd_server import (
    ALL,
    CAN_MULTI_CONN,
    FUA,
    NO_HOLE,
    READ_ONLY,
    SEND_FLUSH,
    SEND_FUA,
    SEND_TRIM,
    SEND_WRITE_ZEROES,
    NbdServer,
)
from support.scsi_driver import ScsiDriver

from pyvmm.backends.scsi.command import CommandThread
from pyvmm.backends.scsi.disk import ScsiDisk
from pyvmm.backends.storage import open_disk
from pyvmm.errors import UsageError
from pyvmm.virtio.blk import VirtioBlk
from pyvmm.virtio.scsi import VirtioScsi

nbd_lib = pytest.importorskip("pyvmm._nbd", reason="pyvmm was built without libnbd").lib

SIZE = 256 << 10
PATTERN = b"".join(struct.pack("<Q", n) for n in range(SIZE // 8))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[NbdServer]:
    server = NbdServer(tmp_path / "socket", bytearray(PATTERN))
    yield server
    server.kill()


@pytest.fixture
def disk(engine: str, server: NbdServer) -> Iterator[Disk]:
    with (
        open_disk(nbd=server.uri, threads=2) as image,
        started(VirtioBlk(image, queues=2), server.path) as disk,
    ):
        yield disk


def test_requests(disk: Disk, server: NbdServer) -> None:
    assert disk.read(7, 4096) == PATTERN[7 * 512 : 7 * 512 + 4096]
    data = os.urandom(8192)
    disk.write(16, data)
    assert server.data[8192:16384] == data
    cuts = (data[:1], data[1:700], data[700:701], data[701:4096])
    assert disk.request(OUT, 64, readable=cuts).status == OK
    assert disk.request(IN, 64, writable=(100, 1, 3995)).data == data[:4096]
    assert disk.request(FLUSH, queue=1).status == OK
    assert disk.segments(DISCARD, (8, 8, 0)) == OK
    assert disk.segments(WRITE_ZEROES, (24, 8, UNMAP), (40, 8, 0)) == OK
    assert disk.segments(WRITE_ZEROES, (40, 8, 0)) == OK
    kinds = [each[0] for each in server.seen]
    assert kinds == ["read", "write", "write", "read", "flush", "trim", *["zero"] * 3]
    assert server.seen[-1] == ("zero", NO_HOLE, 40 * 512, 4096)
    assert disk.config().capacity == SIZE // 512


def test_each_thread_has_a_connection_that_is_kept(disk: Disk, server: NbdServer) -> None:
    for _ in range(3):
        for queue in (0, 1):
            assert disk.request(IN, 0, writable=(512,), queue=queue).status == OK
        disk.driver.reset()
        disk.driver.start(0)
    assert len(server.connections) == 2


def test_many_in_flight(disk: Disk, server: NbdServer) -> None:
    server.stalled.set()
    ring = disk.driver.queues[0]
    assert ring is not None
    for sector in range(5):
        ring.add((struct.pack("<IIQ", IN, 0, sector),), (512, 1))
    assert ring.publish()
    disk.driver.notify(0)
    wait_until(lambda: len(server.seen) == 5)
    server.kill()
    used = []
    wait_until(lambda: used.extend(ring.collect()) or len(used) == 5)
    assert disk.device.counters["failed"] == 5


def test_a_random_load_against_a_model(disk: Disk, server: NbdServer) -> None:
    model = bytearray(PATTERN)
    for number in range(200):
        sector, count = number * 37 % 400, 1 + number % 60
        data = bytes([number]) * (count * 512)
        if number % 3:
            disk.write(sector, data)
            model[sector * 512 : (sector + count) * 512] = data
        else:
            assert disk.read(sector, count * 512) == model[sector * 512 : (sector + count) * 512]
    assert server.data == model


def test_a_disk_that_is_unplugged(server: NbdServer) -> None:
    """The queues of the SCSI controller go on, and nothing of the disk is left with them."""
    commands = CommandThread()
    device = VirtioScsi(queues=2)
    images = []

    def plug(lun: int) -> None:
        image = open_disk(nbd=server.uri, threads=2)
        images.append((image, ScsiDisk(image, commands, serial=str(lun))))
        device.plug(0, lun, images[-1][1])

    def read(lun: int, queue: int) -> bytes:
        cdb = struct.pack(">BBIBHB", 0x28, 0, 8, 0, 1, 0)
        return driver.command(cdb, into=512, lun=lun, queue=queue).data

    plug(0)
    with ScsiDriver(device) as driver:
        for _ in range(3):
            plug(1)
            driver.settle(0, 1)
            driver.settle(0, 0)
            for queue in (0, 1):
                assert read(1, queue) == read(0, queue) == PATTERN[4096:4608]
            device.unplug(0, 1)
            image, unit = images.pop()
            unit.close()
            image.close()
            # Each disk had two connections.
            wait_until(lambda: sum(each.fileno() >= 0 for each in server.connections) == 2)
            driver.settle(0, 0)
            assert read(0, 0) == PATTERN[4096:4608]
    image, unit = images.pop()
    unit.close()
    image.close()
    commands.close()


class TestBadServer:
    def test_its_errors_are_those_of_the_request(self, disk: Disk, server: NbdServer) -> None:
        server.fail = errno.ENOSPC
        assert disk.request(OUT, 0, readable=(bytes(512),)).status == IOERR
        server.fail = 0
        assert disk.read(0, 512) == PATTERN[:512]

    def test_death_in_the_middle_and_return(self, disk: Disk, server: NbdServer) -> None:
        assert disk.read(0, 512) == PATTERN[:512]
        server.stalled.set()
        replies = []
        thread = threading.Thread(
            target=lambda: replies.append(disk.request(IN, 0, writable=(512,)))
        )
        thread.start()
        wait_until(lambda: len(server.seen) == 2)
        server.kill()
        thread.join(10)
        assert [reply.status for reply in replies] == [IOERR]
        start = time.monotonic()
        assert disk.request(IN, 0, writable=(512,)).status == IOERR  # it is not there
        assert disk.request(IN, 0, writable=(512,)).status == IOERR  # it is not tried again
        assert time.monotonic() - start < 2
        server.stalled.clear()
        server.start()
        time.sleep(nbd_lib.BLK_NBD_RETRY_MS / 1000)
        assert disk.read(0, 512) == PATTERN[:512]

    def test_a_server_that_falls_silent(
        self, engine: str, server: NbdServer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("pyvmm.backends.nbd.ANSWER_SECONDS", 0.5)
        with (
            open_disk(nbd=server.uri) as image,
            started(VirtioBlk(image), server.path) as disk,
        ):
            assert disk.read(0, 512) == PATTERN[:512]
            time.sleep(0.6)  # nothing is asked, so nothing is missed
            assert disk.read(0, 512) == PATTERN[:512]
            server.stalled.set()
            start = time.monotonic()
            assert disk.request(IN, 0, writable=(512,)).status == IOERR
            assert 0.4 < time.monotonic() - start < 5
            server.stalled.clear()
            assert disk.read(8, 512) == PATTERN[4096:4608]
            server.stalled.set()
            ring = disk.driver.queues[0]
            assert ring is not None
            ring.add((struct.pack("<IIQ", IN, 0, 0),), (512, 1))
            assert ring.publish()
            disk.driver.notify(0)
            disk.driver.reset()  # does not hang either
            assert time.monotonic() - start < 10

    def test_death_while_nothing_is_under_way(self, disk: Disk, server: NbdServer) -> None:
        """The first request after it finds the new server, or fails, and the next one does."""
        assert disk.read(0, 512) == PATTERN[:512]
        server.kill()
        server.start()
        disk.request(IN, 0, writable=(512,))
        assert disk.read(8, 512) == PATTERN[4096:4608]

    def test_another_disk_after_the_return(self, disk: Disk, server: NbdServer) -> None:
        assert disk.read(0, 512) == PATTERN[:512]
        server.kill()
        server.data = bytearray(SIZE // 2)
        server.start()
        for _ in range(3):
            assert disk.request(IN, 0, writable=(512,)).status == IOERR

    def test_a_server_that_does_not_let_in(self, disk: Disk, server: NbdServer) -> None:
        """It takes the connection and says nothing."""
        assert disk.read(0, 512) == PATTERN[:512]
        server.kill()
        server._negotiate = lambda connection: time.sleep(60)  # type: ignore[method-assign]
        server.start()
        disk.request(IN, 0, writable=(512,))
        start = time.monotonic()
        assert disk.request(IN, 0, writable=(512,)).status == IOERR
        assert time.monotonic() - start < 2 * nbd_lib.BLK_NBD_CONNECT_MS / 1000


@pytest.mark.parametrize(
    "flags, commands",
    [
        (ALL, [("write", FUA)]),
        (ALL - SEND_FUA, [("write", 0), ("flush", 0)]),
        (ALL - SEND_FUA - SEND_FLUSH, [("write", 0)]),
    ],
)
def test_stable_writes(tmp_path: Path, flags: int, commands: list[tuple[str, int]]) -> None:
    server = NbdServer(tmp_path / "socket", bytearray(PATTERN), flags)
    with (
        open_disk(nbd=server.uri) as image,
        started(VirtioBlk(image, writethrough=True), tmp_path) as disk,
    ):
        disk.write(0, bytes(512))
        assert [each[:2] for each in server.seen] == commands
        assert disk.request(FLUSH).status == OK
    server.close()


def test_a_server_that_can_only_read_and_write(tmp_path: Path) -> None:
    server = NbdServer(tmp_path / "socket", bytearray(PATTERN), SEND_FLUSH)
    with open_disk(nbd=server.uri) as image, started(VirtioBlk(image), tmp_path) as disk:
        assert image.discard_granularity == 0
        assert disk.segments(WRITE_ZEROES, (8, 600 - 8, 0)) != OK  # beyond the end
        assert disk.segments(WRITE_ZEROES, (8, 80, 0)) == OK
        assert disk.read(0, 65536) == PATTERN[:4096] + bytes(80 * 512) + PATTERN[88 * 512 : 65536]
    server.close()


def test_snapshot(engine: str, tmp_path: Path) -> None:
    server = NbdServer(tmp_path / "socket", bytearray(PATTERN), READ_ONLY | CAN_MULTI_CONN)
    with (
        open_disk(nbd=server.uri, snapshot=True) as image,
        started(VirtioBlk(image), tmp_path) as disk,
    ):
        disk.write(5, b"x" * 512)
        assert disk.segments(DISCARD, (8, 8, 0)) == OK
        expected = PATTERN[:2560] + b"x" * 512 + PATTERN[3072:4096] + bytes(4096)
        assert disk.read(0, 8192) == expected
        assert disk.request(IN, 0, writable=(100, 4000, 4092)).data == expected
    assert server.data == PATTERN
    server.close()


def test_large_blocks(tmp_path: Path) -> None:
    server = NbdServer(tmp_path / "socket", bytearray(PATTERN), ALL, block=4096)
    with open_disk(nbd=server.uri) as image, started(VirtioBlk(image), tmp_path) as disk:
        assert disk.config().blk_size == 4096
        assert disk.request(IN, 1, writable=(512,)).status == IOERR
        assert disk.read(8, 4096) == PATTERN[4096:8192]
    server.close()


class TestRefusal:
    def refusal(self, uri: str, **options: object) -> str:
        with pytest.raises(UsageError) as caught:
            open_disk(nbd=uri, **options)  # type: ignore[arg-type]
        return str(caught.value)

    def test_nobody_there(self, tmp_path: Path) -> None:
        uri = f"nbd+unix:///?socket={tmp_path}/nothing"
        assert self.refusal(uri) == (
            f"the NBD server of {uri} cannot be used (connect: No such file or directory): "
            f"check that it runs and offers that export (nbdinfo --list {uri})"
        )

    def test_refused(self) -> None:
        message = self.refusal("nbd://127.0.0.1:1")
        assert "the NBD server of nbd://127.0.0.1:1 cannot be used (" in message
        assert "Connection refused" in message

    def test_no_uri(self) -> None:
        assert "cannot be used (" in self.refusal("nbd://[")

    def test_read_only(self, tmp_path: Path) -> None:
        server = NbdServer(tmp_path / "socket", bytearray(PATTERN), READ_ONLY)
        assert self.refusal(server.uri) == (
            f"the NBD server offers {server.uri} for reading alone: give readonly=on or snapshot=on"
        )
        open_disk(nbd=server.uri, readonly=True).close()
        server.close()

    def test_one_connection(self, tmp_path: Path) -> None:
        server = NbdServer(tmp_path / "socket", bytearray(PATTERN), SEND_TRIM | SEND_WRITE_ZEROES)
        assert self.refusal(server.uri, threads=2) == (
            f"the NBD server of {server.uri} does not keep several connections consistent "
            "(NBD_FLAG_CAN_MULTI_CONN): give queues=1"
        )
        server.close()

    @pytest.mark.parametrize("size, block", [(1000, 0), (SIZE, 8192)])
    def test_odd_sizes(self, tmp_path: Path, size: int, block: int) -> None:
        server = NbdServer(tmp_path / "socket", bytearray(size), ALL, block=block)
        assert self.refusal(server.uri) == (
            f"the NBD export {server.uri} has {size} bytes in blocks of {max(512, block)}: "
            "a disk has whole blocks of 512 to 4096 bytes"
        )
        server.close()

    def test_empty(self, tmp_path: Path) -> None:
        server = NbdServer(tmp_path / "socket", bytearray())
        assert self.refusal(server.uri) == f"the NBD export {server.uri} is empty"
        server.close()
