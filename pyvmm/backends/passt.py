"""passt: a program of its own that speaks for the guest, who gets the host's own addresses.

It takes the guest's frames from a socket pair (``passt --fd``), and ends when our end is closed,
however this process ends. See passt(1).
"""

from __future__ import annotations

import socket
import subprocess

from pyvmm._core import lib
from pyvmm.backends.forward import EXAMPLE
from pyvmm.backends.net import NetPort
from pyvmm.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyvmm.backends.forward import Forward

PROGRAM = "passt"
DEFAULT_MTU = 65520

# As much of it as the kernel gives: what does not fit passt drops, and sends again seconds later.
_SOCKET_BUFFER = 4 << 20

# It goes to the background as soon as it is ready, after some 50 ms.
_START_TIMEOUT = 20.0


class Passt(NetPort):
    """A network that passt serves.

    `mtu` is in bytes; with `loopback` the guest reaches services on the host's 127.0.0.1 through
    the address of its router. Raises UsageError.
    """

    def __init__(
        self,
        *,
        mtu: int = DEFAULT_MTU,
        loopback: bool = True,
        ipv6: bool = True,
        forwards: Sequence[Forward] = (),
    ) -> None:
        self.forwards = list(forwards)
        for each in self.forwards:
            if not each.host_port or each.guest:
                raise UsageError(
                    f"hostfwd={each}: passt chooses no port, and knows one guest only: "
                    f"give one such as {EXAMPLE}"
                )
        options = ["--quiet", "--mtu", str(mtu)]
        options += [] if loopback else ["--no-map-gw"]
        options += [] if ipv6 else ["--ipv4-only"]
        for protocol, flag in (("tcp", "--tcp-ports"), ("udp", "--udp-ports")):
            chosen = [each for each in self.forwards if each.protocol == protocol]
            # Without this UDP ports would follow those of TCP.
            specs = [f"{each.host}/{each.host_port}:{each.guest_port}" for each in chosen]
            for spec in specs or ["none"]:
                options += [flag, spec]
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        for end in (ours, theirs):
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER)
        try:
            with theirs:
                _run(options, theirs.fileno())
        except BaseException:
            ours.close()
            raise
        super().__init__((ours.detach(),), lib.NET_FRAMING_STREAM, mtu=mtu)


def _run(options: list[str], fd: int) -> None:
    """Returns when it is ready. UsageError, with what it said, when it fails."""
    try:
        done = subprocess.run(
            [PROGRAM, "--fd", str(fd), *options],
            pass_fds=(fd,),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            timeout=_START_TIMEOUT,
            check=False,
        )
    except FileNotFoundError:
        raise UsageError(
            f"{PROGRAM} is not installed: install the package passt, or use --net user"
        ) from None
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"{PROGRAM} was not ready after {_START_TIMEOUT:g} s: use --net user instead"
        ) from None
    if done.returncode:
        lines = done.stderr.splitlines()
        said = [line for line in lines if line.strip() and "to syslog" not in line]
        reason = said[-1].removesuffix(", exiting") if said else f"status {done.returncode}"
        raise UsageError(f"{PROGRAM} cannot serve this network: {reason} (or use --net user)")
