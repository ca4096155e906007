"""Guest RAM: its regions, and the translation that all C code uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from pyvmm import layout
from pyvmm._core import ffi, lib
from pyvmm.errors import UsageError
from pyvmm.machine.memory import GuestMemory

MIB = 1 << 20


def test_small_memory_is_one_region() -> None:
    memory = GuestMemory(32 * MIB)
    assert memory.ram == [(0, 32 * MIB)]
    memory.write(0x1234, b"guest")
    assert bytes(memory.view(0x1234, 5)) == b"guest"
    assert memory.view(32 * MIB - 1, 1)[0] == 0
    memory.close()


def test_memory_beyond_3_gib_goes_above_4_gib() -> None:
    memory = GuestMemory(5 << 30)
    assert memory.ram == [
        (0, layout.LOW_RAM_END),
        (layout.HIGH_RAM_START, (5 << 30) - layout.LOW_RAM_END),
    ]
    memory.write(layout.HIGH_RAM_START, b"high")
    pointer = lib.guest_mem_at(memory.native, layout.HIGH_RAM_START, 4)
    assert ffi.buffer(pointer, 4)[:] == b"high"
    memory.close()


@pytest.mark.parametrize(
    ("gpa", "size"),
    [
        (layout.LOW_RAM_END - 1, 2),
        (layout.LOW_RAM_END, 1),
        (layout.HIGH_RAM_START - 1, 1),
        (layout.HIGH_RAM_START - 1, 2),
        ((5 << 30) + (1 << 30), 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        (0, (1 << 64) - 1),
    ],
)
def test_what_is_not_wholly_ram_is_refused(gpa: int, size: int) -> None:
    memory = GuestMemory(5 << 30)
    assert lib.guest_mem_at(memory.native, gpa, size) == ffi.NULL
    with pytest.raises(ValueError, match="not guest RAM"):
        memory.view(gpa, size)
    memory.close()


def test_huge_pages_that_the_host_does_not_have_are_refused_with_the_fix() -> None:
    free = int(Path("/proc/sys/vm/nr_hugepages").read_text())
    size = (free + 1) * 2 * MIB
    with pytest.raises(UsageError, match=rf"sudo sysctl vm\.nr_hugepages={free + 1}'"):
        GuestMemory(size, hugepages=True)


def test_more_memory_than_addresses_is_refused() -> None:
    with pytest.raises(UsageError, match="give the guest less with --memory"):
        GuestMemory(1 << 60)
