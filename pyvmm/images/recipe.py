"""Image recipes: ``guest-images/NAME/image.toml`` and the files that it names."""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any, NamedTuple

from pyvmm.errors import UsageError


class Kernel(NamedTuple):
    """``package`` is a pattern for `pyvmm.images.apt.newest`: of kernels or, if there is a
    ``config`` for `pyvmm.images.kernel_build.built`, of their sources."""

    name: str
    package: str
    config: Path | None


class Disk(NamedTuple):
    """An ext4 disk. ``content`` is "busybox" or a Debian suite; ``size`` is in bytes.

    ``packages`` are installed from the suite; ``files`` maps paths on the disk to files of the
    recipe; ``setup`` is a shell script of the recipe that runs in the new root directory.
    """

    content: str
    size: int
    packages: tuple[str, ...]
    files: dict[str, Path]
    setup: Path | None


class Recipe(NamedTuple):
    """One image. Its initramfs holds ``files``, ``modules``, which it loads, and ``on_demand``,
    modules that modprobe can load."""

    name: str
    description: str
    kernels: tuple[Kernel, ...]
    modules: tuple[str, ...]
    on_demand: tuple[str, ...]
    files: dict[str, Path]
    disk: Disk | None
    hash: str


def directory() -> Path:
    """Where the recipes are: in the source tree or, from a wheel, inside the package."""
    package = Path(__file__).parent.parent
    for candidate in (package.parent / "guest-images", package / "guest-images"):
        if (candidate / "initramfs" / "init").exists():
            return candidate
    raise UsageError("the image recipes (guest-images) are missing: install pyvmm again")


def names() -> list[str]:
    return sorted(path.parent.name for path in directory().glob("*/image.toml"))


def load(name: str) -> Recipe:
    """Raises `UsageError` for a name that has no recipe."""
    folder = directory() / name
    try:
        text = (folder / "image.toml").read_bytes()
    except OSError:
        known = ", ".join(names())
        raise UsageError(f"there is no image called {name!r}: the images are {known}") from None
    table = tomllib.loads(text.decode())
    initramfs = table["initramfs"]
    kernels = tuple(_kernel(folder, each) for each in table["kernels"])
    disk = _disk(folder, table["disk"]) if "disk" in table else None
    files = _files(folder, initramfs["files"])

    digest = hashlib.sha256(text)
    used = [*files.values(), *(each.config for each in kernels if each.config)]
    if disk is not None:
        used += [*disk.files.values(), *([disk.setup] if disk.setup else [])]
    for path in used:
        digest.update(path.read_bytes())
    return Recipe(
        name=name,
        description=table["description"],
        kernels=kernels,
        modules=tuple(initramfs["modules"]),
        on_demand=tuple(initramfs.get("on_demand", ())),
        files=files,
        disk=disk,
        hash=digest.hexdigest()[:16],
    )


def _kernel(folder: Path, table: dict[str, Any]) -> Kernel:
    config = folder / table["config"] if "config" in table else None
    return Kernel(table["name"], table["package"], config)


def _disk(folder: Path, table: dict[str, Any]) -> Disk:
    return Disk(
        content=table["content"],
        size=table["size_mib"] << 20,
        packages=tuple(table.get("packages", ())),
        files=_files(folder, table.get("files", {})),
        setup=folder / table["setup"] if "setup" in table else None,
    )


def _files(folder: Path, table: dict[str, str]) -> dict[str, Path]:
    return {target: folder / source for target, source in table.items()}
