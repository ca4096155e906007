"""A CD or DVD drive as a SCSI logical unit (SPC-4, MMC-6), with an image as its medium.

What moves blocks or is simple is in C (``_native/scsi_cdrom.c``), with the one table of commands.
The tray, what is in it, and what the drive tells of itself and of its medium are here.
"""

from __future__ import annotations

import os
import struct
import threading

from pyvmm._core import ffi, lib
from pyvmm.backends.disk import open_image
from pyvmm.backends.scsi import inquiry, modes
from pyvmm.backends.scsi.command import check_condition, invalid_field, sense
from pyvmm.backends.scsi.opcodes import report_functions, report_opcodes
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.backends.disk import Image
    from pyvmm.backends.scsi.command import Command, CommandThread

BLOCK = 2048
# What fits on a CD of 80 minutes; more is on a DVD.
_CD_BLOCKS = 80 * 60 * 75

_CD_DEVICE = 0x05

_START_STOP_UNIT, _PREVENT_ALLOW = 0x1B, 0x1E
_READ_TOC, _GET_CONFIGURATION, _GET_EVENT = 0x43, 0x46, 0x4A
_READ_DISC_INFORMATION, _READ_TRACK_INFORMATION = 0x51, 0x52
_MAINTENANCE_IN, _REPORT_OPCODES = 0xA3, 0x0C
_READ_DISC_STRUCTURE, _MECHANISM_STATUS = 0xAD, 0xBD

_TRAY_CLOSED = sense(0x2, 0x3A, 0x01)
_TRAY_OPEN = sense(0x2, 0x3A, 0x02)
_INCOMPATIBLE_MEDIUM = sense(0x5, 0x30, 0x00)
_REMOVAL_PREVENTED = sense(0x5, 0x53, 0x02)

# Profiles (MMC-6, 5.3.1).
_NO_PROFILE, _CD_ROM, _DVD_ROM = 0x0000, 0x0008, 0x0010

# Classes of events, and those of class media (MMC-6, 6.6.2).
_OPERATIONAL_CHANGE, _POWER_MANAGEMENT, _MEDIA = 1, 2, 4
_NO_CHANGE, _EJECT_REQUEST, _NEW_MEDIA, _MEDIA_REMOVAL = 0, 1, 2, 3

_LEAD_OUT = 0xAA
_DATA_TRACK = 0x14  # ADR 1, and of CONTROL: data, no copy permitted


def open_medium(path: str | os.PathLike[str]) -> Image:
    """Opens a CD or DVD image to be read. UsageError when it is none."""
    path = os.fspath(path)
    if not os.path.exists(path):
        raise UsageError(f"the CD image {path} does not exist: check its name")
    if os.path.isfile(path):
        _check_size(path, os.path.getsize(path))
    image = open_image(path, readonly=True)
    try:
        _check_size(path, image.size)
    except UsageError:
        image.close()
        raise
    return image


def _check_size(path: str, size: int) -> None:
    if size == 0:
        raise UsageError(f"the CD image {path} is empty: fetch or make it again")
    if size % BLOCK:
        raise UsageError(
            f"the CD image {path} has {size} bytes, which is not a multiple of {BLOCK}: "
            "it is cut short, or no ISO image"
        )


class MediumLocked(UsageError):
    """The guest has locked the tray, and was asked to open it."""


class _Fixed:
    """A mode page of which nothing can be changed."""

    def __init__(self, code: int, size: int, values: Callable[[], dict[int, int]]) -> None:
        self.code = code
        self._size = size
        self._values = values
        self.default = self.current()
        self.changeable = bytes((code, size - 2)).ljust(size, b"\0")

    def current(self) -> bytes:
        page = bytearray((self.code, self._size - 2)).ljust(self._size, b"\0")
        for at, value in self._values().items():
            page[at] = value
        return bytes(page)

    def change(self, values: bytes) -> None:
        """There is nothing to change."""


