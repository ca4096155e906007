"""Disks under stress: no interrupt is lost, and no byte is wrong."""

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
