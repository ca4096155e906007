"""Can this KVM run Linux? A micro-guest finds out, in milliseconds, by doing what a kernel does.

Not everything that offers /dev/kvm is a virtual CPU: a module that emulates ring 0 may lack what
every kernel needs, and a guest on it hangs or dies without a word. ``firmware/probe.S`` is the
guest; this module sets it up, bounds its time, and says in one sentence what is missing.

The answer is kept in the user's cache (``kvm-probe``) until the machine boots again or loads
another KVM module: it takes 2.5 ms, of which the kernel needs most to make and end a VM.
"""

from __future__ import annotations

import errno
import os
import struct
import threading
import time
from mmap import mmap

from pyvmm import layout
from pyvmm._core import ffi, lib
from pyvmm.errors import KvmError, NoKvmError
from pyvmm.kvm import _generated_probe as guest
from pyvmm.kvm import _generated_uapi as uapi
from pyvmm.kvm.handles import Kvm, exit_reason_name

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.kvm.handles import Vcpu

# A healthy CPU needs microseconds; an emulated one a few milliseconds.
TIMEOUT = 0.2

MEMORY_SIZE = 0x8000
# Page tables: one 2 MiB page at 0, for ring 3 too (Intel SDM vol. 3, 4.5).
PML4, PDPT, PD = 0x1000, 0x2000, 0x3000
TABLE_ENTRY = 0b111  # present, writable, user
PAGE_ENTRY = TABLE_ENTRY | 1 << 7

CR0_PE, CR0_MP, CR0_NE, CR0_WP, CR0_PG = 1, 1 << 1, 1 << 5, 1 << 16, 1 << 31
CR4_PAE, CR4_OSFXSR, CR4_OSXMMEXCPT, CR4_OSXSAVE = 1 << 5, 1 << 9, 1 << 10, 1 << 18
EFER_SCE, EFER_LME, EFER_LMA = 1, 1 << 8, 1 << 10
RFLAGS_ALWAYS = 1 << 1

FAILURES = {
    guest.STEP_START: "64-bit code does not run",
    guest.STEP_SYSCALL: "a SYSCALL in ring 3 does not reach ring 0",
    guest.STEP_SYSRET: "SYSRET does not return to ring 3",
    guest.STEP_INT80: "INT 0x80 in ring 3 does not reach ring 0 and come back",
    guest.STEP_INT3: "INT3 in ring 0 does not reach its handler",
    guest.STEP_FWAIT: "FWAIT does not work in ring 0",
    guest.STEP_LDMXCSR: "LDMXCSR does not work in ring 0",
    guest.STEP_STAC: "STAC and CLAC do not work",
    guest.STEP_POPCNT: "POPCNT does not work in ring 0",
    guest.STEP_CMPXCHG16B: "CMPXCHG16B does not work in ring 0",
    guest.STEP_XRSTOR: "XSETBV, XSAVE and XRSTOR do not work",
    guest.STEP_HYPERCALL: "a hypercall does not come back",
}

EXCEPTIONS = {6: "#UD", 7: "#NM", 8: "#DF", 11: "#NP", 12: "#SS", 13: "#GP", 14: "#PF"}
ENDINGS = {
    uapi.KVM_EXIT_HLT: "with a wrong result",
    uapi.KVM_EXIT_SHUTDOWN: "triple fault",
    uapi.KVM_EXIT_INTERNAL_ERROR: "KVM cannot emulate it",
    uapi.KVM_EXIT_FAIL_ENTRY: "the CPU refuses to enter the guest",
}


class ProbeResult:
    """What the probe found.

    `reason` is one sentence, also when all is well; `module` is the kernel module behind /dev/kvm
    ("" where unknown). `failed_step` is a ``STEP_...`` of ``_generated_probe``, or None if all
    steps passed or the guest could not be started. `milliseconds` is what the probe took, and
    `cached` whether the answer is that of an earlier one.
    """

    __slots__ = ("cached", "can_run_linux", "failed_step", "milliseconds", "module", "reason")

    def __init__(self, can_run_linux: bool, reason: str, failed_step: int | None) -> None:
        self.can_run_linux = can_run_linux
        self.reason = reason
        self.failed_step = failed_step
        self.module = kvm_module()
        self.milliseconds = 0.0
        self.cached = False


