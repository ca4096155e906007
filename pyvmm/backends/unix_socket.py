"""Listening Unix sockets (unix(7)) that only this user may connect to."""

from __future__ import annotations

import errno
import os
import socket
import stat

from pyvmm.errors import UsageError

LONGEST_PATH = 107  # bytes of sun_path, without the NUL


def check_path(path: str, purpose: str) -> None:
    """UsageError when `path` is too long to `purpose` it, such as "listen on"."""
    if len(os.fsencode(path)) > LONGEST_PATH:
        raise UsageError(
            f"cannot {purpose} {path}: the path of a socket has at most {LONGEST_PATH} bytes; "
            "choose a shorter one"
        )


def listen(path: str, backlog: int = 1) -> socket.socket:
    """A non-blocking socket of mode 0600 at `path`, in place of one that a process left behind.

    UsageError when there cannot be one.
    """
    check_path(path, "listen on")
    listener = socket.socket(socket.AF_UNIX)
    listener.setblocking(False)
    os.fchmod(listener.fileno(), 0o600)  # bind gives the socket's mode to the file
    try:
        try:
            listener.bind(path)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or not _is_stale(path):
                raise
            os.unlink(path)
            listener.bind(path)
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            reason = "it exists and is in use; choose another path"
        else:
            reason = os.strerror(error.errno or 0)
        raise UsageError(f"cannot listen on {path}: {reason}") from error
    return listener


def _is_stale(path: str) -> bool:
    """Whether `path` is a socket that a process left behind."""
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(path) == errno.ECONNREFUSED
