"""Micro-guests: a few instructions each, assembled on the spot, on whatever /dev/kvm there is."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.guest.console import GuestConsole
from pyvmm.machine.vm import VM

Boot = Callable[..., tuple[VM, GuestConsole]]

SOURCES = Path(__file__).parents[2] / "guest-images" / "micro"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    for item in items:
        if "/microvm/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="needs a /dev/kvm that may be opened"))


def assemble(name: str, directory: Path) -> Path:
    """A guest of guest-images/micro as a vmlinux."""
    kernel = directory / f"{name}.elf"
    subprocess.run(
        [
            "gcc", "-nostdlib", "-static", "-Wl,-Ttext=0x1000000,--build-id=none,-z,noexecstack",
            "-o", kernel, SOURCES / f"{name}.S",
        ],
        check=True,
    )  # fmt: skip
    return kernel


@pytest.fixture(scope="session")
def monitor_guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest that obeys its serial port."""
    return assemble("monitor", tmp_path_factory.mktemp("micro"))


@pytest.fixture(scope="session")
def sleeper_guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest that sleeps and keeps time."""
    return assemble("sleeper", tmp_path_factory.mktemp("micro"))


@pytest.fixture
def boot_micro() -> Iterator[Boot]:
    """Boots a guest that talks on its serial port, waits for its prompt, and ends it."""
    vms: list[VM] = []

    def boot_micro(kernel: Path, **settings: object) -> tuple[VM, GuestConsole]:
        vm = VM(**{"kernel": kernel, "memory": "32M", "serial": "pipe", **settings})
        vms.append(vm)
        vm.start()
        console = GuestConsole(vm.serial)
        console.expect("> ", timeout=10)
        return vm, console

    yield boot_micro
    for vm in vms:
        vm.close()
