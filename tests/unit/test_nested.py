"""The host's side of `pyvmm nested`, with the test in the place of the emulated machine."""

from __future__ import annotations

import contextlib
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import pyvmm.nested
import pyvmm.nested.bundle
import pyvmm.nested.session
from pyvmm._core import lib
from pyvmm.errors import NoKvmError, UsageError
from pyvmm.nested import NestedConfig, machine, run_nested, session
from pyvmm.nested.bundle import Bundle
from pyvmm.nested.machine import CONTROL, PORTS, STDERR, STDIN, STDOUT
from pyvmm.nested.session import MachineFailed

HEADER = Path(machine.__file__).parent.parent / "_native" / "nested_protocol.h"
RECORD = struct.Struct("<IIQQQ")
SIGNAL, _, END, CLOSED, HELLO, ALIVE, EXIT = range(1, 8)

# The session uses its process's own streams, so it runs in one of its own.
SESSION = """
import socket, sys
from pyvmm.errors import PyvmmError
from pyvmm.nested import machine, session
session._START_SECONDS = session._SILENCE_SECONDS = float(sys.argv[1])
session._POLL_SECONDS = 0.1
class Machine:
    ports = dict(zip(machine.PORTS, (socket.socket(fileno=int(n)) for n in sys.argv[4:])))
    def is_whole(self): return sys.argv[3] == "whole"
    def diagnosis(self): return "  console.log: last words"
import time
deadline = time.monotonic() + float(sys.argv[2]) if sys.argv[2] else None
run = session.Session(Machine(), ["command", "an argument", ""], deadline=deadline)
try:
    run.await_machine()
    status = run.run()
except session.Interrupted as interrupted:
    sys.exit(128 + interrupted.number)
except PyvmmError as error:
    sys.stderr.write(f"{type(error).__name__}: {error}")
    sys.exit(1)
sys.exit(status)
"""


class Host:
    """The process with the session, and this side's ends of its ports."""

    def __init__(self, process: subprocess.Popen[bytes], ports: dict[int, socket.socket]) -> None:
        self.process = process
        self.ports = ports

    def send(self, kind: int, value: int = 0, *counts: int) -> None:
        self.ports[CONTROL].sendall(RECORD.pack(kind, value, *counts, *[0] * (3 - len(counts))))

    def receive(self) -> tuple[int, int, int]:
        kind, value, count, _, _ = RECORD.unpack(self._exactly(RECORD.size))
        return kind, value, count

    def start(self) -> list[bytes]:
        """Greets the session; the strings of its start message."""
        self.send(HELLO)
        (size,) = struct.unpack("<I", self._exactly(4))
        return self._exactly(size).removesuffix(b"\0").split(b"\0")

    def ends(self) -> tuple[int, bytes, bytes]:
        out, err = self.process.communicate(timeout=20)
        return self.process.returncode, out, err

    def _exactly(self, size: int) -> bytes:
        return self.ports[CONTROL].recv(size, socket.MSG_WAITALL)


