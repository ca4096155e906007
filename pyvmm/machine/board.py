"""The hardware of one boot: built at power-on, thrown away at reset and in S3.

What survives a reset (disk images, consoles, the devices with their settings) belongs to
``vm.py`` and is only plugged in here. Building everything anew is what makes a reboot sound: no
state of the old guest can be left behind. S3 is the same, but for what stays powered (`Asleep`).
"""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack

from pyvmm import layout
from pyvmm._core import ffi, lib
from pyvmm.boot import acpi, cpuid, linux
from pyvmm.boot.acpi import VirtioSlot
from pyvmm.errors import GuestCrash
from pyvmm.kvm import _generated_uapi as kvm_uapi
from pyvmm.machine.bus import Bus
from pyvmm.machine.irq import GsiAllocator
from pyvmm.machine.vcpu import VcpuThread
from pyvmm.platform import power
from pyvmm.platform.pvpanic import PvPanic
from pyvmm.virtio import _generated_uapi as virtio_uapi
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.worker import WorkerThread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Protocol

    from pyvmm.backends.chardev import Chardev
    from pyvmm.boot.entry import EntryState
    from pyvmm.config import VmConfig
    from pyvmm.kvm.handles import Kvm, Vcpu
    from pyvmm.machine.chassis import Chassis
    from pyvmm.machine.memory import GuestMemory
    from pyvmm.machine.pvclock import StoppedClock
    from pyvmm.platform.rtc import Rtc
    from pyvmm.virtio.device import VirtioDevice

    class Listener(Protocol):
        """Who hears what the guest did. Called on vCPU threads."""

        def on_poweroff(self) -> None: ...
        def on_sleep(self) -> None: ...
        def on_reset(self) -> None: ...
        def on_panic(self) -> None: ...
        def on_crash(self, crash: GuestCrash) -> None: ...
        def on_error(self, error: BaseException) -> None: ...


# IA32_MTRR_DEF_TYPE: MTRRs on, all memory write-back (Intel SDM vol. 3, 12.11). Linux takes
# disabled MTRRs for a broken firmware.
MSR_MTRR_DEF_TYPE = 0x2FF
MTRR_ON_WRITE_BACK = 1 << 11 | 6

# The memory slots of guest RAM come first, then one for each register page.
FIRST_REGISTER_SLOT = 4


class Asleep:
    """What stays powered in S3 (ACPI 6.5, 16.1.3), from one board to the next: memory, and the
    registers of what can wake the machine.
    """

    __slots__ = ("clock", "memory", "pm1_events")

    def __init__(
        self, memory: GuestMemory, pm1_events: power.Pm1Events, clock: StoppedClock
    ) -> None:
        self.memory = memory
        self.pm1_events = pm1_events
        self.clock = clock


