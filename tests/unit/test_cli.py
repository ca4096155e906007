"""The command line: dispatch, errors as one sentence, and `pyvmm run` up to the machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

import pyvmm.images
import pyvmm.kvm.probe
import pyvmm.machine.vm
import pyvmm.nested
from pyvmm import cli
from pyvmm.cli import run
from pyvmm.cli.parser import parse
from pyvmm.config import DiskConfig, NetConfig, VmConfig
from pyvmm.errors import EXIT_STATUSES, GuestPanic, UsageError
from pyvmm.images import ImagePaths
from pyvmm.machine.events import Event
from pyvmm.machine.vm import Outcome
from pyvmm.schema import MIB

PYVMM = [sys.executable, "-m", "pyvmm"]


def run_pyvmm(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*PYVMM, *arguments], capture_output=True, text=True, **options)


class TestDispatch:
    def test_every_command_is_a_module_and_the_other_way_round(self) -> None:
        package = Path(cli.__file__).parent
        modules = {path.stem for path in package.glob("*.py")} - {"__init__", "parser"}
        assert set(cli.COMMANDS) == modules

    @pytest.mark.parametrize("name", cli.COMMANDS)
    def test_every_command_has_help(self, name: str, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit) as status:
            cli.main([name, "--help"])
        assert status.value.code == 0
        output = capsys.readouterr().out
        assert output.startswith(f"usage: pyvmm {name} ")
        assert cli.COMMANDS[name].partition("\n")[0][1:] in output

    def test_help_lists_the_commands_and_imports_none(self) -> None:
        code = (
            "import sys; from pyvmm.cli import main; main(['--help']); "
            "sys.exit(any(name.startswith('pyvmm.cli.') for name in sys.modules))"
        )
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0
        for name, help in cli.COMMANDS.items():
            assert f"  {name:8}{help}\n" in result.stdout

    @pytest.mark.parametrize("redirection", ["", ">&-"])
    def test_its_quick_end_loses_neither_output_nor_status(self, redirection: str) -> None:
        code = """if True:
            from pyvmm import cli
            from pyvmm.errors import UsageError

            def dispatch(argv):
                print("a word before", flush=False)
                raise UsageError("it went wrong")

            cli._dispatch = dispatch
            cli.entry()
        """
        command = f'exec "$0" -c "$1" {redirection}'
        shell = ["sh", "-c", command, sys.executable, code]
        result = subprocess.run(shell, capture_output=True, text=True)
        assert result.stdout == ("" if redirection else "a word before\n")
        assert (result.returncode, result.stderr) == (2, "pyvmm: error: it went wrong\n")

    def test_no_command_shows_the_help_as_an_error(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([]) == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("usage: pyvmm COMMAND")

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
        assert cli.main(["--version"]) == 0
        assert capsys.readouterr().out == f"pyvmm {project['version']}\n"

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (["rnu"], "unknown command 'rnu', did you mean 'run'? (see pyvmm --help)"),
            (
                ["xyzzy"],
                "unknown command 'xyzzy': the commands are run, ctl, doctor, nested, switch or "
                "images (see pyvmm --help)",
            ),
            (
                ["--quiet"],
                "unknown option '--quiet': the commands are run, ctl, doctor, nested, switch or "
                "images (see pyvmm --help)",
            ),
            (
                ["run", "--memry", "1G"],
                "unknown option --memry, did you mean '--memory'? (see pyvmm run --help)",
            ),
            (
                ["run", "--kernel=k", "bzImage"],
                "unexpected argument 'bzImage' (see pyvmm run --help)",
            ),
            (
                ["run", "--kernel"],
                "argument --kernel: expected one argument (see pyvmm run --help)",
            ),
            (
                ["run", "--kernel=k", "--memory=16M"],
                "--memory=16M is too small: the least is 32M",
            ),
            (["run", "--config=/no.toml"], "/no.toml cannot be read: No such file or directory"),
        ],
    )
    def test_usage_errors_are_one_sentence(
        self, argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main(argv) == 2
        assert capsys.readouterr() == ("", f"pyvmm: error: {message}\n")


class TestFailures:
    @pytest.fixture
    def failing(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        def fail_with(error: BaseException) -> None:
            def run_it(args: object) -> int:
                raise error

            monkeypatch.setattr(run, "run", run_it)

        return fail_with

    def test_notes_of_an_error_follow_it(
        self, failing: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        error = GuestPanic("the guest kernel panicked: no init")
        error.add_note("last lines of the console:")
        error.add_note("  | boo")
        failing(error)
        assert cli.main(["run"]) == 80
        assert capsys.readouterr().err == (
            "pyvmm: error: the guest kernel panicked: no init\n"
            "last lines of the console:\n  | boo\n"
        )

    def test_a_defect_is_kept_in_a_file(
        self,
        failing: Any,
        capsys: pytest.CaptureFixture[str],
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
    ) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        monkeypatch.delenv("PYVMM_TRACEBACK", raising=False)
        failing(KeyError("x"))
        assert cli.main(["run"]) == 70
        (file,) = tmp_path.iterdir()
        assert capsys.readouterr().err == (
            f"pyvmm: internal error: KeyError: 'x' (a defect in pyvmm: please report it with "
            f"{file}; PYVMM_TRACEBACK=1 shows the traceback here)\n"
        )
        assert "Traceback (most recent call last)" in file.read_text()

    def test_a_defect_is_shown_on_demand(
        self, failing: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYVMM_TRACEBACK", "1")
        failing(KeyError("x"))
        assert cli.main(["run"]) == 70
        message = capsys.readouterr().err
        assert message.startswith("pyvmm: internal error\nTraceback (most recent call last)")
        assert message.endswith("KeyError: 'x'\n")

    def test_interrupt(self, failing: Any) -> None:
        failing(KeyboardInterrupt())
        assert cli.main(["run"]) == 130

    def test_a_closed_pipe_ends_it_as_it_does_other_programs(self) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        result = subprocess.run([*PYVMM, "--help"], stdout=writer, stderr=subprocess.PIPE)
        os.close(writer)
        assert (result.returncode, result.stderr) == (-signal.SIGPIPE, b"")


def by_argparse(argv: list[str]) -> dict[str, Any] | None:
    try:
        return vars(parse("run", "Run.", run.add_arguments, argv))
    except UsageError:
        return None


values = st.sampled_from(["a", "", "1G", "-", "-1", "--cpus", "x=y", "a b", "-a b", "--no-reboot"])
options = st.sampled_from(
    ["--kernel", "--append", "--disk", "--no-reboot", "--hugepages", "--dry-run", "--config", "-h2"]
)
words = st.one_of(
    options, values, st.builds(lambda option, value: f"{option}={value}", options, values)
)


class TestRunArguments:
    @given(st.lists(words, max_size=6))
    def test_quick_reading_agrees_with_argparse(self, argv: list[str]) -> None:
        quick = run.quick_arguments(argv)
        if quick is not None:
            assert vars(quick) == by_argparse(argv)

    @pytest.mark.parametrize(
        "argv",
        [
            [],
            ["--kernel", "bzImage", "--disk", "a.img", "--disk=b.img,readonly=on"],
            [
                "--kernel=bzImage",
                "--memory",
                "1G",
                "--cpus",
                "2",
                "--append",
                "quiet root=/dev/vda",
            ],
            ["--no-reboot", "--hugepages", "--no-rng", "--dry-run", "--timeout", "5"],
            ["--image", "tiny", "--accel", "kvm", "--serial", "file:log", "--console", "stdio"],
        ],
    )
    def test_plain_forms_need_no_argparse(self, argv: list[str]) -> None:
        quick = run.quick_arguments(argv)
        assert quick is not None
        assert vars(quick) == by_argparse(argv)

    def test_nothing_heavy_is_imported_on_the_way_to_the_machine(self) -> None:
        code = (
            "import sys; from pyvmm import cli; from pyvmm.cli import run; "
            "from pyvmm.config import from_command_line; "
            "from_command_line(vars(run.quick_arguments("
            "['--kernel', 'k', '--disk', 'a,queues=2', '--memory', '1G']))).command_line(); "
            "print(*sys.modules)"
        )
        interpreter = [sys.executable, "-I", "-S", "-c"]
        path = f"import sys; sys.path.insert(0, {str(Path.cwd())!r}); "
        result = subprocess.run([*interpreter, path + code], capture_output=True, text=True)
        assert result.stderr == ""
        heavy = {"argparse", "collections", "dataclasses", "enum", "functools", "inspect"}
        heavy |= {"pathlib", "re", "signal", "typing"}
        assert heavy.isdisjoint(result.stdout.split())

    def test_help_teaches_every_option_key_and_status(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit):
            cli.main(["run", "--help"])
        help = capsys.readouterr().out
        for setting in VmConfig.settings.values():
            assert f"  {setting.flag}" in help
        for name in {*DiskConfig.settings, *NetConfig.settings} - {"kind"}:
            assert f"\n  {name}=" in help
        for status, meaning in EXIT_STATUSES.items():
            assert f"\n  {status:<4} {meaning}" in help


class FakeVm:
    """Stands for `pyvmm.machine.vm.VM`: a guest that ends as it is told to."""

    def __init__(self, outcome: Outcome | None) -> None:
        self.outcome = outcome
        self.remarks = ["console hvc0 is pseudo-terminal /dev/pts/9"]
        self.calls: list[object] = []
        self.ended = threading.Event()

    def __call__(self, config: VmConfig) -> FakeVm:
        self.config = config
        return self

    def __enter__(self) -> FakeVm:
        return self

    def __exit__(self, *exception: object) -> None:
        self.calls.append("close")

    def on_event(self, listener: Callable[[Event], None]) -> None:
        self.listener = listener

    def start(self) -> None:
        self.calls.append("start")

    def wait(self, timeout: float | None) -> Outcome:
        self.calls.append(("wait", timeout))
        if self.outcome is None:
            assert self.ended.wait(30), "nobody stopped the guest"
        assert self.outcome is not None
        return self.outcome

    def resume(self) -> None:
        self.calls.append("resume")

    def wake(self) -> None:
        self.calls.append("wake")

    def stop(self, status: int) -> None:
        self.outcome = Outcome(status)
        self.ended.set()


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    def plug(outcome: Outcome | None) -> FakeVm:
        vm = FakeVm(outcome)
        monkeypatch.setattr(pyvmm.machine.vm, "VM", vm)
        return vm

    return plug


@pytest.fixture
def kvm(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what the probe of /dev/kvm says: None, or why it cannot run Linux."""

    def say(reason: str | None) -> None:
        result = SimpleNamespace(can_run_linux=reason is None, reason=reason)
        monkeypatch.setattr(pyvmm.kvm.probe, "probe", lambda: result)

    return say


