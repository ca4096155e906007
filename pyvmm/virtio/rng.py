"""virtio-rng: entropy from the host (virtio 1.2, section 5.4).

The whole device, and the shortest example of one written in Python.
"""

from __future__ import annotations

import os

from pyvmm.virtio._generated_uapi import VIRTIO_ID_RNG
from pyvmm.virtio.device import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.virtio.queue import Chain, Virtqueue

# The most that one request gets: a driver may be given less than it asked for (5.4.6.2), and a
# guest must not make the host fill gigabytes.
REQUEST_LIMIT = 64 << 10


class VirtioRng(PythonDevice):
    """Fills each buffer of its one queue with random bytes."""

    device_id = VIRTIO_ID_RNG
    queue_sizes = (64,)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        # The pool of the host is initialized long before it can run guests: this never blocks.
        chain.write(os.getrandom(min(chain.writable_bytes, REQUEST_LIMIT)))
        chain.complete()
