"""virtio-balloon: memory that the guest lends to the host (virtio 1.2, section 5.5).

Pages reach the host in three ways: the driver puts them into the balloon because it was asked to
(inflation); it reports free ones, all the time (reporting, 5.5.6.7); or it names all that are free
when it is asked (hinting, 5.5.6.5). In each case their memory goes back to the host at once, and
they are zero when the guest touches them again.
"""

from __future__ import annotations

import os
import select
import struct
import threading
import time

from pyvmm._core import ffi, lib
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.device import PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from pyvmm.virtio.device import Activation
    from pyvmm.virtio.queue import Chain, Virtqueue

PAGE_SIZE: int = lib.BALLOON_PAGE_SIZE

# What the values of the statistics are called, by their tags (5.5.6.4; Linux has more of them).
# Those of memory are in bytes.
STATISTICS = (
    "swap_in",
    "swap_out",
    "major_faults",
    "minor_faults",
    "free_memory",
    "total_memory",
    "available_memory",
    "disk_caches",
    "htlb_pgalloc",
    "htlb_pgfail",
    "oom_kills",
    "alloc_stalls",
    "async_scans",
    "direct_scans",
    "async_reclaims",
    "direct_reclaims",
)
_STATISTIC = struct.Struct("<HQ")
_MAX_STATISTICS = 256

# struct virtio_balloon_config: num_pages, actual, free_page_hint_cmd_id, poison_val (5.5.4).
_CONFIG = struct.Struct("<IIII")
# Of them the driver writes the second and the fourth.
_WRITABLE = frozenset((*range(4, 8), *range(12, 16)))

_NUMBER = struct.Struct("<I")
_NO_COMMAND = uapi.VIRTIO_BALLOON_CMD_ID_DONE
_FIRST_COMMAND = 2  # after those with a meaning

_INFLATE, _DEFLATE, _STATS, _HINT, _REPORT = range(5)
# The roles of the queues in their order, with the feature that each needs.
_ROLES = {
    _INFLATE: None,
    _DEFLATE: None,
    _STATS: uapi.VIRTIO_BALLOON_F_STATS_VQ,
    _HINT: uapi.VIRTIO_BALLOON_F_FREE_PAGE_HINT,
    _REPORT: uapi.VIRTIO_BALLOON_F_REPORTING,
}


class Statistics:
    """What the guest last told of its memory, by the names in `STATISTICS`.

    `time` is when, in seconds since the epoch. The guest may say anything.
    """

    __slots__ = ("time", "values")

    def __init__(self, values: dict[str, int]) -> None:
        self.values = values
        self.time = time.time()


