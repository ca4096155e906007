"""The two processes behind the emulated machine: QEMU (TCG) and virtiofsd."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pyvmm._core import lib

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import TracebackType

    from pyvmm.nested.bundle import Bundle

QEMU = "qemu-system-x86_64"
# Later releases package virtiofsd written in Rust; Debian 12 has the one in C, in
# qemu-system-common.
_RUST_VIRTIOFSD = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd")
_C_VIRTIOFSD = "/usr/lib/qemu/virtiofsd"

# Port numbers of nested_protocol.h.
CONTROL, STDIN, STDOUT, STDERR, TERMINAL, SOCKETS = range(1, 7)
PORTS = (CONTROL, STDIN, STDOUT, STDERR, TERMINAL, SOCKETS)

# TCG loses the flags now and then when a guest's CMPXCHG16B is interrupted, and the guest kernel
# then dies of a double fault. The other features cost an emulated CPU time: a fifth level in each
# page walk, a change of state in every copy to and from user space.
_CPU = "max,-cx16,-la57,-smap,-smep,-pku"

# Without the devices that nothing here uses the kernel is up half a second earlier.
_MACHINE = "q35,hpet=off,i8042=off,sata=off,smbus=off"
_KERNEL_PARAMETERS = (
    # A kernel that has lost its way must not go on to write files.
    "console=ttyS0 quiet panic=-1 oops=panic"
    # nested_init.c brings up the others, when no more kernel code is patched.
    " maxcpus=1 noreplace-smp"
    # A busy host makes time jump; the kernel must not conclude that TSC or timer are broken.
    " tsc=reliable no_timer_check"
    # What costs time under TCG and guards nothing here.
    " mitigations=off nokaslr lsm=capability apparmor=0 random.trust_cpu=on"
)

# With oops=panic, what goes on after one of these for long has hung in it.
_KERNEL_END = re.compile(rb"\] (Oops|.*Oops: |Kernel panic)")
_END_SECONDS = 20.0

_MONITOR_SECONDS = 5.0
# What a CPU's state has lines of beside those that tell where it is.
_VECTORS = ("XMM", "FPR", "FCW", "YMM", "DR")

_KERNEL_FAILURE = re.compile(r"\] (BUG:|Oops|WARNING:|Kernel panic|.*Oops: )")


def why_not() -> str | None:
    """The sentence that says why this host cannot emulate a machine, or None if it can."""
    if shutil.which(QEMU) is None:
        return f"{QEMU} is not installed: apt install qemu-system-x86"
    daemon = _find_virtiofsd()
    if daemon is None:
        return "virtiofsd is missing: apt install virtiofsd (on Debian 12: qemu-system-common)"
    if daemon == _C_VIRTIOFSD and os.geteuid() != 0 and shutil.which("newuidmap") is None:
        return "without root, Debian 12's virtiofsd needs newuidmap: apt install uidmap"
    return None


def _find_virtiofsd() -> str | None:
    for path in (*_RUST_VIRTIOFSD, _C_VIRTIOFSD):
        if os.access(path, os.X_OK):
            return path
    return None


def virtiofsd_command(daemon: str, listener: int, *, root: bool) -> list[str]:
    """Shares the host's root directory on the listening socket ``listener``.

    Without ``root`` the user is root inside the machine, and what that root writes belongs to the
    user: the C daemon, which insists on changing its groups, runs in a user namespace.
    """
    command = [daemon, f"--fd={listener}"]
    if daemon != _C_VIRTIOFSD:
        sandbox = "chroot" if root else "none"
        return [*command, "--shared-dir=/", f"--sandbox={sandbox}", "--cache=always"]
    for option in ("source=/", "sandbox=chroot", "cache=always", "log_level=err"):
        command += ["-o", option]
    return command if root else ["unshare", "--user", "--map-root-user", "--map-auto", *command]


@contextlib.contextmanager
def _listener(path: Path) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A listening socket and one connected to it, so that neither daemon waits for the other."""
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as connected:
        listener.bind(str(path))
        listener.listen(1)
        connected.connect(str(path))
        yield listener, connected


