"""Which backend serves a disk."""

from __future__ import annotations

from pyvmm.backends.disk import open_image

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.disk import Image


def open_disk(
    path: str, *, readonly: bool = False, direct: bool = False, snapshot: bool = False
) -> Image:
    """Opens what a disk is made of; the arguments are keys of ``DiskConfig``.

    With `snapshot` the image stays as it is, and any number of disks share it. UsageError as of
    `open_image` and `SnapshotImage`.
    """
    image: Image = open_image(path, readonly=readonly or snapshot, direct=direct)
    if not snapshot:
        return image
    from pyvmm.backends.snapshot import SnapshotImage

    try:
        return SnapshotImage(image)
    except BaseException:
        image.close()
        raise
