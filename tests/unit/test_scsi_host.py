"""Opening SCSI devices of the host: what is refused, and how. tests/linux has real ones."""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.loop_device import loop_device

from pyvmm.backends.scsi.host import open_host_device
from pyvmm.errors import ExitStatus, UsageError

NOBODY = 65534
# Disks of SCSI have these majors, but not so many minors.
NO_DISK = os.makedev(135, 255)


def refusal(path: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        open_host_device(path)
    assert caught.value.exit_status == ExitStatus.USAGE
    return str(caught.value)


@pytest.fixture
def node() -> Iterator[Path]:
    """The node of a SCSI disk that is not there, in a directory that everybody may enter."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        path = Path(name) / "sdx"
        try:
            os.mknod(path, stat.S_IFBLK | 0o600, NO_DISK)
        except OSError as error:
            pytest.skip(f"no device node can be made here: {error}")
        yield path


def test_missing() -> None:
    assert refusal("/dev/sdzzz") == (
        "the SCSI device /dev/sdzzz does not exist: lsblk -S lists those there are"
    )
    assert refusal("/dev/sg999") == (
        "the SCSI device /dev/sg999 does not exist: lsblk -S lists those there are "
        "(modprobe sg makes /dev/sgN)"
    )


def test_gone(node: Path) -> None:
    assert refusal(node) == (
        f"there is no device behind {node} any more: lsblk -S lists those there are"
    )


def test_forbidden(node: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("made nodes are root's")
    os.seteuid(NOBODY)
    try:
        message = refusal(node)
    finally:
        os.seteuid(0)
    assert message == (
        f"no permission to open the SCSI device {node}: "
        "run pyvmm as root, or as a member of the group that ls -l shows"
    )


def test_a_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    assert refusal(path) == f"{path} is a file, not a SCSI device: give it as --disk {path}"


def not_scsi(path: str | Path) -> str:
    return (
        f"{path} is not a SCSI device: give a /dev/sdX, /dev/srN or /dev/sgN that lsblk -S or "
        "lsscsi -g lists (--disk takes any block device)"
    )


@pytest.mark.parametrize("path", ["/dev/null", "/tmp"])
def test_something_else(path: str) -> None:
    assert refusal(path) == not_scsi(path)


def test_a_block_device_without_scsi(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(4096))
    with loop_device(path) as device:
        assert refusal(device) == not_scsi(device)
