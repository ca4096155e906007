"""What a logical unit can do, told from the table that its commands are dispatched by (SPC-4)."""

from __future__ import annotations

import struct
from functools import cache

from pyvmm._core import ffi, lib
from pyvmm.backends.scsi.command import invalid_field

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.backends.scsi.command import Command

# A command timeouts descriptor without any time in it (SPC-4).
_TIMEOUTS = struct.pack(">H10x", 10)


class Opcode:
    """A command: `action` is its service action, or None; `usage` its CDB usage data."""

    __slots__ = ("action", "code", "usage")

    def __init__(self, code: int, action: int | None, usage: bytes) -> None:
        self.code = code
        self.action = action
        self.usage = usage


@cache  # a driver asks again for each disk
def opcodes(native: Any, abilities: int) -> list[Opcode]:
    """The commands in a ``struct scsi_opcodes *`` that a unit with these abilities has."""
    known = []
    for entry in native.table[0 : native.count]:
        if not entry.needs & ~abilities:
            action = entry.service_action
            none = action == lib.SCSI_NO_SERVICE_ACTION
            usage = bytes(ffi.buffer(entry.usage, entry.size))
            if not none:  # its place in the CDB, instead of a mask
                usage = bytes((usage[0], usage[1] & 0xE0 | action)) + usage[2:]
            known.append(Opcode(entry.opcode, None if none else action, usage))
    return known


def report_opcodes(command: Command, native: Any, abilities: int) -> None:
    """REPORT SUPPORTED OPERATION CODES."""
    cdb = command.cdb
    timeouts, option, wanted = bool(cdb[2] & 0x80), cdb[2] & 7, cdb[3]
    action = int.from_bytes(cdb[4:6])
    known = opcodes(native, abilities)
    if option == 0:
        data = b"".join(_descriptor(each, timeouts) for each in known)
        data = struct.pack(">I", len(data)) + data
    elif option <= 3:
        data = _one_command(known, option, wanted, action, timeouts)
    else:
        raise invalid_field(2, 2)
    command.answer(data, int.from_bytes(cdb[6:10]))


def _descriptor(each: Opcode, timeouts: bool) -> bytes:
    flags = timeouts << 1 | (each.action is not None)
    data = struct.pack(">BxHxBH", each.code, each.action or 0, flags, len(each.usage))
    return data + (_TIMEOUTS if timeouts else b"")


def _one_command(
    known: list[Opcode], option: int, wanted: int, action: int, timeouts: bool
) -> bytes:
    """Option 1 is for opcodes without service actions, 2 for those with, 3 for either."""
    same = [each for each in known if each.code == wanted]
    has_actions = any(each.action is not None for each in same)
    if same and option == 1 and has_actions:
        raise invalid_field(2, 2)
    if same and option == 2 and not has_actions:
        raise invalid_field(2, 2)
    if option != 1:
        same = [each for each in same if (each.action or 0) == action]
    if not same:
        return struct.pack(">BBH", 0, 0x01, 0)  # not supported
    supported = 0x03 | timeouts << 7
    usage = same[0].usage
    data = struct.pack(">BBH", 0, supported, len(usage)) + usage
    return data + (_TIMEOUTS if timeouts else b"")


def report_functions(command: Command) -> None:
    """REPORT SUPPORTED TASK MANAGEMENT FUNCTIONS."""
    allocated = int.from_bytes(command.cdb[6:10])
    if allocated < 4:
        raise invalid_field(6)
    # ABORT TASK, ABORT TASK SET, CLEAR TASK SET, LOGICAL UNIT RESET, QUERY TASK
    # and QUERY TASK SET, I_T NEXUS RESET
    data = bytes((0xDC, 0x03, 0, 0))
    if command.cdb[2] & 0x80:  # REPD: no timeouts
        data = data[:3] + bytes((12,)) + bytes(12)
    command.answer(data, allocated)
