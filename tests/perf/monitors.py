"""The two monitors that are compared: the command line that gives each its best."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

MEMORY_MIB = 256


class Guest(NamedTuple):
    """What is booted. ``linux`` is False for a micro-guest, which has no use for ACPI tables."""

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    disk: Path | None = None
    linux: bool = True


def pyvmm_command(program: Path, guest: Guest) -> list[str]:
    command = [str(program), "run", "--accel", "kvm", "--memory", f"{MEMORY_MIB}M"]
    command += ["--kernel", str(guest.kernel)]
    if guest.initrd:
        command += ["--initrd", str(guest.initrd)]
    if guest.append:
        command += ["--append", guest.append]
    if guest.disk:
        command += ["--disk", f"{guest.disk},direct=on"]
    return command


def qemu_command(guest: Guest) -> list[str]:
    machine = [
        "microvm",
        # Debian's kernel finds virtio-mmio devices through ACPI alone, and powers off through it.
        f"acpi={'on' if guest.linux else 'off'}",
        # Without the option ROM that loads a kernel: microvm's firmware does it by itself.
        "x-option-roms=off",
        # Linux on KVM needs neither: it has kvm-clock and the local APIC's timer.
        "pit=off",
        "pic=off",
        "rtc=off",
        "isa-serial=on",
    ]
    command = ["qemu-system-x86_64", "-M", ",".join(machine)]
    # kvm_pvm refuses to have IA32_ARCH_CAPABILITIES set, and a guest does not miss it.
    command += ["-accel", "kvm", "-cpu", "host,-arch-capabilities", "-m", f"{MEMORY_MIB}M"]
    # No device but those named here, and no configuration file.
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    command += ["-kernel", str(guest.kernel)]
    if guest.initrd:
        command += ["-initrd", str(guest.initrd)]
    if guest.linux:
        command += ["-append", f"console=ttyS0 {guest.append}".strip()]
    if guest.disk:
        # The fastest way to a file: io_uring in a thread of its own, past the page cache; the
        # virtio of today (1.0) instead of microvm's legacy one.
        command += ["-object", "iothread,id=io", "-global", "virtio-mmio.force-legacy=off"]
        command += [
            "-drive",
            f"if=none,id=disk,format=raw,cache=none,aio=io_uring,file={guest.disk}",
        ]
        command += ["-device", "virtio-blk-device,drive=disk,iothread=io"]
    return command
