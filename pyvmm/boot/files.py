"""Kernel and initrd files of the user: opened and read with errors that name the file."""

from __future__ import annotations

import os
import stat

from pyvmm.errors import UsageError


def open_file(path: str, what: str) -> int:
    """A read-only descriptor of the regular file ``path``, which the user gave as ``what``.

    Raises UsageError when it cannot be opened or is no regular file.
    """
    try:
        # O_NONBLOCK: a FIFO is refused below, and must not block before that.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(f"cannot open {what} '{path}': {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise UsageError(f"{what} '{path}' is not a regular file")
    return fd


def read_into(fd: int, buffer: memoryview, offset: int, path: str) -> None:
    """Fills ``buffer`` from byte ``offset`` of ``fd``, the file ``path``.

    Raises UsageError when the file ends before, or cannot be read.
    """
    while buffer:
        try:
            count = os.preadv(fd, [buffer], offset)
        except OSError as error:
            raise UsageError(f"cannot read '{path}': {error.strerror}") from None
        if count == 0:
            raise UsageError(f"'{path}' became shorter while it was read")
        buffer = buffer[count:]
        offset += count
