"""Disks of the host: what all kinds have in common, and raw images and block devices."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
import time

from pyvmm._core import ffi, lib
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, Self

SECTOR = 512
PAGE_SIZE = 4096

# Requests of linux/fs.h, _IO(0x12, number). Each returns an int.
_BLKROGET = 0x125E
_BLKSSZGET = 0x1268
_BLKPBSZGET = 0x127B

# Alignments that direct I/O may ask for.
_ALIGNMENTS = (512, 1024, 2048, PAGE_SIZE)

# A process that was killed keeps its lock until its requests have ended, some milliseconds.
_LOCK_PATIENCE = 0.5


class Image:
    """An open disk, whatever serves it; use it as a context manager or `close` it.

    `native` is the ``struct blk_image *`` for the block engine. All sizes are bytes: `size` is that
    of the disk, `logical_block_size` and `physical_block_size` are what a guest should be told;
    `discard_granularity` is 0 when space cannot be given back. `name` is what the user called it,
    `format` that of the image, or nbd.
    """

    __slots__ = (
        "discard_granularity",
        "format",
        "logical_block_size",
        "name",
        "native",
        "physical_block_size",
        "readonly",
    )
    name: str
    format: str
    native: Any
    readonly: bool
    logical_block_size: int
    physical_block_size: int
    discard_granularity: int

    @property
    def size(self) -> int:
        size: int = self.native.size
        return size

    @property
    def limits(self) -> tuple[int, int]:
        """The most requests and bytes in a second; 0: any number."""
        limit = self.native.limit
        return limit.iops, limit.bps

    @property
    def in_memory(self) -> bool:
        """Whether it never waits for a disk, as on a tmpfs."""
        return bool(self.native.in_memory)

    def resize(self, size: int | None) -> None:
        """Makes the disk larger, to `size` bytes, or to what it is on the host by now (None).

        No request may be under way. UsageError, here where that cannot be done.
        """
        raise UsageError(
            f"{self.name} keeps its size while it is in use: end the guest, "
            "then use qemu-img resize or what the server has for it"
        )

    def _check_growth(self, size: int) -> None:
        if size < self.size:
            raise UsageError(
                f"{self.name} has {self.size} bytes and cannot shrink to {size} while a guest "
                "uses it: that would cut off what it holds"
            )
        if size % self.logical_block_size:
            raise UsageError(
                f"{self.name} cannot have {size} bytes, which is not a multiple of "
                f"{self.logical_block_size}"
            )

    def close(self) -> None:
        """Gives the disk back; idempotent. No request may be under way."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class DiskImage(Image):
    """A raw image or block device, locked as long as it is open.

    `block_size` is the smallest unit in which it can be read or written, and `buffer_align` what
    memory must be aligned to for that (1: anything), both because of O_DIRECT.
    """

    __slots__ = ("block_size", "buffer_align", "fd", "is_block_device")

    def __init__(self, path: str, fd: int, *, readonly: bool, direct: bool) -> None:
        self.name = path
        self.format = "raw"
        self.fd = fd
        self.readonly = readonly
        self.block_size = SECTOR
        self.buffer_align = 1
        size = os.lseek(fd, 0, os.SEEK_END)
        status = os.fstat(fd)
        self.is_block_device = stat.S_ISBLK(status.st_mode)
        if self.is_block_device:
            self.logical_block_size = _ioctl_int(fd, _BLKSSZGET)
            self.physical_block_size = _ioctl_int(fd, _BLKPBSZGET)
            self.discard_granularity = _device_discard_granularity(status.st_rdev)
        else:
            self.logical_block_size = SECTOR
            self.physical_block_size = PAGE_SIZE  # less is read before it is written
            self.discard_granularity = 0
            if not readonly and lib.blk_image_can_punch(fd, size):
                self.discard_granularity = os.fstatvfs(fd).f_frsize
        if direct:
            self.block_size, self.buffer_align = _direct_alignment(path, fd)
            self.logical_block_size = max(self.logical_block_size, self.block_size)
            self.physical_block_size = max(self.physical_block_size, self.logical_block_size)
        self.native = ffi.new(
            "struct blk_image *",
            {
                "fd": fd,
                "size": size,
                "block_size": self.block_size,
                "buffer_align": self.buffer_align,
                "is_block_device": self.is_block_device,
                "in_memory": lib.blk_image_in_memory(fd),
            },
        )

    def resize(self, size: int | None) -> None:
        actual = os.lseek(self.fd, 0, os.SEEK_END)
        if self.is_block_device and size not in (None, actual):
            raise UsageError(
                f"the block device {self.name} has {actual} bytes, not {size}: "
                "resize it first (lvextend), then have its size read anew"
            )
        wanted = actual if size is None else size
        self._check_growth(wanted)
        if wanted > actual:
            self._extend(wanted)
        self.native.size = wanted

    def _extend(self, size: int) -> None:
        if self.readonly:
            raise UsageError(f"{self.name} has readonly=on and cannot be made larger")
        try:
            os.ftruncate(self.fd, size)
        except OSError as error:
            raise UsageError(
                f"{self.name} cannot be made {size} bytes large: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Unlocks and closes the image; idempotent."""
        if self.fd >= 0:
            # Closing is not enough: a child process or an io_uring may still have the file.
            _lock(self.fd, fcntl.F_UNLCK)
            os.close(self.fd)
            self.fd = -1


def open_image(
    path: str | os.PathLike[str], *, readonly: bool = False, direct: bool = False
) -> DiskImage:
    """Opens a raw image or block device as a disk, locked against other users of it.

    Whoever writes is alone; readers (`readonly`) share. `direct` bypasses the host's page cache
    (O_DIRECT).

    UsageError when the image is missing, forbidden, in use, no file or block device, or of a size
    that no disk has.
    """
    path = os.fspath(path)
    fd = open_file(path, readonly, direct)
    try:
        if not readonly and stat.S_ISBLK(os.fstat(fd).st_mode) and _ioctl_int(fd, _BLKROGET):
            raise UsageError(f"the block device {path} is read-only: give readonly=on")
        _acquire_lock(path, fd, readonly)
        image = DiskImage(path, fd, readonly=readonly, direct=direct)
        _check_size(image)
    except BaseException:
        os.close(fd)
        raise
    return image


def open_file(path: str, readonly: bool, direct: bool) -> int:
    """A descriptor of a file or block device. UsageError."""
    flags = (os.O_RDONLY if readonly else os.O_RDWR) | (os.O_DIRECT if direct else 0)
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            raise UsageError(f"the disk image {path} is a directory: name a file in it")
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            raise UsageError(f"the disk image {path} is neither a file nor a block device")
        return os.open(path, flags | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(_explain(path, readonly, direct, error)) from error


def _explain(path: str, readonly: bool, direct: bool, error: OSError) -> str:
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return f"the disk image {path} does not exist (truncate -s 10G makes an empty one)"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        if not readonly and os.access(path, os.R_OK):
            return f"no permission to write the disk image {path}: give readonly=on, or chmod it"
        return f"no permission to open the disk image {path}: check it with ls -l"
    if error.errno == errno.EINVAL and direct:
        return f"the file system of the disk image {path} has no direct I/O: leave direct=on out"
    return f"the disk image {path} cannot be opened: {os.strerror(error.errno or 0)}"


def _ioctl_int(fd: int, request: int) -> int:
    value: int = struct.unpack("i", fcntl.ioctl(fd, request, bytes(4)))[0]
    return value


def _device_discard_granularity(device: int) -> int:
    """What /sys says of the block device (a partition has its disk's), 0 for no discard."""
    base = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for queue in (f"{base}/queue", f"{base}/../queue"):
        try:
            with open(f"{queue}/discard_granularity", encoding="ascii") as file:
                return int(file.read())
        except OSError:
            continue
    return 0


def _direct_alignment(path: str, fd: int) -> tuple[int, int]:
    """What O_DIRECT asks of offsets and lengths, and of addresses, found out by reading.

    STATX_DIOALIGN tells it only on some file systems, since Linux 6.1.
    """
    import mmap

    with mmap.mmap(-1, 2 * PAGE_SIZE) as memory, memoryview(memory) as buffer:

        def reads(start: int, length: int) -> bool:
            with buffer[start : start + length] as part:
                try:
                    os.preadv(fd, [part], 0)
                except OSError as error:
                    if error.errno == errno.EINVAL:
                        return False
                    raise UsageError(
                        f"the disk image {path} cannot be read: {error.strerror}"
                    ) from error
            return True

        for block_size in _ALIGNMENTS:
            if reads(0, block_size):
                break
        else:
            raise UsageError(f"direct I/O on {path} does not work: leave direct=on out")
        for align in _ALIGNMENTS:
            if reads(align, block_size):
                return block_size, align
        return block_size, PAGE_SIZE


def _lock(fd: int, kind: int) -> None:
    """Sets an open-file-description lock (fcntl(2)) on the whole file."""
    flock = struct.pack("hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, flock)


def _acquire_lock(path: str, fd: int, readonly: bool) -> None:
    deadline = time.monotonic() + _LOCK_PATIENCE
    while True:
        try:
            _lock(fd, fcntl.F_RDLCK if readonly else fcntl.F_WRLCK)
            return
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise UsageError(
                    f"the disk image {path} cannot be locked ({error.strerror}): "
                    "put it on a file system with locks"
                ) from error
            if time.monotonic() < deadline:
                time.sleep(0.01)
                continue
            share = "" if readonly else ", or give readonly=on to all that use it"
            raise UsageError(
                f"the disk image {path} is in use by another process: stop that one "
                f"(fuser -v {path} shows it){share}"
            ) from error


def _check_size(image: DiskImage) -> None:
    if image.size == 0:
        raise UsageError(f"the disk image {image.name} is empty: truncate -s 10G gives it a size")
    if image.size % image.logical_block_size:
        size = image.size + -image.size % image.logical_block_size
        raise UsageError(
            f"the disk image {image.name} has {image.size} bytes, which is not a multiple of "
            f"{image.logical_block_size}: truncate -s {size} {image.name}"
        )
