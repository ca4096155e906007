"""The other end of the control socket, of this or another machine monitor that speaks QMP."""

from __future__ import annotations

import errno
import json
import os
import socket

from pyvmm.control.protocol import NEGOTIATE
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Self

_GREETING_SECONDS = 30.0  # that an emulated machine may take to start


class QmpClient:
    """A session with the machine whose control socket is at `path`; a context manager.

    UsageError when there is none.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_GREETING_SECONDS)
        try:
            self._socket.connect(path)
            self._lines = self._socket.makefile("rb")
            greeting = self._receive()
        except (OSError, ValueError) as error:
            self._socket.close()
            raise UsageError(_why_not(path, error)) from None
        if "QMP" not in greeting:
            self.close()
            raise UsageError(_why_not(path, ValueError()))
        self._socket.settimeout(None)
        self._events: list[dict[str, Any]] = []
        self.execute(NEGOTIATE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the session; idempotent."""
        self._lines.close()
        self._socket.close()

    def execute(self, command: str, arguments: dict[str, Any] | None = None) -> Any:
        """What the command returns. UsageError with the machine's words when it fails, and when
        the machine ends before it answers."""
        request = {"execute": command, "arguments": arguments or {}}
        try:
            self._socket.sendall(json.dumps(request).encode() + b"\n")
            while "event" in (answer := self._receive()):
                self._events.append(answer)
        except (OSError, ValueError):
            raise UsageError(
                f"the machine of {self._path} ended before it answered {command}"
            ) from None
        if "error" in answer:
            raise UsageError(answer["error"]["desc"])
        return answer["return"]

    def events(self) -> Iterator[dict[str, Any]]:
        """The events of the machine as they happen, until its end."""
        yield from self._events
        try:
            while True:
                yield self._receive()
        except (OSError, ValueError):
            return

    def _receive(self) -> dict[str, Any]:
        """ValueError when it is no object, or the end."""
        message = json.loads(self._lines.readline())
        if not isinstance(message, dict):
            raise ValueError("no message of QMP")
        return message


def _why_not(path: str, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else 0
    if number == errno.ENOENT:
        return f"there is no socket {path}: 'pyvmm run --qmp unix:{path}' makes it"
    if number == errno.ECONNREFUSED and os.path.exists(path) and not _is_socket(path):
        return f"{path} is no socket: name the one of --qmp"
    if number == errno.ECONNREFUSED:
        return f"nobody listens on {path}: its machine has ended"
    if number in (errno.EACCES, errno.EPERM):
        return f"no permission to use {path}: it is another user's (ls -l tells whose)"
    if isinstance(error, TimeoutError) or not isinstance(error, OSError):
        return f"{path} does not speak QMP: name the socket of --qmp"
    return f"{path} cannot be used: {error.strerror or error}"


def _is_socket(path: str) -> bool:
    import stat

    return stat.S_ISSOCK(os.stat(path).st_mode)
