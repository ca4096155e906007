"""Copies of disks for guests that are thrown away."""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from tempfile import TemporaryFile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@contextmanager
def scratch_copy(path: str) -> Iterator[str]:
    """The path of a copy of the disk image ``path`` that has no name in any directory.

    It goes with the context, or with this process however that ends. Holes stay holes, and where
    the file system can share blocks (btrfs, XFS) nothing is copied. The copy lies in the folder of
    the image.
    """
    with open(path, "rb") as source, TemporaryFile(dir=os.path.dirname(path) or ".") as copy:
        size = os.fstat(source.fileno()).st_size
        copy.truncate(size)
        for start, end in _extents(source.fileno(), size):
            while start < end:
                start += os.copy_file_range(
                    source.fileno(), copy.fileno(), end - start, start, start
                )
        yield f"/proc/self/fd/{copy.fileno()}"


def _extents(fd: int, size: int) -> Iterator[tuple[int, int]]:
    """(start, end) of what is not a hole."""
    end = 0
    while end < size:
        try:
            start = os.lseek(fd, end, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left
                return
            raise
        end = os.lseek(fd, start, os.SEEK_HOLE)
        yield start, end
