"""The CPUID leaves that a guest sees: the host's, cut to what the machine has.

Sources: Intel SDM vol. 2A, "CPUID"; AMD64 APM vol. 3, appendix E; Linux, Documentation/virt/kvm/
x86/cpuid.rst (leaves 0x4000_00xx) and api.rst, KVM_GET_SUPPORTED_CPUID.

KVM tells what it can do, and pyvmm keeps that but for
- the topology: one package, its cores with one thread each, APIC ID = index of the vCPU;
- performance counters: they would be switched at each entry and exit, for all guests;
- nested virtualization (VMX, SVM): the largest part of KVM that a guest could attack;
- MONITOR and MWAIT: KVM executes them as no-ops unless the guest may keep the host CPU to itself.
The paravirtual features stay as KVM gives them (clock with stable bit, async page faults, steal
time, PV EOI, IPIs, TLB flush, unhalt). KVM_HINTS_REALTIME stays off: vCPUs may share a host CPU.
"""

from __future__ import annotations

import struct
from collections import namedtuple

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyvmm.kvm._generated_uapi import kvm_cpuid_entry2

SIGNIFICANT_INDEX = 1 << 0  # KVM_CPUID_FLAG_SIGNIFCANT_INDEX: the leaf has subleaves

# Leaf 1.
_ECX_MONITOR = 1 << 3
_ECX_VMX = 1 << 5
_ECX_PDCM = 1 << 15
_ECX_TSC_DEADLINE = 1 << 24
_ECX_HYPERVISOR = 1 << 31
_EDX_HTT = 1 << 28  # the package has more than one logical processor

# Leaf 0x8000_0001.
_ECX_CMP_LEGACY = 1 << 1  # these are cores, not threads
_ECX_SVM = 1 << 2
_ECX_PERFCTR = 1 << 23 | 1 << 24 | 1 << 28  # core, northbridge, L3

_REMOVED_LEAVES = frozenset(
    (
        0x5,  # MONITOR
        0xA,  # performance counters
        0x1C,  # last branch records
        0x8000_000A,  # SVM
        0x8000_001B,  # instruction-based sampling
        0x8000_0022,  # performance counters
        0x8000_0026,  # AMD's extended topology: leaf 0xB says the same
    )
)

_BRAND_LEAVES = range(0x8000_0002, 0x8000_0005)
_BRAND_SIZE = 48

_CACHE_TYPE = 0x1F  # leaves 4 and 0x8000_001D, EAX: 0 ends the list of caches

# Leaves 0xB and 0x1F, ECX bits 15-8.
_LEVEL_INVALID = 0
_LEVEL_THREAD = 1
_LEVEL_CORE = 2

_VENDORS_AMD = (b"AuthenticAMD", b"HygonGenuine")


# Not typing.NamedTuple: importing typing takes longer than all of a VM's tables.
class CpuidEntry(namedtuple("CpuidEntry", "function subleaf flags eax ebx ecx edx")):
    """What CPUID answers for one leaf (and subleaf); as struct kvm_cpuid_entry2, all integers."""

    __slots__ = ()

    @classmethod
    def from_kvm(cls, entry: kvm_cpuid_entry2) -> CpuidEntry:
        """The entry that KVM_GET_SUPPORTED_CPUID returned."""
        return cls(
            entry.function,
            entry.index,
            entry.flags,
            entry.eax,
            entry.ebx,
            entry.ecx,
            entry.edx,
        )


def host_cpu_model() -> str:
    """The name of the host's CPU, such as "AMD EPYC 7763 64-Core Processor"; "" if not known."""
    with open("/proc/cpuinfo", "rb", buffering=0) as file:
        text = file.read(4096)
    for line in text.split(b"\n"):
        if line.startswith(b"model name"):
            return line.partition(b":")[2].strip().decode("ascii", "replace")
    return ""


