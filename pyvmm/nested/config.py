"""The settings of the emulated machine."""

from __future__ import annotations

import os

from pyvmm.schema import GIB, MIB, TIB, Integer, Record, Seconds, Size, Source, setting

_MOST_CPUS = 64


class NestedConfig(Record):
    """What ``pyvmm nested`` and `pyvmm.nested.run_nested` can be told."""

    cpus: int = setting(
        Integer(1, _MOST_CPUS),
        default=1,
        help="CPUs (default: 1; with more, QEMU before 8.1 may lose guests)",
    )
    memory: int = setting(
        Size(512 * MIB, TIB, MIB),
        default=0,
        help="memory (default: 4G, or 60 %% of the host's where that is less)",
    )
    timeout: float | None = setting(
        Seconds(), default=None, help="end with status 124 after so long, start included"
    )

    def complete(self, source: Source) -> None:
        host = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        self.__dict__["memory"] = self.memory or min(4 * GIB, host * 6 // 10 // MIB * MIB)
