"""Constants and structures of linux/kvm.h, asm/kvm.h, asm/kvm_para.h.

Written by scripts/generate-bindings; do not edit.
"""

from ctypes import Structure, Union, c_int32, c_uint16, c_uint32, c_uint64, c_uint8

# Version of the interface
KVM_API_VERSION = 12

# ioctls of /dev/kvm
KVM_GET_API_VERSION = 0xae00
KVM_CREATE_VM = 0xae01
KVM_CHECK_EXTENSION = 0xae03
KVM_GET_VCPU_MMAP_SIZE = 0xae04
KVM_GET_MSR_INDEX_LIST = 0xc004ae02
KVM_GET_SUPPORTED_CPUID = 0xc008ae05

# ioctls of a VM
KVM_CREATE_VCPU = 0xae41
KVM_SET_USER_MEMORY_REGION = 0x4020ae46
KVM_SET_TSS_ADDR = 0xae47
KVM_SET_IDENTITY_MAP_ADDR = 0x4008ae48
KVM_CREATE_IRQCHIP = 0xae60
KVM_IRQ_LINE = 0x4008ae61
KVM_IRQFD = 0x4020ae76
KVM_IOEVENTFD = 0x4040ae79
KVM_CREATE_PIT2 = 0x4040ae77
KVM_REGISTER_COALESCED_MMIO = 0x4010ae67
KVM_UNREGISTER_COALESCED_MMIO = 0x4010ae68
KVM_GET_CLOCK = 0x8030ae7c
KVM_SET_CLOCK = 0x4030ae7b
KVM_ENABLE_CAP = 0x4068aea3

# ioctls of a vCPU
KVM_RUN = 0xae80
KVM_TRANSLATE = 0xc018ae85
KVM_GET_REGS = 0x8090ae81
KVM_SET_REGS = 0x4090ae82
KVM_GET_SREGS = 0x8138ae83
KVM_SET_SREGS = 0x4138ae84
KVM_GET_MSRS = 0xc008ae88
KVM_SET_MSRS = 0x4008ae89
KVM_SET_CPUID2 = 0x4008ae90
KVM_GET_CPUID2 = 0xc008ae91
KVM_GET_FPU = 0x81a0ae8c
KVM_SET_FPU = 0x41a0ae8d
KVM_GET_LAPIC = 0x8400ae8e
KVM_SET_LAPIC = 0x4400ae8f
KVM_NMI = 0xae9a
KVM_GET_MP_STATE = 0x8004ae98
KVM_SET_MP_STATE = 0x4004ae99
KVM_GET_VCPU_EVENTS = 0x8040ae9f
KVM_SET_VCPU_EVENTS = 0x4040aea0
KVM_GET_DEBUGREGS = 0x8080aea1
KVM_SET_DEBUGREGS = 0x4080aea2
KVM_GET_XCRS = 0x8188aea6
KVM_SET_XCRS = 0x4188aea7
KVM_GET_TSC_KHZ = 0xaea3
KVM_SET_TSC_KHZ = 0xaea2
KVM_KVMCLOCK_CTRL = 0xaead

