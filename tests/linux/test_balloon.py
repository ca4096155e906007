"""The balloon in Linux guests: what comes back to the host, and what becomes of the guest."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.linux_guest import LinuxGuest, boot_tiny

from pyvmm.backends import pressure
from pyvmm.machine.balloon import Balloon, describe_stall

MIB = 1 << 20
PAGE = 4096
PATIENCE = 120.0


def balloon_of(guest: LinuxGuest) -> Balloon:
    assert guest.vm.balloon is not None
    return guest.vm.balloon


def rss() -> int:
    """What of this process, which is the monitor, is in memory."""
    match = re.search(r"^Rss: +(\d+) kB$", Path("/proc/self/smaps_rollup").read_text(), re.M)
    assert match is not None
    return int(match[1]) << 10


def wait_until(condition: Callable[[], object], timeout: float = PATIENCE) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never became true"
        time.sleep(0.1)


def touch(guest: LinuxGuest, mib: int) -> None:
    """Has the guest write that much, and free it again."""
    guest.check(
        f"mkdir -p /fill; mount -t tmpfs -o size={mib + 1}m none /fill\n"
        "line=$(printf %04095d 0)\n"
        f"yes $line | dd of=/fill/file bs=1M count={mib} iflag=fullblock 2>/dev/null\n"
        "umount /fill"
    )


def zero_pages(guest: LinuxGuest) -> int:
    board = guest.vm._board
    assert board is not None
    zero = bytes(PAGE)
    count = 0
    for gpa, size in board.memory.ram:
        with board.memory.view(gpa, size) as view:
            count += sum(bytes(view[at : at + PAGE]) == zero for at in range(0, size, PAGE))
    return count


@pytest.fixture(scope="module")
def lending() -> Iterator[LinuxGuest]:
    """A guest that gives memory when it is asked to."""
    guest = boot_tiny(memory="256M", balloon="stats=1,hinting=on")
    yield guest
    guest.vm.close()


def test_what_is_freed_comes_back_through_reporting_alone() -> None:
    guest = boot_tiny(memory="1G", balloon="reporting=on")
    try:
        before = rss()
        touch(guest, 700)
        touched = rss()
        assert touched - before > 600 * MIB
        wait_until(lambda: touched - rss() > 0.9 * 700 * MIB)
        assert balloon_of(guest).device.reported * PAGE > 0.9 * 700 * MIB
        assert balloon_of(guest).device.inflated == 0
        touch(guest, 100)  # it works with what it gave back
    finally:
        guest.vm.close()


def test_the_guest_tells_of_its_memory(lending: LinuxGuest) -> None:
    balloon = balloon_of(lending)
    wait_until(lambda: balloon.stats)
    first = balloon.stats
    assert first is not None
    total = int(lending.check("awk '/^MemTotal/ { print $2 }' /proc/meminfo")) << 10
    assert first.values["total_memory"] == total
    assert 0 < first.values["free_memory"] < total
    assert 0 < first.values["available_memory"] < total
    wait_until(lambda: balloon.stats is not first)
    assert balloon.stats is not None
    assert 0.5 < balloon.stats.time - first.time < PATIENCE


def test_lent_memory_leaves_the_monitor_and_comes_back_zeroed(lending: LinuxGuest) -> None:
    balloon = balloon_of(lending)
    events: list[object] = []
    lending.vm.on_event(
        lambda event: (
            events.append(event.data["actual"]) if event.name == "BALLOON_CHANGE" else None
        )
    )
    touch(lending, 160)
    before, inflated = rss(), balloon.device.inflated
    assert zero_pages(lending) * PAGE < 80 * MIB
    balloon.set_target("144M")
    assert balloon.wait(PATIENCE)
    assert balloon.actual == 144 * MIB
    assert balloon.device.inflated - inflated == 112 * MIB // PAGE
    # What the guest does meanwhile touches some pages for the first time.
    assert before - rss() == pytest.approx(112 * MIB, rel=0.02)
    assert zero_pages(lending) * PAGE >= 112 * MIB
    wait_until(lambda: events and events[-1] == 144 * MIB)
    assert int(lending.check("awk '/^MemTotal/ { print $2 }' /proc/meminfo")) < 144 << 10
    balloon.set_target("256M")
    assert balloon.wait(PATIENCE)
    touch(lending, 160)


def test_a_paused_guest_lends_when_it_goes_on(lending: LinuxGuest) -> None:
    balloon = balloon_of(lending)
    lending.vm.pause()
    balloon.set_target("224M")
    assert not balloon.wait(1)
    assert balloon.actual == 256 * MIB
    lending.vm.resume()
    assert balloon.wait(PATIENCE)
    balloon.set_target("256M")
    assert balloon.wait(PATIENCE)


def test_more_than_the_guest_can_spare(lending: LinuxGuest) -> None:
    balloon = balloon_of(lending)
    stalled: list[dict[str, object]] = []
    lending.vm.on_event(
        lambda event: stalled.append(event.data) if event.name == "BALLOON_STALLED" else None
    )
    balloon.set_target("32M")
    wait_until(lambda: stalled)
    assert stalled[0]["target"] == 32 * MIB
    assert 32 * MIB < balloon.actual < 128 * MIB
    assert re.fullmatch(
        r"the guest has \d+[MK] of memory and is to have 32M, but gives no more: "
        "it cannot spare the rest",
        describe_stall(balloon),
    )
    for _ in range(20):
        assert lending.check("echo alive") == "alive"
    balloon.set_target("256M")
    assert balloon.wait(PATIENCE)
    touch(lending, 100)
    assert lending.check("dmesg | grep -c 'Killed process' || true") == "0"


def test_all_that_is_free_is_taken_back_at_once(lending: LinuxGuest) -> None:
    balloon = balloon_of(lending)
    touch(lending, 160)
    before = rss()
    assert balloon.reclaim(PATIENCE) > 120 * MIB
    assert before - rss() > 120 * MIB
    touch(lending, 160)


def test_a_guest_that_runs_out_of_memory_takes_it_back() -> None:
    guest = boot_tiny(memory="256M", balloon="size=128M,deflate-on-oom=on")
    try:
        balloon = balloon_of(guest)
        assert balloon.wait(PATIENCE)
        assert balloon.actual == 128 * MIB
        touch(guest, 120)
        assert balloon.actual > 140 * MIB
        assert balloon.target == 128 * MIB
        assert guest.check("dmesg | grep -c 'Killed process' || true") == "0"
    finally:
        guest.vm.close()


def test_an_automatic_balloon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under pressure the host takes what lies idle; the guest has it back when it needs it."""
    psi = tmp_path / "memory"
    monkeypatch.setattr(pressure, "_WHOLE_HOST", str(psi))
    monkeypatch.setattr(pressure, "_cgroup_files", list)
    psi.write_text("some avg10=50.00 avg60=0.00 avg300=0.00 total=0\n")
    guest = boot_tiny(memory="256M", balloon="stats=1,auto=on,deflate-on-oom=on")
    try:
        balloon = balloon_of(guest)
        assert balloon.remarks == []
        wait_until(lambda: balloon.actual <= 200 * MIB)
        lent = balloon.actual
        guest.check(
            "mkdir /used; mount -t tmpfs -o size=200m none /used\n"
            "for part in 1 2 3 4 5 6 7 8; do\n"
            "dd if=/dev/zero of=/used/$part bs=1M count=16 2>/dev/null; sleep 1; done"
        )
        wait_until(lambda: balloon.actual > lent)
        guest.check("umount /used")
        psi.write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
        wait_until(lambda: balloon.actual == 256 * MIB)
        assert guest.check("dmesg | grep -c 'Killed process' || true") == "0"
    finally:
        guest.vm.close()