class ScsiCdrom:
    """A logical unit that is a drive. `native` is its ``struct scsi_lun *``; `commands` executes
    what is Python's.

    `path` is the image that is in the tray, or None; `tray_open` whether the guest has opened the
    tray. `on_tray` is called with the drive after that changed, on any thread.
    """

    def __init__(
        self,
        commands: CommandThread,
        *,
        serial: str,
        on_tray: Callable[[ScsiCdrom], None] = lambda drive: None,
    ) -> None:
        self.serial = serial
        self.path: str | None = None
        self.tray_open = False
        self._image: Image | None = None
        self._event = _NO_CHANGE
        self._on_tray = on_tray
        self._lock = threading.RLock()  # for all of these
        self._commands = commands
        self._cdrom = ffi.new("struct scsi_cdrom *", {"handoff": commands.native})
        self._pages, self._data = inquiry.native_pages(self._inquiry_pages())
        error = lib.scsi_cdrom_init(self._cdrom, self._pages, len(self._pages))
        if error:
            raise OSError(-error, os.strerror(-error))
        self.native = ffi.addressof(self._cdrom, "lun")
        self.native.id = commands.add(self._execute)
        recovery = _Fixed(0x01, 12, dict)
        power = _Fixed(0x1A, 40, dict)
        timeouts = _Fixed(0x1D, 12, dict)
        capabilities = _Fixed(0x2A, 22, self._capabilities)
        self._modes = {each.code: each for each in (recovery, power, timeouts, capabilities)}
        self._executors = {
            _START_STOP_UNIT: self._start_stop,
            _PREVENT_ALLOW: self._prevent_allow,
            _READ_TOC: self._read_toc,
            _GET_CONFIGURATION: self._get_configuration,
            _GET_EVENT: self._get_event,
            _READ_DISC_INFORMATION: self._read_disc_information,
            _READ_TRACK_INFORMATION: self._read_track_information,
            _READ_DISC_STRUCTURE: self._read_disc_structure,
            _MECHANISM_STATUS: self._mechanism_status,
            _MAINTENANCE_IN: self._maintenance_in,
            modes.MODE_SENSE_6: self._mode_sense,
            modes.MODE_SENSE_10: self._mode_sense,
            modes.MODE_SELECT_6: self._mode_select,
            modes.MODE_SELECT_10: self._mode_select,
        }

    def close(self) -> None:
        """Gives the logical unit and its medium back. No command may be under way."""
        self._commands.remove(self.native.id)
        lib.scsi_cdrom_set_medium(self._cdrom, ffi.NULL, False)
        if self._image is not None:
            self._image.close()
        lib.scsi_cdrom_destroy(self._cdrom)

    @property
    def size(self) -> int:
        """Bytes of the medium; 0 for none."""
        return 0 if self._image is None else self._image.size

    @property
    def locked(self) -> bool:
        """Whether the guest prevents the removal of the medium."""
        return bool(self._cdrom.prevent)

    def insert(self, path: str | os.PathLike[str] | None, *, force: bool = False) -> None:
        """Puts an image into the drive in place of what is there, and closes the tray; None only
        takes out what is there. Idle reads of the guest end first.

        UsageError when `path` is no image. MediumLocked when the guest prevents the removal, as it
        does while the medium is mounted; it is then asked to end that. `force` takes the medium out
        all the same.
        """
        image = None if path is None else open_medium(path)
        with self._lock:
            if self._image is not None and not self.tray_open and self._cdrom.prevent and not force:
                if image is not None:
                    image.close()
                self._event = _EJECT_REQUEST
                raise MediumLocked(
                    f"the guest has locked the medium {self.path} in its drive, and was asked to "
                    "eject it: unmount it there, or use force"
                )
            was_open = self.tray_open
            lib.scsi_cdrom_set_medium(self._cdrom, ffi.NULL, False)
            if self._image is not None:
                self._image.close()
                self._event = _MEDIA_REMOVAL
            self._image, self.path = image, None if path is None else os.fspath(path)
            self.tray_open = False
            if image is not None:
                self._load()
        if was_open:
            self._on_tray(self)

    def _load(self) -> None:
        """The medium in the tray, which has been closed, becomes ready."""
        assert self._image is not None
        lib.scsi_cdrom_set_medium(self._cdrom, self._image.native, False)
        lib.scsi_attention(self.native, lib.SCSI_ATTENTION_MEDIUM_CHANGED)
        self._event = _NEW_MEDIA

    # Commands

    def _execute(self, command: Command) -> None:
        before = self.tray_open
        with self._lock:
            self._executors[command.cdb[0]](command)
        if self.tray_open != before:
            self._on_tray(self)

    def _start_stop(self, command: Command) -> None:
        """START STOP UNIT (MMC-6, 6.42): of interest is the tray alone."""
        power, load_eject, start = command.cdb[4] >> 4, command.cdb[4] & 2, command.cdb[4] & 1
        if power or not load_eject:
            return
        if start:
            if self.tray_open:
                self.tray_open = False
                if self._image is not None:
                    self._load()
                else:
                    lib.scsi_cdrom_set_medium(self._cdrom, ffi.NULL, False)
            return
        if self._cdrom.prevent and not self.tray_open:
            raise check_condition(_REMOVAL_PREVENTED)
        if not self.tray_open:
            self.tray_open = True
            lib.scsi_cdrom_set_medium(self._cdrom, ffi.NULL, True)
            if self._image is not None:
                self._event = _MEDIA_REMOVAL

    def _prevent_allow(self, command: Command) -> None:
        """PREVENT ALLOW MEDIUM REMOVAL (MMC-6, 6.13): bit 1 of the state is the persistent one."""
        wanted = command.cdb[4]
        bit = wanted & 2 or 1
        if wanted & 1:
            self._cdrom.prevent |= bit
        else:
            self._cdrom.prevent &= ~bit

    def _mode_sense(self, command: Command) -> None:
        modes.mode_sense(command, self._modes, specific=0)

    def _mode_select(self, command: Command) -> None:
        modes.mode_select(command, self._modes)

    def _maintenance_in(self, command: Command) -> None:
        if command.cdb[1] & 0x1F == _REPORT_OPCODES:
            report_opcodes(command, lib.scsi_cdrom_opcodes(), self.native.abilities)
        else:
            report_functions(command)

    def _get_configuration(self, command: Command) -> None:
        """GET CONFIGURATION (MMC-6, 6.5)."""
        which, first = command.cdb[1] & 3, int.from_bytes(command.cdb[2:4])
        if which == 3:
            raise invalid_field(1, 1)
        features = b""
        for code, version, persistent, current, data in self._features():
            if (code == first if which == 2 else code >= first) and (current or which != 1):
                flags = version << 2 | persistent << 1 | current
                features += struct.pack(">HBB", code, flags, len(data)) + data
        data = struct.pack(">IHH", 4 + len(features), 0, self._profile()) + features
        command.answer(data, int.from_bytes(command.cdb[7:9]))

    def _features(self) -> list[tuple[int, int, bool, bool, bytes]]:
        """Code, version, persistent, current and data (MMC-6, 5.3); `current` those in effect."""
        profile = self._profile()
        cd, dvd = profile == _CD_ROM, profile == _DVD_ROM
        profiles = struct.pack(">HBxHBx", _DVD_ROM, dvd, _CD_ROM, cd)
        scsi, inq2 = 1, 0x02
        tray, load, eject, lock = 0x20, 0x10, 0x08, 0x01
        serial = self.serial.encode("ascii")
        return [
            (0x0000, 0, True, True, profiles),
            (0x0001, 2, True, True, struct.pack(">IB3x", scsi, inq2)),  # core
            (0x0002, 1, True, True, bytes(4)),  # morphing: events are polled
            (0x0003, 1, True, True, bytes((tray | load | eject | lock, 0, 0, 0))),
            (0x0010, 0, False, cd or dvd, struct.pack(">IHBx", BLOCK, 16 if dvd else 1, 1)),
            (0x001E, 2, False, cd, bytes(4)),  # CD read
            (0x001F, 1, False, dvd, bytes(4)),  # DVD read
            (0x0100, 0, True, True, b""),  # power management
            (0x0105, 1, True, True, bytes(4)),  # timeouts
            (0x0108, 0, True, True, serial.ljust(-(-len(serial) // 4) * 4)),
        ]

    def _get_event(self, command: Command) -> None:
        """GET EVENT STATUS NOTIFICATION (MMC-6, 6.6)."""
        wanted = command.cdb[4]
        if not command.cdb[1] & 1:
            raise invalid_field(1, 0)  # POLLED
        allocated = int.from_bytes(command.cdb[7:9])
        event, present = self._event, self._image is not None and not self.tray_open
        events = {
            _OPERATIONAL_CHANGE: bytes(4),
            _POWER_MANAGEMENT: bytes((_NO_CHANGE, 1, 0, 0)),  # it is active
            _MEDIA: bytes((event, present << 1 | self.tray_open, 0, 0)),
        }
        supported = sum(1 << each for each in events)
        classes = [each for each in events if wanted >> each & 1]
        if not classes:
            none = 0x80
            command.answer(struct.pack(">HBB", 2, none, supported), allocated)
            return
        chosen = _MEDIA if event and _MEDIA in classes else classes[0]
        header = struct.pack(">HBB", 2 + len(events[chosen]), chosen, supported)
        command.answer(header + events[chosen], allocated)
        if chosen == _MEDIA and allocated > 4:
            self._event = _NO_CHANGE

    def _read_toc(self, command: Command) -> None:
        """READ TOC/PMA/ATIP (MMC-6, 6.25): one session with one track of data."""
        blocks = self._blocks()
        what = command.cdb[2] & 0x0F or command.cdb[9] >> 6
        msf, track = bool(command.cdb[1] & 2), command.cdb[6]
        if what == 0:
            if track > 1 and track != _LEAD_OUT:
                raise invalid_field(6, 7)
            tracks = [(_LEAD_OUT, blocks)] if track == _LEAD_OUT else [(1, 0), (_LEAD_OUT, blocks)]
            entries = b"".join(
                bytes((0, _DATA_TRACK, number, 0)) + _address(lba, msf) for number, lba in tracks
            )
        elif what == 1:
            entries = bytes((0, _DATA_TRACK, 1, 0)) + _address(0, msf)
        elif what == 2:
            if track > 1:
                raise invalid_field(6, 7)
            points = [
                (0xA0, bytes((1, 0, 0))),  # the first track, and that the disc is a CD-ROM
                (0xA1, bytes((1, 0, 0))),  # the last track
                (0xA2, _address(blocks, True)[1:]),
                (1, _address(0, True)[1:]),
            ]
            entries = b"".join(
                bytes((1, _DATA_TRACK, 0, point, 0, 0, 0, 0)) + value for point, value in points
            )
        else:
            raise invalid_field(2, 3)
        data = struct.pack(">HBB", 2 + len(entries), 1, 1) + entries
        command.answer(data, int.from_bytes(command.cdb[7:9]))

    def _read_disc_information(self, command: Command) -> None:
        """READ DISC INFORMATION (MMC-6, 6.21), standard: a complete disc that cannot be written."""
        self._blocks()
        if command.cdb[1] & 7:
            raise invalid_field(1, 2)
        complete, unrestricted = 0x0E, 0x20
        data = struct.pack(">HBBBBBBB", 32, complete, 1, 1, 1, 1, unrestricted, 0).ljust(34, b"\0")
        command.answer(data, int.from_bytes(command.cdb[7:9]))

    def _read_track_information(self, command: Command) -> None:
        """READ TRACK INFORMATION (MMC-6, 6.26) by block address, track or session."""
        blocks = self._blocks()
        by, number = command.cdb[1] & 3, int.from_bytes(command.cdb[2:6])
        if by == 3:
            raise invalid_field(1, 1)
        if not (number < blocks if by == 0 else number == 1):
            raise invalid_field(2, 7)
        uninterrupted, mode_1 = 0x04, 0x01
        head = struct.pack(">HBBBBBB", 34, 1, 1, 0, uninterrupted, mode_1, 0)
        data = head + struct.pack(">IIIIIIxxxx", 0, 0, 0, 0, blocks, blocks - 1)
        command.answer(data, int.from_bytes(command.cdb[7:9]))

    def _read_disc_structure(self, command: Command) -> None:
        """READ DISC STRUCTURE (MMC-6, 6.22), of a DVD with one layer."""
        blocks = self._blocks()
        cdb = command.cdb
        if cdb[1] & 0x0F:
            raise invalid_field(1, 3)
        if cdb[7] == 0xFF:
            payload = b"".join(
                struct.pack(">BBH", code, 0x40, size + 4)
                for code, size in ((0x00, 2048), (0x01, 4), (0x04, 2048))
            )
        elif self._profile() != _DVD_ROM:
            raise check_condition(_INCOMPATIBLE_MEDIUM)
        elif cdb[6]:
            raise invalid_field(6, 7)
        elif cdb[7] == 0x00:
            start = 0x030000
            read_only, any_speed = 0x01, 0x0F
            head = struct.pack(">BBBB", 0x01, any_speed, read_only, 0)
            payload = head + struct.pack(">III", start, start + blocks - 1, 0)
            payload = payload.ljust(2048, b"\0")
        elif cdb[7] == 0x01:
            payload = bytes(4)  # nothing protects it
        elif cdb[7] == 0x04:
            payload = bytes(2048)
        else:
            raise invalid_field(7, 7)
        data = struct.pack(">Hxx", 2 + len(payload)) + payload
        command.answer(data, int.from_bytes(cdb[8:10]))

    def _mechanism_status(self, command: Command) -> None:
        """MECHANISM STATUS (MMC-6, 6.11): no changer."""
        door_open = self.tray_open << 4
        command.answer(bytes((0, door_open, 0, 0, 0, 0, 0, 0)), int.from_bytes(command.cdb[8:10]))

    # What it is

    def _blocks(self) -> int:
        """The size of the medium in blocks. Refused when there is none."""
        if self._image is None or self.tray_open:
            raise check_condition(_TRAY_OPEN if self.tray_open else _TRAY_CLOSED)
        return self._image.size // BLOCK

    def _profile(self) -> int:
        if self._image is None or self.tray_open:
            return _NO_PROFILE
        return _CD_ROM if self._image.size // BLOCK <= _CD_BLOCKS else _DVD_ROM

    def _capabilities(self) -> dict[int, int]:
        """Page 2Ah: obsolete since MMC-4, and what drivers look at all the same."""
        reads = 0x3B  # CD-R, CD-RW, DVD-ROM, DVD-R, DVD-RAM
        tray, eject, locked, lock = 0x20, 0x08, 0x02, 0x01
        speed = 48 * 176  # kB/s
        state = tray | eject | lock | (locked if self._cdrom.prevent else 0)
        return {
            2: reads,
            6: state,
            8: speed >> 8,
            9: speed & 0xFF,
            12: BLOCK >> 8,  # the buffer in KiB
            14: speed >> 8,
            15: speed & 0xFF,
        }

    def _inquiry_pages(self) -> dict[int, bytes]:
        payloads = {
            inquiry.UNIT_SERIAL_NUMBER: self.serial.encode("ascii"),
            inquiry.DEVICE_IDENTIFICATION: inquiry.identification(self.serial),
        }
        payloads[inquiry.SUPPORTED_PAGES] = bytes(sorted((inquiry.SUPPORTED_PAGES, *payloads)))
        pages = {code: inquiry.page(_CD_DEVICE, code, data) for code, data in payloads.items()}
        versions = (inquiry.SAM_5, inquiry.SPC_4, inquiry.MMC_6)
        pages[lib.SCSI_STANDARD_INQUIRY] = inquiry.standard(
            _CD_DEVICE, "CD-ROM", versions, removable=True
        )
        return pages


def _address(lba: int, msf: bool) -> bytes:
    """A block address in four bytes; as minutes, seconds and frames it starts at two seconds."""
    if not msf:
        return struct.pack(">I", lba)
    seconds, frames = divmod(lba + 150, 75)
    if seconds >= 256 * 60:  # of a DVD, beyond what can be told
        return bytes((0, 255, 59, 74))
    return bytes((0, seconds // 60, seconds % 60, frames))
