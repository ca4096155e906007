"""A virtual machine from start to end: its devices, its boots, and how it came to its end."""

from __future__ import annotations

import errno
import os
import select
import threading
import time
from collections import deque
from contextlib import ExitStack

from pyvmm._core import ffi, lib
from pyvmm.errors import ExitStatus, GuestPanic, GuestTimeout, UsageError
from pyvmm.machine.events import Listeners
from pyvmm.platform.rtc import Rtc

TYPE_CHECKING = False  # importing typing takes milliseconds
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Self

    from pyvmm.backends.chardev import Chardev
    from pyvmm.backends.disk import Image
    from pyvmm.backends.peer import PortStream
    from pyvmm.backends.scsi.cdrom import ScsiCdrom
    from pyvmm.config import BalloonConfig, ChardevConfig, DiskConfig, ScsiConfig, VmConfig
    from pyvmm.control.server import QmpServer
    from pyvmm.errors import GuestCrash, PyvmmError
    from pyvmm.kvm.handles import Kvm
    from pyvmm.machine.balloon import Balloon
    from pyvmm.machine.board import Asleep, Board
    from pyvmm.machine.chassis import ChassisBuilder
    from pyvmm.machine.events import Listener
    from pyvmm.machine.ports import PortState, SerialPorts
    from pyvmm.machine.scsi import PluggedDisk, ScsiController
    from pyvmm.schema import Kind
    from pyvmm.virtio.blk import VirtioBlk
    from pyvmm.virtio.device import VirtioDevice
    from pyvmm.virtio.net import VirtioNet

# After the first words of a panic, the time that the kernel gets to print the rest of it.
PANIC_GRACE = 1.0
PANIC = "Kernel panic - not syncing"
REPORT_LINES = 20
RTC_PATIENCE = 60e3  # ms
PANIC_CONTEXT = 8


class Outcome:
    """How a virtual machine ended.

    `status` is the exit status of the contract in ``errors.py``; `error` is None after a power-off
    or a stop that was asked for. `reason` is QMP's word for what led to it (its ShutdownCause).
    """

    __slots__ = ("error", "reason", "status")

    def __init__(
        self, status: int, error: BaseException | None = None, reason: str = "host-error"
    ) -> None:
        self.status = status
        self.error = error
        self.reason = reason

    def __repr__(self) -> str:
        return f"Outcome(status={self.status}, error={self.error!r})"

    def check(self) -> None:
        """Raises `error`, if there is one."""
        if self.error is not None:
            raise self.error


