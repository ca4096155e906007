"""The cache of unpacked kernels: what is found in it, what is not, and when it cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import kernel_images as images
from support.kernel_images import LOAD_GPA, Load, Memory

from pyvmm.boot import flat, linux

MIB = 1 << 20
# Blocks of zeroes at the start, in the middle and at the end, and an end within a block.
DATA = bytes(70_000) + b"one" + bytes(200_000) + b"two" * 30_000 + bytes(140_001)
VMLINUX = images.elf([Load(LOAD_GPA, DATA, size=len(DATA) + 5000)])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "pyvmm" / "kernels"


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The paths of the kernels that were parsed, not found in the cache."""
    from pyvmm.boot import elf

    paths: list[str] = []
    parse = elf.parse_vmlinux

    def spy(image: object, path: str) -> object:
        paths.append(path)
        return parse(image, path)  # type: ignore[arg-type]

    monkeypatch.setattr(elf, "parse_vmlinux", spy)
    return paths


def load(path: str) -> None:
    memory = Memory(17 * MIB)
    linux.load_kernel(memory, path, None, "")
    assert memory.read(LOAD_GPA, len(DATA) + 5000) == DATA + bytes(5000)


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


def test_second_boot_finds_it_under_each_path(
    tmp_path: Path, cache: Path, parsed: list[str]
) -> None:
    path = images.file(tmp_path, VMLINUX)
    load(path)
    alias = tmp_path / "alias"
    alias.symlink_to(path)
    load(path)
    load(str(alias))
    assert parsed == [path]
    (entry,) = entries(cache)
    assert entry.stat().st_mode & 0o77 == 0
    assert entry.stat().st_size < len(DATA) / 2  # zeroes are left out


def test_found_without_parser_and_decompressors(tmp_path: Path) -> None:
    """What makes a second boot fast: neither is imported."""
    path = images.file(tmp_path, VMLINUX)
    load(path)
    script = (
        "import sys; from support.kernel_images import Memory; from pyvmm.boot import linux\n"
        f"linux.load_kernel(Memory(17 << 20), {path!r}, None, '')\n"
        "print(' '.join(sys.modules.keys() & {'elftools', 'lzma', 'bz2', 'pyvmm.boot.elf',"
        " 'pyvmm.boot.payload'}))"
    )
    path_of_support = str(Path(__file__).parent.parent)
    environment = os.environ | {"PYTHONPATH": path_of_support}
    result = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "\n", "")


def test_changed_kernel_is_another_one(tmp_path: Path, parsed: list[str]) -> None:
    path = images.file(tmp_path, VMLINUX)
    times = Path(path).stat()
    load(path)
    changed = VMLINUX.replace(b"two", b"TWO")
    Path(path).write_bytes(changed)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # only the ctime gives it away
    memory = Memory(17 * MIB)
    linux.load_kernel(memory, path, None, "")
    assert parsed == [path, path]
    assert memory.read(LOAD_GPA, len(DATA)) == DATA.replace(b"two", b"TWO")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],  # the disk was full, or the power failed
        lambda data: data[:100],
        lambda data: data[:8240],  # within the table of extents
        lambda data: b"",
        lambda data: b"pyvmmK99" + data[8:],  # of a later pyvmm
        lambda data: data[:60] + b"?" + data[61:],  # of a kernel with another beginning
    ],
)
def test_damaged_entry_is_made_anew(
    tmp_path: Path, cache: Path, parsed: list[str], damage: object
) -> None:
    path = images.file(tmp_path, VMLINUX)
    load(path)
    (entry,) = entries(cache)
    good = entry.read_bytes()
    entry.write_bytes(damage(good))  # type: ignore[operator]
    load(path)
    assert parsed == [path, path]
    assert entry.read_bytes() == good


@pytest.mark.parametrize("directory", ["/dev/null", "/proc/nowhere"])
def test_cache_that_cannot_be_written(
    tmp_path: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch, directory: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", directory)
    path = images.file(tmp_path, VMLINUX)
    load(path)
    load(path)
    assert parsed == [path, path]


def test_full_disk(
    tmp_path: Path, cache: Path, parsed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(source: str, destination: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "rename", no_space)
    path = images.file(tmp_path, VMLINUX)
    load(path)
    assert entries(cache) == []  # nothing half-written stays


def test_relative_cache_directory_is_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    load(images.file(tmp_path, VMLINUX))
    assert len(entries(tmp_path / ".cache" / "pyvmm" / "kernels")) == 1


@pytest.mark.parametrize(
    ("limit", "value"), [("_KEPT_ENTRIES", 3), ("_KEPT_BYTES", 700_000)], ids=["number", "size"]
)
def test_oldest_entries_go(
    tmp_path: Path,
    cache: Path,
    parsed: list[str],
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
    value: int,
) -> None:
    monkeypatch.setattr(flat, limit, value)
    paths = [images.file(tmp_path, VMLINUX, f"kernel{i}") for i in range(4)]
    for i, path in enumerate(paths[:-1]):
        load(path)
        newest = max(entries(cache), key=lambda entry: entry.stat().st_mtime_ns)
        os.utime(newest, (i, i))
    load(paths[0])  # used again: now the newest
    load(paths[-1])
    assert len(entries(cache)) == 3
    del parsed[:]
    load(paths[0])
    assert parsed == []
    load(paths[1])
    assert parsed == [paths[1]]


def test_many_extents(tmp_path: Path) -> None:
    """More than the first read of an entry holds."""
    loads = [Load(LOAD_GPA + i * 16, bytes([i & 0xFF or 1])) for i in range(1000)]
    path = images.file(tmp_path, images.elf(loads))
    for _ in range(2):
        memory = Memory(17 * MIB)
        linux.load_kernel(memory, path, None, "")
        for segment in loads:
            assert memory.read(segment.gpa, 2) == segment.data + b"\0"
