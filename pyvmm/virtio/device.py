"""What a virtio device is, and the extension point for new ones.

The transport (``mmio.py``) knows a device only as `VirtioDevice`. One whose requests are served
in C implements `activate` and `deactivate` itself; one of low rate derives from `PythonDevice`
and implements `handle`, see ``rng.py``.
"""

from __future__ import annotations

import os
import select
import threading
from abc import ABC, abstractmethod
from functools import partial

from pyvmm.virtio.queue import Chain, RingBrokenError, Virtqueue

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, ClassVar


class QueueActivation:
    """A queue that the driver made ready.

    `config` is a ``struct virtq_config *`` that virtq_init accepts, `kick` the (non-blocking)
    eventfd that the driver's QueueNotify writes signal.
    """

    __slots__ = ("config", "index", "kick")

    def __init__(self, index: int, config: Any, kick: int) -> None:
        self.index = index
        self.config = config
        self.kick = kick


class Activation:
    """What a device is given at DRIVER_OK; it all stays valid until `deactivate` returns.

    `memory` is the ``struct guest_mem *``, `features` what was negotiated, `irq` the
    ``struct virtio_irq *``; `queues` has an entry for each queue of the device, None for those
    that the driver left unused.
    """

    __slots__ = ("features", "irq", "memory", "queues")

    def __init__(
        self, memory: Any, features: int, queues: tuple[QueueActivation | None, ...], irq: Any
    ) -> None:
        self.memory = memory
        self.features = features
        self.queues = queues
        self.irq = irq


def _nobody() -> None:
    """Stands for the transport of a device that has none."""


class VirtioDevice(ABC):
    """A device as a transport sees it (virtio 1.2, chapter 2).

    `device_id` is its number in section 5, `queue_sizes` the most descriptors that each queue
    may have, `features` its device-specific feature bits (the transport offers the others).
    `synchronous` are the queues that are served before the driver's notification returns.
    """

    device_id: ClassVar[int]
    queue_sizes: tuple[int, ...]
    features: int = 0
    synchronous: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self.detach()

    def read_config(self) -> bytes:
        """The whole configuration space, always of one length. Any thread."""
        return b""

    def write_config(self, offset: int, data: bytes) -> None:  # noqa: B027
        """The driver wrote `data` at `offset`, wholly inside the configuration space.

        At any time, also before DRIVER_OK. By default nothing is writable.
        """

    @abstractmethod
    def activate(self, activation: Activation) -> None:
        """The driver set DRIVER_OK: serve the queues."""

    @abstractmethod
    def deactivate(self) -> None:
        """Stops serving: when this returns, guest memory is not touched any more.

        Also called when the device is not active, and then does nothing.
        """

    def serve_now(self, index: int) -> None:  # noqa: B027
        """The driver notified one of the `synchronous` queues, on the thread of its vCPU."""

    def attach(
        self, on_config_changed: Callable[[], None], on_needs_reset: Callable[[], None]
    ) -> None:
        """A transport has the device now: what `config_changed` and `needs_reset` call."""
        self._on_config_changed = on_config_changed
        self._on_needs_reset = on_needs_reset

    def detach(self) -> None:
        """No transport has the device: there is no driver to tell."""
        self.attach(_nobody, _nobody)

    def config_changed(self) -> None:
        """Tells the driver that `read_config` returns something new. Any thread."""
        self._on_config_changed()

    def needs_reset(self) -> None:
        """Tells the driver that the device cannot go on before a reset (2.1.2). Any thread."""
        self._on_needs_reset()


