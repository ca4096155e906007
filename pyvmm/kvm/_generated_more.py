"""More structures of linux/kvm.h, asm/kvm.h, asm/kvm_para.h.

Written by scripts/generate-bindings; do not edit.
"""

from ctypes import Structure, Union, c_int32, c_uint16, c_uint32, c_uint64, c_uint8

from pyvmm.kvm._generated_uapi import kvm_regs, kvm_sregs


class kvm_translation(Structure):
    _fields_ = [
        ("linear_address", c_uint64), ("physical_address", c_uint64), ("valid", c_uint8),
        ("writeable", c_uint8), ("usermode", c_uint8), ("pad", c_uint8 * 5),
    ]


class kvm_fpu(Structure):
    _fields_ = [
        ("fpr", (c_uint8 * 16) * 8), ("fcw", c_uint16), ("fsw", c_uint16), ("ftwx", c_uint8),
        ("pad1", c_uint8), ("last_opcode", c_uint16), ("last_ip", c_uint64), ("last_dp", c_uint64),
        ("xmm", (c_uint8 * 16) * 16), ("mxcsr", c_uint32), ("pad2", c_uint32),
    ]


class kvm_xcr(Structure):
    _fields_ = [
        ("xcr", c_uint32), ("reserved", c_uint32), ("value", c_uint64),
    ]


class kvm_xcrs(Structure):
    _fields_ = [
        ("nr_xcrs", c_uint32), ("flags", c_uint32), ("xcrs", kvm_xcr * 16),
        ("padding", c_uint64 * 16),
    ]


class kvm_debugregs(Structure):
    _fields_ = [
        ("db", c_uint64 * 4), ("dr6", c_uint64), ("dr7", c_uint64), ("flags", c_uint64),
        ("reserved", c_uint64 * 9),
    ]


class kvm_lapic_state(Structure):
    _fields_ = [
        ("regs", c_uint8 * 1024),
    ]


class kvm_msr_list(Structure):
    _fields_ = [
        ("nmsrs", c_uint32), ("indices", c_uint32 * 0),
    ]


class _kvm_vcpu_events_exception(Structure):
    _fields_ = [
        ("injected", c_uint8), ("nr", c_uint8), ("has_error_code", c_uint8), ("pending", c_uint8),
        ("error_code", c_uint32),
    ]


class _kvm_vcpu_events_interrupt(Structure):
    _fields_ = [
        ("injected", c_uint8), ("nr", c_uint8), ("soft", c_uint8), ("shadow", c_uint8),
    ]


class _kvm_vcpu_events_nmi(Structure):
    _fields_ = [
        ("injected", c_uint8), ("pending", c_uint8), ("masked", c_uint8), ("pad", c_uint8),
    ]


class _kvm_vcpu_events_smi(Structure):
    _fields_ = [
        ("smm", c_uint8), ("pending", c_uint8), ("smm_inside_nmi", c_uint8),
        ("latched_init", c_uint8),
    ]


class _kvm_vcpu_events_triple_fault(Structure):
    _fields_ = [
        ("pending", c_uint8),
    ]


