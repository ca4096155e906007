"""Debian as it is: systemd on an ext4 root disk, with the stock cloud kernels 6.12 and 6.1."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.linux_guest import BOOT_TIMEOUT, LinuxGuest, image
from support.monitor import Monitor

import pyvmm
from pyvmm.errors import ExitStatus
from pyvmm.guest.console import GuestConsole

ImageDisk = Callable[[str], Path]
MIB = 1 << 20


@contextmanager
def debian(disk: Path, kernel: str, **settings: object) -> Iterator[LinuxGuest]:
    """A guest that is being booted from `disk`."""
    files = image("debian", kernel)
    with pyvmm.VM(
        kernel=files.kernel, initrd=files.initrd, disks=[disk], serial="pipe", **settings
    ) as vm:
        vm.start()
        yield LinuxGuest(vm)


def log_in(guest: LinuxGuest) -> None:
    """Waits for the login prompt on ttyS0 and makes root's shell obey."""
    guest.console.expect("debian login: ", timeout=BOOT_TIMEOUT)
    guest.console.send("root\n")
    guest.console.expect("root@debian:~# ", timeout=BOOT_TIMEOUT)
    guest.obey()


def end(guest: LinuxGuest) -> tuple[int, BaseException | None]:
    outcome = guest.vm.wait(timeout=BOOT_TIMEOUT)
    return outcome.status, outcome.error


def allocated(path: Path) -> int:
    return path.stat().st_blocks * 512


def test_6_12_keeps_its_files_over_a_reboot_and_gives_space_back(image_disk: ImageDisk) -> None:
    """And one can log in on both consoles."""
    disk = image_disk("debian")
    with debian(disk, "6.12", console="pipe") as guest:
        log_in(guest)
        assert guest.check("uname -r").startswith("6.12.")
        assert guest.check("nproc") == "1"
        assert guest.check("findmnt -no SOURCE,FSTYPE /") == "/dev/vda ext4"
        assert guest.check("systemctl is-system-running --wait || true") == "running"

        guest.check("head -c 16777216 /dev/urandom >/var/tmp/data; sync")
        before = guest.check("sha256sum /var/tmp/data")
        guest.console.send("systemctl reboot\n")
        log_in(guest)
        assert guest.check("sha256sum /var/tmp/data") == before

        full = allocated(disk)
        guest.check("rm /var/tmp/data; sync; fstrim /")
        assert full - allocated(disk) > 15 * MIB
        hvc0 = GuestConsole(guest.vm.console)
        for _ in range(2):  # one of either boot
            hvc0.expect("debian login: ", timeout=BOOT_TIMEOUT)
        hvc0.send("root\n")
        hvc0.expect("root@debian:~# ", timeout=BOOT_TIMEOUT)
        hvc0.send("systemctl poweroff\n")
        assert end(guest) == (ExitStatus.OK, None)
    subprocess.run(["e2fsck", "-f", "-n", disk], check=True, capture_output=True)


def test_6_1_reaches_its_login_and_heeds_the_power_button(image_disk: ImageDisk) -> None:
    with debian(image_disk("debian"), "6.1", cpus=2) as guest:
        log_in(guest)
        assert guest.check("uname -r").startswith("6.1.")
        assert guest.check("nproc") == "2"
        assert guest.check("findmnt -no SOURCE,FSTYPE /") == "/dev/vda ext4"
        guest.vm.press_power_button()
        assert end(guest) == (ExitStatus.OK, None)


def test_a_killed_monitor_loses_nothing_that_was_synced(
    monitor: Callable[..., Monitor], image_disk: ImageDisk, scratch: Path
) -> None:
    disk = image_disk("tiny")
    tiny = image("tiny")
    run = monitor(
        "--kernel", tiny.kernel, "--initrd", tiny.initrd, "--disk", disk, "--append", "quiet"
    )  # fmt: skip
    run.console.expect("tiny:/root# ", timeout=BOOT_TIMEOUT)
    run.console.send(
        "head -c 4194304 /dev/urandom >/root/data; sha256sum /root/data; sync; echo synced-$((1))\n"
    )
    output = run.console.expect("synced-1", timeout=BOOT_TIMEOUT)
    # More that is on its way when the monitor dies.
    run.console.send("while :; do head -c 1048576 /dev/urandom >>/root/more; done\n")
    run.console.read(timeout=1)
    run.signal(signal.SIGKILL)
    assert run.wait()[0] == -signal.SIGKILL

    subprocess.run(["e2fsck", "-p", disk], check=False, capture_output=True)  # the journal
    checked = subprocess.run(["e2fsck", "-f", "-n", disk], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout
    copy = scratch / "data"
    subprocess.run(
        ["debugfs", "-R", f"dump /root/data {copy}", disk], check=True, capture_output=True
    )
    digest = subprocess.run(["sha256sum", copy], check=True, capture_output=True, text=True).stdout
    assert digest.split()[0].encode() in output
    assert copy.stat().st_size == 4 * MIB
