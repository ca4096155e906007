"""virtio-balloon (virtio 1.2, section 5.5), and who decides on its size."""

from __future__ import annotations

import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.mmio_driver import CONFIG, DRIVER_OK, RAM_SIZE, VRING, MmioDriver, wait_until

from pyvmm.backends import pressure
from pyvmm.config import BalloonConfig
from pyvmm.errors import UsageError
from pyvmm.machine import balloon as machine_balloon
from pyvmm.machine.balloon import Balloon, describe_stall
from pyvmm.machine.balloon_policy import BalloonPolicy
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.balloon import PAGE_SIZE, VirtioBalloon

INFLATE, DEFLATE, STATS, HINT, REPORT = range(5)
F_STATS = 1 << uapi.VIRTIO_BALLOON_F_STATS_VQ
F_OOM = 1 << uapi.VIRTIO_BALLOON_F_DEFLATE_ON_OOM
F_HINT = 1 << uapi.VIRTIO_BALLOON_F_FREE_PAGE_HINT
F_POISON = 1 << uapi.VIRTIO_BALLOON_F_PAGE_POISON
F_REPORTING = 1 << uapi.VIRTIO_BALLOON_F_REPORTING
DONE, STOP = uapi.VIRTIO_BALLOON_CMD_ID_DONE, uapi.VIRTIO_BALLOON_CMD_ID_STOP
NUM_PAGES, ACTUAL, COMMAND, POISON = range(0, 16, 4)

# Pages that no ring is in.
FIRST, PAGES = 200, RAM_SIZE // PAGE_SIZE
MIB = 1 << 20


def numbers(*pages: int) -> bytes:
    return struct.pack(f"<{len(pages)}I", *pages)


def statistics(**values: int) -> bytes:
    tags = {"free_memory": 4, "total_memory": 5, "available_memory": 6, "oom_kills": 10}
    return b"".join(struct.pack("<HQ", tags[name], value) for name, value in values.items())


class BalloonDriver(MmioDriver):
    """A driver whose pages from FIRST on are filled, each with another byte."""

    def __init__(self, device: VirtioBalloon, without: int = 0) -> None:
        super().__init__(device)
        self.device = device
        for page in range(FIRST, PAGES):
            self.page_at(page)[:] = bytes([page]) * PAGE_SIZE

    def start(self, without: int = 0) -> int:
        """With the queues that the specification has for the features."""
        features = self.negotiate(without)
        there = {STATS: F_STATS, HINT: F_HINT, REPORT: F_REPORTING}
        self.queues = [
            self.set_up_queue(queue, features) if features & there.get(queue, features) else None
            for queue in range(5)
        ]
        self.add_status(DRIVER_OK)
        return features

    def page_at(self, page: int) -> memoryview:
        view = self.memory.at(page * PAGE_SIZE, PAGE_SIZE)
        assert view is not None
        return view

    @property
    def zeroed(self) -> set[int]:
        """The numbers of the pages that are zero; the others are as they were."""
        zeroed = set()
        for page in range(FIRST, PAGES):
            data = bytes(self.page_at(page))
            if data == bytes(PAGE_SIZE):
                zeroed.add(page)
            else:
                assert data == bytes([page]) * PAGE_SIZE
        return zeroed

    def config(self, field: int) -> int:
        return self.read(uapi.VIRTIO_MMIO_CONFIG + field)

    def write_field(self, field: int, value: int) -> None:
        self.write(uapi.VIRTIO_MMIO_CONFIG + field, value)

    def send(self, queue: int, *parts: bytes) -> None:
        """A request with these device-readable parts, to its end."""
        self.request(queue, readable=parts)
        assert set(self.replies(queue)) == {b""}

    def offer(self, queue: int, page: int, size: int = PAGE_SIZE) -> None:
        """Puts a chain whose device-writable part is that memory into the ring."""
        ring = self.queues[queue]
        assert ring is not None
        head = ring.add(writable=(1,))
        ring.write_desc(head, page * PAGE_SIZE, size, 2, 0)
        if ring.publish():
            self.notify(queue)


Start = Callable[..., BalloonDriver]


