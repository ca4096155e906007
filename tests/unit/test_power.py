"""ACPI fixed hardware and the reset port (ACPI 6.5, 4.8.3)."""

from __future__ import annotations

from pyvmm.layout import ACPI_S5_SLEEP_TYPE
from pyvmm.platform.power import PWRBTN, SLP_EN, Pm1Control, Pm1Events, ResetPort
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


def test_only_sleep_enable_with_the_type_of_s5_turns_off() -> None:
    calls: list[str] = []
    control = Pm1Control(lambda: calls.append("off"))
    control.write(0, (ACPI_S5_SLEEP_TYPE << 10).to_bytes(2, "little"))
    control.write(0, (SLP_EN | 1 << 10).to_bytes(2, "little"))
    assert not calls
    control.write(0, (SLP_EN | ACPI_S5_SLEEP_TYPE << 10).to_bytes(2, "little"))
    assert calls == ["off"]
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
