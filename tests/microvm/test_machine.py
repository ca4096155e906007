"""The machine as a guest of a few instructions sees it: console, power, crash, pause."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
from support.mmio_driver import wait_until

from pyvmm.errors import ExitStatus, GuestCrash, GuestPanic, GuestTimeout
from pyvmm.guest.console import ExpectTimeout, GuestConsole
from pyvmm.machine.vm import VM

PROMPT = b"> "
Boot = Callable[..., tuple[VM, GuestConsole]]


@pytest.fixture
def boot(boot_micro: Boot, monitor_guest: Path) -> Boot:
    """The guest that obeys its serial port."""
    return partial(boot_micro, monitor_guest)


def test_serial_carries_bytes_both_ways(boot: Boot) -> None:
    _, console = boot()
    text = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789" * 20
    console.send(text)
    console.expect(text, timeout=10)


def test_power_off_ends_with_status_0(boot: Boot) -> None:
    vm, console = boot()
    console.send(b"p")
    outcome = vm.wait(timeout=10)
    assert (outcome.status, outcome.error) == (ExitStatus.OK, None)


def test_a_console_ends_with_its_guest(boot: Boot) -> None:
    """Who waits for a word of a guest that is gone is told at once."""
    vm, console = boot()
    console.send(b"p")
    with pytest.raises(ExpectTimeout, match="before it ended"):
        console.expect(b"never said", timeout=60)
    assert vm.wait(timeout=10).status == ExitStatus.OK


def test_the_end_is_told_even_where_something_holds_on_to_the_machine(boot: Boot) -> None:
    vm, console = boot()
    assert vm._board is not None
    with vm._board.memory.view(0, 1):  # so that it cannot be unmapped
        console.send(b"p")
        outcome = vm.wait(timeout=10)
    assert outcome.status == ExitStatus.INTERNAL
    assert isinstance(outcome.error, BufferError)


def test_reset_boots_again_from_the_start(boot: Boot) -> None:
    vm, console = boot()
    for _ in range(5):
        console.send(b"r")
        console.expect(PROMPT, timeout=10)
    console.send(b"p")
    assert vm.wait(timeout=10).status == ExitStatus.OK


def test_reset_ends_the_vm_with_no_reboot(boot: Boot) -> None:
    vm, console = boot(reboot=False)
    console.send(b"r")
    assert vm.wait(timeout=10).status == ExitStatus.OK


def test_triple_fault_is_reported_with_registers_and_code(boot: Boot) -> None:
    vm, console = boot()
    console.send(b"x")
    outcome = vm.wait(timeout=10)
    assert outcome.status == ExitStatus.GUEST_CRASH
    with pytest.raises(GuestCrash, match="vCPU 0 took a triple fault") as caught:
        outcome.check()
    notes = "\n".join(caught.value.__notes__)
    assert "| > " in notes, "the last line of the console"
    if "on AMD processors a shutdown resets the vCPU" not in notes:
        assert "rip 00000000010000" in notes
        assert "code at 0x10000" in notes
        assert "0f 0b" in notes, "the UD2 that could not be delivered"


def test_panic_through_pvpanic(boot: Boot) -> None:
    vm, console = boot()
    console.send(b"c")
    outcome = vm.wait(timeout=10)
    assert outcome.status == ExitStatus.GUEST_PANIC
    with pytest.raises(GuestPanic, match="pvpanic"):
        outcome.check()


def test_a_guest_that_spins_or_halts_can_be_stopped_at_once(boot: Boot) -> None:
    for command in (b"s", b"h"):
        vm, console = boot()
        console.send(command)
        time.sleep(0.05)
        started = time.monotonic()
        vm.stop()
        assert time.monotonic() - started < 5, "stopping must not hang"
        assert vm.outcome is not None
        assert vm.outcome.status == ExitStatus.OK


def test_timeout_ends_the_guest_and_shows_its_console(boot: Boot) -> None:
    vm, console = boot()
    console.send(b"s")
    outcome = vm.wait(timeout=0.2)
    assert outcome.status == ExitStatus.TIMEOUT
    with pytest.raises(GuestTimeout, match=r"did not end within 0\.2 s") as caught:
        outcome.check()
    assert any("> " in note for note in caught.value.__notes__)


def test_paused_guest_does_nothing_until_it_is_resumed(boot: Boot) -> None:
    vm, console = boot()
    for _ in range(20):
        vm.pause()
        console.send(b"A")
        assert console.read(timeout=0.02) == b""
        vm.resume()
        console.expect(b"A", timeout=10)


def test_pause_and_resume_in_a_storm_always_return(boot: Boot) -> None:
    vm, console = boot()
    console.send(b"s")
    for _ in range(500):
        vm.pause()
        vm.resume()
    vm.stop()


def listen(vm: VM) -> Callable[[], list[tuple[str, dict[str, object]]]]:
    """Tells of the events since it was last called."""
    told: list[tuple[str, dict[str, object]]] = []
    vm.on_event(lambda event: told.append((event.name, event.data)))

    def take() -> list[tuple[str, dict[str, object]]]:
        taken = told[:]
        del told[: len(taken)]
        return taken

    return take


def test_pausing_is_told_of_once(boot: Boot) -> None:
    vm, _ = boot()
    events = listen(vm)
    for _ in range(2):
        vm.pause()
    assert (vm.state, events()) == ("paused", [("STOP", {})])
    for _ in range(2):
        vm.resume()
    assert (vm.state, events()) == ("running", [("RESUME", {})])


def test_resets_of_the_guest_and_of_its_user_are_told_of(boot: Boot) -> None:
    vm, console = boot()
    events = listen(vm)
    console.send(b"r")
    console.expect(PROMPT, timeout=10)
    vm.reset()
    console.expect(PROMPT, timeout=10)
    console.send(b"p")
    assert vm.wait(timeout=10).reason == "guest-shutdown"
    assert events() == [
        ("RESET", {"guest": True, "reason": "guest-reset"}),
        ("RESET", {"guest": False, "reason": "host-qmp-system-reset"}),
        ("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"}),
    ]
    assert vm.state == "shutdown"
    vm.reset()  # of what is over: nothing


def test_a_paused_guest_stays_so_through_a_reset(boot: Boot) -> None:
    vm, console = boot()
    vm.pause()
    events = listen(vm)
    vm.reset()
    wait_until(events)
    console.send(b"A")
    assert console.read(timeout=0.2) == b""
    assert vm.state == "paused"
    vm.resume()
    console.expect(PROMPT + b"A", timeout=10)


def test_no_reboot_makes_a_reset_the_end(boot: Boot) -> None:
    vm, _ = boot(reboot=False)
    events = listen(vm)
    vm.reset()
    assert vm.wait(timeout=10).status == ExitStatus.OK
    assert events() == [("SHUTDOWN", {"guest": False, "reason": "host-qmp-system-reset"})]


def test_a_panic_is_told_of_before_its_end(boot: Boot) -> None:
    vm, console = boot()
    events = listen(vm)
    console.send(b"c")
    assert vm.wait(timeout=10).status == ExitStatus.GUEST_PANIC
    assert events() == [
        ("GUEST_PANICKED", {"action": "poweroff"}),
        ("SHUTDOWN", {"guest": True, "reason": "guest-panic"}),
    ]


def test_a_listener_that_fails_harms_nobody(boot: Boot, caplog: pytest.LogCaptureFixture) -> None:
    vm, _ = boot()
    vm.on_event(lambda event: 1 / 0)  # type: ignore[arg-type,return-value]
    events = listen(vm)
    vm.stop()
    assert events() == [("SHUTDOWN", {"guest": False, "reason": "host-signal"})]
    assert "who listens to events failed" in caplog.text


def test_nothing_answers_where_nothing_is(boot: Boot) -> None:
    _, console = boot()
    console.send(b"u")
    console.expect(b"\xff", timeout=10)


def test_no_descriptor_is_left_behind(boot: Boot) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    vm, console = boot()
    vm.close()
    before = descriptors()
    for _ in range(3):
        vm, console = boot()
        console.send(b"r")
        console.expect(PROMPT, timeout=10)
        vm.close()
        assert descriptors() == before


def test_a_balloon_without_a_driver(monitor_guest: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyvmm.machine import balloon

    monkeypatch.setattr(balloon, "STALL_SECONDS", 0.1)
    told: list[tuple[str, dict[str, object]]] = []
    with VM(kernel=monitor_guest, memory="64M", serial="pipe", balloon="16M,stats=1") as vm:
        assert vm.balloon is None
        vm.on_event(lambda event: told.append((event.name, event.data)))
        vm.start()
        assert vm.balloon is not None
        assert (vm.balloon.target, vm.balloon.actual) == (48 << 20, 64 << 20)
        vm.balloon.set_target("32M")
        wait_until(lambda: told)
        assert told == [("BALLOON_STALLED", {"actual": 64 << 20, "target": 32 << 20})]
        vm.reset()
        wait_until(lambda: "RESET" in dict(told))
        assert vm.balloon.target == 32 << 20
        assert vm.balloon.stats is None
