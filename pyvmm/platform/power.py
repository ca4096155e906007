"""Power-off, reset and the power button: the ACPI fixed hardware that boot/acpi.py describes.

Sources: ACPI 6.5, 4.8.3 (PM1 registers) and 4.8.3.6 (reset register); Intel 8042 command 0xFE.
"""

from __future__ import annotations

import threading

from pyvmm import layout

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# PM1 status and enable bits, PM1 control bits.
PWRBTN = 1 << 8
SCI_EN = 1 << 0
SLP_TYP_SHIFT = 10
SLP_TYP_MASK = 7 << SLP_TYP_SHIFT
SLP_EN = 1 << 13

# The keyboard controller: a command that pulses the reset line, and a status (data that never ends,
# ready for commands) which makes a driver that looks for a keyboard give up at once.
I8042_PULSE_RESET = 0xFE
I8042_STATUS = 0x01


class Pm1Events:
    """PM1 event block: two bytes of status (a written 1 clears), two bytes of enable.

    `set_sci` drives the level of the system control interrupt.
    """

    SIZE = 4

    def __init__(self, set_sci: Callable[[bool], None]) -> None:
        self._set_sci = set_sci
        self._lock = threading.Lock()
        self._status = 0
        self._enable = 0

    def press_power_button(self) -> None:
        """Asks the guest to shut down."""
        with self._lock:
            self._status |= PWRBTN
            self._update()

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            registers = self._status.to_bytes(2, "little") + self._enable.to_bytes(2, "little")
        return registers[offset : offset + length].ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            for address, byte in enumerate(data, offset):
                shift = 8 * (address & 1)
                if address < 2:
                    self._status &= ~(byte << shift)
                else:
                    self._enable = self._enable & ~(0xFF << shift) | byte << shift
            self._update()

    def _update(self) -> None:
        self._set_sci(bool(self._status & self._enable))


class Pm1Control:
    """PM1 control block: a write of SLP_EN with the SLP_TYP of S5 turns the machine off."""

    SIZE = 2

    def __init__(self, on_poweroff: Callable[[], None]) -> None:
        self._on_poweroff = on_poweroff
        self._value = 0

    def read(self, offset: int, length: int) -> bytes:
        # There is no SMI that would hand the registers over: ACPI mode is always on.
        value = (self._value | SCI_EN).to_bytes(2, "little")
        return value[offset : offset + length].ljust(length, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        value = self._value
        for address, byte in enumerate(data, offset):
            shift = 8 * address
            value = value & ~(0xFF << shift) | byte << shift
        self._value = value & 0xFFFF & ~SLP_EN  # SLP_EN reads as zero
        if value & SLP_EN and (value & SLP_TYP_MASK) >> SLP_TYP_SHIFT == layout.ACPI_S5_SLEEP_TYPE:
            self._on_poweroff()


class ResetPort:
    """An I/O port that resets the machine when `value` is written to it; it reads as `status`."""

    SIZE = 1

    def __init__(self, value: int, on_reset: Callable[[], None], status: int = 0) -> None:
        self._value = value
        self._on_reset = on_reset
        self._status = status

    def read(self, offset: int, length: int) -> bytes:
        return bytes([self._status])

    def write(self, offset: int, data: bytes) -> None:
        if data[0] == self._value:
            self._on_reset()
