"""A driver of a network device with a socket for its frames, such as a `GuestStack` needs."""

from __future__ import annotations

import os
import select
import socket
import struct
import threading
from typing import TYPE_CHECKING

from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.net import VirtioNet
from pyvmm.virtio.reference import DESC_F_WRITE, DESC_SIZE
from support.mmio_driver import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, QUEUE_AREA, MmioDriver

if TYPE_CHECKING:
    from typing import Self

    from pyvmm.backends.net import NetPort

MAC = bytes.fromhex("525400123456")
HEADER = 12

RX_BUFFERS, RX_SIZE = 64, 4096
TX_BUFFERS, TX_SIZE = 4, HEADER + 14 + 8 + 65535
_RX_BUFFERS_GPA = 3 * QUEUE_AREA
_TX_BUFFERS_GPA = _RX_BUFFERS_GPA + RX_BUFFERS * RX_SIZE


class _Ring:
    """A queue of buffers that are always the same, one a descriptor."""

    def __init__(self, driver: MmioDriver, index: int, features: int, size: int) -> None:
        self.config = driver.set_up_queue(index, features, size).config
        self._notify = lambda: driver.notify(index)
        self.memory = memoryview(driver.memory.regions[0])
        self._avail = self._used = 0

    def describe(self, head: int, gpa: int, length: int, flags: int = 0) -> None:
        at = self.config.desc_gpa + DESC_SIZE * head
        struct.pack_into("<QIHH", self.memory, at, gpa, length, flags, 0)

    def offer(self, heads: list[int]) -> None:
        old, config = self._avail, self.config
        for head in heads:
            at = config.avail_gpa + 4 + 2 * (self._avail % config.size)
            struct.pack_into("<H", self.memory, at, head)
            self._avail = (self._avail + 1) % 65536
        struct.pack_into("<H", self.memory, config.avail_gpa + 2, self._avail)
        (event,) = struct.unpack_from("<H", self.memory, config.used_gpa + 4 + 8 * config.size)
        if (self._avail - event - 1) % 65536 < (self._avail - old) % 65536:
            self._notify()

    def next_used(self) -> tuple[int, int] | None:
        """The head and the length of the next chain that came back."""
        (idx,) = struct.unpack_from("<H", self.memory, self.config.used_gpa + 2)
        if self._used == idx:
            return None
        slot = self.config.used_gpa + 4 + 8 * (self._used % self.config.size)
        self._used = (self._used + 1) % 65536
        head, length = struct.unpack_from("<II", self.memory, slot)
        return head, length

    def want_interrupt(self) -> None:
        at = self.config.avail_gpa + 4 + 2 * self.config.size
        struct.pack_into("<H", self.memory, at, self._used)


class NetBridge:
    """The guest of `port`; `fd` takes its frames and gives those for it, each behind a header of 12
    bytes. `device` is the network device in between.

    While nobody takes its frames, the driver offers no buffers.
    """

    def __init__(self, port: NetPort) -> None:
        self.device = VirtioNet(port, mac=MAC)
        self._driver = MmioDriver(self.device)
        features = self._driver.negotiate()
        assert features & 1 << uapi.VIRTIO_RING_F_EVENT_IDX
        self._rx = _Ring(self._driver, 0, features, RX_BUFFERS)
        self._tx = _Ring(self._driver, 1, features, TX_BUFFERS)
        _Ring(self._driver, 2, features, 16)
        for head in range(RX_BUFFERS):
            self._rx.describe(head, _RX_BUFFERS_GPA + head * RX_SIZE, RX_SIZE, DESC_F_WRITE)
        self._driver.add_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        self._rx.offer(list(range(RX_BUFFERS)))
        self._tx_free = list(range(TX_BUFFERS))
        self._ours, self._theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self._ours, self._theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._ours.setblocking(False)
        self.fd = self._theirs.fileno()
        self._late: bytes | None = None  # a frame that nobody took yet
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        with self._ours, self._theirs, self._driver:
            os.close(self._stop)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._stop, select.POLLIN)
        poll.register(self._driver.irqfd, select.POLLIN)
        while True:
            # The index is written before the last look.
            self._rx.want_interrupt()
            self._tx.want_interrupt()
            busy = self._collect()
            wanted = select.POLLIN if self._tx_free else 0
            poll.register(self._ours, wanted | (select.POLLOUT if self._late else 0))
            ready = dict(poll.poll(0 if busy else None))
            if self._stop in ready:
                return
            if self._driver.irqfd in ready:
                self._driver.interrupted()
            events = ready.get(self._ours.fileno(), 0)
            if events & select.POLLOUT and self._late is not None:
                late, self._late = self._late, None
                self._give(late)
            if events & select.POLLIN:
                self._transmit()

    def _transmit(self) -> None:
        heads = []
        while self._tx_free:
            try:
                frame = self._ours.recv(1 << 17)
            except BlockingIOError:
                break
            head = self._tx_free.pop()
            gpa = _TX_BUFFERS_GPA + head * TX_SIZE
            frame = frame[:TX_SIZE]
            self._tx.memory[gpa : gpa + len(frame)] = frame
            self._tx.describe(head, gpa, len(frame))
            heads.append(head)
        self._tx.offer(heads)

    def _collect(self) -> bool:
        """True when anything came back."""
        busy = False
        while (used := self._tx.next_used()) is not None:
            self._tx_free.append(used[0])
            busy = True
        while self._late is None and (used := self._rx.next_used()) is not None:
            self._receive(*used)
            busy = True
        return busy

    def _receive(self, head: int, length: int) -> None:
        memory = self._rx.memory
        heads, parts = [head], []
        (count,) = struct.unpack_from("<H", memory, _RX_BUFFERS_GPA + head * RX_SIZE + 10)
        for number in range(count):
            if number:
                used = self._rx.next_used()
                assert used is not None  # all of a frame is published at once
                head, length = used
                heads.append(head)
            gpa = _RX_BUFFERS_GPA + head * RX_SIZE
            parts.append(bytes(memory[gpa : gpa + length]))
        self._rx.offer(heads)
        self._give(b"".join(parts))

    def _give(self, frame: bytes) -> None:
        try:
            self._ours.send(frame, socket.MSG_NOSIGNAL)
        except BlockingIOError:
            self._late = frame
        except (BrokenPipeError, ConnectionResetError):
            pass
