"""virtio-blk beside its requests: errors of the host, other sizes, limits."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from queue import SimpleQueue

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.blk_driver import (
    DISCARD,
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    WRITE_ZEROES,
    Disk,
    Reply,
    started,
)
from support.loop_device import loop_device
from support.mmio_driver import CONFIG, wait_until
from support.nbd_server import NbdServer

from pyvmm._core import ffi, lib
from pyvmm.backends.storage import open_disk
from pyvmm.errors import UsageError
from pyvmm.virtio.blk import VirtioBlk

SIZE = 1 << 20
PATTERN = b"".join(struct.pack("<Q", n) for n in range(SIZE // 8))
SECOND = 1_000_000_000


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A directory with room for 64 KiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield directory
    subprocess.run(["umount", directory], check=True)


class Later:
    """A request on a thread of its own."""

    def __init__(self, disk: Disk, *arguments: object, **options: object) -> None:
        self.reply: Reply | None = None

        def run() -> None:
            self.reply = disk.request(*arguments, **options)  # type: ignore[arg-type]

        self._thread = threading.Thread(target=run)
        self._thread.start()

    def join(self) -> Reply:
        self._thread.join(10)
        assert self.reply is not None
        return self.reply


class TestReport:
    def test_a_full_file_system(self, engine: str, small: Path) -> None:
        path = small / "disk.img"
        path.touch()
        os.truncate(path, SIZE)
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            disk.write(0, b"x" * 32768)
            assert disk.request(OUT, 64, readable=(b"y" * 65536,)).status == IOERR
            assert disk.segments(WRITE_ZEROES, (1024, 512, 0)) == IOERR
            assert disk.request(FLUSH).status == OK
            assert disk.read(0, 32768) == b"x" * 32768
            assert disk.segments(DISCARD, (0, 1024, 0)) == OK
            disk.write(64, b"z" * 32768)


class TestStop:
    def test_a_full_file_system(self, engine: str, small: Path) -> None:
        """The queue waits until there is room; then nothing is lost, and all is written once."""
        path = small / "disk.img"
        path.touch()
        os.truncate(path, SIZE)
        errors: SimpleQueue[int] = SimpleQueue()
        with (
            open_disk(path) as image,
            started(VirtioBlk(image, on_error=errors.put), path) as disk,
        ):
            filler = small / "filler"
            filler.write_bytes(bytes(32768))
            data = os.urandom(61440)
            later = Later(disk, OUT, 8, readable=(data[:777], data[777:]))
            assert errors.get(timeout=10) == errno.ENOSPC
            assert later.reply is None
            disk.device.resume()
            assert errors.get(timeout=10) == errno.ENOSPC  # still full
            filler.unlink()
            disk.device.resume()
            assert later.join().status == OK
            assert disk.read(8, 61440) == data
            assert errors.empty()

    def test_ranges(self, engine: str, small: Path) -> None:
        path = small / "disk.img"
        path.touch()
        os.truncate(path, SIZE)
        errors: SimpleQueue[int] = SimpleQueue()
        with (
            open_disk(path) as image,
            started(VirtioBlk(image, on_error=errors.put), path) as disk,
        ):
            filler = small / "filler"
            filler.write_bytes(bytes(49152))
            segments = b"".join(struct.pack("<QII", *each) for each in ((0, 8, 0), (64, 64, 0)))
            later = Later(disk, WRITE_ZEROES, readable=(segments,))
            assert errors.get(timeout=10) == errno.ENOSPC
            filler.unlink()
            disk.device.resume()
            assert later.join().status == OK

    def test_a_reset_forgets_what_waits(self, engine: str, small: Path) -> None:
        path = small / "disk.img"
        path.touch()
        os.truncate(path, SIZE)
        errors: SimpleQueue[int] = SimpleQueue()
        with (
            open_disk(path) as image,
            started(VirtioBlk(image, on_error=errors.put), path) as disk,
        ):
            filler = small / "filler"
            filler.write_bytes(bytes(49152))
            ring = disk.driver.queues[0]
            assert ring is not None
            ring.add((struct.pack("<IIQ", OUT, 0, 0), b"x" * 32768), (1,))
            assert ring.publish()
            disk.driver.notify(0)
            assert errors.get(timeout=10) == errno.ENOSPC
            disk.driver.reset()
            disk.driver.start(0)
            assert disk.read(0, 32768)[-512:] == bytes(512)
            filler.unlink()
            disk.device.resume()
            disk.write(0, b"y" * 512)

    def test_pause_and_resume_while_it_waits(self, engine: str, small: Path) -> None:
        path = small / "disk.img"
        path.touch()
        os.truncate(path, SIZE)
        errors: SimpleQueue[int] = SimpleQueue()
        with (
            open_disk(path) as image,
            started(VirtioBlk(image, queues=2, on_error=errors.put), path) as disk,
        ):
            filler = small / "filler"
            filler.write_bytes(bytes(49152))
            later = Later(disk, OUT, 0, readable=(b"x" * 32768,))
            errors.get(timeout=10)
            assert disk.request(IN, 0, writable=(512,), queue=1).status == OK
            disk.device.pause()
            filler.unlink()
            disk.device.resume()
            assert later.join().status == OK
            for queue in (0, 1):
                assert disk.request(IN, 0, writable=(512,), queue=queue).data == b"x" * 512

    def test_a_server_that_comes_back(self, engine: str, tmp_path: Path) -> None:
        pytest.importorskip("pyvmm._nbd", reason="pyvmm was built without libnbd")
        server = NbdServer(tmp_path / "socket", bytearray(PATTERN))
        errors: SimpleQueue[int] = SimpleQueue()
        with (
            open_disk(nbd=server.uri) as image,
            started(VirtioBlk(image, on_error=errors.put), tmp_path) as disk,
        ):
            assert disk.read(0, 512) == PATTERN[:512]
            server.kill()
            later = Later(disk, OUT, 0, readable=(b"x" * 1000, b"x" * 24))
            assert errors.get(timeout=10)
            server.start()
            deadline = time.monotonic() + 10
            while later.reply is None and time.monotonic() < deadline:
                disk.device.resume()
                time.sleep(0.1)
            assert later.join().status == OK
            assert server.data == b"x" * 1024 + PATTERN[1024:]
        server.kill()


class TestResize:
    def test_a_file(self, engine: str, path: Path) -> None:
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            assert disk.request(IN, SIZE // 512, writable=(512,)).status == IOERR
            disk.driver.interrupted()
            disk.device.resize(2 * SIZE)
            assert path.stat().st_size == 2 * SIZE
            assert disk.config().capacity == 2 * SIZE // 512
            assert disk.driver.interrupted() & CONFIG
            assert disk.read(SIZE // 512, 512) == bytes(512)
            disk.write(2 * SIZE // 512 - 1, b"x" * 512)
            assert disk.read(0, 512) == PATTERN[:512]

    def test_what_others_did_to_the_file(self, path: Path) -> None:
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            os.truncate(path, SIZE + 4096)
            disk.device.resize()
            assert disk.config().capacity == (SIZE + 4096) // 512

    def test_a_snapshot(self, engine: str, path: Path) -> None:
        with open_disk(path, snapshot=True) as image, started(VirtioBlk(image), path) as disk:
            disk.write(8, b"x" * 512)
            disk.device.resize(64 * SIZE)
            assert disk.config().capacity == 64 * SIZE // 512
            assert disk.read(SIZE // 512 - 1, 1024) == PATTERN[-512:] + bytes(512)
            disk.write(64 * SIZE // 512 - 1, b"y" * 512)
            assert disk.read(64 * SIZE // 512 - 1, 512) == b"y" * 512
            assert disk.read(8, 1024) == b"x" * 512 + PATTERN[9 * 512 : 10 * 512]
        assert path.read_bytes() == PATTERN

    def test_a_block_device(self, path: Path) -> None:
        with (
            loop_device(path) as device,
            open_disk(str(device)) as image,
            started(VirtioBlk(image), path) as disk,
        ):
            with pytest.raises(UsageError) as caught:
                disk.device.resize(2 * SIZE)
            assert str(caught.value) == (
                f"the block device {device} has {SIZE} bytes, not {2 * SIZE}: "
                "resize it first (lvextend), then have its size read anew"
            )
            os.truncate(path, 2 * SIZE)
            subprocess.run(["losetup", "-c", device], check=True)
            disk.device.resize()
            assert disk.config().capacity == 2 * SIZE // 512
            disk.device.resize(2 * SIZE)

    @pytest.mark.parametrize(
        "size, options, message",
        [
            (
                SIZE // 2,
                {},
                f"{{}} has {SIZE} bytes and cannot shrink to {SIZE // 2} while a guest uses it: "
                "that would cut off what it holds",
            ),
            (
                SIZE + 1,
                {},
                f"{{}} cannot have {SIZE + 1} bytes, which is not a multiple of 512",
            ),
            (2 * SIZE, {"readonly": True}, "{} has readonly=on and cannot be made larger"),
            (None, {"snapshot": True}, "{} has snapshot=on: say which size it is to have"),
            (1 << 62, {}, f"{{}} cannot be made {1 << 62} bytes large: File too large"),
        ],
    )
    def test_refusals(
        self, path: Path, size: int | None, options: dict[str, bool], message: str
    ) -> None:
        with (
            open_disk(path, **options) as image,  # type: ignore[arg-type]
            started(VirtioBlk(image), path) as disk,
        ):
            with pytest.raises(UsageError) as caught:
                disk.device.resize(size)
            assert str(caught.value) == message.format(path)
            assert disk.read(0, 512) == PATTERN[:512]
            assert disk.config().capacity == SIZE // 512

    def test_what_a_server_has(self, tmp_path: Path) -> None:
        pytest.importorskip("pyvmm._nbd", reason="pyvmm was built without libnbd")
        server = NbdServer(tmp_path / "socket", bytearray(PATTERN))
        with open_disk(nbd=server.uri) as image, pytest.raises(UsageError) as caught:
            image.resize(2 * SIZE)
        assert str(caught.value) == (
            f"{server.uri} keeps its size while it is in use: end the guest, "
            "then use qemu-img resize or what the server has for it"
        )
        server.close()


class TestLimit:
    @pytest.mark.parametrize("limits", [{"iops": 100}, {"bps": 100 * 512}])
    def test_requests_and_bytes(self, engine: str, path: Path, limits: dict[str, int]) -> None:
        with open_disk(path) as image, started(VirtioBlk(image, queues=2), path) as disk:
            disk.device.limit(**limits)
            start = time.monotonic()
            for number in range(60):  # 10 at once, then one every 10 ms, whatever the queue
                disk.request(IN, number, writable=(512,), queue=number % 2)
            took = time.monotonic() - start
            assert 0.45 < took < 5
            disk.device.limit()
            start = time.monotonic()
            for number in range(60):
                disk.read(number, 512)
            assert time.monotonic() - start < took

    def test_a_large_request_is_paid_for_afterwards(self, engine: str, path: Path) -> None:
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            disk.device.limit(bps=65536)
            start = time.monotonic()
            disk.read(0, 65536)
            assert time.monotonic() - start < 0.5
            disk.read(0, 512)
            assert 0.8 < time.monotonic() - start < 5

    def test_other_limits_are_for_what_waits_already(self, engine: str, path: Path) -> None:
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            disk.device.limit(bps=1)
            disk.read(0, 512)  # some minutes' worth
            later = Later(disk, IN, 0, writable=(512,))
            time.sleep(0.1)
            assert later.reply is None
            disk.device.limit(bps=1 << 30)
            assert later.join().status == OK

    def test_a_flush_is_free(self, path: Path) -> None:
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            disk.device.limit(bps=1)
            disk.read(0, 512)
            assert disk.request(FLUSH).status == OK

    def test_pause_and_reset_do_not_wait(self, engine: str, path: Path) -> None:
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            disk.device.limit(bps=1)
            disk.read(0, 512)
            later = Later(disk, IN, 1, writable=(512,))
            time.sleep(0.1)
            start = time.monotonic()
            disk.device.pause()
            disk.device.resume()
            time.sleep(0.1)
            assert later.reply is None  # it waits again
            disk.device.limit()
            assert later.join().data == PATTERN[512:1024]
            disk.device.limit(bps=1)
            disk.read(0, 512)
            ring = disk.driver.queues[0]
            assert ring is not None
            ring.add((struct.pack("<IIQ", IN, 0, 0),), (512, 1))
            assert ring.publish()
            disk.driver.notify(0)
            disk.driver.reset()
            assert time.monotonic() - start < 5

    def test_a_few_in_flight_in_their_order(self, engine: str, path: Path) -> None:
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            disk.device.limit(iops=20)
            ring = disk.driver.queues[0]
            assert ring is not None
            heads = [ring.add((struct.pack("<IIQ", IN, 0, n),), (512, 1)) for n in range(5)]
            start = time.monotonic()
            assert ring.publish()
            disk.driver.notify(0)
            used: list[int] = []
            wait_until(lambda: used.extend(each.head for each in ring.collect()) or len(used) == 5)
            assert used == heads
            assert time.monotonic() - start > 0.1


@given(
    rate=st.integers(1000, 10**9),
    requests=st.lists(
        st.tuples(st.integers(0, SECOND), st.integers(0, 1 << 20)), min_size=1, max_size=50
    ),
)
def test_the_bucket_against_a_model(rate: int, requests: list[tuple[int, int]]) -> None:
    """In any span of time no more starts than the rate gives, a burst and one request."""
    image = ffi.new("struct blk_image *")
    lib.blk_limit_set(image, 0, rate)
    now = 10 * SECOND
    starts = []
    for pause, size in requests:
        now += pause
        start = max(now, lib.blk_limit_reserve(ffi.addressof(image, "limit"), now, size))
        assert not starts or start >= starts[-1][0]
        starts.append((start, size))
    for first in range(len(starts)):
        moved = 0
        for start, size in starts[first:]:
            allowed = (start - starts[first][0] + SECOND // 10) * rate / SECOND
            assert moved <= allowed + len(starts)  # each cost is rounded down
            moved += size