@contextlib.contextmanager
def host(
    *, patience: float = 20, deadline: str = "", cwd: Path | None = None, state: str = "whole"
) -> Iterator[Host]:
    pairs = [socket.socketpair() for _ in PORTS]
    numbers = [theirs.fileno() for _, theirs in pairs]
    with subprocess.Popen(
        [sys.executable, "-c", SESSION, str(patience), deadline, state, *map(str, numbers)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=numbers,
        cwd=cwd,
    ) as process:
        for _, theirs in pairs:
            theirs.close()
        ports = {port: ours for port, (ours, _) in zip(PORTS, pairs, strict=True)}
        for ours in ports.values():
            ours.settimeout(20)
        try:
            yield Host(process, ports)
        finally:
            process.kill()
            for ours in ports.values():
                ours.close()


def catches(pid: int, number: int) -> bool:
    match = re.search(r"^SigCgt:\t(.*)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert match is not None
    return bool(int(match[1], 16) & (1 << (number - 1)))


def test_the_rate_of_the_time_stamp_counter_is_measured_well() -> None:
    rates = [lib.host_tsc_khz() for _ in range(5)]
    assert min(rates) > 100_000
    assert sorted(rates)[3] - sorted(rates)[1] < min(rates) / 10_000, rates


def test_the_protocol_is_that_of_the_header() -> None:
    text = HEADER.read_text()
    names = re.findall(r"^    (?:PORT|KIND)_(\w+)(?: = 1)?,", text, re.MULTILINE)
    ports, kinds = names[: len(PORTS)], names[len(PORTS) :]
    assert [getattr(machine, name) for name in ports] == list(PORTS)
    assert [getattr(session, f"_{name}") for name in kinds] == [1, 2, 3, 4, 5, 6, 7]


def test_the_command_is_told_all_about_itself(tmp_path: Path) -> None:
    with host(cwd=tmp_path) as it:
        seconds, _, terminals, raw, _, _, mask, name, directory, *rest = it.start()
        assert abs(int(seconds) - time.time()) < 60
        assert (terminals, raw) == (b"0", b"0")
        assert int(mask) == session.umask()
        assert (name.decode(), directory.decode()) == (socket.gethostname(), str(tmp_path))
        assert rest[:4] == [b"3", b"command", b"an argument", b""]
        environment = rest[5:]
        assert int(rest[4]) == len(environment)
        assert b"PYVMM_NESTED=1" in environment


def test_output_that_comes_after_the_exit_is_not_lost() -> None:
    with host() as it:
        it.start()
        it.send(EXIT, 3 << 8, 5, 4, 0)
        it.ports[STDERR].sendall(b"err\n")
        it.ports[STDOUT].sendall(b"late\n")
        assert it.ends() == (3, b"late\n", b"err\n")


def test_death_by_a_signal_is_128_and_its_number() -> None:
    with host() as it:
        it.start()
        it.send(EXIT, signal.SIGSEGV)
        assert it.ends()[0] == 128 + signal.SIGSEGV


def test_stdin_is_passed_on_and_its_end_told_by_its_length() -> None:
    with host() as it:
        it.start()
        assert it.process.stdin is not None
        it.process.stdin.write(b"some input")
        it.process.stdin.close()
        it.process.stdin = None
        assert it.receive() == (END, STDIN, len(b"some input"))
        assert it.ports[STDIN].recv(100) == b"some input"
        it.send(EXIT, 0)
        assert it.ends()[0] == 0


def test_a_closed_output_is_told_and_does_not_hold_up_the_end() -> None:
    with host() as it:
        it.start()
        assert it.process.stdout is not None
        it.process.stdout.close()
        it.ports[STDOUT].sendall(b"nobody reads this")
        assert it.receive() == (CLOSED, STDOUT, 0)
        it.process.stdout = None
        it.send(EXIT, 0, 1000)
        assert it.ends()[0] == 0


def test_the_first_signal_is_passed_on_and_the_second_ends_it() -> None:
    with host() as it:
        it.start()
        it.process.send_signal(signal.SIGTERM)
        assert it.receive() == (SIGNAL, signal.SIGTERM, 0)
        it.process.send_signal(signal.SIGINT)
        assert it.ends()[0] == 128 + signal.SIGINT


def test_a_signal_before_the_command_runs_ends_it() -> None:
    with host() as it:
        # The session has begun to listen once it handles signals: SIGWINCH would be ignored else.
        caught = re.compile(r"^SigCgt:\t.*(....)$", re.MULTILINE)
        while not int(caught.findall(Path(f"/proc/{it.process.pid}/status").read_text())[0], 16) & (
            1 << (signal.SIGTERM - 1)
        ):
            pass
        it.process.send_signal(signal.SIGTERM)
        assert it.ends()[0] == 128 + signal.SIGTERM


@pytest.mark.parametrize("started", [False, True], ids=["starting", "running"])
@pytest.mark.parametrize("closes", [False, True], ids=["silent", "gone"])
def test_a_machine_that_fails_is_told_with_its_last_words(started: bool, closes: bool) -> None:
    with host(patience=0.3) as it:
        if started:
            it.start()
        if closes:
            it.ports[CONTROL].close()
        status, _, message = it.ends()
        what = (
            "broke down"
            if closes
            else "has hung (silent for 0 s)"
            if started
            else "did not come up in 0 s"
        )
        expected = f"MachineFailed: the emulated machine {what}:\n  console.log: last words"
        assert (status, message.decode()) == (1, expected)


def test_a_machine_that_is_alive_may_be_silent() -> None:
    with host(patience=0.6) as it:
        it.start()
        for _ in range(10):
            it.send(ALIVE)
            with pytest.raises(subprocess.TimeoutExpired):
                it.process.wait(0.1)
        it.send(EXIT, 0)
        assert it.ends()[0] == 0


def test_a_machine_whose_kernel_is_at_its_end_is_not_waited_for() -> None:
    with host(state="broken") as it:
        it.start()
        it.send(ALIVE)
        status, _, message = it.ends()
        assert (status, message.splitlines()[0]) == (
            1,
            b"MachineFailed: the emulated machine broke down:",
        )


def test_a_kernel_that_is_stuck_in_its_own_end_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_END_SECONDS", 0.1)
    emulated = machine.Machine(Bundle(tmp_path, tmp_path), cpus=1, memory=1 << 30)
    emulated._console = tmp_path / "console.log"
    emulated._qemu = emulated._virtiofsd = process = subprocess.Popen(["sleep", "60"])
    try:
        emulated._console.write_text(
            "[    9.1] watchdog: BUG: soft lockup - CPU#0 stuck for 22s!\n"
        )
        assert emulated.is_whole()
        with emulated._console.open("a") as console:
            console.write("[   96.4] Oops: stack guard page: 0000 [#1] PREEMPT SMP NOPTI\n")
        assert emulated.is_whole()  # it has some seconds to say why
        time.sleep(0.15)
        assert not emulated.is_whole()
    finally:
        process.kill()
        process.wait()
    assert not machine.Machine(Bundle(tmp_path, tmp_path), cpus=1, memory=1 << 30).is_whole()


def test_the_timeout_covers_start_and_command() -> None:
    with host(deadline="0.3") as it:
        status, _, message = it.ends()
        assert (status, message[:12]) == (1, b"GuestTimeout")


class FakeMachine:
    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> FakeMachine:
        return self

    def __exit__(self, *_: object) -> None: ...


class FakeSession:
    """Comes up at the attempt number ``good``; then breaks down if ``breaks``."""

    attempts = 0
    good = 1
    breaks = False

    def __init__(self, *_: object, **__: object) -> None:
        self.started = False

    def await_machine(self) -> None:
        type(self).attempts += 1
        if self.attempts < self.good:
            raise MachineFailed("no machine")

    def run(self) -> int:
        self.started = True
        if self.breaks:
            raise MachineFailed("broke down")
        return 42


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> type[FakeSession]:
    class Fresh(FakeSession):
        pass

    monkeypatch.setattr(pyvmm.nested, "why_not", lambda: None)
    monkeypatch.setattr(pyvmm.nested, "Machine", FakeMachine)
    monkeypatch.setattr(pyvmm.nested.session, "Session", Fresh)
    monkeypatch.setattr(pyvmm.nested.bundle, "bundle", lambda: None)
    return Fresh


def test_a_machine_that_does_not_come_up_is_started_once_more_and_said_so(
    fakes: type[FakeSession], capsys: pytest.CaptureFixture[str]
) -> None:
    fakes.good = 2
    assert run_nested(["command"]) == 42
    assert capsys.readouterr().err == "pyvmm nested: no machine\npyvmm nested: trying again\n"


def test_two_failed_starts_are_an_error(fakes: type[FakeSession]) -> None:
    fakes.good = 3
    with pytest.raises(NoKvmError, match="no machine"):
        run_nested(["command"])


def test_a_command_never_runs_twice(fakes: type[FakeSession]) -> None:
    fakes.breaks = True
    with pytest.raises(NoKvmError, match="broke down"):
        run_nested(["command"])
    assert fakes.attempts == 1


def test_no_emulator_no_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoKvmError, match="apt install qemu-system-x86"):
        run_nested(["true"])
    (tmp_path / machine.QEMU).touch(0o755)
    monkeypatch.setattr(machine, "_RUST_VIRTIOFSD", ())
    monkeypatch.setattr(machine, "_C_VIRTIOFSD", "/no/virtiofsd")
    assert "virtiofsd is missing" in str(machine.why_not())


def test_both_kinds_of_virtiofsd_share_the_root() -> None:
    rust, c = "/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd"
    share = ["--fd=7", "--shared-dir=/", "--sandbox=chroot", "--cache=always"]
    assert machine.virtiofsd_command(rust, 7, root=True) == [rust, *share]
    assert "--sandbox=none" in machine.virtiofsd_command(rust, 7, root=False)
    options = machine.virtiofsd_command(c, 7, root=True)
    assert options[:2] == [c, "--fd=7"]
    assert set(options[3::2]) == {"source=/", "sandbox=chroot", "cache=always", "log_level=err"}
    user = machine.virtiofsd_command(c, 7, root=False)
    assert user == ["unshare", "--user", "--map-root-user", "--map-auto", *options]


def test_the_environment_leaves_out_what_names_the_hosts_sessions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("DBUS_SESSION_BUS_ADDRESS", "SSH_AUTH_SOCK", "XDG_RUNTIME_DIR"):
        monkeypatch.setenv(name, "/run/user/0/x")
    monkeypatch.setenv("PYTHONPATH", "kept")
    monkeypatch.setenv("PATH", "/usr/bin")
    environment = session.environment()
    assert not {"DBUS_SESSION_BUS_ADDRESS", "SSH_AUTH_SOCK", "XDG_RUNTIME_DIR"} & {*environment}
    assert environment["PYTHONPATH"] == "kept"
    assert environment["PATH"] == "/run/pyvmm:/usr/bin"
    assert environment["PYVMM_NESTED"] == "1"


def test_settings() -> None:
    config = NestedConfig()
    assert config.cpus == 1
    assert config.memory <= 4 << 30
    assert NestedConfig(memory="2G", cpus=3).memory == 2 << 30
    with pytest.raises(UsageError, match="memory=100M is too small: the least is 512M"):
        NestedConfig(memory="100M")
