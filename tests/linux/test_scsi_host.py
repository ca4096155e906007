"""SCSI devices of the host, passed through: the kernel's scsi_debug is the host's device."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvmm.backends.scsi_host import open_host_device
from pyvmm.errors import UsageError

SYS_DELETE_MODULE = 176
DRIVER = Path("/sys/bus/pseudo/drivers/scsi_debug")


class ScsiDebug:
    """The devices of a loaded scsi_debug."""

    def __init__(self) -> None:
        devices = sorted(Path("/sys/bus/scsi/devices").glob("*:*:*:*"))
        self.devices = [each for each in devices if "scsi_debug" in (each / "model").read_text()]

    def node(self, index: int, kind: str = "block") -> str:
        """The path of the disk, or with `kind` "scsi_generic" of its /dev/sgN."""
        (name,) = (path.name for path in (self.devices[index] / kind).iterdir())
        return f"/dev/{name}"

    @staticmethod
    def set(name: str, value: object) -> None:
        (DRIVER / name).write_text(f"{value}\n")


@pytest.fixture
def scsi_debug() -> Iterator[Callable[..., ScsiDebug]]:
    """Loads scsi_debug with some parameters; skips the test where that is not possible."""

    def load(**parameters: object) -> ScsiDebug:
        words = [f"{name}={value}" for name, value in parameters.items()]
        made = subprocess.run(["modprobe", "scsi_debug", *words], capture_output=True, text=True)
        if made.returncode:
            pytest.skip(f"no scsi_debug: {made.stderr.strip()}")
        wanted = int(str(parameters.get("max_luns", 1)))
        deadline = time.monotonic() + 60
        while True:
            loaded = ScsiDebug()
            nodes = [path for each in loaded.devices for path in each.glob("block/*")]
            if len(nodes) == wanted:
                return loaded
            assert time.monotonic() < deadline, "the devices of scsi_debug do not appear"
            time.sleep(0.1)

    yield load
    ctypes.CDLL(None).syscall(SYS_DELETE_MODULE, b"scsi_debug", os.O_NONBLOCK)


def refusal(path: str) -> str:
    with pytest.raises(UsageError) as caught:
        open_host_device(path)
    return str(caught.value)


def test_opening(scsi_debug: Callable[..., ScsiDebug], tmp_path: Path) -> None:
    loaded = scsi_debug(dev_size_mb=16, max_luns=2, sector_size=4096, num_parts=1)
    disk, generic = loaded.node(0), loaded.node(0, "scsi_generic")
    for path in (disk, generic):
        with open_host_device(path) as device:
            assert device.description.startswith("disk Linux scsi_debug")
            assert device.block_size == 4096
            assert 65536 <= device.max_transfer <= 16 << 20
            assert device.remark == ""
            for other in (disk, generic):
                assert refusal(other) == in_use(other)
        device.close()
    assert refusal(f"{disk}1") == (
        f"the SCSI device {disk}1 is a partition: pass the whole of {disk} through, "
        f"or give the guest a disk with --disk {disk}1"
    )
    subprocess.run(["mke2fs", "-q", f"{disk}1"], check=True)
    subprocess.run(["mount", f"{disk}1", tmp_path], check=True)
    try:
        for path in (disk, generic):
            assert refusal(path) == in_use(path)
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def in_use(path: str) -> str:
    return (
        f"the SCSI device {path} is in use on the host: "
        "unmount it and what is on it (lsblk shows that), or end the other program"
    )