@pytest.fixture
def start() -> Iterator[Start]:
    """Makes a driver of a balloon, and starts it."""
    drivers: list[BalloonDriver] = []

    def start(without: int = 0, **options: Any) -> BalloonDriver:
        drivers.append(BalloonDriver(VirtioBalloon(**options)))
        drivers[-1].start(without)
        return drivers[-1]

    yield start
    for driver in drivers:
        driver.__exit__()


def test_it_is_a_balloon_with_the_features_that_were_asked_for(start: Start) -> None:
    driver = start()
    assert driver.read(uapi.VIRTIO_MMIO_DEVICE_ID) == 5
    assert [driver.config(field) for field in (NUM_PAGES, ACTUAL, COMMAND, POISON)] == [0, 0, 1, 0]
    assert VirtioBalloon().features == F_STATS
    assert VirtioBalloon(deflate_on_oom=True).features == F_STATS | F_OOM
    assert VirtioBalloon(reporting=True).features == F_STATS | F_REPORTING | F_POISON
    assert VirtioBalloon(hinting=True).features == F_STATS | F_HINT | F_POISON


def test_inflated_pages_are_zero_when_they_come_back(start: Start) -> None:
    driver = start()
    # In any order; one twice, some that are not there, and one split over two buffers.
    pages = numbers(210, 203, 204, 210, 202, PAGES, 0xFFFF_FFFF, 255)
    driver.send(INFLATE, pages[:5], pages[5:])
    assert driver.zeroed == {202, 203, 204, 210, 255}
    assert driver.device.inflated == 5
    driver.page_at(203)[:] = bytes([203]) * PAGE_SIZE
    driver.send(DEFLATE, numbers(203))
    assert driver.zeroed == {202, 204, 210, 255}
    assert driver.interrupted() == VRING


def test_half_a_number_is_none(start: Start) -> None:
    driver = start()
    driver.send(INFLATE, numbers(210) + b"\xd3\0\0")
    driver.send(INFLATE, b"\xd3")
    assert driver.zeroed == {210}


def test_more_pages_than_any_driver_names_at_once_are_refused(
    start: Start, caplog: pytest.LogCaptureFixture
) -> None:
    driver = start()
    driver.send(INFLATE, numbers(*[210] * 4096))
    driver.send(INFLATE, numbers(*[211] * 4097))
    assert driver.zeroed == {210}
    assert driver.device.failed_requests == 1
    assert "VirtioBalloon failed a request of queue 0" in caplog.text
    driver.send(INFLATE, numbers(212))
    assert driver.zeroed == {210, 212}


def test_a_new_size_is_told(start: Start) -> None:
    driver = start()
    driver.forget_interrupts()
    driver.device.resize(12345)
    assert driver.interrupted() == CONFIG
    assert driver.config(NUM_PAGES) == 12345


def test_what_the_driver_writes_to_the_configuration(start: Start) -> None:
    driver = start()
    driver.device.resize(7)
    told: list[int] = []
    driver.device.on_actual = lambda: told.append(driver.device.actual)
    driver.write_field(ACTUAL, 3)
    driver.write_field(ACTUAL, 3)
    driver.transport.write(uapi.VIRTIO_MMIO_CONFIG + ACTUAL + 1, b"\1")  # in any width
    driver.transport.write(uapi.VIRTIO_MMIO_CONFIG + NUM_PAGES, struct.pack("<II", 99, 4))
    driver.write_field(NUM_PAGES, 99)
    driver.write_field(COMMAND, 99)
    assert told == [3, 3 + 256, 4]
    assert [driver.config(field) for field in (NUM_PAGES, ACTUAL, COMMAND)] == [7, 4, 1]


def test_a_reset_empties_the_balloon(start: Start) -> None:
    driver = start()
    driver.device.resize(7)
    told: list[int] = []
    driver.device.on_actual = lambda: told.append(driver.device.actual)
    driver.write_field(ACTUAL, 7)
    driver.request(STATS, readable=(statistics(free_memory=1),))
    wait_until(lambda: driver.device.statistics)
    assert driver.device.ready
    driver.reset()
    assert not driver.device.ready
    assert (told, driver.config(ACTUAL), driver.config(NUM_PAGES)) == ([7, 0], 0, 0)
    assert driver.device.statistics is None
    driver.device.request_statistics()  # to nobody
    driver.start()
    driver.send(INFLATE, numbers(210))
    assert driver.zeroed == {210}


