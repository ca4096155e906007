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


class Kernel(NamedTuple):
    """A vmlinux, unpacked for both monitors, as QEMU then starts it faster, too; and an initramfs
    with the program of guest-images/bench."""

    vmlinux: Path
    initrd: Path


class Guests(NamedTuple):
    """Files of the guests. The ``small`` kernel has the program as its init, the ``stock`` one of
    Debian, which has drivers for everything, as /bin/bench; ``program`` itself is for the host."""

    small: Kernel
    stock: Kernel
    bzimage: Path
    disk: Path
    micro: Path
    program: Path


def prepare(directory: Path, *, linux: bool) -> Guests:
    """Puts everything into ``directory``; what only Linux guests need is left out if not ``linux``.

    On a tmpfs both monitors read and write memory, and none waits for the host's disk.
    """
    guests = Guests(
        small=Kernel(directory / "small", directory / "small-initrd"),
        stock=Kernel(directory / "stock", directory / "stock-initrd"),
        bzimage=directory / "bzimage",
        disk=directory / "disk.img",
        micro=directory / "first_byte.elf",
        program=directory / "bench",
    )
    build_micro(guests.micro)
    if linux:
        small, stock = (images.path(name) for name in LINUX_KERNELS)
        guests.small.vmlinux.write_bytes(_vmlinux(small.kernel))
        guests.stock.vmlinux.write_bytes(_vmlinux(stock.kernel))
        shutil.copyfile(stock.kernel, guests.bzimage)
        build_program(guests.program)
        program = guests.program.read_bytes()
        guests.small.initrd.write_bytes(_archive("init", program))
        # An initramfs may be several archives, one after the other.
        guests.stock.initrd.write_bytes(stock.initrd.read_bytes() + _archive("bin/bench", program))
        # Not zeroes: every page of the file is there.
        block = bytes(range(256)) * 4096
        with guests.disk.open("wb") as disk:
            for _ in range(_DISK_SIZE // len(block)):
                disk.write(block)
    return guests


def build_program(path: Path) -> None:
    """The program of guest-images/bench, static, so that it runs in every guest."""
    source = _SOURCES / "bench" / "bench.c"
    command = ["gcc", "-O2", "-Wall", "-Werror", "-static", "-s", "-pthread"]
    subprocess.run([*command, "-o", path, source], check=True)


def _vmlinux(kernel: Path) -> bytes:
    data = kernel.read_bytes()
    image = BzImage(data[:4096], len(data), str(kernel))
    payload = data[image.payload_offset :][: image.payload_size]
    return unpack(bytearray(payload), str(kernel))[:]


def build_micro(program: Path) -> None:
    options = "-Wl,-Ttext=0x1000000,--build-id=none,-z,noexecstack"
    source = _SOURCES / "micro" / "first_byte.S"
    subprocess.run(["gcc", "-nostdlib", "-static", options, "-o", program, source], check=True)


def _archive(name: str, program: bytes) -> bytes:
    archive = cpio.Archive()
    archive.directory("dev")
    archive.directory("sys")
    archive.file(name, program, 0o755)
    return archive.to_bytes()
