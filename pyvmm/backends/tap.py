"""Taps: Ethernet interfaces of the host whose other end is a file (tuntap.rst of Linux)."""

from __future__ import annotations

import errno
import os
import struct
from contextlib import ExitStack
from fcntl import ioctl

from pyvmm._core import lib
from pyvmm.backends.net import NetPort
from pyvmm.errors import UsageError

TUN = "/dev/net/tun"
VHOST_NET = "/dev/vhost-net"

# ioctls of linux/if_tun.h.
_TUNSETIFF = 0x4004_54CA
_TUNSETOFFLOAD = 0x4004_54D0
_TUNSETVNETHDRSZ = 0x4004_54D8
_TUNSETQUEUE = 0x4004_54D9
_TUNSETCARRIER = 0x4004_54E2  # since Linux 5.0

_IFF_TAP = 0x0002
_IFF_MULTI_QUEUE = 0x0100
_IFF_ATTACH_QUEUE = 0x0200
_IFF_DETACH_QUEUE = 0x0400
_IFF_NO_PI = 0x1000
_IFF_VNET_HDR = 0x4000

# Of linux/sockios.h and net/if.h.
_SIOCGIFFLAGS, _SIOCSIFFLAGS = 0x8913, 0x8914
_SIOCGIFMTU, _SIOCSIFMTU = 0x8921, 0x8922
_IFF_UP = 0x1

_IFREQ_NAME = 16  # with the NUL
_HEADER_SIZE = 12  # struct virtio_net_hdr_v1

_USO = lib.NET_OFFLOAD_USO4 | lib.NET_OFFLOAD_USO6  # since Linux 6.2
_OFFLOADS = (
    lib.NET_OFFLOAD_CSUM
    | lib.NET_OFFLOAD_TSO4
    | lib.NET_OFFLOAD_TSO6
    | lib.NET_OFFLOAD_ECN
    | lib.NET_OFFLOAD_UFO
    | _USO
)


class TapPort(NetPort):
    """The tap interface `name`, attached with a queue for each of `fds`."""

    def __init__(
        self,
        name: str,
        fds: tuple[int, ...],
        *,
        offloads: int,
        mtu: int,
        vhost_fds: tuple[int, ...],
        remarks: list[str],
    ) -> None:
        super().__init__(
            fds,
            lib.NET_FRAMING_TAP,
            vnet_hdr=True,
            takes=offloads,
            gives=offloads,
            mtu=mtu,
            vhost_fds=vhost_fds,
            remarks=remarks,
        )
        self.name = name
        self.set_queue_pairs(1)

    def set_offloads(self, offloads: int) -> None:
        if offloads & _USO != _USO:
            offloads &= ~_USO  # the kernel takes both or none
        ioctl(self.fds[0], _TUNSETOFFLOAD, offloads)

    def set_queue_pairs(self, count: int) -> None:
        for index, fd in enumerate(self.fds[1:], 1):
            flag = _IFF_ATTACH_QUEUE if index < count else _IFF_DETACH_QUEUE
            try:
                ioctl(fd, _TUNSETQUEUE, _ifreq("", flag))
            except OSError as error:
                if error.errno != errno.EINVAL:  # it is so already
                    raise

    def set_link(self, up: bool) -> None:
        """The host sees the interface lose its carrier."""
        try:
            ioctl(self.fds[0], _TUNSETCARRIER, struct.pack("i", up))
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTTY):  # the kernel is too old
                raise


def open_tap(
    name: str,
    *,
    queues: int = 1,
    mtu: int | None = None,
    offloads: bool = True,
    vhost: bool = False,
) -> TapPort:
    """Attaches to the tap interface `name` with so many queues, at first one of them in use.

    One that does not exist is made, as far as this user has the rights, is up, and goes with the
    port. An `mtu` is set, as far as it is not that already; without one the port has the
    interface's. `vhost` opens ``/dev/vhost-net`` for each queue.

    UsageError when the interface or vhost cannot be used as asked.
    """
    if not name.isascii() or not name.isprintable() or set(name) & set("/%: "):
        raise UsageError(f"{name!r} is not a name that a network interface can have")
    with ExitStack() as stack:
        existed = os.path.exists(f"/sys/class/net/{name}")
        several = queues > 1 or _tun_flags(name) & _IFF_MULTI_QUEUE
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR | (_IFF_MULTI_QUEUE if several else 0)
        fds = tuple(_attach(name, flags, queues, stack) for _ in range(queues))
        interface = _Interface(name, stack)
        remarks = []
        if not existed:
            interface.set_up()
        elif not interface.is_up():
            remarks.append(f"the tap interface {name} is down: 'ip link set {name} up' mends that")
        if mtu is not None and interface.mtu() != mtu:
            interface.set_mtu(mtu)
        vhost_fds = tuple(_open_vhost(stack) for _ in fds) if vhost else ()
        port = TapPort(
            name,
            fds,
            offloads=_offloads(fds[0]) if offloads else 0,
            mtu=interface.mtu(),
            vhost_fds=vhost_fds,
            remarks=remarks,
        )
        interface.close()
        stack.pop_all()
    return port