# Statistics


def test_statistics_are_kept_until_new_ones_are_wanted(start: Start) -> None:
    driver = start()
    device = driver.device
    device.request_statistics()  # before there are any
    before = time.time()
    driver.request(STATS, readable=(statistics(free_memory=1, total_memory=2, oom_kills=3),))
    wait_until(lambda: device.statistics)
    first = device.statistics
    assert first is not None
    assert first.values == {"free_memory": 1, "total_memory": 2, "oom_kills": 3}
    assert before <= first.time <= time.time()
    queue = driver.queues[STATS]
    assert queue is not None
    assert queue.collect() == []

    told = threading.Event()
    device.on_statistics = told.set
    device.request_statistics()
    assert driver.replies(STATS) == [b""]
    driver.request(STATS, readable=(statistics(free_memory=2**64 - 1),))
    assert told.wait(10)
    assert device.statistics is not first
    assert device.statistics.values == {"free_memory": 2**64 - 1}


def test_statistics_that_make_no_sense(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    driver = start()
    # Unknown tags, one twice, an end in the middle of one
    parts = (struct.pack("<HQ", 99, 1), statistics(free_memory=1), statistics(free_memory=2), b"\4")
    driver.request(STATS, readable=parts)
    wait_until(lambda: driver.device.statistics)
    assert driver.device.statistics is not None
    assert driver.device.statistics.values == {"free_memory": 2}
    # A second one gives the first back, one that is too long comes back itself.
    driver.request(STATS, readable=(b"",))
    assert driver.replies(STATS) == [b""]
    wait_until(lambda: driver.device.statistics.values == {})
    driver.request(STATS, readable=(bytes(2570),))
    assert driver.replies(STATS) == [b""]
    assert driver.device.failed_requests == 1


# Reporting


def test_reported_pages_go(start: Start) -> None:
    driver = start(reporting=True)
    driver.request(REPORT, writable=(1,))  # no whole page
    driver.offer(REPORT, 210, 3 * PAGE_SIZE)
    driver.offer(REPORT, 220, 2 * PAGE_SIZE - 1)
    driver.request(REPORT, readable=(b"what is this?",))
    driver.replies(REPORT, 4)
    assert driver.zeroed == {210, 211, 212, 220}
    assert driver.device.reported == 4


@pytest.mark.parametrize(
    ("poison", "without", "gone"),
    [(0xAA, 0, False), (0, 0, True), (0xAA, F_POISON, True)],
)
def test_poison_is_kept(start: Start, poison: int, without: int, gone: bool) -> None:
    """A driver that finds other than its poison in a free page takes it for corrupted."""
    driver = start(without, reporting=True)
    driver.write_field(POISON, poison)
    driver.offer(REPORT, 210)
    driver.replies(REPORT)
    assert (driver.zeroed == {210}) == gone
    driver.send(INFLATE, numbers(211))  # of what is in the balloon nothing is expected
    assert 211 in driver.zeroed


@pytest.mark.parametrize("index", [3, 4])
def test_queues_are_numbered_by_what_there_is_or_what_was_negotiated(index: int) -> None:
    device = VirtioBalloon(reporting=True, hinting=True)
    with BalloonDriver(device) as driver:
        features = driver.negotiate(without=F_HINT)
        driver.queues = [None] * 5
        for queue in (INFLATE, DEFLATE, STATS, index):
            driver.queues[queue] = driver.set_up_queue(queue, features)
        driver.add_status(DRIVER_OK)
        driver.offer(index, 210)
        driver.replies(index)
        assert driver.zeroed == {210}
        assert device.reported == 1
        assert not device.takes_hints


# Hints


class _Hinting:
    """`VirtioBalloon.hint` on a thread."""

    def __init__(self, driver: BalloonDriver, timeout: float = 10) -> None:
        self.result: bool | None = None
        self._hint = lambda: driver.device.hint(timeout)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.result = self._hint()

    def end(self) -> bool | None:
        self._thread.join(10)
        return self.result


def test_hints_are_served_before_the_notification_returns(start: Start) -> None:
    driver = start(hinting=True)
    device = driver.device
    driver.offer(HINT, 205)  # which nobody asked for
    driver.send(HINT, numbers(DONE))
    driver.offer(HINT, 206)
    assert driver.zeroed == set()
    for command in (2, 3):
        hinting = _Hinting(driver)
        wait_until(lambda command=command: driver.config(COMMAND) == command)
        driver.send(HINT, numbers(99))
        driver.offer(HINT, 207)  # of another command
        driver.send(HINT, numbers(command))
        driver.offer(HINT, 208 + command, PAGE_SIZE)
        assert 208 + command in driver.zeroed  # already
        driver.send(HINT, numbers(STOP))
        assert hinting.end()
        assert driver.config(COMMAND) == DONE
        driver.offer(HINT, 207)
    assert driver.zeroed == {210, 211}
    assert device.hinted == 2


def test_hints_that_do_not_end(start: Start) -> None:
    driver = start(hinting=True)
    assert not driver.device.hint(0.01)
    assert driver.config(COMMAND) == DONE
    hinting = _Hinting(driver)
    wait_until(lambda: driver.config(COMMAND) != DONE)
    driver.reset()
    assert hinting.end()
    assert not driver.device.hint(10)  # at once: no driver


def test_hints_are_ignored_where_the_driver_does_not_wait(start: Start) -> None:
    """Without STATS_VQ the queue has another number in Linux; it is no `synchronous` one then."""
    device = VirtioBalloon(hinting=True)
    with BalloonDriver(device) as driver:
        features = driver.negotiate(without=F_STATS)
        driver.queues = [driver.set_up_queue(queue, features) for queue in range(3)]
        driver.add_status(DRIVER_OK)
        hinting = _Hinting(driver)
        wait_until(lambda: driver.config(COMMAND) == 2)
        driver.send(2, numbers(2))
        driver.offer(2, 210)
        driver.replies(2)
        driver.send(2, numbers(STOP))
        assert hinting.end()
        assert driver.zeroed == set()


def test_poison_is_kept_in_hinted_pages(start: Start) -> None:
    driver = start(hinting=True)
    driver.write_field(POISON, 1)
    hinting = _Hinting(driver)
    wait_until(lambda: driver.config(COMMAND) == 2)
    driver.send(HINT, numbers(2))
    driver.offer(HINT, 210)
    driver.send(HINT, numbers(STOP))
    assert hinting.end()
    assert driver.zeroed == set()


def test_a_synchronous_ring_that_breaks(start: Start) -> None:
    driver = start(hinting=True)
    ring = driver.queues[HINT]
    assert ring is not None
    ring.write_avail_idx(1000)
    driver.notify(HINT)
    assert driver.status & uapi.VIRTIO_CONFIG_S_NEEDS_RESET
    driver.notify(HINT)
    driver.reset()
    driver.notify(HINT)  # nobody serves it


# Anything at all

_ACTIONS = st.one_of(
    st.tuples(st.sampled_from(["send"]), st.integers(0, 4), st.binary(max_size=64)),
    st.tuples(st.sampled_from(["offer"]), st.integers(0, 4), st.integers(FIRST, PAGES - 1)),
    st.tuples(st.sampled_from(["config"]), st.integers(0, 15), st.binary(min_size=1, max_size=8)),
    st.tuples(st.sampled_from(["numbers"]), st.integers(0, 4), st.lists(st.integers(190, 300))),
    st.tuples(st.sampled_from(["ask"]), st.just(0), st.just(0)),
)


@given(st.lists(_ACTIONS, max_size=30))
@settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))
def test_it_survives_every_driver(actions: list[tuple[str, int, Any]]) -> None:
    device = VirtioBalloon(reporting=True, hinting=True, deflate_on_oom=True)
    with BalloonDriver(device) as driver:
        driver.start()
        for action, at, what in actions:
            if action == "config":
                driver.transport.write(uapi.VIRTIO_MMIO_CONFIG + at, what)
            elif action == "ask":
                device.request_statistics()
            elif driver.queues[at]._free:
                if action == "offer":
                    driver.offer(at, what)
                else:
                    data = what if action == "send" else b"".join(numbers(each) for each in what)
                    driver.request(at, readable=(data,))
        for queue in driver.queues:
            queue.collect()
        driver.send(INFLATE, numbers(FIRST))
        assert FIRST in driver.zeroed


