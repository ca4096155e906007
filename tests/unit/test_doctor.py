"""``pyvmm doctor`` and the sentences that say why KVM refuses, on machines of every kind."""

from __future__ import annotations

import argparse
import errno
import grp
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from pyvmm.cli import doctor, main
from pyvmm.cli.doctor import Check, Diagnosis, diagnose, render
from pyvmm.errors import ExitStatus, NoKvmError
from pyvmm.kvm import _generated_uapi as uapi
from pyvmm.kvm import diagnosis
from pyvmm.kvm.handles import Kvm
from pyvmm.kvm.probe import ProbeResult

NOBODY = 65534


def test_what_is_optional_is_told_with_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    checks = list(doctor._check_optional())
    assert {check.state for check in checks} == {"limited"}
    assert [(check.group, check.name, check.text, check.fix) for check in checks[:2]] == [
        (
            "network",
            "--net user",
            "pyvmm was built without libslirp",
            "apt install libslirp-dev, then scripts/setup",
        ),
        ("network", "--net passt", "passt is not installed", "apt install passt"),
    ]


def test_what_is_optional_and_there_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda _name: object())
    monkeypatch.setattr(doctor.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert {check.state for check in doctor._check_optional()} == {"ok"}


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may open anything, so it becomes nobody meanwhile."""
    if os.geteuid() != 0:
        yield
        return
    groups = os.getgroups()
    os.setgroups([])
    os.setegid(NOBODY)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)
        os.setgroups(groups)


@pytest.fixture
def forbidden(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that its group may use, and we may not."""
    directory = tmp_path_factory.mktemp("dev", numbered=True)
    for parent in (directory, *directory.parents):
        if parent.stat().st_uid == os.geteuid() and parent.parent != parent:
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH)
    path = directory / "kvm"
    path.touch()
    if os.geteuid() == 0:
        os.chown(path, 0, a_group().gr_gid)
    path.chmod(0o060)
    with unprivileged():
        yield path


def a_group() -> grp.struct_group:
    return next(group for group in grp.getgrall() if group.gr_gid > 0 and not group.gr_mem)


@pytest.fixture
def bare_metal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "in_container", lambda: False)
    monkeypatch.setattr(diagnosis, "cpu_flags", lambda: {"fpu", "svm"})


def test_every_explained_ioctl_exists() -> None:
    assert all(isinstance(getattr(uapi, name), int) for name in diagnosis._CAUSES)


def test_a_failed_ioctl_names_itself_the_error_and_the_cause() -> None:
    assert diagnosis.explain_ioctl("KVM_CREATE_VM", errno.EBUSY) == (
        "KVM_CREATE_VM failed with EBUSY (Device or resource busy): "
        "another hypervisor (VirtualBox, VMware) holds the CPU: stop it"
    )
    assert diagnosis.explain_ioctl("KVM_GET_REGS", errno.ENOMEM).endswith(
        "ENOMEM (Cannot allocate memory): the host is short of memory"
    )
    assert diagnosis.explain_ioctl("KVM_GET_REGS", errno.EXDEV) == (
        "KVM_GET_REGS failed with EXDEV (Invalid cross-device link)"
    )


@pytest.mark.parametrize(
    ("flags", "fix"),
    [
        ({"vmx"}, "sudo modprobe kvm_intel"),
        ({"svm", "hypervisor"}, "sudo modprobe kvm_amd"),
        ({"hypervisor"}, "turn on nested virtualization"),
        (set(), r"turn on virtualization \(Intel VT-x, AMD-V\) in this machine's firmware"),
    ],
)
def test_a_missing_device_has_the_mend_for_this_cpu(
    bare_metal: None, monkeypatch: pytest.MonkeyPatch, flags: set[str], fix: str
) -> None:
    monkeypatch.setattr(diagnosis, "cpu_flags", lambda: flags)
    with pytest.raises(NoKvmError, match=f"^/nonexistent/kvm is missing: {fix}") as raised:
        Kvm("/nonexistent/kvm")
    assert raised.value.exit_status == ExitStatus.NO_KVM


def test_a_container_gets_its_device_from_its_host(
    bare_metal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "in_container", lambda: True)
    with pytest.raises(NoKvmError, match="start this container with --device /dev/kvm"):
        Kvm("/nonexistent/kvm")


def test_a_node_without_driver_is_told_from_a_missing_one(bare_metal: None) -> None:
    sentence = diagnosis.why_not_open("/dev/kvm", OSError(errno.ENODEV, "No such device"))
    assert sentence == "/dev/kvm has no driver: sudo modprobe kvm_amd"


