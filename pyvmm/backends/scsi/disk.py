"""A disk image as a SCSI logical unit (SPC-4, SBC-3).

What is frequent or simple is in C (``_native/scsi_disk.c``), with the one table of commands;
INQUIRY data is made here once and served there. Modes, reservations and reports are executed here.
"""

from __future__ import annotations

import os

from pyvmm._core import ffi, lib
from pyvmm.backends.scsi import inquiry, modes
from pyvmm.backends.scsi.command import reservation_conflict
from pyvmm.backends.scsi.opcodes import report_functions, report_opcodes
from pyvmm.backends.scsi.reservations import PersistentReservations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.backends.disk import Image
    from pyvmm.backends.scsi.command import Command, CommandThread

_DIRECT_ACCESS = 0x00
_WP, _DPOFUA = 0x80, 0x10
_PERSISTENT_RESERVE_IN, _PERSISTENT_RESERVE_OUT, _MAINTENANCE_IN = 0x5E, 0x5F, 0xA3
_REPORT_OPCODES = 0x0C


class _Page:
    """A mode page of which one bit, in byte 2, can be changed; it is a flag of a C structure."""

    def __init__(
        self, code: int, size: int, native: Any, flag: str, bit: int, base: dict[int, int]
    ) -> None:
        self.code = code
        self._native = native
        self._flag = flag
        self._bit = bit
        values = bytearray(size)
        values[:2] = code, size - 2
        for at, value in base.items():
            values[at] = value
        self._base = bytes(values)
        self.changeable = bytes((code, size - 2, 1 << bit)).ljust(size, b"\0")
        self.default = self.current()  # the flag is as it is after a reset

    def current(self) -> bytes:
        values = bytearray(self._base)
        values[2] |= getattr(self._native, self._flag) << self._bit
        return bytes(values)

    def change(self, values: bytes) -> None:
        setattr(self._native, self._flag, bool(values[2] >> self._bit & 1))


class ScsiDisk:
    """A logical unit on `image`, which must stay open until `close`.

    `native` is its ``struct scsi_lun *``, `serial` its serial number; `commands` executes what is
    Python's. With `writethrough` each write is stable when it is complete, unless the driver turns
    the write cache on.
    """

    def __init__(
        self,
        image: Image,
        commands: CommandThread,
        *,
        serial: str,
        writethrough: bool = False,
    ) -> None:
        self.image = image
        self.serial = serial
        self._commands = commands
        self._disk = ffi.new(
            "struct scsi_disk *",
            {
                "image": image.native,
                "handoff": commands.native,
                "block_size": image.logical_block_size,
                "physical_exponent": self._blocks(image.physical_block_size).bit_length() - 1,
                "readonly": image.readonly,
                "zeroed": not image.native.is_block_device,
                "default_write_cache": not writethrough,
            },
        )
        self._pages, self._data = inquiry.native_pages(self._inquiry_pages())
        error = lib.scsi_disk_init(self._disk, self._pages, len(self._pages))
        if error:
            raise OSError(-error, os.strerror(-error))
        self.native = ffi.addressof(self._disk, "lun")
        self.native.abilities = lib.SCSI_DISK_UNMAP if image.discard_granularity else 0
        self.native.id = commands.add(self._execute)
        self._reservations = PersistentReservations()
        caching = _Page(0x08, 20, self._disk, "write_cache", 2, {})
        unrestricted_reordering = {3: 0x10}
        control = _Page(0x0A, 12, self.native, "descriptor_sense", 2, unrestricted_reordering)
        self._modes = {each.code: each for each in (caching, control)}

    def close(self) -> None:
        """Gives the logical unit back, not the image. No command may be under way."""
        self._commands.remove(self.native.id)
        lib.scsi_disk_destroy(self._disk)

    def _blocks(self, size: int) -> int:
        return size // self.image.logical_block_size

    def _inquiry_pages(self) -> dict[int, bytes]:
        image = self.image
        can_unmap = bool(image.discard_granularity)
        payloads = {
            inquiry.UNIT_SERIAL_NUMBER: self.serial.encode("ascii"),
            inquiry.DEVICE_IDENTIFICATION: inquiry.identification(self.serial),
            inquiry.BLOCK_LIMITS: inquiry.block_limits(
                granularity=self._blocks(image.physical_block_size),
                max_transfer=self._blocks(lib.SCSI_DISK_MAX_TRANSFER),
                max_unmap=self._blocks(lib.SCSI_DISK_MAX_RANGE) if can_unmap else 0,
                max_descriptors=lib.SCSI_DISK_MAX_UNMAP_DESCRIPTORS if can_unmap else 0,
                unmap_granularity=self._blocks(image.discard_granularity),
                max_write_same=self._blocks(lib.SCSI_DISK_MAX_RANGE),
            ),
            inquiry.BLOCK_DEVICE_CHARACTERISTICS: inquiry.block_device_characteristics(),
            inquiry.LOGICAL_BLOCK_PROVISIONING: inquiry.logical_block_provisioning(
                unmap=can_unmap, zeroed=can_unmap and self._disk.zeroed
            ),
        }
        payloads[inquiry.SUPPORTED_PAGES] = bytes(sorted((inquiry.SUPPORTED_PAGES, *payloads)))
        pages = {
            code: inquiry.page(_DIRECT_ACCESS, code, payload) for code, payload in payloads.items()
        }
        versions = (inquiry.SAM_5, inquiry.SPC_4, inquiry.SBC_3)
        pages[lib.SCSI_STANDARD_INQUIRY] = inquiry.standard(_DIRECT_ACCESS, "disk", versions)
        return pages

    def _execute(self, command: Command) -> None:
        opcode = command.cdb[0]
        blocks, block_size = self._blocks(self.image.size), self.image.logical_block_size
        if opcode in (modes.MODE_SENSE_6, modes.MODE_SENSE_10):
            specific = _DPOFUA | (_WP if self.image.readonly else 0)
            modes.mode_sense(
                command, self._modes, specific=specific, blocks=blocks, block_size=block_size
            )
        elif opcode in (modes.MODE_SELECT_6, modes.MODE_SELECT_10):
            modes.mode_select(command, self._modes, blocks=blocks, block_size=block_size)
        elif opcode == _MAINTENANCE_IN:
            if command.cdb[1] & 0x1F == _REPORT_OPCODES:
                report_opcodes(command, lib.scsi_disk_opcodes(), self.native.abilities)
            else:
                report_functions(command)
        elif self._disk.reserved:
            raise reservation_conflict()
        elif opcode == _PERSISTENT_RESERVE_IN:
            self._reservations.read(command)
        else:
            assert opcode == _PERSISTENT_RESERVE_OUT
            self._reservations.change(command)
            self._disk.registered = self._reservations.key != 0
