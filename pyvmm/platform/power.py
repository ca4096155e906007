"""Power-off, sleep, reset and the power button: the fixed hardware that boot/acpi.py describes.

Sources: ACPI 6.5, 4.8.3 (PM1 registers) and 4.8.3.6 (reset register), 16.1.3 (S3); Intel 8042
command 0xFE.
"""

from __future__ import annotations

import threading

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# PM1 status and enable bits, PM1 control bits.
PWRBTN = 1 << 8
RTC = 1 << 10
WAK = 1 << 15  # status only
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

    `set_sci` drives the level of the system control interrupt. In S3 the block stays powered, and
    an event wakes the machine instead: see `sleep` and `wake`.
    """

    SIZE = 4

    def __init__(self, set_sci: Callable[[bool], None]) -> None:
        self._set_sci = set_sci
        self._on_wake: Callable[[], None] | None = None
        self._lock = threading.Lock()
        self._status = 0
        self._enable = 0

    def press_power_button(self) -> None:
        """Asks the guest to shut down, or wakes it."""
        self._set_status(PWRBTN)

    def rtc_alarm(self) -> None:
        """The real-time clock interrupts."""
        self._set_status(RTC)

    def sleep(self, on_wake: Callable[[], None]) -> None:
        """From now on the next event is for `on_wake`, which is called once, on any thread.

        An event that the guest left pending wakes at once. The power button wakes always, others
        where they are enabled (4.8.3.1.1).
        """
        with self._lock:
            self._on_wake = on_wake
            self._update()

    def wake(self, set_sci: Callable[[bool], None]) -> None:
        """The machine runs again, with another interrupt controller."""
        with self._lock:
            self._on_wake = None
            self._status |= WAK
            self._set_sci = set_sci
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

    def _set_status(self, bits: int) -> None:
        with self._lock:
            self._status |= bits
            self._update()

    def _update(self) -> None:
        if self._on_wake is None:
            self._set_sci(bool(self._status & self._enable))
        elif self._status & (self._enable | PWRBTN):
            on_wake, self._on_wake, self._set_sci = self._on_wake, None, _no_sci
            on_wake()


def _no_sci(level: bool) -> None:
    """Stands for the interrupt controller of a machine that is being woken."""


class Pm1Control:
    """PM1 control block: a write of SLP_EN does what `sleep` has for the SLP_TYP that stands there.

    Other types do nothing.
    """

    SIZE = 2

    def __init__(self, sleep: Mapping[int, Callable[[], None]]) -> None:
        self._sleep = sleep
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
        action = self._sleep.get((value & SLP_TYP_MASK) >> SLP_TYP_SHIFT)
        if value & SLP_EN and action is not None:
            action()


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
