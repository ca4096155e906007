"""The host's memory pressure: PSI, Linux' pressure stall information (accounting/psi.rst)."""

from __future__ import annotations

import os

_WHOLE_HOST = "/proc/pressure/memory"
_CGROUP_ROOT = "/sys/fs/cgroup"


class MemoryPressure:
    """That of the whole host and of the control group that pyvmm is in, whichever is worse.

    `paths` are the files that tell it, none where the kernel has no PSI; `reason` is then why.
    """

    def __init__(self) -> None:
        self.paths: list[str] = []
        self.reason = ""
        for path in (_WHOLE_HOST, *_cgroup_files()):
            try:
                _some(path)
            except OSError as error:
                self.reason = self.reason or f"{path}: {error.strerror}"
            else:
                self.paths.append(path)

    def read(self) -> float | None:
        """The percentage of the last ten seconds in which somebody waited for memory.

        None where nothing tells it.
        """
        shares = []
        for path in self.paths:
            try:
                shares.append(_some(path))
            except OSError:  # a control group that is gone
                continue
        return max(shares, default=None)


def _some(path: str) -> float:
    """OSError where there is no PSI; it is also read that way where it was disabled at boot."""
    with open(path) as file:
        for line in file:
            kind, *values = line.split()
            if kind == "some":
                return float(dict(value.split("=") for value in values)["avg10"])
    raise OSError(0, "it says nothing of memory")


def _cgroup_files() -> list[str]:
    """That of our control group (version 2), unless it is the root, which has none."""
    try:
        with open("/proc/self/cgroup") as file:
            lines = file.read().splitlines()
    except OSError:
        return []
    for line in lines:
        number, _, path = line.split(":", 2)
        if number == "0" and path != "/":
            file_name = os.path.join(_CGROUP_ROOT, path.lstrip("/"), "memory.pressure")
            return [file_name] if os.path.exists(file_name) else []
    return []
