"""The SCSI controller of a machine and the disks behind it, those of the start and later ones."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from pyvmm._core import lib
from pyvmm.backends.scsi.command import CommandThread
from pyvmm.backends.scsi.disk import ScsiDisk
from pyvmm.backends.storage import open_disk
from pyvmm.config import first_free_lun
from pyvmm.errors import UsageError
from pyvmm.virtio.scsi import VirtioScsi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

    from pyvmm.config import DiskConfig, ScsiConfig

    Place = tuple[int, int]


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

    def add_disk(self, config: DiskConfig, place: Place | None = None) -> Place:
        """Opens a disk and plugs it in; returns its target and LUN.

        UsageError when the place is taken, and as of `open_disk`.
        """
        with self._lock, ExitStack() as stack:
            if place is None:
                target = config.target or 0
                lun = first_free_lun(target, self._units) if config.lun is None else config.lun
                place = (target, lun)
            if place in self._units:
                raise UsageError(
                    f"there is a SCSI disk at target {place[0]}, LUN {place[1]} already: "
                    "give another lun, or none for the first that is free"
                )
            image = stack.enter_context(open_disk(**config.backend() | {"threads": self._threads}))
            lib.blk_limit_set(image.native, config.iops, config.bps)
            disk = ScsiDisk(
                image,
                self._commands,
                serial=config.serial or f"{place[0]}-{place[1]}",
                writethrough=config.cache == "writethrough",
            )
            stack.callback(disk.close)
            self.device.plug(*place, disk)
            self._units[place] = stack.pop_all()
        return place

    def remove(self, target: int, lun: int) -> None:
        """Unplugs what is there and closes it. UsageError when there is nothing."""
        with self._lock:
            stack = self._units.pop((target, lun), None)
            if stack is None:
                raise UsageError(f"there is no SCSI disk at target {target}, LUN {lun}")
            self.device.unplug(target, lun)
            stack.close()