def probe(path: str = "/dev/kvm", *, fresh: bool = False) -> ProbeResult:
    """Finds out whether this machine's KVM can run Linux; `fresh`: without the cache.

    Never raises for a KVM that is missing, forbidden or broken: that is its result. Any thread.
    """
    start = time.perf_counter()
    try:
        with Kvm(path) as kvm:
            identity = _identity()
            result = None if fresh else _load(identity)
            if result is None:
                result = _run_guest(kvm)
                _store(identity, result)
    except (NoKvmError, KvmError) as error:
        result = ProbeResult(False, str(error), None)
    result.milliseconds = (time.perf_counter() - start) * 1e3
    return result


def kvm_module() -> str:
    """The module that gives /dev/kvm its CPUs: kvm_intel, kvm_amd, ...; "" where unknown."""
    return ", ".join(sorted(name for name in os.listdir("/sys/module") if name.startswith("kvm_")))


def _identity() -> str:
    """What an answer is good for: this boot, with these KVM modules loaded as they are."""
    with open("/proc/sys/kernel/random/boot_id") as file:
        words = [file.read().strip()]
    for name in sorted(name for name in os.listdir("/sys/module") if name.startswith("kvm")):
        words.append(f"{name}={os.stat(f'/sys/module/{name}').st_ino}")
    return " ".join(words)


def _cache_path() -> str:
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (base if base.startswith("/") else os.path.expanduser("~/.cache")) + "/pyvmm/kvm-probe"


def _load(identity: str) -> ProbeResult | None:
    try:
        with open(_cache_path()) as file:
            known, step, reason = file.read().split("\n")
    except (OSError, ValueError):
        return None
    if known != identity:
        return None
    result = ProbeResult(step == "", reason, int(step) if step else None)
    result.cached = True
    return result


def _store(identity: str, result: ProbeResult) -> None:
    path = _cache_path()
    step = "" if result.failed_step is None else result.failed_step
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(f"{path}.{os.getpid()}", "w") as file:
            file.write(f"{identity}\n{step}\n{result.reason}")
        os.replace(file.name, path)
    except OSError:
        pass  # no cache, then


def _run_guest(kvm: Kvm) -> ProbeResult:
    cpuid = kvm.get_supported_cpuid()
    features = _features(cpuid)
    memory = mmap(-1, MEMORY_SIZE)
    memory[: len(guest.IMAGE)] = guest.IMAGE
    struct.pack_into("<I", memory, guest.FEATURES_GPA, features)
    for table, entry in (
        (PML4, PDPT | TABLE_ENTRY),
        (PDPT, PD | TABLE_ENTRY),
        (PD, PAGE_ENTRY),
    ):
        struct.pack_into("<Q", memory, table, entry)

    with ffi.from_buffer(memory) as pin, kvm.create_vm() as vm:
        vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        vm.set_tss_addr(layout.KVM_TSS)
        vm.set_user_memory_region(0, 0, MEMORY_SIZE, int(ffi.cast("uintptr_t", pin)))
        with vm.create_vcpu(0) as vcpu:
            vcpu.set_cpuid2(cpuid)
            _set_up(vcpu, features)
            ending = _run(vcpu)
        (step,) = struct.unpack_from("<I", memory, guest.STEP_GPA)
        (vector,) = struct.unpack_from("<I", memory, guest.VECTOR_GPA)

    if step == guest.STEP_DONE:
        return ProbeResult(True, "this machine's KVM can run Linux", None)
    if vector != guest.NO_VECTOR:
        ending = EXCEPTIONS.get(vector, f"exception {vector}")
    module = kvm_module()
    kvm_name = f"this machine's KVM ({module})" if module else "this machine's KVM"
    reason = f"{kvm_name} cannot run Linux: {FAILURES[step]} ({ending})"
    return ProbeResult(False, reason, step)


