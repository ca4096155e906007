"""Kvm, Vm and Vcpu against the kernel: each method, and the errors that users will see."""

from __future__ import annotations

import errno
import gc
import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm import layout
from pyvmm._core import ffi
from pyvmm.errors import KvmError, NoKvmError
from pyvmm.kvm import _generated_uapi as uapi
from pyvmm.kvm.handles import Kvm, Vcpu, Vm, exit_reason_name

MMIO_GPA = 0x10_0000


@pytest.fixture
def kvm() -> Iterator[Kvm]:
    with Kvm() as kvm:
        yield kvm


@pytest.fixture
def vm(kvm: Kvm) -> Iterator[Vm]:
    with kvm.create_vm() as vm:
        vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        vm.set_tss_addr(layout.KVM_TSS)
        yield vm


class Memory:
    """`size` bytes of host memory with their address."""

    def __init__(self, size: int, content: bytes = b"") -> None:
        self.map = mmap.mmap(-1, size)
        self.map[: len(content)] = content
        self.hva = int(ffi.cast("uintptr_t", ffi.from_buffer(self.map)))


def real_mode(vm: Vm, code: bytes) -> tuple[Vcpu, Memory]:
    """A vCPU about to run `code` at 0 in real mode, in 64 KiB of RAM."""
    memory = Memory(0x1_0000, code)
    vm.set_user_memory_region(0, 0, 0x1_0000, memory.hva)
    vcpu = vm.create_vcpu(0)
    sregs = vcpu.get_sregs()
    sregs.cs.base = sregs.cs.selector = 0
    vcpu.set_sregs(sregs)
    vcpu.set_regs(uapi.kvm_regs(rip=0, rsp=0x8000, rflags=2))
    return vcpu, memory


def test_open_says_what_kvm_can(kvm: Kvm) -> None:
    assert kvm.check_extension(uapi.KVM_CAP_USER_MEMORY) == 1
    assert kvm.check_extension(0x7FFFFFF) == 0
    assert kvm.vcpu_mmap_size >= layout.PAGE_SIZE
    assert os.get_inheritable(kvm.fd) is False


def test_close_is_idempotent_and_a_closed_handle_says_so(kvm: Kvm) -> None:
    vm = kvm.create_vm()
    fd = vm.fd
    vm.close()
    vm.close()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    with pytest.raises(KvmError, match=r"EBADF .*: the handle is closed"):
        vm.create_irqchip()


def test_a_forgotten_handle_closes_itself(kvm: Kvm) -> None:
    fd = kvm.create_vm().fd
    gc.collect()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_supported_cpuid_has_a_64_bit_cpu(kvm: Kvm) -> None:
    leaves = {(entry.function, entry.index): entry for entry in kvm.get_supported_cpuid()}
    assert leaves[0x8000_0001, 0].edx & 1 << 29  # long mode
    vendor = struct.pack("<III", leaves[0, 0].ebx, leaves[0, 0].edx, leaves[0, 0].ecx)
    assert vendor in (b"GenuineIntel", b"AuthenticAMD", b"HygonGenuine")


def test_msr_index_list_has_the_tsc(kvm: Kvm) -> None:
    indices = kvm.get_msr_index_list()
    assert 0x10 in indices
    assert len(indices) == len(set(indices)) > 10


def test_a_guest_runs_in_real_mode(vm: Vm) -> None:
    """mov $0x42,%al; out %al,$0x10; hlt"""
    vcpu, _memory = real_mode(vm, b"\xb0\x42\xe6\x10\xf4")
    with vcpu:
        assert vcpu.run_once()
        run = vcpu.run
        assert exit_reason_name(run.exit_reason) == "KVM_EXIT_IO"
        assert (run.io.direction, run.io.size, run.io.port, run.io.count) == (
            uapi.KVM_EXIT_IO_OUT, 1, 0x10, 1,
        )  # fmt: skip
        assert vcpu.run_buffer[run.io.data_offset] == 0x42
        assert vcpu.run_once()
        assert exit_reason_name(vcpu.run.exit_reason) == "KVM_EXIT_HLT"
        assert vcpu.get_regs().rip == 5


def test_immediate_exit_comes_before_guest_code(vm: Vm) -> None:
    vcpu, _memory = real_mode(vm, b"\xf4")
    with vcpu:
        vcpu.run.immediate_exit = 1
        assert vcpu.run_once() is False
        assert vcpu.get_regs().rip == 0
        vcpu.run.immediate_exit = 0
        assert vcpu.run_once() is True


