"""The kernel's own network stack as the guest of a network backend, without a virtual machine.

A child process with a network namespace of its own (and, without root, a user namespace) makes a
tap there and copies its frames to and from the backend. Sockets made by `GuestStack.socket` are
those of that namespace, and otherwise as any other.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import socket
import struct
import subprocess
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Self

CLONE_NEWUSER, CLONE_NEWNET, CLONE_NEWNS = 0x10000000, 0x40000000, 0x00020000
TUNSETIFF, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 2, 0x1000, 0x4000
HEADER = 12
BURST = 64  # frames each way before the other has its turn
LONGEST = HEADER + 14 + 65535


class GuestStack:
    """The guest on the far end of `fd`, with packet framing and a header of 12 bytes before frames;
    or with `stream` framing, and without.

    `up` gives it an address; `run` runs a command as in the guest. RuntimeError, with the reason,
    where the machine does not let us make one.
    """

    def __init__(
        self,
        fd: int,
        *,
        mtu: int = 1500,
        mac: str = "52:54:00:12:34:56",
        stream: bool = False,
    ) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", __file__, str(fd), str(theirs.fileno())],
                pass_fds=(fd, theirs.fileno()),
            )
        try:
            self._ask({"do": "start", "stream": stream})
            self.run(f"ip link set lo up; ip link set eth0 address {mac} mtu {mtu} up")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def up(self, address: str = "10.0.2.15/24", router: str = "10.0.2.2") -> None:
        self.run(f"ip addr add {address} dev eth0; ip route add default via {router}")

    def run(self, script: str) -> str:
        """What a shell script printed that ran there; CalledProcessError unless it ended with 0."""
        answer, _ = self._ask({"do": "run", "script": script})
        if answer["status"]:
            raise subprocess.CalledProcessError(
                answer["status"], script, answer["output"], answer["output"]
            )
        return str(answer["output"])

    def socket(
        self, family: int = socket.AF_INET, kind: int = socket.SOCK_STREAM, protocol: int = 0
    ) -> socket.socket:
        made = {"do": "socket", "family": family, "kind": kind, "protocol": protocol}
        _, fds = self._ask(made)
        return socket.socket(fileno=fds[0])

    def listen(self, port: int, backlog: int = 128) -> socket.socket:
        listener = self.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("0.0.0.0", port))
        listener.listen(backlog)
        return listener

    def connect(self, address: str, port: int, timeout: float = 10) -> socket.socket:
        connection = self.socket()
        connection.settimeout(timeout)
        try:
            connection.connect((address, port))
        except BaseException:
            connection.close()
            raise
        return connection

    def close(self) -> None:
        self._control.close()
        self._process.wait()

    def hold(self, held: bool) -> None:
        """Whether the guest takes no frames, as one that is paused."""
        self._ask({"do": "hold", "held": held})

    def _ask(self, request: dict[str, object]) -> tuple[dict[str, Any], list[int]]:
        self._control.send(json.dumps(request).encode())
        answer, fds, _, _ = socket.recv_fds(self._control, 1 << 16, 1)
        if not answer:
            raise RuntimeError("the guest's process ended")
        told = json.loads(answer)
        if "error" in told:
            raise RuntimeError(told["error"])
        return told, fds


def _unshare() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    flags = CLONE_NEWNET | (CLONE_NEWUSER if os.geteuid() else 0)
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(flags) < 0:
        raise OSError(ctypes.get_errno(), "network namespaces are not permitted here")
    if flags & CLONE_NEWUSER:
        for name, line in (
            ("setgroups", "deny"),
            ("uid_map", f"0 {uid} 1"),
            ("gid_map", f"0 {gid} 1"),
        ):
            with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
                file.write(line)


def _tap(*, headers: bool) -> int:
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if headers else 0)
    fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", b"eth0", flags))
    if headers:
        fcntl.ioctl(fd, TUNSETVNETHDRSZ, struct.pack("i", HEADER))
    return fd


class _Copier:
    """Frames between a tap and a backend; a backend that is full stops the tap."""

    def __init__(self, backend: int) -> None:
        self.tap = -1
        self.poll = select.poll()
        self._backend = socket.socket(fileno=os.dup(backend))
        self.backend = self._backend.fileno()
        self._late: bytes | None = None
        self._stream = False
        self._partial = b""  # of a stream: what is not yet a whole frame

    def start(self, *, stream: bool) -> None:
        self._stream = stream
        _unshare()
        self.tap = _tap(headers=not stream)
        self.hold(False)
        self._watch_tap()

    def hold(self, held: bool) -> None:
        """A guest that takes no frames, as one that is paused."""
        self._held = held
        self._watch_backend()

    def copy(self, fd: int, events: int) -> None:
        if fd == self.tap:
            self._to_backend()
        elif events & select.POLLOUT and self._late is not None:
            frame, self._late = self._late, None
            self._send(frame)
            self._watch_tap()
            self._watch_backend()
        else:
            self._to_tap()

    def _to_backend(self) -> None:
        for _ in range(BURST):
            try:
                frame = os.read(self.tap, LONGEST)
            except OSError:
                return
            self._send(struct.pack("!I", len(frame)) + frame if self._stream else frame)
            if self._late is not None:
                self.poll.unregister(self.tap)
                self._watch_backend()
                return

    def _send(self, frame: bytes) -> None:
        try:
            sent = self._backend.send(frame, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        if sent < len(frame):
            self._late = frame[sent:]

    def _to_tap(self) -> None:
        for _ in range(BURST):
            try:
                frame = self._backend.recv(LONGEST, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            if not frame:
                self.poll.unregister(self.backend)
                return
            for each in self._frames(frame) if self._stream else [frame]:
                with contextlib.suppress(OSError):  # the interface is down
                    os.write(self.tap, each)

    def _frames(self, data: bytes) -> Iterator[bytes]:
        self._partial += data
        while len(self._partial) >= 4:
            end = 4 + int.from_bytes(self._partial[:4], "big")
            if len(self._partial) < end:
                return
            yield self._partial[4:end]
            self._partial = self._partial[end:]

    def _watch_tap(self) -> None:
        if self._late is None:
            self.poll.register(self.tap, select.POLLIN)

    def _watch_backend(self) -> None:
        events = 0 if self._held else select.POLLIN
        self.poll.register(self.backend, events | (0 if self._late is None else select.POLLOUT))


def _serve(backend: int, control: socket.socket) -> None:
    copier = _Copier(backend)
    os.close(backend)  # so that the backend sees the end of the guest
    copier.poll.register(control, select.POLLIN)
    while True:
        for fd, events in copier.poll.poll():
            if fd != control.fileno():
                copier.copy(fd, events)
                continue
            message = control.recv(1 << 16)
            if not message:
                return
            try:
                answer, fds = _do(copier, json.loads(message))
            except OSError as error:
                answer, fds = {"error": str(error)}, []
            socket.send_fds(control, [json.dumps(answer).encode()], fds)
            for each in fds:
                os.close(each)


def _do(copier: _Copier, request: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    what = request["do"]
    if what == "start":
        copier.start(stream=request["stream"])
    elif what == "hold":
        copier.hold(request["held"])
    elif what == "run":
        ran = subprocess.run(
            ["sh", "-e", "-c", request["script"]],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        return {"status": ran.returncode, "output": ran.stdout}, []
    else:
        made = socket.socket(request["family"], request["kind"], request["protocol"])
        return {}, [made.detach()]
    return {}, []


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[2])) as end:
        _serve(int(sys.argv[1]), end)
