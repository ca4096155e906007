"""`pyvmm nested` from both sides: how the host sees a command in there, and what is in there.

The host's half starts an emulated machine for each test, so it cannot run inside one.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.qmp_client import RawClient

from pyvmm.errors import ExitStatus
from pyvmm.nested import why_not

NESTED = "PYVMM_NESTED" in os.environ
PYVMM = [sys.executable, "-m", "pyvmm"]

inside = pytest.mark.skipif(not NESTED, reason="looks at the emulated machine from inside")
pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def outside() -> None:
    if NESTED:
        pytest.skip("starts an emulated machine, which does not work inside one")
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


def nested(*command: str, **options: object) -> subprocess.CompletedProcess[bytes]:
    options = {"stdin": subprocess.DEVNULL, "timeout": 300, **options}
    return subprocess.run([*PYVMM, "nested", "--", *command], capture_output=True, **options)


@contextlib.contextmanager
def running(*command: str, **options: object) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a machine, with a pipe from its stdout; killed if the test does not end it."""
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, **options}
    with subprocess.Popen([*PYVMM, "nested", "--", *command], **options) as process:
        try:
            yield process
        finally:
            process.kill()


def read_until(fd: int, wanted: bytes, seconds: float = 240) -> bytes:
    """What comes out of ``fd`` up to ``wanted``, or a failure that shows it."""
    data, end = b"", time.monotonic() + seconds
    while wanted not in data:
        ready, _, _ = select.select([fd], [], [], max(0.0, end - time.monotonic()))
        try:
            chunk = os.read(fd, 65536) if ready else b""
        except OSError:  # EIO: the other side of the terminal is closed
            chunk = b""
        assert chunk, f"{wanted!r} never came, but {data!r}"
        data += chunk
    return data


