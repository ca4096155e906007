"""Which GSI each device gets."""

from __future__ import annotations

from pyvmm import layout


class GsiAllocator:
    """Hands out the GSIs of virtio devices: each its own while they last, then shared ones.

    Sharing is sound because the interrupts are edges and each device has a status word of its
    own, which costs the guest no exit to read.
    """

    def __init__(self, devices: int) -> None:
        self._shared = devices > len(layout.VIRTIO_GSIS)

    def gsi(self, index: int) -> int:
        """The GSI of the device at `index` (0, 1, ...)."""
        return layout.VIRTIO_GSIS[index % len(layout.VIRTIO_GSIS)]

    @property
    def shared(self) -> bool:
        """Whether any two devices have the same GSI."""
        return self._shared
