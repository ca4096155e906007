"""Which range answers a guest access."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from pyvmm._core import ffi, lib
from pyvmm.machine.bus import Bus


def make_range(base: int, size: int) -> Any:
    return ffi.new("struct io_range *", {"base": base, "size": size})


def access(bus: Any, addr: int, length: int) -> tuple[int, bytes]:
    data = ffi.new("uint8_t[8]")
    result = lib.io_bus_access(bus, addr, data, length, False)
    return result, bytes(ffi.buffer(data, length))


def test_only_accesses_wholly_inside_a_range_reach_it() -> None:
    bus = ffi.new("struct io_bus *")
    ranges = [make_range(0x100, 4), make_range(0x10, 8), make_range(0x104, 4)]
    for io_range in ranges:
        assert lib.io_bus_add(bus, io_range) == 0
    assert access(bus, 0x10, 8)[0] == lib.IO_PYTHON
    assert access(bus, 0x107, 1)[0] == lib.IO_PYTHON
    for addr, length in ((0x0F, 1), (0x17, 2), (0x102, 4), (0x108, 1), ((1 << 64) - 1, 8)):
        assert access(bus, addr, length) == (lib.IO_UNCLAIMED, b"\xff" * length)


def test_overlapping_ranges_are_refused() -> None:
    bus = ffi.new("struct io_bus *")
    first = make_range(0x100, 0x10)
    assert lib.io_bus_add(bus, first) == 0
    for base, size in ((0x100, 1), (0x10F, 1), (0xF8, 9), (0x80, 0x200)):
        assert lib.io_bus_add(bus, make_range(base, size)) == -errno.EEXIST
    assert bus.count == 1


def test_python_device_is_read_and_written_at_its_offset() -> None:
    class Device:
        def __init__(self) -> None:
            self.written: list[tuple[int, bytes]] = []

        def read(self, offset: int, length: int) -> bytes:
            return bytes([offset]) * length

        def write(self, offset: int, data: bytes) -> None:
            self.written.append((offset, data))

    bus = Bus()
    device = Device()
    bus.add(0x600, 4, device)
    data = ffi.new("uint8_t[2]", [7, 9])
    io = ffi.new("struct vcpu_io *", {"addr": 0x602, "len": 2, "data": data, "is_write": True})
    bus.access(io)
    assert device.written == [(2, b"\x07\x09")]
    io.is_write = False
    bus.access(io)
    assert bytes(data) == b"\x02\x02"
    with pytest.raises(ValueError, match="overlaps"):
        bus.add(0x603, 4, device)