class PythonDevice(VirtioDevice):
    """A device whose requests are handled in Python, on one thread of its own.

    While it is active, `queues` has an entry for each queue, None for the unused ones.
    `failed_requests` counts those that ended in an exception.
    """

    def __init__(self) -> None:
        super().__init__()
        self.queues: tuple[Virtqueue | None, ...] = ()
        self.failed_requests = 0
        self._thread: threading.Thread | None = None
        self._stop_fd = -1
        self._epoll: select.epoll | None = None
        self._watches: dict[int, Callable[[], None]] = {}
        self._pending: list[Virtqueue] = []
        self._synchronous_lock = threading.Lock()  # for the synchronous ones of `queues`

    @abstractmethod
    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        """Serves one request; ``chain.complete()`` is due now or later, and must not block.

        An exception fails this request alone: the chain is completed with length 0.
        """

    def started(self) -> None:
        """Runs on the device's thread before the first request: the place to `watch` from."""

    def stopped(self) -> None:
        """Runs after the last request: the place to forget chains that were kept."""

    def watch(self, fd: int, events: int, ready: Callable[[], None]) -> None:
        """Calls ``ready()`` on the device's thread whenever `fd` has one of the epoll `events`.

        Only on the device's thread. OSError when epoll cannot watch `fd` (a regular file).
        """
        assert self._epoll is not None
        self._epoll.register(fd, events)
        self._watches[fd] = ready

    def unwatch(self, fd: int) -> None:
        """Forgets `fd`. Only on the device's thread."""
        assert self._epoll is not None
        self._epoll.unregister(fd)
        del self._watches[fd]

    def activate(self, activation: Activation) -> None:
        """Starts the device's thread on the queues of `activation`."""
        self.queues = tuple(
            None if queue is None else Virtqueue(activation, queue) for queue in activation.queues
        )
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._stop_fd, select.EPOLLIN)
        self._thread = threading.Thread(target=self._run, name=type(self).__name__, daemon=True)
        self._thread.start()

    def deactivate(self) -> None:
        """Stops the thread and lets go of the queues."""
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            self._thread = None
            self.stopped()
        if self._epoll is not None:
            self._epoll.close()
            self._epoll = None
            os.close(self._stop_fd)
        with self._synchronous_lock:
            for queue in self.queues:
                if queue is not None:
                    queue.close()
            self.queues = ()
        self._watches.clear()
        self._pending.clear()

    def _run(self) -> None:
        try:
            for queue in self._own_queues():
                self.watch(queue.kick, select.EPOLLIN, partial(self._kicked, queue))
                self._pending.append(queue)
            self.started()
            while self._turn():
                pass
        except Exception:
            log_defect(f"{type(self).__name__} stopped")
            self.needs_reset()

    def _turn(self) -> bool:
        """Serves what is ready. False when it is time to stop."""
        assert self._epoll is not None
        for fd, _ in self._epoll.poll(0 if self._pending else -1):
            if fd == self._stop_fd:
                return False
            ready = self._watches.get(fd)
            if ready is not None:  # else an earlier one of this turn unwatched it
                ready()
        self._pending = [queue for queue in self._pending if self._serve(queue)]
        for queue in self._own_queues():
            queue.publish()
        return True

    def _own_queues(self) -> list[Virtqueue]:
        """Those that the device's thread serves."""
        return [each for each in self.queues if each and each.index not in self.synchronous]

    def serve_now(self, index: int) -> None:
        with self._synchronous_lock:
            queue = self.queues[index] if self.queues else None
            if queue is None:
                return
            more = self._serve(queue)
            queue.publish()
            if more:  # once again, not for ever: a driver that waits adds no more
                self._serve(queue)
                queue.publish()

    def _kicked(self, queue: Virtqueue) -> None:
        os.eventfd_read(queue.kick)
        if queue not in self._pending:
            self._pending.append(queue)

    def _serve(self, queue: Virtqueue) -> bool:
        """Handles at most a ring full of chains, so that one queue cannot starve the others.

        True when there may be more.
        """
        queue.disable_notify()
        try:
            for _ in range(queue.size):
                chain = queue.pop()
                if chain is None:
                    return queue.enable_notify()
                self._handle(queue, chain)
        except RingBrokenError:
            if queue.kick in self._watches:
                self.unwatch(queue.kick)
            self.needs_reset()
            return False
        return True

    def _handle(self, queue: Virtqueue, chain: Chain) -> None:
        try:
            self.handle(queue, chain)
        except Exception:
            self.failed_requests += 1
            if self.failed_requests == 1:
                log_defect(f"{type(self).__name__} failed a request of queue {queue.index}")
            if not chain.completed:
                chain.complete(0)


def log_defect(what: str) -> None:
    """Logs the exception that is being handled: a defect in a device, or hostile input to it."""
    import logging  # late: it takes milliseconds that a start without defects does not have

    logging.getLogger("pyvmm.virtio").exception(what)
