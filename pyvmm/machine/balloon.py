"""The balloon of a machine: how much of its memory the guest has, and who decides on that."""

from __future__ import annotations

import threading
import time

from pyvmm.config import LEAST_MEMORY
from pyvmm.errors import UsageError
from pyvmm.schema import Size, Source, format_size
from pyvmm.virtio.balloon import PAGE_SIZE, VirtioBalloon

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Protocol

    from pyvmm.config import BalloonConfig
    from pyvmm.virtio.balloon import Statistics

    class Teller(Protocol):
        """Who is told of events, as `events.Listeners.tell`."""

        def __call__(self, name: str, **data: object) -> None: ...


# BALLOON_CHANGE comes as often at most, as the size changes with every MiB.
EVENT_INTERVAL = 1.0
# How often a guest that is to give memory is asked what it can spare.
ASK_INTERVAL = 1.0
# A guest that has given less than STALL_BYTES in STALL_SECONDS has no more to give.
STALL_SECONDS = 5.0
STALL_BYTES = 1 << 20
# What a guest keeps available: that, or a part of its memory. Linux gives its last page to the
# balloon, and then has none for itself.
KEPT_BYTES = 16 << 20
KEPT_PART = 32


class Balloon:
    """The balloon of a machine with `memory` bytes; sizes are what the guest has, in bytes.

    `tell` hears of BALLOON_CHANGE (`actual`) and of BALLOON_STALLED (`actual`, `target`), when the
    guest does not come to the target. `paused` says whether the guest stands still. All methods may
    be called from any thread.
    """

    def __init__(
        self, config: BalloonConfig, memory: int, tell: Teller, paused: Callable[[], bool]
    ) -> None:
        self.memory = memory
        self.target = memory - config.size  # how much memory the guest is to have
        self.remarks: list[str] = []
        self.device = VirtioBalloon(
            deflate_on_oom=config.deflate_on_oom,
            reporting=config.reporting,
            hinting=config.hinting,
        )
        self.device.on_ready = self._on_ready
        self.device.on_actual = self._on_actual
        self.device.on_statistics = self._on_statistics
        self._interval = config.stats
        self._hinting = config.hinting
        self._tell = tell
        self._paused = paused
        self._wake = threading.Condition()  # guards what follows
        self._closed = False
        self._news = False  # a new target or driver, or what the next is about
        self._fresh = False  # statistics that were not looked at
        self._changed = False  # `actual`, and `tell` does not know yet
        self._had = memory  # `actual` when the last statistics came
        self._check_at: float | None = None  # when to see whether the guest still gives memory
        self._checked = memory
        self._decide: Callable[[Statistics], int | None] | None = None
        if config.auto:
            self._decide = self._automatic()
        self._thread = threading.Thread(target=self._keep, name="balloon", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread that looks after the balloon; idempotent."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def actual(self) -> int:
        """How much it has, as its driver says; 0 for one that says that it has less than that."""
        return max(0, self.memory - self.device.actual * PAGE_SIZE)

    @property
    def stats(self) -> Statistics | None:
        """What the guest last told of its memory; None if nothing yet."""
        return self.device.statistics

    def set_target(self, size: int | str) -> None:
        """Asks the guest to have `size` bytes (also as text such as "300M") from now on.

        It comes to that in its own time, or never if it cannot spare that much: see `wait`. The
        size is rounded up to a page. Raises UsageError.
        """
        try:
            wanted = Size(least=LEAST_MEMORY, most=self.memory, multiple=1).read(size, Source())
        except ValueError as error:
            raise UsageError(f"balloon target {size} {error}") from None
        with self._wake:
            self.target = wanted + -wanted % PAGE_SIZE
            self._watch()
            self._news = True
            self._wake.notify_all()
        self.device.request_statistics()

    def wait(self, timeout: float) -> bool:
        """Waits until the guest has come to the target; False if it has not within `timeout`."""
        with self._wake:
            return self._wake.wait_for(lambda: self.actual == self.target, timeout)

    def reclaim(self, timeout: float = 30.0) -> int:
        """Has the guest name all of its free memory, once, and takes it back: how many bytes.

        It keeps the right to use them. UsageError when the machine or the guest cannot do that;
        TimeoutError when the guest has not come to an end by then.
        """
        if not self._hinting:
            raise UsageError("this balloon takes no hints: start the machine with hinting=on")
        if not self.device.takes_hints:
            raise UsageError("the guest has no driver that gives hints of free memory (yet)")
        before = self.device.hinted
        if not self.device.hint(timeout):
            raise TimeoutError(f"the guest did not name its free memory within {timeout:g} s")
        return (self.device.hinted - before) * PAGE_SIZE

    def _watch(self) -> None:
        """From now on the guest should be on its way to the target."""
        self._check_at = time.monotonic() + STALL_SECONDS
        self._checked = self.actual

    def _automatic(self) -> Callable[[Statistics], int | None]:
        from pyvmm.backends.pressure import MemoryPressure
        from pyvmm.machine.balloon_policy import BalloonPolicy

        pressure = MemoryPressure()
        policy = BalloonPolicy(self.memory, LEAST_MEMORY)
        if not pressure.paths:
            self.remarks.append(
                "the balloon follows the guest's statistics alone, as this host tells no memory "
                f"pressure ({pressure.reason}): boot it with psi=1, on a kernel with CONFIG_PSI"
            )

        def decide(statistics: Statistics) -> int | None:
            available = statistics.values.get("available_memory")
            if available is None:
                return None
            return policy.decide(self.actual, available, pressure.read())

        return decide

    # What the device reports, on threads that must not be held up

    def _on_ready(self) -> None:
        with self._wake:
            self._watch()
            self._news = True
            self._wake.notify_all()

    def _on_actual(self) -> None:
        with self._wake:
            if not self._changed or self.actual == self.target:
                self._changed = True
                self._wake.notify_all()

    def _on_statistics(self) -> None:
        with self._wake:
            self._had = self.actual
            self._news = self._fresh = True
            self._wake.notify_all()

    # The thread that looks after it

    def _keep(self) -> None:
        request_at, tell_at = time.monotonic(), 0.0
        while True:
            with self._wake:
                interval: float = self._interval
                if self.actual > self.target and self.device.has_statistics:
                    interval = min(interval or ASK_INTERVAL, ASK_INTERVAL)
                due = [self._check_at, tell_at if self._changed else None]
                due.append(request_at if interval else None)
                if not (self._closed or self._news):
                    times = [each for each in due if each is not None]
                    self._wake.wait(max(0.0, min(times) - time.monotonic()) if times else None)
                if self._closed:
                    return
                now = time.monotonic()
                changed = self._changed and now >= tell_at
                if changed:
                    self._changed = False
                    tell_at = now + EVENT_INTERVAL
                news, self._news = self._news, False
                statistics = self.stats if self._fresh else None
                had, self._fresh = self._had, False
                stalled = self._check_at is not None and now >= self._check_at and self._check()
            if news:
                self._ask(statistics, had)
            if interval and now >= request_at:
                request_at = now + interval
                self.device.request_statistics()
            if changed:
                self._tell("BALLOON_CHANGE", actual=self.actual)
            if stalled:
                self._tell("BALLOON_STALLED", actual=self.actual, target=self.target)

    def _ask(self, statistics: Statistics | None, had: int) -> None:
        """Asks the driver for what follows from the target and from what the guest can spare.

        That is in the statistics, if there are new ones, of when it `had` so much.
        """
        if not self.device.ready:
            return
        if statistics is not None and self._decide is not None:
            decided = self._decide(statistics)
            if decided is not None:
                self.target = decided + -decided % PAGE_SIZE
        size = self.target
        asked = self.memory - self.device.pages * PAGE_SIZE
        if size < self.actual and self.device.has_statistics:
            if statistics is not None:
                size = min(self.actual, max(size, had - _spare(statistics, self.memory)))
            elif size < asked:
                return  # until it has told
        if size != asked:
            self.device.resize((self.memory - size) // PAGE_SIZE)

    def _check(self) -> bool:
        """Whether the guest should give memory and does not."""
        actual = self.actual
        given, self._checked = self._checked - actual, actual
        if actual <= self.target or self._decide is not None:
            self._check_at = None
            return False
        if given >= STALL_BYTES or self._paused():
            self._check_at = time.monotonic() + STALL_SECONDS
            return False
        self._check_at = None
        return True


def _spare(statistics: Statistics, memory: int) -> int:
    """How many bytes a guest with these statistics can give at the moment."""
    values = statistics.values
    available = values.get("available_memory", values.get("free_memory"))
    if available is None:
        return memory
    return max(0, available - max(KEPT_BYTES, memory // KEPT_PART)) & -PAGE_SIZE


def describe_stall(balloon: Balloon) -> str:
    """In a sentence, what BALLOON_STALLED is about."""
    if not balloon.device.ready:
        return "the guest has no driver for its balloon (yet), so that its memory stays as it is"
    return (
        f"the guest has {format_size(balloon.actual)} of memory and is to have "
        f"{format_size(balloon.target)}, but gives no more: it cannot spare the rest"
    )