def _features(cpuid: list[uapi.kvm_cpuid_entry2]) -> int:
    """The ``FEATURE_...`` that a guest with these CPUID leaves has."""
    leaves = {(entry.function, entry.index): entry for entry in cpuid}
    signature, leaf1, leaf7 = leaves[0, 0], leaves[1, 0], leaves.get((7, 0))
    features = 0
    if leaf1.ecx & 1 << 13:
        features |= guest.FEATURE_CX16
    if leaf1.ecx & 1 << 23:
        features |= guest.FEATURE_POPCNT
    if leaf1.ecx & 1 << 26:
        features |= guest.FEATURE_XSAVE
    if leaf7 is not None and leaf7.ebx & 1 << 20:
        features |= guest.FEATURE_SMAP
    if signature.ebx.to_bytes(4, "little") in (b"Auth", b"Hygo"):
        features |= guest.FEATURE_VMMCALL
    return features


def _set_up(vcpu: Vcpu, features: int) -> None:
    """Puts the vCPU into 64-bit ring 0 at the guest's entry."""
    sregs = vcpu.get_sregs()
    sregs.cr0 = CR0_PE | CR0_MP | CR0_NE | CR0_WP | CR0_PG
    sregs.cr3 = PML4
    sregs.cr4 = CR4_PAE | CR4_OSFXSR | CR4_OSXMMEXCPT
    if features & guest.FEATURE_XSAVE:
        sregs.cr4 |= CR4_OSXSAVE
    sregs.efer = EFER_SCE | EFER_LME | EFER_LMA
    flat = {"base": 0, "limit": 0xFFFFFFFF, "present": 1, "dpl": 0, "s": 1, "g": 1}
    code = uapi.kvm_segment(selector=0x08, type=0xB, l=1, **flat)
    data = uapi.kvm_segment(selector=0x10, type=0x3, db=1, **flat)
    sregs.cs = code
    sregs.ds = sregs.es = sregs.fs = sregs.gs = sregs.ss = data
    sregs.tr = uapi.kvm_segment(
        selector=0x30,
        base=guest.TSS_GPA,
        limit=guest.TSS_END_GPA - guest.TSS_GPA - 1,
        type=0xB,
        present=1,
    )
    sregs.gdt = uapi.kvm_dtable(guest.GDT_GPA, guest.GDT_END_GPA - guest.GDT_GPA - 1)
    sregs.idt = uapi.kvm_dtable(guest.IDT_GPA, guest.IDT_END_GPA - guest.IDT_GPA - 1)
    vcpu.set_sregs(sregs)
    vcpu.set_regs(uapi.kvm_regs(rip=guest.ENTRY_GPA, rsp=guest.KERNEL_STACK, rflags=RFLAGS_ALWAYS))


def _run(vcpu: Vcpu) -> str:
    """Runs the guest to its end, at most TIMEOUT seconds; returns how it ended."""
    lib.vcpu_setup_signal()
    buses = ffi.new("struct io_bus[2]")
    with ffi.from_buffer(vcpu.run_buffer) as run:
        native = lib.vcpu_create(vcpu.fd, ffi.cast("struct kvm_run *", run), buses, buses + 1)
        watchdog = threading.Timer(TIMEOUT, lib.vcpu_kick, (native,))
        watchdog.daemon = True
        watchdog.start()
        try:
            result = lib.vcpu_run(native)
        finally:
            watchdog.cancel()
            watchdog.join()
            error = lib.vcpu_error(native)
            lib.vcpu_destroy(native)
    if result == lib.VCPU_KICKED:
        return "the guest loops"
    if result == lib.VCPU_FAILED:
        return f"KVM_RUN failed with {errno.errorcode.get(error, error)}"
    if result != lib.VCPU_EXIT:
        return "the guest went astray"
    reason = vcpu.run.exit_reason
    return ENDINGS.get(reason) or exit_reason_name(reason)
