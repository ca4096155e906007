"""pyvmm: a virtual machine monitor for Linux KVM.

>>> import pyvmm
>>> with pyvmm.VM(kernel="bzImage", disks=["disk.img"], memory="1G") as vm:
...     vm.start()
...     vm.wait(timeout=60).check()

The names below are the public API. Each is imported when it is first used, so that ``import
pyvmm`` costs next to nothing.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.backends.switch import Switch
    from pyvmm.config import ChardevConfig, DiskConfig, NetConfig, VmConfig
    from pyvmm.errors import (
        ExitStatus,
        GuestCrash,
        GuestPanic,
        GuestTimeout,
        KvmError,
        NoKvmError,
        PyvmmError,
        UsageError,
    )
    from pyvmm.machine.events import Event
    from pyvmm.machine.vm import VM, Outcome

__all__ = [
    "VM",
    "ChardevConfig",
    "DiskConfig",
    "Event",
    "ExitStatus",
    "GuestCrash",
    "GuestPanic",
    "GuestTimeout",
    "KvmError",
    "NetConfig",
    "NoKvmError",
    "Outcome",
    "PyvmmError",
    "Switch",
    "UsageError",
    "VmConfig",
]

_HOMES = {
    "pyvmm.backends.switch": ("Switch",),
    "pyvmm.config": ("ChardevConfig", "DiskConfig", "NetConfig", "VmConfig"),
    "pyvmm.errors": (
        "ExitStatus",
        "GuestCrash",
        "GuestPanic",
        "GuestTimeout",
        "KvmError",
        "NoKvmError",
        "PyvmmError",
        "UsageError",
    ),
    "pyvmm.machine.events": ("Event",),
    "pyvmm.machine.vm": ("VM", "Outcome"),
}


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    for home, names in _HOMES.items():
        if name in names:
            from importlib import import_module

            value: object = getattr(import_module(home), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
