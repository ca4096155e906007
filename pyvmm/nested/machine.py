"""The two processes behind the emulated machine: QEMU (TCG) and virtiofsd."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from pyvmm.nested.bundle import Bundle

QEMU = "qemu-system-x86_64"
# Debian 12 has the C virtiofsd in qemu-system-common; later releases package the Rust one.
_C_VIRTIOFSD = ("/usr/lib/qemu/virtiofsd",)
_RUST_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")

# Port numbers of nested_protocol.h.
CONTROL, STDIN, STDOUT, STDERR, TERMINAL = range(1, 6)
PORTS = (CONTROL, STDIN, STDOUT, STDERR, TERMINAL)

# TCG loses the flags now and then when a guest's CMPXCHG16B is interrupted, and the guest kernel
# then dies of a double fault. The other features cost an emulated CPU time: a fifth level in each
# page walk, a change of state in every copy to and from user space.
_CPU = "max,-cx16,-la57,-smap,-smep,-pku"

# Without the devices that nothing here uses the kernel is up half a second earlier.
_MACHINE = "q35,hpet=off,i8042=off,sata=off,smbus=off"
_KERNEL_PARAMETERS = (
    "console=ttyS0 quiet panic=-1"
    # A busy host makes time jump; the kernel must not conclude that TSC or timer are broken.
    " tsc=reliable no_timer_check"
    # What costs time under TCG and guards nothing here.
    " mitigations=off nokaslr lsm=capability apparmor=0 random.trust_cpu=on"
)


def why_not() -> str | None:
    """The sentence that says why this host cannot emulate a machine, or None if it can."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed: apt install qemu-system-x86"
    if _find_virtiofsd() is None:
        return "virtiofsd is missing: apt install virtiofsd (on Debian 12: qemu-system-common)"
    return None


class _Virtiofsd(NamedTuple):
    path: str
    rust: bool


def _find_virtiofsd() -> _Virtiofsd | None:
    for paths, rust in ((_RUST_VIRTIOFSD, True), (_C_VIRTIOFSD, False)):
        for path in paths:
            if os.access(path, os.X_OK):
                return _Virtiofsd(path, rust)
    found = shutil.which("virtiofsd")
    return _Virtiofsd(found, True) if found else None


def _virtiofsd_command(listener: int) -> list[str]:
    """Shares the host's root. Without root, the daemon maps the user to root in a user namespace:
    inside the machine the command is root, and what it writes belongs to the user."""
    daemon = _find_virtiofsd()
    assert daemon is not None, "why_not() was asked first"
    command = [daemon.path, f"--fd={listener}"]
    if daemon.rust:
        sandbox = "chroot" if os.geteuid() == 0 else "none"
        return [*command, "--shared-dir=/", f"--sandbox={sandbox}", "--cache=always"]
    command += ["-o", "source=/", "-o", "sandbox=chroot", "-o", "cache=always"]
    command += ["-o", "log_level=err"]
    return command if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", *command]


class Machine:
    """A running emulated machine; ``ports[CONTROL]`` etc. are sockets to its virtio-serial ports.

    Leaving the context stops both processes.
    """

    def __init__(self, bundle: Bundle, *, cpus: int, memory: int) -> None:
        self._bundle = bundle
        self._cpus = cpus
        self._memory = memory
        self.ports: Mapping[int, socket.socket] = {}

    def __enter__(self) -> Machine:
        self._directory = Path(tempfile.mkdtemp(prefix="pyvmm-nested-"))
        self._console = self._directory / "console.log"
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _start(self) -> None:
        socket_path = str(self._directory / "fs")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(socket_path)
        listener.listen(1)
        share = socket.socket(socket.AF_UNIX)
        share.connect(socket_path)
        pairs = {port: socket.socketpair() for port in PORTS}
        self.ports = {port: ours for port, (ours, _) in pairs.items()}
        theirs = {port: theirs for port, (_, theirs) in pairs.items()}
        with listener, share:
            self._virtiofsd = self._spawn(
                _virtiofsd_command(listener.fileno()), "virtiofsd.log", [listener.fileno()]
            )
            self._qemu = self._spawn(
                self._qemu_command(share, theirs),
                "qemu.log",
                [share.fileno(), *(end.fileno() for end in theirs.values())],
            )
        for end in theirs.values():
            end.close()

    def _spawn(self, command: list[str], log: str, fds: list[int]) -> subprocess.Popen[bytes]:
        with (self._directory / log).open("wb") as output:
            return subprocess.Popen(
                # Whatever ends pyvmm, even SIGKILL, ends the machine with it.
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=fds,
                start_new_session=True,
            )

    def _qemu_command(self, share: socket.socket, ports: Mapping[int, socket.socket]) -> list[str]:
        command = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-M", _MACHINE, "-cpu", _CPU, "-accel", "tcg,thread=multi"]
        command += ["-smp", str(self._cpus), "-m", f"{self._memory >> 20}M"]
        command += ["-object", f"memory-backend-memfd,id=ram,size={self._memory},share=on"]
        command += ["-numa", "node,memdev=ram", "-rtc", "base=utc"]
        command += [
            "-device",
            "virtio-serial-pci",
        ]  # the first virtio device: its ports are vport0*
        for port, end in ports.items():
            command += ["-chardev", f"socket,id=port{port},fd={end.fileno()}"]
            command += ["-device", f"virtserialport,nr={port},chardev=port{port}"]
        command += ["-chardev", f"socket,id=fs,fd={share.fileno()}"]
        command += ["-device", "vhost-user-fs-pci,chardev=fs,tag=host"]
        command += ["-serial", f"file:{self._console}"]
        command += ["-kernel", str(self._bundle.kernel), "-initrd", str(self._bundle.initrd)]
        return [*command, "-append", _KERNEL_PARAMETERS]

    def stop(self) -> None:
        """Ends the machine at once: what the command wrote to files is already with the host."""
        for end in self.ports.values():
            end.close()
        for process in (self._qemu, self._virtiofsd):
            if process is not None:
                process.kill()
                process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    _qemu: subprocess.Popen[bytes] | None = None
    _virtiofsd: subprocess.Popen[bytes] | None = None

    def diagnosis(self) -> str:
        """The last lines that the machine's console, QEMU and virtiofsd wrote."""
        lines = []
        for name in ("virtiofsd.log", "qemu.log", "console.log"):
            path = self._directory / name
            text = path.read_bytes().decode(errors="replace") if path.exists() else ""
            lines += [f"  {name}: {line.rstrip()}" for line in text.splitlines()[-12:]]
        return "\n".join(lines)
