"""The probe on whatever /dev/kvm there is: genuine hardware, emulated hardware, or neither."""

from __future__ import annotations

import struct
import threading
import time
from pathlib import Path

import pytest

from pyvmm.kvm import _generated_probe as guest
from pyvmm.kvm import probe as probe_module
from pyvmm.kvm._generated_uapi import kvm_cpuid_entry2
from pyvmm.kvm.probe import FAILURES, probe

JMP_SELF = b"\xeb\xfe"
INVALID_INSTRUCTION = b"\x0f\x0b"  # UD2


@pytest.fixture(autouse=True)
def private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "pyvmm" / "kvm-probe"


def enter_with(monkeypatch: pytest.MonkeyPatch, code: bytes) -> None:
    monkeypatch.setattr(guest, "IMAGE", code + guest.IMAGE[len(code) :])


def test_the_answer_is_true_to_this_machine() -> None:
    """kvm_pvm, which emulates ring 0, fails at SYSCALL; the modules of real CPUs pass."""
    result = probe()
    if result.module == "kvm_pvm":
        assert not result.can_run_linux
        assert result.failed_step == guest.STEP_SYSCALL
        assert "(kvm_pvm) cannot run Linux: a SYSCALL in ring 3 does not" in result.reason
    else:
        assert result.module in ("kvm_amd", "kvm_intel")
        assert (result.can_run_linux, result.failed_step) == (True, None), result.reason


def test_every_step_has_its_sentence() -> None:
    steps = {value for name, value in vars(guest).items() if name.startswith("STEP_")}
    assert set(FAILURES) == steps - {guest.STEP_DONE, guest.STEP_GPA}


@pytest.mark.parametrize(
    ("step", "instruction"),
    [
        ("SYSCALL", "0f05"),
        ("SYSRET", "480f07"),
        ("INT80", "cd80"),
        ("INT3", "31dbcc"),
        ("FWAIT", "dbe39b"),
        ("LDMXCSR", "0fae14"),
        ("STAC", "0f01cb"),
        ("POPCNT", "f30fb8"),
        ("CMPXCHG16B", "f0480fc7"),
        ("XRSTOR", "0f01d1"),
        ("HYPERCALL", "0f01d9"),
        ("HYPERCALL", "0f01c1"),
    ],
)
def test_each_step_finds_its_instruction_missing(
    monkeypatch: pytest.MonkeyPatch, step: str, instruction: str
) -> None:
    """On a good KVM, with the instruction replaced by an invalid one."""
    result = probe(fresh=True)
    if not result.can_run_linux:
        pytest.skip(f"needs a KVM that can run Linux: {result.reason}")
    code = bytes.fromhex(instruction)
    start = guest.IMAGE.index(code)
    invalid = INVALID_INSTRUCTION + b"\x90" * (len(code) - len(INVALID_INSTRUCTION))
    image = guest.IMAGE[:start] + invalid + guest.IMAGE[start + len(code) :]
    monkeypatch.setattr(guest, "IMAGE", image)
    broken = probe(fresh=True)
    if broken.can_run_linux:
        pytest.skip("this CPU's features leave the instruction out")
    assert broken.failed_step == getattr(guest, f"STEP_{step}")
    assert broken.reason.endswith("(#UD)")


def test_a_guest_that_loops_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_with(monkeypatch, JMP_SELF)
    start = time.monotonic()
    result = probe()
    assert time.monotonic() - start < 5
    assert not result.can_run_linux
    assert result.failed_step == guest.STEP_START
    assert result.reason.endswith("64-bit code does not run (the guest loops)")


def test_a_guest_that_loops_is_ended_in_any_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_with(monkeypatch, JMP_SELF)
    results = []
    thread = threading.Thread(target=lambda: results.append(probe()))
    thread.start()
    thread.join(10)
    assert [result.failed_step for result in results] == [guest.STEP_START]


def test_an_exception_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_with(monkeypatch, INVALID_INSTRUCTION)
    result = probe()
    assert result.failed_step == guest.STEP_START
    assert result.reason.endswith("(#UD)")


def test_a_triple_fault_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    enter_with(monkeypatch, INVALID_INSTRUCTION)
    monkeypatch.setattr(guest, "IDT_END_GPA", guest.IDT_GPA + 1)
    result = probe()
    assert result.failed_step == guest.STEP_START
    assert "triple fault" in result.reason


def test_a_wrong_result_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    hlt = b"\xf4"
    enter_with(monkeypatch, hlt)
    assert probe().reason.endswith("(with a wrong result)")


def test_steps_that_the_cpu_lacks_are_left_out() -> None:
    """A guest without the optional instructions has all its features off."""
    cpuid = [_leaf(0, ebx=int.from_bytes(b"Genu", "little")), _leaf(1), _leaf(7)]
    assert probe_module._features(cpuid) == 0
    cpuid = [
        _leaf(0, ebx=int.from_bytes(b"Auth", "little")),
        _leaf(1, ecx=1 << 13 | 1 << 23 | 1 << 26),
        _leaf(7, ebx=1 << 20),
    ]
    assert probe_module._features(cpuid) == (
        guest.FEATURE_CX16
        | guest.FEATURE_POPCNT
        | guest.FEATURE_XSAVE
        | guest.FEATURE_SMAP
        | guest.FEATURE_VMMCALL
    )


def _leaf(function: int, **registers: int) -> kvm_cpuid_entry2:
    return kvm_cpuid_entry2(function=function, **registers)


def test_no_kvm_is_a_result_and_not_kept(private_cache: Path) -> None:
    result = probe("/nonexistent/kvm")
    assert not result.can_run_linux
    assert result.failed_step is None
    assert "/nonexistent/kvm is missing" in result.reason
    assert not private_cache.exists()


def test_the_answer_is_kept(private_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = probe()
    assert not first.cached
    assert private_cache.exists()
    enter_with(monkeypatch, JMP_SELF)  # would fail if it ran
    second = probe()
    assert second.cached
    assert (second.can_run_linux, second.reason, second.failed_step) == (
        first.can_run_linux,
        first.reason,
        first.failed_step,
    )
    assert probe(fresh=True).reason.endswith("(the guest loops)")


@pytest.mark.parametrize("spoil", [lambda text: "x" + text, lambda text: text[:9], lambda _: ""])
def test_a_kept_answer_of_another_boot_or_a_damaged_one_is_not_used(
    private_cache: Path, spoil: object
) -> None:
    probe()
    assert callable(spoil)
    private_cache.write_text(spoil(private_cache.read_text()))
    assert not probe().cached
    assert probe().cached


def test_a_cache_that_cannot_be_written_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert probe().reason
    assert not probe().cached


def test_the_image_starts_at_step_0_with_no_vector() -> None:
    def word(gpa: int) -> int:
        (value,) = struct.unpack_from("<I", guest.IMAGE, gpa)
        return int(value)

    assert word(guest.STEP_GPA) == guest.STEP_START
    assert word(guest.VECTOR_GPA) == guest.NO_VECTOR
    assert word(guest.FEATURES_GPA) == 0