def test_a_readonly_slot_is_read_without_exit_and_written_with_one(vm: Vm) -> None:
    """mov 0x2000,%al; mov %al,0x2001; hlt"""
    vcpu, _memory = real_mode(vm, b"\xa0\x00\x20\xa2\x01\x20\xf4")
    page = Memory(layout.PAGE_SIZE, b"\x5a")
    vm.set_user_memory_region(0, 0, 0, 0)
    low = Memory(0x1000, b"\xa0\x00\x20\xa2\x01\x20\xf4")
    vm.set_user_memory_region(0, 0, 0x1000, low.hva)
    vm.set_user_memory_region(1, 0x2000, 0x1000, page.hva, readonly=True)
    with vcpu:
        assert vcpu.run_once()
        mmio = vcpu.run.mmio
        assert vcpu.run.exit_reason == uapi.KVM_EXIT_MMIO
        assert (mmio.phys_addr, mmio.len, mmio.is_write, mmio.data[0]) == (0x2001, 1, 1, 0x5A)


def test_ioeventfd_absorbs_the_matching_write_only(vm: Vm) -> None:
    """out %al,$0x10 with al 7, then 8; hlt"""
    vcpu, _memory = real_mode(vm, b"\xb0\x07\xe6\x10\xb0\x08\xe6\x10\xf4")
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        vm.ioeventfd(0x10, 1, eventfd, datamatch=7, pio=True)
        with pytest.raises(KvmError, match=r"EEXIST .*already"):
            vm.ioeventfd(0x10, 1, eventfd, datamatch=7, pio=True)
        with vcpu:
            assert vcpu.run_once()
            assert vcpu.run.exit_reason == uapi.KVM_EXIT_IO
            assert vcpu.run_buffer[vcpu.run.io.data_offset] == 8
        assert os.eventfd_read(eventfd) == 1
        vm.ioeventfd(0x10, 1, eventfd, datamatch=7, pio=True, deassign=True)
        with pytest.raises(KvmError, match=r"ENOENT .*no such ioeventfd"):
            vm.ioeventfd(0x10, 1, eventfd, datamatch=7, pio=True, deassign=True)
    finally:
        os.close(eventfd)


def test_coalesced_mmio_collects_writes_in_the_ring(vm: Vm) -> None:
    """mov %al,%ds:0 with ds at 1 MiB, then the same at 1 MiB + 0x40; hlt"""
    vcpu, _memory = real_mode(vm, b"\xb0\x77\xa2\x00\x00\xa2\x40\x00\xf4")
    vm.register_coalesced_mmio(MMIO_GPA, 4)
    with vcpu:
        sregs = vcpu.get_sregs()
        sregs.ds.base = MMIO_GPA
        vcpu.set_sregs(sregs)
        assert vcpu.run_once()
        assert vcpu.run.exit_reason == uapi.KVM_EXIT_MMIO
        assert vcpu.run.mmio.phys_addr == MMIO_GPA + 0x40
        offset = uapi.KVM_COALESCED_MMIO_PAGE_OFFSET * layout.PAGE_SIZE
        assert vm.check_extension(uapi.KVM_CAP_COALESCED_MMIO) * layout.PAGE_SIZE == offset
        ring = uapi.kvm_coalesced_mmio_ring.from_buffer_copy(vcpu.run_buffer, offset)
        assert (ring.first, ring.last) == (0, 1)
        entry = uapi.kvm_coalesced_mmio.from_buffer_copy(vcpu.run_buffer, offset + 8)
        assert (entry.phys_addr, entry.len, entry.data[0]) == (MMIO_GPA, 1, 0x77)
        vm.unregister_coalesced_mmio(MMIO_GPA, 4)


def lapic_register(vcpu: Vcpu, offset: int) -> int:
    (value,) = struct.unpack_from("<I", bytes(vcpu.get_lapic()), offset)
    return int(value)


@pytest.fixture
def interrupt_vcpu(vm: Vm) -> Iterator[Vcpu]:
    """A vCPU with the in-kernel interrupt controllers."""
    vm.create_irqchip()
    vm.create_pit2()
    with vm.create_vcpu(0) as vcpu:
        yield vcpu


