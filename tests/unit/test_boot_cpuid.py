"""What CPUID says to each vCPU, on Intel and on AMD hosts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pyvmm.boot.cpuid import SIGNIFICANT_INDEX, CpuidEntry, guest_cpuid, host_cpu_model

ALL_ONES = 0xFFFF_FFFF


def leaf(
    function: int, subleaf: int = 0, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0
) -> CpuidEntry:
    return CpuidEntry(function, subleaf, SIGNIFICANT_INDEX, eax, ebx, ecx, edx)


def vendor(name: bytes) -> CpuidEntry:
    ebx, edx, ecx = (int.from_bytes(name[i : i + 4], "little") for i in (0, 4, 8))
    return leaf(0, eax=0x20, ebx=ebx, ecx=ecx, edx=edx)


# Cache leaves, EAX: type, level << 5, and ones in all that tells of sharing.
L1, L2, L3 = (0xFFFF_C000 | 1 | level << 5 for level in (1, 2, 3))
HOST_LEAVES = [
    leaf(0x1, ebx=ALL_ONES, ecx=ALL_ONES & ~(1 << 31 | 1 << 24), edx=ALL_ONES),
    *(leaf(0x4, i, eax) for i, eax in enumerate((L1, L2, L3, 0))),
    leaf(0x5, eax=64),
    leaf(0x7, ebx=0x1234),
    leaf(0xA, eax=0x0730_0402),
    *(leaf(0xB, i, eax=7, ebx=64, ecx=i | (i + 1) << 8, edx=9) for i in range(2)),
    *(leaf(0x1F, i, eax=7, ebx=64, ecx=i | (i + 1) << 8, edx=9) for i in range(2)),
    leaf(0x8000_0001, ecx=ALL_ONES, edx=ALL_ONES),
    *(leaf(function) for function in (0x8000_0002, 0x8000_0003, 0x8000_0004)),
    leaf(0x8000_0008, eax=0x3030, ecx=0x7001),
    leaf(0x8000_000A, eax=1),
    *(leaf(0x8000_001D, i, eax) for i, eax in enumerate((L1, L2, L3, 0))),
    leaf(0x8000_001E, eax=9, ebx=0x109, ecx=0x101),
    leaf(0x8000_0022, eax=1),
    leaf(0x8000_0026, eax=1),
    leaf(0x4000_0000, eax=0x4000_0001, ebx=0x4B4D564B, ecx=0x564B4D56, edx=0x4D),
    leaf(0x4000_0001, eax=0x0100_7EFB),
]
INTEL = [vendor(b"GenuineIntel"), *HOST_LEAVES]
AMD = [vendor(b"AuthenticAMD"), *HOST_LEAVES]
SIZES = [(cpus, index) for cpus in (1, 2, 3, 4, 64, 255) for index in {0, cpus // 2, cpus - 1}]


def cpuid(
    host: list[CpuidEntry], cpus: int, index: int, **options: Any
) -> dict[tuple[int, int], CpuidEntry]:
    leaves = guest_cpuid(host, cpus=cpus, cpu_index=index, **options)
    by_number = {(entry.function, entry.subleaf): entry for entry in leaves}
    assert len(by_number) == len(leaves)
    for entry in leaves:
        assert all(0 <= register <= ALL_ONES for register in entry[3:])
    return by_number


@pytest.mark.parametrize(("cpus", "index"), SIZES)
@pytest.mark.parametrize("host", [INTEL, AMD], ids=["intel", "amd"])
def test_topology(host: list[CpuidEntry], cpus: int, index: int) -> None:
    leaves = cpuid(host, cpus, index)
    basic = leaves[1, 0]
    assert basic.ebx >> 24 == index  # initial APIC ID
    assert bool(basic.edx >> 28 & 1) == (cpus > 1)
    assert basic.ebx >> 16 & 0xFF >= min(cpus, 255)
    assert basic.ebx & 0xFFFF == 0xFFFF
    for function in (0xB, 0x1F):
        threads, cores, end = (leaves[function, i] for i in range(3))
        assert (threads.eax, threads.ebx, threads.ecx, threads.edx) == (0, 1, 1 << 8, index)
        assert (cores.ebx, cores.ecx, cores.edx) == (cpus, 1 | 2 << 8, index)
        assert 1 << cores.eax >= cpus  # all are in package 0
        assert index >> cores.eax == 0
        assert (end.eax, end.ebx, end.ecx) == (0, 0, 2)
        assert threads.flags & cores.flags & end.flags == SIGNIFICANT_INDEX


@pytest.mark.parametrize(("cpus", "index"), SIZES)
def test_caches(cpus: int, index: int) -> None:
    leaves = cpuid(INTEL, cpus, index)
    for function in (0x4, 0x8000_001D):
        level1, level2, level3, end = (leaves[function, i].eax for i in range(4))
        assert level1 >> 14 & 0xFFF == level2 >> 14 & 0xFFF == 0  # a core's own
        assert level3 >> 14 & 0xFFF >= cpus - 1  # shared by all
        assert level3 & 0x3FFF == L3 & 0x3FFF
        assert end == 0
    assert leaves[0x4, 0].eax >> 26 >= min(cpus - 1, 63)


@pytest.mark.parametrize(("cpus", "index"), SIZES)
def test_topology_of_amd(cpus: int, index: int) -> None:
    leaves = cpuid(AMD, cpus, index)
    assert bool(leaves[0x8000_0001, 0].ecx >> 1 & 1) == (cpus > 1)
    sizes = leaves[0x8000_0008, 0]
    assert sizes.eax == 0x3030
    assert sizes.ecx & 0xFF == cpus - 1
    assert 1 << (sizes.ecx >> 12 & 0xF) >= cpus
    extended = leaves[0x8000_001E, 0]
    assert (extended.eax, extended.ebx, extended.ecx) == (index, index, 0)


def test_leaf_80000008_is_left_alone_on_intel() -> None:
    assert cpuid(INTEL, 4, 1)[0x8000_0008, 0].ecx == 0x7001


@pytest.mark.parametrize("host", [INTEL, AMD], ids=["intel", "amd"])
def test_what_the_machine_does_not_have(host: list[CpuidEntry]) -> None:
    leaves = cpuid(host, 2, 0)
    for function in (0x5, 0xA, 0x8000_000A, 0x8000_0022, 0x8000_0026):
        assert (function, 0) not in leaves
    monitor, vmx, pdcm = 1 << 3, 1 << 5, 1 << 15
    assert leaves[1, 0].ecx & (monitor | vmx | pdcm) == 0
    svm, perfctr_core = 1 << 2, 1 << 23
    assert leaves[0x8000_0001, 0].ecx & (svm | perfctr_core) == 0


@pytest.mark.parametrize(
    ("model", "brand"),
    [
        ("A CPU of 4 cores", b"A CPU of 4 cores".ljust(48, b"\0")),
        ("x" * 60, b"x" * 47 + b"\0"),
        ("", bytes(48)),
        ("\N{SNOWMAN}", b"?".ljust(48, b"\0")),
    ],
)
def test_model_name(model: str, brand: bytes) -> None:
    leaves = cpuid(INTEL, 1, 0, model=model)
    registers = [leaves[0x8000_0002 + i, 0][3:] for i in range(3)]
    assert b"".join(r.to_bytes(4, "little") for row in registers for r in row) == brand


def test_model_of_this_host() -> None:
    assert host_cpu_model() in Path("/proc/cpuinfo").read_text()


def test_hypervisor_and_its_timer() -> None:
    hypervisor, tsc_deadline = 1 << 31, 1 << 24
    assert cpuid(INTEL, 1, 0)[1, 0].ecx & (hypervisor | tsc_deadline) == hypervisor | tsc_deadline
    without = cpuid(INTEL, 1, 0, tsc_deadline=False)[1, 0].ecx
    assert without & (hypervisor | tsc_deadline) == hypervisor


def test_everything_else_is_as_kvm_gives_it() -> None:
    leaves = cpuid(INTEL, 2, 1)
    for entry in INTEL:
        if entry.function in (0, 7) or entry.function >> 16 == 0x4000:
            assert leaves[entry.function, entry.subleaf] == entry