# Capabilities (KVM_CHECK_EXTENSION)
KVM_CAP_IRQCHIP = 0
KVM_CAP_HLT = 1
KVM_CAP_USER_MEMORY = 3
KVM_CAP_SET_TSS_ADDR = 4
KVM_CAP_EXT_CPUID = 7
KVM_CAP_CLOCKSOURCE = 8
KVM_CAP_NR_VCPUS = 9
KVM_CAP_NR_MEMSLOTS = 10
KVM_CAP_PIT = 11
KVM_CAP_MP_STATE = 14
KVM_CAP_COALESCED_MMIO = 15
KVM_CAP_SYNC_MMU = 16
KVM_CAP_IRQ_ROUTING = 25
KVM_CAP_DESTROY_MEMORY_REGION_WORKS = 21
KVM_CAP_IRQFD = 32
KVM_CAP_PIT2 = 33
KVM_CAP_PIT_STATE2 = 35
KVM_CAP_SET_BOOT_CPU_ID = 34
KVM_CAP_IOEVENTFD = 36
KVM_CAP_SET_IDENTITY_MAP_ADDR = 37
KVM_CAP_ADJUST_CLOCK = 39
KVM_CAP_VCPU_EVENTS = 41
KVM_CAP_DEBUGREGS = 50
KVM_CAP_ENABLE_CAP = 54
KVM_CAP_XSAVE = 55
KVM_CAP_XCRS = 56
KVM_CAP_TSC_CONTROL = 60
KVM_CAP_GET_TSC_KHZ = 61
KVM_CAP_MAX_VCPUS = 66
KVM_CAP_TSC_DEADLINE_TIMER = 72
KVM_CAP_KVMCLOCK_CTRL = 76
KVM_CAP_SIGNAL_MSI = 77
KVM_CAP_READONLY_MEM = 81
KVM_CAP_IRQFD_RESAMPLE = 82
KVM_CAP_IOEVENTFD_NO_LENGTH = 100
KVM_CAP_CHECK_EXTENSION_VM = 105
KVM_CAP_DEVICE_CTRL = 89
KVM_CAP_IOEVENTFD_ANY_LENGTH = 122
KVM_CAP_SPLIT_IRQCHIP = 121
KVM_CAP_MAX_VCPU_ID = 128
KVM_CAP_X2APIC_API = 129
KVM_CAP_IMMEDIATE_EXIT = 136
KVM_CAP_SYNC_REGS = 74
KVM_CAP_X86_DISABLE_EXITS = 143
KVM_CAP_GET_MSR_FEATURES = 153
KVM_CAP_COALESCED_PIO = 162
KVM_CAP_EXCEPTION_PAYLOAD = 164
KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 = 168
KVM_CAP_HALT_POLL = 182
KVM_CAP_X86_USER_SPACE_MSR = 188
KVM_CAP_DIRTY_LOG_RING = 192
KVM_CAP_EXIT_ON_EMULATION_FAILURE = 204
KVM_CAP_XSAVE2 = 208
KVM_CAP_VM_TSC_CONTROL = 214
KVM_CAP_X86_TRIPLE_FAULT_EVENT = 218

# Exit reasons (kvm_run.exit_reason)
KVM_EXIT_UNKNOWN = 0
KVM_EXIT_EXCEPTION = 1
KVM_EXIT_IO = 2
KVM_EXIT_HYPERCALL = 3
KVM_EXIT_DEBUG = 4
KVM_EXIT_HLT = 5
KVM_EXIT_MMIO = 6
KVM_EXIT_IRQ_WINDOW_OPEN = 7
KVM_EXIT_SHUTDOWN = 8
KVM_EXIT_FAIL_ENTRY = 9
KVM_EXIT_INTR = 10
KVM_EXIT_SET_TPR = 11
KVM_EXIT_TPR_ACCESS = 12
KVM_EXIT_NMI = 16
KVM_EXIT_INTERNAL_ERROR = 17
KVM_EXIT_WATCHDOG = 21
KVM_EXIT_EPR = 23
KVM_EXIT_SYSTEM_EVENT = 24
KVM_EXIT_IOAPIC_EOI = 26
KVM_EXIT_HYPERV = 27
KVM_EXIT_X86_RDMSR = 29
KVM_EXIT_X86_WRMSR = 30
KVM_EXIT_DIRTY_RING_FULL = 31
KVM_EXIT_AP_RESET_HOLD = 32
KVM_EXIT_X86_BUS_LOCK = 33
KVM_EXIT_XEN = 34
KVM_EXIT_NOTIFY = 37

# Details of exits
KVM_EXIT_IO_IN = 0
KVM_EXIT_IO_OUT = 1
KVM_INTERNAL_ERROR_EMULATION = 1
KVM_INTERNAL_ERROR_SIMUL_EX = 2
KVM_INTERNAL_ERROR_DELIVERY_EV = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON = 4
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES = 1
KVM_SYSTEM_EVENT_SHUTDOWN = 1
KVM_SYSTEM_EVENT_RESET = 2
KVM_SYSTEM_EVENT_CRASH = 3

