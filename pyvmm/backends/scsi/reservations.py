"""Persistent reservations for the one I_T nexus there is (SPC-4, 5.13, 6.15 and 6.16).

An image has one writer, so nobody else can hold or lose anything; what a driver sees of it is what
it would see of a disk to which no other host is connected.
"""

from __future__ import annotations

import struct

from pyvmm.backends.scsi.command import (
    INVALID_RELEASE,
    PARAMETER_LIST_LENGTH_ERROR,
    check_condition,
    invalid_field,
    invalid_parameter,
    reservation_conflict,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.scsi.command import Command

_READ_KEYS, _READ_RESERVATION, _REPORT_CAPABILITIES, _READ_FULL_STATUS = range(4)
_REGISTER, _RESERVE, _RELEASE, _CLEAR, _PREEMPT, _PREEMPT_AND_ABORT, _REGISTER_AND_IGNORE = range(7)

_ALL_REGISTRANTS = (7, 8)
_TYPES = (1, 3, 5, 6, *_ALL_REGISTRANTS)
_LIST_SIZE = 24


class PersistentReservations:
    """The state: `key` is 0 without a registration, `kind` without a reservation."""

    def __init__(self) -> None:
        self.key = 0
        self.kind = 0
        self.generation = 0

    def read(self, command: Command) -> None:
        """PERSISTENT RESERVE IN."""
        action = command.cdb[1] & 0x1F
        if action == _REPORT_CAPABILITIES:
            compatible = 0x10  # CRH
            valid = 0x80  # TMV
            mask = sum(1 << (kind + 8 if kind < 8 else 0) for kind in _TYPES)
            data = struct.pack(">HBBHxx", 8, compatible, valid, mask)
        else:
            listed = b""
            if action == _READ_KEYS and self.key:
                listed = struct.pack(">Q", self.key)
            elif action == _READ_RESERVATION and self.kind:
                shared = self.kind in _ALL_REGISTRANTS
                listed = struct.pack(">Q5xBxx", 0 if shared else self.key, self.kind)
            elif action == _READ_FULL_STATUS and self.key:
                no_protocol = b"\x0f".ljust(24, b"\0")  # a TransportID of no protocol
                holder = 1 if self.kind else 0
                listed = struct.pack(">Q4xBB4xHI", self.key, holder, self.kind, 1, len(no_protocol))
                listed += no_protocol
            data = struct.pack(">II", self.generation, len(listed)) + listed
        command.answer(data, int.from_bytes(command.cdb[7:9]))

    def change(self, command: Command) -> None:
        """PERSISTENT RESERVE OUT."""
        action, scope, kind = command.cdb[1] & 0x1F, command.cdb[2] >> 4, command.cdb[2] & 0xF
        if int.from_bytes(command.cdb[5:9]) != _LIST_SIZE:
            raise check_condition(PARAMETER_LIST_LENGTH_ERROR)
        key, new_key, flags = struct.unpack(">QQ4xB3x", command.parameters(_LIST_SIZE))
        # SPEC_I_PT, ALL_TG_PT and APTPL are not supported; the other bits are reserved.
        if flags:
            raise invalid_parameter(20, flags.bit_length() - 1)
        if action == _REGISTER and key != self.key:
            raise reservation_conflict()
        if action in (_REGISTER, _REGISTER_AND_IGNORE):
            self._register(new_key)
            return
        if not self.key or key != self.key:
            raise reservation_conflict()
        if action == _CLEAR:
            self.key = self.kind = 0
            self.generation = _next(self.generation)
            return
        if scope:
            raise invalid_field(2, 7)
        if action == _RELEASE:
            if self.kind and kind != self.kind:
                raise check_condition(INVALID_RELEASE)
            self.kind = 0
            return
        if kind not in _TYPES:
            raise invalid_field(2, 3)
        if action == _RESERVE:
            if self.kind and kind != self.kind:
                raise reservation_conflict()
            self.kind = kind
        else:
            self._preempt(new_key, kind)

    def _register(self, new_key: int) -> None:
        if not self.key and not new_key:
            return
        self.key = new_key
        if not new_key:
            self.kind = 0
        self.generation = _next(self.generation)

    def _preempt(self, victim: int, kind: int) -> None:
        """PREEMPT and PREEMPT AND ABORT: there is nobody but oneself (5.13.11.2)."""
        if victim == 0 and self.kind not in _ALL_REGISTRANTS:
            raise invalid_parameter(8)
        if victim not in (0, self.key):
            raise reservation_conflict()
        if self.kind:
            self.kind = kind
        else:
            self.key = 0
        self.generation = _next(self.generation)


def _next(generation: int) -> int:
    return generation + 1 & 0xFFFFFFFF