def test_interrupt_controllers_come_once_and_in_order(kvm: Kvm, vm: Vm) -> None:
    with pytest.raises(KvmError, match="KVM_CREATE_PIT2 failed with ENOENT"):
        vm.create_pit2()
    vm.create_irqchip()
    with pytest.raises(KvmError, match="KVM_CREATE_IRQCHIP failed with EEXIST") as raised:
        vm.create_irqchip()
    assert raised.value.errno == errno.EEXIST
    expected = pytest.raises(KvmError, match=r"KVM_CREATE_IRQCHIP .*: a vCPU exists already")
    with kvm.create_vm() as late, late.create_vcpu(0), expected:
        late.create_irqchip()


def test_irqfd_needs_an_interrupt_controller_and_takes_one_gsi(vm: Vm) -> None:
    eventfd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
    try:
        with pytest.raises(KvmError, match="no interrupt controller"):
            vm.irqfd(eventfd, 5)
        vm.create_irqchip()
        vm.irqfd(eventfd, 5)
        with pytest.raises(KvmError, match=r"EBUSY .*: this eventfd serves a GSI already"):
            vm.irqfd(eventfd, 6)
        vm.irqfd(eventfd, 5, deassign=True)
        vm.irqfd(eventfd, 6)
    finally:
        os.close(eventfd)


def test_state_of_a_vcpu_is_set_and_read_back(interrupt_vcpu: Vcpu) -> None:
    vcpu = interrupt_vcpu
    assert vcpu.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
    vcpu.set_mp_state(uapi.KVM_MP_STATE_HALTED)
    assert vcpu.get_mp_state() == uapi.KVM_MP_STATE_HALTED

    vcpu.set_regs(uapi.kvm_regs(r15=0x1234_5678_9ABC_DEF0, rflags=2))
    assert vcpu.get_regs().r15 == 0x1234_5678_9ABC_DEF0

    fpu = vcpu.get_fpu()
    fpu.fcw = 0x37F
    vcpu.set_fpu(fpu)
    assert vcpu.get_fpu().fcw == 0x37F

    debugregs = vcpu.get_debugregs()
    debugregs.db[1] = 0xFFFF_8000_0000_0000
    vcpu.set_debugregs(debugregs)
    assert vcpu.get_debugregs().db[1] == 0xFFFF_8000_0000_0000

    lapic = vcpu.get_lapic()
    lapic.regs[0x80] = 0x20  # task priority
    vcpu.set_lapic(lapic)
    assert lapic_register(vcpu, 0x80) == 0x20

    events = vcpu.get_vcpu_events()
    events.nmi.masked = 1
    vcpu.set_vcpu_events(events)
    assert vcpu.get_vcpu_events().nmi.masked == 1


def test_xcr0_is_set_and_read_back(kvm: Kvm, vm: Vm) -> None:
    with vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2(kvm.get_supported_cpuid())
        xcrs = vcpu.get_xcrs()
        xcrs.nr_xcrs = 1
        xcrs.xcrs[0].value = 3
        vcpu.set_xcrs(xcrs)
        assert vcpu.get_xcrs().xcrs[0].value == 3


def test_cpuid_is_set_and_read_back(kvm: Kvm, vm: Vm) -> None:
    entries = kvm.get_supported_cpuid()
    leaf = uapi.kvm_cpuid_entry2(function=0x4000_0100, eax=0x1234)
    with vm.create_vcpu(0) as vcpu:
        vcpu.set_cpuid2([*entries, leaf])
        seen = {entry.function: entry.eax for entry in vcpu.get_cpuid2()}
        assert seen[0x4000_0100] == 0x1234
        with pytest.raises(KvmError, match=r"E2BIG .*: more than 256 entries"):
            vcpu.set_cpuid2([leaf] * 257)


def test_msrs_are_set_and_read_back_and_a_refused_one_is_named(vm: Vm) -> None:
    sysenter_eip, star, unknown = 0x176, 0xC000_0081, 0x1234_5678
    with vm.create_vcpu(0) as vcpu:
        vcpu.set_msrs({sysenter_eip: 0x1000, star: 0x23_0010 << 32})
        values = {sysenter_eip: 0x1000, star: 0x23_0010 << 32}
        assert vcpu.get_msrs([sysenter_eip, star]) == values
        assert vcpu.get_msrs([]) == {}
        with pytest.raises(KvmError, match="KVM_SET_MSRS stopped at MSR 0x12345678"):
            vcpu.set_msrs({star: 0, unknown: 1})
        with pytest.raises(KvmError, match="KVM_GET_MSRS stopped at MSR 0x12345678"):
            vcpu.get_msrs([unknown])


