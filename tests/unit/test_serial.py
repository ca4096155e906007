"""The 16550 UART in C, through the port accesses a driver makes (PC16550D data sheet)."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterator

import pytest

from pyvmm._core import ffi, lib
from pyvmm.worker import WorkerThread

PORT = 0x3F8
RX_TX, IER, IIR_FCR, LCR, MCR, LSR, MSR, SCR = range(8)
DATA_READY, TRANSMITTER_EMPTY = 0x01, 0x60
ENABLE_RECEIVE, ENABLE_TRANSMIT = 0x01, 0x02
IIR_NONE, IIR_TRANSMIT, IIR_RECEIVE = 0x01, 0x02, 0x04
FIFO_ON = 0x01
OUT2 = 0x08


class Serial:
    """The UART between two pipes, with its worker running."""

    def __init__(self) -> None:
        self.guest_input, self.host_input = os.pipe()
        self.host_output, self.guest_output = os.pipe()
        self.watch = lib.console_watch_create(-1)
        self.native = lib.serial16550_create(
            PORT, self.guest_input, self.guest_output, -1, 4, self.watch
        )
        self.bus = ffi.new("struct io_bus *")
        assert lib.io_bus_add(self.bus, lib.serial16550_range(self.native)) == 0
        self.worker = WorkerThread(lib.serial16550_worker(self.native), "serial")

    def close(self) -> None:
        self.worker.stop()
        lib.serial16550_destroy(self.native)
        lib.console_watch_destroy(self.watch)
        for fd in (self.guest_input, self.host_input, self.host_output, self.guest_output):
            os.close(fd)

    def read(self, register: int) -> int:
        data = ffi.new("uint8_t *")
        assert lib.io_bus_access(self.bus, PORT + register, data, 1, False) == lib.IO_DONE
        return int(data[0])

    def write(self, register: int, value: int) -> None:
        data = ffi.new("uint8_t *", value)
        assert lib.io_bus_access(self.bus, PORT + register, data, 1, True) == lib.IO_DONE

    def output(self) -> bytes:
        """What the host can read without waiting."""
        ready, _, _ = select.select([self.host_output], [], [], 0)
        return os.read(self.host_output, 1 << 20) if ready else b""

    def wait_for(self, register: int, mask: int) -> None:
        deadline = time.monotonic() + 10
        while not self.read(register) & mask:
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.fixture
def serial() -> Iterator[Serial]:
    serial = Serial()
    yield serial
    serial.close()


def test_without_fifo_each_byte_goes_out_at_once(serial: Serial) -> None:
    serial.write(RX_TX, ord("x"))
    assert serial.output() == b"x"


def test_with_fifo_a_burst_goes_out_when_the_driver_looks_at_the_line(serial: Serial) -> None:
    serial.write(IIR_FCR, FIFO_ON)
    for byte in b"burst":
        serial.write(RX_TX, byte)
    assert serial.read(LSR) & TRANSMITTER_EMPTY == TRANSMITTER_EMPTY
    assert serial.output() == b"burst"


def test_a_full_fifo_goes_out_by_itself(serial: Serial) -> None:
    serial.write(IIR_FCR, FIFO_ON)
    for byte in b"0123456789abcdef":
        serial.write(RX_TX, byte)
    assert serial.output() == b"0123456789abcdef"


def test_input_longer_than_the_fifo_arrives_whole(serial: Serial) -> None:
    text = bytes(range(256)) * 4
    os.write(serial.host_input, text)
    received = bytearray()
    while len(received) < len(text):
        serial.wait_for(LSR, DATA_READY)
        received.append(serial.read(RX_TX))
    assert received == text
    assert serial.read(LSR) & DATA_READY == 0


def test_receive_interrupt_is_identified_and_goes_when_the_byte_is_read(serial: Serial) -> None:
    serial.write(MCR, OUT2)
    serial.write(IER, ENABLE_RECEIVE)
    assert serial.read(IIR_FCR) & 0x0F == IIR_NONE
    os.write(serial.host_input, b"k")
    serial.wait_for(LSR, DATA_READY)
    assert serial.read(IIR_FCR) & 0x0F == IIR_RECEIVE
    assert serial.read(RX_TX) == ord("k")
    assert serial.read(IIR_FCR) & 0x0F == IIR_NONE


def test_enabling_the_transmit_interrupt_raises_it_and_reading_iir_clears_it(
    serial: Serial,
) -> None:
    serial.write(IER, ENABLE_TRANSMIT)
    assert serial.read(IIR_FCR) & 0x0F == IIR_TRANSMIT
    assert serial.read(IIR_FCR) & 0x0F == IIR_NONE
    serial.write(RX_TX, ord("a"))
    assert serial.read(IIR_FCR) & 0x0F == IIR_TRANSMIT


def test_a_host_that_does_not_read_stalls_the_transmitter_and_loses_nothing(
    serial: Serial,
) -> None:
    sent = bytearray()
    value = 0
    while serial.read(LSR) & TRANSMITTER_EMPTY:
        value = (value + 1) % 251
        serial.write(RX_TX, value)
        sent.append(value)
        assert len(sent) < 1 << 20
    received = bytearray()
    while len(received) < len(sent):
        received += os.read(serial.host_output, 4096)
    assert received == sent
    serial.wait_for(LSR, TRANSMITTER_EMPTY)


def test_a_host_that_hung_up_does_not_stop_the_guest(serial: Serial) -> None:
    os.close(serial.host_output)
    for _ in range(100):
        serial.write(RX_TX, ord("x"))
        assert serial.read(LSR) & TRANSMITTER_EMPTY
    serial.host_output = os.open("/dev/null", os.O_RDONLY)


def test_input_that_came_before_the_driver_waits_for_it(serial: Serial) -> None:
    """What Linux does to find out about a port, and to open it (8250_port.c), loses nothing."""
    os.write(serial.host_input, b"typed early")
    time.sleep(0.05)
    serial.write(IER, 0x0F)  # is there a register?
    time.sleep(0.05)
    serial.write(IER, 0)
    serial.write(IIR_FCR, FIFO_ON)
    serial.write(IIR_FCR, FIFO_ON | 0x06)
    serial.write(IIR_FCR, 0)
    for register in (LSR, RX_TX, IIR_FCR, MSR, LSR):
        serial.read(register)
    serial.write(MCR, OUT2)
    serial.write(IER, ENABLE_RECEIVE)
    received = bytearray()
    while len(received) < len(b"typed early"):
        serial.wait_for(LSR, DATA_READY)
        received.append(serial.read(RX_TX))
    assert received == b"typed early"


def test_loopback_as_the_kernel_probes_for_it(serial: Serial) -> None:
    serial.write(MCR, 0x10 | 0x08 | 0x02)  # LOOP, OUT2, RTS
    assert serial.read(MSR) & 0xF0 == 0x90  # DCD, CTS
    serial.write(RX_TX, 0x5A)
    assert serial.read(LSR) & DATA_READY
    assert serial.read(RX_TX) == 0x5A
    assert serial.output() == b""


def test_divisor_latch_hides_data_and_interrupt_enable(serial: Serial) -> None:
    serial.write(IER, ENABLE_RECEIVE)
    serial.write(LCR, 0x83)
    serial.write(RX_TX, 0x34)
    serial.write(IER, 0x12)
    assert (serial.read(RX_TX), serial.read(IER)) == (0x34, 0x12)
    serial.write(LCR, 0x03)
    assert serial.read(IER) == ENABLE_RECEIVE
    assert serial.output() == b""


def test_scratch_register_and_fifo_identification(serial: Serial) -> None:
    serial.write(SCR, 0xA5)
    assert serial.read(SCR) == 0xA5
    assert serial.read(IIR_FCR) & 0xC0 == 0
    serial.write(IIR_FCR, FIFO_ON)
    assert serial.read(IIR_FCR) & 0xC0 == 0xC0


def test_output_is_kept_for_reports(serial: Serial) -> None:
    for byte in b"last words\n":
        serial.write(RX_TX, byte)
    tail = ffi.new("uint8_t[]", lib.CONSOLE_TAIL_SIZE)
    size = lib.console_watch_tail(serial.watch, tail)
    assert ffi.buffer(tail, size)[:] == b"last words\n"
