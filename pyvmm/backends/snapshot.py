"""Throw-away writes: a disk that its guest changes and its image does not."""

from __future__ import annotations

import errno
import os

from pyvmm._core import ffi, lib
from pyvmm.backends.disk import Image
from pyvmm.errors import UsageError

# Where temporary files of any size belong; /tmp is a tmpfs in many places.
_DIRECTORY = "/var/tmp"


class SnapshotImage(Image):
    """`base` with writes of its own, which are gone when it is closed.

    They go to a file without a name in ``$TMPDIR`` or /var/tmp: the page cache has it in memory
    as long as there is room, and the disk takes what is more. When that is full, requests of the
    guest fail that need more of it. `base` is closed with it.

    UsageError when there is no such directory, or no file as large as the disk can be made.
    """

    __slots__ = ("_base", "_overlay")

    def __init__(self, base: Image) -> None:
        self.name = base.name
        self.format = base.format
        self.readonly = False
        self.logical_block_size = base.logical_block_size
        self.physical_block_size = base.physical_block_size
        self._base = base
        self._overlay = _create_overlay(base.size)
        self.discard_granularity = os.fstatvfs(self._overlay).f_frsize
        snapshot = lib.blk_snapshot_create(base.native, self._overlay, base.size)
        if snapshot == ffi.NULL:
            os.close(self._overlay)
            raise MemoryError(f"no memory for the map of {base.name}")
        self.native = ffi.new(
            "struct blk_image *",
            {
                "fd": -1,
                "size": base.size,
                "block_size": base.native.block_size,
                "buffer_align": base.native.buffer_align,
                "in_memory": base.in_memory and lib.blk_image_in_memory(self._overlay),
                "snapshot": snapshot,
            },
        )

    def resize(self, size: int | None) -> None:
        """The base keeps its size; what is beyond it reads as zeroes at first."""
        if size is None:
            raise UsageError(f"{self.name} has snapshot=on: say which size it is to have")
        self._check_growth(size)
        _set_size(self._overlay, size, os.environ.get("TMPDIR") or _DIRECTORY)
        error = -lib.blk_snapshot_grow(self.native.snapshot, size)
        if error:
            raise MemoryError(f"no memory for the map of {self.name}")
        self.native.size = size

    def close(self) -> None:
        if self._overlay >= 0:
            lib.blk_snapshot_destroy(self.native.snapshot)
            os.close(self._overlay)
            self._overlay = -1
        self._base.close()


def _create_overlay(size: int) -> int:
    directory = os.environ.get("TMPDIR") or _DIRECTORY
    try:
        fd = _open_unnamed(directory)
    except OSError as error:
        raise UsageError(
            f"no file for throw-away writes can be made in {directory} ({error.strerror}): "
            "set TMPDIR to a directory that you can write to"
        ) from error
    try:
        _set_size(fd, size, directory)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _set_size(fd: int, size: int, directory: str) -> None:
    try:
        os.ftruncate(fd, size)
    except OSError as error:
        raise UsageError(
            f"the file system of {directory} has no files of {size} bytes ({error.strerror}): "
            "set TMPDIR to a directory on another one"
        ) from error


def _open_unnamed(directory: str) -> int:
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR):
            raise
    import tempfile  # some file systems (NFS, virtiofs) have no files without a name

    fd, path = tempfile.mkstemp(prefix="pyvmm-", dir=directory)
    os.unlink(path)
    return fd
