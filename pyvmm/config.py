"""What a virtual machine is made of: checked settings from the command line, TOML or Python.

The fields below are the only list of options there is; ``pyvmm run --help``, the keys of a TOML
file and the arguments of :class:`pyvmm.VM` all come from them. See :mod:`pyvmm.schema`.
"""

from __future__ import annotations

import os

from pyvmm.errors import UsageError
from pyvmm.schema import (
    MIB,
    TIB,
    Boolean,
    Choice,
    Integer,
    Kind,
    Many,
    One,
    Path,
    Record,
    Seconds,
    Size,
    Source,
    Text,
    Texts,
    any_of,
    format_size,
    quote_toml,
    setting,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from typing import Any, Self

_HUGE_PAGE = 2 * MIB


# Those that qemu-nbd writes as well as it reads, and raw.
_FORMATS = ("raw", "qcow2", "vmdk", "vhdx", "vpc", "vdi", "qed", "parallels")
_NBD_SCHEMES = ("nbd://", "nbds://", "nbd+unix://", "nbds+unix://")


class DiskConfig(Record, implied="path"):
    """One disk on an image, a block device or an NBD server, by virtio-blk or virtio-scsi."""

    path: str | None = setting(Path(), default=None, help="an image file or block device")
    nbd: str | None = setting(
        Text("URI"),
        default=None,
        help="an NBD server instead: nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH",
    )
    format: str | None = setting(
        Choice(*_FORMATS),
        default=None,
        help="of the image; without it raw, unless it certainly is another",
    )
    readonly: bool = setting(Boolean(), default=False, help="let the guest only read")
    snapshot: bool = setting(
        Boolean(), default=False, help="throw the guest's writes away; the image can be shared"
    )
    direct: bool = setting(Boolean(), default=False, help="bypass the host's page cache (O_DIRECT)")
    cache: str = setting(
        Choice("writeback", "writethrough"),
        default="writeback",
        help="write to the host's cache until a flush, or through it",
    )
    on_error: str = setting(
        Choice("report", "stop"),
        default="report",
        help="errors of the host: the guest gets them, or stops until it is resumed",
    )
    iops: int = setting(Integer(0, 10**9), default=0, help="most requests a second; 0: any number")
    bps: int = setting(
        Size(least=0, most=TIB, multiple=1), default=0, help="most bytes a second; 0: any number"
    )
    queues: int = setting(Integer(1, 16), default=1, help="virtqueues, as a rule one per CPU")
    queue_size: int = setting(
        Integer(4, 1024, power_of_two=True), default=256, help="descriptors in each virtqueue"
    )
    serial: str = setting(
        Text(longest=20), default="", help="serial number, seen as /dev/disk/by-id/virtio-SERIAL"
    )
    bus: str = setting(
        Choice("virtio", "scsi"),
        default="virtio",
        help="virtio: a device of its own; scsi: a logical unit of the SCSI controller (/dev/sda)",
    )
    target: int | None = setting(
        Integer(0, 255), default=None, help="with bus=scsi: the SCSI target (0)"
    )
    lun: int | None = setting(
        Integer(0, 16383), default=None, help="with bus=scsi: the LUN (the first that is free)"
    )

    def complete(self, source: Source) -> None:
        place = f"{source.place}: " if source.place else ""
        if self.bus == "scsi" and self.on_error == "stop":
            raise UsageError(f"{place}on_error=stop is for disks with bus=virtio")
        if (self.path is None) == (self.nbd is None):
            raise UsageError(f"{place}a disk needs either path=PATH or nbd=URI")
        if self.nbd is not None:
            self._check_nbd(place)
        if self.bus == "virtio" and (self.target, self.lun) != (None, None):
            raise UsageError(f"{place}target and lun are places of SCSI disks: add bus=scsi")
        if self.bus == "scsi" and (self.queues, self.queue_size) != (1, 256):
            raise UsageError(
                f"{place}all SCSI disks share the queues of their controller: "
                "give --scsi queues=N,queue_size=N instead"
            )
        if self.readonly and self.snapshot:
            raise UsageError(
                f"{place}readonly=on and snapshot=on contradict each other: "
                "readonly=on if the guest must not write, snapshot=on if its writes are thrown away"
            )

    def _check_nbd(self, place: str) -> None:
        if not str(self.nbd).startswith(_NBD_SCHEMES):
            raise UsageError(
                f"{place}nbd={self.nbd} is no URI of NBD: give nbd://HOST:PORT/EXPORT or "
                "nbd+unix:///EXPORT?socket=PATH (a comma in it is written twice)"
            )
        for key in ("format", "direct"):
            if getattr(self, key):
                raise UsageError(
                    f"{place}{key} is for images and devices, not for nbd: that is the server's"
                )

    @property
    def location(self) -> str:
        """The path or URI of what it is on."""
        return str(self.path if self.nbd is None else self.nbd)

    def backend(self) -> dict[str, Any]:
        """The arguments of `backends.storage.open_disk`."""
        names = ("path", "nbd", "format", "readonly", "direct", "snapshot")
        return {name: getattr(self, name) for name in names} | {"threads": self.queues}

    @property
    def shares(self) -> bool:
        """Whether others may use the same image, as it does not change."""
        return self.readonly or self.snapshot


class ScsiConfig(Record):
    """The SCSI controller (virtio-scsi), which all SCSI disks are behind."""

    queues: int = setting(Integer(1, 16), default=1, help="request queues, as a rule one per CPU")
    queue_size: int = setting(
        Integer(8, 1024, power_of_two=True), default=256, help="descriptors in each request queue"
    )

    def to_text(self) -> str:
        return f"queues={self.queues},queue_size={self.queue_size}"


class CdromConfig(Record, implied="path"):
    """A CD or DVD drive behind the SCSI controller, with an ISO image in it or nothing."""

    path: str = setting(
        Path("ISO|none", words=("none",)), help="an ISO image, or none for an empty drive"
    )
    name: str = setting(
        Text(longest=32), default="", help="what VM.change_medium calls the drive (cd0, cd1, ...)"
    )
    serial: str = setting(Text(longest=20), default="", help="serial number of the drive")
    target: int | None = setting(Integer(0, 255), default=None, help="the SCSI target (0)")
    lun: int | None = setting(
        Integer(0, 16383), default=None, help="the LUN (the first that is free)"
    )


class DeviceOrUrl(Path):
    """The path of a device, or a URL, which has no folder."""

    def read(self, value: object, source: Source) -> str:
        if isinstance(value, str) and "://" in value:
            return Text().read(value, source)
        return super().read(value, source)

    def toml(self, value: str) -> str:
        return quote_toml(value) if "://" in value else super().toml(value)


class ScsiDeviceConfig(Record, implied="path"):
    """A SCSI device that is passed through: one of the host, or of an iSCSI target."""

    path: str = setting(
        DeviceOrUrl("DEVICE|URL"),
        help="/dev/sdX, /dev/srN or /dev/sgN of the host, or "
        "iscsi://[USER%PASSWORD@]HOST[:PORT]/IQN/LUN",
    )
    target: int | None = setting(Integer(0, 255), default=None, help="the SCSI target (0)")
    lun: int | None = setting(
        Integer(0, 16383), default=None, help="the LUN (the first that is free)"
    )


class MacAddress(Kind):
    """A MAC address that one device can have; kept as ``52:54:00:ab:cd:ef``."""

    metavar = "MAC"

    def read(self, value: object, source: Source) -> str:
        parts = value.split(":") if isinstance(value, str) else []
        if len(parts) != 6 or not all(map(_is_hex_byte, parts)):
            raise ValueError("is not a MAC address: give one such as 52:54:00:12:34:56")
        octets = [int(part, 16) for part in parts]
        if octets[0] & 1 or not any(octets):
            raise ValueError("is a MAC address of no single device: give an even first byte")
        return ":".join(f"{octet:02x}" for octet in octets)


def _is_hex_byte(text: str) -> bool:
    return len(text) == 2 and all(c in "0123456789abcdefABCDEF" for c in text)


class Ipv4Network(Kind):
    """A network with room for the addresses that user networking gives."""

    metavar = "ADDRESS/BITS"

    def read(self, value: object, source: Source) -> str:
        from pyvmm.backends.forward import is_address

        address, _, bits = value.partition("/") if isinstance(value, str) else ("", "", "")
        if not (is_address(address) and bits.isascii() and bits.isdecimal() and len(bits) < 3):
            raise ValueError("is not an IPv4 network: give one such as 10.0.2.0/24")
        if not 8 <= int(bits) <= 27:
            raise ValueError("has too many or too few addresses: give one of 8 to 27 bits")
        number = int.from_bytes(map(int, address.split(".")))
        if number & (0xFFFFFFFF >> int(bits)):
            raise ValueError("is an address in a network: give the network's own, that ends in 0")
        return f"{address}/{int(bits)}"


class HostForwards(Texts):
    """Ports of the host that lead to the guest: see `backends.forward`."""

    def __init__(self) -> None:
        super().__init__("PROTOCOL:[HOST]:PORT-[GUEST]:PORT")

    def read(self, value: object, source: Source) -> tuple[str, ...]:
        from pyvmm.backends.forward import Forward

        forwards = []
        for text in super().read(value, source):
            try:
                forwards.append(str(Forward.from_text(text)))
            except ValueError as error:
                raise UsageError(f"{source.place}={text} {error}") from None
        return tuple(forwards)


NETS = {
    "user": "the host's own connections, without rights: DHCP, DNS, TCP, UDP; see hostfwd",
    "passt": "the same through the program passt; the guest has the host's own addresses",
    "switch=PATH": "a network of virtual machines, those that name the same Unix socket",
    "tap=NAME": "an Ethernet interface of the host; without rights, one that was made for you",
}
# The keys that belong to some kinds of network alone.
_KINDS_OF_KEYS = {
    "tap": ("tap",),
    "vhost": ("tap",),
    "queues": ("tap",),
    "switch": ("switch",),
    "hostfwd": ("user", "passt"),
    "loopback": ("user", "passt"),
    "ipv6": ("user", "passt"),
    "net": ("user",),
    "hostname": ("user",),
    "restrict": ("user",),
}


class NetConfig(Record, implied="kind"):
    """One virtio-net device and what it is connected to on the host; `NETS` says what there is."""

    kind: str = setting(
        Choice(*(each.partition("=")[0] for each in NETS)),
        default=None,
        help="what it is connected to",
    )
    tap: str | None = setting(
        Text("NAME", longest=15), default=None, help="the tap interface of that name"
    )
    vhost: bool = setting(
        Boolean(), default=False, help="tap: let the host's kernel move the frames"
    )
    queues: int = setting(
        Integer(1, 16), default=1, help="tap: pairs of virtqueues, as a rule one per CPU"
    )
    switch: str | None = setting(Path(), default=None, help="the switch whose socket has that path")
    hostfwd: tuple[str, ...] = setting(
        HostForwards(),
        default=(),
        help="user, passt: a port of the host that leads to the guest, such as "
        "tcp:127.0.0.1:2222-:22; user takes a free one for port 0; may be repeated",
    )
    net: str = setting(
        Ipv4Network(),
        default="10.0.2.0/24",
        help="user: the guest's network; the host is number 2 in it, the name server 3, the guest "
        "15",
    )
    hostname: str = setting(
        Text(longest=32), default="", help="user: the name that DHCP gives the guest"
    )
    restrict: bool = setting(
        Boolean(), default=False, help="user: let the guest reach nothing but forwarded ports"
    )
    loopback: bool = setting(
        Boolean(),
        default=True,
        help="user, passt: let the guest reach servers on the host's 127.0.0.1, at its router",
    )
    ipv6: bool = setting(Boolean(), default=True, help="user, passt: IPv6 as well")
    mac: str | None = setting(
        MacAddress(), default=None, help="the guest's MAC address, else one that stays the same"
    )
    mtu: int | None = setting(
        Integer(68, 65521), default=None, help="the largest payload of a frame, in bytes"
    )
    pcap: str | None = setting(
        Path(), default=None, help="record all frames in this file, for Wireshark (pcapng)"
    )
    offloads: bool = setting(
        Boolean(),
        default=True,
        help="leave checksums and the cutting of large frames to the host where it can do that",
    )

    def complete(self, source: Source) -> None:
        place = source.place or "a network"
        forms = {each.partition("=")[0]: each for each in NETS}
        kind = self.kind or next((kind for kind in forms if getattr(self, kind, None)), None)
        if kind is None:
            raise UsageError(f"{place} is connected to nothing: give {any_of(NETS)}")
        if forms[kind] != kind and not getattr(self, kind):
            raise UsageError(f"{place}: {kind} needs a value: give {forms[kind]}")
        self.__dict__["kind"] = kind
        for key, kinds in _KINDS_OF_KEYS.items():
            if kind not in kinds and getattr(self, key) != self.settings[key].default:
                owners = any_of(forms[owner] for owner in kinds)
                raise UsageError(f"{place}: {key} is for {owners}, not for {forms[kind]}")
        least, most = (576, 65520) if kind in ("user", "passt") else (68, 65521)
        if self.mtu is not None and not least <= self.mtu <= most:
            raise UsageError(
                f"{place}: mtu={self.mtu} is out of range for {kind}: "
                f"give one from {least} to {most}"
            )
        if self.vhost and self.pcap is not None:
            raise UsageError(
                f"{place}: pcap sees no frame that the host's kernel moves: leave vhost=on out"
            )


# Linux needs about that much, and numbers of pages have 32 bits.
LEAST_MEMORY = 32 * MIB
_MOST_BALLOON = 16 * TIB - MIB


class BalloonConfig(Record, implied="size"):
    """A virtio-balloon device, by which the guest lends memory to the host."""

    size: int = setting(
        Size(least=0, most=_MOST_BALLOON, multiple=MIB),
        default=0,
        help="how much memory it takes from the guest at the start; VM.balloon changes it",
    )
    stats: int = setting(
        Integer(0, 3600),
        default=0,
        help="seconds between looks at the guest's own statistics of its memory; 0: none",
    )
    reporting: bool = setting(
        Boolean(), default=False, help="have the guest give free memory back by itself"
    )
    hinting: bool = setting(
        Boolean(), default=False, help="let VM.balloon.reclaim take back all that is free"
    )
    deflate_on_oom: bool = setting(
        Boolean(), default=False, help="let a guest take memory back before it kills a process"
    )
    auto: bool = setting(
        Boolean(),
        default=False,
        help="take and give by the guest's statistics and the host's memory pressure (PSI)",
    )

    def complete(self, source: Source) -> None:
        if self.auto and not self.stats:
            self.__dict__["stats"] = 2

    def to_text(self) -> str:
        values = ((each, getattr(self, name)) for name, each in self.settings.items())
        return ",".join(f"{each.name}={each.kind.text(value)}" for each, value in values)


CHARDEVS = {
    "stdio": "standard input and output; on a terminal, Ctrl-A h shows the keys",
    "pty": "a new pseudo-terminal; its name is printed",
    "file:PATH": "a file that gets the output; there is no input",
    "unix:PATH": "a Unix socket to listen on, for one client at a time",
    "connect:PATH": "somebody's Unix socket, again whenever the connection is lost",
    "none": "nothing",
}


class ChardevConfig(Record):
    """What a serial port or console is connected to on the host; ``CHARDEVS`` says what there is.

    As text: ``stdio``, ``pty``, ``file:PATH``, ``unix:PATH``, ``connect:PATH`` or ``none``; and,
    for Python programs alone, ``pipe``, the other ends of which are ``VM.serial`` or
    ``VM.console``.
    """

    metavar = "|".join(CHARDEVS)
    kind: str = setting(
        Choice(*(each.removesuffix(":PATH") for each in CHARDEVS), "pipe"),
        help="what it is connected to",
    )
    path: str | None = setting(Path(), default=None, help="the path of the file or socket")

    def complete(self, source: Source) -> None:
        place = f"{source.place}: " if source.place else ""
        needs_path = f"{self.kind}:PATH" in CHARDEVS
        if needs_path and self.path is None:
            raise UsageError(f"{place}{self.kind} needs a path: give {self.kind}:PATH")
        if not needs_path and self.path is not None:
            raise UsageError(f"{place}{self.kind} has no path: give {self.kind} alone")

    @classmethod
    def from_text(cls, text: str, source: Source) -> Self:
        kind, colon, path = text.partition(":")
        if kind not in (*CHARDEVS, "pipe") and f"{kind}:PATH" not in CHARDEVS:
            raise UsageError(
                f"{source.place}={text} is not a character device: give {any_of(CHARDEVS)}"
            )
        return cls.from_table({"kind": kind, "path": path} if colon else {"kind": kind}, source)

    def to_text(self) -> str:
        return self.kind if self.path is None else f"{self.kind}:{os.path.abspath(self.path)}"


class SocketAddress(Path):
    """The path of a Unix socket, written ``unix:PATH``."""

    metavar = "unix:PATH"

    def __init__(self) -> None:
        super().__init__(self.metavar)

    def read(self, value: object, source: Source) -> str:
        scheme, _, path = value.partition(":") if isinstance(value, str) else ("", "", "")
        if scheme != "unix":
            raise ValueError(f"is not the address of a Unix socket: give {self.metavar}")
        if any(option in path for option in (",server", ",wait", ",nowait")):
            raise ValueError(f"has options, which there are none of: give {self.metavar} alone")
        return "unix:" + super().read(path, source)

    def toml(self, value: str) -> str:
        return quote_toml("unix:" + os.path.abspath(value.removeprefix("unix:")))


class PortName(Text):
    """The name of a port, which becomes that of a file in the guest."""

    def __init__(self) -> None:
        super().__init__("NAME", longest=64)

    def read(self, value: object, source: Source) -> str:
        name = super().read(value, source)
        if not name or "/" in name or " " in name or name.startswith("."):
            raise ValueError(
                "is no name of a file in the guest's /dev/virtio-ports: give one such as "
                "org.qemu.guest_agent.0"
            )
        return name


_PORT_KINDS = {
    "unix": "unix=PATH",
    "connect": "connect=PATH",
    "file": "file=PATH",
    "pty": "pty=on",
    "stdio": "stdio=on",
}


class PortConfig(Record, implied="name"):
    """A named port of virtio-serial and what it is connected to on the host.

    Without that it is for this program, in Python: see `VM.port`.
    """

    name: str = setting(PortName(), help="its name: /dev/virtio-ports/NAME in the guest")
    unix: str | None = setting(
        Path(), default=None, help="a Unix socket to listen on, for one client at a time"
    )
    connect: str | None = setting(
        Path(), default=None, help="somebody's Unix socket, again whenever the connection is lost"
    )
    file: str | None = setting(
        Path(), default=None, help="a file that gets the output; there is no input"
    )
    pty: bool = setting(Boolean(), default=False, help="a new pseudo-terminal; its name is printed")
    stdio: bool = setting(Boolean(), default=False, help="standard input and output")
    console: bool = setting(
        Boolean(), default=False, help="make it a terminal, /dev/hvcN, instead of a stream of bytes"
    )

    def complete(self, source: Source) -> None:
        given = [kind for kind in _PORT_KINDS if getattr(self, kind)]
        if len(given) > 1:
            place = f"{source.place}: " if source.place else ""
            raise UsageError(
                f"{place}port {self.name} is connected to both {given[0]} and {given[1]}: "
                "give one of them"
            )

    @property
    def kind(self) -> str:
        """The kind of its character device (`backends.chardev`)."""
        return next((kind for kind in _PORT_KINDS if getattr(self, kind)), "program")

    @property
    def path(self) -> str | None:
        """That of its file or socket."""
        return self.unix or self.connect or self.file


_NOWHERE = ChardevConfig(kind="none")
_STDIO = ChardevConfig(kind="stdio")


class VmConfig(Record):
    """One virtual machine. Sizes are in bytes, times in seconds."""

    kernel: str = setting(
        Path("host|PATH", words=("host",)),
        group="boot",
        help="a Linux kernel (bzImage or vmlinux), or host for the newest in /boot",
    )
    initrd: str | None = setting(Path(), default=None, group="boot", help="initial RAM file system")
    append: str = setting(
        Text(),
        default="",
        group="boot",
        help="kernel parameters to add to those that pyvmm gives",
    )
    boot: str = setting(
        Choice("auto", "bzimage"),
        default="auto",
        group="boot",
        help="auto unpacks a bzImage on the host, which is faster; bzimage enters its own code",
    )
    memory: int = setting(
        Size(least=LEAST_MEMORY, most=64 * TIB, multiple=MIB),
        default=512 * MIB,
        group="machine",
        help="memory of the guest",
    )
    cpus: int = setting(Integer(1, 64), default=1, group="machine", help="CPUs of the guest")
    accel: str = setting(
        Choice("auto", "kvm", "nested"),
        default="auto",
        group="machine",
        help="kvm uses /dev/kvm, nested a KVM in an emulated AMD-V machine (slow), auto the first "
        "that can run Linux and says so if that is nested",
    )
    hugepages: bool = setting(
        Boolean(), default=False, group="machine", help="put guest memory on huge pages of 2 MiB"
    )
    balloon: BalloonConfig | None = setting(
        One(BalloonConfig),
        default=None,
        group="machine",
        help="a balloon, by which the guest's memory shrinks and grows (default: none)",
    )
    rng: bool = setting(
        Boolean(), default=True, group="machine", help="a virtio-rng device fed by the host"
    )
    disks: tuple[DiskConfig, ...] = setting(
        Many(DiskConfig),
        default=(),
        group="storage",
        flag="--disk",
        help="a disk: /dev/vda, then /dev/vdb and so on",
    )
    cdroms: tuple[CdromConfig, ...] = setting(
        Many(CdromConfig),
        default=(),
        group="storage",
        flag="--cdrom",
        help="a CD or DVD drive: /dev/sr0, then /dev/sr1 and so on",
    )
    scsi_devices: tuple[ScsiDeviceConfig, ...] = setting(
        Many(ScsiDeviceConfig),
        default=(),
        group="storage",
        flag="--scsi-device",
        help="a SCSI device that is passed through: all its commands are the guest's",
    )
    scsi: ScsiConfig | None = setting(
        One(ScsiConfig),
        default=None,
        group="storage",
        help="the SCSI controller (default: one if there is something behind it)",
    )
    nets: tuple[NetConfig, ...] = setting(
        Many(NetConfig),
        default=(),
        group="network",
        flag="--net",
        help="a network interface, may be repeated (default: none)",
    )
    serial: ChardevConfig = setting(
        One(ChardevConfig),
        default=None,
        group="console",
        help="the serial port ttyS0 (default: stdio, if --console is not there)",
    )
    console: ChardevConfig = setting(
        One(ChardevConfig),
        default=_NOWHERE,
        group="console",
        help="the virtio console hvc0, which follows the window size and is faster",
    )
    qmp: str | None = setting(
        SocketAddress(),
        default=None,
        group="lifecycle",
        help="a socket that controls the machine by QMP; 'pyvmm ctl PATH' speaks it",
    )
    ports: tuple[PortConfig, ...] = setting(
        Many(PortConfig),
        default=(),
        group="console",
        flag="--port",
        help="a named port of virtio-serial: /dev/virtio-ports/NAME in the guest",
    )
    max_ports: int | None = setting(
        Integer(1, 255),
        default=None,
        group="console",
        help="named ports that there can be at a time (default: 30, or as many as there are)",
    )
    reboot: bool = setting(
        Boolean(),
        default=True,
        group="lifecycle",
        help="start the guest again when it reboots, else end with status 0",
    )
    catch_up: bool = setting(
        Boolean(),
        default=False,
        group="lifecycle",
        help="let the guest's clocks jump ahead after a pause, instead of going on from where they "
        "stood",
    )
    timeout: float | None = setting(
        Seconds(), default=None, group="lifecycle", help="end with status 124 after that time"
    )

    def complete(self, source: Source) -> None:
        name = {key: source.name(each) for key, each in self.settings.items()}
        if self.serial is None:
            on_stdio = self.console.kind == "stdio" or any(port.stdio for port in self.ports)
            self.__dict__["serial"] = _NOWHERE if on_stdio else _STDIO
        if self.serial == self.console and self.serial.kind not in ("none", "pty", "pipe"):
            raise UsageError(
                f"{name['serial']} and {name['console']} are both {self.serial.to_text()}: "
                "connect one of them to something else or to none"
            )
        if self.hugepages and self.memory % _HUGE_PAGE:
            below = self.memory - self.memory % _HUGE_PAGE
            raise UsageError(
                f"{name['memory']}={format_size(self.memory)} is not a multiple of the huge page "
                f"of 2M: give {format_size(below)} or {format_size(below + _HUGE_PAGE)}, "
                f"or no {name['hugepages']}"
            )
        self._check_ports(name)
        if self.balloon is not None:
            self._check_balloon(self.balloon, name["balloon"], name["hugepages"])
        self._check_disks_differ(name["disks"])
        self.scsi_places(name)
        self._check_cdroms(name["cdroms"])
        if self.scsi is None and self.scsi_units:
            self.__dict__["scsi"] = ScsiConfig()

    def _check_balloon(self, balloon: BalloonConfig, name: str, hugepages: str) -> None:
        if self.hugepages:
            raise UsageError(
                f"{name} and {hugepages} contradict each other: huge pages are reserved for the "
                "guest and cannot be given back"
            )
        if self.memory >= _MOST_BALLOON:
            raise UsageError(
                f"{name} is for less memory than 16T: give the guest less, or no {name}"
            )
        most = self.memory - LEAST_MEMORY
        if balloon.size > most:
            raise UsageError(
                f"{name}: size={format_size(balloon.size)} leaves too little of the guest's "
                f"{format_size(self.memory)}: give at most {format_size(most)}"
            )

    @property
    def scsi_units(self) -> list[DiskConfig | CdromConfig | ScsiDeviceConfig]:
        """What is behind the SCSI controller."""
        disks = [disk for disk in self.disks if disk.bus == "scsi"]
        return [*disks, *self.cdroms, *self.scsi_devices]

    def scsi_places(self, name: Mapping[str, str] | None = None) -> list[tuple[int, int]]:
        """Target and LUN of each of `scsi_units`, in their order.

        Where they are not given it is target 0 and the first LUN that nobody has. UsageError when
        a place is given twice; `name` is what the settings are called in it.
        """
        units = self.scsi_units
        taken: set[tuple[int, int]] = set()
        for unit in units:
            if unit.lun is not None:
                place = (unit.target or 0, unit.lun)
                if place in taken:
                    key = _SETTING_OF[type(unit)]
                    what = unit.location if isinstance(unit, DiskConfig) else unit.path
                    raise UsageError(
                        f"{name[key] if name else key}={what}: there is something at target "
                        f"{place[0]}, LUN {place[1]} already: "
                        "give another lun, or none for the first that is free"
                    )
                taken.add(place)
        places = []
        for unit in units:
            target, lun = unit.target or 0, unit.lun
            if lun is None:
                lun = first_free_lun(target, taken)
                taken.add((target, lun))
            places.append((target, lun))
        return places

    def cdrom_names(self) -> list[str]:
        """What each of `cdroms` is called."""
        return [cdrom.name or f"cd{index}" for index, cdrom in enumerate(self.cdroms)]

    def _check_cdroms(self, setting: str) -> None:
        names = self.cdrom_names()
        for index, name in enumerate(names):
            if name in names[:index]:
                raise UsageError(
                    f"{setting}={self.cdroms[index].path}: there is a drive called {name} already: "
                    "give another name"
                )

    @property
    def most_ports(self) -> int:
        """How many named ports there can be at a time."""
        # A driver sets up two queues for each, so not more than people expect.
        return max(30, len(self.ports)) if self.max_ports is None else self.max_ports

    def _check_ports(self, name: Mapping[str, str]) -> None:
        names = [port.name for port in self.ports]
        for index, port in enumerate(names):
            if port in names[:index]:
                raise UsageError(
                    f"{name['ports']}={port} is given twice: give one of them another name"
                )
        on_stdio = [f"{name['ports']}={port.name}" for port in self.ports if port.stdio] + [
            name[key] for key in ("serial", "console") if getattr(self, key).kind == "stdio"
        ]
        if len(on_stdio) > 1:
            raise UsageError(
                f"{on_stdio[1]} and {on_stdio[0]} are both stdio: "
                "connect one of them to something else or to none"
            )
        if self.max_ports is not None and self.max_ports < len(names):
            raise UsageError(
                f"{name['max_ports']}={self.max_ports} is too small for the {len(names)} ports "
                f"that are given: give at least {len(names)}"
            )

    def _check_disks_differ(self, name: str) -> None:
        """Two disks on one image would corrupt it; two that only read are fine."""
        seen: dict[str, DiskConfig] = {}
        for disk in self.disks:
            other = seen.setdefault(disk.nbd or os.path.abspath(disk.location), disk)
            if other is not disk and not (disk.shares and other.shares):
                raise UsageError(
                    f"{name}={disk.location} is given twice: both must have readonly=on "
                    "or snapshot=on for the guest to see it as two disks"
                )

    def command_line(self) -> str:
        """The kernel parameters: what makes the machine usable as it is, then ``append``.

        ``console=`` names every console that is connected, the one on stdio last, as Linux makes
        the last one /dev/console; ``root=`` is the first disk (unless it is a SCSI disk that the
        guest finds after others). Either is left out where ``append`` speaks of it.
        """
        given = self.append.split()
        words = []
        if not any(word.startswith("console=") for word in given):
            names = {"ttyS0": self.serial, "hvc0": self.console}
            connected = [name for name, to in names.items() if to.kind != "none"]
            connected.sort(key=lambda name: names[name].kind == "stdio")
            words += [f"console={name}" for name in connected]
        if self.disks and not any(word.startswith("root=") for word in given):
            first = self.disks[0]
            device = "/dev/vda" if first.bus == "virtio" else "/dev/sda"
            places = [
                place
                for place, unit in zip(self.scsi_places(), self.scsi_units, strict=True)
                if not isinstance(unit, CdromConfig)
            ]
            if first.bus == "virtio" or places[0] == min(places):
                words += [f"root={device}", "ro" if first.readonly else "rw"]
        return " ".join([*words, self.append.strip()]).strip()


_SETTING_OF = {DiskConfig: "disks", CdromConfig: "cdroms", ScsiDeviceConfig: "scsi_devices"}


def first_free_lun(target: int, taken: Collection[tuple[int, int]]) -> int:
    """The first LUN of the target that is not among the places that are taken."""
    from itertools import count

    return next(lun for lun in count() if (target, lun) not in taken)


def load_toml(path: str) -> dict[str, object]:
    """The settings in a TOML file, each checked; relative paths start at the file's folder.

    Raises UsageError.
    """
    import tomllib

    try:
        with open(path, "rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}") from None
    return VmConfig.read(table, Source(path, folder=os.path.dirname(path)))


def from_command_line(options: Mapping[str, object], config_file: str | None = None) -> VmConfig:
    """A configuration from options (keyed by field name), over those of a TOML file.

    An option replaces the file's value, a list of disks as a whole. Raises UsageError.
    """
    settings = load_toml(config_file) if config_file else {}
    command_line = Source(flags=True)
    settings.update(VmConfig.read(options, command_line))
    config = VmConfig.from_table(settings, command_line)
    for name in ("serial", "console"):
        if getattr(config, name).kind == "pipe":
            raise UsageError(f"--{name}=pipe is for Python programs: give {any_of(CHARDEVS)}")
    for port in config.ports:
        if port.kind == "program":
            raise UsageError(
                f"--port={port.name} is connected to nothing: give {any_of(_PORT_KINDS.values())}"
            )
    return config