@pytest.fixture
def nested(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Records what would run in an emulated machine: [(argv, its memory)]."""

    class Runs(list[tuple[list[str], int]]):
        control: ClassVar[list[str | None]] = []

    runs = Runs()
    runs.control.clear()

    def run_nested(argv: list[str], config: Any, control: str | None) -> int:
        runs.append((argv, config.memory))
        runs.control.append(control)
        return 80

    monkeypatch.setattr(pyvmm.nested, "run_nested", run_nested)
    monkeypatch.setattr(pyvmm.nested, "why_not", lambda: None)
    return runs


@pytest.fixture
def files(tmp_path: Path) -> SimpleNamespace:
    kernel, disk = tmp_path / "bzImage", tmp_path / "disk.img"
    kernel.write_bytes(b"x" * 4096)
    disk.write_bytes(bytes(4096))
    return SimpleNamespace(kernel=str(kernel), disk=str(disk))


class TestRun:
    def test_power_off(self, machine: Any, capsys: pytest.CaptureFixture[str]) -> None:
        vm = machine(Outcome(0))
        assert cli.main(["run", "--kernel=k", "--accel=kvm", "--timeout=5"]) == 0
        assert vm.config == VmConfig(kernel="k", accel="kvm", timeout=5.0)
        assert vm.calls == ["start", ("wait", 5.0), "close"]
        assert capsys.readouterr().err == "pyvmm: console hvc0 is pseudo-terminal /dev/pts/9\n"

    def test_an_outcome_with_an_error_is_told(
        self, machine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        machine(Outcome(80, GuestPanic("the guest kernel panicked: no init")))
        assert cli.main(["run", "--kernel=k", "--accel=kvm"]) == 80
        assert "pyvmm: error: the guest kernel panicked: no init\n" in capsys.readouterr().err

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    def test_signals_end_the_guest(self, machine: Any, number: signal.Signals) -> None:
        before = signal.getsignal(number)
        vm = machine(None)
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        assert cli.main(["run", "--kernel=k", "--accel=kvm"]) == 128 + number
        assert vm.calls[-1] == "close"
        assert signal.getsignal(number) == before

    def test_sigcont_resumes_a_guest_that_an_error_stopped(
        self, machine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        vm = machine(None)

        def fail_and_go_on() -> None:
            vm.stopped_by = "disk vda (a.img): No space left on device"
            vm.listener(Event("STOP", {}))
            vm.listener(Event("BLOCK_IO_ERROR", {"device": "vda"}))
            os.kill(os.getpid(), signal.SIGCONT)
            while "resume" not in vm.calls:
                time.sleep(0.01)
            vm.stop(0)

        threading.Timer(0.2, fail_and_go_on).start()
        assert cli.main(["run", "--kernel=k", "--accel=kvm"]) == 0
        assert (
            "\npyvmm: the guest is stopped by disk vda (a.img): No space left on device; "
            f"put that right, then let it try again: kill -CONT {os.getpid()}\n"
        ) in capsys.readouterr().err

    def test_sigcont_wakes_a_guest_that_sleeps(
        self, machine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        vm = machine(None)

        def sleep_and_wake() -> None:
            vm.listener(Event("SUSPEND", {}))
            os.kill(os.getpid(), signal.SIGCONT)
            while "wake" not in vm.calls:
                time.sleep(0.01)
            vm.stop(0)

        threading.Timer(0.2, sleep_and_wake).start()
        assert cli.main(["run", "--kernel=k", "--accel=kvm"]) == 0
        assert (
            f"\npyvmm: the guest sleeps; to wake it: kill -CONT {os.getpid()}\n"
        ) in capsys.readouterr().err

    def test_a_guest_that_lends_no_more_is_told_of(
        self, machine: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        vm = machine(None)
        vm.balloon = SimpleNamespace(
            actual=400 << 20, target=300 << 20, device=SimpleNamespace(ready=True)
        )

        def stall() -> None:
            vm.listener(Event("BALLOON_STALLED", {"actual": 400 << 20, "target": 300 << 20}))
            vm.stop(0)

        threading.Timer(0.2, stall).start()
        assert cli.main(["run", "--kernel=k", "--accel=kvm"]) == 0
        assert (
            "\npyvmm: the guest has 400M of memory and is to have 300M, but gives no more: "
            "it cannot spare the rest\n"
        ) in capsys.readouterr().err

    def test_a_signal_before_the_guest_runs_is_not_lost(self, machine: Any) -> None:
        vm = machine(None)
        vm.start = lambda: os.kill(os.getpid(), signal.SIGTERM)
        assert cli.main(["run", "--kernel=k", "--accel=kvm"]) == 143

    def test_auto_uses_a_kvm_that_works(self, machine: Any, kvm: Any, nested: Any) -> None:
        kvm(None)
        vm = machine(Outcome(0))
        assert cli.main(["run", "--kernel=k"]) == 0
        assert vm.calls[0] == "start"
        assert nested == []

    def test_what_does_not_reach_out_of_an_emulated_machine_is_told(
        self, files: Any, kvm: Any, nested: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kvm("no SYSCALL")
        arguments = [f"--kernel={files.kernel}", "--port=a,unix=s", "--net=user,hostfwd=tcp::0-:22"]
        assert cli.main(["run", *arguments]) == 80
        assert capsys.readouterr().err.splitlines()[1:] == [
            "pyvmm: sockets and pseudo-terminals of consoles and ports are inside the emulated "
            "machine, where this host's programs do not reach them; 'pyvmm nested -- sh' is a "
            "shell in which 'pyvmm run' and such programs meet",
            "pyvmm: the ports of hostfwd are those of the emulated machine, which this host's "
            "programs do not reach; 'pyvmm nested -- sh' is a shell in which 'pyvmm run' and they "
            "meet",
        ]

    def test_the_control_socket_reaches_out_of_it(self, files: Any, kvm: Any, nested: Any) -> None:
        kvm("no SYSCALL")
        assert cli.main(["run", f"--kernel={files.kernel}", "--qmp=unix:s"]) == 80
        argv, _ = nested[0]
        assert argv[-2:] == ["--accel=kvm", "--qmp=unix:/run/pyvmm-qmp"]
        assert nested.control == ["s"]

    def test_auto_says_why_it_goes_nested(
        self, files: Any, kvm: Any, nested: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kvm("the KVM of this machine cannot run Linux: no SYSCALL")
        arguments = [f"--kernel={files.kernel}", "--disk", files.disk]
        assert cli.main(["run", *arguments]) == 80
        assert capsys.readouterr().err == (
            "pyvmm: the KVM of this machine cannot run Linux: no SYSCALL; "
            "continuing in an emulated AMD-V machine (slow)\n"
        )
        ((argv, _),) = nested
        assert argv[0] == sys.executable
        assert argv[-5:] == ["run", *arguments, "--accel=kvm"]

    def test_nested_on_demand_is_quiet_and_large_enough(
        self, files: Any, nested: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ["run", "--kernel", files.kernel, "--accel", "nested", "--memory", "64G"]
        assert cli.main(argv) == 80
        assert capsys.readouterr().err == ""
        ((_, memory),) = nested
        assert memory == 64 * 1024 * MIB + 512 * MIB

    def test_neither_kvm_nor_nested(
        self, kvm: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kvm("/dev/kvm is missing: sudo modprobe kvm_intel")
        monkeypatch.setattr(pyvmm.nested, "why_not", lambda: "qemu-system-x86_64 is missing")
        assert cli.main(["run", "--kernel=k"]) == 71
        assert capsys.readouterr().err == (
            "pyvmm: error: /dev/kvm is missing: sudo modprobe kvm_intel; "
            "and no emulated machine can stand in: qemu-system-x86_64 is missing\n"
        )

    @pytest.mark.parametrize("dry_run", [(), ("--dry-run",)])
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (("--kernel=/no/bzImage",), "kernel '/no/bzImage'"),
            (("--kernel={kernel}", "--initrd=/no/initrd"), "initrd '/no/initrd'"),
            (("--kernel={kernel}", "--disk=/no/disk"), "disk image /no/disk"),
            (("--kernel={kernel}", "--disk=/"), "disk image / is a directory"),
        ],
    )
    def test_missing_files_are_found_before_a_machine_is_emulated(
        self,
        files: Any,
        nested: Any,
        capsys: pytest.CaptureFixture[str],
        arguments: tuple[str, ...],
        message: str,
        dry_run: tuple[str, ...],
    ) -> None:
        argv = [word.format(kernel=files.kernel) for word in arguments]
        assert cli.main(["run", "--accel=nested", *argv, *dry_run]) == 2
        output = capsys.readouterr()
        assert message in output.err
        assert output.out == ""
        assert nested == []


class TestImage:
    @pytest.fixture
    def image(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        (tmp_path / "disk.img").write_bytes(b"d" * 4096)
        (tmp_path / "vmlinuz").write_bytes(b"x" * 4096)
        (tmp_path / "initrd").write_bytes(b"i")
        paths = ImagePaths(
            tmp_path, tmp_path / "vmlinuz", tmp_path / "initrd", tmp_path / "disk.img"
        )
        monkeypatch.setattr(pyvmm.images, "path", lambda name: {"tiny": paths}[name])
        return tmp_path

    def test_its_disk_stays_as_it_is(self, image: Path, machine: Any) -> None:
        vm = machine(Outcome(0))
        assert cli.main(["run", "--image=tiny", "--accel=kvm", "--memory=64M"]) == 0
        assert vm.config.kernel == f"{image}/vmlinuz"
        assert vm.config.initrd == f"{image}/initrd"
        assert vm.config.memory == 64 * MIB
        assert vm.config.disks == (DiskConfig(path=f"{image}/disk.img", snapshot=True),)

    def test_other_options_come_before_what_the_image_says(self, image: Path, machine: Any) -> None:
        vm = machine(Outcome(0))
        argv = ["run", "--image=tiny", "--accel=kvm", "--disk=mine.img", "--kernel=mine"]
        assert cli.main(argv) == 0
        assert (vm.config.kernel, vm.config.disks) == ("mine", (DiskConfig(path="mine.img"),))
        assert vm.config.initrd == f"{image}/initrd"

    def test_it_is_the_same_image_in_an_emulated_machine(self, image: Path, nested: Any) -> None:
        assert cli.main(["run", "--image=tiny", "--accel=nested"]) == 80
        ((argv, _),) = nested
        assert argv[-4:] == ["run", "--image=tiny", "--accel=nested", "--accel=kvm"]


class TestDryRun:
    def test_what_it_prints_is_a_configuration_that_prints_the_same(
        self, files: Any, kvm: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kvm(None)
        arguments = ["--kernel", files.kernel, "--disk", f"{files.disk},readonly=on", "--cpus=2"]
        assert cli.main(["run", "--dry-run", "--append", 'a="b c"', *arguments]) == 0
        first = capsys.readouterr().out
        assert first.startswith(
            "# pyvmm run --config FILE starts this machine.\n"
            "# It would run on /dev/kvm.\n"
            '# Kernel parameters: "console=ttyS0 root=/dev/vda ro a=\\"b c\\""\n'
        )
        file = tmp_path / "vm.toml"
        file.write_text(first)
        assert cli.main(["run", "--dry-run", "--config", str(file)]) == 0
        assert capsys.readouterr().out == first

    def test_it_says_why_it_would_run_nested(
        self, files: Any, kvm: Any, nested: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kvm("no KVM")
        assert cli.main(["run", "--dry-run", "--kernel", files.kernel]) == 0
        assert (
            "# It would run on an emulated AMD-V machine (slow): no KVM.\n"
            in capsys.readouterr().out
        )
        assert nested == []

    def test_a_kvm_that_cannot_run_linux(
        self, files: Any, kvm: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        kvm("no KVM")
        assert cli.main(["run", "--dry-run", "--accel=kvm", "--kernel", files.kernel]) == 71
        assert capsys.readouterr() == ("", "pyvmm: error: no KVM\n")
