"""User-mode networking: a TCP/IP stack in this process speaks for the guest. No root needed.

The stack is libslirp (``_native/slirp_net.c``), and runs on the thread of the guest's queues. The
guest finds a network with DHCP, a router that is the host, and a name server that asks the host's.
"""

from __future__ import annotations

import errno
import os
import socket
import threading

from pyvmm._core import ffi as core_ffi
from pyvmm._core import lib as core
from pyvmm.backends.forward import Forward
from pyvmm.backends.net import NetPort
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

# Sends every TCP segment and datagram in one frame: with 1500 bytes the same takes 44 of them.
DEFAULT_MTU = 65520
DEFAULT_NETWORK = "10.0.2.0/24"

# libslirp's set-up is not for several threads, and cffi calls run without the GIL.
_create_lock = threading.Lock()


class UserNet(NetPort):
    """A network of one guest: `network`, in which the host is number 2 and the guest 15.

    `mtu` is in bytes, 576 to 65520. With `restrict` the guest reaches nothing but DHCP, and is
    reached through `forwards` alone; with `loopback` it reaches services on the host's 127.0.0.1
    and ::1, through the host's address in the network. `hostname` is what DHCP calls the guest.

    `forwards` are then those asked for, with the ports that were chosen. Raises UsageError.
    """

    def __init__(
        self,
        *,
        network: str = DEFAULT_NETWORK,
        mtu: int = DEFAULT_MTU,
        hostname: str = "",
        restrict: bool = False,
        loopback: bool = True,
        ipv6: bool = True,
        forwards: Iterable[Forward] = (),
    ) -> None:
        self._ffi, self._lib = _library()
        address, _, prefix = network.partition("/")
        first = _number(address)
        name = self._ffi.new("char[]", hostname.encode()) if hostname else self._ffi.NULL
        config = self._ffi.new(
            "struct slirp_net_config *",
            {
                "network": first,
                "netmask": 0xFFFFFFFF & ~(0xFFFFFFFF >> int(prefix)),
                "host": first + 2,
                "name_server": first + 3,
                "guest": first + 15,
                "mtu": mtu,
                "ipv6": ipv6,
                "restricted": restrict,
                "host_loopback": loopback,
                "hostname": name,
            },
        )
        with _create_lock:
            self._native = self._lib.slirp_net_create(config)
        if self._native == self._ffi.NULL:
            raise OSError(self._ffi.errno, os.strerror(self._ffi.errno))
        engine = int(self._ffi.cast("uintptr_t", self._lib.slirp_net_engine(self._native)))
        super().__init__(
            (),
            core.NET_FRAMING_CALLS,
            engine=core_ffi.cast("struct net_engine *", engine),
            gives=core.NET_OFFLOAD_CSUM,
            mtu=mtu,
        )
        try:
            self.forwards = [self._forward(each) for each in forwards]
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if self._native is not None:
            with _create_lock:
                self._lib.slirp_net_destroy(self._native)
            self._native = None
        super().close()

    @property
    def counters(self) -> dict[str, int]:
        """Frames since the start: see ``struct slirp_net_counters``."""
        counters = self._lib.slirp_net_counters(self._native)
        names = ("from_guest", "to_guest", "malformed", "dropped")
        return {name: getattr(counters, name) for name in names}

    def _forward(self, asked: Forward) -> Forward:
        port: int = self._lib.slirp_net_forward(
            self._native,
            asked.protocol == "udp",
            _number(asked.host),
            asked.host_port,
            _number(asked.guest) if asked.guest else 0,
            asked.guest_port,
        )
        if port < 0:
            raise UsageError(f"hostfwd={asked}: {_why_not_forwarded(asked, -port)}")
        made = Forward(asked.protocol, asked.host, port, asked.guest, asked.guest_port)
        if asked.host_port == 0:
            self.remarks.append(f"the guest's network forwards {made}")
        return made


def _library() -> tuple[Any, Any]:
    try:
        from pyvmm._slirp import ffi, lib
    except ImportError:
        raise UsageError(
            "a user network needs libslirp, which this pyvmm was built without: install "
            "libslirp-dev and run scripts/setup, or use passt or a tap"
        ) from None
    return ffi, lib


def _number(address: str) -> int:
    return int.from_bytes(socket.inet_aton(address), "big")


def _why_not_forwarded(forward: Forward, error: int) -> str:
    where = f"port {forward.host_port} of {forward.host}"
    if error == errno.EADDRINUSE:
        return f"{where} is in use: give another one, or 0 for one that is free"
    if error == errno.EACCES:
        return f"{where} is for root alone: give one above 1023, or 0 for one that is free"
    if error == errno.EADDRNOTAVAIL:
        return f"{forward.host} is no address of this machine: give 127.0.0.1, or 0.0.0.0 for all"
    return f"{where} cannot be listened on: {os.strerror(error)}"
