"""``pyvmm doctor``: what this machine can do, and how to mend what it cannot."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import platform
import shutil
import sys
import textwrap
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pyvmm.errors import ExitStatus, NoKvmError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from pyvmm.kvm.handles import Kvm

    State = Literal["ok", "limited", "missing"]

_EPILOG = """\
'ok' is as it should be; '--' is missing, but only some uses need it; 'NO' keeps 'pyvmm run' from
using /dev/kvm. What runs without /dev/kvm runs in an emulated machine ('pyvmm nested'), slowly.

exit status:
  0    'pyvmm run' works here, on /dev/kvm or in an emulated machine
  71   it does not
"""

KVM_DEVICE = "/dev/kvm"
TUN_DEVICE = "/dev/net/tun"
VHOST_NET_DEVICE = "/dev/vhost-net"

# Without these pyvmm cannot run a guest; all are in Linux 4.13 or older.
_NEEDED_CAPABILITIES = (
    "USER_MEMORY",
    "DESTROY_MEMORY_REGION_WORKS",
    "IRQCHIP",
    "PIT2",
    "IRQFD",
    "IOEVENTFD",
    "SET_TSS_ADDR",
    "SET_IDENTITY_MAP_ADDR",
    "EXT_CPUID",
    "MP_STATE",
    "IMMEDIATE_EXIT",
)
# What pyvmm uses where it is there.
_WELCOME_CAPABILITIES = {
    "READONLY_MEM": "registers of devices are read with an exit each",
    "COALESCED_MMIO": "interrupts are acknowledged with an exit each",
    "TSC_DEADLINE_TIMER": "guests use a slower timer",
    "KVMCLOCK_CTRL": "guests complain after a pause",
}
# Extension modules that are built where their library is found: what they serve, and its package.
_OPTIONAL_MODULES = {
    "_slirp": ("network", "--net user", "libslirp-dev"),
    "_nbd": ("storage", "--disk nbd=", "libnbd-dev"),
    "_iscsi": ("storage", "iscsi://", "libiscsi-dev"),
}
# Programs that pyvmm starts where they are asked for, likewise.
_OPTIONAL_PROGRAMS = {
    "passt": ("network", "--net passt", "passt"),
    "qemu-nbd": ("storage", "qcow2 and others", "qemu-utils"),
}
_CAP_NET_ADMIN = 1 << 12
_MIB = 1 << 20


@dataclass(frozen=True)
class Check:
    """One line of the report; `fix` is what mends a `state` that is not "ok"."""

    group: str
    name: str
    state: State
    text: str
    fix: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """`accel` is what ``pyvmm run`` would use: "kvm", "nested" or None for nothing."""

    accel: Literal["kvm", "nested"] | None
    summary: str
    checks: list[Check]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = _EPILOG
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(args: argparse.Namespace) -> int:
    diagnosis = diagnose()
    if args.json:
        print(json.dumps(asdict(diagnosis), indent=2))
    else:
        tty = sys.stdout.isatty()
        width = shutil.get_terminal_size().columns if tty else 100
        print(render(diagnosis, width=width, color=tty and not os.environ.get("NO_COLOR")))
    return ExitStatus.NO_KVM if diagnosis.accel is None else ExitStatus.OK


def diagnose() -> Diagnosis:
    """Runs all checks; some ms, no lasting effect."""
    checks = list(_check_libraries())
    if any(check.state == "missing" for check in checks):
        return Diagnosis(None, "pyvmm run does not work here: pyvmm is not complete.", checks)
    kvm, nested = list(_check_kvm()), _check_nested()
    checks += [*kvm, nested, *_check_host(), *_check_network(), *_check_optional()]
    against_kvm = [check.text for check in kvm if check.state == "missing"]
    if not against_kvm:
        return Diagnosis("kvm", "pyvmm run works here, on /dev/kvm.", checks)
    if nested.state == "ok":
        summary = "pyvmm run works here, in an emulated machine: slow, but true to hardware."
        return Diagnosis("nested", summary, checks)
    return Diagnosis(None, f"pyvmm run does not work here: {against_kvm[0]}.", checks)


def render(diagnosis: Diagnosis, *, width: int, color: bool) -> str:
    """The report as text, in lines of at most `width` columns where its words allow."""
    marks = {"ok": ("ok", "32"), "limited": ("--", "33"), "missing": ("NO", "31")}
    names = max(len(check.name) for check in diagnosis.checks)
    indent = " " * (names + 8)
    lines: list[str] = []
    for check in diagnosis.checks:
        title = _paint(check.group, "1", color)
        if title not in lines:
            lines += ["", title]
        mark, code = marks[check.state]
        text = _wrap(check.text, width, indent)
        lines.append(f"  {_paint(mark, code, color)}  {check.name:{names}}  {text}")
        if check.fix:
            label = _paint("fix:", "1", color)
            lines.append(f"{indent}{label} {_wrap(check.fix, width - 5, indent + '     ')}")
    code = "31" if diagnosis.accel is None else "32"
    return "\n".join([*lines[1:], "", _paint(_wrap(diagnosis.summary, width, ""), code, color)])


def _wrap(text: str, width: int, indent: str) -> str:
    """The text in several lines, all but the first with their indentation."""
    room = max(width - len(indent), 20)
    lines = textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
    return f"\n{indent}".join(lines)


def _paint(text: str, code: str, color: bool) -> str:
    return f"\033[{code}m{text}\033[0m" if color else text


def _check_libraries() -> Iterator[Check]:
    from importlib import import_module
    from importlib.metadata import version

    versions = []
    for module, package in (("cffi", "cffi"), ("elftools", "pyelftools"), ("pyvmm._core", "pyvmm")):
        try:
            import_module(module)
        except ImportError as error:
            fix = "scripts/setup" if package == "pyvmm" else f"pip install {package}"
            yield Check("pyvmm", package, "missing", f"{module} does not load: {error}", fix)
        else:
            versions.append(f"{package} {version(package)}")
    if len(versions) == 3:
        text = ", ".join([*versions[::-1], f"Python {platform.python_version()}"])
        yield Check("pyvmm", "libraries", "ok", text)


def _check_kvm() -> Iterator[Check]:
    group = "KVM"
    if platform.machine() != "x86_64":
        yield Check(group, "processor", "missing", f"{platform.machine()}; pyvmm is for x86-64")
        return
    from pyvmm.kvm.handles import Kvm
    from pyvmm.kvm.probe import kvm_module, probe

    try:
        kvm = Kvm(KVM_DEVICE)
    except NoKvmError as error:
        text, _, fix = str(error).partition(": ")
        yield Check(group, "device", "missing", text, fix)
        return
    with kvm:
        module = f", module {kvm_module()}" if kvm_module() else ""
        yield Check(group, "device", "ok", f"{KVM_DEVICE} opens{module}")
        yield _check_capabilities(group, kvm)
    result = probe(KVM_DEVICE, fresh=True)
    if result.can_run_linux:
        took = f"{result.milliseconds:.1f} ms"
        yield Check(group, "Linux guests", "ok", f"run: a probe passed all its steps in {took}")
    else:
        yield Check(
            group,
            "Linux guests",
            "missing",
            result.reason,
            "use a machine with kvm_intel or kvm_amd; until then, guests run in an emulated one",
        )


def _check_capabilities(group: str, kvm: Kvm) -> Check:
    from pyvmm.kvm import _generated_uapi as uapi

    def has(name: str) -> bool:
        return kvm.check_extension(getattr(uapi, f"KVM_CAP_{name}")) > 0

    missing = [name for name in _NEEDED_CAPABILITIES if not has(name)]
    if missing:
        text = f"this KVM lacks {', '.join(missing)}"
        return Check(group, "capabilities", "missing", text, "boot a newer Linux kernel")
    unwelcome = [
        f"no {name}: {what}" for name, what in _WELCOME_CAPABILITIES.items() if not has(name)
    ]
    if unwelcome:
        text = "; ".join(unwelcome)
        return Check(group, "capabilities", "limited", text, "boot a newer Linux kernel")
    count = len(_NEEDED_CAPABILITIES) + len(_WELCOME_CAPABILITIES)
    return Check(group, "capabilities", "ok", f"all {count} that pyvmm uses")


def _check_nested() -> Check:
    from pyvmm.nested import why_not

    reason = why_not()
    if reason is None:
        text = "QEMU and virtiofsd are there for 'pyvmm nested'"
        return Check("KVM", "emulated machine", "ok", text)
    text, _, fix = reason.partition(": ")
    return Check("KVM", "emulated machine", "limited", text, fix)


def _check_host() -> Iterator[Check]:
    group = "host"
    cpus = len(os.sched_getaffinity(0))
    yield Check(group, "CPUs", "ok", f"{cpus} x {_cpu_model()}, Linux {platform.release()}")

    memory = _meminfo()
    total, available = memory["MemTotal"] // _MIB, memory["MemAvailable"] // _MIB
    text = f"{available} MiB available of {total} MiB"
    if available < 512:
        fix = "give guests less than that with --memory"
        yield Check(group, "memory", "limited", text, fix)
    else:
        yield Check(group, "memory", "ok", text)

    size, free = memory["Hugepagesize"] // _MIB, memory["HugePages_Free"]
    if free:
        yield Check(group, "huge pages", "ok", f"{free} of {size} MiB are free")
    else:
        text = "none are free; only --hugepages needs them"
        fix = "sudo sysctl vm.nr_hugepages=256 (for a guest of 512 MiB)"
        yield Check(group, "huge pages", "limited", text, fix)
    yield _check_io_uring(group)


def _check_io_uring(group: str) -> Check:
    from pyvmm._core import lib

    error = -lib.blk_io_uring_check()
    if not error:
        return Check(group, "io_uring", "ok", "serves disks")
    if error == errno.ENOSYS:
        fix = "boot Linux 5.13 or newer"
    elif Path("/proc/sys/kernel/io_uring_disabled").read_text().strip() != "0":
        fix = "sudo sysctl kernel.io_uring_disabled=0"
    else:
        fix = "start this container with --security-opt seccomp=unconfined"
    text = f"disks are served without it, more slowly ({os.strerror(error)})"
    return Check(group, "io_uring", "limited", text, fix)


def _check_network() -> Iterator[Check]:
    group = "network"
    yield _check_device(group, "tap", TUN_DEVICE, "tun")
    yield _check_device(group, "vhost-net", VHOST_NET_DEVICE, "vhost_net")


def _check_optional() -> Iterator[Check]:
    checks = []
    for module, (group, name, package) in _OPTIONAL_MODULES.items():
        library = package.removesuffix("-dev")
        if importlib.util.find_spec(f"pyvmm.{module}"):
            checks.append(Check(group, name, "ok", f"{library} is there"))
        else:
            text = f"pyvmm was built without {library}"
            fix = f"apt install {package}, then scripts/setup"
            checks.append(Check(group, name, "limited", text, fix))
    for program, (group, name, package) in _OPTIONAL_PROGRAMS.items():
        if shutil.which(program):
            checks.append(Check(group, name, "ok", f"{program} is there"))
        else:
            text = f"{program} is not installed"
            checks.append(Check(group, name, "limited", text, f"apt install {package}"))
    yield from sorted(checks, key=lambda check: check.group)


def _check_device(group: str, name: str, path: str, module: str) -> Check:
    from pyvmm.kvm.diagnosis import how_to_be_allowed, in_container

    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        in_it = f"start this container with --device {path}"
        fix = in_it if in_container() else f"sudo modprobe {module}"
        return Check(group, name, "limited", f"{path} is missing", fix)
    except PermissionError:
        fix = how_to_be_allowed(path)
        return Check(group, name, "limited", f"you may not open {path}", fix)
    except OSError as error:
        text = f"{path} does not open ({error.strerror})"
        return Check(group, name, "limited", text, f"sudo modprobe {module}")
    if path == TUN_DEVICE and not _effective_capabilities() & _CAP_NET_ADMIN:
        text = f"{path} opens, but making a tap device needs CAP_NET_ADMIN"
        fix = "have one made for you: sudo ip tuntap add pyvmm0 mode tap user $USER"
        return Check(group, name, "limited", text, fix)
    return Check(group, name, "ok", f"{path} opens")


def _effective_capabilities() -> int:
    """The capabilities of this process (capabilities(7))."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("\nCapEff:")[2].partition("\n")[0], 16)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    return cpuinfo.partition("\nmodel name")[2].partition("\n")[0].lstrip("\t: ")


def _meminfo() -> dict[str, int]:
    """/proc/meminfo, sizes in bytes."""
    values = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, value, *unit = line.split()
        values[name.rstrip(":")] = int(value) * (1024 if unit else 1)
    return values