class VirtioBalloon(PythonDevice):
    """A balloon, which takes nothing from the guest until it is told to by `resize`.

    `deflate_on_oom` lets the driver take pages back where it would otherwise kill a process;
    `reporting` has it report free pages, and `hinting` makes `hint` work.

    `on_ready` is called when the guest has a driver, `on_actual` and `on_statistics` when what they
    are named for was renewed; on a thread that must not be blocked: of a vCPU, or that of the
    device.
    """

    device_id = uapi.VIRTIO_ID_BALLOON
    queue_sizes = (128, 128, 128, 128, 128)

    def __init__(
        self,
        *,
        deflate_on_oom: bool = False,
        reporting: bool = False,
        hinting: bool = False,
    ) -> None:
        super().__init__()
        self.pages = 0  # of `PAGE_SIZE`, that the driver is to give
        self.actual = 0  # pages in the balloon, by what the driver says
        # Pages that went back to the host, by each of the ways.
        self.inflated = self.reported = self.hinted = 0
        self.statistics: Statistics | None = None
        self.on_ready: Callable[[], None] | None = None
        self.on_actual: Callable[[], None] | None = None
        self.on_statistics: Callable[[], None] | None = None
        self.features = 1 << uapi.VIRTIO_BALLOON_F_STATS_VQ
        if deflate_on_oom:
            self.features |= 1 << uapi.VIRTIO_BALLOON_F_DEFLATE_ON_OOM
        if reporting:
            self.features |= 1 << uapi.VIRTIO_BALLOON_F_REPORTING
        if hinting:
            self.features |= 1 << uapi.VIRTIO_BALLOON_F_FREE_PAGE_HINT
            # The guest stands still while its notification of a hint is served: see `_take_hint`.
            self.synchronous = frozenset((_HINT,))
        if reporting or hinting:
            self.features |= 1 << uapi.VIRTIO_BALLOON_F_PAGE_POISON
        self._roles: dict[int, int] = {}
        self._poison = 0
        self._keeps_poison = False
        self._request_lock = threading.Lock()  # guards _request_fd
        self._request_fd = -1
        self._kept: Chain | None = None  # the last statistics
        self._hint_lock = threading.Lock()  # one run of hinting at a time
        self._command = _NO_COMMAND
        self._next_command = _FIRST_COMMAND
        self._hints_count = False
        self._hints_ended = threading.Event()

    @property
    def ready(self) -> bool:
        """Whether the guest has a driver for it."""
        return bool(self.queues)

    @property
    def has_statistics(self) -> bool:
        """Whether it has one that tells statistics."""
        return self.ready and _STATS in self._roles.values()

    @property
    def takes_hints(self) -> bool:
        """Whether it has one that gives hints of free pages."""
        return self.ready and _HINT in self._roles.values()

    def resize(self, pages: int) -> None:
        """Asks the driver for a balloon of so many pages, at most 2**32 - 1. Any thread."""
        self.pages = pages
        self.config_changed()

    def read_config(self) -> bytes:
        return _CONFIG.pack(self.pages, self.actual, self._command, self._poison)

    def write_config(self, offset: int, data: bytes) -> None:
        config = bytearray(self.read_config())
        for at, byte in enumerate(data, offset):
            if at in _WRITABLE:
                config[at] = byte
        _, actual, _, self._poison = _CONFIG.unpack(config)
        if actual != self.actual:
            self._set_actual(actual)

    def _set_actual(self, pages: int) -> None:
        self.actual = pages
        if self.on_actual is not None:
            self.on_actual()

    def activate(self, activation: Activation) -> None:
        self._memory = activation.memory
        self._keeps_poison = bool(activation.features & 1 << uapi.VIRTIO_BALLOON_F_PAGE_POISON)
        # The numbers of the later queues depend on the features: in the specification (5.5.2) on
        # all that there are, in Linux on those that were negotiated. Their order is the same.
        ready = (queue.index for queue in activation.queues if queue is not None)
        roles = [
            role
            for role, feature in _ROLES.items()
            if feature is None or activation.features & 1 << feature
        ]
        self._roles = dict(zip(ready, roles, strict=False))
        super().activate(activation)
        if self.on_ready is not None:
            self.on_ready()

    def started(self) -> None:
        with self._request_lock:
            self._request_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.watch(self._request_fd, select.EPOLLIN, self._return_kept)

    def stopped(self) -> None:
        """What was in the balloon is the guest's again, and the next driver starts anew."""
        with self._request_lock:
            if self._request_fd >= 0:
                os.close(self._request_fd)
                self._request_fd = -1
        self._kept = self.statistics = None
        self.pages = self._poison = 0
        self._command = _NO_COMMAND
        self._hints_count = False
        self._hints_ended.set()
        if self.actual:
            self._set_actual(0)

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        role = self._roles.get(queue.index)
        if role == _STATS:
            self._take_statistics(chain)
            return
        if role == _INFLATE:
            self._inflate(chain)
        elif role == _HINT:
            self._take_hint(queue, chain)
        elif role == _REPORT:
            self.reported += self._discard(chain)
        # Pages that leave the balloon come back by being touched.
        chain.complete(0)

    # Pages (5.5.6, 5.5.6.6, 5.5.6.7)

    def _inflate(self, chain: Chain) -> None:
        """ValueError, and nothing done, for more pages than any driver names at once."""
        data = chain.read_all(lib.BALLOON_MAX_PAGES * _NUMBER.size)
        count = len(data) // _NUMBER.size
        numbers = ffi.from_buffer("uint32_t[]", data)
        self.inflated += _done(lib.balloon_discard_pages(self._memory, numbers, count))

    def _discard(self, chain: Chain) -> int:
        """Discards the buffers of a chain, unless the driver wants to find its poison in them.

        The number of pages.
        """
        if self._keeps_poison and self._poison:
            return 0
        return sum(
            _done(lib.balloon_discard_buffer(ffi.from_buffer(part), len(part)))
            for part in chain.writable
        )

    # Statistics (5.5.6.3)

    def request_statistics(self) -> None:
        """Asks the driver for new statistics. Any thread; without a driver it does nothing."""
        with self._request_lock:
            if self._request_fd >= 0:
                os.eventfd_write(self._request_fd, 1)

    def _return_kept(self) -> None:
        """The driver fills the buffer anew when it gets it back."""
        os.eventfd_read(self._request_fd)
        kept, self._kept = self._kept, None
        if kept is not None:
            kept.complete(0)

    def _take_statistics(self, chain: Chain) -> None:
        data = chain.read_all(_MAX_STATISTICS * _STATISTIC.size)
        whole = len(data) - len(data) % _STATISTIC.size
        self.statistics = Statistics(
            {
                STATISTICS[tag]: value
                for tag, value in _STATISTIC.iter_unpack(data[:whole])
                if tag < len(STATISTICS)
            }
        )
        if self._kept is not None:  # a driver has one such buffer
            self._kept.complete(0)
        self._kept = chain
        if self.on_statistics is not None:
            self.on_statistics()

    # Hints (5.5.6.5)

    def hint(self, timeout: float) -> bool:
        """Has the driver name all free pages, and discards them; whether it did within `timeout`.

        Meanwhile they are not free: the guest may be short of memory. Any thread but those that
        serve the device. Without a driver that knows hints it is False at once.
        """
        if not self.takes_hints:
            return False
        with self._hint_lock:
            self._hints_ended.clear()
            self._command = self._next_command
            self._next_command = max(_FIRST_COMMAND, (self._next_command + 1) % (1 << 32))
            self.config_changed()
            ended = self._hints_ended.wait(timeout)
            self._command = _NO_COMMAND  # they are free again
            self.config_changed()
        return ended

    def _take_hint(self, queue: Virtqueue, chain: Chain) -> None:
        """A command of which hints follow, that they end, or a hint.

        A driver may use a page again whenever it likes (Linux does when memory is short), and
        then its contents must stay. But it does not before it has notified us, and it does not
        return from that before the page is discarded: which is why this queue is `synchronous`.
        """
        if chain.readable_bytes >= _NUMBER.size:
            (command,) = _NUMBER.unpack(chain.read(_NUMBER.size))
            if self._hints_count and command == uapi.VIRTIO_BALLOON_CMD_ID_STOP:
                self._hints_ended.set()
            self._hints_count = command == self._command >= _FIRST_COMMAND
        if self._hints_count and queue.index in self.synchronous:
            self.hinted += self._discard(chain)


def _done(pages: int) -> int:
    if pages < 0:
        raise OSError(-pages, f"guest memory cannot be discarded: {os.strerror(-pages)}")
    return pages
