"""Port and MMIO accesses: what C answers, what Python answers, and what nobody does."""

from __future__ import annotations

import errno

from pyvmm._core import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Protocol

    class IoDevice(Protocol):
        """A device whose registers are answered in Python, on the vCPU's thread."""

        def read(self, offset: int, length: int) -> bytes:
            """`length` bytes (1, 2, 4 or 8) of the register at `offset`."""

        def write(self, offset: int, data: bytes) -> None:
            """The guest wrote `data` to the register at `offset`."""


class Bus:
    """One address space: I/O ports or MMIO.

    `native` is the ``struct io_bus *`` of the vCPU loops. Frozen while vCPUs run.
    """

    def __init__(self) -> None:
        self.native = ffi.new("struct io_bus *")
        self._ranges: list[Any] = []
        self._devices: list[tuple[int, int, IoDevice]] = []

    def add_native(self, io_range: Any) -> None:
        """A range that C answers (a ``struct io_range *``, kept alive by the caller)."""
        result = lib.io_bus_add(self.native, io_range)
        if result == -errno.EEXIST:
            raise ValueError(f"the I/O range at {io_range.base:#x} overlaps another")
        if result:
            raise ValueError("too many I/O ranges")

    def add(self, base: int, size: int, device: IoDevice) -> None:
        """A range that a Python device answers alone."""
        io_range = ffi.new("struct io_range *", {"base": base, "size": size})
        self.add_native(io_range)
        self._ranges.append(io_range)
        self.add_fallback(base, size, device)

    def add_fallback(self, base: int, size: int, device: IoDevice) -> None:
        """The Python device for what the native range at `base` does not answer itself."""
        self._devices.append((base, size, device))

    def access(self, io: Any) -> None:
        """Serves a ``struct vcpu_io *`` that the vCPU loop handed to Python."""
        for base, size, device in self._devices:
            if base <= io.addr < base + size:
                data = ffi.buffer(io.data, io.len)
                if io.is_write:
                    device.write(io.addr - base, data[:])
                else:
                    data[:] = device.read(io.addr - base, io.len)
                return
        raise LookupError(f"no device at {io.addr:#x}")