def test_a_directory_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(NoKvmError, match=re.escape(f"cannot open {tmp_path} (Is a directory)")):
        Kvm(str(tmp_path))


def test_a_forbidden_device_names_its_group(forbidden: Path) -> None:
    group = grp.getgrgid(forbidden.stat().st_gid).gr_name
    with pytest.raises(NoKvmError) as raised:
        Kvm(str(forbidden))
    assert str(raised.value) == (
        f"you may not open {forbidden}: it belongs to group {group}: "
        f"sudo usermod -aG {group} $USER, then log in again"
    )


def test_who_joined_the_group_after_login_is_told_to_log_in_again(
    forbidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = grp.getgrgid(forbidden.stat().st_gid)
    me = SimpleNamespace(gr_name=group.gr_name, gr_mem=[_user_name()])
    monkeypatch.setattr(grp, "getgrnam", lambda _: me)
    with pytest.raises(NoKvmError, match=r"you joined its group .* after you logged in: log in"):
        Kvm(str(forbidden))


def _user_name() -> str:
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give a file to another group")
@pytest.mark.parametrize(
    ("gid", "mode", "fix"),
    [
        (0, 0o660, "only root has access: sudo chgrp kvm PATH && sudo chmod 660 PATH && "),
        (54321, 0o660, "it belongs to group 54321: start this container with --group-add 54321"),
        (54321, 0o600, "only root has access: sudo chgrp kvm PATH && sudo chmod 660 PATH && "),
    ],
)
def test_a_device_that_no_group_opens(forbidden: Path, gid: int, mode: int, fix: str) -> None:
    os.seteuid(0)
    os.chown(forbidden, 0, gid)
    forbidden.chmod(mode)
    os.seteuid(NOBODY)
    with pytest.raises(NoKvmError) as raised:
        Kvm(str(forbidden))
    expected = f"you may not open {forbidden}: {fix}".replace("PATH", str(forbidden))
    assert str(raised.value).startswith(expected)


# The report


def check(diagnosis: Diagnosis, name: str) -> Check:
    (found,) = (check for check in diagnosis.checks if check.name == name)
    return found


def pretend(
    monkeypatch: pytest.MonkeyPatch, *, linux: bool, nested: str | None, capabilities: int = 1
) -> None:
    """A machine with a KVM, whose probe and emulator say so."""
    result = ProbeResult(linux, "the probe's reason", None)
    monkeypatch.setattr("pyvmm.kvm.probe.probe", lambda *_, **__: result)
    monkeypatch.setattr("pyvmm.kvm.handles.Kvm", lambda _: FakeKvm(capabilities))
    monkeypatch.setattr("pyvmm.nested.why_not", lambda: nested)


class FakeKvm:
    def __init__(self, capabilities: int) -> None:
        self.capabilities = capabilities

    def __enter__(self) -> FakeKvm:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def check_extension(self, _: int) -> int:
        return self.capabilities


def test_this_machine_is_told_truly(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert status == (ExitStatus.NO_KVM if report["accel"] is None else ExitStatus.OK)
    names = [check["name"] for check in report["checks"]]
    assert len(names) == len(set(names))
    assert {"libraries", "device", "emulated machine", "memory", "io_uring", "tap"} <= set(names)
    for each in report["checks"]:
        assert each["state"] in ("ok", "limited", "missing")
        assert bool(each["fix"]) == (each["state"] != "ok"), each


def test_with_a_good_kvm_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, linux=True, nested="QEMU is not installed: apt install it")
    found = diagnose()
    assert (found.accel, found.summary) == ("kvm", "pyvmm run works here, on /dev/kvm.")
    assert check(found, "Linux guests").state == "ok"
    nested = check(found, "emulated machine")
    assert (nested.state, nested.text, nested.fix) == (
        "limited",
        "QEMU is not installed",
        "apt install it",
    )


def test_with_a_bad_kvm_the_emulated_machine_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, linux=False, nested=None)
    found = diagnose()
    assert found.accel == "nested"
    assert "in an emulated machine" in found.summary
    assert check(found, "Linux guests").text == "the probe's reason"


@pytest.mark.parametrize("json_wanted", [False, True])
def test_with_neither_the_status_is_that_of_no_kvm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], json_wanted: bool
) -> None:
    pretend(monkeypatch, linux=False, nested="no QEMU: apt install it")
    assert doctor.run(argparse.Namespace(json=json_wanted)) == ExitStatus.NO_KVM
    output = capsys.readouterr().out
    assert "pyvmm run does not work here: the probe's reason." in output


