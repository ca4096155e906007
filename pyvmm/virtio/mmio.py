"""The virtio-mmio transport, version 2 (virtio 1.2, section 4.2).

The registers of a device are one page of host memory, and the guest maps it read-only. So a
guest's read costs no exit; its writes come here, and each register that a write changes is
rewritten in the page before the writing vCPU goes on. The InterruptStatus word belongs to the
C half (``virtio_irq.h``), which all else in this module asks to change it.
"""

from __future__ import annotations

import os
import threading

from pyvmm._core import ffi, lib
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.device import Activation, QueueActivation, log_defect

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from pyvmm.virtio.device import VirtioDevice

MAGIC = int.from_bytes(b"virt", "little")
VERSION = 2
VENDOR_ID = int.from_bytes(b"PYVM", "little")

# What this transport and its rings can do, for every device.
TRANSPORT_FEATURES = (
    1 << uapi.VIRTIO_F_VERSION_1
    | 1 << uapi.VIRTIO_RING_F_INDIRECT_DESC
    | 1 << uapi.VIRTIO_RING_F_EVENT_IDX
)

_ACKNOWLEDGE = uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE
_DRIVER = uapi.VIRTIO_CONFIG_S_DRIVER
_FEATURES_OK = uapi.VIRTIO_CONFIG_S_FEATURES_OK
_DRIVER_OK = uapi.VIRTIO_CONFIG_S_DRIVER_OK
_FAILED = uapi.VIRTIO_CONFIG_S_FAILED
_NEEDS_RESET = uapi.VIRTIO_CONFIG_S_NEEDS_RESET

# The order in which a driver sets the status bits (3.1.1).
_INITIALIZATION = (_ACKNOWLEDGE, _DRIVER, _FEATURES_OK, _DRIVER_OK)

# Registers that hold half of a ring's address: which address, and how far up.
_RING_ADDRESSES = {
    uapi.VIRTIO_MMIO_QUEUE_DESC_LOW: ("desc_gpa", 0),
    uapi.VIRTIO_MMIO_QUEUE_DESC_HIGH: ("desc_gpa", 32),
    uapi.VIRTIO_MMIO_QUEUE_AVAIL_LOW: ("avail_gpa", 0),
    uapi.VIRTIO_MMIO_QUEUE_AVAIL_HIGH: ("avail_gpa", 32),
    uapi.VIRTIO_MMIO_QUEUE_USED_LOW: ("used_gpa", 0),
    uapi.VIRTIO_MMIO_QUEUE_USED_HIGH: ("used_gpa", 32),
}

# Registers of the shared memory region that ShmSel selects. No device has one, and an absent
# region has length and base -1 (4.2.2.1).
_SHM_REGISTERS = (
    uapi.VIRTIO_MMIO_SHM_LEN_LOW,
    uapi.VIRTIO_MMIO_SHM_LEN_HIGH,
    uapi.VIRTIO_MMIO_SHM_BASE_LOW,
    uapi.VIRTIO_MMIO_SHM_BASE_HIGH,
)

_ALL_ONES = 0xFFFF_FFFF


class _Queue:
    """What the driver wrote to the registers of one queue."""

    __slots__ = ("avail_gpa", "desc_gpa", "num", "ready", "used_gpa")

    def __init__(self) -> None:
        self.num = 0
        self.ready = False
        self.desc_gpa = self.avail_gpa = self.used_gpa = 0


