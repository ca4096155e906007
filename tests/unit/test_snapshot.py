"""Throw-away writes: what the guest sees is what it wrote, and the image stays as it is."""

from __future__ import annotations

import errno
import os
import random
import resource
import struct
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
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
from support.loop_device import loop_device

from pyvmm.backends.disk import open_image
from pyvmm.backends.storage import open_disk
from pyvmm.errors import UsageError
from pyvmm.virtio.blk import VirtioBlk

SIZE = 1 << 20
SECTORS = SIZE // 512
PATTERN = b"".join(struct.pack("<Q", n) for n in range(SIZE // 8))
PIECE = 65536  # as much as the driver has buffers for


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "base.img"
    path.write_bytes(PATTERN)
    return path


@pytest.fixture(params=["cached", "direct"])
def disk(engine: str, path: Path, request: pytest.FixtureRequest) -> Iterator[Disk]:
    direct = request.param == "direct"
    with (
        open_disk(path, snapshot=True, direct=direct) as image,
        started(VirtioBlk(image, queues=2), path) as disk,
    ):
        yield disk
    assert path.read_bytes() == PATTERN


def contents(disk: Disk) -> bytes:
    """All that the guest sees."""
    return b"".join(disk.read(at // 512, PIECE) for at in range(0, SIZE, PIECE))


def test_the_base_shows_until_it_is_written(disk: Disk) -> None:
    assert contents(disk) == PATTERN
    data = os.urandom(8192)
    disk.write(16, data)
    assert contents(disk) == PATTERN[:8192] + data + PATTERN[16384:]
    disk.write(24, PATTERN[:4096])
    assert disk.read(16, 8192) == data[:4096] + PATTERN[:4096]
    assert disk.request(FLUSH).status == OK


def test_what_is_discarded_or_zeroed_does_not_show_the_base(disk: Disk) -> None:
    assert disk.segments(DISCARD, (8, 8, 0), (1024, 1024, 0)) == OK
    assert disk.segments(WRITE_ZEROES, (32, 8, 0), (48, 8, UNMAP)) == OK
    expected = bytearray(PATTERN)
    for start, end in ((8, 16), (1024, 2048), (32, 40), (48, 56)):
        expected[start * 512 : end * 512] = bytes((end - start) * 512)
    assert contents(disk) == expected


def test_scattered_reads_of_mixed_sectors(engine: str, path: Path) -> None:
    with open_disk(path, snapshot=True) as image, started(VirtioBlk(image), path) as disk:
        expected = bytearray(PATTERN)
        for sector in range(0, 24, 3):
            disk.write(sector, bytes([sector]) * 512)
            expected[sector * 512 : sector * 512 + 512] = bytes([sector]) * 512
        for writable in ((24 * 512,), (1, 700, 811, 24 * 512 - 1512), (1024,) * 12):
            reply = disk.request(IN, 0, writable=writable)
            assert (reply.status, reply.data) == (OK, expected[: 24 * 512])
        assert disk.read(5, 20 * 512) == expected[5 * 512 : 25 * 512]


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from([IN, OUT, DISCARD, WRITE_ZEROES]),
        st.integers(0, 511),  # sector: some words of the map
        st.integers(1, 100),  # sectors
        st.integers(0, 1),  # queue
    ),
    max_size=30,
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(operations=OPERATIONS)
def test_against_a_model(engine: str, path: Path, operations: list[tuple[int, ...]]) -> None:
    model = bytearray(PATTERN)
    with (
        open_disk(path, snapshot=True) as image,
        started(VirtioBlk(image, queues=2), path) as disk,
    ):
        for number, (kind, sector, count, queue) in enumerate(operations):
            start, end = sector * 512, (sector + count) * 512
            if kind == IN:
                reply = disk.request(IN, sector, writable=(end - start,), queue=queue)
                assert (reply.status, reply.data) == (OK, model[start:end])
                continue
            if kind == OUT:
                model[start:end] = bytes([number + 1]) * (end - start)
                readable: tuple[bytes, ...] = (bytes(model[start:end]),)
            else:
                model[start:end] = bytes(end - start)
                readable = (struct.pack("<QII", sector, count, 0),)
                sector = 0
            assert disk.request(kind, sector, readable=readable, queue=queue).status == OK
        assert contents(disk) == model
    assert path.read_bytes() == PATTERN


def test_queues_share_the_map(engine: str, path: Path) -> None:
    """Two threads write neighbouring sectors, whose bits lie in the same words."""
    with (
        open_disk(path, snapshot=True) as image,
        started(VirtioBlk(image, queues=2), path) as disk,
    ):
        failures: list[str] = []

        def write(queue: int) -> None:
            for sector in range(queue, 512, 2):
                data = (bytes([sector % 251]) * 512,)
                if disk.request(OUT, sector, readable=data, queue=queue).status != OK:
                    failures.append(f"sector {sector}")

        threads = [threading.Thread(target=write, args=(queue,)) for queue in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        written = b"".join(bytes([n % 251]) * 512 for n in range(512))
        assert contents(disk) == written + PATTERN[len(written) :]


def test_a_hundred_disks_share_a_base(path: Path) -> None:
    images = [open_disk(path, snapshot=True) for _ in range(100)]
    try:
        with open_image(path, readonly=True):
            pass
        with pytest.raises(UsageError, match="is in use by another process"):
            open_image(path)
    finally:
        for image in images:
            image.close()
    with open_image(path):
        pass


def test_a_block_device_as_base(engine: str, path: Path) -> None:
    with (
        loop_device(path) as device,
        open_disk(str(device), snapshot=True) as image,
        started(VirtioBlk(image), path) as disk,
    ):
        disk.write(0, b"x" * 512)
        assert disk.segments(DISCARD, (8, 8, 0)) == OK
        assert disk.read(0, 8192) == b"x" * 512 + PATTERN[512:4096] + bytes(4096)
    assert path.read_bytes() == PATTERN


def test_writes_survive_a_reset_of_the_device(disk: Disk) -> None:
    disk.write(3, b"kept".ljust(512))
    disk.driver.reset()
    disk.driver.start(0)
    assert disk.read(3, 512) == b"kept".ljust(512)


def test_nothing_is_left(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    descriptors = sorted(Path("/proc/self/fd").iterdir())
    with open_disk(path, snapshot=True) as image, started(VirtioBlk(image), path) as disk:
        disk.write(0, bytes(65536))
        assert not list(directory.iterdir())
    assert sorted(Path("/proc/self/fd").iterdir()) == descriptors
    image.close()


def test_a_full_overlay_fails_the_request_alone(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True
    )
    if mount.returncode:
        pytest.skip("mounting a tmpfs needs root")
    monkeypatch.setenv("TMPDIR", str(small))
    try:
        with open_disk(path, snapshot=True) as image, started(VirtioBlk(image), path) as disk:
            disk.write(0, b"x" * 32768)
            assert disk.request(OUT, 64, readable=(b"y" * 65536,)).status == IOERR
            assert disk.read(0, 32768) == b"x" * 32768
            start = 64 * 512
            seen = disk.read(64, 65536)
            for at in range(0, 65536, 512):
                old = PATTERN[start + at : start + at + 512]
                assert seen[at : at + 512] in (old, b"y" * 512)
            assert disk.read(1024, 4096) == PATTERN[SIZE // 2 : SIZE // 2 + 4096]
            assert disk.segments(DISCARD, (0, SECTORS, 0)) == OK
            disk.write(0, b"z" * 32768)
    finally:
        subprocess.run(["umount", small], check=True)
    assert path.read_bytes() == PATTERN


def test_a_directory_that_is_not_there(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "/nowhere")
    with pytest.raises(UsageError) as caught:
        open_disk(path, snapshot=True)
    assert str(caught.value) == (
        "no file for throw-away writes can be made in /nowhere (No such file or directory): "
        "set TMPDIR to a directory that you can write to"
    )
    with open_image(path):  # nothing is still locked
        pass


def test_a_file_system_without_large_files(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    monkeypatch.setenv("TMPDIR", "/var/tmp")
    monkeypatch.setattr(os, "ftruncate", refuse)
    with pytest.raises(UsageError) as caught:
        open_disk(path, snapshot=True)
    assert str(caught.value) == (
        f"the file system of /var/tmp has no files of {SIZE} bytes (File too large): "
        "set TMPDIR to a directory on another one"
    )


def test_a_file_system_without_unnamed_files(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def without(path: str, flags: int, *args: int, **kwargs: int) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real_open(path, flags, *args, **kwargs)

    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setenv("TMPDIR", str(directory))
    monkeypatch.setattr(os, "open", without)
    with open_disk(path, snapshot=True):
        assert not list(directory.iterdir())


def test_the_map_of_a_large_disk_costs_what_is_used(tmp_path: Path) -> None:
    path = tmp_path / "large.img"
    path.touch()
    os.truncate(path, 4 << 40)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with open_disk(path, snapshot=True) as image, started(VirtioBlk(image), path) as disk:
        for _ in range(20):
            sector = random.randrange((4 << 40) // 512)
            disk.write(sector, b"x" * 512)
            assert disk.read(sector, 512) == b"x" * 512
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 4096
