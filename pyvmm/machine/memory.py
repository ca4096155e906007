"""Guest RAM: one mapping on the host, one or two regions in the guest (the hole below 4 GiB)."""

from __future__ import annotations

import contextlib
import mmap
import os

from pyvmm import layout
from pyvmm._core import ffi
from pyvmm.errors import UsageError

HUGE_PAGE_SIZE = 2 << 20
MAP_NORESERVE = 0x4000  # asm-generic/mman.h; in Python's mmap module only from 3.13 on


class Region:
    """`size` bytes of RAM at guest-physical `gpa`, at host address `hva`."""

    __slots__ = ("gpa", "hva", "size")

    def __init__(self, gpa: int, size: int, hva: int) -> None:
        self.gpa = gpa
        self.size = size
        self.hva = hva


class GuestMemory:
    """The RAM of one virtual machine, zeroed, committed as the guest touches it.

    Anonymous memory, so that transparent huge pages back it: most hosts do not give them to a
    memfd (``shmem_enabled`` is ``never``), and then a guest's boot takes ten times the page faults.
    With `hugepages` it is a memfd on hugetlbfs, reserved whole.

    `native` is the ``struct guest_mem *`` through which C translates guest addresses.
    Raises UsageError when the host cannot give that much memory.
    """

    def __init__(self, size: int, *, hugepages: bool = False) -> None:
        self.size = size
        self._mmap = _map_hugetlb(size) if hugepages else _map_anonymous(size)
        self._view = memoryview(self._mmap)
        self._pin = ffi.from_buffer(self._mmap)
        hva = int(ffi.cast("uintptr_t", self._pin))

        low = min(size, layout.LOW_RAM_END)
        self.regions = [Region(0, low, hva)]
        if size > low:
            self.regions.append(Region(layout.HIGH_RAM_START, size - low, hva + low))
        self.native = ffi.new("struct guest_mem *")
        self.native.count = len(self.regions)
        for index, region in enumerate(self.regions):
            native = self.native.regions[index]
            native.gpa, native.size = region.gpa, region.size
            native.hva = ffi.cast("uint8_t *", region.hva)

    @property
    def ram(self) -> list[tuple[int, int]]:
        """(gpa, size) of each region, lowest first."""
        return [(region.gpa, region.size) for region in self.regions]

    def view(self, gpa: int, size: int) -> memoryview:
        """The `size` bytes at `gpa`, writable. ValueError unless all of them are RAM."""
        offset = 0
        for region in self.regions:
            if region.gpa <= gpa and gpa + size <= region.gpa + region.size:
                start = offset + gpa - region.gpa
                return self._view[start : start + size]
            offset += region.size
        raise ValueError(f"{size} bytes at {gpa:#x} are not guest RAM")

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copies `data` to `gpa`. ValueError unless all of it fits into RAM."""
        self.view(gpa, len(data))[:] = data

    def close(self) -> None:
        """Unmaps the memory; nobody may use it, nor a view of it, any more."""
        ffi.release(self._pin)
        self._view.release()
        self._mmap.close()


def _map_anonymous(size: int) -> mmap.mmap:
    try:
        # NORESERVE: a guest seldom touches all that it has.
        mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
    except OSError as error:
        raise UsageError(
            f"cannot map {size >> 20} MiB of guest memory ({error.strerror}): "
            "give the guest less with --memory"
        ) from None
    with contextlib.suppress(OSError):  # a kernel without transparent huge pages
        mapping.madvise(mmap.MADV_HUGEPAGE)
    return mapping


def _map_hugetlb(size: int) -> mmap.mmap:
    fd = os.memfd_create("guest-ram", os.MFD_CLOEXEC | os.MFD_HUGETLB | os.MFD_HUGE_2MB)
    try:
        os.ftruncate(fd, size)
        # Reserved here and now: running out of huge pages later would be a SIGBUS.
        return mmap.mmap(fd, size)
    except OSError:
        pages = size // HUGE_PAGE_SIZE
        raise UsageError(
            f"{pages} free huge pages of 2 MiB are needed for {size >> 20} MiB of guest memory: "
            f"reserve them with 'sudo sysctl vm.nr_hugepages={pages}'"
        ) from None
    finally:
        os.close(fd)
