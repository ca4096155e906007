"""Kernels built from Debian's source package with a configuration of the recipe."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from pyvmm.errors import UsageError
from pyvmm.images import apt, cache
from pyvmm.images.progress import Progress

if TYPE_CHECKING:
    from pyvmm.images.apt import Package

# What building a kernel takes, and the Debian package of each.
_PROGRAMS = {"make": "make", "gcc": "gcc", "flex": "flex", "bison": "bison", "bc": "bc"}
_HEADERS = {"libelf.h": "libelf-dev"}


def built(package: Package, config: Path) -> Path:
    """A directory laid out as an unpacked linux-image package, all of whose modules are built in.

    ``package`` is a linux-source package; ``config`` lists the options that the kernel has beyond
    ``make allnoconfig``. Built once, in some minutes.

    Raises `UsageError` where a tool is missing, the build fails, or the kernel has no such options.
    """
    key = hashlib.sha256("\n".join(_options(config)).encode()).hexdigest()[:16]

    def make(directory: Path) -> None:
        _require_tools()
        (archive,) = apt.unpacked(package).glob("usr/src/linux-source-*.tar.xz")
        with Progress(f"building a kernel from {package.name}, which takes some minutes"):
            _build(archive, config, directory)

    return cache.entry(f"kernels-built/{package}-{key}", make)


def _build(archive: Path, config: Path, directory: Path) -> None:
    source = directory / "source"
    source.mkdir()
    _run(["tar", "-x", "-f", str(archive), "-C", str(source), "--strip-components=1"])
    make = ["make", "-s", "-C", str(source)]
    _run([*make, f"KCONFIG_ALLCONFIG={config.resolve()}", "allnoconfig"])
    _check_options(config, source / ".config")
    _run([*make, f"-j{len(os.sched_getaffinity(0))}", "bzImage"])
    release = _run([*make, "kernelrelease"]).strip()
    modules = directory / "lib" / "modules" / release
    modules.mkdir(parents=True)
    shutil.copyfile(source / "modules.builtin", modules / "modules.builtin")
    (directory / "boot").mkdir()
    image = source / "arch" / "x86" / "boot" / "bzImage"
    shutil.copyfile(image, directory / "boot" / f"vmlinuz-{release}")
    shutil.rmtree(source)


def _options(config: Path) -> list[str]:
    return sorted(line for line in config.read_text().splitlines() if line.startswith("CONFIG_"))


def _check_options(config: Path, result: Path) -> None:
    """kconfig drops options that are unknown or lack what they depend on, without a word."""
    got = set(result.read_text().splitlines())
    lost = [option for option in _options(config) if option not in got]
    if lost:
        raise UsageError(f"{config}: the kernel does not take {', '.join(lost)}")


def _require_tools() -> None:
    missing = [package for program, package in _PROGRAMS.items() if shutil.which(program) is None]
    missing += [
        package for name, package in _HEADERS.items() if not Path("/usr/include", name).exists()
    ]
    if missing:
        raise UsageError(f"building a kernel takes more tools: apt install {' '.join(missing)}")


def _run(command: list[str]) -> str:
    result = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        # Of make's output the last lines only tell that something failed.
        reason = next((line for line in lines if "error:" in line), lines[-1])
        raise UsageError(f"{command[0]} failed: {reason}")
    return result.stdout