class kvm_vcpu_events(Structure):
    _fields_ = [
        ("exception", _kvm_vcpu_events_exception), ("interrupt", _kvm_vcpu_events_interrupt),
        ("nmi", _kvm_vcpu_events_nmi), ("sipi_vector", c_uint32), ("flags", c_uint32),
        ("smi", _kvm_vcpu_events_smi), ("triple_fault", _kvm_vcpu_events_triple_fault),
        ("reserved", c_uint8 * 26), ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


class kvm_mp_state(Structure):
    _fields_ = [
        ("mp_state", c_uint32),
    ]


class _kvm_irq_level_u0(Union):
    _fields_ = [
        ("irq", c_uint32), ("status", c_int32),
    ]


class kvm_irq_level(Structure):
    _anonymous_ = ("_u0",)
    _fields_ = [
        ("_u0", _kvm_irq_level_u0), ("level", c_uint32),
    ]


class _kvm_coalesced_mmio_u0(Union):
    _fields_ = [
        ("pad", c_uint32), ("pio", c_uint32),
    ]


class kvm_coalesced_mmio(Structure):
    _anonymous_ = ("_u0",)
    _fields_ = [
        ("phys_addr", c_uint64), ("len", c_uint32), ("_u0", _kvm_coalesced_mmio_u0),
        ("data", c_uint8 * 8),
    ]


class kvm_coalesced_mmio_ring(Structure):
    _fields_ = [
        ("first", c_uint32), ("last", c_uint32), ("coalesced_mmio", kvm_coalesced_mmio * 0),
    ]


class kvm_clock_data(Structure):
    _fields_ = [
        ("clock", c_uint64), ("flags", c_uint32), ("pad0", c_uint32), ("realtime", c_uint64),
        ("host_tsc", c_uint64), ("pad", c_uint32 * 4),
    ]


class kvm_enable_cap(Structure):
    _fields_ = [
        ("cap", c_uint32), ("flags", c_uint32), ("args", c_uint64 * 4), ("pad", c_uint8 * 64),
    ]


class _kvm_run_u0_hw(Structure):
    _fields_ = [
        ("hardware_exit_reason", c_uint64),
    ]


class _kvm_run_u0_fail_entry(Structure):
    _fields_ = [
        ("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32),
    ]


class _kvm_run_u0_ex(Structure):
    _fields_ = [
        ("exception", c_uint32), ("error_code", c_uint32),
    ]


class _kvm_run_u0_io(Structure):
    _fields_ = [
        ("direction", c_uint8), ("size", c_uint8), ("port", c_uint16), ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class kvm_debug_exit_arch(Structure):
    _fields_ = [
        ("exception", c_uint32), ("pad", c_uint32), ("pc", c_uint64), ("dr6", c_uint64),
        ("dr7", c_uint64),
    ]


class _kvm_run_u0_debug(Structure):
    _fields_ = [
        ("arch", kvm_debug_exit_arch),
    ]


class _kvm_run_u0_mmio(Structure):
    _fields_ = [
        ("phys_addr", c_uint64), ("data", c_uint8 * 8), ("len", c_uint32), ("is_write", c_uint8),
    ]


class _kvm_run_u0_internal(Structure):
    _fields_ = [
        ("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16),
    ]


class _kvm_run_u0_emulation_failure(Structure):
    _fields_ = [
        ("suberror", c_uint32), ("ndata", c_uint32), ("flags", c_uint64), ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class _kvm_run_u0_system_event_u0(Union):
    _fields_ = [
        ("flags", c_uint64), ("data", c_uint64 * 16),
    ]


class _kvm_run_u0_system_event(Structure):
    _anonymous_ = ("_u0",)
    _fields_ = [
        ("type", c_uint32), ("ndata", c_uint32), ("_u0", _kvm_run_u0_system_event_u0),
    ]


class _kvm_run_u0_eoi(Structure):
    _fields_ = [
        ("vector", c_uint8),
    ]


class _kvm_run_u0_msr(Structure):
    _fields_ = [
        ("error", c_uint8), ("pad", c_uint8 * 7), ("reason", c_uint32), ("index", c_uint32),
        ("data", c_uint64),
    ]


class _kvm_run_u0(Union):
    _fields_ = [
        ("hw", _kvm_run_u0_hw), ("fail_entry", _kvm_run_u0_fail_entry), ("ex", _kvm_run_u0_ex),
        ("io", _kvm_run_u0_io), ("debug", _kvm_run_u0_debug), ("mmio", _kvm_run_u0_mmio),
        ("internal", _kvm_run_u0_internal), ("emulation_failure", _kvm_run_u0_emulation_failure),
        ("system_event", _kvm_run_u0_system_event), ("eoi", _kvm_run_u0_eoi),
        ("msr", _kvm_run_u0_msr), ("padding", c_uint8 * 256),
    ]


class kvm_sync_regs(Structure):
    _fields_ = [
        ("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events),
    ]


class _kvm_run_s(Union):
    _fields_ = [
        ("regs", kvm_sync_regs), ("padding", c_uint8 * 2048),
    ]


class kvm_run(Structure):
    _anonymous_ = ("_u0",)
    _fields_ = [
        ("request_interrupt_window", c_uint8), ("immediate_exit", c_uint8), ("_gap2", c_uint8 * 6),
        ("exit_reason", c_uint32), ("ready_for_interrupt_injection", c_uint8), ("if_flag", c_uint8),
        ("flags", c_uint16), ("cr8", c_uint64), ("apic_base", c_uint64), ("_u0", _kvm_run_u0),
        ("kvm_valid_regs", c_uint64), ("kvm_dirty_regs", c_uint64), ("s", _kvm_run_s),
    ]