class Machine:
    """A running emulated machine; ``ports[CONTROL]`` etc. are sockets to its virtio-serial ports.

    Leaving the context stops both processes.
    """

    def __init__(self, bundle: Bundle, *, cpus: int, memory: int) -> None:
        self._bundle = bundle
        self._cpus = cpus
        self._memory = memory
        self.ports: dict[int, socket.socket] = {}
        self._qemu: subprocess.Popen[bytes] | None = None
        self._virtiofsd: subprocess.Popen[bytes] | None = None
        self._monitor: socket.socket | None = None
        self._kernel_ended: float | None = None

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
        daemon = _find_virtiofsd()
        assert daemon is not None, "why_not() comes first"
        with contextlib.ExitStack() as handed_over:
            listener, share = handed_over.enter_context(_listener(self._directory / "fs"))
            theirs = {}
            for port in PORTS:
                self.ports[port], end = socket.socketpair()
                theirs[port] = handed_over.enter_context(end)
            self._monitor, end = socket.socketpair()
            handed_over.enter_context(end)
            self._virtiofsd = self._spawn(
                virtiofsd_command(daemon, listener.fileno(), root=os.geteuid() == 0),
                "virtiofsd.log",
                [listener],
            )
            self._qemu = self._spawn(
                self._qemu_command(share, theirs, end), "qemu.log", [share, end, *theirs.values()]
            )

    def _spawn(
        self, command: list[str], log: str, sockets: list[socket.socket]
    ) -> subprocess.Popen[bytes]:
        with (self._directory / log).open("wb") as output:
            return subprocess.Popen(
                # Whatever ends pyvmm, even SIGKILL, ends the machine with it.
                ["setpriv", "--pdeathsig", "KILL", *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[each.fileno() for each in sockets],
                start_new_session=True,
            )

    def _qemu_command(
        self, share: socket.socket, ports: Mapping[int, socket.socket], monitor: socket.socket
    ) -> list[str]:
        command = [QEMU, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        command += ["-M", _MACHINE, "-cpu", _CPU, "-accel", "tcg,thread=multi"]
        command += ["-smp", str(self._cpus), "-m", f"{self._memory >> 20}M"]
        command += ["-object", f"memory-backend-memfd,id=ram,size={self._memory},share=on"]
        command += ["-numa", "node,memdev=ram", "-rtc", "base=utc"]
        # The first virtio device, so that its ports are called vport0p*.
        command += ["-device", "virtio-serial-pci"]
        for port, end in ports.items():
            command += ["-chardev", f"socket,id=port{port},fd={end.fileno()}"]
            command += ["-device", f"virtserialport,nr={port},chardev=port{port}"]
        command += ["-chardev", f"socket,id=fs,fd={share.fileno()}"]
        command += ["-device", "vhost-user-fs-pci,chardev=fs,tag=host"]
        command += ["-serial", f"file:{self._console}"]
        command += ["-chardev", f"socket,id=monitor,fd={monitor.fileno()}"]
        command += ["-mon", "chardev=monitor,mode=control"]
        command += ["-kernel", str(self._bundle.kernel), "-initrd", str(self._bundle.initrd)]
        # TCG's guests read the host's counter. On a busy host the kernel first takes it for some
        # thousandths slower or faster, and KVM gives its guests a clock after that first guess.
        counter = f"tsc_early_khz={lib.host_tsc_khz()}"
        return [*command, "-append", f"{_KERNEL_PARAMETERS} {counter}"]

    def stop(self) -> None:
        """Ends the machine at once: what the command wrote to files is already with the host."""
        for end in (self._monitor, *self.ports.values()):
            if end is not None:
                end.close()
        for process in (self._qemu, self._virtiofsd):
            if process is not None:
                process.kill()
                process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def is_whole(self) -> bool:
        """Whether both processes are alive, and the kernel is not stuck in its own end."""
        processes = (self._qemu, self._virtiofsd)
        if not all(each is not None and each.poll() is None for each in processes):
            return False
        if self._kernel_ended is None and _KERNEL_END.search(self._read_console()):
            self._kernel_ended = time.monotonic()
        return self._kernel_ended is None or time.monotonic() - self._kernel_ended < _END_SECONDS

    def _read_console(self) -> bytes:
        return self._console.read_bytes() if self._console.exists() else b""

    def diagnosis(self) -> str:
        """What the console, QEMU and virtiofsd wrote last; of a kernel's end, how it began.

        While QEMU runs, the state of its CPUs and their interrupt controllers, twice.
        """
        lines = [f"  CPUs: {line}" for line in self._cpu_state()]
        for name in ("virtiofsd.log", "qemu.log", "console.log"):
            path = self._directory / name
            text = path.read_bytes().decode(errors="replace") if path.exists() else ""
            log = text.splitlines()
            start = next((i for i, line in enumerate(log) if _KERNEL_FAILURE.search(line)), None)
            shown = log[-12:] if start is None else log[start : start + 40]
            lines += [f"  {name}: {line.rstrip()}" for line in shown]
        return "\n".join(lines)

    def _cpu_state(self) -> list[str]:
        """Empty where QEMU does not answer its monitor (QMP)."""
        assert self._monitor is not None
        try:
            self._monitor.settimeout(_MONITOR_SECONDS)
            with self._monitor.makefile("rwb", buffering=0) as monitor:

                def ask(execute: str, **arguments: str) -> str:
                    request = {"execute": execute, "arguments": arguments}
                    monitor.write(json.dumps(request).encode() + b"\n")
                    while "return" not in (answer := json.loads(monitor.readline())):
                        pass  # the greeting, and events
                    return str(answer["return"])

                ask("qmp_capabilities")
                commands = ["info registers -a", "info registers -a", "info lapic"]
                text = [ask("human-monitor-command", **{"command-line": c}) for c in commands]
        except (OSError, ValueError):
            return []
        return [line for line in "".join(text).splitlines() if not line.startswith(_VECTORS)]
