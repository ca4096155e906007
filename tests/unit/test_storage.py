"""Image formats: which is chosen when nobody says so, and those that qemu-nbd serves."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.blk_driver import FLUSH, IN, IOERR, OK, UNMAP, WRITE_ZEROES, started
from support.loop_device import loop_device
from support.mmio_driver import wait_until

from pyvmm.backends import qemu_nbd, storage
from pyvmm.backends.storage import open_disk
from pyvmm.errors import UsageError
from pyvmm.virtio.blk import VirtioBlk

SIZE = 1 << 20
FOREIGN = ("qcow2", "vmdk", "vhdx", "vpc", "vdi", "qed", "parallels")

pytest.importorskip("pyvmm._nbd", reason="pyvmm was built without libnbd")
needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed: apt install qemu-utils"
)


def create(path: Path, format: str, *options: str, size: int = SIZE) -> Path:
    command = ["qemu-img", "create", "-q", "-f", format, *options, path, str(size)]
    subprocess.run(command, check=True)
    return path


def refusal(path: Path, **options: object) -> str:
    with pytest.raises(UsageError) as caught:
        open_disk(path, **options)  # type: ignore[arg-type]
    return str(caught.value)


def servers(user: int | None = None) -> list[int]:
    """The qemu-nbd processes of a process, by default of this one."""
    found = []
    for each in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = each.read_text().rpartition(")")
        except OSError:
            continue
        if "(qemu-nbd" in fields[0] and int(fields[2].split()[1]) == (user or os.getpid()):
            found.append(int(each.parent.name))
    return found


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    yield
    assert not list(temporary.iterdir())
    assert not servers()


@needs_qemu
class TestFormats:
    @pytest.mark.parametrize("format", FOREIGN)
    def test_a_disk_in_it(self, tmp_path: Path, format: str) -> None:
        path = create(tmp_path / "disk", format)
        with (
            open_disk(path, format=format, threads=2) as image,
            started(VirtioBlk(image, queues=2), path) as disk,
        ):
            assert SIZE <= image.size < SIZE + (1 << 16)  # vpc has cylinders
            disk.write(8, b"x" * 4096)
            assert disk.request(IN, 8, writable=(4096,), queue=1).data == b"x" * 4096
            assert disk.segments(WRITE_ZEROES, (8, 1, UNMAP)) == OK
            assert disk.request(FLUSH).status == OK
        with (
            open_disk(path, format=format, readonly=True) as image,
            started(VirtioBlk(image), path) as disk,
        ):
            assert disk.read(8, 4096) == bytes(512) + b"x" * 3584

    def test_a_backing_file(self, tmp_path: Path) -> None:
        base = tmp_path / "base.img"
        base.write_bytes(b"b" * SIZE)
        path = create(tmp_path / "top", "qcow2", "-b", str(base), "-F", "raw")
        with (
            open_disk(path, format="qcow2") as image,
            started(VirtioBlk(image), path) as disk,
        ):
            disk.write(0, b"t" * 512)
            assert disk.read(0, 1024) == b"t" * 512 + b"b" * 512
        assert base.read_bytes() == b"b" * SIZE

    def test_snapshots_share_an_image(self, tmp_path: Path) -> None:
        path = create(tmp_path / "disk", "qcow2")
        before = path.read_bytes()
        images = [open_disk(path, snapshot=True) for _ in range(3)]
        for number, image in enumerate(images):
            with started(VirtioBlk(image), path) as disk:
                disk.write(0, bytes([number]) * 512)
                assert disk.read(0, 1024) == bytes([number]) * 512 + bytes(512)
            image.close()
        assert path.read_bytes() == before

    def test_a_writer_is_alone(self, tmp_path: Path) -> None:
        path = create(tmp_path / "disk", "qcow2")
        with open_disk(path):
            assert refusal(path) == (
                f"the disk image {path} is in use by another process: stop that one "
                f"(fuser -v {path} shows it), or give readonly=on or snapshot=on to all that use it"
            )
        open_disk(path).close()

    def test_not_in_that_format(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(SIZE))
        assert refusal(path, format="qcow2") == (
            f"the disk image {path} cannot be opened as qcow2: Image is not in qcow2 format"
        )

    def test_a_corrupt_image(self, tmp_path: Path) -> None:
        path = create(tmp_path / "disk", "qcow2")
        with path.open("r+b") as file:
            file.seek(20)
            file.write(struct.pack(">I", 63))  # cluster_bits
        message = refusal(path)
        assert message.startswith(f"the disk image {path} cannot be opened as qcow2: ")
        assert "luster" in message

    def test_a_missing_image(self, tmp_path: Path) -> None:
        path = tmp_path / "nothing"
        assert refusal(path, format="qcow2") == refusal(path)

    def test_without_the_program(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = create(tmp_path / "disk", "qcow2")
        monkeypatch.setenv("PATH", "/nowhere")
        assert refusal(path) == (
            f"the disk image {path} in qcow2 format needs qemu-nbd, which is not installed: "
            "apt install qemu-utils, or make a raw copy elsewhere"
        )

    def test_a_name_that_looks_like_a_protocol(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        create(tmp_path / "nbd", "qcow2").rename("nbd:host:1,x")
        with open_disk("nbd:host:1,x") as image:
            assert image.size == SIZE

    def test_a_server_that_is_killed(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        path = create(tmp_path / "disk", "qcow2")
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            assert disk.request(IN, 0, writable=(512,)).status == OK
            (pid,) = servers()
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: f"qemu-nbd for {path} ended" in caplog.text)
            for _ in range(3):
                assert disk.request(IN, 0, writable=(512,)).status == IOERR

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_it_dies_with_its_user(self, tmp_path: Path, number: signal.Signals) -> None:
        path = create(tmp_path / "disk", "qcow2")
        program = (
            "import sys, time; from pyvmm.backends.storage import open_disk;"
            "image = open_disk(sys.argv[1]); print('open', flush=True); time.sleep(60)"
        )
        environment = {**os.environ, "TMPDIR": str(tmp_path)}
        with subprocess.Popen(
            [sys.executable, "-c", program, path], stdout=subprocess.PIPE, env=environment
        ) as user:
            assert user.stdout is not None
            assert user.stdout.readline() == b"open\n"
            (server,) = servers(user.pid)
            user.send_signal(number)
            user.wait()
        wait_until(lambda: not Path(f"/proc/{server}").exists())
        open_disk(path).close()

    def test_nobody_else_may_connect(self, tmp_path: Path) -> None:
        path = create(tmp_path / "disk", "qcow2")
        with open_disk(path):
            (directory,) = Path(tempfile.gettempdir()).iterdir()
            assert directory.stat().st_mode & 0o777 == 0o700

    def test_a_program_that_never_answers(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = create(tmp_path / "disk", "qcow2")
        program = tmp_path / "qemu-nbd"
        program.write_text("#!/bin/sh\nexec sleep 60\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        start = time.monotonic()
        assert refusal(path) == f"the disk image {path} cannot be opened as qcow2: no answer"
        assert time.monotonic() - start < 20


class TestProbing:
    @needs_qemu
    @pytest.mark.parametrize("format", ["qcow2", "vhdx", "vpc", "vdi"])
    def test_what_is_certain(self, tmp_path: Path, format: str) -> None:
        path = create(tmp_path / "disk", format)
        with open_disk(path) as image:
            assert isinstance(image, qemu_nbd.FormatImage)

    def test_raw(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(SIZE))
        with open_disk(path) as image:
            assert image.size == SIZE

    @needs_qemu
    @pytest.mark.parametrize("format", ["vmdk", "qed", "parallels"])
    def test_what_may_name_other_files(self, tmp_path: Path, format: str) -> None:
        path = create(tmp_path / "disk", format)
        assert refusal(path) == (
            f"the disk image {path} looks like {format} that can name other files to be opened: "
            f"give format={format} if you trust it, or format=raw"
        )

    @needs_qemu
    def test_qcow2_with_other_files(self, tmp_path: Path) -> None:
        base = create(tmp_path / "base", "raw")
        for options in (("-b", str(base), "-F", "raw"), ("-o", f"data_file={tmp_path}/data")):
            path = create(tmp_path / "disk", "qcow2", *options)
            assert refusal(path) == (
                f"the disk image {path} looks like qcow2 that can name other files to be opened: "
                "give format=qcow2 if you trust it, or format=raw"
            )

    def test_what_a_guest_may_have_written(self, tmp_path: Path) -> None:
        """The guest turns its raw disk into what looks like an image with another one in it."""
        path = tmp_path / "disk"
        path.write_bytes(bytes(SIZE))
        if not _has_attributes(path):
            pytest.skip("the file system of the temporary directory has no user attributes")
        with open_disk(path) as image, started(VirtioBlk(image), path) as disk:
            disk.write(0, b"QFI\xfb\0\0\0\3".ljust(512, b"\0"))
        assert refusal(path) == (
            f"the disk image {path} looks like qcow2, but was a raw disk, whose guest may have "
            "written that: give format=qcow2 if you trust it, or format=raw"
        )
        with open_disk(path, format="raw") as image, started(VirtioBlk(image), path) as disk:
            assert disk.read(0, 512)[:4] == b"QFI\xfb"

    def test_a_disk_that_is_only_read_is_not_marked(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(bytes(SIZE))
        open_disk(path, readonly=True).close()
        open_disk(path, snapshot=True).close()
        assert not os.listxattr(path)

    def test_a_block_device(self, tmp_path: Path) -> None:
        path = tmp_path / "disk"
        path.write_bytes(b"QFI\xfb\0\0\0\3".ljust(SIZE, b"\0"))
        with loop_device(path) as device:
            assert refusal(device) == (
                f"the disk image {device} looks like qcow2, which is not tried on a block device "
                "unasked: give format=qcow2 if you trust it, or format=raw"
            )
            open_disk(device, format="raw").close()

    def test_only_the_beginning_counts(self, tmp_path: Path) -> None:
        for contents in (b"QFI", b"\0QFI\xfb", b"KDM\0", b"x" * 64 + b"\x7f\x10\xda"):
            path = tmp_path / "disk"
            path.write_bytes(contents.ljust(SIZE, b"\0"))
            assert storage._find_format(str(path)) == "raw"

    def test_a_fifo_does_not_hang(self, tmp_path: Path) -> None:
        fifo = tmp_path / "fifo"
        os.mkfifo(fifo)
        assert "neither a file nor a block device" in refusal(fifo)


def _has_attributes(path: Path) -> bool:
    try:
        os.setxattr(path, "user.test", b"")
        os.removexattr(path, "user.test")
    except OSError:
        return False
    return True