class VM:
    """One virtual machine, of a VmConfig or of settings that are named as its fields.

    >>> with VM(kernel="host", memory="1G", disks=["disk.img"]) as vm:
    ...     vm.start()
    ...     vm.wait(timeout=60).check()
    """

    def __init__(self, config: VmConfig | None = None, /, **settings: Any) -> None:
        if config is None:
            from pyvmm.config import VmConfig
            from pyvmm.schema import Source

            config = VmConfig.from_table(settings, Source())
        elif settings:
            raise TypeError("VM takes a VmConfig or settings, not both")
        self.config = config
        self.outcome: Outcome | None = None
        self.remarks: list[str] = []  # what the user should know once it is started
        self.stopped_by: str | None = None  # the error of a disk that keeps the guest paused
        self._resources = ExitStack()
        self._devices: list[VirtioDevice] = []
        self._scsi: ScsiController | None = None
        self._serial_ports: SerialPorts | None = None
        self._disks: dict[str, VirtioBlk] = {}
        self._images: dict[str, tuple[DiskConfig, Image]] = {}  # of those
        self.balloon: Balloon | None = None  # there while the machine is started, if it has one
        self.nets: list[VirtioNet] = []  # as configured; what one is connected to is its `port`
        self._chardevs: list[Chardev] = []
        self._board: Board | None = None
        self._asleep: Asleep | None = None  # in place of the board, in S3
        self._boot = 0  # how often the machine was powered on
        self._paused = False
        self._lock = threading.RLock()  # guards _board, _asleep and _paused
        self._supervisor: threading.Thread | None = None
        self._ended = threading.Event()
        self._panic_deadline: float | None = None  # of the supervisor alone
        self._inbox: deque[_Message] = deque()
        self._listeners = Listeners()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def start(self) -> None:
        """Powers the machine on; the guest runs when this returns.

        Raises UsageError, NoKvmError, KvmError.
        """
        if self._supervisor is not None:
            raise RuntimeError("a VM can be started once")
        from pyvmm.kvm.handles import Kvm
        from pyvmm.machine.chassis import ChassisBuilder

        with ExitStack() as stack:
            self._kvm: Kvm = stack.enter_context(Kvm())
            lib.vcpu_setup_signal()
            self._wake = _eventfd(stack)
            self._panic_fd = _eventfd(stack)
            # One for each console: what they print is mixed in time, not in words.
            self._serial_watch, self._console_watch = (self._create_watch(stack) for _ in range(2))
            chassis = ChassisBuilder(self._kvm, self.config)
            stack.callback(chassis.discard)
            self._rtc = Rtc(self._wake_supervisor)
            self._open_devices(stack)
            control = self._open_control(self.config.qmp, stack) if self.config.qmp else None
            self._power_on(chassis)
            stack.callback(self._power_off)
            self._resources = stack.pop_all()
        self._supervisor = threading.Thread(target=self._supervise, name="supervisor", daemon=True)
        self._supervisor.start()
        if control is not None:
            control.start()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Waits for the end of the guest; after `timeout` seconds it is ended."""
        if not self._ended.wait(timeout):
            self._end(self._failure(GuestTimeout(f"the guest did not end within {timeout:g} s")))
            self._ended.wait()
        assert self.outcome is not None
        return self.outcome

    def stop(self, status: int = ExitStatus.OK, reason: str = "host-signal") -> None:
        """Ends the guest at once, as pulling the plug would; idempotent."""
        if self._supervisor is not None and not self._ended.is_set():
            self.request_stop(status, reason)
            self._ended.wait()

    def request_stop(self, status: int = ExitStatus.OK, reason: str = "host-signal") -> None:
        """As `stop`, but without waiting for the end; `wait` does that."""
        if self._supervisor is not None and not self._ended.is_set():
            self._end(Outcome(status, reason=reason))

    def reset(self) -> None:
        """Starts the guest anew, as a reset button would, or ends it with reboot=False."""
        if self._supervisor is not None and not self._ended.is_set():
            self._tell(lambda: self._reset("host-qmp-system-reset"), None)

    def on_event(self, listener: Listener) -> None:
        """Has `listener` called with each `Event` from now on: SHUTDOWN, RESET, STOP, RESUME,
        POWERDOWN, SUSPEND, WAKEUP, GUEST_PANICKED, BLOCK_IO_ERROR, DEVICE_DELETED,
        VSERPORT_CHANGE, BALLOON_CHANGE; and, which QMP has not, BALLOON_STALLED (a guest that gives
        no more memory, with `actual` and `target`).

        It is called on the thread on which that happens and should return soon; it may call
        methods of this VM but those that wait for its end (`stop`, `wait`, `close`).
        """
        self._listeners.add(listener)

    @property
    def state(self) -> str:
        """QMP's word for what it does (its RunState): prelaunch, running, paused, io-error,
        suspended, guest-panicked or shutdown."""
        if self._supervisor is None:
            return "prelaunch"
        if self.outcome is not None:
            return "shutdown"
        if self._panic_deadline is not None:
            return "guest-panicked"
        if self._asleep is not None:
            return "suspended"
        if self._paused:
            return "paused" if self.stopped_by is None else "io-error"
        return "running"

    @property
    def cpu_threads(self) -> list[int]:
        """The number that each CPU's thread has on the host (its TID)."""
        with self._lock:
            vcpus = [] if self._board is None else self._board.vcpus
            return [vcpu.thread_id for vcpu in vcpus]

    def pause(self) -> None:
        """Returns when the guest executes no more code; idempotent."""
        with self._lock:
            was_paused, self._paused = self._paused, True
            if self._board is not None:
                self._board.pause()
            if not was_paused:
                self._listeners.tell("STOP")

    def resume(self) -> None:
        """Lets a paused guest go on, and tries again what failed on a disk; idempotent.

        Its clocks go on from where they stood, or jump ahead with the setting `catch_up`.
        """
        with self._lock:
            was_paused, self._paused = self._paused, False
            self.stopped_by = None
            if was_paused:  # before what the guest does now
                self._listeners.tell("RESUME")
            for blk in self._disks.values():
                blk.resume()
            if self._board is not None:
                self._board.resume(catch_up=self.config.catch_up)

    def resize_disk(self, name: str, size: int | str | None = None) -> None:
        """Makes a disk larger and tells the guest; `name` is that in a Linux guest, such as vda,
        or TARGET:LUN of a SCSI disk.

        `size` is in bytes or text such as "20G"; None takes over what the image or block device
        has become on the host. Raises UsageError.
        """
        from pyvmm.schema import TIB, Size

        if size is not None:
            size = _number(Size(least=512, most=64 * TIB, multiple=512), "size", size)
        self._disk(name).resize(size)

    def limit_disk(self, name: str, *, iops: int = 0, bps: int | str = 0) -> None:
        """Sets a disk's most requests and bytes (also as text such as "10M") a second; 0: any
        number. What waits already goes by the new limits. Raises UsageError.
        """
        from pyvmm.config import DiskConfig

        settings = DiskConfig.settings
        self._disk(name).limit(
            iops=_number(settings["iops"].kind, "iops", iops),
            bps=_number(settings["bps"].kind, "bps", bps),
        )

    @property
    def disks(self) -> dict[str, tuple[DiskConfig, Image]]:
        """What each disk was asked to be and what it is on, by its name."""
        plugged = dict(self._scsi.disks) if self._scsi is not None else {}
        return self._images | {name: (disk.config, disk.image) for name, disk in plugged.items()}

    @property
    def cdroms(self) -> dict[str, ScsiCdrom]:
        """The CD drives by their names."""
        return dict(self._scsi.cdroms) if self._scsi is not None else {}

    def _disk(self, name: str) -> VirtioBlk | PluggedDisk:
        disks: dict[str, VirtioBlk | PluggedDisk] = {**self._disks}
        if self._scsi is not None:
            disks.update(self._scsi.disks)
        if name not in disks:
            raise UsageError(f"there is no disk {name} (there: {', '.join(disks) or 'none'})")
        return disks[name]

    def press_power_button(self) -> None:
        """Asks the guest to shut down, as the ACPI power button does; wakes one that sleeps."""
        with self._lock:
            if self._board is not None:
                self._board.press_power_button()
                self._listeners.tell("POWERDOWN")
            else:
                self.wake()

    def wake(self) -> None:
        """Wakes a guest that sleeps (S3); has no effect on others."""
        with self._lock:
            if self._asleep is not None:
                self._asleep.pm1_events.press_power_button()

    def add_scsi_disk(self, **settings: Any) -> tuple[int, int]:
        """Plugs a disk into the SCSI controller; returns its target and LUN.

        The settings are the keys of ``--disk`` but `bus`. Raises UsageError, also for a machine
        that has no SCSI controller or is not started.
        """
        from pyvmm.config import DiskConfig

        return self._scsi_controller().add(DiskConfig(**settings, bus="scsi"))

    def remove_scsi_disk(self, target: int, lun: int) -> None:
        """Takes a disk away from the guest; its image is free when this returns.

        The guest should not use it any more: what it has not written is lost. UsageError when
        there is no such disk.
        """
        self._scsi_controller().remove(target, lun)
        self._listeners.tell("DEVICE_DELETED", device=f"{target}:{lun}")

    def change_medium(self, name: str, path: str | None, *, force: bool = False) -> None:
        """Puts an ISO image into the CD drive `name` (``cd0`` is the first one) in place of what is
        there, and closes its tray; None only takes out what is there.

        UsageError when there is no such drive, when `path` is no image, and when the guest has
        locked the tray, as it does while the medium is mounted: it is then asked to unmount it.
        `force` takes it away all the same.
        """
        self._cdrom(name).insert(path, force=force)

    def medium(self, name: str) -> str | None:
        """The image in the CD drive `name`; None when there is none, or the guest ejected it.

        UsageError when there is no such drive.
        """
        drive = self._cdrom(name)
        return None if drive.tray_open else drive.path

    def _cdrom(self, name: str) -> ScsiCdrom:
        drives = self.cdroms
        if name not in drives:
            known = f"there are {', '.join(drives)}" if drives else "it has none"
            raise UsageError(f"this machine has no CD drive {name}: {known}")
        return drives[name]

    def _scsi_controller(self) -> ScsiController:
        if self._scsi is None:
            raise UsageError(
                "this machine has no SCSI controller: start it with scsi='queues=1' or a SCSI disk"
            )
        return self._scsi

    def port(self, name: str) -> PortStream:
        """This program's end of a port that is connected to nothing else, for as long as that is
        open; one at a time.

        UsageError when there is no such port, or it is open already.
        """
        return self._ports().open(name)

    def add_port(self, name: str, **settings: Any) -> None:
        """Adds a port, which the guest sees at once; the settings are the keys of ``--port``.

        Raises UsageError, also for a machine that has no virtio-serial or is not started.
        """
        from pyvmm.config import PortConfig

        self._remark(self._ports().add(PortConfig(name=name, **settings)))

    def remove_port(self, name: str) -> None:
        """Takes a port away from the guest and ends its connection. UsageError when there is no
        such port."""
        self._ports().remove(name)
        self._listeners.tell("DEVICE_DELETED", device=name)

    @property
    def ports(self) -> dict[str, PortState]:
        """The named ports that there are now."""
        return {} if self._serial_ports is None else self._serial_ports.states()

    def _ports(self) -> SerialPorts:
        if self._serial_ports is None:
            raise UsageError(
                "this machine has no virtio-serial: start it with a port or with max_ports=30"
            )
        return self._serial_ports

    def set_link(self, index: int, up: bool) -> None:
        """Plugs the cable of that one of `nets` in, or pulls it out."""
        self.nets[index].set_link(up)

    def console_tail(self) -> str:
        """The last output on ttyS0, or on hvc0 if there is none: at most 16 KiB."""
        buffer = ffi.new("uint8_t[]", lib.CONSOLE_TAIL_SIZE)
        size = lib.console_watch_tail(self._serial_watch, buffer)
        if size == 0:
            size = lib.console_watch_tail(self._console_watch, buffer)
        return bytes(ffi.buffer(buffer, size)).decode(errors="replace")

    def close(self) -> None:
        """Ends the guest if it still runs, and gives all resources back; idempotent."""
        self.stop()
        self._resources.close()

    # What the machine is made of

    def _open_devices(self, stack: ExitStack) -> None:
        config = self.config
        self.serial = self._open_chardev(config.serial, "serial port ttyS0", stack)
        for disk in config.disks:
            if disk.bus == "virtio":
                blk = self._open_disk(disk, _disk_name(len(self._disks)), stack)
                self._devices.append(blk)
                self._remark(blk.engine_remark)
        if config.scsi is not None:
            self._open_scsi(config.scsi, stack)
        if config.nets:
            from pyvmm.machine.nic import open_nics

            self.nets += open_nics(config, stack)
            self._devices += self.nets
            for nic in self.nets:
                self.remarks += nic.port.remarks
        if config.console.kind != "none":
            from pyvmm.virtio.console import Port, VirtioConsole

            self.console = self._open_chardev(config.console, "console hvc0", stack, direct=True)
            console = VirtioConsole()
            console.add_port(Port(self.console, terminal=True, watch=self._console_watch))
            self._devices.append(console)
        if config.ports or config.max_ports is not None:
            self._open_ports(stack)
        if config.balloon is not None:
            self._open_balloon(config.balloon, stack)
        if config.rng:
            from pyvmm.virtio.rng import VirtioRng

            self._devices.append(VirtioRng())

    def _open_control(self, address: str, stack: ExitStack) -> QmpServer:
        from pyvmm.control.server import QmpServer

        server = QmpServer(address.removeprefix("unix:"), self)
        stack.callback(server.close)
        return server

    def _open_scsi(self, config: ScsiConfig, stack: ExitStack) -> None:
        from pyvmm.machine.scsi import ScsiController

        self._scsi = stack.enter_context(ScsiController(config))
        stack.callback(setattr, self, "_scsi", None)
        names = iter(self.config.cdrom_names())
        for unit, place in zip(self.config.scsi_units, self.config.scsi_places(), strict=True):
            self._scsi.add(unit, place, next(names) if unit in self.config.cdroms else "")
        for remark in self._scsi.remarks:
            self._remark(remark)
        self._devices.append(self._scsi.device)
        self._remark(self._scsi.device.engine_remark)

    def _open_ports(self, stack: ExitStack) -> None:
        from pyvmm.machine.ports import SerialPorts

        self._serial_ports = stack.enter_context(
            SerialPorts(
                self.config.most_ports,
                on_change=lambda name, open: self._listeners.tell(
                    "VSERPORT_CHANGE", id=name, open=open
                ),
                on_quit=self._on_quit,
            )
        )
        stack.callback(setattr, self, "_serial_ports", None)
        for port in self.config.ports:
            self._remark(self._serial_ports.add(port))
        self._devices.append(self._serial_ports.device)

    def _open_balloon(self, config: BalloonConfig, stack: ExitStack) -> None:
        from pyvmm.machine.balloon import Balloon

        balloon = Balloon(
            config, self.config.memory, self._listeners.tell, lambda: self.state != "running"
        )
        stack.callback(balloon.close)
        balloon.start()
        self.balloon = balloon
        self._devices.append(balloon.device)
        self.remarks += balloon.remarks

    def _remark(self, remark: str) -> None:
        if remark and remark not in self.remarks:
            self.remarks.append(remark)

    def _open_disk(self, config: DiskConfig, name: str, stack: ExitStack) -> VirtioBlk:
        from pyvmm.backends.storage import open_disk
        from pyvmm.virtio.blk import VirtioBlk

        image = stack.enter_context(open_disk(**config.backend()))

        def on_error(error: int) -> None:
            what = f"disk {name} ({config.location}): {os.strerror(error)}"
            self._tell(lambda: self._stop_on_error(name, error, what), self._boot)

        blk = VirtioBlk(
            image,
            serial=config.serial,
            queues=config.queues,
            queue_size=config.queue_size,
            writethrough=config.cache == "writethrough",
            on_error=on_error if config.on_error == "stop" else None,
        )
        blk.limit(iops=config.iops, bps=config.bps)
        self._disks[name] = blk
        self._images[name] = config, image
        return blk

    def _open_chardev(
        self, config: ChardevConfig, name: str, stack: ExitStack, *, direct: bool = False
    ) -> Chardev:
        from pyvmm.backends.chardev import open_chardev

        chardev = open_chardev(config.kind, config.path, on_quit=self._on_quit, direct=direct)
        stack.callback(chardev.close)
        self._chardevs.append(chardev)
        if chardev.description:
            self.remarks.append(f"{name} is {chardev.description}")
        return chardev

    def _create_watch(self, stack: ExitStack) -> Any:
        watch = lib.console_watch_create(self._panic_fd)
        if watch == ffi.NULL:
            raise MemoryError("no memory for the tail of a console")
        stack.callback(lib.console_watch_destroy, watch)
        return watch

    def _power_on(self, chassis: ChassisBuilder, asleep: Asleep | None = None) -> None:
        from pyvmm.machine.board import Board  # while the kernel works on the chassis

        self._boot += 1
        board = Board(
            self._kvm,
            chassis.take(),
            self.config,
            self._devices,
            self.serial,
            self._serial_watch,
            self._rtc,
            _Listener(self, self._boot),
            asleep,
        )
        with self._lock:
            self._board = board
            if self._paused:
                board.pause()
            board.start()

    def _power_off(self) -> None:
        with self._lock:
            board, self._board = self._board, None
            asleep, self._asleep = self._asleep, None
        if board is not None:
            board.close()
        if asleep is not None:
            asleep.memory.close()

    def _reboot(self) -> None:
        from pyvmm.machine.chassis import ChassisBuilder

        self._power_off()
        self._power_on(ChassisBuilder(self._kvm, self.config))

    # The supervisor: one thread that decides what follows from what happened

    def _supervise(self) -> None:
        try:
            outcome = self._follow_events()
        except BaseException as error:  # a failed reboot, or a defect
            outcome = Outcome(getattr(error, "exit_status", ExitStatus.INTERNAL), error)
        try:
            self._power_off()
        except BaseException as error:  # a defect; who waits for the end must hear of it
            outcome = Outcome(ExitStatus.INTERNAL, error)
        self.outcome = outcome
        guest = outcome.reason.startswith("guest-")
        self._listeners.tell("SHUTDOWN", guest=guest, reason=outcome.reason)
        for chardev in self._chardevs:
            chardev.hang_up()
        if self._serial_ports is not None:
            self._serial_ports.hang_up()
        self._ended.set()

    def _follow_events(self) -> Outcome:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._panic_fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll(self._patience())}
            self._rtc.tick()
            if self._panic_fd in ready:
                os.eventfd_read(self._panic_fd)
                self._panic()
            if self._wake in ready:
                os.eventfd_read(self._wake)
            while self._inbox:
                message = self._inbox.popleft()
                if message.boot not in (None, self._boot):
                    continue  # from before a reboot
                outcome = message.reaction()
                if outcome is not None:
                    return outcome
            if self._panic_deadline is not None and time.monotonic() >= self._panic_deadline:
                return self._panic_outcome()

    def _patience(self) -> float | None:
        """How long nothing is to be done unless something happens, in ms; None: forever."""
        waits = []
        if self._panic_deadline is not None:
            waits.append(max(0.0, self._panic_deadline - time.monotonic()) * 1e3)
        if (due := self._rtc.due) is not None:
            # Not at once, as the host's time may be set, and passes while the host sleeps.
            waits.append(min(max(0, due - time.time_ns()) / 1e6, RTC_PATIENCE))
        return min(waits, default=None)

    # What it does about what happened: the outcome, if that is the end

    def _reset(self, reason: str) -> Outcome | None:
        if self._panic_deadline is not None:
            return self._panic_outcome()
        if not self.config.reboot:
            return Outcome(ExitStatus.OK, reason=reason)
        self._reboot()
        self._listeners.tell("RESET", guest=reason.startswith("guest-"), reason=reason)
        return None

    def _sleep(self) -> None:
        with self._lock:
            board, self._board = self._board, None
            if board is None:
                return  # two vCPUs asked for it
            boot = self._boot
            self._asleep = board.fall_asleep(lambda: self._tell(self._wake_up, boot))
            self._listeners.tell("SUSPEND")

    def _wake_up(self) -> Outcome | None:
        from pyvmm.boot.acpi import waking_vector
        from pyvmm.machine.chassis import ChassisBuilder

        assert self._asleep is not None
        if waking_vector(self._asleep.memory) is None:
            return self._reset("guest-reset")  # it left no way back to where it was
        with self._lock:
            asleep, self._asleep = self._asleep, None
            self._listeners.tell("WAKEUP")  # before what the guest does now
        self._power_on(ChassisBuilder(self._kvm, self.config, asleep.memory), asleep)
        return None

    def _panic(self) -> None:
        if self._panic_deadline is None:
            self._panic_deadline = time.monotonic() + PANIC_GRACE
            self._listeners.tell("GUEST_PANICKED", action="poweroff")

    def _stop_on_error(self, name: str, error: int, what: str) -> None:
        with self._lock:  # who resumes on the event does so after the pause
            first = self.stopped_by is None
            self.stopped_by = what
            if first:
                self._listeners.tell(
                    "BLOCK_IO_ERROR",
                    device=name,
                    action="stop",
                    nospace=error == errno.ENOSPC,
                    reason=os.strerror(error),
                )
            self.pause()

    def _panic_outcome(self) -> Outcome:
        lines = self._last_lines()
        at = next((index for index, line in enumerate(lines) if PANIC in line), None)
        if at is None:
            words = "it said so through pvpanic"
        else:
            # What led to it stands before, its call trace after.
            lines = lines[max(0, at - PANIC_CONTEXT) :][:REPORT_LINES]
            words = lines[min(at, PANIC_CONTEXT)].partition(PANIC)[2].lstrip(": ")
        error = GuestPanic(f"the guest kernel panicked: {words}")
        return self._failure(error, lines, "guest-panic")

    def _failure(
        self, error: PyvmmError, lines: list[str] | None = None, reason: str = "host-error"
    ) -> Outcome:
        """The end of the machine by `error`, with `lines` of the console (by default the last)."""
        lines = (self._last_lines() if lines is None else lines)[-REPORT_LINES:]
        error.add_note("its console said:" if lines else "its console said nothing")
        for line in lines:
            error.add_note(f"  | {line}")
        return Outcome(error.exit_status, error, reason)

    def _last_lines(self) -> list[str]:
        """What the console shows of them: a guest does not get to control a terminal here."""
        lines = self.console_tail().split("\n")
        shown = ["".join(c for c in line if c.isprintable() or c == "\t") for line in lines]
        return [line for line in shown if line.strip()]

    # What others report; any thread

    def _tell(self, reaction: Callable[[], Outcome | None], boot: int | None) -> None:
        """Has the supervisor do `reaction`, which returns how the machine ends by it, if it does.

        `boot` is the number of the one in which it happened; nothing is done in a later one. None
        stands for what happened outside of the guest.
        """
        self._inbox.append(_Message(reaction, boot))
        self._wake_supervisor()

    def _wake_supervisor(self) -> None:
        os.eventfd_write(self._wake, 1)

    def _end(self, outcome: Outcome, boot: int | None = None) -> None:
        self._tell(lambda: outcome, boot)

    def _on_quit(self) -> None:
        """The user pressed the escape key."""
        self._end(Outcome(ExitStatus.OK, reason="host-ui"))


