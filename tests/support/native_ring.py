"""The C ring with the interface of the reference, so that one test can drive either."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from pyvmm._core import ffi, lib
from pyvmm.virtio.reference import Buffer, Chain, GuestMemory, RingConfig

_alive: WeakKeyDictionary[Any, list[Any]] = WeakKeyDictionary()


def native_memory(memory: GuestMemory) -> Any:
    """A `struct guest_mem *` over the same bytes; it keeps them alive."""
    buffers = [ffi.from_buffer("uint8_t[]", ram.obj) for ram in memory.regions.values()]
    native = ffi.new("struct guest_mem *", {"count": len(buffers)})
    for region, gpa, buffer in zip(native.regions, memory.regions, buffers, strict=False):
        region.gpa, region.size, region.hva = gpa, len(buffer), buffer
    _alive[native] = buffers
    return native


class NativeVirtqueue:
    """`struct virtq`; see `ReferenceVirtqueue` for the methods, which are the same."""

    def __init__(self, memory: GuestMemory, config: RingConfig) -> None:
        self.memory = memory
        self._vq = ffi.new("struct virtq *")
        self._mem = native_memory(memory)
        self._config = ffi.new("struct virtq_config *", tuple(config))
        if lib.virtq_init(self._vq, self._mem, self._config) < 0:
            raise ValueError("virtq_init refused the configuration")
        self._iov = ffi.new("struct iovec[]", config.size)
        self._chain = ffi.new("struct virtq_chain *", {"iov": self._iov})

    def __getattr__(self, field: str) -> Any:
        return getattr(self._vq, field)

    def start_at(self, idx: int) -> None:
        """As after `idx` chains."""
        vq = self._vq
        vq.avail_idx = vq.next_avail = vq.next_used = vq.published_used = idx

    def pop(self) -> Chain | None:
        result = lib.virtq_pop(self._vq, self._chain)
        assert self.broken == (result == lib.VIRTQ_BROKEN)
        if result != lib.VIRTQ_CHAIN:
            return None
        chain = self._chain
        buffers = [self._buffer(self._iov[n]) for n in range(chain.readable + chain.writable)]
        readable, writable = buffers[: chain.readable], buffers[chain.readable :]
        assert chain.readable_bytes == sum(buffer.length for buffer in readable)
        assert chain.writable_bytes == sum(buffer.length for buffer in writable)
        return Chain(chain.head, readable, writable)

    def _buffer(self, iov: Any) -> Buffer:
        hva = int(ffi.cast("uintptr_t", iov.iov_base))
        for region in self._mem.regions[0 : self._mem.count]:
            offset = hva - int(ffi.cast("uintptr_t", region.hva))
            if offset >= 0 and offset + iov.iov_len <= region.size:
                return Buffer(region.gpa + offset, iov.iov_len)
        raise AssertionError(f"{iov.iov_len} bytes at {hva:#x} are not in guest memory")

    def push(self, head: int, written: int) -> None:
        lib.virtq_push(self._vq, head, written)

    def publish(self) -> bool:
        return bool(lib.virtq_publish(self._vq))

    def disable_notify(self) -> None:
        lib.virtq_disable_notify(self._vq)

    def enable_notify(self) -> bool:
        return bool(lib.virtq_enable_notify(self._vq))
