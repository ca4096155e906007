"""Queues that the host's kernel serves: vhost-net (linux/vhost.h).

The kernel gets what our own threads would: guest memory, the rings, the eventfd of their
notifications, and the tap. Its interrupts go from the eventfd that it signals, which is the
device's irqfd, straight to the guest, past `virtio_irq_raise`; so the bit of InterruptStatus that
tells the driver to look at its rings is held at 1 as long as the kernel serves them. A driver that
looks for nothing finds nothing.
"""

from __future__ import annotations

import errno
import os
import struct
from fcntl import ioctl

from pyvmm._core import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyvmm.virtio.device import Activation, QueueActivation

_GET_FEATURES = 0x8008_AF00
_SET_FEATURES = 0x4008_AF00
_SET_OWNER = 0xAF01
_SET_MEM_TABLE = 0x4008_AF03
_SET_VRING_NUM = 0x4008_AF10
_SET_VRING_ADDR = 0x4028_AF11
_SET_VRING_BASE = 0x4008_AF12
_SET_VRING_KICK = 0x4008_AF20
_SET_VRING_CALL = 0x4008_AF21
_SET_VRING_ERR = 0x4008_AF22
_NET_SET_BACKEND = 0x4008_AF30

_NO_FD = -1


def vhost_features(fd: int) -> int:
    """The virtio features that this kernel's vhost-net knows."""
    (features,) = struct.unpack("Q", ioctl(fd, _GET_FEATURES, bytes(8)))
    return int(features)


class VhostPair:
    """A pair of queues on the tap `port_fd`, served by the kernel through `vhost_fd`.

    `error_fd` is an eventfd that counts when the kernel cannot follow a ring. OSError.
    """

    def __init__(
        self,
        vhost_fd: int,
        port_fd: int,
        activation: Activation,
        queues: tuple[QueueActivation, QueueActivation],
    ) -> None:
        self._vhost_fd = vhost_fd
        self._port_fd = port_fd
        self._running = False
        self.error_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._set_up(activation, queues)
        except BaseException:
            os.close(self.error_fd)
            raise

    def _set_up(
        self, activation: Activation, queues: tuple[QueueActivation, QueueActivation]
    ) -> None:
        fd, memory = self._vhost_fd, activation.memory
        try:
            ioctl(fd, _SET_OWNER)
        except OSError as error:
            if error.errno != errno.EBUSY:  # it is ours since an earlier activation
                raise
        ioctl(fd, _SET_FEATURES, struct.pack("Q", activation.features & vhost_features(fd)))
        table = struct.pack("II", memory.count, 0)
        for region in memory.regions[0 : memory.count]:
            table += struct.pack("QQQQ", region.gpa, region.size, _address(region.hva), 0)
        ioctl(fd, _SET_MEM_TABLE, table)
        for index, queue in enumerate(queues):
            config = queue.config
            rings = (
                (config.desc_gpa, 16 * config.size),
                (config.used_gpa, 6 + 8 * config.size),
                (config.avail_gpa, 6 + 2 * config.size),
            )
            addresses = [_address(lib.guest_mem_at(memory, *ring)) for ring in rings]
            ioctl(fd, _SET_VRING_NUM, struct.pack("II", index, config.size))
            ioctl(fd, _SET_VRING_BASE, struct.pack("II", index, 0))
            ioctl(fd, _SET_VRING_ADDR, struct.pack("IIQQQQ", index, 0, *addresses, 0))
            ioctl(fd, _SET_VRING_KICK, struct.pack("Ii", index, queue.kick))
            ioctl(fd, _SET_VRING_CALL, struct.pack("Ii", index, activation.irq.irqfd))
            ioctl(fd, _SET_VRING_ERR, struct.pack("Ii", index, self.error_fd))

    def start(self) -> None:
        """Has the kernel serve the queues from where it was stopped; idempotent."""
        if not self._running:
            self._set_backend(self._port_fd)
            self._running = True

    def stop(self) -> None:
        """When this returns, the kernel touches guest memory no more; idempotent."""
        if self._running:
            self._set_backend(_NO_FD)
            self._running = False

    def close(self) -> None:
        """Stops and lets go of the queues."""
        self.stop()
        for index in range(2):
            for request in (_SET_VRING_KICK, _SET_VRING_CALL, _SET_VRING_ERR):
                ioctl(self._vhost_fd, request, struct.pack("Ii", index, _NO_FD))
        os.close(self.error_fd)

    def _set_backend(self, fd: int) -> None:
        for index in range(2):
            ioctl(self._vhost_fd, _NET_SET_BACKEND, struct.pack("Ii", index, fd))


def _address(pointer: Any) -> int:
    return int(ffi.cast("uintptr_t", pointer))
