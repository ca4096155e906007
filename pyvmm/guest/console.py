"""Talking to a guest's console from a program: send, and expect an answer."""

from __future__ import annotations

import os
import re
import select
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Protocol

    class Stream(Protocol):
        """The host's ends of a console: blocking descriptors."""

        reader: int
        writer: int


class ExpectTimeout(AssertionError):
    """What was expected did not come, or the guest ended; the message shows what came instead."""


class GuestConsole:
    """An expect-style console: all output is kept until `expect` or `read` consumed it.

    `stream` is what a guest's console of kind ``pipe`` is connected to, as ``vm.serial``.
    `transcript` has all output so far; `ended` tells that there is no more: the guest is gone.
    """

    def __init__(self, stream: Stream) -> None:
        self._reader = stream.reader
        self._writer = stream.writer
        self._pending = b""
        self.transcript = b""
        self.ended = False

    def send(self, data: bytes | str) -> None:
        """Types `data` (text as UTF-8), all of it, however slowly the guest takes it."""
        view = memoryview(data.encode() if isinstance(data, str) else data)
        while view:
            select.select([], [self._writer], [])
            view = view[os.write(self._writer, view) :]

    def read(self, timeout: float) -> bytes:
        """What is there, or comes within `timeout` seconds."""
        if not self._pending:
            self._fill(time.monotonic() + timeout)
        data, self._pending = self._pending, b""
        return data

    def expect(self, pattern: bytes | str | re.Pattern[bytes], *, timeout: float) -> bytes:
        """Waits for text (or a regular expression) and returns all output up to its end.

        Raises ExpectTimeout after `timeout` seconds, and as soon as the guest has ended.
        """
        if isinstance(pattern, str):
            pattern = pattern.encode()
        if isinstance(pattern, bytes):
            pattern = re.compile(re.escape(pattern))
        deadline = time.monotonic() + timeout
        while True:
            match = pattern.search(self._pending)
            if match:
                seen, self._pending = self._pending[: match.end()], self._pending[match.end() :]
                return seen
            if not self._fill(deadline):
                tail = self._pending[-2000:].decode(errors="replace")
                when = "before it ended" if self.ended else f"within {timeout:g} s"
                raise ExpectTimeout(
                    f"the guest did not say {pattern.pattern!r} {when}; it said instead:\n{tail}"
                )

    def _fill(self, deadline: float) -> bool:
        """Reads what comes before `deadline`; False when nothing does."""
        wait = max(0.0, deadline - time.monotonic())
        if not select.select([self._reader], [], [], wait)[0]:
            return False
        data = os.read(self._reader, 1 << 16)
        self._pending += data
        self.transcript += data
        self.ended = not data
        return not self.ended
