"""The CMOS real-time clock, an MC146818, with its 128 bytes of memory.

Sources: Motorola MC146818 data sheet; ACPI 6.5, 4.8.2.4 (alarm, century); what drives it is Linux
drivers/rtc/rtc-cmos.c. Periodic interrupts, the square wave and daylight saving are missing: Linux
makes the first with a timer and does not use the others.

It shows the host's UTC until the guest sets it; from then on the difference is kept, and the host's
own clock is never touched.
"""

from __future__ import annotations

import threading
import time

from pyvmm.layout import CMOS_CENTURY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

CMOS_SIZE = 128

SECONDS, SECONDS_ALARM, MINUTES, MINUTES_ALARM, HOURS, HOURS_ALARM = range(6)
WEEKDAY, DAY, MONTH, YEAR, REG_A, REG_B, REG_C, REG_D = range(6, 14)
_TIME = (SECONDS, MINUTES, HOURS, WEEKDAY, DAY, MONTH, YEAR, CMOS_CENTURY)
_ALARM = (SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM)

A_UPDATE_IN_PROGRESS = 1 << 7
A_DIVIDER_RESET = 0b11 << 5  # both bits: the clock stands, and ticks half a second after it goes on
A_32768_HZ = 0b010 << 4
A_RATE_1024_HZ = 0b0110
B_SET = 1 << 7  # the registers of the time are the guest's, and do not change
B_ALARM_INTERRUPT = 1 << 5
B_UPDATE_INTERRUPT = 1 << 4
B_BINARY = 1 << 2
B_24_HOURS = 1 << 1
C_INTERRUPT = 1 << 7
C_ALARM = 1 << 5  # in the places of their enabling bits in register B
C_UPDATE = 1 << 4
D_VALID = 1 << 7  # the battery is good
_ENABLES = B_ALARM_INTERRUPT | B_UPDATE_INTERRUPT
_AFTERNOON = 1 << 7  # of the hours, where they are 12
_ANY = 0xC0  # both bits in a field of the alarm: it always matches

SECOND = 10**9
_DAY = 86400
# The update takes 1984 us and is announced 244 us before.
UPDATE = (1984 + 244) * 1000


def _nobody(level: bool) -> None:
    """Stands for the interrupt line of a clock that is plugged in nowhere."""


