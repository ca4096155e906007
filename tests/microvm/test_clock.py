"""Pause and S3 as a guest of a few instructions sees them."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pyvmm.errors import ExitStatus
from pyvmm.guest.console import GuestConsole
from pyvmm.kvm import _generated_uapi as uapi
from pyvmm.machine.vm import VM

# Where guest-images/micro/sleeper.S has its clock, a struct pvclock_vcpu_time_info.
PVCLOCK = 0x4000
GUEST_STOPPED = 1 << 1
WAK, RTC, PWRBTN = 1 << 15, 1 << 10, 1 << 8

Boot = Callable[..., tuple[VM, GuestConsole]]


@pytest.fixture
def boot(boot_micro: Boot, sleeper_guest: Path) -> Boot:
    """The guest that sleeps."""
    return partial(boot_micro, sleeper_guest)


def await_state(vm: VM, state: str) -> None:
    deadline = time.monotonic() + 10
    while vm.state != state:
        assert time.monotonic() < deadline, f"{vm.state} instead of {state}"
        time.sleep(0.005)


def fall_asleep(vm: VM, console: GuestConsole, command: bytes = b"z") -> None:
    console.send(command)
    await_state(vm, "suspended")


def wake_status(console: GuestConsole, times: int) -> int:
    """PM1 status as the guest found it when it had woken up that many times."""
    console.expect(b"W%d" % times, timeout=10)
    status = b""
    while len(status) < 4:
        status += console.read(timeout=10)
    return int(status, 16)


def clock(vm: VM) -> int:
    assert vm._board is not None
    return int(vm._board.vm.get_clock().clock)


class TestPause:
    @pytest.mark.parametrize("catch_up", [False, True])
    def test_the_clock_stands_still_or_catches_up(self, boot: Boot, catch_up: bool) -> None:
        vm, _ = boot(catch_up=catch_up)
        vm.pause()
        vm.pause()
        before, started = clock(vm), time.monotonic_ns()
        time.sleep(0.5)
        vm.resume()
        vm.resume()
        passed, really = clock(vm) - before, time.monotonic_ns() - started
        if catch_up:
            assert abs(passed - really) < 100e6
        else:
            assert passed < 250e6

    def test_the_guest_is_told(self, boot: Boot) -> None:
        vm, console = boot(cpus=2)  # one of which has no kvmclock
        console.send(b"k")
        console.expect(b"k", timeout=10)
        board = vm._board
        assert board is not None
        # version, padding, TSC, system time, multiplier, shift, flags
        layout = struct.Struct("<IIQQIbB")

        def page() -> tuple[int, int, int]:
            """Version, multiplier and flags."""
            data = bytes(board.memory.view(PVCLOCK, layout.size))
            version, _, _, _, multiplier, _, flags = layout.unpack(data)
            return version, multiplier, flags

        version, multiplier, flags = page()
        assert version > 0
        assert multiplier > 0
        assert not flags & GUEST_STOPPED
        # Also one that executes nothing, as others may look at its page.
        console.send(b"h")
        handle = board.vcpus[0].handle
        vm.pause()
        while handle.get_mp_state() != uapi.KVM_MP_STATE_HALTED:
            vm.resume()
            time.sleep(0.01)
            vm.pause()
        before = page()
        vm.resume()
        version, _, flags = page()
        assert version > before[0]
        assert flags & GUEST_STOPPED
        vm.pause()
        assert handle.get_mp_state() == uapi.KVM_MP_STATE_HALTED


class TestSleep:
    def test_a_wake_keeps_memory_and_says_why(self, boot: Boot) -> None:
        vm, console = boot()
        for times in range(1, 4):
            fall_asleep(vm, console)
            assert console.read(timeout=0.02) == b""
            vm.wake()
            assert wake_status(console, times) == WAK | PWRBTN
            assert vm.state == "running"
        console.send(b"p")
        assert vm.wait(timeout=10).status == ExitStatus.OK

    def test_events_are_told_in_their_order(self, boot: Boot) -> None:
        vm, console = boot()
        names: list[str] = []
        vm.on_event(lambda event: names.append(event.name))
        fall_asleep(vm, console)
        vm.press_power_button()
        wake_status(console, 1)
        assert names == ["SUSPEND", "WAKEUP"]

    def test_two_vcpus_may_ask_for_it(self, boot: Boot) -> None:
        vm, console = boot()
        board = vm._board
        assert board is not None
        for _ in range(2):
            board._on_sleep()
        await_state(vm, "suspended")
        vm.wake()
        console.expect(b"> ", timeout=10)

    def test_a_wake_of_a_guest_that_does_not_sleep_does_nothing(self, boot: Boot) -> None:
        vm, console = boot()
        vm.wake()
        fall_asleep(vm, console)
        assert vm.state == "suspended"

    def test_the_alarm_wakes(self, boot: Boot) -> None:
        vm, console = boot()
        started = time.monotonic()
        fall_asleep(vm, console, b"a")
        assert wake_status(console, 1) == WAK | RTC
        assert time.monotonic() - started < 3

    def test_the_clock_goes_on_meanwhile(self, boot: Boot) -> None:
        vm, console = boot(cpus=2)
        before, started = clock(vm), time.monotonic_ns()
        fall_asleep(vm, console)
        time.sleep(0.3)
        vm.wake()
        wake_status(console, 1)
        assert abs(clock(vm) - before - (time.monotonic_ns() - started)) < 100e6

    def test_sleep_costs_no_time(self, boot: Boot) -> None:
        vm, console = boot()
        fall_asleep(vm, console)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.02

    def test_a_paused_machine_wakes_up_paused(self, boot: Boot) -> None:
        vm, console = boot()
        fall_asleep(vm, console)
        vm.pause()
        vm.wake()
        await_state(vm, "paused")
        assert console.read(timeout=0.1) == b""
        vm.resume()
        wake_status(console, 1)

    def test_no_way_back_is_a_reset(self, boot: Boot) -> None:
        vm, console = boot()
        names: list[str] = []
        vm.on_event(lambda event: names.append(event.name))
        fall_asleep(vm, console, b"n")
        vm.wake()
        console.expect(b"> ", timeout=10)
        console.send(b"p")
        assert vm.wait(timeout=10).status == ExitStatus.OK
        assert names == ["SUSPEND", "RESET", "SHUTDOWN"]

    def test_what_sleeps_can_be_ended_and_reset(self, boot: Boot) -> None:
        vm, console = boot()
        fall_asleep(vm, console)
        vm.reset()
        console.expect(b"> ", timeout=10)
        fall_asleep(vm, console)
        vm.stop()
        assert vm.outcome is not None
        assert vm.outcome.status == ExitStatus.OK

    def test_no_descriptor_and_no_memory_is_left_behind(self, boot: Boot) -> None:
        def held() -> tuple[int, int]:
            mappings = Path("/proc/self/maps").read_text().count("\n")
            return len(list(Path("/proc/self/fd").iterdir())), mappings

        vm, console = boot()
        fall_asleep(vm, console)
        vm.close()
        before = held()
        for _ in range(5):
            vm, console = boot()
            fall_asleep(vm, console)
            vm.wake()
            wake_status(console, 1)
            fall_asleep(vm, console)
            vm.close()
        after = held()
        assert after[0] == before[0]
        assert after[1] <= before[1] + 4
