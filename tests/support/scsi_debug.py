"""Disks of the host for tests: the kernel's scsi_debug, which can fail as told."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvmm._core import ffi, lib
from support.tgt import wait_until

_SYS_DELETE_MODULE = 176
_DRIVER = Path("/sys/bus/pseudo/drivers/scsi_debug")


class ScsiDebug:
    """The logical units of a loaded scsi_debug, in the order of their addresses."""

    def __init__(self) -> None:
        devices = sorted(Path("/sys/bus/scsi/devices").glob("*:*:*:*"))
        self.devices = [each for each in devices if "scsi_debug" in (each / "model").read_text()]

    def node(self, index: int, kind: str = "block") -> str:
        """The path of the disk, or with `kind` "scsi_generic" of its /dev/sgN."""
        (name,) = (path.name for path in (self.devices[index] / kind).iterdir())
        return f"/dev/{name}"

    @staticmethod
    def set(name: str, value: object) -> None:
        (_DRIVER / name).write_text(f"{value}\n")

    def query(self, index: int, cdb: bytes, size: int) -> bytes:
        """What the device answers to the host itself."""
        fd = os.open(self.node(index, "scsi_generic"), os.O_RDWR)
        try:
            buffer = ffi.new("uint8_t[]", size)
            for _ in range(3):  # there may be unit attention conditions
                count = lib.scsi_host_query(fd, cdb, len(cdb), buffer, size)
                if count >= 0:
                    return bytes(ffi.buffer(buffer, count))
            return b""
        finally:
            os.close(fd)


@contextlib.contextmanager
def scsi_debug(*, units: int = 1, **parameters: int) -> Iterator[ScsiDebug]:
    """Loads scsi_debug with so many logical units and further module parameters.

    Skips the test where the kernel has none. At the end nobody may use a unit any more.
    """
    words = [f"{name}={value}" for name, value in parameters.items()]
    try:
        made = subprocess.run(
            ["modprobe", "scsi_debug", f"max_luns={units}", *words], capture_output=True, text=True
        )
    except FileNotFoundError:
        pytest.skip("modprobe is not installed: apt install kmod")
    if made.returncode:
        pytest.skip(f"no scsi_debug: {made.stderr.strip()}")
    try:
        wait_until(lambda: _ready(units, partitioned="num_parts" in parameters))
        yield ScsiDebug()
    finally:
        wait_until(_unload)


def _ready(units: int, *, partitioned: bool) -> bool:
    devices = ScsiDebug().devices
    wanted = ["scsi_generic/*", "block/*/*1" if partitioned else "block/*"]
    return len(devices) == units and all(
        any(device.glob(pattern)) for device in devices for pattern in wanted
    )


def _unload() -> bool:
    result: int = ctypes.CDLL(None).syscall(_SYS_DELETE_MODULE, b"scsi_debug", os.O_NONBLOCK)
    return result == 0
