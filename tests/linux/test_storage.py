"""Disks of every kind, under Linux guests: who sees what was written, and what comes of errors."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.linux_guest import LinuxGuest
from support.scsi_debug import scsi_debug

from pyvmm.machine.events import Event

Boot = Callable[..., LinuxGuest]
MakeDisk = Callable[..., Path]

MIB = 1 << 20

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-nbd") is None, reason="qemu-nbd is not installed: apt install qemu-utils"
)


@contextmanager
def tmpfs(directory: Path, size: int) -> Iterator[Path]:
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def write(device: str, mark: str, *, seek: int = 0) -> str:
    return f"printf %-512s {mark} | dd of={device} bs=512 seek={seek} conv=notrunc,fsync 2>&1"


def test_guests_share_a_base(boot: Boot, disk: MakeDisk) -> None:
    """Several guests, several disks in each, all on one image that nobody changes."""
    base = disk("base", 16 * MIB)
    base.write_bytes(b"base".ljust(512) * (16 * MIB // 512))
    before = base.read_bytes()
    disks = [{"path": base, "snapshot": True} for _ in range(5)]
    guests = [boot(disks=disks, memory="128M") for _ in range(2)]
    names = ("vda", "vdb", "vdc", "vdd", "vde")
    for number, guest in enumerate(guests):
        for name in names:
            guest.check(write(f"/dev/{name}", f"guest{number}-{name}", seek=8))
    for number, guest in enumerate(guests):
        guest.check("echo 3 > /proc/sys/vm/drop_caches")
        for name in names:
            seen = guest.check(f"dd if=/dev/{name} bs=512 skip=7 count=3 2>/dev/null | tr -s ' ' .")
            assert seen == f"base.guest{number}-{name}.base."
    # ext4 and a discard of everything, in one of them, and the device reset by its driver
    guests[0].check(
        "mke2fs -q -F /dev/vda && mount -t ext4 /dev/vda /mnt && echo kept > /mnt/file && "
        "umount /mnt && echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind && "
        "echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind && mount -t ext4 /dev/vda /mnt && "
        "grep kept /mnt/file && umount /mnt"
    )
    for guest in guests:
        assert guest.poweroff().status == 0
    assert base.read_bytes() == before


@needs_qemu
def test_qcow2_with_a_backing_file(boot: Boot, disk: MakeDisk, scratch: Path) -> None:
    base, top = disk("base", 32 * MIB), scratch / "top.qcow2"
    subprocess.run(["mke2fs", "-q", "-t", "ext4", base], check=True)
    before = base.read_bytes()
    subprocess.run(
        ["qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "raw", top], check=True
    )
    guest = boot(disks=[{"path": top, "format": "qcow2", "queues": 2}], cpus=2)
    guest.check(
        "mount -t ext4 /dev/vda /mnt && echo written > /mnt/message && dd if=/dev/urandom "
        "of=/mnt/data bs=1M count=4 2>/dev/null && md5sum < /mnt/data > /mnt/sum && umount /mnt && "
        "mount -t ext4 /dev/vda /mnt && md5sum < /mnt/data | cmp - /mnt/sum && fstrim /mnt && "
        "umount /mnt"
    )
    assert guest.poweroff().status == 0
    guest.vm.close()
    raw = scratch / "raw.img"
    subprocess.run(["qemu-img", "convert", "-O", "raw", top, raw], check=True)
    shown = subprocess.run(["debugfs", "-R", "cat /message", raw], capture_output=True, text=True)
    assert shown.stdout == "written\n"
    assert base.read_bytes() == before
    subprocess.run(["qemu-img", "check", "-q", top], check=True)


@needs_qemu
def test_a_server_that_is_killed_in_the_middle(boot: Boot, disk: MakeDisk, scratch: Path) -> None:
    path, socket = disk("served", 16 * MIB), scratch / "socket"
    command = ["qemu-nbd", "-t", "-e", "0", "-f", "raw", "-k", socket, path]

    def serve() -> subprocess.Popen[bytes]:
        socket.unlink(missing_ok=True)
        server = subprocess.Popen(command)
        while not socket.exists():
            time.sleep(0.01)
        return server

    server = serve()
    try:
        # The initramfs is in memory: a guest goes on without its disk.
        guest = boot(disks=[{"nbd": f"nbd+unix:///?socket={socket}"}, disk("other")])
        guest.check(write("/dev/vda", "served"))
        mark = guest.start(
            "while dd if=/dev/vda of=/dev/null bs=1M 2>/dev/null; do :; done; echo failed"
        )
        time.sleep(2)
        server.send_signal(signal.SIGKILL)
        server.wait()
        assert "failed" in guest.finish(mark).output
        guest.check(write("/dev/vdb", "alive"))
        assert guest.run("dd if=/dev/vda of=/dev/null bs=4k count=1").status != 0
        server = serve()
        time.sleep(2)
        seen = guest.check("dd if=/dev/vda bs=512 count=1 2>/dev/null")
        assert seen.startswith("served")
        assert guest.poweroff().status == 0
    finally:
        server.kill()
        server.wait()


def test_size_and_limits_at_run_time(boot: Boot, disk: MakeDisk) -> None:
    base = disk("c")
    guest = boot(
        disks=[disk("a"), {"path": disk("b"), "iops": 2}, {"path": base, "snapshot": True}]
    )
    guest.vm.resize_disk("vda", "64M")
    guest.vm.resize_disk("vdc", "1G")
    for name, size in (("vda", 64 * MIB), ("vdc", 1024 * MIB)):
        guest.check(
            f"for i in $(seq 50); do [ $(cat /sys/block/{name}/size) = {size // 512} ] && break; "
            f"sleep 0.1; done; [ $(cat /sys/block/{name}/size) = {size // 512} ]"
        )
        guest.check(write(f"/dev/{name}", "last", seek=size // 512 - 1))

    def seconds(count: int) -> float:
        """How long it takes to read from so many places, each with a request of its own or more."""
        start = time.monotonic()
        guest.check(
            f"for i in $(seq {count}); do "
            "dd if=/dev/vdb of=/dev/null bs=512 count=1 skip=$((i * 2000)) 2>/dev/null; done"
        )
        return time.monotonic() - start

    assert seconds(12) >= 5  # one at once, then two a second
    guest.vm.limit_disk("vdb")
    unlimited = seconds(12)
    guest.vm.limit_disk("vdb", bps="16K")
    assert seconds(12) >= max(1.5, unlimited)  # at least 4 KiB each
    assert guest.poweroff().status == 0
    assert base.stat().st_size == 16 * MIB


def test_a_full_file_system(boot: Boot, disk: MakeDisk, scratch: Path) -> None:
    """One disk reports it; the guest waits for room on the other, and loses nothing."""
    with tmpfs(scratch / "small", 8 * MIB) as small:
        report, stop = small / "report.img", small / "stop.img"
        for path in (report, stop):
            path.touch()
            os.truncate(path, 16 * MIB)
        guest = boot(disks=[report, {"path": stop, "on_error": "stop"}])
        told: list[Event] = []
        guest.vm.on_event(told.append)
        guest.check(write("/dev/vda", "before"))
        full = "dd if=/dev/zero of={} bs=64k count=192 seek=1 conv=notrunc,fsync 2>&1"
        result = guest.run(full.format("/dev/vda"))
        assert result.status != 0
        assert "rror" in result.output  # busybox: I/O error, or No space left
        assert guest.check("dd if=/dev/vda bs=512 count=1 2>/dev/null").startswith("before")
        assert guest.vm.stopped_by is None

        mark = guest.start(write("/dev/vdb", "waited", seek=4096))
        deadline = time.monotonic() + 60
        while len(told) < 2 and time.monotonic() < deadline:
            time.sleep(0.1)
        assert [event.name for event in told] == ["BLOCK_IO_ERROR", "STOP"]
        assert (told[0].data["device"], told[0].data["nospace"]) == ("vdb", True)
        assert guest.vm.stopped_by == f"disk vdb ({stop}): No space left on device"
        assert guest.vm.state == "io-error"
        os.truncate(report, 0)
        guest.vm.resume()
        assert guest.vm.stopped_by is None
        assert guest.finish(mark).status == 0
        seen = guest.check("dd if=/dev/vdb bs=512 skip=4096 count=1 2>/dev/null")
        assert seen.startswith("waited")
        assert guest.poweroff().status == 0


def test_a_medium_error_of_the_host(boot: Boot) -> None:
    """The host's disk cannot read its sectors 0x1234 to 0x123d; all else stays readable."""
    with scsi_debug(dev_size_mb=8, opts=2) as loaded:
        guest = boot(
            disks=[
                {"path": loaded.node(0), "readonly": True, "direct": direct}
                for direct in (False, True)
            ]
        )
        for name in ("vda", "vdb"):
            read = f"dd if=/dev/{name} of=/dev/null bs=512 count=1 skip={{}} 2>&1"
            assert guest.run(read.format(0x1234)).status != 0
            guest.check(read.format(0x1000))
        assert guest.poweroff().status == 0
        guest.vm.close()