class _Message:
    """What the supervisor is to do about what happened in a boot: see `VM._tell`."""

    __slots__ = ("boot", "reaction")

    def __init__(self, reaction: Callable[[], Outcome | None], boot: int | None) -> None:
        self.reaction = reaction
        self.boot = boot


class _Listener:
    """Passes on what the guest of one boot did."""

    def __init__(self, vm: VM, boot: int) -> None:
        self._vm = vm
        self._boot = boot

    def on_poweroff(self) -> None:
        self._vm._end(Outcome(ExitStatus.OK, reason="guest-shutdown"), self._boot)

    def on_sleep(self) -> None:
        self._vm._tell(self._vm._sleep, self._boot)

    def on_reset(self) -> None:
        self._vm._tell(lambda: self._vm._reset("guest-reset"), self._boot)

    def on_panic(self) -> None:
        self._vm._tell(self._vm._panic, self._boot)

    def on_crash(self, crash: GuestCrash) -> None:
        self._vm._end(self._vm._failure(crash), self._boot)

    def on_error(self, error: BaseException) -> None:
        self._vm._end(Outcome(ExitStatus.INTERNAL, error), self._boot)


def _eventfd(stack: ExitStack) -> int:
    fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    stack.callback(os.close, fd)
    return fd


def _disk_name(index: int) -> str:
    """As Linux calls them: vda to vdz, vdaa and so on."""
    letters = ""
    index += 1
    while index:
        index, letter = divmod(index - 1, 26)
        letters = chr(ord("a") + letter) + letters
    return f"vd{letters}"


def _number(kind: Kind, name: str, value: object) -> int:
    from pyvmm.schema import Source

    try:
        number = kind.read(value, Source())
    except ValueError as error:
        raise UsageError(f"{name}={value} {error}") from None
    assert isinstance(number, int)
    return number
