"""Linux guests for tests: booted through the Python API, driven by shell commands.

A guest's shell reads its commands from the serial port, as plain lines without echo or prompt, and
marks the end and status of each. Beside it a loop prints a heartbeat, which is filtered out here:
so a guest that stopped altogether (`GuestLost`) can be told from one in which a command hangs.
"""

from __future__ import annotations

import base64
import itertools
import os
import re
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import pyvmm
import pyvmm.images
from pyvmm.guest.console import GuestConsole

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import Any

    from pyvmm.guest.console import Stream
    from pyvmm.images import ImagePaths

NESTED = "PYVMM_NESTED" in os.environ

# How long a guest may say nothing at all, while it boots or without a heartbeat.
SILENCE = 150.0
BOOT_TIMEOUT = 400.0
COMMAND_TIMEOUT = 240.0

# SYN, which no command prints, and which a terminal in raw mode passes.
_HEARTBEAT = b"\x16"
_HEARTBEAT_INTERVAL = 5

# The shell that obeys: no prompt, no echo, no line editing, no translation of line ends. `dmesg -n
# 1` keeps all messages but those of a panic off the console.
_OBEY = f"""
stty raw -echo
dmesg -n 1
(while :; do printf '\\026'; sleep {_HEARTBEAT_INTERVAL}; done) &
export HEARTBEAT=$!
echo obey-$((6 * 7))
while IFS= read -r line; do eval "$line"; done
"""


class GuestLost(AssertionError):
    """The guest stopped, or ended on its own: not even a heartbeat came."""


class Result(NamedTuple):
    """What a command in the guest returned and printed (both streams, as text)."""

    status: int
    output: str


class WatchedConsole(GuestConsole):
    """A console that gives up early, with GuestLost, when nothing comes for SILENCE seconds, or
    nothing will.

    Heartbeats are taken out of the output. `describe` tells where the guest is, for the message.
    """

    def __init__(self, stream: Stream, describe: Callable[[], str] = lambda: "") -> None:
        super().__init__(stream)
        self._describe = describe

    def _fill(self, deadline: float) -> bool:
        patience = time.monotonic() + SILENCE
        if super()._fill(min(deadline, patience)):
            self._pending = self._pending.replace(_HEARTBEAT, b"")
            return True
        silent = deadline > patience <= time.monotonic()
        if self.ended or silent:
            what = "ended" if self.ended else f"said nothing for {SILENCE:g} s"
            tail = self.transcript[-2000:].decode(errors="replace")
            raise GuestLost(f"the guest {what} {self._describe()}; before:\n{tail}")
        return False


class LinuxGuest:
    """A guest with a root shell on its serial port that obeys (see `obey`)."""

    def __init__(self, vm: pyvmm.VM) -> None:
        self.vm = vm
        self.console = WatchedConsole(vm.serial, self.describe)
        self._numbers = itertools.count(1)
        self._busy = False

    @property
    def usable(self) -> bool:
        """Whether the shell waits for a command, as far as is known."""
        return self.vm.outcome is None and not self._busy

    def obey(self) -> None:
        """Turns the shell that reads the serial port into one for `run`."""
        self.console.send(f'eval "$(echo {_encoded(_OBEY)} | base64 -d)"\n')
        self.await_obedience()

    def await_obedience(self) -> None:
        self.console.expect("obey-42\n", timeout=BOOT_TIMEOUT)

    def start(self, script: str) -> str:
        """Gives the shell a script; `finish` waits for its end. Returns the mark of the end."""
        self._busy = True
        mark = f"end-{next(self._numbers)}-of-command"
        # A shell of its own: a syntax error or `exit` ends it alone.
        line = f"echo {_encoded(script)} | base64 -d >/tmp/script; sh /tmp/script"
        self.console.send(f"{line} </dev/null 2>&1; status=$?; echo; echo {mark} $status\n")
        return mark

    def finish(self, mark: str, *, timeout: float = COMMAND_TIMEOUT) -> Result:
        end = re.compile(rb"\n%s (\d+)\n" % mark.encode())
        text = self.console.expect(end, timeout=timeout)
        match = end.search(text)
        assert match is not None
        self._busy = False
        return Result(int(match[1]), text[: match.start()].decode(errors="replace"))

    def run(self, script: str, *, timeout: float = COMMAND_TIMEOUT) -> Result:
        """Runs a shell script, which has no input, to its end."""
        return self.finish(self.start(script), timeout=timeout)

    def check(self, script: str, *, timeout: float = COMMAND_TIMEOUT) -> str:
        """What the script printed, without white space around it; its status must be 0."""
        status, output = self.run(f"set -e\n{script}", timeout=timeout)
        assert status == 0, f"{script!r} in the guest ended with status {status}:\n{output}"
        return output.strip()

    def await_state(self, state: str) -> None:
        """Waits until ``vm.state`` is that."""
        deadline = time.monotonic() + COMMAND_TIMEOUT
        while self.vm.state != state:
            assert time.monotonic() < deadline, f"the guest is {self.vm.state}, not {state}"
            time.sleep(0.02)

    def poweroff(self) -> pyvmm.Outcome:
        """Has the guest sync and power off; how the machine ended."""
        self.console.send("sync; poweroff -f\n")
        return self.vm.wait(timeout=BOOT_TIMEOUT)

    def describe(self) -> str:
        """Where each vCPU is, for the report about a guest that stopped."""
        self.vm.pause()
        board = self.vm._board
        if board is None:
            return f"and the machine is off: {self.vm.outcome}"
        return "with " + ", ".join(
            f"vCPU {vcpu.index} at rip {vcpu.handle.get_regs().rip:#x}, "
            f"rflags {vcpu.handle.get_regs().rflags:#x}, mp_state {vcpu.handle.get_mp_state()}"
            for vcpu in board.vcpus
        )


def image(name: str, kernel: str | None = None) -> ImagePaths:
    """A built image; the emulated machine has no network to build one in."""
    return pyvmm.images.path(name, kernel=kernel, build=not NESTED)


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """A directory for disk images, in memory inside the emulated machine."""
    with tempfile.TemporaryDirectory(dir="/dev/shm" if NESTED else None) as name:
        yield Path(name)


def boot_tiny(*, append: str = "", **settings: Any) -> LinuxGuest:
    """Boots the initramfs of the tiny image, without its disk, up to its shell."""
    parameters = f"console=ttyS0 quiet {append} {pyvmm.images.run_parameter(_OBEY)}"
    tiny = image("tiny")
    settings = {"kernel": tiny.kernel, "initrd": tiny.initrd, **settings}
    vm = pyvmm.VM(**settings, serial="pipe", append=parameters)
    try:
        vm.start()
        guest = LinuxGuest(vm)
        guest.await_obedience()
    except BaseException:
        vm.close()
        raise
    return guest


def _encoded(script: str) -> str:
    return base64.b64encode(script.encode()).decode()
