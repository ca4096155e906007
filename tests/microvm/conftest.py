"""Micro-guests: a few instructions each, assembled on the spot, on whatever /dev/kvm there is."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "guest-images" / "micro"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.access("/dev/kvm", os.R_OK | os.W_OK):
        return
    for item in items:
        if "/microvm/" in str(item.path):
            item.add_marker(pytest.mark.skip(reason="needs a /dev/kvm that may be opened"))


@pytest.fixture(scope="session")
def monitor_guest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The guest of guest-images/micro/monitor.S as a vmlinux."""
    kernel = tmp_path_factory.mktemp("micro") / "monitor.elf"
    subprocess.run(
        [
            "gcc", "-nostdlib", "-static", "-Wl,-Ttext=0x1000000,--build-id=none,-z,noexecstack",
            "-o", kernel, SOURCES / "monitor.S",
        ],
        check=True,
    )  # fmt: skip
    return kernel
