"""Why KVM refused: errors turned into one sentence that names the cause and the mend.

Imported only when something failed.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path

# What usually causes the error of an ioctl. Sources: Documentation/virt/kvm/api.rst and the code.
_CAUSES = {
    "KVM_CREATE_VM": {
        errno.EBUSY: "another hypervisor (VirtualBox, VMware) holds the CPU: stop it",
    },
    "KVM_CREATE_VCPU": {
        errno.EINVAL: "more vCPUs than this KVM supports",
        errno.EEXIST: "a vCPU with this id exists already",
    },
    "KVM_SET_USER_MEMORY_REGION": {
        errno.EINVAL: "an address or size is not a multiple of the page size, or too many slots",
        errno.EEXIST: "the range overlaps another slot",
        errno.EFAULT: "the host memory is not mapped",
    },
    "KVM_SET_TSS_ADDR": {
        errno.EINVAL: "the address is not below 4 GiB",
    },
    "KVM_SET_IDENTITY_MAP_ADDR": {
        errno.EINVAL: "a vCPU exists already",
    },
    "KVM_CREATE_IRQCHIP": {
        errno.EEXIST: "the VM has an interrupt controller already",
        errno.EINVAL: "a vCPU exists already",
    },
    "KVM_CREATE_PIT2": {
        errno.EEXIST: "the VM has a timer already",
        errno.ENOENT: "the VM has no interrupt controller yet",
    },
    "KVM_IRQ_LINE": {
        errno.ENXIO: "the VM has no interrupt controller",
    },
    "KVM_IRQFD": {
        errno.EBUSY: "this eventfd serves a GSI already",
        errno.EINVAL: "the VM has no interrupt controller, or the fd is no eventfd",
    },
    "KVM_IOEVENTFD": {
        errno.EEXIST: "the address and value have an eventfd already",
        errno.ENOENT: "there is no such ioeventfd to remove",
        errno.ENOSPC: "too many devices on this bus",
        errno.EINVAL: "a length that KVM does not know, or the fd is no eventfd",
    },
    "KVM_REGISTER_COALESCED_MMIO": {
        errno.ENOSPC: "too many devices on this bus",
    },
    "KVM_SET_CPUID2": {
        errno.E2BIG: "more than 256 entries",
        errno.EINVAL: "the vCPU has run already, or a leaf contradicts itself",
    },
    "KVM_SET_SREGS": {
        errno.EINVAL: "CR0, CR4, EFER and CS contradict each other",
    },
    "KVM_SET_LAPIC": {
        errno.EINVAL: "the VM has no interrupt controller",
    },
    "KVM_GET_LAPIC": {
        errno.EINVAL: "the VM has no interrupt controller",
    },
    "KVM_SET_MP_STATE": {
        errno.EINVAL: "the VM has no interrupt controller",
    },
    "KVM_KVMCLOCK_CTRL": {
        errno.EINVAL: "the guest has not turned kvmclock on",
    },
    "KVM_RUN": {
        errno.EFAULT: "guest memory that the host cannot provide",
    },
}
_COMMON_CAUSES = {
    errno.EBADF: "the handle is closed",
    errno.EIO: "the VM belongs to another process, or KVM gave it up",
    errno.EMFILE: "too many open files: raise the limit with ulimit -n",
    errno.ENFILE: "too many open files on this machine",
    errno.ENOMEM: "the host is short of memory",
    errno.ENOTTY: "this machine's KVM does not know it",
    errno.ENXIO: "this machine's KVM does not have it",
}


def explain_ioctl(name: str, error: int) -> str:
    """One sentence for an ioctl that failed with errno `error`."""
    code = errno.errorcode.get(error, str(error))
    sentence = f"{name} failed with {code} ({os.strerror(error)})"
    cause = _CAUSES.get(name, {}).get(error) or _COMMON_CAUSES.get(error)
    return f"{sentence}: {cause}" if cause else sentence


def why_not_open(path: str, error: OSError) -> str:
    """One sentence for a KVM device that could not be opened."""
    if error.errno == errno.ENOENT:
        return f"{path} is missing: {how_to_get_kvm()}"
    if error.errno in (errno.ENODEV, errno.ENXIO):
        return f"{path} has no driver: {how_to_get_kvm()}"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"you may not open {path}: {how_to_be_allowed(path)}"
    return f"cannot open {path} ({error.strerror}): see pyvmm doctor"


def why_not_kvm(path: str, error: int) -> str:
    """One sentence for a file that answers no KVM ioctl."""
    code = errno.errorcode.get(error, str(error))
    return f"{path} is not the KVM device ({code}): remove it, then {how_to_get_kvm()}"


def how_to_get_kvm() -> str:
    """What makes a KVM device appear on this machine."""
    flags = cpu_flags()
    if in_container():
        return "start this container with --device /dev/kvm"
    module = "kvm_intel" if "vmx" in flags else "kvm_amd" if "svm" in flags else ""
    if module:
        return f"sudo modprobe {module}"
    if "hypervisor" in flags:
        return "turn on nested virtualization for this virtual machine in its hypervisor"
    return "turn on virtualization (Intel VT-x, AMD-V) in this machine's firmware setup"


def cpu_flags() -> set[str]:
    """The names of the CPU's features, from /proc/cpuinfo."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    return set(cpuinfo.partition("\nflags")[2].partition("\n")[0].split())


def in_container() -> bool:
    """Whether this is a container, which gets devices and modules from its host only."""
    return any(Path(mark).exists() for mark in ("/.dockerenv", "/run/.containerenv"))


def how_to_be_allowed(path: str) -> str:
    """What gives this user read and write access to `path`."""
    import grp
    import pwd

    status = os.stat(path)
    group = str(status.st_gid)
    with suppress(KeyError):
        group = grp.getgrgid(status.st_gid).gr_name
    if status.st_mode & 0o060 != 0o060 or status.st_gid == 0:
        return (
            f"only {pwd.getpwuid(status.st_uid).pw_name} has access: "
            f"sudo chgrp kvm {path} && sudo chmod 660 {path} && sudo usermod -aG kvm $USER, "
            "then log in again"
        )
    if group.isdigit():
        return f"it belongs to group {group}: start this container with --group-add {group}"
    with suppress(KeyError):
        if pwd.getpwuid(os.getuid()).pw_name in grp.getgrnam(group).gr_mem:
            return f"you joined its group {group} after you logged in: log in again"
    return f"it belongs to group {group}: sudo usermod -aG {group} $USER, then log in again"
