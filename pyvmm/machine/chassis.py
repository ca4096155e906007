"""The part of a machine that only the kernel works on: the KVM VM and its RAM."""

from __future__ import annotations

import threading
from contextlib import ExitStack

from pyvmm import layout
from pyvmm.machine.memory import GuestMemory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.config import VmConfig
    from pyvmm.kvm.handles import Kvm


class Chassis:
    """A VM with RAM, interrupt controllers and timer, but no vCPUs and no devices.

    Memory slots and interrupt controllers make the kernel wait for grace periods, milliseconds in
    which Python can do something else: `VM` builds this on a thread of its own.

    `memory` is that of a machine that wakes up. It is closed with the chassis unless `keep_memory`.
    Raises UsageError, KvmError.
    """

    def __init__(self, kvm: Kvm, config: VmConfig, memory: GuestMemory | None = None) -> None:
        self.keep_memory = False
        with ExitStack() as stack:
            self.memory = memory or GuestMemory(config.memory, hugepages=config.hugepages)
            stack.callback(self._close_memory)
            self.vm = stack.enter_context(kvm.create_vm())
            self.vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
            self.vm.set_tss_addr(layout.KVM_TSS)
            self.vm.create_irqchip()
            self.vm.create_pit2()
            for slot, region in enumerate(self.memory.regions):
                self.vm.set_user_memory_region(slot, region.gpa, region.size, region.hva)
            self.close = stack.pop_all().close

    def _close_memory(self) -> None:
        if not self.keep_memory:
            self.memory.close()


class ChassisBuilder:
    """Builds a chassis on a thread, from now on; either `take` or `discard` has to follow."""

    def __init__(self, kvm: Kvm, config: VmConfig, memory: GuestMemory | None = None) -> None:
        self._chassis: Chassis | None = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(
            target=self._build, args=(kvm, config, memory), name="chassis", daemon=True
        )
        self._thread.start()

    def take(self) -> Chassis:
        """The chassis, now the caller's to close. Raises what building it raised."""
        self._thread.join()
        if self._error is not None:
            raise self._error
        chassis, self._chassis = self._chassis, None
        assert chassis is not None
        return chassis

    def discard(self) -> None:
        """Closes the chassis unless it was taken; idempotent."""
        self._thread.join()
        if self._chassis is not None:
            self._chassis.close()
            self._chassis = None

    def _build(self, kvm: Kvm, config: VmConfig, memory: GuestMemory | None) -> None:
        try:
            self._chassis = Chassis(kvm, config, memory)
        except BaseException as error:
            self._error = error
