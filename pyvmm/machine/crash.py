"""The report about a guest that cannot go on."""

from __future__ import annotations

from pyvmm.errors import GuestCrash
from pyvmm.kvm import _generated_uapi as uapi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.handles import Vcpu
    from pyvmm.machine.memory import GuestMemory

CODE_BYTES = 16
RESET_RIP = 0xFFF0
RESET_CS_BASE = 0xFFFF_0000

_EXIT_NAMES = {
    value: name
    for name, value in vars(uapi).items()
    if name.startswith("KVM_EXIT_") and not name.startswith("KVM_EXIT_IO_")
}


def describe(vcpu: Vcpu, index: int, memory: GuestMemory) -> GuestCrash:
    """What the exit in ``vcpu.run`` means: the reason in one sentence, the registers and the code.

    On the thread of the vCPU, after KVM_RUN returned.
    """
    error = GuestCrash(f"the guest crashed: vCPU {index} {_reason(vcpu)}")
    if _was_reset(vcpu):
        error.add_note("  its registers are lost: on AMD processors a shutdown resets the vCPU")
    else:
        for line in (*_registers(vcpu), _code(vcpu, memory)):
            error.add_note(line)
    return error


def _was_reset(vcpu: Vcpu) -> bool:
    """Whether the registers are those of a processor after INIT (AMD64 APM vol. 2, 14.1.3)."""
    sregs = vcpu.get_sregs()
    return bool(vcpu.get_regs().rip == RESET_RIP and sregs.cs.base == RESET_CS_BASE)


def _reason(vcpu: Vcpu) -> str:
    run = vcpu.run
    match run.exit_reason:
        case uapi.KVM_EXIT_SHUTDOWN:
            return "took a triple fault"
        case uapi.KVM_EXIT_INTERNAL_ERROR if (
            run.internal.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
        ):
            return "executed an instruction that KVM cannot emulate"
        case uapi.KVM_EXIT_INTERNAL_ERROR:
            return f"met an internal error of KVM (suberror {run.internal.suberror})"
        case uapi.KVM_EXIT_FAIL_ENTRY:
            reason = run.fail_entry.hardware_entry_failure_reason
            return f"could not be entered (hardware reason {reason:#x})"
        case reason:
            return f"ended with exit {reason} ({_EXIT_NAMES.get(reason, 'unknown')})"


def _registers(vcpu: Vcpu) -> list[str]:
    regs = vcpu.get_regs()
    sregs = vcpu.get_sregs()
    names = [name for name, *_ in regs._fields_]
    lines = [
        "  ".join(f"{name:>6} {getattr(regs, name):016x}" for name in names[start : start + 4])
        for start in range(0, len(names), 4)
    ]
    lines.append(
        f"   cr0 {sregs.cr0:016x}     cr2 {sregs.cr2:016x}     cr3 {sregs.cr3:016x}"
        f"     cr4 {sregs.cr4:016x}"
    )
    lines.append(f"  efer {sregs.efer:016x}      cs {sregs.cs.selector:04x} base {sregs.cs.base:x}")
    return lines


def _code(vcpu: Vcpu, memory: GuestMemory) -> str:
    linear = vcpu.get_sregs().cs.base + vcpu.get_regs().rip
    gpa = vcpu.translate(linear)
    if gpa is None:
        return f"  code at {linear:#x} is not mapped"
    try:
        code = memory.view(gpa, CODE_BYTES)
    except ValueError:
        return f"  code at {linear:#x} (guest-physical {gpa:#x}) is not in RAM"
    return f"  code at {linear:#x}: {bytes(code).hex(' ')}"