def test_a_missing_device_ends_the_checks_of_kvm(
    bare_metal: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "KVM_DEVICE", "/nonexistent/kvm")
    monkeypatch.setattr("pyvmm.nested.why_not", lambda: None)
    found = diagnose()
    device = check(found, "device")
    assert (device.state, device.text) == ("missing", "/nonexistent/kvm is missing")
    assert device.fix == "sudo modprobe kvm_amd"
    assert not [each for each in found.checks if each.name == "Linux guests"]


def test_lacking_capabilities_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, linux=True, nested=None, capabilities=0)
    found = diagnose()
    capabilities = check(found, "capabilities")
    assert capabilities.state == "missing"
    assert "lacks USER_MEMORY, " in capabilities.text
    assert found.accel == "nested"


def test_lacking_welcome_capabilities_say_what_they_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, linux=True, nested=None)
    lacking = uapi.KVM_CAP_READONLY_MEM
    monkeypatch.setattr(FakeKvm, "check_extension", lambda _, number: int(number != lacking))
    found = diagnose()
    assert check(found, "capabilities").text.startswith("no READONLY_MEM: registers of devices")
    assert found.accel == "kvm"


def test_a_library_that_does_not_load_is_told_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "elftools", None)
    found = diagnose()
    assert [each.name for each in found.checks] == ["pyelftools"]
    assert found.checks[0].fix == "pip install pyelftools"
    assert found.accel is None


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (errno.ENOSYS, "boot Linux 5.13 or newer"),
        (errno.EPERM, "sudo sysctl kernel.io_uring_disabled=0|start this container with"),
    ],
)
def test_without_io_uring_there_is_a_mend(
    monkeypatch: pytest.MonkeyPatch, error: int, fix: str
) -> None:
    lib = SimpleNamespace(blk_io_uring_check=lambda: -error)
    monkeypatch.setattr("pyvmm._core.lib", lib)
    found = doctor._check_io_uring("host")
    assert found.state == "limited"
    assert re.match(fix, found.fix)


def test_a_forbidden_tap_device_names_its_group(
    forbidden: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = doctor._check_device("network", "tap", str(forbidden), "tun")
    assert (found.state, found.text) == ("limited", f"you may not open {forbidden}")
    assert "sudo usermod -aG" in found.fix


def test_a_missing_tap_device_wants_its_module(bare_metal: None) -> None:
    found = doctor._check_device("network", "tap", "/nonexistent/tun", "tun")
    assert (found.state, found.fix) == ("limited", "sudo modprobe tun")


def test_a_tap_device_needs_the_right_to_make_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TUN_DEVICE", "/dev/null")
    monkeypatch.setattr(doctor, "_effective_capabilities", lambda: 0)
    found = doctor._check_device("network", "tap", "/dev/null", "tun")
    assert "needs CAP_NET_ADMIN" in found.text
    monkeypatch.setattr(doctor, "_effective_capabilities", lambda: 1 << 12)
    assert doctor._check_device("network", "tap", "/dev/null", "tun").state == "ok"


def test_meminfo_is_in_bytes() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert doctor._meminfo()["MemTotal"] == pages


def test_the_report_is_aligned_and_fits() -> None:
    long = "word " * 40
    report = render(
        Diagnosis(
            "nested",
            "in short",
            [
                Check("one", "a", "ok", "fine"),
                Check("one", "longer", "limited", long, long),
                Check("two", "b", "missing", "gone", "fetch it"),
            ],
        ),
        width=60,
        color=False,
    )
    lines = report.splitlines()
    assert lines[:3] == ["one", "  ok  a       fine", "  --  longer  " + "word " * 8 + "word"]
    assert lines[-4:] == ["  NO  b       gone", "              fix: fetch it", "", "in short"]
    assert max(map(len, lines)) <= 60
    assert lines.count("one") == 1
    assert "\033" not in report


def test_colour_changes_nothing_else() -> None:
    found = Diagnosis(None, "no", [Check("g", "n", "missing", "t", "f")])
    plain, coloured = (render(found, width=80, color=color) for color in (False, True))
    assert "\033[31mNO\033[0m" in coloured
    assert re.sub(r"\033\[\d+m", "", coloured) == plain


def test_output_to_a_pipe_has_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor"])
    assert "\033" not in capsys.readouterr().out
