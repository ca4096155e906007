"""ACPI fixed hardware and the reset port (ACPI 6.5, 4.8.3)."""

from __future__ import annotations

from pyvmm.layout import ACPI_S3_SLEEP_TYPE, ACPI_S5_SLEEP_TYPE
from pyvmm.platform.power import PWRBTN, RTC, SLP_EN, WAK, Pm1Control, Pm1Events, ResetPort
from pyvmm.platform.pvpanic import PANICKED, PvPanic


def test_power_button_raises_the_sci_until_its_status_is_cleared() -> None:
    levels: list[bool] = []
    events = Pm1Events(levels.append)
    events.write(2, PWRBTN.to_bytes(2, "little"))
    assert not levels[-1]
    events.press_power_button()
    assert levels[-1]
    assert events.read(0, 2) == PWRBTN.to_bytes(2, "little")
    events.write(0, PWRBTN.to_bytes(2, "little"))
    assert not levels[-1]
    assert events.read(0, 4) == b"\0\0" + PWRBTN.to_bytes(2, "little")


def test_a_button_that_is_not_enabled_raises_nothing() -> None:
    levels: list[bool] = []
    events = Pm1Events(levels.append)
    events.press_power_button()
    assert not any(levels)
    events.write(3, b"\x01")  # the high byte of the enable register alone
    assert levels[-1]


class TestSleep:
    def setup_method(self) -> None:
        self.wakes: list[str] = []
        self.levels: list[bool] = []
        self.events = Pm1Events(self.levels.append)

    def sleep(self) -> None:
        self.levels.clear()
        self.events.sleep(lambda: self.wakes.append("wake"))

    def test_the_power_button_wakes_once_and_is_seen_afterwards(self) -> None:
        self.sleep()
        assert not self.wakes
        self.events.press_power_button()
        self.events.press_power_button()
        assert self.wakes == ["wake"]
        assert not self.levels, "the interrupt controller is off"
        self.events.wake(self.levels.append)
        assert self.events.read(0, 2) == (WAK | PWRBTN).to_bytes(2, "little")
        assert self.levels == [False], "the button is not enabled"

    def test_the_alarm_wakes_where_it_is_enabled(self) -> None:
        self.sleep()
        self.events.rtc_alarm()
        assert not self.wakes
        self.events.write(0, b"\xff\xff")
        self.events.write(2, RTC.to_bytes(2, "little"))
        self.events.rtc_alarm()
        assert self.wakes == ["wake"]
        self.events.wake(self.levels.append)
        assert self.levels == [True]

    def test_what_is_pending_wakes_at_once(self) -> None:
        self.events.press_power_button()
        self.sleep()
        assert self.wakes == ["wake"]


def test_sleep_enable_does_what_its_type_says() -> None:
    calls: list[str] = []
    types = {
        ACPI_S3_SLEEP_TYPE: lambda: calls.append("sleep"),
        ACPI_S5_SLEEP_TYPE: lambda: calls.append("off"),
    }
    control = Pm1Control(types)
    for value in (ACPI_S5_SLEEP_TYPE << 10, SLP_EN | 2 << 10):
        control.write(0, value.to_bytes(2, "little"))
    assert not calls
    for kind in types:
        control.write(0, (SLP_EN | kind << 10).to_bytes(2, "little"))
    assert calls == ["sleep", "off"]
    assert control.read(0, 2)[0] & 1, "SCI_EN: ACPI mode is on"
    assert not control.read(0, 2)[1] & SLP_EN >> 8


def test_reset_port_reacts_to_its_value_only() -> None:
    calls: list[str] = []
    port = ResetPort(0x06, lambda: calls.append("reset"), status=0x01)
    assert port.read(0, 1) == b"\x01"
    port.write(0, b"\x02")
    assert not calls
    port.write(0, b"\x06")
    assert calls == ["reset"]


def test_pvpanic_reports_a_panic() -> None:
    calls: list[str] = []
    device = PvPanic(lambda: calls.append("panic"))
    assert device.read(0, 1)[0] == PANICKED
    device.write(0, b"\x02")
    assert not calls
    device.write(0, b"\x01")
    assert calls == ["panic"]
