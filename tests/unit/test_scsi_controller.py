"""The SCSI controller of a machine: disks come, change and go, and what users are told of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.scsi_driver import GOOD, ScsiDriver

from pyvmm.backends.disk import open_image
from pyvmm.config import DiskConfig, ScsiConfig
from pyvmm.errors import UsageError
from pyvmm.machine.scsi import ScsiController
from pyvmm.machine.vm import VM

SIZE = 1 << 20


@pytest.fixture
def controller() -> Iterator[ScsiController]:
    with ScsiController(ScsiConfig(queues=2)) as controller:
        yield controller


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(SIZE))
    return path


def disk(path: Path, **keys: object) -> DiskConfig:
    return DiskConfig(path=path, bus="scsi", **keys)


def test_places(controller: ScsiController, path: Path) -> None:
    for place in ((0, 0), (0, 1), (0, 2)):
        assert controller.add(disk(path, readonly=True)) == place
    assert controller.add(disk(path, readonly=True, target=7, lun=300)) == (7, 300)
    controller.remove(0, 1)
    assert controller.add(disk(path, readonly=True)) == (0, 1)
    with pytest.raises(UsageError) as error:
        controller.add(disk(path, readonly=True, lun=2))
    assert str(error.value) == (
        "there is something at target 0, LUN 2 already: "
        "give another lun, or none for the first that is free"
    )
    with pytest.raises(UsageError) as error:
        controller.remove(5, 0)
    assert str(error.value) == "there is nothing at target 5, LUN 0"


def test_a_removed_disk_is_free(controller: ScsiController, path: Path) -> None:
    place = controller.add(disk(path))
    with pytest.raises(UsageError, match="is in use by another process"):
        open_image(path)
    controller.remove(*place)
    open_image(path).close()


def test_what_fails_leaves_nothing_behind(controller: ScsiController, path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        controller.add(disk(path.with_name("none")))
    assert controller.device.units() == {}
    assert controller.disks == {}
    assert controller.add(disk(path)) == (0, 0)


def test_a_serial_number_by_default(controller: ScsiController, path: Path) -> None:
    controller.add(disk(path, readonly=True, target=3, lun=9))
    controller.add(disk(path, readonly=True, serial="mine"))
    with ScsiDriver(controller.device) as driver:
        serial = b"\x12\x01\x80\x00\xff\x00"
        assert driver.command(serial, into=255, target=3, lun=9).data[4:] == b"3-9"
        assert driver.command(serial, into=255).data[4:] == b"mine"


def test_resize_and_limit(controller: ScsiController, path: Path) -> None:
    controller.add(disk(path, iops=1000))
    with ScsiDriver(controller.device) as driver:
        driver.settle()
        controller.disks["0:0"].resize(2 * SIZE)
        assert driver.command(bytes(6)).code == (6, 0x2A, 9)
        assert path.stat().st_size == 2 * SIZE
        last = driver.command(b"\x25" + bytes(9), into=8).data[:4]
        assert int.from_bytes(last) == 2 * SIZE // 512 - 1
        with pytest.raises(UsageError, match="cannot shrink"):
            controller.disks["0:0"].resize(SIZE)
        assert driver.command(bytes(6)).status == GOOD
        controller.disks["0:0"].limit(iops=0, bps=0)
        assert driver.command(bytes(6)).status == GOOD


def test_a_machine_without_a_controller(path: Path) -> None:
    with VM(kernel="bzImage") as vm:
        for change in (
            lambda: vm.add_scsi_disk(path=path),
            lambda: vm.remove_scsi_disk(0, 0),
        ):
            with pytest.raises(UsageError) as error:
                change()
            assert str(error.value) == (
                "this machine has no SCSI controller: start it with scsi='queues=1' or a SCSI disk"
            )
