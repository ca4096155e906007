"""Virtqueues as devices written in Python see them, over the C ring (virtio 1.2, section 2.7)."""

from __future__ import annotations

from pyvmm._core import ffi, lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.virtio.device import Activation, QueueActivation


class RingBrokenError(Exception):
    """The driver's ring can no longer be followed; only a reset of the device helps."""


class Chain:
    """A descriptor chain that the driver made available: one request.

    `readable` and `writable` are its device-readable and device-writable parts in guest memory,
    as bytes that the driver can change at any time: copy first, then decide. They must not be
    used after `complete`, which is due exactly once; until then the chain may be kept.
    Only for the thread that serves the queue.
    """

    __slots__ = (
        "_head",
        "_queue",
        "_read_at",
        "_write_at",
        "readable",
        "readable_bytes",
        "writable",
        "writable_bytes",
    )

    def __init__(
        self,
        queue: Virtqueue,
        head: int,
        readable: tuple[memoryview, ...],
        writable: tuple[memoryview, ...],
    ) -> None:
        self.readable = readable
        self.writable = writable
        self.readable_bytes = sum(map(len, readable))
        self.writable_bytes = sum(map(len, writable))
        self._queue: Virtqueue | None = queue
        self._head = head
        self._read_at = 0
        self._write_at = 0

    @property
    def completed(self) -> bool:
        """Whether the chain went back to the driver, or its queue was stopped."""
        return self._queue is None

    @property
    def unread(self) -> int:
        """How many device-readable bytes `read` has not yet returned."""
        return self.readable_bytes - self._read_at

    def read(self, size: int) -> bytes:
        """A copy of the next device-readable bytes: `size` of them, fewer at the end."""
        data = b"".join(_slices(self.readable, self._read_at, size))
        self._read_at += len(data)
        return data

    def read_all(self, limit: int) -> bytes:
        """A copy of all device-readable bytes. ValueError when they are more than `limit`."""
        if self.readable_bytes > limit:
            raise ValueError(f"a request of {self.readable_bytes} bytes, more than {limit}")
        return b"".join(self.readable)

    def write(self, data: bytes) -> int:
        """Puts `data` after what was written before; returns how much of it found room."""
        done = 0
        for part in _slices(self.writable, self._write_at, len(data)):
            part[:] = data[done : done + len(part)]
            done += len(part)
        self._write_at += done
        return done

    def complete(self, written: int | None = None) -> None:
        """Returns the chain to the driver, `written` device-writable bytes of it filled.

        By default that is what `write` wrote. RuntimeError when the chain is completed already.
        """
        if self._queue is None:
            raise RuntimeError("a descriptor chain was completed twice, or after its queue stopped")
        written = self._write_at if written is None else written
        if not 0 <= written <= self.writable_bytes:
            raise ValueError(f"{written} bytes written to a chain of {self.writable_bytes}")
        self._queue._push(self, written)
        self._release()

    def _release(self) -> None:
        self._queue = None
        for part in (*self.readable, *self.writable):
            part.release()


def _slices(parts: tuple[memoryview, ...], start: int, size: int) -> Iterable[memoryview]:
    """The pieces of `parts`, taken as one run of bytes, that hold [start, start + size)."""
    for part in parts:
        if size <= 0:
            return
        piece = part[start : start + size]
        start = max(start - len(part), 0)
        size -= len(piece)
        yield piece


class Virtqueue:
    """The device side of one queue. Only one thread at a time may use it.

    `index` is the queue's number, `size` its number of descriptors, `kick` the eventfd that
    tells of new chains. ValueError when the driver's configuration cannot be used.
    """

    def __init__(self, activation: Activation, queue: QueueActivation) -> None:
        self.index = queue.index
        self.kick = queue.kick
        self._vq = ffi.new("struct virtq *")
        self._memory = activation.memory
        self._irq = activation.irq
        if lib.virtq_init(self._vq, self._memory, queue.config):
            raise ValueError(f"queue {queue.index} is not in guest memory")
        self.size: int = self._vq.size
        self._iov = ffi.new("struct iovec[]", self.size)
        self._chain = ffi.new("struct virtq_chain *", {"iov": self._iov})
        self._outstanding: set[Chain] = set()

    def pop(self) -> Chain | None:
        """The next chain, or None when the driver has made no more available.

        RingBrokenError when the available ring cannot be followed.
        """
        popped = self._chain
        result = lib.virtq_pop(self._vq, popped)
        if result == lib.VIRTQ_EMPTY:
            return None
        if result == lib.VIRTQ_BROKEN:
            raise RingBrokenError(f"the available ring of queue {self.index} makes no sense")
        readable, writable = popped.readable, popped.writable
        parts = tuple(
            memoryview(ffi.buffer(self._iov[i].iov_base, self._iov[i].iov_len))
            for i in range(readable + writable)
        )
        chain = Chain(self, popped.head, parts[:readable], parts[readable:])
        self._outstanding.add(chain)
        return chain

    def _push(self, chain: Chain, written: int) -> None:
        self._outstanding.remove(chain)
        lib.virtq_push(self._vq, chain._head, written)

    def publish(self) -> None:
        """Shows the driver all completed chains, and interrupts it when it wants that."""
        if lib.virtq_publish(self._vq):
            lib.virtio_irq_raise(self._irq, lib.VIRTIO_IRQ_VRING)

    def disable_notify(self) -> None:
        """Asks the driver not to notify (a hint)."""
        lib.virtq_disable_notify(self._vq)

    def enable_notify(self) -> bool:
        """Asks for a notification of the next chain. True when some came meanwhile: pop again."""
        return bool(lib.virtq_enable_notify(self._vq))

    def close(self) -> None:
        """Lets go of guest memory: chains that were not completed never will be."""
        for chain in self._outstanding:
            chain._release()
        self._outstanding.clear()
