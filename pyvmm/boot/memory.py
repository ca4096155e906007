"""What the boot code asks of guest memory; ``pyvmm.machine.memory`` provides it.

Imported for type checking only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class GuestMemory(Protocol):
    """Guest RAM. All addresses are guest-physical, all sizes bytes."""

    @property
    def ram(self) -> Sequence[tuple[int, int]]:
        """(gpa, size) of each region, ascending: the first from 0, a second one from 4 GiB."""

    def write(self, gpa: int, data: bytes | bytearray | memoryview) -> None:
        """Copies ``data`` to ``gpa``."""

    def view(self, gpa: int, size: int) -> memoryview:
        """The writable bytes at ``gpa``; all of them must be RAM."""
