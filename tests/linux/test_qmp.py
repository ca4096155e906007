"""The control socket with a stock kernel in the machine: what its commands do to the guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from support.linux_guest import LinuxGuest, boot_tiny, scratch_directory
from support.qmp_client import RawClient

MIB = 1 << 20


class Controlled(NamedTuple):
    guest: LinuxGuest
    qmp: RawClient
    scratch: Path


def make_disk(path: Path, size: int = 16 * MIB) -> Path:
    with path.open("xb") as file:
        file.truncate(size)
    return path


def wait_for(guest: LinuxGuest, condition: str) -> None:
    """Until a shell command succeeds in the guest, for 60 seconds."""
    guest.check(
        f"for n in $(seq 300); do if {condition}; then exit 0; fi; usleep 200000; done; false"
    )


@pytest.fixture(scope="module")
def machine() -> Iterator[Controlled]:
    """One guest for all tests here, which leave it as they found it."""
    with scratch_directory() as scratch:
        guest = boot_tiny(
            disks=[make_disk(scratch / "a.img")],
            scsi="queues=1",
            nets=["user"],
            ports=["first"],
            qmp=f"unix:{scratch / 'qmp'}",
        )
        try:
            with RawClient(scratch / "qmp", timeout=300) as qmp:
                yield Controlled(guest, qmp, scratch)
        finally:
            guest.vm.close()


def test_stop_and_cont(machine: Controlled) -> None:
    guest, qmp, _ = machine
    qmp.execute("stop")
    qmp.event("STOP")
    mark = guest.start("echo heard")
    assert guest.console.read(timeout=2) == b""
    assert qmp.execute("query-status") == {"status": "paused", "running": False}
    qmp.execute("cont")
    qmp.event("RESUME")
    assert guest.finish(mark).output.strip() == "heard"


def test_block_resize(machine: Controlled) -> None:
    guest, qmp, _ = machine
    qmp.execute("block_resize", device="vda", size=24 * MIB)
    wait_for(guest, "[ $(cat /sys/block/vda/size) = 49152 ]")


def test_set_link(machine: Controlled) -> None:
    guest, qmp, _ = machine
    guest.check("ip link set eth0 up")
    for up, carrier in ((False, 0), (True, 1)):
        qmp.execute("set_link", name="net0", up=up)
        wait_for(guest, f"[ $(cat /sys/class/net/eth0/carrier) = {carrier} ]")


def test_a_disk_comes_and_goes(machine: Controlled) -> None:
    guest, qmp, scratch = machine
    image = make_disk(scratch / "b.img")
    file = {"driver": "file", "filename": str(image)}
    qmp.execute("blockdev-add", driver="raw", node_name="data", file=file)
    qmp.execute("device_add", driver="scsi-hd", id="d", drive="data", scsi_id=3, lun=5)
    wait_for(guest, "ls /sys/class/scsi_device/0:0:3:5/device/block")
    node = guest.check("ls /sys/class/scsi_device/0:0:3:5/device/block")
    guest.check(f"echo hello | dd of=/dev/{node} bs=512 conv=sync 2>/dev/null; sync")
    assert image.read_bytes()[:6] == b"hello\n"
    qmp.execute("block_resize", device="d", size=24 * MIB)
    wait_for(guest, f"[ $(cat /sys/block/{node}/size) = 49152 ]")
    qmp.execute("device_del", id="d")
    assert qmp.event("DEVICE_DELETED")["data"]["device"] == "d"
    qmp.execute("blockdev-del", node_name="data")
    wait_for(guest, "! [ -e /sys/class/scsi_device/0:0:3:5 ]")


def test_a_port_comes_and_goes(machine: Controlled) -> None:
    guest, qmp, scratch = machine
    file = {"type": "file", "data": {"out": str(scratch / "out")}}
    qmp.execute("chardev-add", id="c", backend=file)
    qmp.execute("device_add", driver="virtserialport", id="p", chardev="c", name="org.example")
    name = guest.check(
        "for n in $(seq 100); do grep -l org.example /sys/class/virtio-ports/*/name && break; "
        "usleep 100000; done"
    ).split("/")[-2]
    guest.check(f"echo hello >/dev/{name}")
    for open in (True, False):
        assert qmp.event("VSERPORT_CHANGE")["data"] == {"id": "p", "open": open}
    qmp.execute("device_del", id="p")
    assert qmp.event("DEVICE_DELETED")["data"]["device"] == "p"
    assert (scratch / "out").read_text() == "hello\n"
    wait_for(guest, f"! [ -e /sys/class/virtio-ports/{name} ]")


def test_sleep_and_wakeup(machine: Controlled) -> None:
    guest, qmp, _ = machine
    mark = guest.start("echo mem >/sys/power/state; echo awake")
    qmp.event("SUSPEND")
    assert qmp.execute("query-status") == {"status": "suspended", "running": False}
    qmp.execute("system_wakeup")
    qmp.event("WAKEUP")
    assert guest.finish(mark).output.strip() == "awake"


def test_the_power_button(machine: Controlled) -> None:
    guest, qmp, _ = machine
    count = "set -- $(cat /sys/firmware/acpi/interrupts/ff_pwr_btn); echo $1 $3"
    before = guest.check(count)
    qmp.execute("system_powerdown")
    qmp.event("POWERDOWN")
    wait_for(guest, f'[ "$({count})" != "{before}" ]')


def test_reset_and_quit(machine: Controlled) -> None:
    guest, qmp, _ = machine
    qmp.execute("system_reset")
    assert qmp.event("RESET")["data"]["guest"] is False
    guest.await_obedience()
    assert guest.check("cat /sys/block/vda/size") == "49152"
    qmp.execute("quit")
    assert qmp.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
    assert guest.vm.wait(timeout=60).status == 0
