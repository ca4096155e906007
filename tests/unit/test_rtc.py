"""The CMOS real-time clock, against a calendar and a model of its ticks."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm.layout import CMOS_CENTURY
from pyvmm.platform.rtc import (
    A_DIVIDER_RESET,
    A_UPDATE_IN_PROGRESS,
    B_24_HOURS,
    B_ALARM_INTERRUPT,
    B_BINARY,
    B_SET,
    B_UPDATE_INTERRUPT,
    C_ALARM,
    C_INTERRUPT,
    C_UPDATE,
    CMOS_SIZE,
    DAY,
    HOURS,
    HOURS_ALARM,
    MINUTES,
    MINUTES_ALARM,
    MONTH,
    REG_A,
    REG_B,
    REG_C,
    REG_D,
    SECOND,
    SECONDS,
    SECONDS_ALARM,
    UPDATE,
    WEEKDAY,
    YEAR,
    Rtc,
)

START = datetime(2026, 11, 24, 13, 14, 15, tzinfo=UTC)
FORMATS = [0, B_BINARY, B_24_HOURS, B_BINARY | B_24_HOURS]
moments = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1)).map(
    lambda each: each.replace(tzinfo=UTC, microsecond=0)
)


class Clock:
    """An RTC, the host's time, which only tests change, and the driver of the registers."""

    def __init__(self, start: datetime = START, fraction: int = 0) -> None:
        self.host = int(start.timestamp()) * SECOND + fraction
        self.changes = 0
        self.levels: list[bool] = []
        self.rtc = Rtc(self._on_due, lambda: self.host)
        self.rtc.connect(self.levels.append)

    def _on_due(self) -> None:
        self.changes += 1

    def __getitem__(self, index: int) -> int:
        self.rtc.write(0, bytes([index]))
        return self.rtc.read(1, 1)[0]

    def __setitem__(self, index: int, value: int) -> None:
        self.rtc.write(0, bytes([index]))
        self.rtc.write(1, bytes([value]))

    def encode(self, value: int) -> int:
        return value if self[REG_B] & B_BINARY else value // 10 << 4 | value % 10

    def decode(self, value: int) -> int:
        return value if self[REG_B] & B_BINARY else (value >> 4) * 10 + (value & 15)

    def encode_hours(self, hours: int) -> int:
        if self[REG_B] & B_24_HOURS:
            return self.encode(hours)
        return self.encode(hours % 12 or 12) | (0x80 if hours >= 12 else 0)

    def decode_hours(self, value: int) -> int:
        if self[REG_B] & B_24_HOURS:
            return self.decode(value)
        return self.decode(value & 0x7F) % 12 + (12 if value & 0x80 else 0)

    @property
    def time(self) -> datetime:
        year = self.decode(self[CMOS_CENTURY]) * 100 + self.decode(self[YEAR])
        date = (year, self.decode(self[MONTH]), self.decode(self[DAY]))
        hours, rest = self.decode_hours(self[HOURS]), (MINUTES, SECONDS)
        return datetime(*date, hours, *(self.decode(self[each]) for each in rest), tzinfo=UTC)

    @time.setter
    def time(self, value: datetime) -> None:
        """As Linux does it: updates off and divider reset, then what was there before."""
        mode, rate = self[REG_B], self[REG_A]
        self[REG_B] = mode | B_SET
        self[REG_A] = rate | A_DIVIDER_RESET
        self[CMOS_CENTURY] = self.encode(value.year // 100)
        self[YEAR] = self.encode(value.year % 100)
        for index in (MONTH, DAY, MINUTES, SECONDS):
            names = {MONTH: "month", DAY: "day", MINUTES: "minute", SECONDS: "second"}
            self[index] = self.encode(getattr(value, names[index]))
        self[HOURS] = self.encode_hours(value.hour)
        self[REG_B] = mode
        self[REG_A] = rate

    def set_alarm(self, value: datetime, enable: int = B_ALARM_INTERRUPT) -> None:
        self[SECONDS_ALARM] = self.encode(value.second)
        self[MINUTES_ALARM] = self.encode(value.minute)
        self[HOURS_ALARM] = self.encode_hours(value.hour)
        self[REG_B] = self[REG_B] | enable

    def run(self, seconds: float) -> None:
        """Lets time pass, with a tick whenever one is due and at no other time."""
        end = self.host + int(seconds * SECOND)
        while (due := self.rtc.due) is not None and due <= end:
            self.host = max(self.host, due)
            self.rtc.tick()
        self.host = end


def test_a_pc_finds_what_it_expects() -> None:
    clock = Clock()
    assert clock[REG_B] == B_24_HOURS
    assert clock[REG_D] == 0x80
    assert clock[REG_A] == 0x26
    assert clock[CMOS_CENTURY] == 0x20
    assert [clock[index] for index in (YEAR, MONTH, DAY)] == [0x26, 0x11, 0x24]
    assert [clock[index] for index in (HOURS, MINUTES, SECONDS)] == [0x13, 0x14, 0x15]
    assert clock[WEEKDAY] == 3, "a Tuesday"
    assert clock.rtc.due is None
    assert clock.changes == 0


@given(moment=moments, mode=st.sampled_from(FORMATS), passed=st.integers(0, 10**9))
def test_time_is_the_hosts_in_every_format(moment: datetime, mode: int, passed: int) -> None:
    clock = Clock(moment)
    clock[REG_B] = mode
    assert clock.time == moment
    clock.host += passed * SECOND
    assert clock.time == moment + timedelta(seconds=passed)
    assert clock[WEEKDAY] == (clock.time.weekday() + 1) % 7 + 1


@given(moment=moments, mode=st.sampled_from(FORMATS), fraction=st.integers(0, SECOND - 1))
def test_a_time_that_is_set_goes_on_from_there(moment: datetime, mode: int, fraction: int) -> None:
    clock = Clock(fraction=fraction)
    host = clock.host
    clock[REG_B] = mode
    clock.time = moment
    assert clock.time == moment
    assert clock.host == host
    # The first second is half a one, as the divider was reset.
    clock.host += SECOND // 2 - 1
    assert clock.time == moment
    clock.host += 1
    assert clock.time == moment + timedelta(seconds=1)
    clock.host += 86400 * SECOND
    assert clock.time == moment + timedelta(days=1, seconds=1)


def test_time_stands_while_updates_are_off() -> None:
    clock = Clock(fraction=SECOND // 4)
    clock[REG_B] = B_24_HOURS | B_SET
    clock.host += 10 * SECOND
    assert clock.time == START
    clock[REG_B] = B_24_HOURS
    assert clock.time == START
    clock.host += 3 * SECOND // 4 - 1
    assert clock.time == START
    clock.host += 1
    assert clock.time == START + timedelta(seconds=1), "the phase was kept"


def test_a_register_can_be_set_while_the_clock_runs() -> None:
    clock = Clock(fraction=123)
    clock[HOURS] = 0x23
    assert clock.time == START.replace(hour=23)


def test_an_update_is_announced_before_the_time_changes() -> None:
    clock = Clock()
    assert not clock[REG_A] & A_UPDATE_IN_PROGRESS
    clock.host += SECOND - UPDATE - 1
    assert not clock[REG_A] & A_UPDATE_IN_PROGRESS
    clock.host += 1
    assert clock[REG_A] & A_UPDATE_IN_PROGRESS
    assert clock.time == START
    clock.host += UPDATE
    assert not clock[REG_A] & A_UPDATE_IN_PROGRESS
    assert clock.time == START + timedelta(seconds=1)
    clock.host += SECOND - 1
    clock[REG_B] = B_24_HOURS | B_SET
    assert not clock[REG_A] & A_UPDATE_IN_PROGRESS


@given(
    mode=st.sampled_from(FORMATS),
    ahead=st.integers(1, 86400),
    fraction=st.integers(0, SECOND - 1),
)
def test_the_alarm_interrupts_in_its_second(mode: int, ahead: int, fraction: int) -> None:
    clock = Clock(fraction=fraction)
    clock[REG_B] = mode
    alarm = START + timedelta(seconds=ahead)
    clock.set_alarm(alarm)
    assert clock.changes == 1
    assert clock.rtc.due == int(alarm.timestamp()) * SECOND
    clock.run(ahead - fraction / SECOND - 0.001)
    assert clock.levels == []
    clock.run(0.002)
    assert clock.levels == [True]
    assert clock.time == alarm
    assert clock.rtc.due is None, "nothing more before this one is seen"
    assert clock[REG_C] == C_INTERRUPT | C_ALARM | C_UPDATE
    assert clock.levels == [True, False]
    assert clock[REG_C] == 0
    clock.run(86400)
    assert clock.levels == [True, False, True], "and the next day again"


@pytest.mark.parametrize(
    ("fields", "seconds"),
    [
        ((0xFF, 0xFF, 0xFF), 1),
        ((0x30, 0xFF, 0xFF), 15),
        ((0x15, 0xFF, 0xFF), 60),
        ((0x00, 0x00, 0xC0), 45 * 60 + 45),
        ((0xFF, 0xFF, 0x14), 45 * 60 + 45),
        ((0xFF, 0x15, 0x13), 45),
        ((0x15, 0x14, 0x13), 86400),
    ],
)
def test_fields_of_the_alarm_that_are_any(fields: tuple[int, int, int], seconds: int) -> None:
    clock = Clock()
    for index, value in zip((SECONDS_ALARM, MINUTES_ALARM, HOURS_ALARM), fields, strict=True):
        clock[index] = value
    clock[REG_B] = B_24_HOURS | B_ALARM_INTERRUPT
    assert clock.rtc.due == clock.host + seconds * SECOND


@pytest.mark.parametrize("hours", [0x24, 0x3F, 0x99, 0xBF])
def test_an_alarm_at_no_time_of_the_day_never_comes(hours: int) -> None:
    clock = Clock()
    clock[HOURS_ALARM] = hours
    clock[REG_B] = B_24_HOURS | B_ALARM_INTERRUPT
    assert clock.rtc.due is None


def test_update_interrupts_come_each_second() -> None:
    clock = Clock()
    clock[REG_B] = B_24_HOURS | B_UPDATE_INTERRUPT
    for _ in range(3):
        clock.run(1)
        assert clock.levels.pop() is True
        assert clock[REG_C] & (C_INTERRUPT | C_UPDATE) == C_INTERRUPT | C_UPDATE
        assert clock.levels.pop() is False
    clock[REG_B] = B_24_HOURS | B_UPDATE_INTERRUPT | B_SET
    assert clock.rtc.due is None


def test_flags_are_set_without_interrupts() -> None:
    clock = Clock()
    clock.set_alarm(START + timedelta(seconds=5), enable=0)
    clock.host += 4 * SECOND
    assert clock[REG_C] == C_UPDATE
    clock.host += SECOND
    assert clock[REG_C] == C_UPDATE | C_ALARM
    assert clock.levels == []
    clock.host += SECOND
    assert clock[REG_C] == C_UPDATE


def test_setting_the_time_moves_the_alarm() -> None:
    clock = Clock()
    clock.set_alarm(START + timedelta(seconds=100))
    clock.time = START + timedelta(seconds=90)
    assert clock.rtc.due is not None
    assert clock.rtc.due - clock.host == 9 * SECOND + SECOND // 2
    clock.run(10)
    assert clock.levels == [True]


def test_a_host_whose_clock_goes_back_or_leaps() -> None:
    clock = Clock()
    clock.set_alarm(START + timedelta(seconds=100))
    clock.host -= 1000 * SECOND
    clock.rtc.tick()
    assert clock.time == START - timedelta(seconds=1000)
    assert clock.levels == []
    clock.host += 5000 * SECOND
    clock.rtc.tick()
    assert clock.levels == [True]


def test_a_reset_ends_interrupts_and_keeps_the_rest() -> None:
    clock = Clock()
    clock.time = START + timedelta(days=1000)
    clock[0x40] = 0x55
    clock.set_alarm(START + timedelta(seconds=1))
    clock.run(86400)
    assert clock.levels == [True]
    before = clock.time
    clock.rtc.connect(None)
    clock.rtc.reset()
    levels: list[bool] = []
    clock.rtc.connect(levels.append)
    clock.run(3 * 86400)
    assert levels == []
    assert clock.rtc.due is None
    assert clock.time == before + timedelta(days=3)
    assert clock[0x40] == 0x55


def test_an_interrupt_that_is_pending_is_seen_by_the_next_controller() -> None:
    clock = Clock()
    clock.set_alarm(START + timedelta(seconds=1))
    clock.rtc.connect(None)
    clock.run(2)
    levels: list[bool] = []
    clock.rtc.connect(levels.append)
    assert levels == [True]
    assert clock.levels == []


def test_memory_is_kept_and_the_index_port_is_write_only() -> None:
    clock = Clock()
    for index in set(range(14, CMOS_SIZE)) - {CMOS_CENTURY}:
        clock[index] = index ^ 0xAA
    for index in set(range(14, CMOS_SIZE)) - {CMOS_CENTURY}:
        assert clock[index | 0x80] == index ^ 0xAA, "the NMI bit is no part of the index"
    assert clock.rtc.read(0, 1) == b"\xff"
    clock.rtc.write(0, b"\x0e\x12")  # both ports with one access
    assert clock.rtc.read(0, 2) == b"\xff\x12"
    clock[REG_C] = 0xFF
    clock[REG_D] = 0
    assert (clock[REG_C], clock[REG_D]) == (0, 0x80)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 255), st.integers(0, 255), st.integers(-10 * SECOND, 86400 * SECOND)
        ),
        max_size=40,
    )
)
def test_no_guest_breaks_it(accesses: list[tuple[int, int, int]]) -> None:
    """Whatever is written whenever: registers can be read, ticks end, lines change at each call."""
    clock = Clock()
    for index, value, passed in accesses:
        clock[index] = value
        for each in range(CMOS_SIZE):
            assert 0 <= clock[each] <= 255
        clock.host = max(0, clock.host + passed)
        clock.rtc.tick()
        assert clock.rtc.due is None or clock.rtc.due > clock.host - SECOND
    assert all(one != other for one, other in zip(clock.levels, clock.levels[1:], strict=False))
