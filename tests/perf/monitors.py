"""The two monitors that are compared: the command line that gives each its best."""

from __future__ import annotations

import json
import socket
import time
from pathlib import Path
from typing import NamedTuple

from perf.process import GuestFailed

MEMORY_MIB = 256


class Disk(NamedTuple):
    """A raw image as a virtio-blk device, or behind virtio-scsi if ``bus`` is "scsi"."""

    image: Path
    bus: str = "blk"
    queues: int = 1


class Net(NamedTuple):
    """A virtio-net device on the tap interface ``tap``, or without one on user networking."""

    tap: str | None = None
    vhost: bool = False


class Balloon(NamedTuple):
    """A virtio-balloon that takes ``mib`` from the guest. QEMU is told so at the socket ``qmp``."""

    mib: int
    qmp: Path


class Guest(NamedTuple):
    """What is booted. ``linux`` is False for a micro-guest, which has no use for ACPI tables."""

    kernel: Path
    initrd: Path | None = None
    append: str = ""
    disk: Disk | None = None
    net: Net | None = None
    balloon: Balloon | None = None
    port: Path | None = None  # the socket of a virtio-serial port
    cpus: int = 1
    linux: bool = True


def pyvmm_command(program: Path, guest: Guest) -> list[str]:
    command = [str(program), "run", "--accel", "kvm", "--memory", f"{MEMORY_MIB}M"]
    command += ["--kernel", str(guest.kernel)]
    if guest.cpus > 1:
        command += ["--cpus", str(guest.cpus)]
    if guest.initrd:
        command += ["--initrd", str(guest.initrd)]
    if guest.append:
        command += ["--append", guest.append]
    if guest.disk:
        image, bus, queues = guest.disk
        command += ["--disk", f"{image},direct=on"]
        if bus == "scsi":
            command[-1] += ",bus=scsi"
            command += ["--scsi", f"queues={queues}"]
        else:
            command[-1] += f",queues={queues}"
    if guest.net:
        tap, vhost = guest.net
        command += ["--net", f"tap={tap}{',vhost=on' if vhost else ''}" if tap else "user"]
    if guest.balloon:
        command += ["--balloon", f"{guest.balloon.mib}M"]
    if guest.port:
        command += ["--port", f"bench,unix={guest.port}"]
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
    command += ["-smp", str(guest.cpus)]
    # No device but those named here, and no configuration file.
    command += ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    command += ["-kernel", str(guest.kernel)]
    if guest.initrd:
        command += ["-initrd", str(guest.initrd)]
    if guest.linux:
        command += ["-append", f"console=ttyS0 {guest.append}".strip()]
    # The virtio of today (1.0) instead of microvm's legacy one.
    command += ["-global", "virtio-mmio.force-legacy=off"]
    if guest.disk:
        image, bus, queues = guest.disk
        # The fastest way to a file: io_uring in a thread of its own, past the page cache.
        command += ["-object", "iothread,id=io"]
        command += ["-drive", f"if=none,id=disk,format=raw,cache=none,aio=io_uring,file={image}"]
        if bus == "scsi":
            command += ["-device", f"virtio-scsi-device,id=scsi,iothread=io,num_queues={queues}"]
            command += ["-device", "scsi-hd,bus=scsi.0,drive=disk"]
        else:
            device = f"virtio-blk-device,drive=disk,iothread=io,num-queues={queues}"
            command += ["-device", device]
    if guest.net:
        tap, vhost = guest.net
        script = f"script=no,downscript=no,vhost={'on' if vhost else 'off'}"
        command += ["-netdev", f"tap,id=net,ifname={tap},{script}" if tap else "user,id=net"]
        command += ["-device", "virtio-net-device,netdev=net"]
    if guest.balloon:
        command += ["-device", "virtio-balloon-device"]
        command += ["-qmp", f"unix:{guest.balloon.qmp},server=on,wait=off"]
    if guest.port:
        command += ["-chardev", f"socket,id=port,path={guest.port},server=on,wait=off"]
        command += ["-device", "virtio-serial-device"]
        command += ["-device", "virtserialport,chardev=port,name=bench"]
    return command


def set_qemu_balloon(balloon: Balloon, seconds: float) -> None:
    """Has a QEMU, which may just have been started, take the memory from its guest."""
    commands = (
        {"execute": "qmp_capabilities"},
        {"execute": "balloon", "arguments": {"value": (MEMORY_MIB - balloon.mib) << 20}},
    )
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(seconds)
        while client.connect_ex(str(balloon.qmp)):
            if time.monotonic() > deadline:
                raise GuestFailed("has no QMP socket")
            time.sleep(0.01)
        with client.makefile("rw") as stream:
            stream.readline()  # the greeting
            for command in commands:
                stream.write(json.dumps(command))
                stream.flush()
                while "return" not in (answer := json.loads(stream.readline())):
                    if "error" in answer:
                        raise GuestFailed(f"answers {command} with {answer}")
