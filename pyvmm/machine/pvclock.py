"""kvmclock, the guest's clock, while the guest does not run.

Sources: Linux, Documentation/virt/kvm/api.rst (KVM_GET_CLOCK, KVM_SET_CLOCK, KVM_KVMCLOCK_CTRL) and
Documentation/virt/kvm/x86/msr.rst (MSR_KVM_SYSTEM_TIME_NEW).

All that a guest with kvmclock knows of time comes from this one count of nanoseconds: its monotonic
clock directly, its wall clock as the host's time when the count was 0, which KVM works out whenever
the guest asks.
"""

from __future__ import annotations

import errno
import time

from pyvmm.errors import KvmError
from pyvmm.kvm import _generated_uapi as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.kvm.handles import Vcpu, Vm


class StoppedClock:
    """What the clock of a VM showed, in nanoseconds, and the host's time then, since 1970."""

    __slots__ = ("clock", "realtime")

    def __init__(self, vm: Vm) -> None:
        data = vm.get_clock()
        self.clock = data.clock
        # KVM reads both at once, where the host's own clock is the TSC.
        paired = data.flags & uapi.KVM_CLOCK_REALTIME
        self.realtime = data.realtime if paired else time.time_ns()

    def start(self, vm: Vm, *, catch_up: bool) -> None:
        """Has the clock of `vm` go on from there; with `catch_up`, from there and the time that
        has passed since then.
        """
        data = uapi.kvm_clock_data(clock=self.clock)
        if catch_up:
            if vm.check_extension(uapi.KVM_CAP_ADJUST_CLOCK) & uapi.KVM_CLOCK_REALTIME:
                data.flags, data.realtime = uapi.KVM_CLOCK_REALTIME, self.realtime
            else:
                data.clock += max(0, time.time_ns() - self.realtime)
        vm.set_clock(data)


def tell_paused(vcpus: Iterable[Vcpu]) -> None:
    """Tells the guest that it was paused, so that its watchdogs keep quiet."""
    for vcpu in vcpus:
        try:
            vcpu.kvmclock_ctrl()
        except KvmError as error:
            if error.errno != errno.EINVAL:  # this vCPU does not use kvmclock (yet)
                raise
