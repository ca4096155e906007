"""What a client of the control socket can have a machine do, and ask of it.

A command is a method below: its keyword arguments are those of QMP, with their types, and the
first line of its docstring is what ``pyvmm ctl --help`` says. Results are those that QEMU's QMP
reference gives for them, as far as they are known here.
"""

from __future__ import annotations

import re

from pyvmm.control.protocol import NEGOTIATE, QmpError
from pyvmm.errors import PyvmmError
from pyvmm.schema import any_of, suggest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any, Protocol

    from pyvmm.backends.chardev import Chardev
    from pyvmm.backends.disk import Image
    from pyvmm.backends.scsi.cdrom import ScsiCdrom
    from pyvmm.config import ChardevConfig, DiskConfig, VmConfig
    from pyvmm.virtio.net import VirtioNet

    class Event(Protocol):
        """As `machine.events.Event`."""

        name: str
        data: dict[str, object]
        time: float

    class PortState(Protocol):
        """As `machine.ports.PortState`."""

        address: str
        guest_open: bool

    class Statistics(Protocol):
        """As `virtio.balloon.Statistics`."""

        values: dict[str, int]
        time: float

    class Balloon(Protocol):
        """As `machine.balloon.Balloon`."""

        @property
        def actual(self) -> int: ...
        @property
        def stats(self) -> Statistics | None: ...
        def set_target(self, size: int) -> None: ...

    class Machine(Protocol):
        """What is asked of the machine; `machine.vm.VM` has it."""

        config: VmConfig
        nets: list[VirtioNet]
        serial: Chardev
        console: Chardev

        @property
        def balloon(self) -> Balloon | None: ...
        @property
        def state(self) -> str: ...
        @property
        def cpu_threads(self) -> list[int]: ...
        @property
        def disks(self) -> dict[str, tuple[DiskConfig, Image]]: ...
        @property
        def cdroms(self) -> dict[str, ScsiCdrom]: ...
        @property
        def ports(self) -> Mapping[str, PortState]: ...

        def on_event(self, listener: Callable[[Any], None]) -> None: ...
        def pause(self) -> None: ...
        def resume(self) -> None: ...
        def reset(self) -> None: ...
        def wake(self) -> None: ...
        def request_stop(self, status: int = 0, reason: str = "") -> None: ...
        def press_power_button(self) -> None: ...
        def resize_disk(self, name: str, size: int | str | None = None) -> None: ...
        def limit_disk(self, name: str, *, iops: int = 0, bps: int | str = 0) -> None: ...
        def add_scsi_disk(self, **settings: Any) -> tuple[int, int]: ...
        def remove_scsi_disk(self, target: int, lun: int) -> None: ...
        def add_port(self, name: str, **settings: Any) -> None: ...
        def remove_port(self, name: str) -> None: ...
        def change_medium(self, name: str, path: str | None, *, force: bool = False) -> None: ...
        def set_link(self, index: int, up: bool) -> None: ...


