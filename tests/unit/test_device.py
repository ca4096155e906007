"""Devices written in Python: what `PythonDevice` and its chains promise, seen from a driver."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mmio_driver import CONFIG, DRIVER_OK, NEEDS_RESET, VRING, MmioDriver, wait_until

from pyvmm.virtio.device import PythonDevice
from pyvmm.virtio.queue import Chain, Virtqueue


class Scripted(PythonDevice):
    """Does with each chain what the test says."""

    device_id = 42
    queue_sizes = (16, 16)

    def __init__(self, handler: Callable[[Virtqueue, Chain], None]) -> None:
        super().__init__()
        self.handler = handler

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        self.handler(queue, chain)


def echo(queue: Virtqueue, chain: Chain) -> None:
    chain.write(chain.read_all(4096))
    chain.complete()


@pytest.fixture
def device() -> Scripted:
    return Scripted(echo)


@pytest.fixture
def driver(device: Scripted) -> Iterator[MmioDriver]:
    with MmioDriver(device) as driver:
        driver.start()
        yield driver


# Chains


@settings(max_examples=60, deadline=None)
@given(
    readable=st.lists(st.binary(max_size=50), max_size=5),
    writable=st.lists(st.integers(0, 50), max_size=5),
    piece=st.integers(1, 40),
)
def test_parts_are_one_run_of_bytes(readable: list[bytes], writable: list[int], piece: int) -> None:
    pieces: list[bytes] = []

    def by_pieces(queue: Virtqueue, chain: Chain) -> None:
        assert chain.readable_bytes == sum(map(len, readable))
        assert chain.writable_bytes == sum(writable)
        while chain.unread:
            pieces.append(chain.read(piece))
            chain.write(pieces[-1])
        assert chain.read(piece) == b""
        chain.complete()

    with MmioDriver(Scripted(by_pieces)) as driver:
        driver.start()
        driver.request(readable=tuple(readable) or (b"",), writable=tuple(writable))
        data = b"".join(readable)
        assert driver.replies() == [data[: sum(writable)]]
    assert b"".join(pieces) == data
    assert all(len(part) == piece for part in pieces[:-1])


def test_write_tells_how_much_found_room(driver: MmioDriver, device: Scripted) -> None:
    room: list[int] = []

    def fill(queue: Virtqueue, chain: Chain) -> None:
        room.extend((chain.write(b"abc"), chain.write(b"defgh"), chain.write(b"i")))
        chain.complete()

    device.handler = fill
    driver.request(writable=(2, 4))
    assert driver.replies() == [b"abcdef"]
    assert room == [3, 3, 0]


def test_a_completed_chain_cannot_be_used(driver: MmioDriver, device: Scripted) -> None:
    chains: list[Chain] = []

    def complete(queue: Virtqueue, chain: Chain) -> None:
        chains.append(chain)
        chain.complete(1)

    device.handler = complete
    driver.request(readable=(b"a",), writable=(1,))
    driver.replies()
    (chain,) = chains
    assert chain.completed
    with pytest.raises(RuntimeError, match="twice"):
        chain.complete()
    with pytest.raises(ValueError, match="released"):
        bytes(chain.readable[0])
    with pytest.raises(ValueError, match="released"):
        chain.write(b"x")


def test_more_cannot_be_written_than_there_is_room(driver: MmioDriver, device: Scripted) -> None:
    errors: list[str] = []

    def overstate(queue: Virtqueue, chain: Chain) -> None:
        try:
            chain.complete(5)
        except ValueError as error:
            errors.append(str(error))
        chain.complete(4)

    device.handler = overstate
    driver.request(writable=(4,))
    assert len(driver.replies()[0]) == 4
    assert errors == ["5 bytes written to a chain of 4"]


# Requests


def test_each_queue_is_served(driver: MmioDriver) -> None:
    for index in (0, 1):
        driver.request(index, (b"to ", b"%d" % index), (8,))
        assert driver.interrupted() == VRING
        assert driver.replies(index) == [b"to %d" % index]


def test_a_batch_takes_one_interrupt(driver: MmioDriver) -> None:
    queue = driver.queues[0]
    assert queue is not None
    for n in range(8):
        queue.add([b"%d" % n], [1])
    queue.publish()
    driver.notify(0)
    assert driver.replies(count=8) == [b"%d" % n for n in range(8)]
    assert os.eventfd_read(driver.irqfd) == 1


def test_an_exception_fails_the_request_alone(
    driver: MmioDriver, device: Scripted, caplog: pytest.LogCaptureFixture
) -> None:
    def echo_short_ones(queue: Virtqueue, chain: Chain) -> None:
        chain.write(chain.read_all(4))
        chain.complete()

    device.handler = echo_short_ones
    for request in (b"much too long", b"good", b"again too long", b"fine"):
        driver.request(readable=(request,), writable=(16,))
    assert driver.replies(count=4) == [b"", b"good", b"", b"fine"]
    assert device.failed_requests == 2
    assert caplog.text.count("a request of 13 bytes, more than 4") == 1
    assert "14 bytes" not in caplog.text  # a hostile driver must not fill the disk with our log


def test_an_exception_after_completion_is_no_second_completion(
    driver: MmioDriver, device: Scripted
) -> None:
    def complete_and_fail(queue: Virtqueue, chain: Chain) -> None:
        chain.complete(0)
        raise KeyError

    device.handler = complete_and_fail
    driver.request(writable=(4,))
    assert driver.replies() == [b""]
    device.handler = echo
    driver.request(readable=(b"ok",), writable=(4,))
    assert driver.replies() == [b"ok"]


class Doorbell(Scripted):
    """Keeps every chain until a byte arrives on a pipe, which answers the oldest one."""

    def __init__(self) -> None:
        super().__init__(lambda queue, chain: self.kept.append(chain))
        self.kept: list[Chain] = []
        self.bell_out, self.bell_in = os.pipe()

    def started(self) -> None:
        self.watch(self.bell_out, select.EPOLLIN, self.rung)

    def rung(self) -> None:
        byte = os.read(self.bell_out, 1)
        if byte == b".":
            self.unwatch(self.bell_out)
            byte = b"?"
        chain = self.kept.pop(0)
        chain.write(byte)
        chain.complete()


@pytest.fixture
def doorbell() -> Iterator[Doorbell]:
    device = Doorbell()
    yield device
    os.close(device.bell_out)
    os.close(device.bell_in)


def test_chains_may_be_kept_and_completed_later(doorbell: Doorbell) -> None:
    with MmioDriver(doorbell) as driver:
        driver.start()
        for _ in range(3):
            driver.request(writable=(1,))
        wait_until(lambda: len(doorbell.kept) == 3)
        assert not driver.was_interrupted()
        os.write(doorbell.bell_in, b"ab")
        assert driver.interrupted() == VRING
        assert driver.replies(count=2) == [b"a", b"b"]
        # No longer watched, so the last one stays.
        os.write(doorbell.bell_in, b".z")
        assert driver.replies() == [b"?"]
        driver.request(writable=(1,))
        wait_until(lambda: len(doorbell.kept) == 1)


def test_a_reset_takes_kept_chains_away(doorbell: Doorbell) -> None:
    with MmioDriver(doorbell) as driver:
        driver.start()
        driver.request(writable=(1,))
        wait_until(lambda: doorbell.kept)
        driver.reset()
        (chain,) = doorbell.kept
        assert chain.completed
        with pytest.raises(RuntimeError):
            chain.complete()
        with pytest.raises(ValueError, match="released"):
            chain.write(b"x")
        doorbell.kept.clear()
        driver.start()
        driver.request(writable=(1,))
        wait_until(lambda: doorbell.kept)
        os.write(doorbell.bell_in, b"c")
        assert driver.replies() == [b"c"]


# The thread


def test_deactivate_without_activate(device: Scripted) -> None:
    device.deactivate()
    device.deactivate()


def test_unused_queues_are_none(device: Scripted) -> None:
    with MmioDriver(device) as driver:
        features = driver.negotiate()
        driver.queues = [None, driver.set_up_queue(1, features)]
        driver.add_status(DRIVER_OK)
        driver.request(1, (b"x",), (1,))
        assert driver.replies(1) == [b"x"]
        assert device.queues[0] is None
        driver.notify(0)


def test_a_driver_that_never_rests_does_not_hold_up_the_rest(driver: MmioDriver) -> None:
    """One queue is always full; the other one is served, and a reset comes through."""
    stop = threading.Event()

    def flood() -> None:
        queue = driver.queues[0]
        assert queue is not None
        while not stop.is_set():
            queue.collect()
            if queue.in_flight < 16:
                queue.submit([b""])
                driver.notify(0)

    flooder = threading.Thread(target=flood)
    flooder.start()
    try:
        for _ in range(20):
            driver.request(1, (b"hello",), (5,))
            assert driver.replies(1) == [b"hello"]
    finally:
        stop.set()
        flooder.join()
    driver.reset()
    assert "Scripted" not in [thread.name for thread in threading.enumerate()]


class Unstartable(Scripted):
    def started(self) -> None:
        raise OSError("nothing to watch")


def test_a_thread_that_fails_asks_for_a_reset(caplog: pytest.LogCaptureFixture) -> None:
    with MmioDriver(Unstartable(echo)) as driver:
        driver.negotiate()
        driver.add_status(DRIVER_OK)
        assert driver.interrupted() == CONFIG
        assert driver.status & NEEDS_RESET
        assert "nothing to watch" in caplog.text
        driver.reset()
        assert driver.status == 0
