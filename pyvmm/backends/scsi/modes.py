"""Mode parameters: MODE SENSE and MODE SELECT over the pages of a logical unit (SPC-4, 6.11).

Nothing is saved: PS is 0 in every page, and the saved values do not exist.
"""

from __future__ import annotations

import struct

from pyvmm.backends.scsi.command import (
    PARAMETER_LIST_LENGTH_ERROR,
    SAVING_NOT_SUPPORTED,
    check_condition,
    invalid_field,
    invalid_parameter,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Protocol

    from pyvmm.backends.scsi.command import Command

    class ModePage(Protocol):
        """A page, its header included. `code` is its number; all values have one length."""

        code: int
        default: bytes
        changeable: bytes

        def current(self) -> bytes: ...
        def change(self, values: bytes) -> None: ...


MODE_SELECT_6, MODE_SENSE_6 = 0x15, 0x1A
MODE_SELECT_10, MODE_SENSE_10 = 0x55, 0x5A
ALL_PAGES = 0x3F
ALL_SUBPAGES = 0xFF
_CURRENT, _CHANGEABLE, _DEFAULT, _SAVED = range(4)
_LONGLBA = 0x01


def mode_sense(
    command: Command,
    pages: Mapping[int, ModePage],
    *,
    specific: int,
    blocks: int = 0,
    block_size: int = 0,
) -> None:
    """Answers MODE SENSE, of 6 or 10 bytes.

    `specific` is the device-specific parameter; a block descriptor tells of `blocks` blocks of
    `block_size` bytes, if that is not 0.
    """
    cdb = command.cdb
    short = cdb[0] == MODE_SENSE_6
    control, code, subpage = cdb[2] >> 6, cdb[2] & 0x3F, cdb[3]
    if control == _SAVED:
        raise check_condition(SAVING_NOT_SUPPORTED)
    if code != ALL_PAGES and code not in pages:
        raise invalid_field(2, 5)
    if subpage not in (0, ALL_SUBPAGES):
        raise invalid_field(3)
    wanted = sorted(pages) if code == ALL_PAGES else [code]
    body = b"".join(_values(pages[each], control) for each in wanted)

    long_lba = not short and cdb[1] & 0x10
    descriptor = b""
    if block_size and not cdb[1] & 0x08:
        if long_lba:
            descriptor = struct.pack(">QII", blocks, 0, block_size)
        else:
            descriptor = struct.pack(">II", min(blocks, 0xFFFFFFFF), block_size)
    if short:
        size = 3 + len(descriptor) + len(body)
        header = struct.pack(">BBBB", size, 0, specific, len(descriptor))
        allocated = cdb[4]
    else:
        size = 6 + len(descriptor) + len(body)
        flags = _LONGLBA if len(descriptor) == 16 else 0
        header = struct.pack(">HBBBBH", size, 0, specific, flags, 0, len(descriptor))
        allocated = int.from_bytes(cdb[7:9])
    command.answer(header + descriptor + body, allocated)


def _values(page: ModePage, control: int) -> bytes:
    if control == _CHANGEABLE:
        return page.changeable
    return page.default if control == _DEFAULT else page.current()


def mode_select(
    command: Command, pages: Mapping[int, ModePage], *, blocks: int = 0, block_size: int = 0
) -> None:
    """Executes MODE SELECT: all pages are checked before the first is changed."""
    cdb = command.cdb
    short = cdb[0] == MODE_SELECT_6
    if not cdb[1] & 0x10:
        raise invalid_field(1, 4)  # PF
    if cdb[1] & 0x01:
        raise invalid_field(1, 0)  # SP
    size = cdb[4] if short else int.from_bytes(cdb[7:9])
    data = command.parameters(size)
    if not data:
        return
    header = 4 if short else 8
    if len(data) < header:
        raise check_condition(PARAMETER_LIST_LENGTH_ERROR)
    if data[1 if short else 2]:
        raise invalid_parameter(1 if short else 2)  # MEDIUM TYPE
    length_at = 3 if short else 6
    length = data[3] if short else int.from_bytes(data[6:8])
    at = header + length
    if len(data) < at:
        raise check_condition(PARAMETER_LIST_LENGTH_ERROR)
    if length:
        long_lba = not short and bool(data[4] & _LONGLBA)
        if not block_size or length != (16 if long_lba else 8):
            raise invalid_parameter(length_at)
        _check_descriptor(data[header:at], header, long_lba, blocks, block_size)
    changes = []
    while at < len(data):
        page = pages.get(data[at] & 0x3F)
        if page is None or data[at] & 0x40:  # SPF
            raise invalid_parameter(at, 5 if page is None else 6)
        if at + 1 == len(data):
            raise check_condition(PARAMETER_LIST_LENGTH_ERROR)
        values = data[at : at + len(page.default)]
        if data[at + 1] != len(page.default) - 2:
            raise invalid_parameter(at + 1)
        if len(values) < len(page.default):
            raise check_condition(PARAMETER_LIST_LENGTH_ERROR)
        _check_page(page, values, at)
        changes.append((page, values))
        at += len(values)
    for page, values in changes:
        page.change(values)


def _check_descriptor(
    descriptor: bytes, at: int, long_lba: bool, blocks: int, block_size: int
) -> None:
    """The size of a disk cannot be changed; 0 and the largest number stand for what it is."""
    number, length = struct.unpack(">Q4xI" if long_lba else ">II", descriptor)
    largest = (1 << 64) - 1 if long_lba else 0xFFFFFFFF
    if number not in (0, largest, min(blocks, largest)):
        raise invalid_parameter(at)
    if length & 0xFFFFFF != block_size:
        raise invalid_parameter(at + 12 if long_lba else at + 5)


def _check_page(page: ModePage, values: bytes, at: int) -> None:
    for index, (new, old) in enumerate(zip(values[2:], page.current()[2:], strict=True), 2):
        fixed = (new ^ old) & ~page.changeable[index]
        if fixed:
            raise invalid_parameter(at + index, fixed.bit_length() - 1)
