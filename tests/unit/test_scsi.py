"""The SCSI host device: addresses, framing, task management, events (virtio 1.2, section 5.6)."""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from support.mmio_driver import NEEDS_RESET, wait_until
from support.scsi_driver import CHECK_CONDITION, GOOD, Reply, ScsiDriver, flat

from pyvmm._core import lib
from pyvmm.backends.disk import Image, open_image
from pyvmm.backends.scsi.command import Command, CommandThread
from pyvmm.backends.scsi.disk import ScsiDisk
from pyvmm.errors import UsageError
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.scsi import CONTROL, EVENTS, FIRST_REQUEST_QUEUE, VirtioScsi

SIZE = 1 << 20
POWER_ON, LUNS_CHANGED = (6, 0x29, 0x00), (6, 0x3F, 0x0E)
DEVICE_RESET, NEXUS_LOSS = (6, 0x29, 0x03), (6, 0x29, 0x07)
NOT_SUPPORTED = (5, 0x25, 0x00)
READ = struct.pack(">BxIxHx", 0x28, 0, 1)
MODE_SENSE = b"\x1a\0\x3f\0\xff\0"
OK, OVERRUN, ABORTED = (
    uapi.VIRTIO_SCSI_S_OK,
    uapi.VIRTIO_SCSI_S_OVERRUN,
    uapi.VIRTIO_SCSI_S_ABORTED,
)
BAD_TARGET, RESET, FAILURE = (
    uapi.VIRTIO_SCSI_S_BAD_TARGET,
    uapi.VIRTIO_SCSI_S_RESET,
    uapi.VIRTIO_SCSI_S_FAILURE,
)
REJECTED, INCORRECT_LUN, SUCCEEDED = (
    uapi.VIRTIO_SCSI_S_FUNCTION_REJECTED,
    uapi.VIRTIO_SCSI_S_INCORRECT_LUN,
    uapi.VIRTIO_SCSI_S_FUNCTION_SUCCEEDED,
)
ABORT_TASK, ABORT_TASK_SET, CLEAR_ACA, CLEAR_TASK_SET, NEXUS_RESET, UNIT_RESET = range(6)
QUERY_TASK, QUERY_TASK_SET = 6, 7


class HeldDisk(ScsiDisk):
    """A disk whose rare commands wait in Python until `release`."""

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.holds = False
        self.entered = threading.Event()
        self.released = threading.Event()

    def _execute(self, command: Command) -> None:
        if self.holds:
            self.entered.set()
            assert self.released.wait(10)
        super()._execute(command)

    def release(self) -> None:
        self.holds = False
        self.released.set()


class Host:
    """A SCSI host whose disks are all on one image, that only is read."""

    def __init__(self, image: Image, queues: int = 1) -> None:
        self.device = VirtioScsi(queues=queues)
        self.commands = CommandThread()
        self.image = image
        self.units: list[HeldDisk] = []
        self.driver: ScsiDriver = None  # type: ignore[assignment]

    def disk(self) -> HeldDisk:
        unit = HeldDisk(self.image, self.commands, serial=f"S{len(self.units)}")
        self.units.append(unit)
        return unit

    def plug(self, target: int, lun: int) -> HeldDisk:
        unit = self.disk()
        self.device.plug(target, lun, unit)
        return unit

    def start(self, without: int = 0) -> ScsiDriver:
        self.driver = ScsiDriver(self.device, without)
        return self.driver

    def close(self) -> None:
        for unit in self.units:
            unit.release()
        if self.driver:
            self.driver.driver.__exit__()
        for unit in self.units:
            unit.close()
        self.commands.close()


