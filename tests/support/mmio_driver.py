"""A guest without a CPU: RAM, one device on its register page, and the driver that talks to it."""

from __future__ import annotations

import mmap
import os
import select
import time
from collections.abc import Callable
from typing import Any, Self

from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.device import VirtioDevice
from pyvmm.virtio.mmio import MmioTransport
from pyvmm.virtio.reference import Buffer, GuestMemory
from support.fake_driver import FakeDriver, ring_config
from support.native_ring import native_memory

BASE = 0xD000_0000
RAM_SIZE = 1 << 20
# Each queue gets one of these, its rings first.
QUEUE_AREA = 1 << 17

ACKNOWLEDGE = uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE
DRIVER = uapi.VIRTIO_CONFIG_S_DRIVER
FEATURES_OK = uapi.VIRTIO_CONFIG_S_FEATURES_OK
DRIVER_OK = uapi.VIRTIO_CONFIG_S_DRIVER_OK
NEEDS_RESET = uapi.VIRTIO_CONFIG_S_NEEDS_RESET
FAILED = uapi.VIRTIO_CONFIG_S_FAILED
VRING, CONFIG = uapi.VIRTIO_MMIO_INT_VRING, uapi.VIRTIO_MMIO_INT_CONFIG


def wait_until(condition: Callable[[], object]) -> None:
    """Until `condition` is true; fails after ten seconds."""
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.001)


class MmioDriver:
    """Accesses the registers of `device` as a driver does (virtio 1.2, 3.1.1 and 4.2.3)."""

    def __init__(
        self, device: VirtioDevice, trap_reads: Callable[[bool], None] | None = None
    ) -> None:
        # As that of a machine: what the balloon discards of it is zero.
        ram = mmap.mmap(-1, RAM_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory = GuestMemory({0: ram})
        self.page = mmap.mmap(-1, 4096)
        self.irqfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.transport = MmioTransport(
            device, native_memory(self.memory), self.page, BASE, self.irqfd, trap_reads
        )
        self.queues: list[FakeDriver | None] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self.transport.close()
        os.close(self.irqfd)

    def read(self, register: int) -> int:
        return int.from_bytes(self.transport.read(register, 4), "little")

    def write(self, register: int, value: int) -> None:
        self.transport.write(register, value.to_bytes(4, "little"))

    @property
    def status(self) -> int:
        return self.read(uapi.VIRTIO_MMIO_STATUS)

    def add_status(self, bits: int) -> int:
        """Adds status bits and returns what the device makes of it."""
        self.write(uapi.VIRTIO_MMIO_STATUS, self.status | bits)
        return self.status

    def reset(self) -> None:
        self.write(uapi.VIRTIO_MMIO_STATUS, 0)

    def offered(self) -> int:
        """The device's features."""
        features = 0
        for select_ in (0, 1):
            self.write(uapi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, select_)
            features |= self.read(uapi.VIRTIO_MMIO_DEVICE_FEATURES) << 32 * select_
        return features

    def accept(self, features: int) -> None:
        """Writes the driver's features."""
        for select_ in (0, 1):
            self.write(uapi.VIRTIO_MMIO_DRIVER_FEATURES_SEL, select_)
            self.write(uapi.VIRTIO_MMIO_DRIVER_FEATURES, features >> 32 * select_ & 0xFFFF_FFFF)

    def negotiate(self, without: int = 0) -> int:
        """From reset to FEATURES_OK, with all features but `without`; returns those."""
        assert self.add_status(ACKNOWLEDGE) == ACKNOWLEDGE
        assert self.add_status(DRIVER) == ACKNOWLEDGE | DRIVER
        features = self.offered() & ~without
        self.accept(features)
        assert self.add_status(FEATURES_OK) & FEATURES_OK
        return features

    def set_up_queue(self, index: int, features: int, size: int = 16) -> FakeDriver:
        """Puts the rings of a queue into memory and makes it ready."""
        self.write(uapi.VIRTIO_MMIO_QUEUE_SEL, index)
        size = min(size, self.read(uapi.VIRTIO_MMIO_QUEUE_NUM_MAX))
        config = ring_config(
            size,
            index * QUEUE_AREA,
            event_idx=bool(features & 1 << uapi.VIRTIO_RING_F_EVENT_IDX),
            indirect=bool(features & 1 << uapi.VIRTIO_RING_F_INDIRECT_DESC),
        )
        self.write_ring(size, config.desc_gpa, config.avail_gpa, config.used_gpa)
        self.write(uapi.VIRTIO_MMIO_QUEUE_READY, 1)
        assert self.read(uapi.VIRTIO_MMIO_QUEUE_READY) == 1
        rings = config.used_gpa + 6 + 8 * size
        self.memory.regions[0][config.desc_gpa : rings] = bytes(rings - config.desc_gpa)
        first = (rings + 15) & ~15
        return FakeDriver(self.memory, config, Buffer(first, (index + 1) * QUEUE_AREA - first))

    def write_ring(self, size: int, desc_gpa: int, avail_gpa: int, used_gpa: int) -> None:
        """Writes the registers of the selected queue."""
        self.write(uapi.VIRTIO_MMIO_QUEUE_NUM, size)
        for register, gpa in (
            (uapi.VIRTIO_MMIO_QUEUE_DESC_LOW, desc_gpa),
            (uapi.VIRTIO_MMIO_QUEUE_AVAIL_LOW, avail_gpa),
            (uapi.VIRTIO_MMIO_QUEUE_USED_LOW, used_gpa),
        ):
            self.write(register, gpa & 0xFFFF_FFFF)
            self.write(register + 4, gpa >> 32)

    def start(self, without: int = 0) -> int:
        """From reset to DRIVER_OK with every queue; returns the negotiated features."""
        features = self.negotiate(without)
        self.queues = [
            self.set_up_queue(index, features)
            for index in range(len(self.transport.device.queue_sizes))
        ]
        assert self.add_status(DRIVER_OK) == ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
        return features

    def notify(self, index: int) -> None:
        self.write(uapi.VIRTIO_MMIO_QUEUE_NOTIFY, index)

    def request(
        self,
        index: int = 0,
        readable: tuple[bytes, ...] = (),
        writable: tuple[int, ...] = (),
    ) -> None:
        """Offers one chain, and notifies the device if it wants that."""
        queue = self.queues[index]
        assert queue is not None
        queue.add(readable, writable)
        if queue.publish():
            self.notify(index)

    def interrupted(self) -> int:
        """Waits for an interrupt, acknowledges it and returns the InterruptStatus."""
        ready, _, _ = select.select([self.irqfd], [], [], 10)
        assert ready, "no interrupt came"
        os.eventfd_read(self.irqfd)
        status = self.read(uapi.VIRTIO_MMIO_INTERRUPT_STATUS)
        self.write(uapi.VIRTIO_MMIO_INTERRUPT_ACK, status)
        return status

    def forget_interrupts(self) -> None:
        """Drops what the eventfd counted so far."""
        if self.was_interrupted():
            os.eventfd_read(self.irqfd)

    def was_interrupted(self) -> bool:
        """Whether an interrupt is waiting; none is taken."""
        return bool(select.select([self.irqfd], [], [], 0)[0])

    def replies(self, index: int = 0, count: int = 1) -> list[bytes]:
        """What the device wrote to the next `count` chains that it returns."""
        queue = self.queues[index]
        assert queue is not None
        replies: list[bytes] = []

        def collected() -> bool:
            replies.extend(used.data for used in queue.collect())
            return len(replies) >= count

        wait_until(collected)
        return replies