SCSI_DISK, SCSI_BUS = "scsi-hd", "scsi0.0"
# Drivers of ports, and whether those are terminals.
PORT_DRIVERS = {"virtserialport": False, "virtconsole": True}
BALLOON = "/machine/peripheral/balloon0"
PORT_BUS = "virtio-serial0.0"
_FILE_DRIVERS = ("file", "host_device")
_TYPES = {"str": str, "int": int, "bool": bool, "list": list, "dict": dict}
_TYPE_NAMES = {
    str: "a string",
    int: "a whole number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


class Command:
    """One command, as its method tells of it.

    `arguments` are their types by their names, `required` the names of those that must be given;
    `open` is whether there may be others. `later` is for commands whose answer comes first.
    """

    def __init__(self, name: str, function: Callable[..., Any], later: bool) -> None:
        self.name = name
        self.function = function
        self.later = later
        self.help = (function.__doc__ or "").partition("\n")[0]
        defaults = function.__kwdefaults__ or {}
        code = function.__code__
        words = code.co_varnames[code.co_argcount :][: code.co_kwonlyargcount]
        annotations = function.__annotations__
        kinds = {word: annotations[word].partition("[")[0] for word in words}
        self.arguments = {word.replace("_", "-"): _TYPES[kind] for word, kind in kinds.items()}
        self.required = [word.replace("_", "-") for word in words if word not in defaults]
        self.open = bool(code.co_flags & 0x08)  # CO_VARKEYWORDS

    def check(self, arguments: Mapping[str, Any]) -> None:
        """QmpError unless these are arguments that it has."""
        for word, value in arguments.items():
            if word in self.arguments:
                kind = self.arguments[word]
                if type(value) is not kind:
                    raise QmpError(f"{word!r} of {self.name} is {_TYPE_NAMES[kind]}")
            elif not self.open:
                known = f"it has {', '.join(self.arguments)}" if self.arguments else "it has none"
                raise QmpError(f"{self.name} has no argument {word!r}: {known}")
        for word in self.required:
            if word not in arguments:
                raise QmpError(f"{self.name} needs an argument {word!r}")


COMMANDS: dict[str, Command] = {}


def command(name: str, *, later: bool = False) -> Callable[[Any], Any]:
    def add(function: Any) -> Any:
        COMMANDS[name] = Command(name, function, later)
        return function

    return add


class Control:
    """Executes commands on a machine, for all clients. One thread."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._nodes: dict[str, dict[str, Any]] = {}  # of blockdev-add: settings of disks
        self._backends: dict[str, dict[str, Any]] = {}  # of chardev-add: settings of ports
        # Of device_add: the names of disks and ports by their ids, and the node or backend of each.
        self._ids: dict[str, str] = {}
        self._node_of: dict[str, str] = {}

    def greeting(self) -> dict[str, Any]:
        return {"QMP": {"version": self.query_version(), "capabilities": []}}

    def tell(self, event: Event) -> dict[str, Any]:
        """An event as clients see it."""
        data = dict(event.data)
        if "id" in data:
            data["id"] = self._id_of(str(data["id"]))
        if "device" in data:
            name = str(data["device"])
            data["device"] = self._id_of(name)
            if event.name == "DEVICE_DELETED":
                data["path"] = f"/machine/peripheral/{data['device']}"
                self._ids.pop(str(data["device"]), None)
                self._node_of.pop(name, None)
        seconds = int(event.time)
        stamp = {"seconds": seconds, "microseconds": int((event.time - seconds) * 1_000_000)}
        message = {"timestamp": stamp, "event": event.name}
        return {**message, "data": data} if data else message

    def find(
        self, name: str, arguments: dict[str, Any], negotiated: bool
    ) -> tuple[Command, dict[str, Any]]:
        """The command of that name, and the arguments of its method. QmpError."""
        if not negotiated and name != NEGOTIATE:
            raise QmpError(f"{NEGOTIATE} has to come before any other command", "CommandNotFound")
        if negotiated and name == NEGOTIATE:
            raise QmpError(f"{NEGOTIATE} was there already", "CommandNotFound")
        found = COMMANDS.get(name)
        if found is None:
            hint = suggest(name[:40], COMMANDS) or " (query-commands lists them)"
            raise QmpError(f"there is no command {name[:40]!r}{hint}", "CommandNotFound")
        found.check(arguments)
        return found, {word.replace("-", "_"): value for word, value in arguments.items()}

    def execute(self, command: Command, arguments: dict[str, Any]) -> Any:
        """What the command returns. QmpError, whatever went wrong."""
        try:
            result = command.function(self, **arguments)
        except QmpError:
            raise
        except PyvmmError as error:
            raise QmpError(str(error)) from error
        except Exception as error:
            import logging

            logging.getLogger("pyvmm.control").exception("the command %s failed", command.name)
            raise QmpError(f"a defect in pyvmm: {error!r}") from error
        return {} if result is None else result

    # The session

    @command(NEGOTIATE)
    def qmp_capabilities(self, *, enable: list[object] | None = None) -> None:
        """start a session, which pyvmm ctl does by itself"""
        if enable:
            raise QmpError(f"there is no capability {enable[0]!r}: the greeting lists none")

    @command("query-commands")
    def query_commands(self) -> list[dict[str, str]]:
        """list the commands there are"""
        return [{"name": name} for name in COMMANDS]

    @command("query-version")
    def query_version(self) -> dict[str, Any]:
        """tell the version of pyvmm"""
        from importlib.metadata import version

        text = version("pyvmm")
        numbers = map(int, re.findall(r"\d+", text))
        return {
            "qemu": dict(zip(("major", "minor", "micro"), numbers, strict=False)),
            "package": f"pyvmm {text}",
        }

    # The machine

    @command("query-status")
    def query_status(self) -> dict[str, Any]:
        """tell whether the guest runs"""
        state = self._machine.state
        return {"status": state, "running": state == "running"}

    @command("stop")
    def stop(self) -> None:
        """pause the guest"""
        self._machine.pause()

    @command("cont")
    def cont(self) -> None:
        """let a paused guest go on, and try again what failed on a disk"""
        self._machine.resume()

    @command("system_powerdown")
    def system_powerdown(self) -> None:
        """press the power button: the guest should shut down"""
        self._machine.press_power_button()

    @command("system_reset", later=True)
    def system_reset(self) -> None:
        """start the guest anew at once, as a reset button does"""
        self._machine.reset()

    @command("quit", later=True)
    def quit(self) -> None:
        """end the guest at once, as pulling the plug does"""
        self._machine.request_stop(reason="host-qmp-quit")

    @command("system_wakeup")
    def system_wakeup(self) -> None:
        """wake a guest that sleeps (S3)"""
        if self._machine.state != "suspended":
            raise QmpError("the guest does not sleep: there is nothing to wake")
        self._machine.wake()

    @command("query-cpus-fast")
    def query_cpus_fast(self) -> list[dict[str, Any]]:
        """list the CPUs and the threads that run them"""
        return [
            {
                "cpu-index": index,
                "qom-path": f"/machine/cpu/{index}",
                "thread-id": thread,
                "target": "x86_64",
            }
            for index, thread in enumerate(self._machine.cpu_threads)
        ]

    # The balloon

    @command("query-balloon")
    def query_balloon(self) -> dict[str, int]:
        """tell how much memory the guest has"""
        return {"actual": self._balloon().actual}

    @command("balloon")
    def balloon(self, *, value: int) -> None:
        """ask the guest to have so much memory: value=300M"""
        self._balloon().set_target(value)

    @command("qom-get")
    def qom_get(self, *, path: str, property: str) -> dict[str, Any]:
        """tell its statistics: path=/machine/peripheral/balloon0 property=guest-stats"""
        if (path, property) != (BALLOON, "guest-stats"):
            raise QmpError(f"there is no {property!r} of {path!r}: give guest-stats of {BALLOON}")
        statistics = self._balloon().stats
        if statistics is None:
            raise QmpError("the guest has told nothing (yet): --balloon stats=2 asks it every 2 s")
        values = {f"stat-{name.replace('_', '-')}": n for name, n in statistics.values.items()}
        return {"stats": values, "last-update": int(statistics.time)}

    def _balloon(self) -> Balloon:
        balloon = self._machine.balloon
        if balloon is None:
            raise QmpError(
                "this machine has no balloon: start it with --balloon", "DeviceNotActive"
            )
        return balloon

    # Disks

    @command("query-block")
    def query_block(self) -> list[dict[str, Any]]:
        """list the disks and CD drives"""
        machine = self._machine
        disks = [
            {**self._drive(name), "locked": False, "inserted": self._inserted(name, *disk)}
            for name, disk in machine.disks.items()
        ]
        return disks + [
            {
                **self._drive(name),
                "removable": True,
                "locked": drive.locked,
                "tray_open": drive.tray_open,
                **({} if drive.path is None else {"inserted": _medium(name, drive)}),
            }
            for name, drive in machine.cdroms.items()
        ]

    def _drive(self, name: str) -> dict[str, Any]:
        return {"device": name, "qdev": self._id_of(name), "type": "unknown", "removable": False}

    def _inserted(self, name: str, config: DiskConfig, image: Image) -> dict[str, Any]:
        iops, bps = image.limits
        return {
            "file": image.name,
            "node-name": self._node_of.get(name, name),
            "drv": image.format,
            "ro": image.readonly,
            "encrypted": False,
            "detect_zeroes": "off",
            "write_threshold": 0,
            "cache": {
                "writeback": config.cache == "writeback",
                "direct": config.direct,
                "no-flush": False,
            },
            "iops": iops,
            "iops_rd": 0,
            "iops_wr": 0,
            "bps": bps,
            "bps_rd": 0,
            "bps_wr": 0,
            "image": {"filename": image.name, "format": image.format, "virtual-size": image.size},
        }

    @command("block_resize")
    def block_resize(self, *, size: int, device: str = "", node_name: str = "") -> None:
        """make a disk larger and tell the guest: device=vda size=20G"""
        self._machine.resize_disk(self._find_disk(device, node_name), size)

    @command("block_set_io_throttle")
    def block_set_io_throttle(
        self,
        *,
        bps: int,
        iops: int,
        device: str = "",
        id: str = "",
        bps_rd: int = 0,
        bps_wr: int = 0,
        iops_rd: int = 0,
        iops_wr: int = 0,
    ) -> None:
        """limit a disk's requests and bytes a second (0: any number): device=vda iops=500 bps=0"""
        if bps_rd or bps_wr or iops_rd or iops_wr:
            raise QmpError("there are no limits for reads or writes alone: give bps and iops")
        self._machine.limit_disk(self._find_disk(device or id), iops=iops, bps=bps)

    @command("blockdev-change-medium")
    def blockdev_change_medium(
        self, *, filename: str, device: str = "", id: str = "", force: bool = False
    ) -> None:
        """put an ISO image into a CD drive: device=cd0 filename=media.iso"""
        self._machine.change_medium(self._find_cdrom(device or id), filename, force=force)

    @command("eject")
    def eject(self, *, device: str = "", id: str = "", force: bool = False) -> None:
        """take the medium out of a CD drive: device=cd0"""
        self._machine.change_medium(self._find_cdrom(device or id), None, force=force)

    # Devices that come and go

    @command("blockdev-add")
    def blockdev_add(self, *, driver: str, node_name: str, **members: object) -> None:
        """name an image, for device_add: driver=file node-name=data filename=data.img"""
        from pyvmm.backends.storage import open_disk

        if node_name in self._nodes:
            raise QmpError(f"there is a node {node_name} already: give another node-name")
        settings = _disk_settings(driver, members)
        open_disk(**_disk_config(settings, "blockdev-add").backend()).close()
        self._nodes[node_name] = settings

    @command("blockdev-del")
    def blockdev_del(self, *, node_name: str) -> None:
        """forget an image of blockdev-add: node-name=data"""
        if node_name not in self._nodes:
            raise QmpError(f"there is no node {node_name!r} of blockdev-add")
        if node_name in self._node_of.values():
            raise QmpError(f"node {node_name} is in use: device_del the disk first")
        del self._nodes[node_name]

    @command("chardev-add")
    def chardev_add(self, *, id: str, backend: dict[str, object]) -> None:
        """name a socket or file, for device_add of a port; backend is JSON, as QEMU has it"""
        if id in self._backends:
            raise QmpError(f"there is a chardev {id} already: give another id")
        self._backends[id] = _port_settings(backend)

    @command("chardev-remove")
    def chardev_remove(self, *, id: str) -> None:
        """forget one of chardev-add"""
        if id not in self._backends:
            raise QmpError(f"there is no chardev {id!r} of chardev-add")
        if id in self._node_of.values():
            raise QmpError(f"chardev {id} is in use: device_del the port first")
        del self._backends[id]

    @command("device_add")
    def device_add(
        self,
        *,
        driver: str,
        id: str = "",
        bus: str = "",
        drive: str = "",
        chardev: str = "",
        **members: object,
    ) -> None:
        """plug a SCSI disk or a port in: driver=scsi-hd id=data path=data.img (or drive=NODE)"""
        if driver != SCSI_DISK and driver not in PORT_DRIVERS:
            known = any_of([SCSI_DISK, *PORT_DRIVERS])
            raise QmpError(f"there is no driver {driver!r} that can be plugged: give {known}")
        if id in (*self._ids, *self._machine.disks, *self._machine.ports):
            raise QmpError(f"there is a device {id} already: give another id")
        known = SCSI_BUS if driver == SCSI_DISK else PORT_BUS
        if bus not in ("", known):
            raise QmpError(f"there is no bus {bus!r}: leave it out, or give {known}")
        if driver == SCSI_DISK:
            name = self._add_disk({**self._node("node", drive, self._nodes), **members})
        else:
            members = {"name": id, **self._node("chardev", chardev, self._backends), **members}
            name = self._add_port(members | ({"console": True} if PORT_DRIVERS[driver] else {}))
        if id:
            self._ids[id] = name
        if drive or chardev:
            self._node_of[name] = drive or chardev

    def _node(self, what: str, name: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """The settings of what was named before, if `name` is not empty. QmpError."""
        if not name:
            return {}
        if name not in known:
            raise _not_found(what, name, list(known))
        if name in self._node_of.values():
            raise QmpError(f"{what} {name} is in use by another device")
        return known[name]

    def _add_disk(self, settings: dict[str, Any]) -> str:
        if "scsi_id" in settings:
            settings["target"] = settings.pop("scsi_id")
        _disk_config(settings, "device_add")
        target, lun = self._machine.add_scsi_disk(**settings)
        return f"{target}:{lun}"

    def _add_port(self, settings: dict[str, Any]) -> str:
        from pyvmm.config import PortConfig
        from pyvmm.schema import Source

        config = PortConfig.from_table(settings, Source("device_add"))
        self._machine.add_port(**settings)
        return config.name

    @command("device_del")
    def device_del(self, *, id: str) -> None:
        """unplug a SCSI disk or a port: id=data, id=TARGET:LUN, id=NAME"""
        port = self._ids.get(id, id)
        if port in self._machine.ports:
            self._machine.remove_port(port)
            return
        name = self._find_disk(id)
        if ":" not in name:
            what = "only SCSI disks and ports can"
            raise QmpError(f"{id} cannot be unplugged while the guest runs: {what}")
        target, lun = name.split(":")
        self._machine.remove_scsi_disk(int(target), int(lun))

    # Networks and character devices

    @command("set_link")
    def set_link(self, *, name: str, up: bool) -> None:
        """plug a network cable in or pull it out: name=net0 up=off"""
        names = [net.name for net in self._machine.nets]
        if name not in names:
            raise _not_found("network interface", name, names)
        self._machine.set_link(names.index(name), up)

    @command("query-chardev")
    def query_chardev(self) -> list[dict[str, Any]]:
        """list what the serial port, the console and the named ports are connected to"""
        machine = self._machine
        devices = {"serial0": (machine.config.serial, machine.serial)}
        if machine.config.console.kind != "none":
            devices["console0"] = (machine.config.console, machine.console)
        consoles = [
            {"label": label, "filename": _filename(config, chardev), "frontend-open": True}
            for label, (config, chardev) in devices.items()
        ]
        return consoles + [
            {
                "label": self._id_of(name),
                "filename": port.address,
                "frontend-open": port.guest_open,
            }
            for name, port in machine.ports.items()
        ]

    def _id_of(self, name: str) -> str:
        """What clients call the disk of that name."""
        return next((id for id, each in self._ids.items() if each == name), name)

    def _find_disk(self, device: str, node: str = "") -> str:
        """The name of the disk that is called so, or that is on that node. QmpError."""
        disks = self._machine.disks
        on_node = next((name for name, each in self._node_of.items() if each == node), node)
        name = self._ids.get(device, device) or on_node
        if name not in disks:
            raise _not_found("disk", device or node, [self._id_of(each) for each in disks])
        return name

    def _find_cdrom(self, name: str) -> str:
        if name not in self._machine.cdroms:
            raise _not_found("CD drive", name, list(self._machine.cdroms))
        return name


def _not_found(what: str, name: str, known: list[str]) -> QmpError:
    there = f"there: {', '.join(known) or 'none'}"
    return QmpError(f"there is no {what} {name!r} ({there})", "DeviceNotFound")


def _disk_settings(driver: str, members: dict[str, Any]) -> dict[str, Any]:
    """The settings of a disk of what blockdev-add says of it. QmpError."""
    file: object = {"driver": driver, "filename": members.pop("filename", None)}
    if driver not in _FILE_DRIVERS:
        file = members.pop("file", None)
    match file:
        case {"driver": "file" | "host_device", "filename": str(path), **rest} if not rest:
            settings = {"path": path, "format": "raw" if driver in _FILE_DRIVERS else driver}
        case _:
            raise QmpError(
                "the image is given as driver=file and filename=PATH, or as driver=FORMAT and "
                'file={"driver": "file", "filename": PATH}'
            )
    settings["readonly"] = members.pop("read_only", False)
    match members.pop("cache", {}):
        case {"direct": direct, **rest} if rest in ({}, {"no-flush": False}):
            settings["direct"] = direct
        case {} as cache if cache in ({}, {"no-flush": False}):
            pass
        case _:
            raise QmpError("a cache of blockdev-add has direct=true or false, and nothing else")
    if members.pop("discard", "unmap") != "unmap":
        raise QmpError("discards of the guest always reach the image: leave discard out")
    for member in members:
        raise QmpError(f"blockdev-add knows no member {member.replace('_', '-')!r} of an image")
    return settings


def _port_settings(backend: dict[str, Any]) -> dict[str, Any]:
    """The settings of a port of what chardev-add says of it. QmpError."""
    match backend:
        case {
            "type": "socket",
            "data": {"addr": {"type": "unix", "data": {"path": str(path)}}, **rest},
        } if rest.keys() <= {"server", "wait", "reconnect"} and not rest.get("wait"):
            return {"unix" if rest.get("server", True) else "connect": path}
        case {"type": "file", "data": {"out": str(path), **rest}} if not rest:
            return {"file": path}
    raise QmpError(
        "the backend of chardev-add is a Unix socket or a file that gets output: "
        'backend={"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": PATH}}, '
        '"server": true, "wait": false}}'
    )


def _disk_config(settings: dict[str, Any], command: str) -> DiskConfig:
    """UsageError, where the settings are what the command was given."""
    from pyvmm.config import DiskConfig
    from pyvmm.schema import Source

    return DiskConfig.from_table({**settings, "bus": "scsi"}, Source(command))


def _medium(name: str, drive: ScsiCdrom) -> dict[str, Any]:
    return {
        "file": drive.path,
        "node-name": name,
        "drv": "raw",
        "ro": True,
        "encrypted": False,
        "image": {"filename": drive.path, "format": "raw", "virtual-size": drive.size},
    }


def _filename(config: ChardevConfig, chardev: Chardev) -> str:
    """As ``--serial`` would be told, but with the name of a pseudo-terminal."""
    if config.kind == "pty":
        return f"pty:{chardev.description.rpartition(' ')[2]}"
    return config.to_text()
