"""pvpanic: one port through which the guest kernel says that it panicked.

Source: Linux include/uapi/misc/pvpanic.h and drivers/misc/pvpanic.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

PANICKED = 1 << 0


class PvPanic:
    """Reads as the events the host understands; a write reports one."""

    SIZE = 1

    def __init__(self, on_panic: Callable[[], None]) -> None:
        self._on_panic = on_panic

    def read(self, offset: int, length: int) -> bytes:
        return bytes([PANICKED]) * length

    def write(self, offset: int, data: bytes) -> None:
        if data[0] & PANICKED:
            self._on_panic()