def guest_cpuid(
    supported: Iterable[CpuidEntry],
    *,
    cpus: int,
    cpu_index: int,
    model: str = "",
    tsc_deadline: bool = True,
) -> list[CpuidEntry]:
    """The leaves of vCPU ``cpu_index`` out of ``cpus``, from what KVM supports.

    ``model`` is the processor's name, of which KVM says nothing; the first 47 characters count.
    ``tsc_deadline``: KVM_CAP_TSC_DEADLINE_TIMER, which KVM_GET_SUPPORTED_CPUID leaves out.
    """
    brand = model.encode("ascii", "replace")[: _BRAND_SIZE - 1].ljust(_BRAND_SIZE, b"\0")
    supported = list(supported)
    id_bits = (cpus - 1).bit_length()  # of an APIC ID
    last_id = (1 << id_bits) - 1
    amd = any(e.function == 0 and _vendor(e) in _VENDORS_AMD for e in supported)
    leaves = []
    for entry in supported:
        function, _, _, eax, ebx, ecx, edx = entry
        if function in _REMOVED_LEAVES:
            continue
        if function == 0x1:
            ebx = ebx & 0xFFFF | min(last_id + 1, 0xFF) << 16 | cpu_index << 24
            ecx &= ~(_ECX_MONITOR | _ECX_VMX | _ECX_PDCM)
            ecx |= _ECX_HYPERVISOR | (_ECX_TSC_DEADLINE if tsc_deadline else 0)
            edx = edx & ~_EDX_HTT | (_EDX_HTT if cpus > 1 else 0)
        elif function == 0x4 and eax & _CACHE_TYPE:
            # Bits 31-26: the last core ID of the package; 25-14: the last ID that shares the cache.
            eax = eax & 0x3FFF | min(last_id, 0x3F) << 26 | _cache_sharing(eax, last_id)
        elif function in (0xB, 0x1F):
            if entry.subleaf == 0:
                leaves += _extended_topology(function, cpus, cpu_index, id_bits)
            continue
        elif function == 0x8000_0001:
            ecx &= ~(_ECX_SVM | _ECX_PERFCTR)
            if amd:
                ecx = ecx & ~_ECX_CMP_LEGACY | (_ECX_CMP_LEGACY if cpus > 1 else 0)
        elif function in _BRAND_LEAVES:
            part = (function - _BRAND_LEAVES[0]) * 16
            eax, ebx, ecx, edx = struct.unpack_from("<4I", brand, part)
        elif function == 0x8000_0008 and amd:
            # Bits 15-12: the width of a core ID; 7-0: the number of cores - 1.
            ecx = ecx & ~0xF0FF | id_bits << 12 | cpus - 1
        elif function == 0x8000_001D and eax & _CACHE_TYPE:
            eax = eax & 0x3FFF | _cache_sharing(eax, last_id)
        elif function == 0x8000_001E:
            # APIC ID; one thread in core `cpu_index`; node 0 of a package that has one.
            eax, ebx, ecx = cpu_index, cpu_index, 0
        leaves.append(CpuidEntry(function, entry.subleaf, entry.flags, eax, ebx, ecx, edx))
    return leaves


def _vendor(entry: CpuidEntry) -> bytes:
    return b"".join(
        register.to_bytes(4, "little") for register in (entry.ebx, entry.edx, entry.ecx)
    )


def _cache_sharing(eax: int, last_id: int) -> int:
    """Bits 25-14 of a cache leaf: L1 and L2 belong to a core, what is beyond to the package."""
    level = eax >> 5 & 0x7
    return (last_id if level > 2 else 0) << 14


def _extended_topology(function: int, cpus: int, cpu_index: int, id_bits: int) -> list[CpuidEntry]:
    """Leaf 0xB or 0x1F: the levels thread and core, then an invalid one that ends the list.

    EAX: how far to shift an x2APIC ID to get the ID of the next level. EBX: logical processors at
    this level. ECX: level number and type. EDX: the x2APIC ID.
    """
    levels = ((0, 1, _LEVEL_THREAD), (id_bits, cpus, _LEVEL_CORE), (0, 0, _LEVEL_INVALID))
    return [
        CpuidEntry(function, i, SIGNIFICANT_INDEX, shift, count, i | type_ << 8, cpu_index)
        for i, (shift, count, type_) in enumerate(levels)
    ]
