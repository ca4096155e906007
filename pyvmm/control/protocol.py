"""QMP on the wire: JSON texts out of a stream of bytes, and what is said about them.

Source: QEMU's docs/interop/qmp-spec. A client may send its objects in one line, in several, or
without any end of line between them.
"""

from __future__ import annotations

import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, NoReturn

NEGOTIATE = "qmp_capabilities"  # the command that starts a session
MAX_SIZE = 1 << 20  # bytes of a request

# What matters of a text outside of its strings, and inside.
_OUTSIDE = re.compile(rb'["{}\[\]\n]')
_INSIDE = re.compile(rb'["\n]|\\.')
_MEMBERS = {"execute", "arguments", "id"}


class QmpError(Exception):
    """What a client is told: the `kind` of error that programs know, and a sentence for people."""

    def __init__(self, sentence: str, kind: str = "GenericError") -> None:
        super().__init__(sentence)
        self.kind = kind


class Splitter:
    """Cuts what a client sends into JSON texts; `feed` it, then take them by `next`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._restart()
        self._skipping = False  # up to the next end of line

    def _restart(self) -> None:
        self._at = 0  # what is before is looked through
        self._depth = 0
        self._in_string = False

    def feed(self, data: bytes) -> None:
        self._buffer += data

    def next(self) -> bytes | None:
        """The next text, or None until more has come. QmpError for what cannot be one, after which
        it goes on behind that."""
        if self._skipping and not self._skip():
            return None
        buffer = self._buffer
        while found := (_INSIDE if self._in_string else _OUTSIDE).search(buffer, self._at):
            token = found[0]
            self._at = found.end()
            if self._at > MAX_SIZE:
                self._too_long()
            if self._in_string:
                if token == b'"':
                    self._in_string = False
                elif token == b"\n":
                    self._take(self._at)
                    raise QmpError("this is no JSON: a line ends inside a string")
            elif token == b'"':
                self._in_string = True
            elif token == b"\n":
                if self._depth == 0 and (text := self._take(self._at)).strip():
                    return text
            elif token in b"{[":
                if self._depth == 0 and (before := buffer[: found.start()]).strip():
                    self._take(found.start())
                    return bytes(before)
                self._depth += 1
            else:
                self._depth -= 1
                if self._depth <= 0:
                    return self._take(self._at)
        # A backslash that is left over waits for the byte that belongs to it.
        left_over = self._in_string and self._at < len(buffer) and buffer.endswith(b"\\")
        self._at = len(buffer) - left_over
        if len(buffer) > MAX_SIZE:
            self._too_long()
        return None

    def _take(self, end: int) -> bytes:
        text = bytes(self._buffer[:end])
        del self._buffer[:end]
        self._restart()
        return text

    def _skip(self) -> bool:
        end = self._buffer.find(b"\n") + 1
        self._take(end or len(self._buffer))
        self._skipping = end == 0
        return end > 0

    def _too_long(self) -> NoReturn:
        self._skipping = True
        self._skip()
        raise QmpError(f"a request has at most {MAX_SIZE} bytes: what follows in its line is lost")


def parse(text: bytes) -> Any:
    """The JSON value that `text` is. QmpError."""
    try:
        value = json.loads(text.decode(), parse_constant=_refuse, parse_float=_finite)
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no character
    except (ValueError, RecursionError) as error:
        raise QmpError(f"this is no JSON: {error}") from None
    return value


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number in it")


def _finite(text: str) -> float:
    number = float(text)
    if number in (float("inf"), -float("inf")):
        raise ValueError(f"{text} is too large")
    return number


def check_request(request: Any) -> tuple[str, dict[str, Any]]:
    """The command that a request names, and its arguments. QmpError."""
    if not isinstance(request, dict):
        raise QmpError('a request is a JSON object, such as {"execute": "query-status"}')
    for member in request:
        if member not in _MEMBERS:
            known = "it has execute, arguments and id"
            raise QmpError(f"a request has no member {member[:40]!r}: {known}")
    command, arguments = request.get("execute"), request.get("arguments", {})
    if not isinstance(command, str):
        raise QmpError("'execute' is missing in the request, or is not a string")
    if not isinstance(arguments, dict):
        raise QmpError("'arguments' of a request is an object")
    return command, arguments


def encode(message: dict[str, Any]) -> bytes:
    """A message to a client, as a line."""
    return json.dumps(message).encode() + b"\r\n"


def failure(error: QmpError) -> dict[str, Any]:
    return {"error": {"class": error.kind, "desc": str(error)}}
