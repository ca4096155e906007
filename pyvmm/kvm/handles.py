"""Kvm, Vm and Vcpu: the file descriptors of the KVM API, one thin method an ioctl.

Source: Documentation/virt/kvm/api.rst of the Linux kernel; method names are those of the ioctls,
structures those of ``linux/kvm.h`` (``_generated_uapi``). Every method raises KvmError, which
names the ioctl, the error and what usually causes it.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from ctypes import CDLL, Structure, byref, c_int, c_uint32, c_uint64, c_ulong, c_void_p, get_errno
from mmap import mmap

from pyvmm.errors import KvmError, NoKvmError
from pyvmm.kvm import _generated_uapi as uapi

TYPE_CHECKING = False  # typing's own takes 10 ms to import
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any, Self, TypeVar

    AnyStructure = TypeVar("AnyStructure", bound=Structure)

# KVM accepts no more (KVM_MAX_CPUID_ENTRIES in the kernel).
MAX_CPUID_ENTRIES = 256

# fcntl.ioctl would do, were it not for arguments above 2 GiB (KVM_SET_TSS_ADDR), which it refuses.
_libc_ioctl = CDLL(None, use_errno=True).ioctl
_libc_ioctl.argtypes = (c_int, c_ulong, c_void_p)


def exit_reason_name(reason: int) -> str:
    """``KVM_EXIT_...`` for the number in ``kvm_run.exit_reason``."""
    for name, value in vars(uapi).items():
        if value == reason and name.startswith("KVM_EXIT_") and "_IO_" not in name:
            return name
    return f"exit reason {reason}"


def _table(header: type[Structure], entry: type[Any], entries: Sequence[Any] | int) -> Any:
    """A ``header`` with `entries` (or that many zeroed ones) where C has a flexible array."""
    count = entries if isinstance(entries, int) else len(entries)
    fields = [("header", header), ("entries", entry * count)]
    table = type("Table", (Structure,), {"_fields_": fields})()
    if not isinstance(entries, int):
        table.entries[:] = entries
    return table


class _Handle:
    """An owned file descriptor; ``close`` may be called any number of times."""

    fd = -1

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def close(self) -> None:
        """Gives the descriptor back; the kernel object lives on while others refer to it."""
        self._close_fd()

    def _close_fd(self) -> None:
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def fileno(self) -> int:
        return self.fd

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._close_fd()

    def _ioctl(self, name: str, argument: int | Structure | c_uint64 = 0) -> int:
        """The ioctl called `name`; it may write to a structure."""
        request = getattr(uapi, name)
        pointer = argument if isinstance(argument, int) else byref(argument)
        while (result := _libc_ioctl(self.fd, request, pointer)) < 0:
            if get_errno() != errno.EINTR:  # KVM_CREATE_VM and others give way to a signal
                from pyvmm.kvm.diagnosis import explain_ioctl

                raise KvmError(explain_ioctl(name, get_errno()), get_errno())
        return int(result)

    def _get(self, name: str, structure: type[AnyStructure]) -> AnyStructure:
        result = structure()
        self._ioctl(name, result)
        return result

    def check_extension(self, capability: int) -> int:
        """The value of a ``KVM_CAP_...``; 0 where this KVM lacks it."""
        return self._ioctl("KVM_CHECK_EXTENSION", capability)


class Kvm(_Handle):
    """An open /dev/kvm with the API version this program was built for.

    Raises NoKvmError when there is none, it may not be opened, or it is not KVM.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            super().__init__(os.open(path, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            from pyvmm.kvm.diagnosis import why_not_open

            raise NoKvmError(why_not_open(path, error)) from None
        try:
            version = self._ioctl("KVM_GET_API_VERSION")
            self.vcpu_mmap_size = self._ioctl("KVM_GET_VCPU_MMAP_SIZE")
        except KvmError as error:
            from pyvmm.kvm.diagnosis import why_not_kvm

            self.close()
            raise NoKvmError(why_not_kvm(path, error.errno)) from None
        if version != uapi.KVM_API_VERSION:
            self.close()
            raise NoKvmError(
                f"{path} speaks version {version} of the KVM API instead of "
                f"{uapi.KVM_API_VERSION}: boot a newer Linux kernel"
            )

    def create_vm(self) -> Vm:
        """A virtual machine without memory, vCPUs or devices."""
        return Vm(self, self._ioctl("KVM_CREATE_VM"))

    def get_supported_cpuid(self) -> list[uapi.kvm_cpuid_entry2]:
        """The CPUID leaves that hardware and KVM support."""
        table = _table(uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, MAX_CPUID_ENTRIES)
        table.header.nent = MAX_CPUID_ENTRIES
        self._ioctl("KVM_GET_SUPPORTED_CPUID", table)
        return list(table.entries[: table.header.nent])

    def get_msr_index_list(self) -> list[int]:
        """The MSRs that belong to a vCPU's state."""
        header = uapi.kvm_msr_list()
        try:
            self._ioctl("KVM_GET_MSR_INDEX_LIST", header)
        except KvmError as error:
            if error.errno != errno.E2BIG:  # asked for none, KVM says how many there are
                raise
        table = _table(uapi.kvm_msr_list, c_uint32, header.nmsrs)
        table.header.nmsrs = header.nmsrs
        self._ioctl("KVM_GET_MSR_INDEX_LIST", table)
        return list(table.entries)


class Vm(_Handle):
    """A virtual machine; made by ``Kvm.create_vm``."""

    def __init__(self, kvm: Kvm, fd: int) -> None:
        super().__init__(fd)
        self._vcpu_mmap_size = kvm.vcpu_mmap_size

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """A vCPU; `vcpu_id` is its APIC ID."""
        return Vcpu(self._ioctl("KVM_CREATE_VCPU", vcpu_id), self._vcpu_mmap_size)

    def set_user_memory_region(
        self, slot: int, gpa: int, size: int, hva: int, *, readonly: bool = False
    ) -> None:
        """Backs `size` bytes at guest-physical `gpa` by host memory at `hva`; size 0 removes.

        Guest writes to a `readonly` slot exit as MMIO (needs KVM_CAP_READONLY_MEM).
        """
        flags = uapi.KVM_MEM_READONLY if readonly else 0
        region = uapi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        self._ioctl("KVM_SET_USER_MEMORY_REGION", region)

    def set_tss_addr(self, gpa: int) -> None:
        """Three pages outside RAM that real mode needs on older Intel CPUs; before any vCPU."""
        self._ioctl("KVM_SET_TSS_ADDR", gpa)

    def set_identity_map_addr(self, gpa: int) -> None:
        """One page outside RAM that real mode needs on older Intel CPUs; before any vCPU."""
        self._ioctl("KVM_SET_IDENTITY_MAP_ADDR", c_uint64(gpa))

    def create_irqchip(self) -> None:
        """The two PICs, the I/O APIC and, for every later vCPU, a local APIC."""
        self._ioctl("KVM_CREATE_IRQCHIP")

    def create_pit2(self) -> None:
        """The i8254 timer with a dummy speaker port; after ``create_irqchip``."""
        self._ioctl("KVM_CREATE_PIT2", uapi.kvm_pit_config(uapi.KVM_PIT_SPEAKER_DUMMY))

    def irq_line(self, gsi: int, level: bool) -> None:
        """Sets the level of an interrupt line."""
        line = uapi.kvm_irq_level()
        line.irq = gsi
        line.level = level
        self._ioctl("KVM_IRQ_LINE", line)

    def irqfd(self, eventfd: int, gsi: int, *, deassign: bool = False) -> None:
        """Makes each signal of `eventfd` an edge on `gsi`."""
        flags = uapi.KVM_IRQFD_FLAG_DEASSIGN if deassign else 0
        self._ioctl("KVM_IRQFD", uapi.kvm_irqfd(eventfd, gsi, flags))

    def ioeventfd(
        self,
        addr: int,
        length: int,
        eventfd: int,
        *,
        datamatch: int | None = None,
        pio: bool = False,
        deassign: bool = False,
    ) -> None:
        """Makes a guest write to `addr` signal `eventfd` instead of exiting.

        `length` is 1, 2, 4 or 8 bytes, or 0 for any (KVM_CAP_IOEVENTFD_ANY_LENGTH); with
        `datamatch` only a write of that value counts. `addr` is guest-physical, or a port.
        """
        flags = 0
        if datamatch is not None:
            flags |= uapi.KVM_IOEVENTFD_FLAG_DATAMATCH
        if pio:
            flags |= uapi.KVM_IOEVENTFD_FLAG_PIO
        if deassign:
            flags |= uapi.KVM_IOEVENTFD_FLAG_DEASSIGN
        argument = uapi.kvm_ioeventfd(datamatch or 0, addr, length, eventfd, flags)
        self._ioctl("KVM_IOEVENTFD", argument)

    def register_coalesced_mmio(self, addr: int, size: int) -> None:
        """Collects guest writes to the range in a ring instead of exiting for each.

        The ring is page KVM_COALESCED_MMIO_PAGE_OFFSET of every vCPU's ``run_buffer``.
        """
        zone = uapi.kvm_coalesced_mmio_zone(addr, size)
        self._ioctl("KVM_REGISTER_COALESCED_MMIO", zone)

    def unregister_coalesced_mmio(self, addr: int, size: int) -> None:
        """Undoes ``register_coalesced_mmio``."""
        zone = uapi.kvm_coalesced_mmio_zone(addr, size)
        self._ioctl("KVM_UNREGISTER_COALESCED_MMIO", zone)

    def get_clock(self) -> uapi.kvm_clock_data:
        """The guest's kvmclock: nanoseconds in ``clock``."""
        return self._get("KVM_GET_CLOCK", uapi.kvm_clock_data)

    def set_clock(self, clock: uapi.kvm_clock_data) -> None:
        """Sets the guest's kvmclock to ``clock.clock`` nanoseconds."""
        self._ioctl("KVM_SET_CLOCK", clock)

    def enable_cap(self, capability: int, *arguments: int) -> None:
        """Turns on an optional capability; its meaning of `arguments` is in the KVM manual."""
        argument = uapi.kvm_enable_cap(capability)
        argument.args[: len(arguments)] = arguments
        self._ioctl("KVM_ENABLE_CAP", argument)


class Vcpu(_Handle):
    """A virtual CPU; made by ``Vm.create_vcpu``.

    `run_buffer` is its shared mapping: ``struct kvm_run`` and, where KVM has it, the ring of
    coalesced MMIO.
    """

    def __init__(self, fd: int, mmap_size: int) -> None:
        super().__init__(fd)
        self.run_buffer = mmap(fd, mmap_size)

    def close(self) -> None:
        """Gives descriptor and mapping back; the mapping stays while there are views of it."""
        self._close_fd()
        with suppress(BufferError):
            self.run_buffer.close()

    @property
    def run(self) -> uapi.kvm_run:
        """The ``struct kvm_run`` at the start of ``run_buffer``; shared, not a copy."""
        return uapi.kvm_run.from_buffer(self.run_buffer)

    def run_once(self) -> bool:
        """Runs the guest until it exits; False when a signal or ``immediate_exit`` came first.

        For probes and tests: virtual machines run in the C loop (``vcpu_run``).
        """
        if _libc_ioctl(self.fd, uapi.KVM_RUN, 0) == 0:
            return True
        if get_errno() == errno.EINTR:
            return False
        from pyvmm.kvm.diagnosis import explain_ioctl

        raise KvmError(explain_ioctl("KVM_RUN", get_errno()), get_errno())

    def get_regs(self) -> uapi.kvm_regs:
        return self._get("KVM_GET_REGS", uapi.kvm_regs)

    def set_regs(self, regs: uapi.kvm_regs) -> None:
        self._ioctl("KVM_SET_REGS", regs)

    def get_sregs(self) -> uapi.kvm_sregs:
        return self._get("KVM_GET_SREGS", uapi.kvm_sregs)

    def set_sregs(self, sregs: uapi.kvm_sregs) -> None:
        self._ioctl("KVM_SET_SREGS", sregs)

    def translate(self, linear: int) -> int | None:
        """The guest-physical address behind a linear one; None when it is not mapped."""
        translation = uapi.kvm_translation(linear)
        self._ioctl("KVM_TRANSLATE", translation)
        return translation.physical_address if translation.valid else None

    def get_fpu(self) -> uapi.kvm_fpu:
        return self._get("KVM_GET_FPU", uapi.kvm_fpu)

    def set_fpu(self, fpu: uapi.kvm_fpu) -> None:
        self._ioctl("KVM_SET_FPU", fpu)

    def get_xcrs(self) -> uapi.kvm_xcrs:
        return self._get("KVM_GET_XCRS", uapi.kvm_xcrs)

    def set_xcrs(self, xcrs: uapi.kvm_xcrs) -> None:
        self._ioctl("KVM_SET_XCRS", xcrs)

    def get_debugregs(self) -> uapi.kvm_debugregs:
        return self._get("KVM_GET_DEBUGREGS", uapi.kvm_debugregs)

    def set_debugregs(self, debugregs: uapi.kvm_debugregs) -> None:
        self._ioctl("KVM_SET_DEBUGREGS", debugregs)

    def get_lapic(self) -> uapi.kvm_lapic_state:
        """The registers of the local APIC, at the offsets that the guest sees."""
        return self._get("KVM_GET_LAPIC", uapi.kvm_lapic_state)

    def set_lapic(self, lapic: uapi.kvm_lapic_state) -> None:
        self._ioctl("KVM_SET_LAPIC", lapic)

    def get_vcpu_events(self) -> uapi.kvm_vcpu_events:
        return self._get("KVM_GET_VCPU_EVENTS", uapi.kvm_vcpu_events)

    def set_vcpu_events(self, events: uapi.kvm_vcpu_events) -> None:
        self._ioctl("KVM_SET_VCPU_EVENTS", events)

    def get_mp_state(self) -> int:
        """One of ``KVM_MP_STATE_...``: running, halted, waiting for its start-up IPI."""
        return int(self._get("KVM_GET_MP_STATE", uapi.kvm_mp_state).mp_state)

    def set_mp_state(self, state: int) -> None:
        self._ioctl("KVM_SET_MP_STATE", uapi.kvm_mp_state(state))

    def get_cpuid2(self) -> list[uapi.kvm_cpuid_entry2]:
        """The CPUID leaves that the guest sees."""
        table = _table(uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, MAX_CPUID_ENTRIES)
        table.header.nent = MAX_CPUID_ENTRIES
        self._ioctl("KVM_GET_CPUID2", table)
        return list(table.entries[: table.header.nent])

    def set_cpuid2(self, entries: Sequence[uapi.kvm_cpuid_entry2]) -> None:
        """Sets what CPUID says; before the vCPU runs."""
        table = _table(uapi.kvm_cpuid2, uapi.kvm_cpuid_entry2, entries)
        table.header.nent = len(entries)
        self._ioctl("KVM_SET_CPUID2", table)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """The values of model-specific registers. KvmError names the first that is refused."""
        entries = [uapi.kvm_msr_entry(index) for index in indices]
        table = self._msrs("KVM_GET_MSRS", entries)
        return {entry.index: entry.data for entry in table.entries}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """Sets model-specific registers. KvmError names the first that is refused."""
        entries = [uapi.kvm_msr_entry(index, 0, value) for index, value in values.items()]
        self._msrs("KVM_SET_MSRS", entries)

    def _msrs(self, name: str, entries: list[uapi.kvm_msr_entry]) -> Any:
        table = _table(uapi.kvm_msrs, uapi.kvm_msr_entry, entries)
        table.header.nmsrs = len(entries)
        done = self._ioctl(name, table)
        if done < len(entries):
            refused = entries[done].index
            raise KvmError(f"{name} stopped at MSR {refused:#x}, which KVM refuses", errno.EINVAL)
        return table

    def kvmclock_ctrl(self) -> None:
        """Tells the guest that it was paused, so that its watchdogs do not bark."""
        self._ioctl("KVM_KVMCLOCK_CTRL")