class MmioTransport:
    """The register page of one device.

    `memory` is the ``struct guest_mem *``; `page` is 4096 bytes of page-aligned memory, which the
    caller maps read-only into the guest at guest-physical `base`; `irqfd` is the eventfd that
    interrupts the guest, -1 for none. A guest must not be able to read the page while the
    configuration space and its generation change together (2.5.2): ``trap_reads(True)`` is called
    before, so that reads go through `read` until ``trap_reads(False)``.

    `kicks` has the eventfd of each queue, for ioeventfds on QueueNotify (4 bytes, datamatch is
    the index; none for queues that are `synchronous`); `irq` is the ``struct virtio_irq *`` and
    `native_page` the page as ``uint8_t *``, for the C side of the bus. `ignored_writes` counts
    writes that had no effect.

    All methods may be called from any thread, but those that change the status of the device
    wait for its workers, so not from these.
    """

    def __init__(
        self,
        device: VirtioDevice,
        memory: Any,
        page: Any,
        base: int,
        irqfd: int,
        trap_reads: Callable[[bool], None] | None = None,
    ) -> None:
        self.device = device
        self.ignored_writes = 0
        self._memory = memory
        self._trap_reads = trap_reads
        self._registers = ffi.from_buffer("uint32_t[]", page, require_writable=True)
        self.native_page = ffi.cast("uint8_t *", self._registers)
        self._bytes = memoryview(ffi.buffer(self._registers))
        self.irq = ffi.new(
            "struct virtio_irq *",
            {
                "status": self._registers + uapi.VIRTIO_MMIO_INTERRUPT_STATUS // 4,
                "irqfd": irqfd,
                "ack_gpa": base + uapi.VIRTIO_MMIO_INTERRUPT_ACK,
            },
        )
        self.kicks = [os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK) for _ in device.queue_sizes]
        # Two locks: one orders what drivers do to the device, workers that stop included; the
        # other guards the page, for these workers too. It is the inner one.
        self._driver_lock = threading.Lock()
        self._page_lock = threading.Lock()

        self._features = device.features | TRANSPORT_FEATURES
        self._status = 0
        self._active = False
        self._initialize()
        for register, value in (
            (uapi.VIRTIO_MMIO_MAGIC_VALUE, MAGIC),
            (uapi.VIRTIO_MMIO_VERSION, VERSION),
            (uapi.VIRTIO_MMIO_DEVICE_ID, device.device_id),
            (uapi.VIRTIO_MMIO_VENDOR_ID, VENDOR_ID),
            *((register, _ALL_ONES) for register in _SHM_REGISTERS),
        ):
            self._show(register, value)
        device.attach(self._config_changed, self._needs_reset)

    # The guest's accesses

    def read(self, offset: int, length: int) -> bytes:
        """What the guest reads at `offset`: the bytes of the page."""
        with self._page_lock:
            return self._bytes[offset : offset + length].tobytes()

    def write(self, offset: int, data: bytes) -> None:
        """The guest wrote `data` (1, 2, 4 or 8 bytes) at `offset`.

        Registers take aligned 32-bit writes, the configuration space any (4.2.2.2); all others
        have no effect.
        """
        if offset == uapi.VIRTIO_MMIO_QUEUE_NOTIFY and len(data) == 4:
            done = self._notify(int.from_bytes(data, "little"))
        elif offset == uapi.VIRTIO_MMIO_INTERRUPT_ACK and len(data) == 4:
            lib.virtio_irq_ack(self.irq, int.from_bytes(data, "little"))
            done = True
        else:
            with self._driver_lock:
                if offset >= uapi.VIRTIO_MMIO_CONFIG:
                    done = self._write_config(offset - uapi.VIRTIO_MMIO_CONFIG, data)
                elif len(data) == 4:
                    done = self._write_register(offset, int.from_bytes(data, "little"))
                else:
                    done = False
        if not done:
            self.ignored_writes += 1

    def reset(self) -> None:
        """Brings device and registers to their initial state, as a 0 in Status does."""
        with self._driver_lock:
            self._reset()

    def close(self) -> None:
        """Stops the device, closes the kicks and lets go of the page.

        The guest must have stopped; the transport is of no use any more, but the device is.
        """
        with self._driver_lock:
            self._reset()
            self.device.detach()
            for kick in self.kicks:
                os.close(kick)
            self._bytes.release()
            ffi.release(self._registers)

    # Registers

    def _show(self, register: int, value: int) -> None:
        self._registers[register // 4] = value

    def _initialize(self) -> None:
        """The state after a reset (2.1, 4.2.2.1)."""
        self._device_features_sel = 0
        self._driver_features_sel = 0
        self._driver_features = 0
        self._queue_sel = 0
        self._queues = [_Queue() for _ in self.device.queue_sizes]
        self._config_pending = False
        self._set_status(0)
        self._show_device_features()
        self._show_queue()
        with self._page_lock:
            self._show_config()
        lib.virtio_irq_ack(self.irq, _ALL_ONES)

    def _write_register(self, register: int, value: int) -> bool:
        """False when the write has no effect, because of what it is or when it comes."""
        if register in _RING_ADDRESSES:
            return self._write_ring_address(register, value)
        match register:
            case uapi.VIRTIO_MMIO_STATUS:
                return self._write_status(value)
            case uapi.VIRTIO_MMIO_DEVICE_FEATURES_SEL:
                self._device_features_sel = value
                self._show_device_features()
            case uapi.VIRTIO_MMIO_DRIVER_FEATURES_SEL:
                self._driver_features_sel = value
            case uapi.VIRTIO_MMIO_DRIVER_FEATURES:
                return self._write_driver_features(value)
            case uapi.VIRTIO_MMIO_QUEUE_SEL:
                self._queue_sel = value
                self._show_queue()
            case uapi.VIRTIO_MMIO_QUEUE_NUM:
                queue = self._configurable_queue()
                if queue is None or queue.ready:
                    return False
                queue.num = value
            case uapi.VIRTIO_MMIO_QUEUE_READY:
                queue = self._configurable_queue()
                if queue is None:
                    return False
                queue.ready = value == 1
                self._show_queue()
            case uapi.VIRTIO_MMIO_SHM_SEL:
                pass  # whichever is selected is absent
            case _:
                return False
        return True

    def _show_device_features(self) -> None:
        selected = self._device_features_sel
        value = self._features >> 32 * selected & _ALL_ONES if selected < 2 else 0
        self._show(uapi.VIRTIO_MMIO_DEVICE_FEATURES, value)

    def _write_driver_features(self, value: int) -> bool:
        # After FEATURES_OK the driver must not change what it accepted (3.1.1, step 5).
        negotiating = self._status & (_DRIVER | _FEATURES_OK) == _DRIVER
        if not negotiating or self._driver_features_sel >= 2:
            return False
        shift = 32 * self._driver_features_sel
        self._driver_features &= ~(_ALL_ONES << shift)
        self._driver_features |= value << shift
        return True

    # Queues (4.2.3.2)

    def _selected_queue(self) -> _Queue | None:
        return self._queues[self._queue_sel] if self._queue_sel < len(self._queues) else None

    def _configurable_queue(self) -> _Queue | None:
        """The selected queue while the driver may configure it: after feature negotiation and
        before DRIVER_OK. A live queue is stopped by a reset alone: RING_RESET is not offered."""
        now = self._status & (_FEATURES_OK | _DRIVER_OK | _FAILED)
        return self._selected_queue() if now == _FEATURES_OK else None

    def _show_queue(self) -> None:
        queue = self._selected_queue()
        size = self.device.queue_sizes[self._queue_sel] if queue else 0
        self._show(uapi.VIRTIO_MMIO_QUEUE_NUM_MAX, size)
        self._show(uapi.VIRTIO_MMIO_QUEUE_READY, queue.ready if queue else 0)

    def _write_ring_address(self, register: int, value: int) -> bool:
        queue = self._configurable_queue()
        if queue is None or queue.ready:
            return False
        name, shift = _RING_ADDRESSES[register]
        kept = getattr(queue, name) & ~(_ALL_ONES << shift)
        setattr(queue, name, kept | value << shift)
        return True

    def _notify(self, index: int) -> bool:
        """Where no ioeventfd absorbed QueueNotify."""
        if index >= len(self.kicks):
            return False
        if index in self.device.synchronous:
            self.device.serve_now(index)
        else:
            os.eventfd_write(self.kicks[index], 1)
        return True

    def _activate_queue(self, index: int, queue: _Queue) -> QueueActivation:
        """ValueError when the driver put the queue where it cannot be."""
        if queue.num > self.device.queue_sizes[index]:
            raise ValueError(f"queue {index} is larger than QueueNumMax")
        config = ffi.new(
            "struct virtq_config *",
            {
                "desc_gpa": queue.desc_gpa,
                "avail_gpa": queue.avail_gpa,
                "used_gpa": queue.used_gpa,
                "size": queue.num,
                "event_idx": self._negotiated(uapi.VIRTIO_RING_F_EVENT_IDX),
                "indirect": self._negotiated(uapi.VIRTIO_RING_F_INDIRECT_DESC),
            },
        )
        if lib.virtq_init(ffi.new("struct virtq *"), self._memory, config):
            raise ValueError(f"queue {index} is not in guest memory")
        return QueueActivation(index, config, self.kicks[index])

    # Device status (2.1, 3.1.1)

    def _negotiated(self, feature: int) -> bool:
        return bool(self._driver_features & 1 << feature)

    def _set_status(self, status: int) -> None:
        with self._page_lock:
            self._status = status
            self._show(uapi.VIRTIO_MMIO_STATUS, status)

    def _add_status(self, bits: int) -> None:
        with self._page_lock:
            self._status |= bits
            self._show(uapi.VIRTIO_MMIO_STATUS, self._status)

    def _write_status(self, value: int) -> bool:
        if value == 0:
            self._reset()
            return True
        before = self._status
        if before & _FAILED:
            return False  # the driver must reset the device first (2.1.1)
        if value & _FAILED:
            self._deactivate()
            self._add_status(_FAILED)
            return True
        if before & _NEEDS_RESET:
            return False
        # Bits are only ever added, each after those before it (2.1.1).
        for bit in _INITIALIZATION:
            if not value & bit:
                break
            if not self._status & bit and not self._advance(bit):
                break
        return self._status != before

    def _advance(self, bit: int) -> bool:
        """Sets one status bit, unless the device refuses."""
        if bit == _FEATURES_OK and (
            self._driver_features & ~self._features or not self._negotiated(uapi.VIRTIO_F_VERSION_1)
        ):
            return False  # the driver reads the status back and finds the bit missing (2.2.2)
        self._add_status(bit)
        if bit == _DRIVER_OK:
            self._activate()
        return True

    def _activate(self) -> None:
        try:
            queues = tuple(
                self._activate_queue(index, queue) if queue.ready else None
                for index, queue in enumerate(self._queues)
            )
        except ValueError:
            self._needs_reset()
            return
        self._active = True
        try:
            self.device.activate(Activation(self._memory, self._driver_features, queues, self.irq))
        except Exception:
            log_defect(f"{type(self.device).__name__} could not be activated")
            self._deactivate()
            self._needs_reset()
        if self._config_pending:
            lib.virtio_irq_raise(self.irq, lib.VIRTIO_IRQ_CONFIG)

    def _deactivate(self) -> None:
        if self._active:
            self.device.deactivate()
            self._active = False

    def _reset(self) -> None:
        self._deactivate()
        self._initialize()

    def _needs_reset(self) -> None:
        self._add_status(_NEEDS_RESET)
        if self._status & _DRIVER_OK:
            lib.virtio_irq_raise(self.irq, lib.VIRTIO_IRQ_CONFIG)

    # Configuration space (2.5)

    def _show_config(self) -> None:
        config = self.device.read_config()
        start = uapi.VIRTIO_MMIO_CONFIG
        self._bytes[start : start + len(config)] = config

    def _write_config(self, offset: int, data: bytes) -> bool:
        if offset + len(data) > len(self.device.read_config()):
            return False
        try:
            self.device.write_config(offset, data)
        except Exception:
            log_defect(f"{type(self.device).__name__} failed a write to its configuration space")
            return False
        with self._page_lock:
            self._show_config()
        return True

    def _config_changed(self) -> None:
        with self._page_lock:
            if self._trap_reads:
                self._trap_reads(True)
            try:
                self._show_config()
                generation = self._registers[uapi.VIRTIO_MMIO_CONFIG_GENERATION // 4]
                self._show(uapi.VIRTIO_MMIO_CONFIG_GENERATION, generation + 1 & _ALL_ONES)
            finally:
                if self._trap_reads:
                    self._trap_reads(False)
            if not self._status & _DRIVER_OK:
                # A driver that is still initializing may have read the old one already, and
                # takes no interrupts yet.
                self._config_pending = self._status != 0
                return
        lib.virtio_irq_raise(self.irq, lib.VIRTIO_IRQ_CONFIG)
