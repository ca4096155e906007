"""The kernel and initramfs of the emulated machine, made once from Debian's kernel package."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path
from typing import NamedTuple

from pyvmm.boot.bzimage import BzImage
from pyvmm.boot.payload import unpack
from pyvmm.errors import PyvmmError
from pyvmm.images import apt, cache, cpio, kmod

KERNEL_PACKAGE = r"linux-image-6\.12\.[^-]*-cloud-amd64"

# Loaded before the command starts, with parameters. Without vgif=0 and vls=0 about one guest in 60
# hangs on the SVM that QEMU emulates.
BOOT_MODULES = {"kvm": "", "kvm_amd": "vgif=0 vls=0"}
# Loaded when something first opens their device node, asks the kernel for them, or calls modprobe.
LAZY_MODULES = (
    "bridge",
    "loop",
    "null_blk",
    "overlay",
    "scsi_debug",
    "tap",
    "tun",
    "veth",
    "vhost_net",
    "vhost_scsi",
    "vhost_vsock",
)
# What a module needs to be of use though it does not depend on it: nothing here loads modules for
# devices that appear.
_COMPANIONS = {"scsi_debug": ("sd_mod", "sg")}


class Bundle(NamedTuple):
    """Files that QEMU boots."""

    kernel: Path
    initrd: Path


def bundle() -> Bundle:
    """The bundle from the cache; fetched and built if it is not there."""
    init = _init_program()
    # This module is the recipe: a change of it makes another bundle.
    key = hashlib.sha256(Path(__file__).read_bytes() + init).hexdigest()[:16]
    directory = cache.entry(f"nested/{key}", lambda directory: _make(directory, init))
    return Bundle(directory / "vmlinux", directory / "initrd")


def _make(directory: Path, init: bytes) -> None:
    package = apt.unpacked(apt.newest(KERNEL_PACKAGE))
    modules = kmod.Modules(package)
    kernel = package / "boot" / f"vmlinuz-{modules.release}"
    (directory / "vmlinux").write_bytes(_vmlinux(kernel))
    (directory / "initrd").write_bytes(initramfs(modules, init))


def _vmlinux(path: Path) -> bytes:
    """The ELF file in a bzImage, which QEMU enters through PVH: to unpack it takes TCG a second."""
    image = path.read_bytes()
    bzimage = BzImage(image[:4096], len(image), str(path))
    end = bzimage.payload_offset + bzimage.payload_size
    return bytes(unpack(bytearray(image[bzimage.payload_offset : end]), str(path)))


def initramfs(modules: kmod.Modules, init: bytes) -> bytes:
    """``init`` as /init and /sbin/modprobe, and in /pyvmm the modules with their index."""
    archive = cpio.Archive()
    archive.file("init", init, 0o755)
    archive.symlink("sbin/modprobe", "/init")
    archive.file("pyvmm/modprobe", init, 0o755)
    companions = [name for names in _COMPANIONS.values() for name in names]
    for module in modules.with_dependencies([*BOOT_MODULES, *LAZY_MODULES, *companions]):
        archive.file(f"pyvmm/{module.file}", module.data)
    archive.file("pyvmm/index", "".join(f"{line}\n" for line in _index(modules)).encode())
    return archive.to_bytes()


def _index(modules: kmod.Modules) -> list[str]:
    """The lines that ``nested_init.c`` reads; its comment at ``open_index`` tells their form."""
    lines = [
        f"load {module.file} {BOOT_MODULES.get(module.name, '')}".rstrip()
        for module in modules.with_dependencies(BOOT_MODULES)
    ]
    for name in LAZY_MODULES:
        if modules.is_builtin(name):
            continue
        files = " ".join(
            module.file for module in modules.with_dependencies([*_COMPANIONS.get(name, ()), name])
        )
        node = number = None
        for alias in [name, *modules.read(name).aliases]:
            if alias.startswith("devname:"):
                node = alias.removeprefix("devname:")
                continue
            lines.append(f"alias {alias} {files}")
            if alias.startswith("char-major-") and alias.count("-") == 3:
                number = alias.split("-")[2:]
        if node and number:
            lines.append(f"node {node} {number[0]} {number[1]}")
    return lines


def _init_program() -> bytes:
    """The static program that CMake built from ``nested_init.c``; it lies beside the C core."""
    core = importlib.util.find_spec("pyvmm._core")
    if core is None or core.origin is None:
        raise PyvmmError("the C core of pyvmm is not built: run scripts/build")
    path = Path(core.origin).parent / "nested" / "nested_init"
    try:
        return path.read_bytes()
    except OSError as error:
        raise PyvmmError(f"{path} is missing: build pyvmm again ({error.strerror})") from error