def _ifreq(name: str, *values: int, layout: str = "H") -> bytes:
    """``struct ifreq`` of net/if.h."""
    return struct.pack(f"{_IFREQ_NAME}s{layout}", name.encode(), *values).ljust(40, b"\0")


def _tun_flags(name: str) -> int:
    """The flags of a tun or tap interface; 0 for any other and for none."""
    try:
        with open(f"/sys/class/net/{name}/tun_flags") as file:
            return int(file.read(), 16)
    except OSError:
        return 0


def _attach(name: str, flags: int, queues: int, stack: ExitStack) -> int:
    try:
        fd = os.open(TUN, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise UsageError(
            f"a tap interface needs {TUN}, which cannot be opened ({error.strerror}): load it "
            "with 'modprobe tun', give this user access, or use --net user"
        ) from None
    stack.callback(os.close, fd)
    try:
        ioctl(fd, _TUNSETIFF, _ifreq(name, flags))
    except OSError as error:
        raise UsageError(_why_not(name, flags, queues, error)) from None
    ioctl(fd, _TUNSETVNETHDRSZ, struct.pack("i", _HEADER_SIZE))
    return fd


def _why_not(name: str, flags: int, queues: int, error: OSError) -> str:
    """Why TUNSETIFF failed, and what mends it."""
    several = " multi_queue" if queues > 1 else ""
    add = f"'ip tuntap add dev {name} mode tap user {os.getuid()}{several}'"
    now = _tun_flags(name)
    if error.errno == errno.EPERM:
        whose = "belongs to somebody else" if now else "does not exist, and this user may make none"
        return (
            f"the tap interface {name} {whose}: have an administrator run {add}, or use --net user"
        )
    if error.errno == errno.EBUSY:
        return f"the tap interface {name} is in use by another program: end that or take another"
    if error.errno == errno.EINVAL and not now & _IFF_TAP:
        return f"the network interface {name} is no tap: choose another name for a new one"
    if error.errno == errno.EINVAL and (now ^ flags) & _IFF_MULTI_QUEUE:
        return (
            f"the tap interface {name} has a single queue: give queues=1, or have an administrator "
            f"run 'ip link del {name}' and {add}"
        )
    if error.errno == errno.E2BIG:
        return f"the tap interface {name} has no {queues} queues left: give fewer queues"
    return f"the tap interface {name} cannot be used: {error.strerror}"


def _offloads(fd: int) -> int:
    """What this kernel's taps can do."""
    offloads: int = _OFFLOADS
    try:
        ioctl(fd, _TUNSETOFFLOAD, offloads)
    except OSError:
        offloads &= ~_USO
    ioctl(fd, _TUNSETOFFLOAD, 0)
    return offloads


def _open_vhost(stack: ExitStack) -> int:
    try:
        fd = os.open(VHOST_NET, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise UsageError(
            f"vhost=on needs {VHOST_NET}, which cannot be opened ({error.strerror}): load it with "
            "'modprobe vhost_net', give this user access, or leave vhost=on out"
        ) from None
    stack.callback(os.close, fd)
    return fd


class _Interface:
    """What only a socket can ask and change about a network interface."""

    def __init__(self, name: str, stack: ExitStack) -> None:
        # Not `socket`, which wraps it in enumerations: 5 ms.
        import _socket

        self.name = name
        self._socket = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
        self.close = self._socket.close
        stack.callback(self.close)

    def is_up(self) -> bool:
        return bool(self._flags() & _IFF_UP)

    def set_up(self) -> None:
        self._ask(_SIOCSIFFLAGS, "H", self._flags() | _IFF_UP)

    def mtu(self) -> int:
        return self._ask(_SIOCGIFMTU, "i", 0)

    def set_mtu(self, mtu: int) -> None:
        """UsageError when the interface or this user cannot."""
        try:
            self._ask(_SIOCSIFMTU, "i", mtu)
        except PermissionError:
            raise UsageError(
                f"the tap interface {self.name} has an MTU of {self.mtu()}, which this user may "
                f"not change: have an administrator run 'ip link set {self.name} mtu {mtu}', or "
                "leave mtu out"
            ) from None
        except OSError as error:
            raise UsageError(
                f"the tap interface {self.name} takes no MTU of {mtu} ({error.strerror}): give one "
                "from 68 to 65521"
            ) from None

    def _flags(self) -> int:
        return self._ask(_SIOCGIFFLAGS, "H", 0)

    def _ask(self, request: int, layout: str, value: int) -> int:
        reply = ioctl(self._socket.fileno(), request, _ifreq(self.name, value, layout=layout))
        (answer,) = struct.unpack_from(layout, reply, _IFREQ_NAME)
        return int(answer)
