"""The guests: kernels from the image cache, and two small programs built from guest-images."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from pyvmm import images
from pyvmm.boot.bzimage import BzImage
from pyvmm.boot.payload import unpack
from pyvmm.images import cpio

_ROOT = Path(__file__).parents[2]
_SOURCES = _ROOT / "guest-images"
_DISK_SIZE = 256 << 20

# Image of 'pyvmm images' whose kernel is booted: what the table calls it.
LINUX_KERNELS = {"minimal": "small vmlinux", "tiny": "Debian's bzImage"}
# Unpacked for both monitors, as QEMU then starts it faster, too.
_UNPACKED = "minimal"


class Guests(NamedTuple):
    """Files of the guests; ``kernels`` are those of the images in `LINUX_KERNELS`."""

    kernels: dict[str, Path]
    initrd: Path
    disk: Path
    micro: Path


def prepare(directory: Path, *, linux: bool) -> Guests:
    """Puts everything into ``directory``; what only Linux guests need is left out if not ``linux``.

    On a tmpfs both monitors read and write memory, and none waits for the host's disk.
    """
    guests = Guests(
        kernels={name: directory / f"kernel-{name}" for name in LINUX_KERNELS},
        initrd=directory / "initrd",
        disk=directory / "disk.img",
        micro=directory / "first_byte.elf",
    )
    _build_micro(guests.micro)
    if linux:
        for name, path in guests.kernels.items():
            kernel = images.path(name).kernel
            if name == _UNPACKED:
                path.write_bytes(_vmlinux(kernel))
            else:
                shutil.copyfile(kernel, path)
        guests.initrd.write_bytes(_initramfs(directory / "init"))
        # Not zeroes: every page of the file is there.
        block = bytes(range(256)) * 4096
        with guests.disk.open("wb") as disk:
            for _ in range(_DISK_SIZE // len(block)):
                disk.write(block)
    return guests


def _vmlinux(kernel: Path) -> bytes:
    data = kernel.read_bytes()
    image = BzImage(data[:4096], len(data), str(kernel))
    payload = data[image.payload_offset :][: image.payload_size]
    return unpack(bytearray(payload), str(kernel))[:]


def _build_micro(program: Path) -> None:
    options = "-Wl,-Ttext=0x1000000,--build-id=none,-z,noexecstack"
    source = _SOURCES / "micro" / "first_byte.S"
    subprocess.run(["gcc", "-nostdlib", "-static", options, "-o", program, source], check=True)


def _initramfs(program: Path) -> bytes:
    source = _SOURCES / "bench" / "init.c"
    subprocess.run(["gcc", "-O2", "-static", "-s", "-o", program, source], check=True)
    archive = cpio.Archive()
    archive.directory("dev")
    archive.file("init", program.read_bytes(), 0o755)
    return archive.to_bytes()
