"""SCSI commands that Python executes: rare ones, which C hands over (``_native/scsi.h``).

One thread takes them one by one, whatever logical unit they are for.
"""

from __future__ import annotations

import os
import threading

from pyvmm._core import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


def sense(key: int, asc: int, ascq: int) -> int:
    """A sense key with its additional sense code and qualifier (SPC-4, 4.5), as C has it."""
    return key << 16 | asc << 8 | ascq


PARAMETER_LIST_LENGTH_ERROR = sense(0x5, 0x1A, 0x00)
INVALID_RELEASE = sense(0x5, 0x26, 0x04)
SAVING_NOT_SUPPORTED = sense(0x5, 0x39, 0x00)
INTERNAL_TARGET_FAILURE = sense(0x4, 0x44, 0x00)


class Refused(Exception):
    """Ends a command without status GOOD; `answer` says how, in the ``struct scsi_command *``."""

    def __init__(self, answer: Callable[[Any], object]) -> None:
        super().__init__()
        self.answer = answer


def check_condition(code: int) -> Refused:
    return Refused(lambda native: lib.scsi_sense(native, code))


def invalid_field(byte: int, bit: int = -1) -> Refused:
    """INVALID FIELD IN CDB, with a pointer to the byte and, if it is given, the leftmost bit."""
    return Refused(lambda native: lib.scsi_invalid_field(native, byte, bit))


def invalid_parameter(byte: int, bit: int = -1) -> Refused:
    """INVALID FIELD IN PARAMETER LIST, likewise."""
    return Refused(lambda native: lib.scsi_invalid_parameter(native, byte, bit))


def reservation_conflict() -> Refused:
    return Refused(lambda native: setattr(native, "status", lib.SCSI_RESERVATION_CONFLICT))


class Command:
    """A command to execute; `cdb` is a copy."""

    __slots__ = ("_native", "cdb")

    def __init__(self, native: Any) -> None:
        self._native = native
        self.cdb = bytes(ffi.buffer(native.cdb))

    def parameters(self, size: int) -> bytes:
        """A copy of a parameter list of `size` bytes. Refused when the driver sent fewer."""
        buffer = ffi.new("uint8_t[]", size)
        if not lib.scsi_parameters(self._native, buffer, size):
            raise Refused(lambda native: None)  # C has put the answer in: OVERRUN
        return bytes(ffi.buffer(buffer))

    def answer(self, data: bytes, allocated: int) -> None:
        """GOOD, with what the allocation length leaves of `data`."""
        lib.scsi_answer(self._native, data, len(data), allocated)


class CommandThread:
    """The thread that executes commands; it starts with the first logical unit that needs it.

    `native` is the ``struct scsi_handoff *`` for logical units. MemoryError when there is none.
    """

    def __init__(self) -> None:
        self.native = lib.scsi_handoff_create()
        if self.native == ffi.NULL:
            raise MemoryError(f"no memory for SCSI commands: {os.strerror(ffi.errno)}")
        self._execute: dict[int, Callable[[Command], None]] = {}
        self._next = 1
        self._thread: threading.Thread | None = None

    def add(self, execute: Callable[[Command], None]) -> int:
        """Has `execute` called, on the thread, for each command to the unit with this ``id``.

        It calls `Command.answer`, or raises Refused; if it does neither, the status is GOOD.
        """
        number = self._next
        self._next += 1
        self._execute[number] = execute
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="scsi", daemon=True)
            self._thread.start()
        return number

    def remove(self, number: int) -> None:
        """The logical unit has gone, and no command for it is under way."""
        del self._execute[number]

    def close(self) -> None:
        """Stops the thread; idempotent. There may be no more commands."""
        if self.native == ffi.NULL:
            return
        if self._thread is not None:
            lib.scsi_handoff_stop(self.native)
            self._thread.join()
        lib.scsi_handoff_destroy(self.native)
        self.native = ffi.NULL

    def _run(self) -> None:
        while (native := lib.scsi_handoff_take(self.native)) != ffi.NULL:
            try:
                self._execute[native.lun.id](Command(native))
            except Refused as refused:
                refused.answer(native)
            except Exception:
                import logging

                logging.getLogger("pyvmm.scsi").exception("a SCSI command failed")
                lib.scsi_sense(native, INTERNAL_TARGET_FAILURE)
            lib.scsi_done_elsewhere(native)
