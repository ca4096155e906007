"""virtio-console (virtio 1.2, section 5.3), between a driver and the pipes of a fake host."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.mmio_driver import CONFIG, MmioDriver, wait_until

from pyvmm._core import ffi, lib
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.console import Port, VirtioConsole

RX, TX = 0, 1
F_SIZE = 1 << uapi.VIRTIO_CONSOLE_F_SIZE


class Host:
    """A byte stream whose other ends the test holds."""

    def __init__(self, window: tuple[int, int] | None = None) -> None:
        flags = os.O_NONBLOCK | os.O_CLOEXEC
        self.input_fd: int | None
        self.output_fd: int | None
        self.input_fd, self.keyboard = os.pipe2(flags)
        self.screen, self.output_fd = os.pipe2(flags)
        self.on_resize: Callable[[], None] | None = None
        self.on_connect: Callable[[], None] | None = None
        self.window = window
        self._fds = {self.input_fd, self.keyboard, self.screen, self.output_fd}

    @property
    def fds(self) -> tuple[int | None, int | None]:
        return self.input_fd, self.output_fd

    def size(self) -> tuple[int, int] | None:
        return self.window

    def disconnect(self) -> None:
        raise AssertionError("pipes are no connection")

    def guest_opened(self, open: bool) -> None:
        pass

    def close_fd(self, fd: int) -> None:
        os.close(fd)
        self._fds.remove(fd)

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)

    def shown(self, size: int) -> bytes:
        """The next `size` bytes of output."""
        data = b""
        while len(data) < size:
            ready, _, _ = select.select([self.screen], [], [], 10)
            assert ready, f"after {data!r} nothing more came"
            data += os.read(self.screen, size - len(data))
        return data

    def shows_nothing(self) -> bool:
        return not select.select([self.screen], [], [], 0.02)[0]


def console(host: Host, watch: Any = ffi.NULL) -> VirtioConsole:
    """A console with hvc0 alone."""
    device = VirtioConsole()
    device.add_port(Port(host, terminal=True, watch=watch))
    return device


@pytest.fixture
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.close()


@pytest.fixture
def driver(host: Host) -> Iterator[MmioDriver]:
    with MmioDriver(console(host)) as driver:
        driver.start()
        yield driver


# Output


def test_output_arrives_in_order(driver: MmioDriver, host: Host) -> None:
    for text in (b"Linux ", b"version ", b"6.12\r\n"):
        driver.request(TX, (text[:3], text[3:]))
    assert host.shown(20) == b"Linux version 6.12\r\n"
    assert driver.replies(TX, 3) == [b"", b"", b""]


def test_a_large_buffer_goes_out_whole(driver: MmioDriver, host: Host) -> None:
    data = os.urandom(100_000)  # more than the pipe holds
    driver.request(TX, (data,))
    assert host.shown(len(data)) == data
    driver.replies(TX)


def test_the_guest_waits_for_a_host_that_does_not_read(driver: MmioDriver, host: Host) -> None:
    queue = driver.queues[TX]
    assert queue is not None
    data = [bytes([n]) * 7000 for n in range(16)]
    for text in data:
        driver.request(TX, (text,))
    wait_until(lambda: queue.collect() == [] and queue.in_flight < 16)
    time.sleep(0.05)
    queue.collect()
    held = queue.in_flight
    assert 16 * 7000 - 65536 <= held * 7000 <= 16 * 7000 - 32768  # what the pipe does not hold
    assert host.shown(16 * 7000) == b"".join(data)
    driver.replies(TX, held)


def test_a_reset_in_the_middle_of_output(driver: MmioDriver, host: Host) -> None:
    driver.request(TX, (bytes(200_000 // 2),))
    host.shown(4096)
    driver.reset()
    while not host.shows_nothing():
        os.read(host.screen, 65536)
    driver.start()
    driver.request(TX, (b"again",))
    assert host.shown(5) == b"again"


def test_output_is_dropped_when_the_reader_left(driver: MmioDriver, host: Host) -> None:
    host.close_fd(host.screen)
    for _ in range(3):
        driver.request(TX, (b"to nobody",))
    driver.replies(TX, 3)


def test_output_goes_to_the_watcher_too(host: Host) -> None:
    watch = lib.console_watch_create(-1)
    host.output_fd = None
    with MmioDriver(console(host, watch)) as driver:
        driver.start()
        driver.request(TX, (b"Kernel ", b"panic"))
        driver.request(TX, (bytes(10000),))
        driver.replies(TX, 2)
    tail = ffi.new("uint8_t[]", lib.CONSOLE_TAIL_SIZE)
    size = lib.console_watch_tail(watch, tail)
    assert bytes(ffi.buffer(tail, size)) == b"Kernel panic" + bytes(10000)
    lib.console_watch_destroy(watch)


def test_a_regular_file_takes_output(host: Host, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        host.output_fd = log.fileno()
        with MmioDriver(console(host)) as driver:
            driver.start()
            driver.request(TX, (b"log line\n",))
            driver.replies(TX)
    assert (tmp_path / "log").read_bytes() == b"log line\n"


# Input


def test_input_fills_the_buffers_of_the_driver(driver: MmioDriver, host: Host) -> None:
    driver.request(RX, writable=(4, 4))
    driver.request(RX, writable=(100,))
    os.write(host.keyboard, b"hello")
    assert driver.replies(RX) == [b"hello"]
    os.write(host.keyboard, b"world")
    assert driver.replies(RX) == [b"world"]


def test_long_input_takes_several_buffers(driver: MmioDriver, host: Host) -> None:
    for _ in range(3):
        driver.request(RX, writable=(4,))
    os.write(host.keyboard, b"0123456789")
    assert driver.replies(RX, 3) == [b"0123", b"4567", b"89"]


def test_input_waits_for_buffers(driver: MmioDriver, host: Host) -> None:
    """And while it does, the device does not turn in a busy loop."""
    assert host.input_fd is not None
    os.write(host.keyboard, b"early")
    driver.request(RX, writable=(3,))
    assert driver.replies(RX) == [b"ear"]
    before = os.times()
    assert host.shows_nothing()
    assert select.select([host.input_fd], [], [], 0)[0], "it was read with no room for it"
    assert os.times().user - before.user < 0.02
    driver.request(RX, writable=(3,))
    assert driver.replies(RX) == [b"ly"]


def test_input_survives_a_reset(driver: MmioDriver, host: Host) -> None:
    driver.request(RX, writable=(8,))
    driver.reset()
    os.write(host.keyboard, b"typed")
    driver.start()
    driver.request(RX, writable=(8,))
    assert driver.replies(RX) == [b"typed"]


def test_the_end_of_input(driver: MmioDriver, host: Host) -> None:
    driver.request(RX, writable=(8,))
    driver.request(RX, writable=(8,))
    os.write(host.keyboard, b"last")
    host.close_fd(host.keyboard)
    assert driver.replies(RX) == [b"last"]
    # Output goes on, as does a driver that is loaded anew.
    driver.request(TX, (b"still here",))
    assert host.shown(10) == b"still here"
    driver.reset()
    driver.start()
    driver.request(RX, writable=(8,))
    driver.request(TX, (b"and here",))
    assert host.shown(8) == b"and here"
    queue = driver.queues[RX]
    assert queue is not None
    assert queue.collect() == []


def test_a_host_without_input(host: Host) -> None:
    host.input_fd = None
    with MmioDriver(console(host)) as driver:
        driver.start()
        driver.request(RX, writable=(8,))
        driver.request(TX, (b"out",))
        assert host.shown(3) == b"out"


def test_buffers_the_wrong_way_round(driver: MmioDriver, host: Host) -> None:
    driver.request(RX, readable=(b"no room",))
    assert driver.replies(RX) == [b""]
    driver.request(TX, writable=(8,))
    assert driver.replies(TX) == [b""]
    driver.request(RX, writable=(8,))
    os.write(host.keyboard, b"fine")
    assert driver.replies(RX) == [b"fine"]


# Window size


def _window(driver: MmioDriver) -> tuple[int, int]:
    config = driver.read(uapi.VIRTIO_MMIO_CONFIG)
    return config & 0xFFFF, config >> 16


def test_no_size_without_a_terminal(driver: MmioDriver) -> None:
    assert not driver.offered() & F_SIZE
    assert _window(driver) == (0, 0)


def test_the_window_size_and_its_changes() -> None:
    host = Host(window=(80, 25))
    with MmioDriver(console(host)) as driver:
        assert driver.start() & F_SIZE
        assert _window(driver) == (80, 25)
        host.window = (132, 43)
        assert host.on_resize is not None
        host.on_resize()
        assert driver.interrupted() == CONFIG
        assert _window(driver) == (132, 43)
        # A terminal that went away leaves the last size.
        host.window = None
        host.on_resize()
        assert _window(driver) == (132, 43)
    host.close()
