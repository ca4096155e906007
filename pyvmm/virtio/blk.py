"""virtio-blk: the block device (virtio 1.2, section 5.2).

What is rare is here: features, configuration space, life cycle. The requests are served in C, each
queue by a thread that sits in ``virtio_blk_queue_run``.
"""

from __future__ import annotations

import os
import threading

from pyvmm._core import ffi, lib
from pyvmm.errors import UsageError
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.device import VirtioDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.virtio.device import Activation

    class BlockImage(Protocol):
        """What the device asks of its image; `backends.disk.Image` has it. Sizes in bytes."""

        native: Any  # struct blk_image *
        readonly: bool
        logical_block_size: int
        physical_block_size: int
        discard_granularity: int

        @property
        def size(self) -> int: ...

        @property
        def in_memory(self) -> bool: ...

        def resize(self, size: int | None) -> None: ...


SECTOR = 512
MAX_QUEUES = 64

_WCE_OFFSET = uapi.virtio_blk_config.wce.offset
_FLUSH = 1 << uapi.VIRTIO_BLK_F_FLUSH
_CONFIG_WCE = 1 << uapi.VIRTIO_BLK_F_CONFIG_WCE


class VirtioBlk(VirtioDevice):
    """A disk. `image` must stay open as long as the device lives.

    `serial` is what the guest finds as the disk's serial number; `queues` how many request queues
    there are, each of `queue_size` descriptors and with a thread of its own; `writethrough` makes
    each write stable before it is complete, where the driver does not choose itself.

    `engine` says how requests are executed, "io_uring" or "sync"; `engine_remark` is empty, or
    what the user should be told about it in one sentence.

    `on_error`, if there is one, is called on a queue's thread with the errno of a request that
    failed on the host. The request is then kept, and the queue serves no more, until `resume` tries
    again. Without it, the driver gets the error.

    UsageError when an argument is out of its limits.
    """

    device_id = uapi.VIRTIO_ID_BLOCK

    def __init__(
        self,
        image: BlockImage,
        *,
        serial: str = "",
        queues: int = 1,
        queue_size: int = 256,
        writethrough: bool = False,
        on_error: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        if not serial.isascii() or len(serial) > uapi.VIRTIO_BLK_ID_BYTES:
            raise UsageError(
                f"the serial number {serial!r} is not ASCII of at most "
                f"{uapi.VIRTIO_BLK_ID_BYTES} characters: shorten it"
            )
        if not 1 <= queues <= MAX_QUEUES:
            raise UsageError(f"{queues} queues for a disk: give 1 to {MAX_QUEUES}")
        self.engine, self.engine_remark = choose_engine(image.in_memory)
        self.queue_sizes = (queue_size,) * queues
        self.features = _features(image, queues)
        self._image = image
        self._default_writethrough = writethrough
        self._writethrough = writethrough
        self._config = _config(image, self.queue_sizes)
        self._device = ffi.new(
            "struct virtio_blk_device *",
            {
                "image": image.native,
                "readonly": image.readonly,
                "stop_on_error": on_error is not None,
                "serial": serial.encode("ascii"),
                "writethrough": writethrough,
            },
        )
        self._on_error = on_error
        self._features = 0  # negotiated
        self._lock = threading.Lock()  # for the two lists; the threads never take it
        self._queues: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._failed = threading.Condition()  # guards the next two
        self._turn = 0  # counts what queues that failed wait for
        self._stopping = False

    def read_config(self) -> bytes:
        """``struct virtio_blk_config`` (5.2.4)."""
        self._config.wce = not self._writethrough
        return bytes(self._config)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver chooses between writeback and writethrough; all else is read-only."""
        if offset <= _WCE_OFFSET < offset + len(data):
            self._set_writethrough(data[_WCE_OFFSET - offset] == 0)

    def activate(self, activation: Activation) -> None:
        """Creates the queues and starts their threads. OSError when one cannot be created."""
        self._features = activation.features
        if activation.features & _CONFIG_WCE and not activation.features & _FLUSH:
            # A driver that cannot flush starts with writethrough (5.2.5.2).
            self._writethrough = True
            self.config_changed()
        self._set_writethrough(self._writethrough)
        engine = lib.BLK_ENGINE_IO_URING if self.engine == "io_uring" else lib.BLK_ENGINE_SYNC
        with self._lock:
            for queue in activation.queues:
                if queue is None:
                    continue
                native = lib.virtio_blk_queue_create(
                    self._device,
                    engine,
                    activation.memory,
                    queue.config,
                    queue.kick,
                    activation.irq,
                )
                if native == ffi.NULL:
                    raise OSError(ffi.errno, os.strerror(ffi.errno))
                self._queues.append(native)
            self._start()

    def deactivate(self) -> None:
        """Completes what is in flight, stops the threads and frees the queues."""
        with self._lock:
            self._stop()
            for native in self._queues:
                lib.virtio_blk_queue_destroy(native)
            self._queues = []
        self._writethrough = self._default_writethrough

    def pause(self) -> None:
        """Completes what is in flight; until `resume` guest memory is not touched. Idempotent."""
        with self._lock:
            self._stop()

    def resume(self) -> None:
        """Serves the queues again after `pause` or an error; does nothing while not active."""
        with self._lock:
            if self._threads:
                self._end_turn()
            else:
                self._start()

    def resize(self, size: int | None = None) -> None:
        """Makes the disk larger while the guest runs, to `size` bytes, and tells the driver.

        None takes over the size that the image has by now. UsageError as of the image.
        """
        with self._lock:  # no queue may start meanwhile
            running = bool(self._threads)
            self._stop()
            try:
                self._image.resize(size)
            finally:
                if running:
                    self._start()
        self._config.capacity = self._image.size // SECTOR
        self.config_changed()

    def limit(self, *, iops: int = 0, bps: int = 0) -> None:
        """How many requests and bytes there may be in a second; 0: any number. At any time."""
        lib.blk_limit_set(self._image.native, iops, bps)
        with self._lock:
            for native in self._queues:
                lib.virtio_blk_queue_wake(native)

    @property
    def counters(self) -> dict[str, int]:
        """Since activation, all queues together: see ``struct virtio_blk_counters``."""
        totals = dict.fromkeys(("requests", "failed", "interrupts", "malformed"), 0)
        with self._lock:
            for native in self._queues:
                counters = lib.virtio_blk_queue_counters(native)
                for name in totals:
                    totals[name] += getattr(counters, name)
        return totals

    def _start(self) -> None:
        self._stopping = False
        for index, native in enumerate(self._queues):
            name = f"blk{index}"
            thread = threading.Thread(
                target=self._serve, args=(native, self._turn), name=name, daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _stop(self) -> None:
        if self._threads:
            for native in self._queues:
                lib.virtio_blk_queue_stop(native)
            self._end_turn(stopping=True)
            for thread in self._threads:
                thread.join()
            self._threads = []
            for native in self._queues:  # some may have ended by an error before they were stopped
                lib.virtio_blk_queue_allow(native)

    def _serve(self, native: Any, turn: int) -> None:
        while (result := lib.virtio_blk_queue_run(native)) == lib.VIRTIO_BLK_FAILED:
            assert self._on_error is not None
            if self._turn == turn:
                self._on_error(lib.virtio_blk_queue_error(native))
            with self._failed:
                while self._turn == turn:
                    self._failed.wait()
                turn = self._turn
                if self._stopping:
                    return
        if result == lib.VIRTIO_BLK_STOPPED:
            return
        if result < 0:
            import logging

            logging.getLogger("pyvmm.virtio").error("virtio-blk stopped: %s", os.strerror(-result))
        self.needs_reset()

    def _end_turn(self, *, stopping: bool = False) -> None:
        with self._failed:
            self._turn += 1
            self._stopping = stopping
            self._failed.notify_all()

    def _set_writethrough(self, writethrough: bool) -> None:
        """When a write is stable on completion (5.2.6.2).

        Always where the driver negotiated neither a way to flush nor the choice.
        """
        self._writethrough = writethrough
        always = not self._features & (_FLUSH | _CONFIG_WCE)
        lib.virtio_blk_set_writethrough(self._device, writethrough or always)


def choose_engine(in_memory: bool) -> tuple[str, str]:
    """How requests are executed, and what the user should be told about it, if anything."""
    if in_memory:
        return "sync", ""
    error = -lib.blk_io_uring_check()
    if not error:
        return "io_uring", ""
    return "sync", (
        f"disks are served without io_uring ({os.strerror(error)}), more slowly: it needs "
        "Linux 5.13, sysctl kernel.io_uring_disabled=0 and a seccomp filter that permits it"
    )


def _features(image: BlockImage, queues: int) -> int:
    bits = [
        uapi.VIRTIO_BLK_F_SEG_MAX,
        uapi.VIRTIO_BLK_F_BLK_SIZE,
        uapi.VIRTIO_BLK_F_TOPOLOGY,
        uapi.VIRTIO_BLK_F_FLUSH,
        uapi.VIRTIO_BLK_F_CONFIG_WCE,
    ]
    if queues > 1:
        bits.append(uapi.VIRTIO_BLK_F_MQ)
    if image.readonly:
        bits.append(uapi.VIRTIO_BLK_F_RO)
    else:
        bits.append(uapi.VIRTIO_BLK_F_WRITE_ZEROES)
        if image.discard_granularity:
            bits.append(uapi.VIRTIO_BLK_F_DISCARD)
    return sum(1 << bit for bit in bits)


def _config(image: BlockImage, queue_sizes: tuple[int, ...]) -> Any:
    blocks = image.physical_block_size // image.logical_block_size
    config = uapi.virtio_blk_config(
        capacity=image.size // SECTOR,
        seg_max=queue_sizes[0] - 2,  # a header and a status come with the data
        blk_size=image.logical_block_size,
        physical_block_exp=blocks.bit_length() - 1,
        min_io_size=blocks,
        num_queues=len(queue_sizes),
    )
    if not image.readonly:
        config.max_write_zeroes_sectors = lib.VIRTIO_BLK_MAX_SEGMENT_SECTORS
        config.max_write_zeroes_seg = lib.VIRTIO_BLK_MAX_SEGMENTS
        config.write_zeroes_may_unmap = 1
    if not image.readonly and image.discard_granularity:
        config.max_discard_sectors = lib.VIRTIO_BLK_MAX_SEGMENT_SECTORS
        config.max_discard_seg = lib.VIRTIO_BLK_MAX_SEGMENTS
        config.discard_sector_alignment = image.discard_granularity // SECTOR
    return config
