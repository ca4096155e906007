"""The SCSI controller of a machine and what is behind it, from the start or later."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from pyvmm._core import lib
from pyvmm.backends.scsi.command import CommandThread
from pyvmm.backends.scsi.disk import ScsiDisk
from pyvmm.backends.storage import open_disk
from pyvmm.config import CdromConfig, DiskConfig, first_free_lun
from pyvmm.errors import UsageError
from pyvmm.virtio.scsi import VirtioScsi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from pyvmm.backends.disk import Image
    from pyvmm.backends.scsi.cdrom import ScsiCdrom
    from pyvmm.backends.scsi.host import HostDevice
    from pyvmm.backends.scsi.iscsi import IscsiDevice
    from pyvmm.config import ScsiConfig, ScsiDeviceConfig
    from pyvmm.virtio.scsi import LogicalUnit

    Place = tuple[int, int]
    UnitConfig = DiskConfig | CdromConfig | ScsiDeviceConfig


class PluggedDisk:
    """A disk behind the controller, whose size and limits can be changed."""

    def __init__(self, device: VirtioScsi, place: Place, config: DiskConfig, image: Image) -> None:
        self._device = device
        self._place = place
        self.config = config
        self.image = image

    def resize(self, size: int | None = None) -> None:
        """As of `VirtioBlk.resize`."""
        self._device.change_capacity(*self._place, lambda: self.image.resize(size))

    def limit(self, *, iops: int = 0, bps: int = 0) -> None:
        """As of `VirtioBlk.limit`."""
        lib.blk_limit_set(self.image.native, iops, bps)
        self._device.limits_changed()


class ScsiController:
    """A virtio-scsi device (`device`) that owns what is behind it; a context manager.

    The device must be inactive when the controller is closed.
    """

    def __init__(self, config: ScsiConfig) -> None:
        self.device = VirtioScsi(queues=config.queues, queue_size=config.queue_size)
        self._threads = config.queues
        self._commands = CommandThread()
        self._lock = threading.Lock()
        self._units: dict[Place, ExitStack] = {}
        self.disks: dict[str, PluggedDisk] = {}  # by TARGET:LUN
        self.cdroms: dict[str, ScsiCdrom] = {}
        self.remarks: list[str] = []  # what the user should know

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for place in list(self._units):
            self.remove(*place)
        self._commands.close()

    def add(self, config: UnitConfig, place: Place | None = None, name: str = "") -> Place:
        """Opens a disk, a CD drive called `name` or a device that is passed through, and plugs it
        in; returns its target and LUN.

        UsageError when the place is taken, and as of what is opened.
        """
        with self._lock, ExitStack() as stack:
            if place is None:
                target = config.target or 0
                lun = first_free_lun(target, self._units) if config.lun is None else config.lun
                place = (target, lun)
            if place in self._units:
                raise UsageError(
                    f"there is something at target {place[0]}, LUN {place[1]} already: "
                    "give another lun, or none for the first that is free"
                )
            if isinstance(config, DiskConfig):
                unit: LogicalUnit = self._open_disk(config, place, stack)
            elif isinstance(config, CdromConfig):
                unit = self._open_cdrom(config, place, name, stack)
            else:
                unit = self._open_device(config, stack)
            self.device.plug(*place, unit)
            self._units[place] = stack.pop_all()
        return place

    def _open_disk(self, config: DiskConfig, place: Place, stack: ExitStack) -> ScsiDisk:
        image = stack.enter_context(open_disk(**config.backend() | {"threads": self._threads}))
        name = f"{place[0]}:{place[1]}"
        self.disks[name] = PluggedDisk(self.device, place, config, image)
        stack.callback(self.disks.pop, name)
        lib.blk_limit_set(image.native, config.iops, config.bps)
        disk = ScsiDisk(
            image,
            self._commands,
            serial=config.serial or f"{place[0]}-{place[1]}",
            writethrough=config.cache == "writethrough",
        )
        stack.callback(disk.close)
        return disk

    def _open_cdrom(
        self, config: CdromConfig, place: Place, name: str, stack: ExitStack
    ) -> ScsiCdrom:
        from pyvmm.backends.scsi.cdrom import ScsiCdrom

        drive = ScsiCdrom(self._commands, serial=config.serial or f"{place[0]}-{place[1]}")
        stack.callback(drive.close)
        if config.path != "none":
            drive.insert(config.path)
        self.cdroms[name] = drive
        stack.callback(self.cdroms.pop, name)
        return drive

    def _open_device(self, config: ScsiDeviceConfig, stack: ExitStack) -> HostDevice | IscsiDevice:
        device: HostDevice | IscsiDevice
        if "://" in config.path:
            from pyvmm.backends.scsi.iscsi import IscsiDevice

            device = IscsiDevice(config.path)
        else:
            from pyvmm.backends.scsi.host import open_host_device

            device = open_host_device(config.path)
        stack.callback(device.close)
        if not device.tells_limits:
            self.device.limit_transfers(device.max_transfer)
        if device.remark:
            self.remarks.append(device.remark)
        return device

    def remove(self, target: int, lun: int) -> None:
        """Unplugs what is there and closes it. UsageError when there is nothing."""
        with self._lock:
            stack = self._units.pop((target, lun), None)
            if stack is None:
                raise UsageError(f"there is nothing at target {target}, LUN {lun}")
            self.device.unplug(target, lun)
            stack.close()
