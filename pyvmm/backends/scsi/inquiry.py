"""INQUIRY data: the standard data and pages of vital product data (SPC-4, 6.6 and 7.8)."""

from __future__ import annotations

import struct

from pyvmm._core import ffi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

VENDOR = b"pyvmm"

# Version descriptors (SPC-4, 6.6.2), without a particular revision.
SAM_5 = 0x00A0
SPC_4 = 0x0460
SBC_3 = 0x04C0
MMC_6 = 0x04E0

_VERSION_SPC_4 = 0x06
_HISUP_FORMAT_2 = 0x12
_CMDQUE = 0x02

SUPPORTED_PAGES = 0x00
UNIT_SERIAL_NUMBER = 0x80
DEVICE_IDENTIFICATION = 0x83
BLOCK_LIMITS = 0xB0
BLOCK_DEVICE_CHARACTERISTICS = 0xB1
LOGICAL_BLOCK_PROVISIONING = 0xB2


def standard(
    device_type: int, product: str, versions: tuple[int, ...], *, removable: bool = False
) -> bytes:
    """Standard INQUIRY data of 96 bytes; `product` has at most 16 characters."""
    head = struct.pack(
        ">BBBBBBBB8s16s4s",
        device_type,
        removable << 7,
        _VERSION_SPC_4,
        _HISUP_FORMAT_2,
        96 - 5,
        0,
        0,
        _CMDQUE,
        VENDOR.ljust(8),
        product.encode("ascii").ljust(16),
        b"1".ljust(4),
    )
    descriptors = b"".join(struct.pack(">H", each) for each in versions)
    return head.ljust(58, b"\0") + descriptors.ljust(96 - 58, b"\0")


def page(device_type: int, code: int, payload: bytes) -> bytes:
    """A page of vital product data with its header."""
    return struct.pack(">BBH", device_type, code, len(payload)) + payload


def identification(serial: str) -> bytes:
    """Page 83h: the logical unit by vendor and serial number (SPC-4, 7.8.6)."""
    designator = VENDOR.ljust(8) + serial.encode("ascii")
    # ASCII; of the logical unit, T10 vendor ID based
    return struct.pack(">BBBB", 0x02, 0x01, 0, len(designator)) + designator


def block_limits(
    *,
    granularity: int,
    max_transfer: int,
    max_unmap: int,
    max_descriptors: int,
    unmap_granularity: int,
    max_write_same: int,
) -> bytes:
    """Block Limits, page B0h of SBC-3; all numbers but that of descriptors are logical blocks."""
    wsnz = 0x01
    return struct.pack(
        ">BBHIIIIIIIQ",
        wsnz,
        0,
        granularity,
        max_transfer,
        0,
        0,
        max_unmap,
        max_descriptors,
        unmap_granularity,
        1 << 31 if unmap_granularity else 0,  # UGAVALID: aligned to 0
        max_write_same,
    ).ljust(60, b"\0")


def block_device_characteristics() -> bytes:
    """Block Device Characteristics, page B1h of SBC-3: a medium that does not rotate."""
    return struct.pack(">H", 1).ljust(60, b"\0")


def logical_block_provisioning(*, unmap: bool, zeroed: bool) -> bytes:
    """Logical Block Provisioning, page B2h of SBC-3: LBPU, LBPWS, LBPWS10, LBPRZ; thin or full."""
    flags = (0xE0 | zeroed << 2) if unmap else 0
    thin = 2
    return struct.pack(">BBBB", 0, flags, thin if unmap else 0, 0)


def native_pages(pages: dict[int, bytes]) -> tuple[Any, Any]:
    """Pages by their code as ``struct scsi_page[]``, and what keeps their data alive."""
    data = [ffi.new("uint8_t[]", each) for each in pages.values()]
    entries = [
        {"code": code, "size": len(page), "data": each}
        for (code, page), each in zip(pages.items(), data, strict=True)
    ]
    return ffi.new("struct scsi_page[]", entries), data
