"""A kernel in flat form: what goes where in guest memory, readable straight into it.

Unpacking a kernel takes up to seconds, so the flat form stays in the user's cache
(``$XDG_CACHE_HOME/pyvmm/kernels``) and later boots only read it. A cache that cannot be written
costs the unpacking each time, and nothing else.

An entry is found by the inode number, size, mtime and ctime of the kernel file: they are the same
under each of its paths and mounts (also through virtiofs, where the device number is not), and
nobody can set a ctime. The first and last 4 KiB of the kernel must be the same as well.

The file: header, extents, then the data of the extents one after the other.
"""

from __future__ import annotations

import os
import struct
from contextlib import suppress

from pyvmm.boot.files import read_into

TYPE_CHECKING = False
if TYPE_CHECKING:
    import mmap
    from collections.abc import Callable

    from pyvmm.boot.elf import Segment
    from pyvmm.boot.memory import GuestMemory

_MAGIC = b"pyvmmK01"
_SAMPLE_SIZE = 4096  # of the beginning and of the end of the kernel file
_HEADER = struct.Struct(f"<8sQQQQ{2 * _SAMPLE_SIZE}s")  # magic, entry, start, end, extents
_EXTENT = struct.Struct("<QQ")  # gpa, size
_FIRST_READ = 16 << 10  # holds the header, and the extents of every kernel seen so far
# What stays in the cache: some ten kernels of a distribution, and many small ones of tests.
_KEPT_BYTES = 400 << 20
_KEPT_ENTRIES = 100

# Runs of zeroes of this size are left out: .bss takes 10 MiB in the file of a Debian kernel.
_BLOCK = 64 << 10
_ZEROES = bytes(_BLOCK)


class FlatKernel:
    """``entry`` is its physical entry address; all it uses is in ``start`` to ``end`` (gpa)."""

    __slots__ = ("_extents", "_fd", "end", "entry", "start")

    def __init__(self, fd: int, entry: int, start: int, end: int, extents: list[tuple[int, int]]):
        """Owns ``fd``, a flat file."""
        self._fd = fd
        self._extents = extents
        self.entry = entry
        self.start = start
        self.end = end

    def load(self, memory: GuestMemory) -> None:
        """Reads the kernel into ``memory``, which must be RAM from start to end, and zero."""
        offset = _HEADER.size + len(self._extents) * _EXTENT.size
        for gpa, size in self._extents:
            read_into(self._fd, memory.view(gpa, size), offset, "the kernel in the cache")
            offset += size

    def close(self) -> None:
        """Releases the descriptor."""
        os.close(self._fd)


def flat_kernel(
    kernel_fd: int, unpack: Callable[[], tuple[mmap.mmap, int, list[Segment]]]
) -> FlatKernel:
    """The kernel in the file ``kernel_fd`` from the cache, or else from ``unpack``.

    ``unpack`` returns the vmlinux, its entry address and its segments; what it raises is passed on.
    """
    status = os.fstat(kernel_fd)
    name = (
        f"{status.st_ino:x}-{status.st_size:x}-{status.st_mtime_ns:x}-{status.st_ctime_ns:x}.flat"
    )
    tail = max(0, status.st_size - _SAMPLE_SIZE)
    fingerprint = os.pread(kernel_fd, _SAMPLE_SIZE, 0) + os.pread(kernel_fd, _SAMPLE_SIZE, tail)
    fingerprint = fingerprint.ljust(2 * _SAMPLE_SIZE, b"\0")
    directory = _cache_directory()
    return _open_cached(f"{directory}/{name}", fingerprint) or _flatten(
        directory, name, fingerprint, *unpack()
    )


def _cache_directory() -> str:
    cache = os.environ.get("XDG_CACHE_HOME", "")
    # XDG base directory specification: relative paths are to be ignored.
    if not cache.startswith("/"):
        cache = os.path.expanduser("~/.cache")
    return f"{cache}/pyvmm/kernels"


