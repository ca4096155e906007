"""The guest's clock across a pause, on hosts old and new."""

from __future__ import annotations

import errno
import time
from typing import Any

import pytest

from pyvmm.errors import KvmError
from pyvmm.kvm import _generated_uapi as uapi
from pyvmm.machine.pvclock import StoppedClock, tell_paused

SECOND = 10**9


class FakeVm:
    """A VM whose clock shows 5 s, on a host that knows the `flags` of KVM_CAP_ADJUST_CLOCK."""

    def __init__(self, flags: int, realtime: int = 0) -> None:
        self._flags = flags
        self._realtime = realtime
        self.clocks: list[Any] = []

    def check_extension(self, capability: int) -> int:
        assert capability == uapi.KVM_CAP_ADJUST_CLOCK
        return self._flags

    def get_clock(self) -> Any:
        flags = self._flags if self._realtime else 0
        return uapi.kvm_clock_data(clock=5 * SECOND, flags=flags, realtime=self._realtime)

    def set_clock(self, data: Any) -> None:
        self.clocks.append((data.clock, data.flags, data.realtime))


ALL = uapi.KVM_CLOCK_TSC_STABLE | uapi.KVM_CLOCK_REALTIME | uapi.KVM_CLOCK_HOST_TSC


def test_the_clock_goes_on_from_where_it_stood() -> None:
    vm: Any = FakeVm(ALL, realtime=1000 * SECOND)
    StoppedClock(vm).start(vm, catch_up=False)
    assert vm.clocks == [(5 * SECOND, 0, 0)]


def test_kvm_adds_what_has_passed() -> None:
    vm: Any = FakeVm(ALL, realtime=1000 * SECOND)
    StoppedClock(vm).start(vm, catch_up=True)
    assert vm.clocks == [(5 * SECOND, uapi.KVM_CLOCK_REALTIME, 1000 * SECOND)]


def test_kvm_that_has_no_host_time_of_its_own_is_told_one() -> None:
    vm: Any = FakeVm(ALL)
    before = time.time_ns()
    StoppedClock(vm).start(vm, catch_up=True)
    [(clock, flags, realtime)] = vm.clocks
    assert (clock, flags) == (5 * SECOND, uapi.KVM_CLOCK_REALTIME)
    assert before <= realtime <= time.time_ns()


def test_a_host_before_linux_5_16(monkeypatch: pytest.MonkeyPatch) -> None:
    vm: Any = FakeVm(uapi.KVM_CLOCK_TSC_STABLE)
    times = iter((1000 * SECOND, 1060 * SECOND, 900 * SECOND))
    monkeypatch.setattr(time, "time_ns", lambda: next(times))
    stopped = StoppedClock(vm)
    for _ in range(2):
        stopped.start(vm, catch_up=True)
    assert vm.clocks == [(65 * SECOND, 0, 0), (5 * SECOND, 0, 0)], "it never goes back"


def test_vcpus_without_kvmclock_are_told_nothing() -> None:
    class Vcpu:
        def __init__(self, error: int) -> None:
            self.error = error

        def kvmclock_ctrl(self) -> None:
            if self.error:
                raise KvmError("KVM_KVMCLOCK_CTRL failed", self.error)

    fine: list[Any] = [Vcpu(0), Vcpu(errno.EINVAL), Vcpu(0)]
    tell_paused(fine)
    with pytest.raises(KvmError):
        tell_paused([*fine, Vcpu(errno.EBADF)])
