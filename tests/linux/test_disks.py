"""Disks under stress: no interrupt is lost, no byte is wrong, and a reset may come at any time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from support.linux_guest import LinuxGuest

Boot = Callable[..., LinuxGuest]
MakeDisk = Callable[..., Path]

SECONDS = 40


def test_many_writers_on_many_queues(boot: Boot, disk: MakeDisk, disk_stress: Path) -> None:
    """Each request that waits alone for its interrupt would hang for good if that were lost."""
    guest = boot(
        cpus=2,
        disks=[
            {"path": disk("a", 32 << 20), "queues": 2},
            disk("b", 32 << 20),
            {"path": disk_stress, "readonly": True},
        ],
    )
    guest.check("tar -x -f /dev/vdc -C /tmp")
    guest.check(f"/tmp/disk_stress {SECONDS} 4 /dev/vda /dev/vdb", timeout=SECONDS + 300)
    assert guest.check("dmesg | grep -c -E 'hung_task|blocked for more than' || true") == "0"
    assert guest.poweroff().status == 0


def test_a_driver_that_comes_and_goes(boot: Boot, disk: MakeDisk) -> None:
    """A reset while requests are in flight; what was stable before is there after each."""
    guest = boot(cpus=2, disks=[disk("a", 8 << 20)])
    guest.check(
        "head -c 4194304 /dev/urandom >/tmp/data\n"
        "dd if=/tmp/data of=/dev/vda bs=1M oflag=direct 2>/dev/null"
    )
    for _ in range(10):
        guest.check(
            "(dd if=/dev/urandom of=/dev/vda bs=4k seek=1024 oflag=direct 2>/dev/null || true) &\n"
            "(cat /dev/vda >/dev/null || true) &\n"
            "device=$(basename $(readlink -f /sys/block/vda/device))\n"
            "echo $device >/sys/bus/virtio/drivers/virtio_blk/unbind\n"
            "echo $device >/sys/bus/virtio/drivers/virtio_blk/bind\n"
            "wait\n"
            "head -c 4194304 /dev/vda | cmp - /tmp/data"
        )
    assert guest.poweroff().status == 0
