"""virtio-scsi: the SCSI host device (virtio 1.2, section 5.6).

What is rare is here: the configuration space, the control and event queues, logical units that
come and go. Commands are served in C, each request queue by a thread that sits in
``virtio_scsi_queue_run``; what a logical unit is, ``_native/scsi.h`` tells.
"""

from __future__ import annotations

import os
import select
import struct
import threading
from collections import deque

from pyvmm._core import ffi, lib
from pyvmm.errors import UsageError
from pyvmm.virtio import _generated_uapi as uapi
from pyvmm.virtio.blk import choose_engine
from pyvmm.virtio.device import Activation, PythonDevice

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Protocol

    from pyvmm.virtio.queue import Chain, Virtqueue

    class LogicalUnit(Protocol):
        """What the device asks of a logical unit; `backends.scsi.disk.ScsiDisk` has it."""

        @property
        def native(self) -> Any: ...  # struct scsi_lun *


CONTROL, EVENTS, FIRST_REQUEST_QUEUE = range(3)  # 5.6.2
_SMALL_QUEUE = 64
MAX_TARGET: int = lib.VIRTIO_SCSI_MAX_TARGET
MAX_LUN: int = lib.VIRTIO_SCSI_MAX_LUN
MAX_QUEUES: int = lib.VIRTIO_SCSI_MAX_QUEUES
SECTOR = 512
MAX_SECTORS: int = lib.SCSI_DISK_MAX_TRANSFER // SECTOR
_HOTPLUG = 1 << uapi.VIRTIO_SCSI_F_HOTPLUG
_CHANGE = 1 << uapi.VIRTIO_SCSI_F_CHANGE
_EVENT = struct.Struct("<I8sI")  # struct virtio_scsi_event (5.6.6.3)
_RESCAN, _REMOVED = uapi.VIRTIO_SCSI_EVT_RESET_RESCAN, uapi.VIRTIO_SCSI_EVT_RESET_REMOVED
# Functions on the tasks of a logical unit: whether on one of them, and how they end by it.
_TASK_FUNCTIONS = {
    uapi.VIRTIO_SCSI_T_TMF_ABORT_TASK: (True, lib.SCSI_ABORTED),
    uapi.VIRTIO_SCSI_T_TMF_ABORT_TASK_SET: (False, lib.SCSI_ABORTED),
    uapi.VIRTIO_SCSI_T_TMF_CLEAR_TASK_SET: (False, lib.SCSI_ABORTED),
    uapi.VIRTIO_SCSI_T_TMF_QUERY_TASK: (True, lib.SCSI_DELIVERED),
    uapi.VIRTIO_SCSI_T_TMF_QUERY_TASK_SET: (False, lib.SCSI_DELIVERED),
}
_CAPACITY_CHANGED = 0x2A | 0x09 << 8  # ASC and ASCQ (5.6.6.3)