class Board:
    """A machine that is ready to run its kernel, or to go on after S3 (`asleep`); `start` lets the
    vCPUs go.

    `serial` is what ttyS0 is connected to, and `watch` the ``struct console_watch *`` that sees its
    output; `rtc` is the clock that the battery keeps. Raises UsageError, KvmError.
    """

    def __init__(
        self,
        kvm: Kvm,
        chassis: Chassis,
        config: VmConfig,
        devices: Sequence[VirtioDevice],
        serial: Chardev,
        watch: Any,
        rtc: Rtc,
        listener: Listener,
        asleep: Asleep | None = None,
    ) -> None:
        self._listener = listener
        self._chassis = chassis
        self._rtc = rtc
        self._stopped_clock: StoppedClock | None = None
        with ExitStack() as stack:
            stack.callback(chassis.close)
            self.memory, self.vm = chassis.memory, chassis.vm
            self._pio = Bus()
            self._mmio = Bus()
            self.vcpus = [self._create_vcpu(index, stack) for index in range(config.cpus)]

            self._add_platform(serial, watch, asleep, stack)
            self._add_virtio(kvm, devices, stack)
            self._set_cpus_up(kvm)
            if asleep is None:
                rtc.reset()
                set_entry_state(self.vcpus[0].handle, self._load(config))
            else:
                self._wake(asleep)
            rtc.connect(self._set_rtc_irq)
            stack.callback(rtc.connect, None)
            # Guest code must stop before anything that it uses goes.
            stack.callback(self._stop_vcpus)
            self._stack = stack.pop_all()

    def start(self) -> None:
        """Lets the guest run."""
        for vcpu in self.vcpus:
            vcpu.start()

    def pause(self) -> None:
        """Returns when no vCPU runs guest code; idempotent. Also before `start`."""
        from pyvmm.machine.pvclock import StoppedClock

        for vcpu in self.vcpus:
            vcpu.pause()
        if self._stopped_clock is None:
            self._stopped_clock = StoppedClock(self.vm)

    def resume(self, *, catch_up: bool) -> None:
        """Lets the vCPUs go on, with their clock where it stood or (`catch_up`) where it would be;
        idempotent.
        """
        if self._stopped_clock is not None:
            from pyvmm.machine.pvclock import tell_paused

            self._stopped_clock.start(self.vm, catch_up=catch_up)
            self._stopped_clock = None
            tell_paused(vcpu.handle for vcpu in self.vcpus)
            # The vDSO of Linux reads the page of vCPU 0 on each vCPU.
            for vcpu in self.vcpus:
                vcpu.settle()
        for vcpu in self.vcpus:
            vcpu.resume()

    def press_power_button(self) -> None:
        """Asks the guest to shut down."""
        self._pm1_events.press_power_button()

    def fall_asleep(self, on_wake: Callable[[], None]) -> Asleep:
        """Closes the board but for what is returned; `on_wake` is called when that wakes."""
        from pyvmm.machine.pvclock import StoppedClock

        pm1_events = self._pm1_events
        pm1_events.sleep(on_wake)
        asleep = Asleep(self.memory, pm1_events, StoppedClock(self.vm))
        self._chassis.keep_memory = True
        self.close()
        self._rtc.connect(lambda level: pm1_events.rtc_alarm() if level else None)
        return asleep

    def close(self) -> None:
        """Stops the guest and gives everything back."""
        self._stack.close()

    def _create_vcpu(self, index: int, stack: ExitStack) -> VcpuThread:
        vcpu = VcpuThread(
            self.vm.create_vcpu(index),
            index,
            self._pio,
            self._mmio,
            on_exit=self._on_exit,
            on_error=self._listener.on_error,
        )
        stack.callback(vcpu.close)
        return vcpu

    def _on_reset(self) -> None:
        self._stop_vcpus()
        self._listener.on_reset()

    def _on_poweroff(self) -> None:
        self._stop_vcpus()
        self._listener.on_poweroff()

    def _on_sleep(self) -> None:
        self._stop_vcpus()
        self._listener.on_sleep()

    def _stop_vcpus(self) -> None:
        """The guest executes nothing after the instruction that ended it."""
        for vcpu in self.vcpus:
            vcpu.request_stop()

    def _on_exit(self, vcpu: VcpuThread) -> None:
        from pyvmm.machine import crash

        self._listener.on_crash(crash.describe(vcpu.handle, vcpu.index, self.memory))

    def _set_sci(self, level: bool) -> None:
        self.vm.irq_line(layout.ACPI_SCI_GSI, level)

    def _set_rtc_irq(self, level: bool) -> None:
        self.vm.irq_line(layout.RTC_GSI, level)
        if level:
            self._pm1_events.rtc_alarm()

    def _add_platform(
        self, serial: Chardev, watch: Any, asleep: Asleep | None, stack: ExitStack
    ) -> None:
        listener = self._listener
        self._pm1_events = asleep.pm1_events if asleep else power.Pm1Events(self._set_sci)
        reset = power.ResetPort(layout.RESET_VALUE, self._on_reset)
        i8042 = power.ResetPort(power.I8042_PULSE_RESET, self._on_reset, power.I8042_STATUS)
        control = power.Pm1Control(
            {
                layout.ACPI_S3_SLEEP_TYPE: self._on_sleep,
                layout.ACPI_S5_SLEEP_TYPE: self._on_poweroff,
            }
        )
        panic = PvPanic(listener.on_panic)
        self._pio.add(layout.PM1_EVENT_PORT, self._pm1_events.SIZE, self._pm1_events)
        self._pio.add(layout.PM1_CONTROL_PORT, control.SIZE, control)
        self._pio.add(layout.RESET_PORT, reset.SIZE, reset)
        self._pio.add(layout.I8042_COMMAND_PORT, i8042.SIZE, i8042)
        self._pio.add(layout.PVPANIC_PORT, panic.SIZE, panic)
        self._pio.add(layout.CMOS_PORT, self._rtc.SIZE, self._rtc)

        in_fd, out_fd = (-1 if fd is None else fd for fd in (serial.input_fd, serial.output_fd))
        uart = lib.serial16550_create(
            layout.COM1_PORT, in_fd, out_fd, self.vm.fileno(), layout.COM1_GSI, watch
        )
        if uart == ffi.NULL:
            raise OSError(ffi.errno, f"serial port: {os.strerror(ffi.errno)}")
        stack.callback(lib.serial16550_destroy, uart)
        worker = WorkerThread(lib.serial16550_worker(uart), "serial")
        stack.callback(worker.stop)
        stack.callback(lib.serial16550_flush, uart)
        self._pio.add_native(lib.serial16550_range(uart))

    def _add_virtio(self, kvm: Kvm, devices: Sequence[VirtioDevice], stack: ExitStack) -> None:
        self.transports: list[MmioTransport] = []
        self._keep: list[Any] = []  # what only C refers to
        if not devices:
            self._slots: list[VirtioSlot] = []
            return
        gsis = GsiAllocator(len(devices))
        self._slots = [
            VirtioSlot(
                layout.VIRTIO_MMIO_BASE + index * layout.VIRTIO_MMIO_STRIDE,
                gsis.gsi(index),
                gsis.shared,
            )
            for index in range(len(devices))
        ]
        readonly_slots = kvm.check_extension(kvm_uapi.KVM_CAP_READONLY_MEM) > 0
        pages = mmap.mmap(-1, len(devices) * layout.PAGE_SIZE)
        acks = self._create_ack_ring(kvm, stack)
        for index, (device, slot) in enumerate(zip(devices, self._slots, strict=True)):
            page = memoryview(pages)[index * layout.PAGE_SIZE :][: layout.PAGE_SIZE]
            memory_slot = FIRST_REGISTER_SLOT + index if readonly_slots else None
            self._plug(device, slot, page, memory_slot, acks, stack)

    def _create_ack_ring(self, kvm: Kvm, stack: ExitStack) -> Any:
        """The ring of coalesced InterruptACK writes, or NULL where KVM has none."""
        page_offset = kvm.check_extension(kvm_uapi.KVM_CAP_COALESCED_MMIO)
        if not page_offset:
            return ffi.NULL
        ring = ffi.from_buffer(self.vcpus[0].handle.run_buffer) + page_offset * layout.PAGE_SIZE
        acks = lib.ack_ring_create(ring)
        if acks == ffi.NULL:
            raise MemoryError("no memory for the ring of interrupt acknowledgements")
        stack.callback(lib.ack_ring_destroy, acks)
        return acks

    def _plug(
        self,
        device: VirtioDevice,
        slot: VirtioSlot,
        page: memoryview,
        memory_slot: int | None,
        acks: Any,
        stack: ExitStack,
    ) -> None:
        irqfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        stack.callback(os.close, irqfd)
        self.vm.irqfd(irqfd, slot.gsi)
        mmio = ffi.new("struct virtio_mmio_range *")

        def map_page(size: int) -> None:
            if memory_slot is not None:
                self.vm.set_user_memory_region(
                    memory_slot, slot.gpa, size, int(ffi.cast("uintptr_t", native)), readonly=True
                )

        def trap_reads(trap: bool) -> None:
            mmio.trapped = trap
            map_page(0 if trap else layout.PAGE_SIZE)

        transport = MmioTransport(device, self.memory.native, page, slot.gpa, irqfd, trap_reads)
        stack.callback(transport.close)
        native = transport.native_page
        map_page(layout.PAGE_SIZE)
        for index, kick in enumerate(transport.kicks):
            if index not in device.synchronous:
                self.vm.ioeventfd(
                    slot.gpa + virtio_uapi.VIRTIO_MMIO_QUEUE_NOTIFY, 4, kick, datamatch=index
                )
        if acks != ffi.NULL:
            if lib.ack_ring_attach(acks, transport.irq):
                raise MemoryError("too many devices for the ring of interrupt acknowledgements")
            self.vm.register_coalesced_mmio(slot.gpa + virtio_uapi.VIRTIO_MMIO_INTERRUPT_ACK, 4)
        lib.virtio_mmio_range_init(mmio, slot.gpa, native, transport.irq)
        self._mmio.add_native(ffi.addressof(mmio, "range"))
        self._mmio.add_fallback(slot.gpa, layout.VIRTIO_MMIO_STRIDE, transport)
        self._keep.append(mmio)
        self.transports.append(transport)

    def _load(self, config: VmConfig) -> EntryState:
        command_line = config.command_line()
        rsdp = None
        if "acpi=off" in command_line.split():
            from pyvmm.boot import mptable

            mptable.write_mp_table(self.memory, cpus=config.cpus, virtio=self._slots)
            command_line = " ".join([*mptable.virtio_mmio_parameters(self._slots), command_line])
        else:
            rsdp = acpi.build_tables(self.memory, cpus=config.cpus, virtio=self._slots)
        return linux.load_kernel(
            self.memory,
            linux.resolve_kernel(config.kernel),
            config.initrd,
            command_line,
            boot="bzimage" if config.boot == "bzimage" else "auto",
            acpi_rsdp=rsdp,
        )

    def _wake(self, asleep: Asleep) -> None:
        """All that a firmware does after S3 (16.3.2): vCPU 0 goes on at the waking vector, in real
        mode; the others wait for their start-up IPIs.
        """
        vector = acpi.waking_vector(self.memory)
        assert vector is not None  # or else the machine is reset
        asleep.clock.start(self.vm, catch_up=True)
        asleep.pm1_events.wake(self._set_sci)
        set_real_mode_entry(self.vcpus[0].handle, vector)

    def _set_cpus_up(self, kvm: Kvm) -> None:
        tsc_deadline = kvm.check_extension(kvm_uapi.KVM_CAP_TSC_DEADLINE_TIMER) > 0
        supported = [cpuid.CpuidEntry.from_kvm(leaf) for leaf in kvm.get_supported_cpuid()]
        model = cpuid.host_cpu_model()
        for vcpu in self.vcpus:
            leaves = cpuid.guest_cpuid(
                supported,
                cpus=len(self.vcpus),
                cpu_index=vcpu.index,
                model=model,
                tsc_deadline=tsc_deadline,
            )
            vcpu.handle.set_cpuid2([kvm_uapi.kvm_cpuid_entry2(*leaf) for leaf in leaves])
            vcpu.handle.set_msrs({MSR_MTRR_DEF_TYPE: MTRR_ON_WRITE_BACK})


