"""What the tables for the guest say of the machine's devices."""

from __future__ import annotations

from typing import NamedTuple

# The ID register of KVM's I/O APIC reads 0. I/O APICs and local APICs have separate ID spaces
# since the Pentium 4, so that CPU 0 may have the same one.
IOAPIC_ID = 0


class VirtioSlot(NamedTuple):
    """A virtio-mmio register page at ``gpa`` and its interrupt; ``shared``: not alone on it."""

    gpa: int
    gsi: int
    shared: bool
