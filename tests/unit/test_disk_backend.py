"""Opening disk images: what is refused and how, locks, sizes, alignments."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.loop_device import loop_device

from pyvmm.backends.disk import open_image
from pyvmm.errors import ExitStatus, UsageError

SIZE = 1 << 20
NOBODY = 65534


@pytest.fixture
def directory() -> Iterator[Path]:
    """A directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def path(directory: Path) -> Path:
    path = directory / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """Without the right of root to open everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def refusal(path: Path, *, readonly: bool = False, direct: bool = False) -> str:
    with pytest.raises(UsageError) as caught:
        open_image(path, readonly=readonly, direct=direct)
    assert caught.value.exit_status == ExitStatus.USAGE
    assert str(path) in str(caught.value)
    return str(caught.value)


class TestDescription:
    def test_of_a_file(self, path: Path) -> None:
        with open_image(path) as image:
            assert (image.name, image.size) == (str(path), SIZE)
            assert not image.is_block_device
            assert (image.logical_block_size, image.physical_block_size) == (512, 4096)
            assert (image.block_size, image.buffer_align) == (512, 1)
            assert image.discard_granularity >= 512
            assert not os.get_inheritable(image.fd)
        assert image.fd == -1
        image.close()

    def test_of_a_file_to_read(self, path: Path) -> None:
        with open_image(path, readonly=True) as image:
            assert image.discard_granularity == 0
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.pwrite(image.fd, b"x", 0)

    def test_of_a_file_in_memory(self, path: Path) -> None:
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            file.truncate(SIZE)
            with open_image(file.name) as image:
                assert image.in_memory
        if path.stat().st_dev == Path("/dev/shm").stat().st_dev:
            pytest.skip("the directory for temporary files is a tmpfs, too")
        with open_image(path) as image:
            assert not image.in_memory

    def test_of_direct_io(self, path: Path) -> None:
        with open_image(path, direct=True) as image:
            assert image.block_size in (512, 1024, 2048, 4096)
            assert image.buffer_align in (512, 1024, 2048, 4096)
            assert image.logical_block_size == image.block_size
            assert os.get_blocking(image.fd)

    @pytest.mark.parametrize("sector_size", [512, 4096])
    def test_of_a_block_device(self, path: Path, sector_size: int) -> None:
        with loop_device(path, "--sector-size", str(sector_size)) as device:
            with open_image(device) as image:
                assert image.is_block_device
                assert image.size == SIZE
                assert image.logical_block_size == sector_size
                assert image.physical_block_size >= sector_size
                assert image.block_size == 512  # the page cache takes any sector
                assert image.discard_granularity > 0
            with open_image(device, direct=True) as image:
                assert image.block_size == sector_size


class TestRefusal:
    def test_missing(self, directory: Path) -> None:
        assert "does not exist" in refusal(directory / "nothing.img")
        assert "does not exist" in refusal(directory / "no" / "directory.img")

    @pytest.mark.parametrize("readonly", [False, True])
    def test_directory(self, directory: Path, readonly: bool) -> None:
        assert "is a directory" in refusal(directory, readonly=readonly)

    @pytest.mark.parametrize("readonly", [False, True])
    def test_fifo(self, directory: Path, readonly: bool) -> None:
        fifo = directory / "fifo"
        os.mkfifo(fifo)
        assert "neither a file nor a block device" in refusal(fifo, readonly=readonly)

    def test_character_device(self) -> None:
        assert "neither a file nor a block device" in refusal(Path("/dev/zero"))

    def test_empty(self, path: Path) -> None:
        path.write_bytes(b"")
        assert "truncate -s 10G" in refusal(path)

    @pytest.mark.parametrize(
        "size, rounded", [(1, 512), (1023, 1024), (SIZE + 1, SIZE + 512), (SIZE - 1, SIZE)]
    )
    def test_odd_size(self, path: Path, size: int, rounded: int) -> None:
        path.write_bytes(bytes(size))
        message = refusal(path)
        assert f"{size} bytes" in message
        assert f"truncate -s {rounded} {path}" in message

    def test_forbidden(self, path: Path) -> None:
        path.chmod(0)
        with unprivileged():
            assert "no permission" in refusal(path, readonly=True)

    def test_read_only_file(self, path: Path) -> None:
        path.chmod(0o444)
        with unprivileged():
            assert "give readonly=on" in refusal(path)
            with open_image(path, readonly=True) as image:
                assert image.size == SIZE

    def test_read_only_block_device(self, path: Path) -> None:
        with loop_device(path, "--read-only") as device:
            assert "give readonly=on" in refusal(device)
            with open_image(device, readonly=True) as image:
                assert image.size == SIZE

    def test_no_direct_io(self) -> None:
        assert "leave direct=on out" in refusal(Path("/proc/version"), readonly=True, direct=True)

    def test_nothing_stays_open(self, path: Path) -> None:
        path.write_bytes(bytes(SIZE + 1))
        before = sorted(Path("/proc/self/fd").iterdir())
        refusal(path)
        assert sorted(Path("/proc/self/fd").iterdir()) == before


class TestLock:
    def test_a_writer_is_alone(self, path: Path) -> None:
        with open_image(path):
            for readonly in (False, True):
                message = refusal(path, readonly=readonly)
                assert "in use by another process" in message
                assert f"fuser -v {path}" in message
        with open_image(path):
            pass

    def test_readers_share(self, path: Path) -> None:
        with open_image(path, readonly=True), open_image(path, readonly=True):
            assert "give readonly=on to all" in refusal(path)
        with open_image(path):
            pass

    def test_another_process_is_kept_out(self, path: Path) -> None:
        program = (
            "import sys; from pyvmm.backends.disk import open_image;"
            "image = open_image(sys.argv[1]); print('open', flush=True); sys.stdin.read()"
        )
        with subprocess.Popen(
            [sys.executable, "-c", program, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"open\n"
            refusal(path)
            other.kill()
            other.wait()
            with open_image(path):  # nothing is left of a killed one
                pass

    def test_close_unlocks_though_a_copy_of_the_descriptor_lives(self, path: Path) -> None:
        image = open_image(path)
        copy = os.dup(image.fd)
        try:
            image.close()
            with open_image(path):
                pass
        finally:
            os.close(copy)

    def test_the_refusal_comes_soon(self, path: Path) -> None:
        with open_image(path):
            start = time.monotonic()
            refusal(path)
            assert time.monotonic() - start < 5