class VirtioScsi(PythonDevice):
    """A SCSI host with logical units at (target, LUN); `plug` and `unplug` work at any time.

    There are `queues` request queues of `queue_size` descriptors, each with a thread of its own.
    `engine_remark` is empty, or what the user should be told about how requests are executed.
    """

    device_id = uapi.VIRTIO_ID_SCSI

    def __init__(self, *, queues: int = 1, queue_size: int = 256) -> None:
        super().__init__()
        if not 1 <= queues <= MAX_QUEUES:
            raise UsageError(f"{queues} request queues for a SCSI host: give 1 to {MAX_QUEUES}")
        self.engine, self.engine_remark = choose_engine(in_memory=False)
        self.queue_sizes = (_SMALL_QUEUE, _SMALL_QUEUE, *(queue_size,) * queues)
        self.features = _HOTPLUG | _CHANGE
        self._config = uapi.virtio_scsi_config(
            num_queues=queues,
            seg_max=queue_size - 2,  # a header and a response come with the data
            max_sectors=MAX_SECTORS,
            cmd_per_lun=queue_size,
            event_info_size=_EVENT.size,
            max_target=MAX_TARGET,
            max_lun=MAX_LUN,
        )
        self._default_sizes()
        self._lock = threading.Lock()  # for what follows; the device's threads never take it
        self._units_lock = threading.Lock()  # a unit in the next is not closed while it is held
        self._units: dict[tuple[int, int], LogicalUnit] = {}
        self._map = _native_map({})
        self._natives: list[Any] = []
        self._threads: list[threading.Thread] = []
        self._features = 0  # negotiated, 0 while the device is not active
        self._inbox: deque[tuple[int, tuple[int, int], int]] = deque()
        self._inbox_fd = self._done_fd = -1
        # The device's thread alone:
        self._functions: list[tuple[Any, Callable[[Any], None]]] = []
        self._event_chains: deque[Chain] = deque()
        self._events_missed = False

    # Configuration (5.6.4)

    def read_config(self) -> bytes:
        """``struct virtio_scsi_config``."""
        return bytes(self._config)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver chooses `sense_size` and `cdb_size`; all else is read-only.

        A size that no command has is not taken over, which the driver sees when it reads it.
        """
        wanted = uapi.virtio_scsi_config.from_buffer_copy(
            bytes(self._config)[:offset] + data + bytes(self._config)[offset + len(data) :]
        )
        if wanted.sense_size <= lib.SCSI_SENSE_MAX:
            self._config.sense_size = wanted.sense_size
        if 1 <= wanted.cdb_size <= lib.SCSI_CDB_MAX:
            self._config.cdb_size = wanted.cdb_size

    def _default_sizes(self) -> None:
        self._config.sense_size = uapi.VIRTIO_SCSI_SENSE_DEFAULT_SIZE
        self._config.cdb_size = uapi.VIRTIO_SCSI_CDB_DEFAULT_SIZE

    def limit_transfers(self, size: int) -> None:
        """Commands to all logical units will move at most `size` bytes, as one of them has no way
        of telling that it cannot do more. Before the driver starts."""
        self._config.max_sectors = min(self._config.max_sectors, size // SECTOR)

    # Logical units

    def plug(self, target: int, lun: int, unit: LogicalUnit) -> None:
        """Adds a logical unit. ValueError when the place is taken or does not exist."""
        if not (0 <= target <= MAX_TARGET and 0 <= lun <= MAX_LUN):
            raise ValueError(f"there is no place {target}:{lun}")
        with self._lock:
            if (target, lun) in self._units:
                raise ValueError(f"there is a logical unit at {target}:{lun} already")
            lib.scsi_lun_reset(unit.native, lib.SCSI_ATTENTION_POWER_ON)
            self._change_units({**self._units, (target, lun): unit}, target, ffi.NULL)
            self._tell(_HOTPLUG, uapi.VIRTIO_SCSI_T_TRANSPORT_RESET, (target, lun), _RESCAN)

    def unplug(self, target: int, lun: int) -> LogicalUnit:
        """Takes a logical unit away; on return no command uses it. KeyError when there is none."""
        with self._lock:
            units = dict(self._units)
            unit = units.pop((target, lun))
            self._change_units(units, target, unit.native)
            self._tell(_HOTPLUG, uapi.VIRTIO_SCSI_T_TRANSPORT_RESET, (target, lun), _REMOVED)
            return unit

    def change_capacity(self, target: int, lun: int, change: Callable[[], None]) -> None:
        """Calls ``change()`` while no command is in flight, then tells the driver (5.6.6.3), also
        by a unit attention condition. What `change` raises goes on, and nobody is told."""
        with self._lock:
            unit = self._units[target, lun]
            self._stop(cancel=False)
            try:
                change()
            finally:
                self._start()
            lib.scsi_attention(unit.native, lib.SCSI_ATTENTION_CAPACITY_CHANGED)
            place = (target, lun)
            self._tell(_CHANGE, uapi.VIRTIO_SCSI_T_PARAM_CHANGE, place, _CAPACITY_CHANGED)

    def limits_changed(self) -> None:
        """The limits of an image have changed: who waits looks at them again."""
        with self._lock:
            for native in self._natives:
                lib.virtio_scsi_queue_wake(native)

    def units(self) -> dict[tuple[int, int], LogicalUnit]:
        """The logical units by their places."""
        with self._lock:
            return dict(self._units)

    def _change_units(
        self, units: dict[tuple[int, int], LogicalUnit], target: int, removed: Any
    ) -> None:
        """Has all queues use another map, and returns when none has a command for `removed`."""
        for place, unit in units.items():
            if place[0] == target and self._units.get(place) is unit:
                lib.scsi_attention(unit.native, lib.SCSI_ATTENTION_LUNS_CHANGED)
        new_map = _native_map(units)
        done_fd = os.eventfd(0, os.EFD_CLOEXEC)
        try:
            function = ffi.new(
                "struct virtio_scsi_function *",
                {
                    "map": new_map[0],
                    "lun": removed,
                    "target": -1,
                    "end": lib.SCSI_BAD_TARGET,
                    "done_fd": done_fd,
                },
            )
            lib.virtio_scsi_post(function, self._natives, len(self._natives))
            os.eventfd_read(done_fd)
        finally:
            os.close(done_fd)
        with self._units_lock:
            self._units, self._map = units, new_map

    # Life cycle

    def activate(self, activation: Activation) -> None:
        """Creates the queues and starts their threads. OSError when one cannot be created."""
        with self._lock:
            for unit in self._units.values():
                lib.scsi_lun_reset(unit.native, lib.SCSI_ATTENTION_POWER_ON)
            self._inbox.clear()
            self._inbox_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._done_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._features = activation.features
            sizes = ffi.new(
                "struct virtio_scsi_sizes *", (self._config.sense_size, self._config.cdb_size)
            )
            for queue in activation.queues[FIRST_REQUEST_QUEUE:]:
                if queue is None:
                    continue
                native = lib.virtio_scsi_queue_create(
                    self._map[0],
                    sizes,
                    lib.BLK_ENGINE_IO_URING if self.engine == "io_uring" else lib.BLK_ENGINE_SYNC,
                    activation.memory,
                    queue.config,
                    queue.kick,
                    activation.irq,
                )
                if native == ffi.NULL:
                    raise OSError(ffi.errno, os.strerror(ffi.errno))
                self._natives.append(native)
            self._start()
            super().activate(
                Activation(
                    activation.memory,
                    activation.features,
                    activation.queues[:FIRST_REQUEST_QUEUE],
                    activation.irq,
                )
            )

    def deactivate(self) -> None:
        """Ends what is in flight, stops the threads and frees the queues."""
        with self._lock:
            self._stop(cancel=True)
            super().deactivate()
            for native in self._natives:
                lib.virtio_scsi_queue_destroy(native)
            for fd in (self._inbox_fd, self._done_fd):
                if fd >= 0:
                    os.close(fd)
            self._inbox_fd = self._done_fd = -1
            self._natives = []
            self._features = 0
        self._default_sizes()

    @property
    def counters(self) -> dict[str, int]:
        """Since activation, all request queues: see ``struct virtio_scsi_counters``."""
        totals = dict.fromkeys(("requests", "failed", "interrupts", "malformed"), 0)
        with self._lock:
            for native in self._natives:
                counters = lib.virtio_scsi_queue_counters(native)
                for name in totals:
                    totals[name] += getattr(counters, name)
        return totals

    def _start(self) -> None:
        for index, native in enumerate(self._natives):
            thread = threading.Thread(
                target=self._serve_requests, args=(native,), name=f"scsi{index}", daemon=True
            )
            thread.start()
            self._threads.append(thread)

    def _stop(self, *, cancel: bool) -> None:
        for native in self._natives:
            lib.virtio_scsi_queue_stop(native, cancel)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _serve_requests(self, native: Any) -> None:
        result = lib.virtio_scsi_queue_run(native)
        if result == lib.VIRTIO_SCSI_STOPPED:
            return
        if result < 0:
            import logging

            message = "virtio-scsi stopped: %s"
            logging.getLogger("pyvmm.virtio").error(message, os.strerror(-result))
        self.needs_reset()

    def started(self) -> None:
        self.watch(self._inbox_fd, select.EPOLLIN, self._send_events)
        self.watch(self._done_fd, select.EPOLLIN, self._finish_functions)

    def stopped(self) -> None:
        self._functions.clear()
        self._event_chains.clear()
        self._events_missed = False

    def handle(self, queue: Virtqueue, chain: Chain) -> None:
        if queue.index == EVENTS:
            self._take_event_buffer(chain)
            return
        kind = chain.read(4)
        if kind == struct.pack("<I", uapi.VIRTIO_SCSI_T_TMF):
            self._manage_task(chain)
        elif kind in (
            struct.pack("<I", uapi.VIRTIO_SCSI_T_AN_QUERY),
            struct.pack("<I", uapi.VIRTIO_SCSI_T_AN_SUBSCRIBE),
        ):
            self._answer_notification_request(chain)
        else:
            chain.complete(0)

    # Task management functions (5.6.6.2, SAM-5 7)

    def _manage_task(self, chain: Chain) -> None:
        request = chain.read(20)
        if len(request) < 20 or chain.writable_bytes < 1:
            chain.complete(0)
            return
        subtype, address, tag = struct.unpack("<I8sQ", request)
        found, place = self._find(address)
        if found == lib.VIRTIO_SCSI_NO_TARGET:
            _reply(chain, uapi.VIRTIO_SCSI_S_BAD_TARGET)
        elif subtype == uapi.VIRTIO_SCSI_T_TMF_I_T_NEXUS_RESET:
            self._reset(chain, {"target": place[0]}, place[:1], lib.SCSI_ATTENTION_NEXUS_LOSS)
        elif found != lib.VIRTIO_SCSI_UNIT or (unit := self._units.get(place)) is None:
            _reply(chain, uapi.VIRTIO_SCSI_S_INCORRECT_LUN)
        elif subtype == uapi.VIRTIO_SCSI_T_TMF_LOGICAL_UNIT_RESET:
            self._reset(chain, {"lun": unit.native}, place, lib.SCSI_ATTENTION_DEVICE_RESET)
        elif subtype in _TASK_FUNCTIONS:
            one, end = _TASK_FUNCTIONS[subtype]
            what = {"lun": unit.native, "one": one, "tag": tag, "end": end}
            self._post(what, lambda function: _reply_task(chain, function))
        else:  # CLEAR ACA among them: NACA is not supported
            _reply(chain, uapi.VIRTIO_SCSI_S_FUNCTION_REJECTED)

    def _find(self, address: bytes) -> tuple[int, tuple[int, int]]:
        """What an address of the driver stands for (``enum virtio_scsi_place``), and the place."""
        current = self._map  # kept alive meanwhile
        found = lib.virtio_scsi_find(current[0], address)
        return found.place, (found.address >> 16, found.address & 0xFFFF)

    def _reset(
        self, chain: Chain, what: dict[str, Any], where: tuple[int, ...], attention: int
    ) -> None:
        """Ends all commands that `what` says, then resets the logical units at `where`."""

        def reset(function: Any) -> None:
            with self._units_lock:
                for place, unit in self._units.items():
                    if place[: len(where)] == where:
                        lib.scsi_lun_reset(unit.native, attention)
            _reply(chain, uapi.VIRTIO_SCSI_S_OK)

        self._post({**what, "end": lib.SCSI_RESET}, reset)

    def _post(self, what: dict[str, Any], done: Callable[[Any], None]) -> None:
        """Has the queues do something; ``done(function)`` follows on the device's thread."""
        target = {"target": -1, "done_fd": self._done_fd}
        function = ffi.new("struct virtio_scsi_function *", {**target, **what})
        self._functions.append((function, done))
        lib.virtio_scsi_post(function, self._natives, len(self._natives))

    def _finish_functions(self) -> None:
        os.eventfd_read(self._done_fd)
        functions, self._functions = self._functions, []
        finished: list[tuple[Any, Callable[[Any], None]]] = []
        for each in functions:  # one look at each: it may end at any moment
            (self._functions if each[0].pending else finished).append(each)
        for function, done in finished:
            done(function)

    # Asynchronous notifications (5.6.6.2): no logical unit has any

    def _answer_notification_request(self, chain: Chain) -> None:
        request = chain.read(12)
        if len(request) < 12 or chain.writable_bytes < 5:
            chain.complete(0)
            return
        found, _ = self._find(request[:8])
        response = uapi.VIRTIO_SCSI_S_OK
        if found == lib.VIRTIO_SCSI_NO_TARGET:
            response = uapi.VIRTIO_SCSI_S_BAD_TARGET
        elif found == lib.VIRTIO_SCSI_NO_UNIT:
            response = uapi.VIRTIO_SCSI_S_INCORRECT_LUN
        chain.write(struct.pack("<IB", 0, response))
        chain.complete()

    # Events (5.6.6.3)

    def _tell(self, feature: int, event: int, place: tuple[int, int], reason: int) -> None:
        """Sends an event to a driver that knows of such. With the lock held."""
        if self._features & feature:
            self._inbox.append((event, place, reason))
            os.eventfd_write(self._inbox_fd, 1)

    def _send_events(self) -> None:
        os.eventfd_read(self._inbox_fd)
        queue = self.queues[EVENTS]
        if queue is not None:
            self._serve(queue)  # there may be buffers that we were notified of at the same time
        while self._inbox:
            event, (target, lun), reason = self._inbox.popleft()
            if not self._event_chains:
                self._events_missed = True
                continue
            # In the form of REPORT LUNS: Linux takes both for one number.
            number = lun if lun < 256 else 0x4000 | lun
            self._send(event, struct.pack(">BBHxxxx", 1, target, number), reason)

    def _send(self, event: int, address: bytes, reason: int) -> None:
        if self._events_missed:
            event |= uapi.VIRTIO_SCSI_T_EVENTS_MISSED
            self._events_missed = False
        chain = self._event_chains.popleft()
        chain.write(_EVENT.pack(event, address, reason))
        chain.complete()

    def _take_event_buffer(self, chain: Chain) -> None:
        if chain.writable_bytes < _EVENT.size:
            chain.complete(0)
            return
        self._event_chains.append(chain)
        if self._events_missed:
            self._send(uapi.VIRTIO_SCSI_T_NO_EVENT, bytes(8), 0)


def _reply(chain: Chain, response: int) -> None:
    chain.write(bytes((response,)))
    chain.complete()


def _reply_task(chain: Chain, function: Any) -> None:
    """To a function that ended tasks, or asked whether there are such."""
    found = not function.end and function.matched
    _reply(chain, uapi.VIRTIO_SCSI_S_FUNCTION_SUCCEEDED if found else uapi.VIRTIO_SCSI_S_OK)


def _native_map(units: dict[tuple[int, int], LogicalUnit]) -> tuple[Any, Any]:
    """A ``struct virtio_scsi_map *``, and what keeps its contents alive."""
    entries = [
        {"address": target << 16 | lun, "lun": unit.native}
        for (target, lun), unit in sorted(units.items(), key=lambda item: item[0])
    ]
    array = ffi.new("struct virtio_scsi_unit[]", entries)
    return ffi.new("struct virtio_scsi_map *", {"count": len(entries), "units": array}), array