# Who decides on the size

MEMORY = 512 * MIB


class Machine:
    """A `Balloon` with its driver and those who listen to it."""

    def __init__(self, **settings: Any) -> None:
        self.events: list[tuple[str, dict[str, object]]] = []
        self.paused = False
        self.balloon = Balloon(
            BalloonConfig(**settings),
            MEMORY,
            lambda name, **data: self.events.append((name, data)),
            lambda: self.paused,
        )
        self.driver = BalloonDriver(self.balloon.device)
        self.balloon.start()

    @property
    def asked(self) -> int:
        """What the driver is asked to leave to the guest."""
        return MEMORY - self.driver.config(NUM_PAGES) * PAGE_SIZE

    def say(self, available: int) -> None:
        """The guest says how much it could spare, and gets the buffer of before back."""
        self.driver.request(STATS, readable=(statistics(available_memory=available),))

    def lend(self, size: int) -> None:
        """The driver says that the guest has `size` left."""
        self.driver.write_field(ACTUAL, (MEMORY - size) // PAGE_SIZE)

    def close(self) -> None:
        self.balloon.close()
        self.balloon.close()
        self.driver.__exit__()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    machines: list[Machine] = []
    monkeypatch.setattr(machine_balloon, "EVENT_INTERVAL", 0.05)
    monkeypatch.setattr(machine_balloon, "STALL_SECONDS", 0.05)

    def machine(**settings: Any) -> Machine:
        machines.append(Machine(**settings))
        return machines[-1]

    yield machine
    for each in machines:
        each.close()


def test_sizes_are_what_the_guest_has(machine: Callable[..., Machine]) -> None:
    m = machine(size=100 * MIB)
    assert (m.balloon.target, m.balloon.actual) == (412 * MIB, 512 * MIB)
    m.driver.start(without=F_STATS)
    wait_until(lambda: m.asked == 412 * MIB)
    m.balloon.set_target("500M")
    wait_until(lambda: m.asked == 500 * MIB)
    m.balloon.set_target(500 * MIB + 1)  # up to a page
    assert m.balloon.target == 500 * MIB + PAGE_SIZE
    wait_until(lambda: m.asked == 500 * MIB + PAGE_SIZE)
    m.balloon.set_target(MEMORY)
    assert m.balloon.wait(0)  # as it was
    m.driver.write_field(ACTUAL, 0xFFFF_FFFF)
    assert m.balloon.actual == 0


def test_a_guest_is_asked_for_no_more_than_it_can_spare(machine: Callable[..., Machine]) -> None:
    m = machine(size=400 * MIB)
    m.driver.start()
    time.sleep(0.1)
    assert m.asked == MEMORY  # until it has told
    m.say(216 * MIB)  # 16 of which it keeps
    wait_until(lambda: m.asked == MEMORY - 200 * MIB)
    m.lend(MEMORY - 150 * MIB)
    m.say(46 * MIB)
    wait_until(lambda: m.asked == MEMORY - 180 * MIB)
    m.lend(MEMORY - 180 * MIB)
    m.say(10 * MIB)  # nothing more, but what it lent is not for sale
    m.driver.replies(STATS, 2)
    assert m.asked == MEMORY - 180 * MIB
    m.say(1000 * MIB)
    wait_until(lambda: m.asked == 112 * MIB)
    # A higher target needs no word of the guest, a lower one does.
    m.balloon.set_target("256M")
    wait_until(lambda: m.asked == 256 * MIB)
    m.balloon.set_target("128M")
    time.sleep(0.1)
    assert m.asked == 256 * MIB
    m.balloon.set_target(MEMORY)
    wait_until(lambda: m.asked == MEMORY)


def test_a_new_driver_is_asked_anew(machine: Callable[..., Machine]) -> None:
    m = machine(size=100 * MIB)
    for _ in range(2):
        m.driver.start()
        m.say(400 * MIB)
        wait_until(lambda: m.asked == 412 * MIB)
        m.lend(412 * MIB)
        assert m.balloon.wait(0)
        m.driver.reset()
        assert (m.asked, m.balloon.actual) == (MEMORY, MEMORY)


def test_statistics_without_what_is_available(machine: Callable[..., Machine]) -> None:
    m = machine(size=300 * MIB)
    m.driver.start()
    m.driver.request(STATS, readable=(statistics(free_memory=116 * MIB),))  # of an old driver
    wait_until(lambda: m.asked == MEMORY - 100 * MIB)
    m.driver.request(STATS, readable=(b"",))
    wait_until(lambda: m.asked == MEMORY - 300 * MIB)


@pytest.mark.parametrize(
    ("target", "error"),
    [
        (0, "balloon target 0 is too small: the least is 32M"),
        ("600M", "balloon target 600M is too large: the most is 512M"),
        (-5, "balloon target -5 is too small: the least is 32M"),
        (
            "much",
            "balloon target much is not a size: give a number with K, M, G or T, such as 512M",
        ),
        (1.5, "balloon target 1.5 is not a size: give a number of bytes or text such as '512M'"),
    ],
)
def test_targets_that_cannot_be(
    machine: Callable[..., Machine], target: object, error: str
) -> None:
    m = machine()
    with pytest.raises(UsageError) as raised:
        m.balloon.set_target(target)
    assert str(raised.value) == error
    assert m.balloon.target == MEMORY


def test_who_waits_and_who_listens_hears_of_the_size(machine: Callable[..., Machine]) -> None:
    m = machine()
    m.driver.start()
    m.balloon.set_target("256M")
    m.say(500 * MIB)
    start = time.monotonic()
    for size in range(511, 255, -1):
        m.lend(size * MIB)
    assert m.balloon.wait(10)
    wait_until(lambda: m.events and m.events[-1] == ("BALLOON_CHANGE", {"actual": 256 * MIB}))
    # Not one for each MiB. A busy host may take the driver for one that has stalled.
    changes = [name for name, _ in m.events if name == "BALLOON_CHANGE"]
    assert len(changes) <= 2 + (time.monotonic() - start) / machine_balloon.EVENT_INTERVAL
    m.driver.reset()
    wait_until(lambda: m.events[-1] == ("BALLOON_CHANGE", {"actual": MEMORY}))


def test_a_guest_that_does_not_come_to_the_target(machine: Callable[..., Machine]) -> None:
    m = machine()
    m.balloon.set_target("300M")

    def stalls() -> list[dict[str, object]]:
        return [data for name, data in m.events if name == "BALLOON_STALLED"]

    wait_until(stalls)
    assert not m.balloon.wait(0)
    assert describe_stall(m.balloon) == (
        "the guest has no driver for its balloon (yet), so that its memory stays as it is"
    )
    m.paused = True
    m.driver.start()
    m.balloon.set_target("300M")
    m.lend(400 * MIB)
    time.sleep(0.3)
    assert len(stalls()) == 1  # a guest that stands still gives nothing
    m.paused = False
    wait_until(lambda: len(stalls()) == 2)
    assert stalls()[1] == {"actual": 400 * MIB, "target": 300 * MIB}
    assert describe_stall(m.balloon) == (
        "the guest has 400M of memory and is to have 300M, but gives no more: it cannot spare the "
        "rest"
    )
    m.balloon.set_target("400M")
    time.sleep(0.2)
    assert len(stalls()) == 2


def test_reclaiming_what_is_free(machine: Callable[..., Machine]) -> None:
    with pytest.raises(UsageError) as error:
        machine().balloon.reclaim()
    expected = "this balloon takes no hints: start the machine with hinting=on"
    assert str(error.value) == expected
    m = machine(hinting=True)
    with pytest.raises(UsageError) as error:
        m.balloon.reclaim()
    assert str(error.value) == "the guest has no driver that gives hints of free memory (yet)"
    m.driver.start()
    with pytest.raises(TimeoutError, match=r"did not name its free memory within 0\.01 s"):
        m.balloon.reclaim(0.01)
    got: list[int] = []
    thread = threading.Thread(target=lambda: got.append(m.balloon.reclaim()))
    thread.start()
    wait_until(lambda: m.driver.config(COMMAND) > 2)
    m.driver.send(HINT, numbers(m.driver.config(COMMAND)))
    m.driver.offer(HINT, 210, 2 * PAGE_SIZE)
    m.driver.send(HINT, numbers(STOP))
    thread.join(10)
    assert got == [2 * PAGE_SIZE]


def _set_pressure(monkeypatch: pytest.MonkeyPatch, path: Path, some: float) -> None:
    path.write_text(
        f"some avg10={some:.2f} avg60=0.00 avg300=0.00 total=0\n"
        "full avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"
    )
    monkeypatch.setattr(pressure, "_WHOLE_HOST", str(path))
    monkeypatch.setattr(pressure, "_cgroup_files", list)


def test_an_automatic_balloon_follows_statistics_and_pressure(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    _set_pressure(monkeypatch, tmp_path / "memory", 20)
    m = machine(auto=True)
    assert m.balloon.remarks == []
    m.driver.start()
    m.driver.request(STATS, readable=(statistics(free_memory=MIB),))  # not what it needs
    m.driver.request(STATS, readable=(statistics(available_memory=400 * MIB),))
    wait_until(lambda: m.balloon.target == MEMORY - MEMORY // 16)
    m.lend(m.balloon.target)
    m.driver.replies(STATS, 2)  # every two seconds it asks
    m.driver.request(STATS, readable=(statistics(available_memory=1 * MIB),))
    wait_until(lambda: m.balloon.target == MEMORY)
    assert not [name for name, _ in m.events if name == "BALLOON_STALLED"]


def test_a_host_without_psi(
    machine: Callable[..., Machine], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pressure, "_WHOLE_HOST", str(tmp_path / "none"))
    monkeypatch.setattr(pressure, "_cgroup_files", list)
    m = machine(auto=True)
    assert m.balloon.remarks == [
        "the balloon follows the guest's statistics alone, as this host tells no memory pressure "
        f"({tmp_path}/none: No such file or directory): boot it with psi=1, on a kernel with "
        "CONFIG_PSI"
    ]


def test_the_worse_pressure_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    host, group = tmp_path / "memory", tmp_path / "memory.pressure"
    _set_pressure(monkeypatch, group, 3.5)
    _set_pressure(monkeypatch, host, 1)
    monkeypatch.setattr(pressure, "_cgroup_files", lambda: [str(group)])
    told = pressure.MemoryPressure()
    assert told.read() == 3.5
    group.unlink()
    assert told.read() == 1
    host.write_text("")
    assert told.read() is None
    nothing = pressure.MemoryPressure()
    assert (nothing.paths, nothing.reason) == ([], f"{host}: it says nothing of memory")


# The policy

GIB = 1 << 30
POLICY = BalloonPolicy(GIB, 32 * MIB)


@pytest.mark.parametrize(
    ("has", "available", "host_pressure", "expected"),
    [
        # Short of memory: it gets what makes a fifth of it available, however the host is.
        (512, 40, 0, 590),
        (512, 40, 90, 590),
        (512, 40, None, 590),
        (1024, 10, 0, 1024),
        # A calm host gives back, step by step.
        (512, 200, 0, 576),
        (1000, 200, 0, 1024),
        # A host under pressure takes, but leaves a fifth.
        (1024, 900, 15, 960),
        (1024, 900, 50, 768),
        (1024, 300, 50, 905),
        (1024, 900, None, 960),
        # In between nothing changes.
        (512, 200, 5, 512),
        (512, 110, 50, 512),
        (512, 110, None, 512),
        # An eighth stays whatever the guest says.
        (140, 140, 50, 128),
        (140, 2**40, 50, 128),
    ],
)
def test_policy(has: int, available: int, host_pressure: float | None, expected: int) -> None:
    decided = POLICY.decide(has * MIB, available * MIB, host_pressure)
    assert decided // MIB == expected


@given(
    st.integers(0, GIB),
    st.integers(0, 2**64 - 1),
    st.one_of(st.none(), st.floats(0, 100)),
)
def test_the_policy_stays_in_bounds_and_does_not_swing(
    has: int, available: int, host_pressure: float | None
) -> None:
    decided = POLICY.decide(has, available, host_pressure)
    assert decided == has or 128 * MIB <= decided <= GIB
    if decided < has:
        # What was taken is not what it is given back for.
        left = max(0, min(available, has) - (has - decided))
        assert POLICY.decide(decided, left, host_pressure) <= decided