@pytest.fixture
def image(tmp_path: Path) -> Iterator[Image]:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(512) * (SIZE // 512))
    with open_image(path) as image:
        yield image


@pytest.fixture
def make_host(image: Image) -> Iterator[Callable[..., Host]]:
    with ExitStack() as stack:

        def make_host(queues: int = 1) -> Host:
            host = Host(image, queues)
            stack.callback(host.close)
            return host

        yield make_host


@pytest.fixture
def host(make_host: Callable[..., Host]) -> Host:
    return make_host()


class TestConfiguration:
    def read(self, host: Host) -> uapi.virtio_scsi_config:
        return uapi.virtio_scsi_config.from_buffer_copy(host.device.read_config())

    def test_contents(self, make_host: Callable[..., Host]) -> None:
        config = self.read(make_host(queues=3))
        assert (config.num_queues, config.seg_max, config.cmd_per_lun) == (3, 254, 256)
        assert (config.max_sectors, config.event_info_size) == (65536, 16)
        assert (config.sense_size, config.cdb_size) == (96, 32)
        assert (config.max_channel, config.max_target, config.max_lun) == (0, 255, 16383)

    def test_transfers_can_be_limited(self) -> None:
        device = VirtioScsi()
        for size, sectors in ((1 << 20, 2048), (2 << 20, 2048), (64 << 10, 128)):
            device.limit_transfers(size)
            config = uapi.virtio_scsi_config.from_buffer_copy(device.read_config())
            assert config.max_sectors == sectors

    def test_only_two_fields_are_writable(self, host: Host) -> None:
        before = self.read(host)
        host.device.write_config(0, b"\xff" * 20)
        assert bytes(self.read(host)) == bytes(before)
        host.device.write_config(20, struct.pack("<II", 252, 260))
        assert (self.read(host).sense_size, self.read(host).cdb_size) == (252, 260)
        host.device.write_config(20, struct.pack("<II", 253, 261))
        host.device.write_config(24, bytes(4))
        assert (self.read(host).sense_size, self.read(host).cdb_size) == (252, 260)

    def test_sizes_go_back_with_a_reset(self, host: Host) -> None:
        host.plug(0, 0)
        driver = host.start()
        host.device.write_config(20, struct.pack("<II", 64, 16))
        driver.driver.reset()
        assert (self.read(host).sense_size, self.read(host).cdb_size) == (96, 32)

    @pytest.mark.parametrize(("sense_size", "cdb_size"), ((0, 16), (18, 260), (252, 10), (5, 6)))
    def test_the_driver_chooses_sizes(self, host: Host, sense_size: int, cdb_size: int) -> None:
        host.plug(0, 0)
        host.device.write_config(20, struct.pack("<II", sense_size, cdb_size))
        driver = host.start()
        driver.sense_size, driver.cdb_size = sense_size, cdb_size
        reply = driver.command(bytes(6))
        assert reply.status == CHECK_CONDITION
        assert len(reply.sense) == min(18, sense_size)
        assert reply.written == 12 + sense_size
        assert driver.command(b"\x12\0\0\0\x24\0", into=36).data[8:13] == b"pyvmm"
        if cdb_size < 10:
            assert driver.command(READ[:6], into=512).status == CHECK_CONDITION

    def test_number_of_queues(self) -> None:
        with pytest.raises(UsageError) as error:
            VirtioScsi(queues=17)
        assert str(error.value) == "17 request queues for a SCSI host: give 1 to 16"


def report_luns(select: int = 0, allocated: int = 4096) -> bytes:
    return struct.pack(">BBBxxxIxx", 0xA0, 0, select, allocated)


def inquiry(driver: ScsiDriver, address: bytes) -> Reply:
    return driver.command(b"\x12\0\0\0\x24\0", into=36, address=address)


class TestAddresses:
    def test_peripheral_and_flat(self, host: Host) -> None:
        host.plug(0, 0)
        host.plug(3, 200)
        host.plug(3, 256)
        host.plug(255, 16383)
        driver = host.start()

        def serial(address: bytes) -> bytes:
            return driver.command(b"\x12\1\x80\0\xff\0", into=255, address=address).data[4:]

        assert serial(b"\1\0\0\0\0\0\0\0") == b"S0"
        assert serial(b"\1\0\x40\0\0\0\0\0") == b"S0"
        assert serial(b"\1\3\0\xc8\0\0\0\0") == b"S1"
        assert serial(b"\1\3\x40\xc8\0\0\0\0") == b"S1"
        assert serial(b"\1\3\x41\0\0\0\0\0") == b"S2"
        assert serial(b"\1\xff\x7f\xff\0\0\0\0") == b"S3"

    def test_no_such_target(self, host: Host) -> None:
        host.plug(1, 0)
        driver = host.start()
        for address in (flat(0, 0), flat(2, 0), b"\0\1\0\0\0\0\0\0", b"\2\1\0\0\0\0\0\0"):
            reply = driver.command(b"\x12\0\0\0\x24\0", into=36, address=address)
            assert (reply.response, reply.transferred) == (BAD_TARGET, 0)

    @pytest.mark.parametrize(
        "address",
        (
            flat(0, 2),
            b"\1\0\0\2\0\0\0\0",
            b"\1\0\x01\x01\0\0\0\0",  # bus 1
            b"\1\0\x80\x01\0\0\0\0",  # logical unit addressing
            b"\1\0\x40\x01\0\0\0\1",  # a second level
            b"\1\0\xc1\x02\0\0\0\0",  # another well-known logical unit
        ),
    )
    def test_no_such_unit(self, host: Host, address: bytes) -> None:
        host.plug(0, 1)
        driver = host.start()
        data = inquiry(driver, address).data
        assert data[0] == 0x7F
        assert len(data) == 36
        reply = driver.command(bytes(6), address=address)
        assert (reply.status, reply.code) == (CHECK_CONDITION, NOT_SUPPORTED)
        reply = driver.command(READ, into=512, address=address)
        assert (reply.status, reply.code, reply.transferred) == (CHECK_CONDITION, NOT_SUPPORTED, 0)
        reply = driver.command(report_luns(), into=4096, address=address)
        assert (reply.status, reply.code) == (CHECK_CONDITION, NOT_SUPPORTED)
        reply = driver.command(b"\3\0\0\0\xff\0", into=255, address=address)
        assert (reply.status, reply.data[2], reply.data[12]) == (GOOD, 5, 0x25)
        reply = driver.command(b"\x12\1\0\0\xff\0", into=255, address=address)
        assert reply.data == b"\x7f\0\0\1\0"
        reply = driver.command(b"\x12\1\x80\0\xff\0", into=255, address=address)
        assert reply.code == (5, 0x24, 0)

    def test_report_luns(self, host: Host) -> None:
        for lun in (1, 255, 256, 300):
            host.plug(2, lun)
        host.plug(3, 0)
        driver = host.start()
        listed = b"".join(
            bytes.fromhex(text)
            for text in (
                "0001000000000000",
                "00ff000000000000",
                "4100000000000000",
                "412c000000000000",
            )
        )
        well_known = b"\xc1\1\0\0\0\0\0\0"

        def report(select: int, address: bytes) -> bytes:
            reply = driver.command(report_luns(select), into=4096, address=address)
            assert (reply.response, reply.status) == (OK, GOOD)
            assert int.from_bytes(reply.data[:4]) == len(reply.data) - 8
            return reply.data[8:]

        # LUN 0 answers, though it does not exist; so do each that does, and the well-known one.
        for address in (flat(2, 0), flat(2, 255), b"\1\2\xc1\1\0\0\0\0"):
            assert report(0x00, address) == listed
            assert report(0x01, address) == well_known
            assert report(0x02, address) == listed + well_known
            assert report(0x10, address) == b""
            assert report(0x11, address) == listed
            assert report(0x12, address) == b""
            for select in (0x03, 0x13, 0xF8):
                reply = driver.command(report_luns(select), into=4096, address=address)
                assert (reply.code, reply.pointer) == ((5, 0x24, 0), (True, 2, 7))
            reply = driver.command(report_luns(0, 15), into=15, address=address)
            assert (reply.code, reply.pointer) == ((5, 0x24, 0), (True, 6, 7))
            reply = driver.command(report_luns(0, 16), into=16, address=address)
            assert reply.data == struct.pack(">Ixxxx", 32) + listed[:8]
            reply = driver.command(report_luns()[:1] + b"\1" + report_luns()[2:], address=address)
            assert (reply.code, reply.pointer) == ((5, 0x24, 0), (True, 1, 0))
        assert report(0, b"\xc1\1\0\0\0\0\0\0") == b"".join(
            bytes.fromhex(text)
            for text in (
                "0102000100000000",
                "010200ff00000000",
                "0102410000000000",
                "0102412c00000000",
                "0103000000000000",
            )
        )

    def test_well_known_units(self, host: Host) -> None:
        host.plug(2, 1)
        driver = host.start()
        for address in (b"\1\2\xc1\1\0\0\0\0", b"\xc1\1\0\0\0\0\0\0"):
            assert inquiry(driver, address).data[0] == 0x1E
            assert driver.command(bytes(6), address=address).status == GOOD
            reply = driver.command(b"\3\0\0\0\xff\0", into=255, address=address)
            assert reply.data == b"\x70\0\0\0\0\0\0\x0a" + bytes(10)
            assert driver.command(READ, into=512, address=address).code == (5, 0x20, 0)

    def test_hundreds(self, host: Host) -> None:
        for lun in range(300):
            host.plug(0, lun)
        driver = host.start()
        for lun in range(300):
            reply = driver.command(b"\x12\1\x80\0\xff\0", into=255, lun=lun)
            assert reply.data[4:] == f"S{lun}".encode()
        reply = driver.command(report_luns(), into=4096)
        assert len(reply.data) == 8 + 300 * 8


class TestFraming:
    @pytest.fixture
    def driver(self, host: Host) -> ScsiDriver:
        host.plug(0, 0)
        driver = host.start()
        driver.settle()
        return driver

    def test_any_framing(self, driver: ScsiDriver, host: Host) -> None:
        expected = os.pread(host.image.fd, 512, 0)  # type: ignore[attr-defined]
        header = driver.header(READ, flat(0, 0))
        for readable in ((header,), (header[:1], header[1:8], header[8:30], header[30:])):
            for writable in ((108, 512), (620,), (1, 11, 96, 512), (108, 1, 511), (50, 560, 10)):
                reply = driver.chain(readable, writable, total=512)
                assert (reply.response, reply.status) == (OK, GOOD)
                assert (reply.data, reply.written) == (expected, 620)

    def test_a_header_cut_short(self, driver: ScsiDriver, host: Host) -> None:
        header = driver.header(READ, flat(0, 0))
        for size in (0, 1, 18, 19, 50):
            reply = driver.chain((header[:size],) if size else (), (620,))
            assert reply.response == FAILURE
            assert reply.written == 108
        assert host.device.counters["failed"] == 6  # one was the unit attention

    def test_no_room_for_the_response(self, driver: ScsiDriver) -> None:
        header = driver.header(READ, flat(0, 0))
        for writable in ((), (1,), (12,), (107,)):
            assert driver.chain((header,), writable).written == 0

    def test_data_in_both_directions(self, driver: ScsiDriver) -> None:
        reply = driver.command(READ, out=bytes(512), into=512)
        assert reply.response == FAILURE
        assert reply.written == 108

    def test_many_in_flight_on_several_queues(self, make_host: Callable[..., Host]) -> None:
        host = make_host(queues=3)
        for lun in range(4):
            host.plug(0, lun)
        driver = host.start()
        for lun in range(4):
            driver.settle(lun=lun)
        expected = os.pread(host.image.fd, 512, 0)  # type: ignore[attr-defined]
        for _ in range(30):
            for queue in range(3):
                for lun in range(4):
                    driver.start((driver.header(READ, flat(0, lun)),), (108, 512), queue)
            for queue in range(3):
                for data in driver.driver.replies(FIRST_REQUEST_QUEUE + queue, 4):
                    reply = driver.parse(data, len(data), 512)
                    assert (reply.response, reply.status, reply.data) == (OK, GOOD, expected)
        counters = host.device.counters
        assert counters["requests"] == 30 * 12 + 8
        assert counters["failed"] == 4
        assert counters["malformed"] == 0

    def test_a_ring_that_cannot_be_followed(self, host: Host, driver: ScsiDriver) -> None:
        ring = driver.driver.queues[FIRST_REQUEST_QUEUE]
        assert ring is not None
        ring.write_avail_idx(ring.avail_idx + 100)
        driver.driver.notify(FIRST_REQUEST_QUEUE)
        wait_until(lambda: driver.driver.status & NEEDS_RESET)
        # Who changes the map of logical units does not wait for that queue.
        host.plug(0, 1)
        host.device.unplug(0, 1)
        driver.driver.reset()
        driver.driver.start()
        driver.settle()
        assert driver.command(READ, into=512).status == GOOD

    def test_a_reset_while_commands_are_in_flight(self, host: Host, driver: ScsiDriver) -> None:
        unit = host.units[0]
        unit.holds = True
        driver.start((driver.header(MODE_SENSE, flat(0, 0)),), (108, 255))
        assert unit.entered.wait(10)
        threading.Timer(0.2, unit.release).start()
        driver.driver.reset()
        assert unit.released.is_set()
        driver.driver.start()
        assert driver.command(bytes(6)).code == POWER_ON
        assert driver.command(READ, into=512).status == GOOD


class TestTaskManagement:
    @pytest.fixture
    def driver(self, make_host: Callable[..., Host]) -> ScsiDriver:
        self.host = make_host(queues=2)
        for place in ((0, 0), (0, 1), (1, 0)):
            self.host.plug(*place)
        driver = self.host.start()
        for target, lun in ((0, 0), (0, 1), (1, 0)):
            driver.settle(target, lun)
        return driver

    def hold(self, driver: ScsiDriver, tag: int = 7, queue: int = 1) -> HeldDisk:
        """A command to 0:0 that is in flight until the unit is released."""
        unit = self.host.units[0]
        unit.holds = True
        driver.start((driver.header(MODE_SENSE, flat(0, 0), tag),), (108, 255), queue)
        assert unit.entered.wait(10)
        return unit

    def reply(self, driver: ScsiDriver, queue: int = 1) -> Reply:
        (data,) = driver.driver.replies(FIRST_REQUEST_QUEUE + queue)
        return driver.parse(data, len(data), 255)

    def request(self, driver: ScsiDriver, subtype: int, **where: int) -> None:
        place = flat(where.get("target", 0), where.get("lun", 0))
        request = struct.pack("<II8sQ", 0, subtype, place, where.get("tag", 0))
        driver.driver.request(CONTROL, (request,), (1,))

    def manage_later(self, driver: ScsiDriver, subtype: int, **where: int) -> None:
        """A function, the only one, that has found a command and now waits for its end."""
        self.request(driver, subtype, **where)
        wait_until(lambda: any(each.matched for each, _ in self.host.device._functions))

    @pytest.mark.parametrize(
        ("subtype", "where", "response"),
        (
            (ABORT_TASK, {"tag": 7}, ABORTED),
            (ABORT_TASK_SET, {}, ABORTED),
            (CLEAR_TASK_SET, {}, ABORTED),
            (UNIT_RESET, {}, RESET),
            (NEXUS_RESET, {"lun": 5}, RESET),
        ),
    )
    def test_it_ends_when_the_tasks_have(
        self, driver: ScsiDriver, subtype: int, where: dict[str, int], response: int
    ) -> None:
        unit = self.hold(driver)
        self.manage_later(driver, subtype, **where)
        control = driver.driver.queues[CONTROL]
        assert control is not None
        driver.command(READ, into=512, lun=1)
        assert control.collect() == []
        unit.release()
        assert driver.driver.replies(CONTROL) == [bytes((OK,))]
        reply = self.reply(driver)
        assert (reply.response, reply.transferred) == (response, 0)

    def test_other_tasks_go_on(self, driver: ScsiDriver) -> None:
        unit = self.hold(driver)
        assert driver.manage(ABORT_TASK, tag=8) == OK
        assert driver.manage(ABORT_TASK, lun=1, tag=7) == OK
        assert driver.manage(ABORT_TASK_SET, lun=1) == OK
        assert driver.manage(UNIT_RESET, target=1) == OK
        assert driver.manage(NEXUS_RESET, target=1) == OK
        unit.release()
        reply = self.reply(driver)
        assert (reply.response, reply.status, reply.transferred) == (OK, GOOD, 44)

    def test_what_is_still_in_the_ring_is_meant_too(self, driver: ScsiDriver) -> None:
        """A driver may ask at once for the end of what it has just made available."""
        unit = self.host.units[0]
        unit.holds = True
        ring = driver.driver.queues[FIRST_REQUEST_QUEUE]
        assert ring is not None
        ring.add((driver.header(MODE_SENSE, flat(0, 0), 1),), (108, 255))
        ring.publish()  # and no notification
        self.manage_later(driver, ABORT_TASK, tag=1)
        assert unit.entered.wait(10)
        unit.release()
        assert driver.driver.replies(CONTROL) == [bytes((OK,))]
        assert self.reply(driver, queue=0).response == ABORTED

    def test_two_functions_on_one_task(self, driver: ScsiDriver) -> None:
        unit = self.hold(driver)
        self.request(driver, ABORT_TASK, tag=7)
        self.request(driver, UNIT_RESET)
        assert driver.manage(QUERY_TASK, tag=1) == OK  # the queues are done with the others
        unit.release()
        assert driver.driver.replies(CONTROL, 2) == [bytes((OK,))] * 2
        assert self.reply(driver).response == ABORTED

    def test_a_function_that_ends_while_it_is_looked_at(self) -> None:
        class Ending:
            looks = 0

            @property
            def pending(self) -> bool:
                self.looks += 1
                return self.looks == 1

        device = VirtioScsi()
        answered: list[Any] = []
        with ExitStack() as stack:
            device._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            stack.callback(device.deactivate)
            device._functions = [(function := Ending(), answered.append)]
            for _ in range(2):
                os.eventfd_write(device._done_fd, 1)
                device._finish_functions()
        assert answered == [function]

    def test_query(self, driver: ScsiDriver) -> None:
        assert driver.manage(QUERY_TASK_SET) == OK
        unit = self.hold(driver)
        assert driver.manage(QUERY_TASK, tag=7) == SUCCEEDED
        assert driver.manage(QUERY_TASK, tag=8) == OK
        assert driver.manage(QUERY_TASK, lun=1, tag=7) == OK
        assert driver.manage(QUERY_TASK_SET) == SUCCEEDED
        unit.release()
        assert self.reply(driver).response == OK
        assert driver.manage(QUERY_TASK, tag=7) == OK

    def test_resets_establish_unit_attentions(self, driver: ScsiDriver) -> None:
        assert driver.manage(UNIT_RESET, lun=1) == OK
        assert driver.command(bytes(6), lun=1).code == DEVICE_RESET
        assert driver.command(bytes(6), lun=0).status == GOOD
        assert driver.manage(NEXUS_RESET) == OK
        for lun in (0, 1):
            assert driver.command(bytes(6), lun=lun).code == NEXUS_LOSS
            assert driver.command(bytes(6), lun=lun).status == GOOD
        assert driver.command(bytes(6), target=1).status == GOOD

    def test_refusals(self, driver: ScsiDriver) -> None:
        assert driver.manage(CLEAR_ACA) == REJECTED
        assert driver.manage(99) == REJECTED
        for subtype in (ABORT_TASK, UNIT_RESET, QUERY_TASK_SET, CLEAR_ACA):
            assert driver.manage(subtype, lun=2) == INCORRECT_LUN
            assert driver.manage(subtype, target=9) == BAD_TARGET
        assert driver.manage(NEXUS_RESET, target=9) == BAD_TARGET

    def test_malformed_requests(self, driver: ScsiDriver) -> None:
        good = struct.pack("<II8sQ", 0, UNIT_RESET, flat(0, 0), 0)
        assert driver.control(good[:23]) == b""
        assert driver.control(b"") == b""
        assert driver.control(good, 0) == b""
        assert driver.control(b"\x63\0\0\0" + good[4:]) == b""
        assert driver.control(good) == bytes((OK,))

    def test_asynchronous_notifications(self, driver: ScsiDriver) -> None:
        for kind in (uapi.VIRTIO_SCSI_T_AN_QUERY, uapi.VIRTIO_SCSI_T_AN_SUBSCRIBE):

            def request(target: int, lun: int, kind: int = kind) -> bytes:
                return struct.pack("<I8sI", kind, flat(target, lun), 0x3E)

            assert driver.control(request(0, 0), 5) == struct.pack("<IB", 0, OK)
            assert driver.control(request(0, 2), 5) == struct.pack("<IB", 0, INCORRECT_LUN)
            assert driver.control(request(9, 0), 5) == struct.pack("<IB", 0, BAD_TARGET)
            assert driver.control(request(0, 0)[:-1], 5) == b""
            assert driver.control(request(0, 0), 4) == b""


TRANSPORT_RESET, PARAM_CHANGE = 1, 3
RESCAN, REMOVED = uapi.VIRTIO_SCSI_EVT_RESET_RESCAN, uapi.VIRTIO_SCSI_EVT_RESET_REMOVED
MISSED = 0x8000_0000


def check(condition: bool) -> None:
    assert condition


def listed(target: int, lun: int) -> bytes:
    """An address as events have it: peripheral, or flat from 256 on."""
    return bytes((1, target)) + (lun if lun < 256 else 0x4000 | lun).to_bytes(2) + bytes(4)


class TestUnitsThatComeAndGo:
    def test_plug(self, host: Host) -> None:
        host.plug(0, 0)
        host.plug(1, 0)
        driver = host.start()
        driver.settle(0)
        driver.settle(1)
        driver.offer_event_buffers(2)
        host.plug(0, 300)
        assert driver.event() == (TRANSPORT_RESET, listed(0, 300), RESCAN)
        assert driver.command(bytes(6), lun=300).code == POWER_ON
        assert driver.command(READ, into=512, lun=300).status == GOOD
        assert driver.command(bytes(6), target=1).status == GOOD
        assert driver.command(bytes(6)).code == LUNS_CHANGED
        host.plug(5, 0)
        assert driver.event() == (TRANSPORT_RESET, listed(5, 0), RESCAN)
        assert driver.command(bytes(6)).status == GOOD

    def test_report_luns_takes_the_news(self, host: Host) -> None:
        host.plug(0, 0)
        driver = host.start()
        driver.settle()
        host.plug(0, 1)
        assert len(driver.command(report_luns(), into=4096).data) == 24
        assert driver.command(bytes(6)).status == GOOD

    def test_unplug(self, host: Host) -> None:
        first = host.plug(0, 0)
        host.plug(0, 1)
        driver = host.start()
        driver.settle(lun=1)
        driver.offer_event_buffers()
        assert host.device.unplug(0, 0) is first
        assert driver.event() == (TRANSPORT_RESET, listed(0, 0), REMOVED)
        assert driver.command(READ, into=512).code == NOT_SUPPORTED
        assert driver.command(bytes(6), lun=1).code == LUNS_CHANGED
        host.device.unplug(0, 1)
        assert driver.command(READ, into=512, lun=1).response == BAD_TARGET
        assert host.device.units() == {}

    def test_unplug_ends_what_is_in_flight(self, host: Host) -> None:
        unit = host.plug(0, 0)
        driver = host.start()
        driver.settle()
        unit.holds = True
        driver.start((driver.header(MODE_SENSE, flat(0, 0)),), (108, 255))
        assert unit.entered.wait(10)
        gone = threading.Event()
        thread = threading.Thread(target=lambda: (host.device.unplug(0, 0), gone.set()))
        thread.start()
        assert not gone.wait(0.1)
        unit.release()
        assert gone.wait(10)
        thread.join()
        (data,) = driver.driver.replies(FIRST_REQUEST_QUEUE)
        assert driver.parse(data, len(data), 255).response == BAD_TARGET

    def test_a_function_that_waits_for_a_unit_that_goes(self, host: Host) -> None:
        """The reset that follows must not touch a unit that has been closed."""
        unit = host.plug(0, 0)
        host.plug(0, 1)
        driver = host.start()
        driver.settle()
        unit.holds = True
        driver.start((driver.header(MODE_SENSE, flat(0, 0)),), (108, 255))
        assert unit.entered.wait(10)
        request = struct.pack("<II8sQ", 0, UNIT_RESET, flat(0, 0), 0)
        driver.driver.request(CONTROL, (request,), (1,))
        thread = threading.Thread(target=host.device.unplug, args=(0, 0))
        thread.start()
        unit.release()
        thread.join()
        assert driver.driver.replies(CONTROL)[0] in (bytes((OK,)), bytes((INCORRECT_LUN,)))

    def test_places(self, host: Host) -> None:
        host.plug(0, 0)
        for target, lun in ((256, 0), (-1, 0), (0, 16384), (0, -1)):
            with pytest.raises(ValueError, match=f"there is no place {target}:{lun}"):
                host.plug(target, lun)
        with pytest.raises(ValueError, match="there is a logical unit at 0:0 already"):
            host.plug(0, 0)
        with pytest.raises(KeyError):
            host.device.unplug(0, 1)

    def test_events_without_a_buffer_are_missed(self, host: Host) -> None:
        driver = host.start()
        host.plug(0, 0)
        wait_until(lambda: host.device._events_missed)
        driver.offer_event_buffers(2)
        assert driver.event() == (MISSED, bytes(8), 0)  # no event, but some were missed
        host.plug(0, 1)
        assert driver.event() == (TRANSPORT_RESET, listed(0, 1), RESCAN)

    def test_a_buffer_that_is_too_small(self, host: Host) -> None:
        driver = host.start()
        driver.offer_event_buffers(1, size=15)
        assert driver.driver.replies(EVENTS) == [b""]
        host.plug(0, 0)
        wait_until(lambda: host.device._events_missed)

    def test_a_driver_that_knows_no_events(self, host: Host) -> None:
        driver = host.start(
            without=1 << uapi.VIRTIO_SCSI_F_HOTPLUG | 1 << uapi.VIRTIO_SCSI_F_CHANGE
        )
        driver.offer_event_buffers()
        host.plug(0, 0)
        host.device.change_capacity(0, 0, lambda: None)
        driver.settle()
        events = driver.driver.queues[EVENTS]
        assert events is not None
        assert events.collect() == []

    def test_a_change_of_capacity(self, host: Host) -> None:
        host.plug(2, 3)
        driver = host.start()
        driver.settle(2, 3)
        driver.offer_event_buffers()
        host.device.change_capacity(2, 3, lambda: None)
        assert driver.event() == (PARAM_CHANGE, listed(2, 3), 0x092A)
        assert driver.command(bytes(6), target=2, lun=3).code == (6, 0x2A, 0x09)

    def test_a_change_waits_for_what_is_in_flight(self, host: Host) -> None:
        unit = host.plug(0, 0)
        driver = host.start()
        driver.settle()
        unit.holds = True
        driver.start((driver.header(MODE_SENSE, flat(0, 0)),), (108, 255))
        assert unit.entered.wait(10)
        threading.Timer(0.2, unit.release).start()
        host.device.change_capacity(0, 0, lambda: check(unit.released.is_set()))
        (data,) = driver.driver.replies(FIRST_REQUEST_QUEUE)
        assert driver.parse(data, len(data), 255).status == GOOD
        assert driver.command(bytes(6)).code == (6, 0x2A, 9)
        with pytest.raises(AssertionError):
            host.device.change_capacity(0, 0, lambda: check(False))
        assert driver.command(bytes(6)).status == GOOD

    def test_while_no_driver_is_there(self, host: Host) -> None:
        host.plug(0, 0)
        host.device.unplug(0, 0)
        host.plug(0, 1)
        driver = host.start()
        assert driver.command(bytes(6), lun=1).code == POWER_ON
        driver.driver.reset()
        host.plug(0, 0)
        driver.driver.start()
        assert driver.command(bytes(6)).code == POWER_ON

    def test_while_others_are_busy(self, make_host: Callable[..., Host]) -> None:
        """Units come and go, and no command to another one fails."""
        host = make_host(queues=2)
        host.plug(0, 0)
        driver = host.start()
        driver.settle()
        stop = threading.Event()

        def churn() -> None:
            while not stop.is_set():
                host.plug(1, 7)
                host.device.unplug(1, 7)

        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for n in range(300):
                reply = driver.command(READ, into=512, queue=n % 2)
                assert (reply.response, reply.status) == (OK, GOOD)
                driver.command(READ, into=512, target=1, lun=7, queue=n % 2)
        finally:
            stop.set()
            thread.join()


class TestUnitAttentions:
    def test_they_wait_in_order_and_once_each(self, host: Host) -> None:
        unit = host.plug(0, 0)
        driver = host.start()
        for _ in range(3):
            lib.scsi_attention(unit.native, lib.SCSI_ATTENTION_CAPACITY_CHANGED)
        assert driver.command(b"\x12\0\0\0\x24\0", into=36).status == GOOD
        assert driver.command(report_luns(), into=4096).status == GOOD
        assert driver.command(READ, into=512).code == POWER_ON
        assert driver.command(READ, into=512).code == (6, 0x2A, 9)
        assert driver.command(READ, into=512).status == GOOD

    def test_there_is_an_end_to_them(self, host: Host) -> None:
        unit = host.plug(0, 0)
        driver = host.start()
        for n in range(20):
            lib.scsi_attention(unit.native, 6 << 16 | n << 8)
        seen = []
        while (code := driver.command(bytes(6)).code) != (0, 0, 0):
            seen.append(code)
        assert seen == [POWER_ON, *((6, n, 0) for n in range(6)), (6, 19, 0)]


def test_a_defect_in_python_fails_its_command_alone(
    host: Host, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.plug(0, 0)
    driver = host.start()
    driver.settle()

    def fail(*arguments: object, **named: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("pyvmm.backends.scsi.modes.mode_sense", fail)
    reply = driver.command(MODE_SENSE, into=255)
    assert (reply.status, reply.code) == (CHECK_CONDITION, (4, 0x44, 0))
    assert "ZeroDivisionError" in caplog.text
    assert driver.command(READ, into=512).status == GOOD
