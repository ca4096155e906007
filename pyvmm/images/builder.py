"""Builds an image from its recipe: kernels and initramfs, and an ext4 disk with a root on it."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from pyvmm.errors import UsageError
from pyvmm.images import apt, cache, cpio, kernel_build, kmod
from pyvmm.images.progress import Progress

if TYPE_CHECKING:
    from pyvmm.images.apt import Package
    from pyvmm.images.recipe import Disk, Kernel, Recipe

_BUSYBOX_PACKAGE = "busybox-static"
_DIRECTORIES = ("dev", "etc", "mnt", "proc", "root", "run", "sbin", "sys", "tmp", "var")


def build(recipe: Recipe) -> Path:
    """The directory with the image: made from the newest packages, or found in the cache.

    Its name tells recipe and package versions, so an unchanged image is never built twice.
    """
    kernels = [(kernel, apt.newest(kernel.package)) for kernel in recipe.kernels]
    busybox = apt.newest(_BUSYBOX_PACKAGE)
    packages = [*(str(package) for _, package in kernels), str(busybox)]
    key = hashlib.sha256(
        "\n".join([recipe.hash, *packages]).encode() + Path(__file__).read_bytes()
    ).hexdigest()[:16]

    def make(directory: Path) -> None:
        program = _find_busybox(apt.unpacked(busybox))
        trees = {kernel.name: _kernel_tree(kernel, package) for kernel, package in kernels}
        for name, tree in trees.items():
            _add_kernel(directory, name, tree, recipe, program)
        (directory / "packages").write_text("".join(f"{package}\n" for package in packages))
        if recipe.disk is not None:
            with Progress(f"building the disk of {recipe.name}"):
                _make_disk(directory / "disk.img", recipe.disk, program, list(trees.values()))

    return cache.entry(f"images/{recipe.name}-{key}", make)


def _kernel_tree(kernel: Kernel, package: Package) -> Path:
    if kernel.config is None:
        return apt.unpacked(package)
    return kernel_build.built(package, kernel.config)


def _add_kernel(directory: Path, name: str, tree: Path, recipe: Recipe, busybox: Path) -> None:
    modules = kmod.Modules(tree)
    shutil.copyfile(tree / "boot" / f"vmlinuz-{modules.release}", directory / f"vmlinuz-{name}")
    (directory / f"initrd-{name}").write_bytes(_initramfs(modules, recipe, busybox))


def _initramfs(modules: kmod.Modules, recipe: Recipe, busybox: Path) -> bytes:
    archive = cpio.Archive()
    for name in _DIRECTORIES:
        archive.directory(name)
    archive.file("bin/busybox", busybox.read_bytes(), 0o755)
    for applet in _applets(busybox):
        archive.symlink(f"bin/{applet}", "busybox")
    # The kernel looks for it here when it wants a module.
    archive.symlink("sbin/modprobe", "../bin/busybox")
    loaded = [name for name in recipe.modules if not modules.is_builtin(name)]
    archive.file("etc/modules", "".join(f"{name}\n" for name in loaded).encode())
    lines = []
    for module in modules.with_dependencies([*recipe.modules, *recipe.on_demand]):
        archive.file(f"lib/modules/{modules.release}/{module.file}", module.data)
        depends = " ".join(f"{name}.ko" for name in modules.dependencies(module.name))
        lines.append(f"{module.file}: {depends}".rstrip())
    listing = "".join(f"{line}\n" for line in lines).encode()
    archive.file(f"lib/modules/{modules.release}/modules.dep", listing)
    for target, source in recipe.files.items():
        archive.file(target, source.read_bytes(), 0o755)
    return archive.to_bytes()


def _make_disk(image: Path, disk: Disk, busybox: Path, kernels: list[Path]) -> None:
    _require("mke2fs", "e2fsprogs")
    with tempfile.TemporaryDirectory(prefix="disk-", dir=image.parent) as name:
        root = Path(name) / "root"
        root.mkdir()
        if disk.content == "busybox":
            _fill_with_busybox(root, disk, busybox)
            _run([*_as_root(), *_mke2fs(image, root, disk.size)])
        else:
            archive = Path(name) / "root.tar"
            _bootstrap_debian(archive, disk, kernels)
            # One process tree, since ownership that fakeroot remembers ends with it.
            unpack = f'tar -x -p -f {archive} -C {root} --numeric-owner && exec "$@"'
            _run([*_as_root(), "sh", "-c", unpack, "sh", *_mke2fs(image, root, disk.size)])


def _bootstrap_debian(archive: Path, disk: Disk, kernels: list[Path]) -> None:
    """A tar archive of a root directory: mmdebstrap runs as root and, where the host lets a user
    have user namespaces, as a user."""
    _require("mmdebstrap", "mmdebstrap")
    hooks = []
    for tree in kernels:
        modules = kmod.Modules(tree)
        hooks += [
            'mkdir -p "$1/usr/lib/modules"',
            f"copy-in {modules.directory} /usr/lib/modules",
            f'chroot "$1" depmod {modules.release}',
        ]
    for target, source in disk.files.items():
        hooks.append(f"upload {source} /{target}")
    if disk.setup is not None:
        hooks.append(f'sh {disk.setup} "$1"')
    command = ["mmdebstrap", "--variant=minbase", f"--include={','.join(disk.packages)}"]
    command += [f"--customize-hook={hook}" for hook in hooks]
    _run([*command, "--format=tar", disk.content, str(archive)])


def _fill_with_busybox(root: Path, disk: Disk, busybox: Path) -> None:
    for name in ("bin", *_DIRECTORIES):
        (root / name).mkdir()
    shutil.copyfile(busybox, root / "bin/busybox")
    (root / "bin/busybox").chmod(0o755)
    for applet in _applets(busybox):
        (root / "bin" / applet).symlink_to("busybox")
    (root / "etc/passwd").write_text("root::0:0:root:/root:/bin/sh\n")
    (root / "etc/group").write_text("root:x:0:\n")
    for target, source in disk.files.items():
        shutil.copyfile(source, root / target)
        is_program = Path(target).parent.name in ("bin", "sbin")
        (root / target).chmod(0o755 if is_program else 0o644)


def _mke2fs(image: Path, root: Path, size: int) -> list[str]:
    """Makes a sparse ext4 image of ``root``, with nothing left for the guest's kernel to complete
    behind the user's back."""
    options = ["-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0"]
    return ["mke2fs", *options, "-d", str(root), str(image), f"{size >> 10}k"]


def _as_root() -> list[str]:
    """What to put before a command so that files it handles can belong to root."""
    if os.geteuid() == 0:
        return []
    _require("fakeroot", "fakeroot")
    return ["fakeroot", "--"]


def _find_busybox(tree: Path) -> Path:
    for path in ("bin/busybox", "usr/bin/busybox"):
        if (tree / path).exists():
            return tree / path
    raise UsageError(f"{tree} holds no busybox: delete it to fetch it again")


def _applets(busybox: Path) -> list[str]:
    listing = subprocess.run([busybox, "--list"], check=True, capture_output=True, text=True)
    return [name for name in listing.stdout.split() if name != "busybox"]


def _require(program: str, package: str) -> None:
    if shutil.which(program, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is None:
        raise UsageError(f"{program} is not installed: apt install {package}")


def _run(command: list[str]) -> None:
    path = f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"
    result = subprocess.run(
        command,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        lines = (result.stderr or result.stdout).strip().splitlines() or ["no message"]
        raise UsageError(f"{command[0]} failed: {lines[-1]}")