def set_real_mode_entry(vcpu: Vcpu, gpa: int) -> None:
    """Has a vCPU that was just made begin at `gpa`, below 1 MiB, in real mode."""
    sregs = vcpu.get_sregs()
    sregs.cs.selector = gpa >> 4
    sregs.cs.base = sregs.cs.selector << 4
    vcpu.set_sregs(sregs)
    vcpu.set_regs(kvm_uapi.kvm_regs(rip=gpa & 0xF, rflags=0x2))


def set_entry_state(vcpu: Vcpu, entry: EntryState) -> None:
    """Puts the boot processor at the kernel's entry point; the others wait for its IPIs."""
    sregs = vcpu.get_sregs()
    for names, segment in (
        (("cs",), entry.code),
        (("ds", "es", "fs", "gs", "ss"), entry.data),
        (("tr",), entry.task),
    ):
        for name in names:
            register = getattr(sregs, name)
            for field in segment.__slots__:
                setattr(register, field, getattr(segment, field))
    sregs.gdt.base, sregs.gdt.limit = entry.gdt_base, entry.gdt_limit
    sregs.idt.base = sregs.idt.limit = 0
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = entry.cr0, entry.cr3, entry.cr4, entry.efer
    vcpu.set_sregs(sregs)
    regs = kvm_uapi.kvm_regs()
    regs.rip, regs.rsp, regs.rsi, regs.rflags = entry.rip, entry.rsp, entry.rsi, entry.rflags
    vcpu.set_regs(regs)