# Flags and enumerations
KVM_MEM_LOG_DIRTY_PAGES = 1
KVM_MEM_READONLY = 2
KVM_IRQFD_FLAG_DEASSIGN = 1
KVM_IRQFD_FLAG_RESAMPLE = 2
KVM_IOEVENTFD_FLAG_DATAMATCH = 1
KVM_IOEVENTFD_FLAG_PIO = 2
KVM_IOEVENTFD_FLAG_DEASSIGN = 4
KVM_PIT_SPEAKER_DUMMY = 1
KVM_CPUID_FLAG_SIGNIFCANT_INDEX = 1
KVM_MP_STATE_RUNNABLE = 0
KVM_MP_STATE_UNINITIALIZED = 1
KVM_MP_STATE_INIT_RECEIVED = 2
KVM_MP_STATE_HALTED = 3
KVM_MP_STATE_SIPI_RECEIVED = 4
KVM_CLOCK_TSC_STABLE = 2
KVM_CLOCK_REALTIME = 4
KVM_CLOCK_HOST_TSC = 8
KVM_VCPUEVENT_VALID_NMI_PENDING = 1
KVM_VCPUEVENT_VALID_SIPI_VECTOR = 2
KVM_VCPUEVENT_VALID_SHADOW = 4
KVM_VCPUEVENT_VALID_SMM = 8
KVM_VCPUEVENT_VALID_PAYLOAD = 16
KVM_VCPUEVENT_VALID_TRIPLE_FAULT = 32
KVM_SYNC_X86_REGS = 1
KVM_SYNC_X86_SREGS = 2
KVM_SYNC_X86_EVENTS = 4
KVM_COALESCED_MMIO_PAGE_OFFSET = 2
KVM_APIC_REG_SIZE = 1024

# Paravirtual interface: CPUID leaves, their feature bits, MSRs
KVM_CPUID_SIGNATURE = 0x40000000
KVM_CPUID_FEATURES = 0x40000001
MSR_KVM_WALL_CLOCK_NEW = 0x4b564d00
MSR_KVM_SYSTEM_TIME_NEW = 0x4b564d01
MSR_KVM_WALL_CLOCK = 0x11
MSR_KVM_SYSTEM_TIME = 0x12
MSR_KVM_ASYNC_PF_EN = 0x4b564d02
MSR_KVM_STEAL_TIME = 0x4b564d03
MSR_KVM_PV_EOI_EN = 0x4b564d04
MSR_KVM_POLL_CONTROL = 0x4b564d05
MSR_KVM_ASYNC_PF_INT = 0x4b564d06
MSR_KVM_ASYNC_PF_ACK = 0x4b564d07
MSR_KVM_MIGRATION_CONTROL = 0x4b564d08

# Bits of KVM_CPUID_FEATURES
KVM_FEATURE_CLOCKSOURCE = 0
KVM_FEATURE_NOP_IO_DELAY = 1
KVM_FEATURE_CLOCKSOURCE2 = 3
KVM_FEATURE_ASYNC_PF = 4
KVM_FEATURE_STEAL_TIME = 5
KVM_FEATURE_PV_EOI = 6
KVM_FEATURE_PV_UNHALT = 7
KVM_FEATURE_PV_TLB_FLUSH = 9
KVM_FEATURE_ASYNC_PF_VMEXIT = 10
KVM_FEATURE_PV_SEND_IPI = 11
KVM_FEATURE_POLL_CONTROL = 12
KVM_FEATURE_PV_SCHED_YIELD = 13
KVM_FEATURE_ASYNC_PF_INT = 14
KVM_FEATURE_MSI_EXT_DEST_ID = 15
KVM_FEATURE_HC_MAP_GPA_RANGE = 16
KVM_FEATURE_MIGRATION_CONTROL = 17
KVM_FEATURE_CLOCKSOURCE_STABLE_BIT = 24
KVM_HINTS_REALTIME = 0


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        ("slot", c_uint32), ("flags", c_uint32), ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64), ("userspace_addr", c_uint64),
    ]


