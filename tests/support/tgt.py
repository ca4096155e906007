"""An iSCSI target for tests: Debian's tgt."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

IQN = "iqn.2026-11.test"
PASSWORD = "a-long-secret"


class Tgt:
    """A tgtd of our own, on loopback.

    It has the target `:open` with two disks (LUN 1 and 300) of `size` bytes, and the target
    `:locked`, for which one has to be `me` with PASSWORD.
    """

    def __init__(self, directory: Path, size: int) -> None:
        self.size = size
        self.port = free_port()
        self.control = str(os.getpid() % 30000 + self.port % 1000)
        self.process: subprocess.Popen[bytes] | None = None
        self.disks = {1: directory / "one.img", 300: directory / "two.img"}
        for path in self.disks.values():
            path.write_bytes(bytes(size))
        self.start()

    def start(self) -> None:
        portal = f"portal=127.0.0.1:{self.port}"
        command = ["tgtd", "-f", "-C", self.control, "--iscsi", portal]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        wait_until(lambda: self._try("sys", "show"), 20)
        for number, name in ((1, "open"), (2, "locked")):
            self.admin("target", "new", tid=number, targetname=f"{IQN}:{name}")
            for lun, path in self.disks.items():
                # The second target has copies, as an image is served once.
                image = path if number == 1 else path.with_suffix(".copy")
                image.touch()
                os.truncate(image, self.size)
                self.admin("logicalunit", "new", tid=number, lun=lun, backing_store=image)
            self.admin("target", "bind", tid=number, initiator_address="ALL")
        self.admin("account", "new", user="me", password=PASSWORD)
        self.admin("account", "bind", tid=2, user="me")

    def admin(self, mode: str, op: str, **arguments: object) -> None:
        assert self._try(mode, op, **arguments), (mode, op, arguments)

    def _try(self, mode: str, op: str, **arguments: object) -> bool:
        options = [f"--{name.replace('_', '-')}={value}" for name, value in arguments.items()]
        lld = [] if mode == "sys" else ["--lld=iscsi"]
        command = ["tgtadm", "-C", self.control, *lld, f"--mode={mode}", f"--op={op}", *options]
        return subprocess.run(command, capture_output=True).returncode == 0

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def url(self, lun: int = 1, *, target: str = "open", login: str = "") -> str:
        return f"iscsi://{login}127.0.0.1:{self.port}/{IQN}:{target}/{lun}"


def wait_until(condition: Callable[[], object], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.001)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
