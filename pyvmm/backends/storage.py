"""Which backend serves a disk."""

from __future__ import annotations

import os
import stat
from contextlib import suppress

from pyvmm.backends.disk import open_image
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.disk import Image

# How formats begin, and at which byte.
_MAGICS = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"KDMV", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"vhdxfile", "vhdx"),
    (0, b"conectix", "vpc"),
    (64, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"QED\0", "qed"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
)

# An attribute of files that guests had as raw disks. Such a guest may have written the beginning of
# any format into it, with the names of files that it would like to read.
_MARK = "user.pyvmm.format"


def open_disk(
    path: str | os.PathLike[str] | None = None,
    *,
    nbd: str | None = None,
    format: str | None = None,
    readonly: bool = False,
    direct: bool = False,
    snapshot: bool = False,
    threads: int = 1,
) -> Image:
    """Opens what a disk is made of, for as many threads as serve it.

    The other arguments are keys of ``DiskConfig``; without a `format`, an image is raw unless it
    certainly is not (see `_find_format`). With `snapshot` the image stays as it is, and any number
    of disks share it. UsageError.
    """
    image = _open(path, nbd, format, readonly or snapshot, direct, threads)
    if not snapshot:
        return image
    from pyvmm.backends.snapshot import SnapshotImage

    try:
        return SnapshotImage(image)
    except BaseException:
        image.close()
        raise


def _open(
    path: str | os.PathLike[str] | None,
    nbd: str | None,
    format: str | None,
    readonly: bool,
    direct: bool,
    threads: int,
) -> Image:
    if nbd is not None:
        from pyvmm.backends.nbd import open_nbd

        return open_nbd(nbd, readonly=readonly, threads=threads)
    assert path is not None
    path = os.fspath(path)
    if format is None:
        format = _find_format(path)
    if format != "raw":
        from pyvmm.backends.qemu_nbd import FormatImage

        return FormatImage(path, format, readonly=readonly, direct=direct, threads=threads)
    image = open_image(path, readonly=readonly, direct=direct)
    if not readonly and not image.is_block_device:
        with suppress(OSError):  # not every file system has attributes
            os.setxattr(image.fd, _MARK, b"raw")
    return image


def _find_format(path: str) -> str:
    """The format of the image, where it is safe to trust what it says of itself.

    Its beginning may be a guest's work. So nothing is opened as what it looks like that was a raw
    disk before, that is a block device, or that makes qemu-nbd open further files. UsageError.
    """
    try:
        with open(path, "rb", buffering=0, opener=_without_waiting) as file:
            is_file = stat.S_ISREG(os.fstat(file.fileno()).st_mode)
            start = file.read(512)
            guest_wrote_it = _is_marked(file.fileno())
    except OSError:
        return "raw"  # whose backend says what is wrong
    found = next((name for at, magic, name in _MAGICS if start.startswith(magic, at)), "raw")
    if found == "raw":
        return found
    looks = f"the disk image {path} looks like {found}"
    give = f"give format={found} if you trust it, or format=raw"
    if not is_file:
        raise UsageError(f"{looks}, which is not tried on a block device unasked: {give}")
    if guest_wrote_it:
        raise UsageError(f"{looks}, but was a raw disk, whose guest may have written that: {give}")
    if found in ("vmdk", "qed", "parallels") or (found == "qcow2" and _names_files(start)):
        raise UsageError(f"{looks} that can name other files to be opened: {give}")
    return found


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _is_marked(fd: int) -> bool:
    try:
        os.getxattr(fd, _MARK)
    except OSError:
        return False
    return True


def _names_files(header: bytes) -> bool:
    """Whether a qcow2 has a backing file or an external data file (QEMU's docs/interop/qcow2)."""
    version = int.from_bytes(header[4:8], "big")
    backing_file_offset = int.from_bytes(header[8:16], "big")
    incompatible_features = int.from_bytes(header[72:80], "big") if version >= 3 else 0
    return backing_file_offset != 0 or bool(incompatible_features & 4)
