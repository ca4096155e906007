"""The virtio-mmio transport (virtio 1.2, sections 2.1, 2.2, 3.1 and 4.2), through its registers."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.mmio_driver import (
    ACKNOWLEDGE,
    CONFIG,
    DRIVER,
    DRIVER_OK,
    FAILED,
    FEATURES_OK,
    NEEDS_RESET,
    RAM_SIZE,
    VRING,
    MmioDriver,
)

from pyvmm._core import lib
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.device import Activation, VirtioDevice
from pyvmm.virtio.rng import VirtioRng

VERSION_1 = 1 << uapi.VIRTIO_F_VERSION_1
INDIRECT = 1 << uapi.VIRTIO_RING_F_INDIRECT_DESC
EVENT_IDX = 1 << uapi.VIRTIO_RING_F_EVENT_IDX
ALIVE = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK


class Recorder(VirtioDevice):
    """Does nothing, and remembers what the transport asked of it."""

    device_id = 42
    queue_sizes = (256, 64, 8)
    features = 0x8000_0005 | 1 << 50

    def __init__(self) -> None:
        super().__init__()
        self.config = bytearray(range(1, 13))
        self.activation: Activation | None = None
        self.deactivations = 0
        self.refuses = False

    def read_config(self) -> bytes:
        return bytes(self.config)

    def write_config(self, offset: int, data: bytes) -> None:
        if offset == 11:
            raise ValueError("this byte bites")
        self.config[offset : offset + len(data)] = data

    def activate(self, activation: Activation) -> None:
        if self.refuses:
            raise OSError("no more file descriptors")
        assert self.activation is None
        self.activation = activation

    def deactivate(self) -> None:
        self.activation = None
        self.deactivations += 1


@pytest.fixture
def device() -> Recorder:
    return Recorder()


@pytest.fixture
def driver(device: Recorder) -> Iterator[MmioDriver]:
    with MmioDriver(device) as driver:
        yield driver


# Registers


def test_the_device_introduces_itself(driver: MmioDriver) -> None:
    assert driver.transport.read(uapi.VIRTIO_MMIO_MAGIC_VALUE, 4) == b"virt"
    assert driver.read(uapi.VIRTIO_MMIO_VERSION) == 2
    assert driver.read(uapi.VIRTIO_MMIO_DEVICE_ID) == 42
    assert driver.read(uapi.VIRTIO_MMIO_VENDOR_ID) == int.from_bytes(b"PYVM", "little")


def test_the_guest_may_read_the_page_itself(driver: MmioDriver) -> None:
    driver.start()
    assert driver.page[:] == driver.transport.read(0, 4096)
    assert driver.page[uapi.VIRTIO_MMIO_STATUS] == ALIVE


def test_no_shared_memory_regions(driver: MmioDriver) -> None:
    for region in (0, 1, 0xFFFF_FFFF):
        driver.write(uapi.VIRTIO_MMIO_SHM_SEL, region)
        for register in range(uapi.VIRTIO_MMIO_SHM_LEN_LOW, uapi.VIRTIO_MMIO_SHM_BASE_HIGH + 4, 4):
            assert driver.read(register) == 0xFFFF_FFFF


@pytest.mark.parametrize(
    ("register", "value"),
    [
        (uapi.VIRTIO_MMIO_MAGIC_VALUE, 0),
        (uapi.VIRTIO_MMIO_DEVICE_FEATURES, 0),
        (uapi.VIRTIO_MMIO_QUEUE_NUM_MAX, 1),
        (uapi.VIRTIO_MMIO_INTERRUPT_STATUS, 3),
        (uapi.VIRTIO_MMIO_CONFIG_GENERATION, 7),
        (uapi.VIRTIO_MMIO_SHM_LEN_LOW, 0),
        (0x0C0, 1),  # QueueReset, which belongs to a feature that is not offered
        (0x028, 4096),  # GuestPageSize of the legacy interface
    ],
)
def test_writes_to_other_registers_have_no_effect(
    driver: MmioDriver, register: int, value: int
) -> None:
    before = driver.page[:]
    driver.write(register, value)
    assert driver.page[:] == before
    assert driver.transport.ignored_writes == 1


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (uapi.VIRTIO_MMIO_STATUS, b"\x01"),
        (uapi.VIRTIO_MMIO_STATUS, b"\x01\x00"),
        (uapi.VIRTIO_MMIO_STATUS, bytes([1, 0, 0, 0, 0, 0, 0, 0])),
        (uapi.VIRTIO_MMIO_STATUS + 2, bytes([0, 0, 1, 0])),
        (uapi.VIRTIO_MMIO_STATUS - 1, bytes([0, 1, 0, 0])),
        (uapi.VIRTIO_MMIO_CONFIG - 4, bytes(8)),
        (uapi.VIRTIO_MMIO_QUEUE_NOTIFY, b"\x00\x00"),
        (uapi.VIRTIO_MMIO_INTERRUPT_ACK, b"\x01\x00"),
    ],
)
def test_registers_take_only_aligned_words(driver: MmioDriver, offset: int, data: bytes) -> None:
    before = driver.page[:]
    driver.transport.write(offset, data)
    assert driver.page[:] == before
    assert driver.transport.ignored_writes == 1


def test_any_width_reads_what_the_page_holds(driver: MmioDriver) -> None:
    assert driver.transport.read(0, 1) == b"v"
    assert driver.transport.read(1, 2) == b"ir"
    assert driver.transport.read(0, 8) == b"virt" + struct.pack("<I", 2)


# Feature negotiation (2.2, 3.1.1)


def test_device_features_by_word(driver: MmioDriver) -> None:
    assert driver.offered() == Recorder.features | VERSION_1 | INDIRECT | EVENT_IDX
    for selector in (2, 3, 0xFFFF_FFFF):
        driver.write(uapi.VIRTIO_MMIO_DEVICE_FEATURES_SEL, selector)
        assert driver.read(uapi.VIRTIO_MMIO_DEVICE_FEATURES) == 0


def test_the_device_learns_what_was_negotiated(driver: MmioDriver, device: Recorder) -> None:
    features = driver.start(without=EVENT_IDX | 4)
    assert device.activation is not None
    assert device.activation.features == features == driver.offered() & ~(EVENT_IDX | 4)
    for queue in device.activation.queues:
        assert queue is not None
        assert queue.config.indirect
        assert not queue.config.event_idx


@pytest.mark.parametrize(
    "accepted",
    [
        pytest.param(0, id="nothing, so not VERSION_1"),
        pytest.param(Recorder.features, id="all but VERSION_1"),
        pytest.param(VERSION_1 | 2, id="a bit that was not offered"),
        pytest.param(VERSION_1 | 1 << uapi.VIRTIO_F_RING_PACKED, id="packed rings"),
    ],
)
def test_features_ok_is_refused(driver: MmioDriver, device: Recorder, accepted: int) -> None:
    driver.add_status(ACKNOWLEDGE)
    driver.add_status(DRIVER)
    driver.accept(accepted)
    assert driver.add_status(FEATURES_OK) == ACKNOWLEDGE | DRIVER
    assert driver.add_status(FEATURES_OK | DRIVER_OK) == ACKNOWLEDGE | DRIVER
    assert device.activation is None
    # The driver may think again (2.2.2).
    driver.accept(VERSION_1)
    assert driver.add_status(FEATURES_OK) == ACKNOWLEDGE | DRIVER | FEATURES_OK


def test_features_are_settled_after_features_ok(driver: MmioDriver, device: Recorder) -> None:
    driver.negotiate()
    driver.accept(VERSION_1)
    driver.add_status(DRIVER_OK)
    assert device.activation is not None
    assert device.activation.features == driver.offered()


def test_features_are_not_taken_before_driver(driver: MmioDriver) -> None:
    driver.accept(VERSION_1)
    driver.add_status(ACKNOWLEDGE)
    driver.add_status(DRIVER)
    assert not driver.add_status(FEATURES_OK) & FEATURES_OK


def test_feature_words_past_the_second_are_ignored(driver: MmioDriver) -> None:
    driver.add_status(ACKNOWLEDGE)
    driver.add_status(DRIVER)
    driver.accept(VERSION_1)
    driver.write(uapi.VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2)
    driver.write(uapi.VIRTIO_MMIO_DRIVER_FEATURES, 0xFFFF_FFFF)
    assert driver.transport.ignored_writes == 1
    assert driver.add_status(FEATURES_OK) & FEATURES_OK


# Device status (2.1)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ([DRIVER], [0]),
        ([FEATURES_OK], [0]),
        ([DRIVER_OK], [0]),
        ([ACKNOWLEDGE, ACKNOWLEDGE | DRIVER_OK], [ACKNOWLEDGE, ACKNOWLEDGE]),
        ([ACKNOWLEDGE | DRIVER], [ACKNOWLEDGE | DRIVER]),
        ([ACKNOWLEDGE, DRIVER], [ACKNOWLEDGE, ACKNOWLEDGE]),
        ([ACKNOWLEDGE, ACKNOWLEDGE | 0x30], [ACKNOWLEDGE, ACKNOWLEDGE]),
        ([ACKNOWLEDGE, ACKNOWLEDGE | NEEDS_RESET], [ACKNOWLEDGE, ACKNOWLEDGE]),
        ([0xFFFF_FF00 | ACKNOWLEDGE], [ACKNOWLEDGE]),
    ],
)
def test_status_bits_come_in_order(driver: MmioDriver, written: list[int], read: list[int]) -> None:
    for value, expected in zip(written, read, strict=True):
        driver.write(uapi.VIRTIO_MMIO_STATUS, value)
        assert driver.status == expected


def test_driver_ok_needs_features_ok(driver: MmioDriver, device: Recorder) -> None:
    driver.add_status(ACKNOWLEDGE | DRIVER)
    assert driver.add_status(DRIVER_OK) == ACKNOWLEDGE | DRIVER
    assert device.activation is None


def test_activation_happens_once(driver: MmioDriver, device: Recorder) -> None:
    driver.start()
    activation = device.activation
    assert activation is not None
    assert driver.add_status(DRIVER_OK) == ALIVE
    assert device.activation is activation


def test_a_driver_that_gives_up_stops_the_device(driver: MmioDriver, device: Recorder) -> None:
    driver.start()
    assert driver.add_status(FAILED) == ALIVE | FAILED
    assert device.activation is None
    driver.write(uapi.VIRTIO_MMIO_STATUS, ALIVE)
    assert driver.status == ALIVE | FAILED
    driver.reset()
    driver.start()


@pytest.mark.parametrize("reached", [ACKNOWLEDGE, DRIVER, FEATURES_OK, DRIVER_OK])
def test_reset_at_any_time(driver: MmioDriver, device: Recorder, reached: int) -> None:
    initial = driver.page[:]
    match reached:
        case uapi.VIRTIO_CONFIG_S_ACKNOWLEDGE:
            driver.add_status(ACKNOWLEDGE)
        case uapi.VIRTIO_CONFIG_S_DRIVER:
            driver.add_status(ACKNOWLEDGE)
            driver.add_status(DRIVER)
            driver.accept(VERSION_1)
        case uapi.VIRTIO_CONFIG_S_FEATURES_OK:
            driver.set_up_queue(1, driver.negotiate())
        case uapi.VIRTIO_CONFIG_S_DRIVER_OK:
            driver.start()
            lib.virtio_irq_raise(driver.transport.irq, VRING | CONFIG)
    driver.reset()
    assert driver.page[:] == initial
    assert device.activation is None
    driver.start()
    assert driver.page[:] != initial


def test_reset_forgets_the_negotiation(driver: MmioDriver) -> None:
    driver.negotiate()
    driver.reset()
    driver.add_status(ACKNOWLEDGE)
    driver.add_status(DRIVER)
    assert not driver.add_status(FEATURES_OK) & FEATURES_OK


# Queues (4.2.3.2)


def test_each_queue_has_its_size(driver: MmioDriver) -> None:
    for index, size in (*enumerate(Recorder.queue_sizes), (3, 0), (0xFFFF_FFFF, 0)):
        driver.write(uapi.VIRTIO_MMIO_QUEUE_SEL, index)
        assert driver.read(uapi.VIRTIO_MMIO_QUEUE_NUM_MAX) == size
        assert driver.read(uapi.VIRTIO_MMIO_QUEUE_READY) == 0


def test_the_device_gets_the_queues_of_the_driver(driver: MmioDriver, device: Recorder) -> None:
    driver.negotiate()
    driver.write(uapi.VIRTIO_MMIO_QUEUE_SEL, 1)
    driver.write_ring(32, 0x10000, 0x20000, 0x30000)
    driver.write(uapi.VIRTIO_MMIO_QUEUE_READY, 1)
    driver.add_status(DRIVER_OK)
    assert device.activation is not None
    first, second, third = device.activation.queues
    assert first is None
    assert third is None
    assert second is not None
    assert second.index == 1
    assert second.kick == driver.transport.kicks[1]
    config = second.config
    assert (config.desc_gpa, config.avail_gpa, config.used_gpa) == (0x10000, 0x20000, 0x30000)
    assert config.size == 32


def _configure(driver: MmioDriver) -> None:
    driver.write_ring(8, 0x1000, 0x2000, 0x3000)
    driver.write(uapi.VIRTIO_MMIO_QUEUE_READY, 1)


def test_queues_are_configured_between_features_ok_and_driver_ok(
    driver: MmioDriver, device: Recorder
) -> None:
    _configure(driver)
    assert driver.read(uapi.VIRTIO_MMIO_QUEUE_READY) == 0
    driver.negotiate()
    _configure(driver)
    assert driver.read(uapi.VIRTIO_MMIO_QUEUE_READY) == 1
    # Not while it is ready.
    ignored = driver.transport.ignored_writes
    driver.write_ring(16, 0x4000, 0x5000, 0x6000)
    assert driver.transport.ignored_writes == ignored + 7
    driver.add_status(DRIVER_OK)
    driver.write(uapi.VIRTIO_MMIO_QUEUE_SEL, 1)
    _configure(driver)
    assert driver.read(uapi.VIRTIO_MMIO_QUEUE_READY) == 0
    assert device.activation is not None
    first, second, _ = device.activation.queues
    assert first is not None
    assert (first.config.size, first.config.desc_gpa) == (8, 0x1000)
    assert second is None


def test_a_queue_can_be_taken_back_before_driver_ok(driver: MmioDriver, device: Recorder) -> None:
    driver.negotiate()
    _configure(driver)
    driver.write(uapi.VIRTIO_MMIO_QUEUE_READY, 0)
    assert driver.read(uapi.VIRTIO_MMIO_QUEUE_READY) == 0
    driver.add_status(DRIVER_OK)
    assert device.activation is not None
    assert device.activation.queues == (None, None, None)


def test_a_live_queue_is_stopped_by_a_reset_alone(driver: MmioDriver) -> None:
    driver.start()
    driver.write(uapi.VIRTIO_MMIO_QUEUE_SEL, 0)
    driver.write(uapi.VIRTIO_MMIO_QUEUE_READY, 0)
    assert driver.read(uapi.VIRTIO_MMIO_QUEUE_READY) == 1  # the driver can see that it goes on


@pytest.mark.parametrize(
    ("size", "desc", "avail", "used"),
    [
        pytest.param(0, 0x1000, 0x2000, 0x3000, id="size 0"),
        pytest.param(24, 0x1000, 0x2000, 0x3000, id="no power of two"),
        pytest.param(512, 0x1000, 0x8000, 0x9000, id="more than QueueNumMax"),
        pytest.param(1 << 16, 0x1000, 0x8000, 0x9000, id="more than 16 bits"),
        pytest.param(0xFFFF_FFFF, 0x1000, 0x8000, 0x9000, id="more than that"),
        pytest.param(16, 0x1008, 0x2000, 0x3000, id="misaligned"),
        pytest.param(16, RAM_SIZE, 0x2000, 0x3000, id="outside memory"),
        pytest.param(16, 0x1000, RAM_SIZE - 8, 0x3000, id="partly outside memory"),
        pytest.param(16, 0x1000, 0x2000, (1 << 64) - 4, id="at the end of the address space"),
    ],
)
def test_a_queue_that_cannot_be_asks_for_a_reset(
    driver: MmioDriver, device: Recorder, size: int, desc: int, avail: int, used: int
) -> None:
    driver.negotiate()
    driver.write_ring(size, desc, avail, used)
    driver.write(uapi.VIRTIO_MMIO_QUEUE_READY, 1)
    assert driver.add_status(DRIVER_OK) == ALIVE | NEEDS_RESET
    assert driver.interrupted() == CONFIG
    assert device.activation is None
    driver.reset()
    driver.start()
    assert device.activation is not None


def test_a_device_that_cannot_start_asks_for_a_reset(
    driver: MmioDriver, device: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    device.refuses = True
    driver.negotiate()
    assert driver.add_status(DRIVER_OK) == ALIVE | NEEDS_RESET
    assert driver.interrupted() == CONFIG
    assert "no more file descriptors" in caplog.text
    device.refuses = False
    driver.reset()
    driver.start()


def test_needs_reset_is_shown_and_stays(driver: MmioDriver, device: Recorder) -> None:
    driver.start()
    device.needs_reset()
    assert driver.status == ALIVE | NEEDS_RESET
    assert driver.interrupted() == CONFIG
    driver.write(uapi.VIRTIO_MMIO_STATUS, ALIVE)
    assert driver.status == ALIVE | NEEDS_RESET
    driver.reset()
    assert driver.status == 0


def test_needs_reset_before_driver_ok_does_not_interrupt(
    driver: MmioDriver, device: Recorder
) -> None:
    driver.negotiate()
    device.needs_reset()
    assert driver.status & NEEDS_RESET
    assert not driver.was_interrupted()


# Notifications and interrupts


def test_queue_notify_without_an_ioeventfd(driver: MmioDriver) -> None:
    driver.notify(1)
    assert os.eventfd_read(driver.transport.kicks[1]) == 1
    driver.notify(3)
    driver.notify(0xFFFF_FFFF)
    assert driver.transport.ignored_writes == 2
    for kick in driver.transport.kicks:
        with pytest.raises(BlockingIOError):
            os.eventfd_read(kick)


def test_interrupt_ack_clears_what_it_names(driver: MmioDriver) -> None:
    lib.virtio_irq_raise(driver.transport.irq, VRING | CONFIG)
    assert driver.read(uapi.VIRTIO_MMIO_INTERRUPT_STATUS) == VRING | CONFIG
    driver.write(uapi.VIRTIO_MMIO_INTERRUPT_ACK, VRING)
    assert driver.read(uapi.VIRTIO_MMIO_INTERRUPT_STATUS) == CONFIG
    driver.write(uapi.VIRTIO_MMIO_INTERRUPT_ACK, 0xFFFF_FFFF)
    assert driver.read(uapi.VIRTIO_MMIO_INTERRUPT_STATUS) == 0


# Configuration space (2.5)


def test_the_configuration_space_is_in_the_page(driver: MmioDriver) -> None:
    assert driver.transport.read(uapi.VIRTIO_MMIO_CONFIG, 16) == bytes([*range(1, 13), 0, 0, 0, 0])


@pytest.mark.parametrize(
    ("offset", "data"), [(0, b"\xaa"), (3, b"\xbb\xcc"), (1, b"wxyz"), (2, b"8 bytes!")]
)
def test_the_driver_writes_it_in_any_width(driver: MmioDriver, offset: int, data: bytes) -> None:
    generation = driver.read(uapi.VIRTIO_MMIO_CONFIG_GENERATION)
    driver.transport.write(uapi.VIRTIO_MMIO_CONFIG + offset, data)
    assert driver.transport.read(uapi.VIRTIO_MMIO_CONFIG + offset, len(data)) == data
    assert driver.read(uapi.VIRTIO_MMIO_CONFIG_GENERATION) == generation
    assert not driver.was_interrupted()


@pytest.mark.parametrize(("offset", "data"), [(12, b"\x01"), (10, b"wxyz"), (3836, b"wxyz")])
def test_the_driver_cannot_write_past_its_end(driver: MmioDriver, offset: int, data: bytes) -> None:
    before = driver.page[:]
    driver.transport.write(uapi.VIRTIO_MMIO_CONFIG + offset, data)
    assert driver.page[:] == before
    assert driver.transport.ignored_writes == 1


def test_a_device_that_fails_a_configuration_write(
    driver: MmioDriver, caplog: pytest.LogCaptureFixture
) -> None:
    driver.transport.write(uapi.VIRTIO_MMIO_CONFIG + 11, b"\x00")
    assert "this byte bites" in caplog.text
    assert driver.transport.ignored_writes == 1


def test_a_change_bumps_the_generation_and_interrupts(driver: MmioDriver, device: Recorder) -> None:
    driver.start()
    generation = driver.read(uapi.VIRTIO_MMIO_CONFIG_GENERATION)
    device.config[0] = 99
    assert driver.transport.read(uapi.VIRTIO_MMIO_CONFIG, 1) == b"\x01"
    device.config_changed()
    assert driver.transport.read(uapi.VIRTIO_MMIO_CONFIG, 1) == b"\x63"
    assert driver.read(uapi.VIRTIO_MMIO_CONFIG_GENERATION) != generation
    assert driver.interrupted() == CONFIG


def test_a_change_during_initialization_interrupts_at_driver_ok(
    driver: MmioDriver, device: Recorder
) -> None:
    driver.negotiate()
    device.config_changed()
    assert not driver.was_interrupted()
    driver.add_status(DRIVER_OK)
    assert driver.interrupted() == CONFIG


def test_a_change_before_any_driver_interrupts_nobody(driver: MmioDriver, device: Recorder) -> None:
    device.config_changed()
    driver.start()
    assert not driver.was_interrupted()


def test_reads_are_trapped_while_configuration_and_generation_change(device: Recorder) -> None:
    calls: list[tuple[bool, int, int]] = []

    def trap_reads(trap: bool) -> None:
        page = transport.page
        generation = page[uapi.VIRTIO_MMIO_CONFIG_GENERATION]
        calls.append((trap, generation, page[uapi.VIRTIO_MMIO_CONFIG]))

    with MmioDriver(device, trap_reads) as transport:
        device.config[0] = 99
        device.config_changed()
    assert calls == [(True, 0, 1), (False, 1, 99)]


def test_a_trapped_read_waits_for_the_whole_change(device: Recorder) -> None:
    seen: list[tuple[int, int]] = []

    def read() -> None:
        config = driver.read(uapi.VIRTIO_MMIO_CONFIG)
        seen.append((config & 0xFF, driver.read(uapi.VIRTIO_MMIO_CONFIG_GENERATION)))

    def trap_reads(trap: bool) -> None:
        if trap:
            reader.start()
            reader.join(0.1)
        assert not seen

    reader = threading.Thread(target=read)
    with MmioDriver(device, trap_reads) as driver:
        device.config[0] = 99
        device.config_changed()
        reader.join()
    assert seen == [(99, 1)]


# Threads


class Stubborn(Recorder):
    """Its worker asks for a reset and changes the configuration while it is being stopped."""

    def deactivate(self) -> None:
        def work() -> None:
            self.config_changed()
            self.needs_reset()

        worker = threading.Thread(target=work)
        worker.start()
        worker.join(10)
        assert not worker.is_alive(), "deadlock: the worker waits for the transport"
        super().deactivate()


def test_a_worker_may_use_the_transport_while_it_is_stopped() -> None:
    with MmioDriver(Stubborn()) as driver:
        driver.start()
        driver.reset()
        assert driver.status == 0
        assert driver.read(uapi.VIRTIO_MMIO_INTERRUPT_STATUS) == 0


def test_close_stops_the_device_and_lets_go_of_the_page(device: Recorder) -> None:
    with MmioDriver(device) as driver:
        driver.start()
    assert device.activation is None
    assert device.deactivations == 1
    driver.page.close()  # BufferError if anything still refers to it
    device.config_changed()
    device.needs_reset()


# Any guest at all

REGISTERS = sorted(
    value
    for name, value in vars(uapi).items()
    if name.startswith("VIRTIO_MMIO_") and "INT_" not in name
)
WORDS = st.one_of(
    st.integers(0, 4),
    st.sampled_from([1, 3, 11, 15, 0x40, 0x80, 16, 64, 0x1000, 0x2000, 0xFFFF_FFFF]),
    st.integers(0, 0xFFFF_FFFF),
)
OFFSETS = st.one_of(st.sampled_from(REGISTERS), st.integers(0, 4088))


def _wild_write(offset: int, value: int, width: int) -> tuple[str, int, bytes]:
    return "write", offset, (value & (1 << 8 * width) - 1).to_bytes(width, "little")


ACCESSES = st.one_of(
    st.builds(_wild_write, st.sampled_from(REGISTERS), WORDS, st.just(4)),
    st.builds(_wild_write, OFFSETS, st.integers(0, 2**64 - 1), st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("read"), OFFSETS, st.sampled_from([1, 2, 4, 8])),
    st.tuples(st.just("reset"), st.just(0), st.just(0)),
    # A driver that gets as far as DRIVER_OK, with rings that hold anything.
    st.tuples(st.just("start"), st.just(0), st.binary(max_size=64)),
)


def _start_on_garbage(driver: MmioDriver, garbage: bytes) -> None:
    driver.reset()
    driver.start()
    queue = driver.queues[0]
    assert queue is not None
    avail = queue.config.avail_gpa
    if garbage:
        repeated = garbage * (0x400 // len(garbage))
        driver.memory.regions[0][: len(repeated)] = repeated
        driver.memory.regions[0][avail : avail + 2] = b"\0\0"
    driver.notify(0)


@settings(max_examples=150, deadline=None)
@given(st.lists(ACCESSES, max_size=60))
def test_whatever_a_guest_writes_a_reset_mends(accesses: list[tuple[str, int, Any]]) -> None:
    with MmioDriver(VirtioRng()) as driver:
        initial = bytearray(driver.page[:])
        for kind, offset, detail in accesses:
            match kind:
                case "write":
                    driver.transport.write(offset, detail)
                case "read":
                    assert len(driver.transport.read(offset, detail)) == detail
                case "reset":
                    driver.reset()
                case "start":
                    _start_on_garbage(driver, detail)
            _check_registers(driver)

        driver.reset()
        assert driver.page[:] == initial
        driver.forget_interrupts()
        driver.start()
        driver.request(writable=(32,))
        assert driver.interrupted() == VRING
        assert len(driver.replies()[0]) == 32


def _check_registers(driver: MmioDriver) -> None:
    """What holds whatever the driver did."""
    status = driver.status & ~(NEEDS_RESET | FAILED)
    assert status in (0, 1, 3, 11, 15)  # each bit after those before it
    assert driver.transport.read(0, 16) == struct.pack(
        "<4sII4s", b"virt", 2, VirtioRng.device_id, b"PYVM"
    )
    assert driver.read(uapi.VIRTIO_MMIO_QUEUE_NUM_MAX) in (0, *VirtioRng.queue_sizes)
    assert driver.read(uapi.VIRTIO_MMIO_QUEUE_READY) in (0, 1)
    assert driver.read(uapi.VIRTIO_MMIO_DEVICE_FEATURES) in (0, 1, INDIRECT | EVENT_IDX)
    assert driver.read(uapi.VIRTIO_MMIO_INTERRUPT_STATUS) & ~(VRING | CONFIG) == 0


def test_a_ring_that_cannot_be_followed_ends_in_needs_reset() -> None:
    with MmioDriver(VirtioRng()) as driver:
        driver.start()
        queue = driver.queues[0]
        assert queue is not None
        queue.write_avail_idx(queue.size + 1)
        driver.notify(0)
        assert driver.interrupted() == CONFIG
        assert driver.status == ALIVE | NEEDS_RESET
        # The device is silent now, however often it is notified.
        queue.write_avail_idx(1)
        driver.notify(0)
        driver.reset()
        driver.start()
        driver.request(writable=(8,))
        assert len(driver.replies()[0]) == 8


def test_rings_are_left_alone_after_a_reset() -> None:
    with MmioDriver(VirtioRng()) as driver:
        driver.start()
        queue = driver.queues[0]
        assert queue is not None
        driver.reset()
        assert "VirtioRng" not in [thread.name for thread in threading.enumerate()]
        queue.submit(writable=[64])
        memory = bytes(driver.memory.regions[0])
        driver.notify(0)
        assert driver.memory.regions[0] == memory
