"""virtio-rng (virtio 1.2, section 5.4)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.mmio_driver import VRING, MmioDriver

from pyvmm.virtio._generated_uapi import VIRTIO_MMIO_DEVICE_ID
from pyvmm.virtio.rng import REQUEST_LIMIT, VirtioRng


@pytest.fixture
def driver() -> Iterator[MmioDriver]:
    with MmioDriver(VirtioRng()) as driver:
        driver.start()
        yield driver


def test_it_is_an_entropy_device(driver: MmioDriver) -> None:
    assert driver.read(VIRTIO_MMIO_DEVICE_ID) == 4


def test_it_fills_the_whole_buffer_and_interrupts(driver: MmioDriver) -> None:
    driver.request(writable=(256, 100))
    assert driver.interrupted() == VRING
    (data,) = driver.replies()
    assert len(data) == 356
    # 356 random bytes have more than 128 different values, but for a chance below 1 in 10^30.
    assert len(set(data)) > 128


def test_each_request_gets_other_bytes(driver: MmioDriver) -> None:
    for _ in range(10):
        driver.request(writable=(64,))
    replies = driver.replies(count=10)
    assert len(set(replies)) == 10


def test_a_huge_request_is_served_in_part(driver: MmioDriver) -> None:
    driver.request(writable=(REQUEST_LIMIT + 4096,))
    (data,) = driver.replies()
    assert len(data) == REQUEST_LIMIT


def test_a_request_without_a_writable_part_comes_back_empty(driver: MmioDriver) -> None:
    driver.request(readable=(b"hello",))
    assert driver.replies() == [b""]
    driver.request(writable=(16,))
    assert len(driver.replies()[0]) == 16