class Rtc:
    """The index and the data port, on vCPU threads, and `tick`, on another.

    `now` tells the host's time in nanoseconds since 1970. `due` is when (by the same clock) `tick`
    has to be called for the next interrupt, None for never; `on_due` is called when it has changed.
    """

    SIZE = 2

    def __init__(self, on_due: Callable[[], None], now: Callable[[], int] = time.time_ns) -> None:
        self.due: int | None = None
        self._on_due = on_due
        self._now = now
        self._set_irq: Callable[[bool], None] = _nobody
        self._level = False  # of the interrupt line
        self._lock = threading.RLock()
        self._index = 0
        self._offset = 0  # what the guest's time is ahead of the host's, in nanoseconds
        self._cells = bytearray(CMOS_SIZE)
        self._cells[REG_A] = A_32768_HZ | A_RATE_1024_HZ
        self._cells[REG_B] = B_24_HOURS
        self._cells[REG_D] = D_VALID
        self._seen = self._time() // SECOND  # the last second that flags were set for

    def connect(self, set_irq: Callable[[bool], None] | None) -> None:
        """What drives the interrupt line, which is low there, from now on; None for nothing.

        The one before is not called any more when this returns.
        """
        with self._lock:
            self._set_irq = set_irq or _nobody
            if self._level:
                self._set_irq(True)

    def reset(self) -> None:
        """The reset line: interrupts are off, all else is kept by the battery."""
        with self._lock:
            self._index = 0
            self._cells[REG_B] &= ~_ENABLES
            self._cells[REG_C] = 0
            self._update()

    def tick(self) -> None:
        """It may be time for an interrupt."""
        with self._lock:
            self._update()

    def read(self, offset: int, length: int) -> bytes:
        with self._lock:
            values = bytes((0xFF, self._read() if offset <= 1 < offset + length else 0xFF))
        return values[offset : offset + length].ljust(length, b"\xff")

    def write(self, offset: int, data: bytes) -> None:
        with self._lock:
            for port, byte in enumerate(data, offset):
                if port == 0:
                    self._index = byte % CMOS_SIZE  # the highest bit masks NMIs, which are not
                else:
                    self._write(byte)

    # Registers

    def _read(self) -> int:
        self._update()
        value = self._cells[self._index]
        if self._index == REG_A:
            announced = self._runs() and self._time() % SECOND >= SECOND - UPDATE
            value |= A_UPDATE_IN_PROGRESS if announced else 0
        elif self._index == REG_C:
            self._cells[REG_C] = 0
            self._update()
        return value

    def _write(self, value: int) -> None:
        self._update()
        index = self._index
        if index in (REG_C, REG_D):
            return
        ran, phase = self._runs(), self._time() % SECOND
        if index == REG_A:
            value &= ~A_UPDATE_IN_PROGRESS
            if self._resets_divider() and value & A_DIVIDER_RESET != A_DIVIDER_RESET:
                self._offset += SECOND // 2 - phase
                phase = SECOND // 2
        elif index == REG_B and value & B_SET:
            value &= ~B_UPDATE_INTERRUPT
        self._cells[index] = value
        if self._runs() and (not ran or index in _TIME):
            self._set_time(_seconds(self._cells) * SECOND + phase)
        self._update()

    def _runs(self) -> bool:
        return not self._cells[REG_B] & B_SET and not self._resets_divider()

    def _resets_divider(self) -> bool:
        return self._cells[REG_A] & A_DIVIDER_RESET == A_DIVIDER_RESET

    # Time

    def _time(self) -> int:
        """The guest's time, in nanoseconds since 1970, while it runs."""
        return self._now() + self._offset

    def _set_time(self, value: int) -> None:
        self._offset = value - self._now()
        self._seen = value // SECOND

    def _update(self) -> None:
        """Brings registers, interrupt line and `due` up to date."""
        cells = self._cells
        if self._runs():
            second = self._time() // SECOND
            if second > self._seen:
                alarm = self._next_alarm(self._seen)
                cells[REG_C] |= C_UPDATE
                cells[REG_C] |= C_ALARM if alarm is not None and alarm <= second else 0
            self._seen = second  # the host's clock may have gone back
            _show_seconds(cells, second)
        level = bool(cells[REG_C] & cells[REG_B] & _ENABLES)
        cells[REG_C] = cells[REG_C] & ~C_INTERRUPT | (C_INTERRUPT if level else 0)
        if level != self._level:
            self._level = level
            self._set_irq(level)
        due = None if level else self._next_interrupt()
        if due != self.due:
            self.due = due
            self._on_due()

    def _next_interrupt(self) -> int | None:
        """When, by the host's clock, the next interrupt is to be expected."""
        enabled = self._cells[REG_B]
        if not self._runs() or not enabled & _ENABLES:
            return None
        second = self._seen + 1
        if not enabled & B_UPDATE_INTERRUPT:
            alarm = self._next_alarm(self._seen)
            if alarm is None:
                return None
            second = alarm
        return second * SECOND - self._offset

    def _next_alarm(self, after: int) -> int | None:
        """The first second after that one at which the alarm matches; None if it never does."""
        seconds, minutes, hours = (
            None if self._cells[index] & _ANY == _ANY else self._decoded(index) for index in _ALARM
        )
        second = after + 1
        while second <= after + _DAY:
            if hours not in (None, second // 3600 % 24):
                second += 3600 - second % 3600
            elif minutes not in (None, second // 60 % 60):
                second += 60 - second % 60
            elif seconds not in (None, second % 60):
                second += 1
            else:
                return second
        return None

    def _decoded(self, index: int) -> int:
        return _decode(self._cells, index, is_hour=index == HOURS_ALARM)


def _decode(cells: bytearray, index: int, *, is_hour: bool = False) -> int:
    """The number in a register: binary or BCD, and the hours in 0 to 23."""
    value, twelve = cells[index], is_hour and not cells[REG_B] & B_24_HOURS
    afternoon = twelve and value & _AFTERNOON
    if twelve:
        value &= ~_AFTERNOON
    if not cells[REG_B] & B_BINARY:
        value = (value >> 4) * 10 + (value & 0xF)
    return value % 12 + (12 if afternoon else 0) if twelve else value


def _encode(cells: bytearray, index: int, value: int) -> None:
    afternoon = 0
    if index == HOURS and not cells[REG_B] & B_24_HOURS:
        afternoon = _AFTERNOON if value >= 12 else 0
        value = value % 12 or 12
    if not cells[REG_B] & B_BINARY:
        value = value // 10 << 4 | value % 10
    cells[index] = value | afternoon


def _show_seconds(cells: bytearray, seconds: int) -> None:
    """Puts a time (in seconds since 1970) into the registers."""
    year, month, day, hour, minute, second, weekday = time.gmtime(seconds)[:7]
    for index, value in (
        (SECONDS, second),
        (MINUTES, minute),
        (HOURS, hour),
        (WEEKDAY, (weekday + 1) % 7 + 1),  # Sunday is 1
        (DAY, day),
        (MONTH, month),
        (YEAR, year % 100),
        (CMOS_CENTURY, year // 100 % 100),
    ):
        _encode(cells, index, value)


def _seconds(cells: bytearray) -> int:
    """The time in the registers, in seconds since 1970; what makes no sense is carried over."""
    year = _decode(cells, CMOS_CENTURY) * 100 + _decode(cells, YEAR)
    months = year * 12 + _decode(cells, MONTH) - 1
    year, month = months // 12, months % 12 + 1
    # Days from March 1st of the year 0 in the Gregorian calendar, in which years begin there.
    shifted = year - (month < 3)
    days = shifted * 365 + shifted // 4 - shifted // 100 + shifted // 400
    days += ((month + 9) % 12 * 153 + 2) // 5 + _decode(cells, DAY) - 1
    clock = (
        _decode(cells, HOURS, is_hour=True) * 3600
        + _decode(cells, MINUTES) * 60
        + _decode(cells, SECONDS)
    )
    return (days - 719468) * _DAY + clock
