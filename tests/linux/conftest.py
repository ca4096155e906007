"""Guests with real kernels: they need a KVM that runs Linux, which `scripts/test linux` finds or
emulates.

In the emulated machine a test whose guest fell silent altogether, or ended in the middle of a
command, is run once more, and the summary says so: QEMU's emulation of SVM may lose a guest. A test
that failed in any other way is not repeated, and on real hardware none is.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol
from support.linux_guest import NESTED, GuestLost, LinuxGuest, boot_tiny, image, scratch_directory
from support.monitor import Monitor

from pyvmm.kvm.probe import probe

# One test: some guests, on a loaded machine, one of them possibly twice.
TIME_LIMIT = 600

_lost = pytest.StashKey[str]()
_restarted: list[str] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "without_kvm: runs where KVM cannot run Linux, too")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(TIME_LIMIT))


@functools.cache
def _why_not() -> str | None:
    result = probe()
    if result.can_run_linux:
        return None
    return f"{result.reason}; scripts/test linux runs this in an emulated machine"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("without_kvm") is None and (reason := _why_not()):
        pytest.skip(reason)


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    if not NESTED:
        return None
    hook = item.ihook
    hook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    if _lost in item.stash:
        _restarted.append(f"{item.nodeid}: {item.stash[_lost]}")
        reports = runtestprotocol(item, nextitem=nextitem, log=False)
    for report in reports:
        hook.pytest_runtest_logreport(report=report)
    hook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, call: pytest.CallInfo[object]
) -> None:
    assert call.excinfo is not None
    if isinstance(call.excinfo.value, GuestLost):
        node.stash[_lost] = str(call.excinfo.value).partition("\n")[0]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for line in _restarted:
        terminalreporter.write_line(f"restarted: {line}", yellow=True)


@pytest.fixture
def scratch() -> Iterator[Path]:
    with scratch_directory() as directory:
        yield directory


@pytest.fixture
def disk(scratch: Path) -> Callable[..., Path]:
    """Makes an empty (sparse) disk image of `size` bytes."""

    def disk(name: str, size: int = 16 << 20) -> Path:
        path = scratch / f"{name}.img"
        with path.open("xb") as file:
            file.truncate(size)
        return path

    return disk


@pytest.fixture
def image_disk(scratch: Path) -> Callable[[str], Path]:
    """Makes a copy of the disk of an image."""

    def image_disk(name: str) -> Path:
        original, copy = image(name).disk, scratch / f"{name}.img"
        assert original is not None
        subprocess.run(["cp", "--sparse=always", original, copy], check=True)
        return copy

    return image_disk


@pytest.fixture
def boot() -> Iterator[Callable[..., LinuxGuest]]:
    """Boots guests of the tiny image, as `boot_tiny` does, and ends them."""
    guests: list[LinuxGuest] = []

    def boot(**settings: object) -> LinuxGuest:
        guests.append(boot_tiny(**settings))
        return guests[-1]

    yield boot
    for guest in guests:
        guest.vm.close()


@pytest.fixture
def monitor() -> Iterator[Callable[..., Monitor]]:
    """Starts `pyvmm run` processes, and kills those that are left."""
    monitors: list[Monitor] = []

    def monitor(*options: object, **settings: object) -> Monitor:
        monitors.append(Monitor(*options, **settings))
        return monitors[-1]

    yield monitor
    for each in monitors:
        each.close()


def program_disk(name: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A disk image that is a tar archive of the static program made of ``name.c``."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: apt install gcc libc6-dev")
    directory = tmp_path_factory.mktemp(name)
    source = Path(__file__).with_name(f"{name}.c")
    program = directory / name
    subprocess.run(["gcc", "-O2", "-static", "-pthread", "-o", program, source], check=True)
    archive = directory / f"{name}.tar"
    subprocess.run(["tar", "-c", "-f", archive, "-C", directory, program.name], check=True)
    return archive


@pytest.fixture(scope="session")
def disk_stress(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program_disk("disk_stress", tmp_path_factory)


@pytest.fixture(scope="session")
def clock_probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return program_disk("clock_probe", tmp_path_factory)
