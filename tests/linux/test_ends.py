"""How `pyvmm run` ends: panics, time limits, signals, keys; and what it leaves behind."""

from __future__ import annotations

import signal
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from support.linux_guest import BOOT_TIMEOUT, image
from support.monitor import Monitor

import pyvmm.images

Start = Callable[..., Monitor]
MakeDisk = Callable[..., Path]

# The first line of the kernel's log, which comes when the serial console is there.
BOOTING = "Linux version"
SIZE = (101, 33)


def tiny(*, script: str = "") -> list[object]:
    """Options for the tiny image's initramfs; with `script` it runs that and powers off."""
    paths = image("tiny")
    options: list[object] = ["--kernel", paths.kernel, "--initrd", paths.initrd]
    if script:
        options += ["--append", f"quiet {pyvmm.images.run_parameter(script)}"]
    return options


class TestPanic:
    def test_without_a_root_device(self, monitor: Start) -> None:
        pyvmm_run = monitor("--kernel", image("tiny").kernel, "--append", "quiet root=/dev/none")
        status, stderr = pyvmm_run.wait()
        assert status == 80
        error, *notes = stderr.splitlines()
        assert error.startswith("pyvmm: error: the guest kernel panicked: VFS: Unable to mount")
        assert "its console said:" in notes
        assert any("/dev/none" in line or "unknown-block" in line for line in notes)
        assert any("Kernel panic - not syncing: VFS" in line for line in notes)

    def test_of_a_kernel_that_reboots_at_once(self, monitor: Start) -> None:
        pyvmm_run = monitor("--kernel", image("tiny").kernel, "--append", "quiet panic=-1")
        status, stderr = pyvmm_run.wait()
        assert status == 80
        assert "Unable to mount root fs" in stderr

    def test_when_the_initramfs_finds_no_root_device(self, monitor: Start) -> None:
        status, stderr = monitor(*tiny(), "--append", "quiet root=/dev/none").wait()
        assert status == 80
        assert stderr.startswith("pyvmm: error: the guest kernel panicked: Attempted to kill init!")
        assert "  | init: there is no root device /dev/none" in stderr

    def test_without_any_console_through_pvpanic(self, monitor: Start) -> None:
        pyvmm_run = monitor(
            *tiny(script="echo c >/proc/sysrq-trigger"), "--serial=none", "--console=none"
        )
        status, stderr = pyvmm_run.wait()
        assert status == 80
        assert stderr.splitlines()[0] == (
            "pyvmm: error: the guest kernel panicked: it said so through pvpanic"
        )


class TestTime:
    def test_a_guest_that_does_not_end_is_ended(self, monitor: Start) -> None:
        status, stderr = monitor(*tiny(), "--timeout", 5).wait()
        assert status == 124
        assert stderr.startswith("pyvmm: error: the guest did not end within 5 s\n")

    def test_one_that_ends_in_time_is_not(self, monitor: Start) -> None:
        assert monitor(*tiny(script="exit 7"), "--timeout", BOOT_TIMEOUT).wait() == (0, "")


class TestSignals:
    @pytest.mark.parametrize(
        ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["TERM", "INT"]
    )
    def test_end_the_guest_and_restore_the_terminal(
        self, number: signal.Signals, status: int, monitor: Start
    ) -> None:
        pyvmm_run = monitor(*tiny(), terminal=SIZE)
        before = termios.tcgetattr(pyvmm_run.terminal_fd)
        pyvmm_run.console.expect(BOOTING, timeout=BOOT_TIMEOUT)
        assert termios.tcgetattr(pyvmm_run.terminal_fd) != before, "raw mode"
        pyvmm_run.signal(number)
        assert pyvmm_run.wait() == (status, "")
        assert termios.tcgetattr(pyvmm_run.terminal_fd) == before

    def test_without_a_terminal(self, monitor: Start) -> None:
        pyvmm_run = monitor(*tiny())
        pyvmm_run.console.expect(BOOTING, timeout=BOOT_TIMEOUT)
        pyvmm_run.signal(signal.SIGTERM)
        assert pyvmm_run.wait() == (143, "")


class TestKeys:
    def test_escape_x_quits_and_restores_the_terminal(self, monitor: Start) -> None:
        pyvmm_run = monitor(*tiny(), terminal=SIZE)
        before = termios.tcgetattr(pyvmm_run.terminal_fd)
        pyvmm_run.console.expect(BOOTING, timeout=BOOT_TIMEOUT)
        pyvmm_run.console.send(b"\x01x")
        assert pyvmm_run.wait() == (0, "")
        assert termios.tcgetattr(pyvmm_run.terminal_fd) == before

    def test_interrupt_key_and_window_size_reach_the_guest(self, monitor: Start) -> None:
        """On hvc0, which knows the size of the window."""
        pyvmm_run = monitor(
            *tiny(),
            "--append", "quiet",
            "--console=stdio",
            terminal=SIZE,
        )  # fmt: skip
        console = pyvmm_run.console
        console.expect("# ", timeout=BOOT_TIMEOUT)
        console.send("echo size=$(stty size)\r")
        console.expect("size=33 101\r\n", timeout=60)
        # What it waits for is not in the line that it echoes.
        console.send(
            "trap 'told=1' WINCH; echo sum $((40 + 2));"
            " while [ -z $told ]; do sleep 1; done; echo size=$(stty size)\r"
        )
        console.expect("sum 42\r\n", timeout=60)
        pyvmm_run.resize((77, 22))
        console.expect("size=22 77\r\n", timeout=60)
        # Its word says that the terminal is its own by now, and not the first shell's.
        console.send("sh -c 'echo sum $((50 + 2)); sleep 1000'\r")
        console.expect("sum 52\r\n", timeout=60)
        console.send(b"\x03")
        console.expect("# ", timeout=60)
        console.send("exit\r")
        assert pyvmm_run.wait() == (0, "")


def test_standard_input_may_be_a_pipe_with_commands(monitor: Start) -> None:
    pyvmm_run = monitor(*tiny(), "--append", "quiet")
    pyvmm_run.console.send("echo sum $((40 + 2)); exit\n")
    pyvmm_run.console.expect("sum 42", timeout=BOOT_TIMEOUT)
    assert pyvmm_run.wait() == (0, "")


class TestLocks:
    def test_an_image_that_a_guest_writes_is_not_given_to_another(
        self, boot: Callable[..., object], monitor: Start, disk: MakeDisk
    ) -> None:
        path = disk("mine")
        boot(disks=[path])
        for options in ("", ",readonly=on"):
            status, stderr = monitor(*tiny(), f"--disk={path}{options}").wait()
            assert status == 2
            assert stderr.startswith(
                f"pyvmm: error: the disk image {path} is in use by another process: "
            )

    def test_readers_share(
        self, boot: Callable[..., object], monitor: Start, disk: MakeDisk
    ) -> None:
        path = disk("ours")
        boot(disks=[{"path": path, "readonly": True}])
        script = "head -c 4 /dev/vda >/dev/null && echo readable"
        pyvmm_run = monitor(*tiny(script=script), f"--disk={path},readonly=on")
        pyvmm_run.console.expect("readable", timeout=BOOT_TIMEOUT)
        assert pyvmm_run.wait() == (0, "")