@pytest.mark.without_kvm
@pytest.mark.usefixtures("outside")
class TestFromTheHost:
    def test_output_streams_and_status_are_the_commands_own(self) -> None:
        result = nested("sh", "-c", "echo out; echo err >&2; exit 7")
        assert (result.stdout, result.stderr, result.returncode) == (b"out\n", b"err\n", 7)

    def test_bytes_pass_unchanged_in_both_directions_to_their_end(self) -> None:
        data = os.urandom(3 << 20) + bytes(range(256))
        result = nested("sh", "-c", "tee /dev/stderr", stdin=None, input=data)
        assert hashlib.sha256(result.stdout).digest() == hashlib.sha256(data).digest()
        assert hashlib.sha256(result.stderr).digest() == hashlib.sha256(data).digest()
        assert result.returncode == 0

    def test_closed_streams(self) -> None:
        script = f"{sys.executable} -m pyvmm nested -- sh -c 'cat; exit 4' <&- >&- 2>&-"
        assert subprocess.run(["sh", "-c", script], timeout=300).returncode == 4

    def test_directory_environment_arguments_and_files(self, tmp_path: Path) -> None:
        arguments = ["", "two words", "ünïcode", "new\nline"]
        script = (
            "import mmap, os, sys\n"
            "file = open('written', 'w+b'); file.truncate(4096)\n"
            "mapping = mmap.mmap(file.fileno(), 4096); mapping[:5] = b'here!'\n"
            "seen = [sys.argv[1:], os.getcwd(), os.environ['GREETING'], os.umask(0)]\n"
            "print(ascii(seen), flush=True)\n"
            "os._exit(0)\n"
        )
        environment = {**os.environ, "GREETING": "hello", "SSH_AUTH_SOCK": "/nowhere"}
        result = nested(
            sys.executable, "-I", "-c", script, *arguments, cwd=tmp_path, env=environment
        )
        assert result.stderr == b""
        mask = os.umask(0o077)
        os.umask(mask)
        assert result.stdout.decode() == f"{[arguments, str(tmp_path), 'hello', mask]!a}\n"
        assert (tmp_path / "written").read_bytes() == b"here!".ljust(4096, b"\0")

    @pytest.mark.parametrize(
        ("command", "status", "message"),
        [
            (["sh", "-c", "kill -SEGV $$"], 128 + signal.SIGSEGV, b""),
            (["/no/such"], 127, b"pyvmm nested: /no/such: No such file or directory\n"),
            (["/etc/passwd"], 126, b"pyvmm nested: /etc/passwd: Permission denied\n"),
        ],
    )
    def test_failures_end_as_in_a_shell(
        self, command: list[str], status: int, message: bytes
    ) -> None:
        result = nested(*command)
        assert (result.returncode, result.stderr) == (status, message)

    def test_what_the_command_leaves_running_does_not_hold_it_up(self) -> None:
        result = nested("sh", "-c", "sleep 1000 & echo done")
        assert (result.returncode, result.stdout) == (0, b"done\n")

    def test_a_reader_that_leaves_ends_the_writer(self) -> None:
        with running("yes") as process:
            assert process.stdout is not None
            assert process.stdout.read(4) == b"y\ny\n"
            process.stdout.close()
            assert process.wait(300) == 128 + signal.SIGPIPE

    def test_signals_reach_the_command_and_its_status_counts(self) -> None:
        script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do sleep 0.1; done"
        with running("sh", "-c", script) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGTERM)
            assert process.stdout.read() == b"caught\n"
            assert process.wait(300) == 3

    def test_a_second_signal_stops_the_machine(self) -> None:
        script = "trap 'echo caught' INT; echo ready; while :; do sleep 0.1; done"
        with running("sh", "-c", script) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
            process.send_signal(signal.SIGINT)
            assert process.stdout.readline() == b"caught\n"
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 128 + signal.SIGINT

    def test_a_timeout_ends_the_machine(self) -> None:
        result = subprocess.run(
            [*PYVMM, "nested", "--timeout", "1", "--", "true"], capture_output=True, timeout=60
        )
        assert result.returncode == 124
        assert b"--timeout" in result.stderr

    def test_a_terminal_is_a_terminal_in_there(self) -> None:
        """Line editing, ^C, window size and its changes; stderr, a pipe, stays one."""
        ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 33, 77, 0, 0))
        before = termios.tcgetattr(theirs)
        with running(
            *("bash", "--norc", "--noediting", "-i"),
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, "PS1": "$ "},
        ) as process:
            assert process.stderr is not None
            read_until(process.stderr.fileno(), b"$ ")
            os.write(ours, b"stty size; test -t 2 || echo stderr is no tty$((1 + 2))\r")
            assert b"33 77" in read_until(ours, b"tty3\r\n")
            os.write(ours, b"sleep 1000\r")
            read_until(ours, b"sleep 1000\r\n")
            time.sleep(2)
            os.write(ours, b"\x03")
            read_until(ours, b"^C")
            fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 44, 88, 0, 0))
            process.send_signal(signal.SIGWINCH)
            time.sleep(1)
            os.write(ours, b"stty size; exit 5\r")
            read_until(ours, b"44 88\r\n")
            assert process.wait(60) == 5
        assert termios.tcgetattr(theirs) == before
        os.close(ours)
        os.close(theirs)

    @pytest.mark.parametrize("which", [0, 1], ids=["virtiofsd", "qemu"])
    def test_a_machine_that_breaks_down_is_told_of(self, which: int) -> None:
        with running("sh", "-c", "echo ready; sleep 1000", stderr=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.readline()
            os.kill(children_of(process.pid)[which], signal.SIGKILL)
            assert process.wait(60) == ExitStatus.NO_KVM
            message = process.stderr.read()
            assert b"pyvmm: error: the emulated machine broke down:\n" in message

    def test_the_control_socket_of_a_machine_in_there_is_out_here(self, tmp_path: Path) -> None:
        path = tmp_path / "qmp"
        options = ["--image=tiny", "--accel=nested", "--serial=none", f"--qmp=unix:{path}"]
        with subprocess.Popen([*PYVMM, "run", *options], stdin=subprocess.DEVNULL) as process:
            try:
                while not path.exists():
                    assert process.poll() is None
                    time.sleep(0.05)
                with RawClient(path, timeout=120) as first, RawClient(path) as second:
                    assert first.execute("query-status")["running"] is True
                    second.execute("stop")
                    first.event("STOP")
                    first.execute("quit")
                    for client in (first, second):
                        assert client.event("SHUTDOWN")["data"]["reason"] == "host-qmp-quit"
                        with pytest.raises(EOFError):
                            client.receive()
                assert process.wait(60) == 0
            finally:
                process.kill()
        assert not path.exists()

    def test_nothing_is_left_when_it_is_killed(self) -> None:
        with running("sh", "-c", "echo ready; sleep 1000") as process:
            assert process.stdout is not None
            process.stdout.readline()
            helpers = children_of(process.pid)
            assert len(helpers) == 2
            process.kill()
        deadline = time.monotonic() + 10
        while any(is_running(pid) for pid in helpers):
            assert time.monotonic() < deadline, "QEMU or virtiofsd outlived pyvmm nested"
            time.sleep(0.05)


def children_of(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(word) for word in text.split()]


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@inside
class TestFromInside:
    def test_kvm_is_there_and_makes_machines(self) -> None:
        with Path("/dev/kvm").open("rb", buffering=0) as kvm:
            assert fcntl.ioctl(kvm, 0xAE00) == 12  # KVM_GET_API_VERSION
            os.close(fcntl.ioctl(kvm, 0xAE01))  # KVM_CREATE_VM

    @pytest.mark.parametrize("device", ["net/tun", "vhost-net", "vhost-vsock", "loop-control"])
    def test_opening_a_device_node_loads_its_module(self, device: str) -> None:
        os.close(os.open(f"/dev/{device}", os.O_RDWR))

    def test_modprobe_loads_modules_with_parameters(self) -> None:
        subprocess.run(["modprobe", "null_blk", "nr_devices=1", "gb=1"], check=True)
        assert Path("/sys/block/nullb0/size").read_text().strip() == str((1 << 30) // 512)

    def test_file_systems_and_loopback(self) -> None:
        mounts = dict(line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines())
        assert mounts["/"] == "virtiofs"
        assert mounts["/run"] == mounts["/dev/shm"] == "tmpfs"
        assert (
            "UP"
            in subprocess.run(["ip", "link", "show", "lo"], capture_output=True).stdout.decode()
        )

    def test_the_clock_is_right(self) -> None:
        with tempfile.NamedTemporaryFile(dir="/var/tmp") as stamped_by_the_host:
            assert abs(Path(stamped_by_the_host.name).stat().st_mtime - time.time()) < 5
