"""SCSI devices of the host for pass-through: block devices of SCSI, and ``/dev/sgN``.

`_native/scsi_host.c` passes the commands on.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct

from pyvmm._core import ffi, lib
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

# Requests of scsi/sg.h and linux/fs.h.
_SG_GET_VERSION_NUM = 0x2282
_SG_GET_SG_TABLESIZE = 0x227F
_BLKSECTGET = 0x1267

_SG_MAJOR = 21
_SECTOR = 512
_PAGE_SIZE = 4096
_CAP_SYS_RAWIO = 1 << 17

# Of SPC-4, 6.6.2: what we can say in a word.
_TYPES = {0x00: "disk", 0x01: "tape", 0x05: "CD drive", 0x07: "optical disk", 0x08: "changer"}
_NO_DEVICE = 0x1F
_BLOCK_LIMITS = 0xB0  # a VPD page


class HostDevice:
    """A logical unit that is a SCSI device of the host; use it as a context manager or `close` it.

    `native` is its ``struct scsi_lun *``. `max_transfer` is how many bytes one command may move,
    which the guest finds in its VPD pages if `tells_limits`; `block_size` is the size of a logical
    block (0: it has none, or no medium). `description` says in words what it is, `remark` what the
    user should know (mostly nothing).
    """

    __slots__ = (
        "_claim",
        "_host",
        "block_size",
        "description",
        "fd",
        "max_transfer",
        "native",
        "path",
        "remark",
        "tells_limits",
    )

    def __init__(self, path: str, fd: int, claim: int) -> None:
        self.path = path
        self.fd = fd
        self._claim = claim
        status = os.fstat(fd)
        self.max_transfer = _max_transfer(fd, status)
        inquiry = _query(fd, bytes([0x12, 0, 0, 0, 96, 0]), 96)
        if len(inquiry) < 36 or inquiry[0] & 0x1F == _NO_DEVICE:
            raise UsageError(
                f"the SCSI device {path} does not answer an INQUIRY: check it with sg_inq {path}"
            )
        kind = _TYPES.get(inquiry[0] & 0x1F, "device")
        words = inquiry[8:36].decode("ascii", "replace").split()
        self.description = " ".join([kind, *words])
        capacity = _query(fd, bytes([0x25]) + bytes(9), 8)
        self.block_size = int.from_bytes(capacity[4:8], "big") if len(capacity) == 8 else 0
        self._host = lib.scsi_host_create(
            fd,
            ffi.new(
                "struct scsi_pass_limits *",
                {"max_transfer": self.max_transfer, "block_size": self.block_size},
            ),
        )
        if self._host == ffi.NULL:
            raise OSError(ffi.errno, os.strerror(ffi.errno))
        self.native = lib.scsi_host_lun(self._host)
        pages = _query(fd, bytes([0x12, 1, 0, 0, 252, 0]), 252)
        self.tells_limits = _BLOCK_LIMITS in pages[4:]
        self.remark = ""
        if not _may_do_all():
            self.remark = (
                f"the host's kernel lets only harmless commands through to {path}, "
                "as pyvmm lacks CAP_SYS_RAWIO"
            )

    def close(self) -> None:
        """Closes it, and lets others have it; idempotent. No command may be under way."""
        if self.fd >= 0:
            lib.scsi_host_destroy(self._host)
            os.close(self.fd)
            if self._claim >= 0:
                os.close(self._claim)
            self.fd = self._claim = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def open_host_device(path: str | os.PathLike[str]) -> HostDevice:
    """Opens ``/dev/sdX``, ``/dev/srX`` or ``/dev/sgN``, and claims a disk as long as it is open.

    UsageError when it is missing, forbidden, in use or no SCSI device.
    """
    path = os.fspath(path)
    fd = claim = -1
    try:
        fd = _open(path)
        status = os.fstat(fd)
        if stat.S_ISCHR(status.st_mode):
            claim = _claim_disk_of(path, status)
        return HostDevice(path, fd, claim)
    except BaseException:
        for each in (fd, claim):
            if each >= 0:
                os.close(each)
        raise


def _open(path: str) -> int:
    # A drive without a medium opens only with O_NONBLOCK, which is nothing to SG_IO.
    flags = os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC
    fd = -1
    try:
        status = os.stat(path)
        if stat.S_ISBLK(status.st_mode):
            flags |= os.O_EXCL  # nobody has mounted it, and nobody will
            whole = _whole_device(status)
            if whole:
                raise UsageError(
                    f"the SCSI device {path} is a partition: pass the whole of {whole} through, "
                    f"or give the guest a disk with --disk {path}"
                )
        elif stat.S_ISREG(status.st_mode):
            raise UsageError(f"{path} is a file, not a SCSI device: give it as --disk {path}")
        elif not stat.S_ISCHR(status.st_mode) or os.major(status.st_rdev) != _SG_MAJOR:
            raise _no_scsi_device(path)
        try:
            fd = os.open(path, flags)
        except OSError as error:
            # SG_IO does not ask for more to read a drive that cannot be written.
            if error.errno != errno.EROFS:
                raise
            fd = os.open(path, flags & ~os.O_RDWR)
        fcntl.ioctl(fd, _SG_GET_VERSION_NUM, bytes(4))
    except OSError as error:
        opened, fd = fd, -1
        if opened >= 0:
            os.close(opened)
            raise _no_scsi_device(path) from error
        raise UsageError(_explain(path, error)) from error
    return fd


def _explain(path: str, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        hint = " (modprobe sg makes /dev/sgN)" if path.startswith("/dev/sg") else ""
        return f"the SCSI device {path} does not exist: lsblk -S lists those there are{hint}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return (
            f"no permission to open the SCSI device {path}: "
            "run pyvmm as root, or as a member of the group that ls -l shows"
        )
    if error.errno == errno.EBUSY:
        return _busy(path)
    if error.errno in (errno.ENXIO, errno.ENODEV):
        return f"there is no device behind {path} any more: lsblk -S lists those there are"
    return f"the SCSI device {path} cannot be opened: {os.strerror(error.errno or 0)}"


def _busy(path: str) -> str:
    return (
        f"the SCSI device {path} is in use on the host: "
        "unmount it and what is on it (lsblk shows that), or end the other program"
    )


def _no_scsi_device(path: str) -> UsageError:
    return UsageError(
        f"{path} is not a SCSI device: give a /dev/sdX, /dev/srN or /dev/sgN that lsblk -S or "
        "lsscsi -g lists (--disk takes any block device)"
    )


def _whole_device(status: os.stat_result) -> str:
    """The device that a partition belongs to; empty: it is no partition."""
    base = f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if not os.path.exists(f"{base}/partition"):
        return ""
    return "/dev/" + os.path.basename(os.path.dirname(os.path.realpath(base)))


def _claim_disk_of(path: str, status: os.stat_result) -> int:
    """Claims the disk behind a /dev/sgN, so that nobody mounts it; -1: there is none to claim."""
    device = f"/sys/dev/char/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}/device/block"
    try:
        names = os.listdir(device)
    except OSError:
        return -1  # a tape, say
    for name in names:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_EXCL | os.O_CLOEXEC
        try:
            return os.open(f"/dev/{name}", flags)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise UsageError(_busy(path)) from error
    return -1


def _max_transfer(fd: int, status: os.stat_result) -> int:
    """Bytes of the largest command that the host surely takes, whatever memory it is in."""
    if stat.S_ISCHR(status.st_mode):
        (size,) = struct.unpack("i", fcntl.ioctl(fd, _BLKSECTGET, bytes(4)))
        (segments,) = struct.unpack("i", fcntl.ioctl(fd, _SG_GET_SG_TABLESIZE, bytes(4)))
    else:
        queue = f"/sys/dev/block/{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}/queue"
        (sectors,) = struct.unpack("Hxx", fcntl.ioctl(fd, _BLKSECTGET, bytes(4)))
        size = sectors * _SECTOR
        segments = _read_number(f"{queue}/max_segments")
    if segments > 0:
        size = min(size, segments * _PAGE_SIZE)
    return int(min(size, lib.SCSI_PASS_MAX_BYTES))


def _read_number(path: str) -> int:
    try:
        with open(path, encoding="ascii") as file:
            return int(file.read())
    except OSError:
        return 0


def _query(fd: int, cdb: bytes, size: int) -> bytes:
    """Data-in of a command; empty: it failed. The first may meet a unit attention condition."""
    buffer = ffi.new("uint8_t[]", size)
    for _ in range(3):
        count = lib.scsi_host_query(fd, cdb, len(cdb), buffer, size)
        if count >= 0:
            return bytes(ffi.buffer(buffer, count))
    return b""


def _may_do_all() -> bool:
    """Whether the kernel passes all commands on (CAP_SYS_RAWIO)."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) & _CAP_SYS_RAWIO)
    return False