def test_the_clock_goes_on_from_where_it_is_set(vm: Vm) -> None:
    hour = 3600 * 10**9
    vm.set_clock(uapi.kvm_clock_data(clock=hour))
    assert hour <= vm.get_clock().clock < hour + 60 * 10**9


def test_kvmclock_ctrl_wants_a_guest_with_kvmclock(vm: Vm) -> None:
    with vm.create_vcpu(0) as vcpu, pytest.raises(KvmError, match="not turned kvmclock on"):
        vcpu.kvmclock_ctrl()


def test_enable_cap_passes_its_arguments(vm: Vm) -> None:
    if not vm.check_extension(uapi.KVM_CAP_X86_DISABLE_EXITS):
        pytest.skip("this KVM has no KVM_CAP_X86_DISABLE_EXITS")
    vm.enable_cap(uapi.KVM_CAP_X86_DISABLE_EXITS, 0)
    with pytest.raises(KvmError, match="KVM_ENABLE_CAP failed with EINVAL"):
        vm.enable_cap(uapi.KVM_CAP_X86_DISABLE_EXITS, 1 << 40)


@pytest.mark.parametrize(
    ("region", "message"),
    [
        ((0, 0x800, 0x1000), "EINVAL .*multiple of the page size"),
        ((1, 0, 0x1000), "EEXIST .*overlaps another slot"),
    ],
)
def test_a_bad_memory_region_is_explained(
    vm: Vm, region: tuple[int, int, int], message: str
) -> None:
    memory = Memory(0x2000)
    vm.set_user_memory_region(0, 0, 0x1000, memory.hva)
    with pytest.raises(KvmError, match=f"KVM_SET_USER_MEMORY_REGION failed with {message}"):
        vm.set_user_memory_region(*region, memory.hva)


def test_a_vcpu_id_is_taken_once_and_bounded(vm: Vm) -> None:
    with vm.create_vcpu(0):
        with pytest.raises(KvmError, match=r"EEXIST .*exists already"):
            vm.create_vcpu(0)
        with pytest.raises(KvmError, match=r"EINVAL .*more vCPUs than this KVM supports"):
            vm.create_vcpu(1 << 20)


def test_a_signal_during_setup_is_no_error(kvm: Kvm) -> None:
    """KVM_CREATE_VM gives way to signals; the handle asks again."""
    previous = signal.signal(signal.SIGUSR1, lambda *_: None)
    stop = threading.Event()

    def pester() -> None:
        while not stop.wait(0.0001):
            os.kill(os.getpid(), signal.SIGUSR1)

    thread = threading.Thread(target=pester)
    thread.start()
    try:
        for _ in range(200):
            kvm.create_vm().close()
    finally:
        stop.set()
        thread.join()
        signal.signal(signal.SIGUSR1, previous)


def test_run_buffer_outlives_close_while_somebody_refers_to_it(vm: Vm) -> None:
    vcpu = vm.create_vcpu(0)
    run = vcpu.run
    vcpu.close()
    run.immediate_exit = 1
    assert run.immediate_exit == 1


def test_the_wrong_kind_of_file_is_no_kvm() -> None:
    with pytest.raises(NoKvmError, match="/dev/null is not the KVM device"):
        Kvm("/dev/null")


def test_another_api_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uapi, "KVM_API_VERSION", 13)
    with pytest.raises(NoKvmError, match="speaks version 12 of the KVM API instead of 13"):
        Kvm()


def test_exit_reasons_have_names() -> None:
    assert exit_reason_name(uapi.KVM_EXIT_SHUTDOWN) == "KVM_EXIT_SHUTDOWN"
    assert exit_reason_name(0) == "KVM_EXIT_UNKNOWN"
    assert exit_reason_name(999) == "exit reason 999"


def test_no_descriptor_is_left_behind() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    kvm = Kvm()
    vm = kvm.create_vm()
    vcpu = vm.create_vcpu(0)
    assert descriptors() > before + 2
    for handle in (vcpu, vm, kvm):
        handle.close()
    assert descriptors() == before