class kvm_regs(Structure):
    _fields_ = [
        ("rax", c_uint64), ("rbx", c_uint64), ("rcx", c_uint64), ("rdx", c_uint64),
        ("rsi", c_uint64), ("rdi", c_uint64), ("rsp", c_uint64), ("rbp", c_uint64),
        ("r8", c_uint64), ("r9", c_uint64), ("r10", c_uint64), ("r11", c_uint64), ("r12", c_uint64),
        ("r13", c_uint64), ("r14", c_uint64), ("r15", c_uint64), ("rip", c_uint64),
        ("rflags", c_uint64),
    ]


class kvm_segment(Structure):
    _fields_ = [
        ("base", c_uint64), ("limit", c_uint32), ("selector", c_uint16), ("type", c_uint8),
        ("present", c_uint8), ("dpl", c_uint8), ("db", c_uint8), ("s", c_uint8), ("l", c_uint8),
        ("g", c_uint8), ("avl", c_uint8), ("unusable", c_uint8), ("padding", c_uint8),
    ]


class kvm_dtable(Structure):
    _fields_ = [
        ("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3),
    ]


class kvm_sregs(Structure):
    _fields_ = [
        ("cs", kvm_segment), ("ds", kvm_segment), ("es", kvm_segment), ("fs", kvm_segment),
        ("gs", kvm_segment), ("ss", kvm_segment), ("tr", kvm_segment), ("ldt", kvm_segment),
        ("gdt", kvm_dtable), ("idt", kvm_dtable), ("cr0", c_uint64), ("cr2", c_uint64),
        ("cr3", c_uint64), ("cr4", c_uint64), ("cr8", c_uint64), ("efer", c_uint64),
        ("apic_base", c_uint64), ("interrupt_bitmap", c_uint64 * 4),
    ]


class kvm_msr_entry(Structure):
    _fields_ = [
        ("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64),
    ]


class kvm_msrs(Structure):
    _fields_ = [
        ("nmsrs", c_uint32), ("pad", c_uint32), ("entries", kvm_msr_entry * 0),
    ]


class kvm_cpuid_entry2(Structure):
    _fields_ = [
        ("function", c_uint32), ("index", c_uint32), ("flags", c_uint32), ("eax", c_uint32),
        ("ebx", c_uint32), ("ecx", c_uint32), ("edx", c_uint32), ("padding", c_uint32 * 3),
    ]


class kvm_cpuid2(Structure):
    _fields_ = [
        ("nent", c_uint32), ("padding", c_uint32), ("entries", kvm_cpuid_entry2 * 0),
    ]


class kvm_pit_config(Structure):
    _fields_ = [
        ("flags", c_uint32), ("pad", c_uint32 * 15),
    ]


class kvm_irqfd(Structure):
    _fields_ = [
        ("fd", c_uint32), ("gsi", c_uint32), ("flags", c_uint32), ("resamplefd", c_uint32),
        ("pad", c_uint8 * 16),
    ]


class kvm_ioeventfd(Structure):
    _fields_ = [
        ("datamatch", c_uint64), ("addr", c_uint64), ("len", c_uint32), ("fd", c_int32),
        ("flags", c_uint32), ("pad", c_uint8 * 36),
    ]


class _kvm_coalesced_mmio_zone_u0(Union):
    _fields_ = [
        ("pad", c_uint32), ("pio", c_uint32),
    ]


class kvm_coalesced_mmio_zone(Structure):
    _anonymous_ = ("_u0",)
    _fields_ = [
        ("addr", c_uint64), ("size", c_uint32), ("_u0", _kvm_coalesced_mmio_zone_u0),
    ]


def __getattr__(name: str):  # type: ignore[no-untyped-def]
    """The structures that no start of a guest needs, imported with the first that is used."""
    if name.startswith("__"):  # __path__: `from ... import` asks every module for it
        raise AttributeError(f"{__name__} has no {name}")
    from pyvmm.kvm import _generated_more

    try:
        return getattr(_generated_more, name)
    except AttributeError:
        raise AttributeError(f"{__name__} has no {name}") from None