def _open_cached(path: str, fingerprint: bytes) -> FlatKernel | None:
    """The cache entry at ``path``, unless it is missing, damaged or of another kernel."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    kernel = _parse(fd, fingerprint)
    if kernel is None:
        os.close(fd)
        return None
    # The age by which old entries go. Not in a cache that is read-only.
    with suppress(OSError):
        os.utime(fd)
    return kernel


def _parse(fd: int, fingerprint: bytes) -> FlatKernel | None:
    head = os.pread(fd, _FIRST_READ, 0)
    if len(head) < _HEADER.size:
        return None
    magic, entry, start, end, count, found = _HEADER.unpack_from(head)
    extents_end = _HEADER.size + count * _EXTENT.size
    if magic != _MAGIC or found != fingerprint:
        return None
    if extents_end > len(head):
        head = os.pread(fd, extents_end, 0)
    if extents_end > len(head):
        return None
    extents = [_EXTENT.unpack_from(head, o) for o in range(_HEADER.size, extents_end, _EXTENT.size)]
    # A power failure after the rename may leave a file that is too short: file systems set the
    # size when the data is on the disk.
    if os.fstat(fd).st_size != extents_end + sum(size for _, size in extents):
        return None
    return FlatKernel(fd, entry, start, end, extents)


def _flatten(
    directory: str,
    name: str,
    fingerprint: bytes,
    image: mmap.mmap,
    entry: int,
    segments: list[Segment],
) -> FlatKernel:
    """Writes the flat file of a vmlinux: into the cache, or where that fails into memory."""
    extents = [extent for segment in segments for extent in _extents_of(image, segment)]
    kernel_extents = [(gpa, size) for gpa, size, _ in extents]
    start = min(segment.gpa for segment in segments)
    end = max(segment.gpa + segment.size for segment in segments)

    def write(fd: int) -> None:
        with open(fd, "wb", closefd=False) as file:
            file.write(_HEADER.pack(_MAGIC, entry, start, end, len(extents), fingerprint))
            for extent in kernel_extents:
                file.write(_EXTENT.pack(*extent))
            for _, size, offset in extents:
                file.write(memoryview(image)[offset : offset + size])

    try:
        fd = _write_cached(directory, name, write)
    except OSError:
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
        write(fd)
    return FlatKernel(fd, entry, start, end, kernel_extents)


def _extents_of(image: mmap.mmap, segment: Segment) -> list[tuple[int, int, int]]:
    """(gpa, size, offset in the image) of what is not zero in a segment, in whole blocks."""
    extents: list[tuple[int, int, int]] = []
    end = segment.offset + segment.file_size
    for offset in range(segment.offset, end, _BLOCK):
        block = image[offset : min(offset + _BLOCK, end)]
        if block == _ZEROES[: len(block)]:
            continue
        gpa = segment.gpa + offset - segment.offset
        if extents and extents[-1][0] + extents[-1][1] == gpa:
            last_gpa, size, last_offset = extents[-1]
            extents[-1] = (last_gpa, size + len(block), last_offset)
        else:
            extents.append((gpa, len(block), offset))
    return extents


def _write_cached(directory: str, name: str, write: Callable[[int], None]) -> int:
    """Makes a cache entry with ``write`` and returns its descriptor. OSError when that fails."""
    os.makedirs(directory, mode=0o700, exist_ok=True)
    temporary = f"{directory}/{name}.{os.urandom(4).hex()}"
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        write(fd)
        os.rename(temporary, f"{directory}/{name}")
    except BaseException:
        os.close(fd)
        os.unlink(temporary)
        raise
    with suppress(FileNotFoundError):  # another process may do the same
        _forget_old_entries(directory)
    return fd


def _forget_old_entries(directory: str) -> None:
    """Removes all but the most recently used entries, and what crashed writers left."""
    with os.scandir(directory) as entries:
        by_age = sorted(entries, key=lambda entry: entry.stat().st_mtime_ns, reverse=True)
    total = 0
    for index, entry in enumerate(by_age):
        total += entry.stat().st_size
        if index >= _KEPT_ENTRIES or total > _KEPT_BYTES:
            os.unlink(entry)
