"""Every error pyvmm raises on purpose, and the exit status each one ends the program with.

The exit statuses are a contract with scripts and CI jobs; ``EXIT_STATUSES`` is its one table,
from which ``--help`` and the documentation are made.
"""

from __future__ import annotations

EXIT_STATUSES = {
    0: "the guest powered off (or the command did what it was asked)",
    2: "usage: a wrong option, file, image or permission; the message names the fix",
    70: "internal: a defect in pyvmm",
    71: "no usable KVM on this machine (see pyvmm doctor)",
    80: "the guest kernel panicked",
    81: "the guest crashed: triple fault, emulation failure, unknown exit",
    124: "--timeout passed before the guest ended",
    130: "interrupted (SIGINT)",
    143: "terminated (SIGTERM)",
}


class ExitStatus:
    """Names for the exit statuses in ``EXIT_STATUSES``.

    Plain integers: ``import enum`` would take 2 to 4 of the 20 ms between exec and the guest's
    first instruction.
    """

    OK = 0
    USAGE = 2
    INTERNAL = 70
    NO_KVM = 71
    GUEST_PANIC = 80
    GUEST_CRASH = 81
    TIMEOUT = 124
    INTERRUPTED = 130
    TERMINATED = 143


class PyvmmError(Exception):
    """Base of all errors raised on purpose.

    ``str(error)`` is one sentence for the user: what is wrong and how to mend it.
    """

    exit_status: int = ExitStatus.INTERNAL


class UsageError(PyvmmError):
    """What the user gave (option, file, image, permission) cannot work."""

    exit_status = ExitStatus.USAGE


class NoKvmError(PyvmmError):
    """/dev/kvm is missing, forbidden, or cannot run Linux."""

    exit_status = ExitStatus.NO_KVM


class KvmError(PyvmmError):
    """A KVM ioctl failed; ``errno`` is its error number."""

    def __init__(self, message: str, errno: int) -> None:
        super().__init__(message)
        self.errno = errno


class GuestPanic(PyvmmError):
    """The guest kernel reported a panic."""

    exit_status = ExitStatus.GUEST_PANIC


class GuestCrash(PyvmmError):
    """The guest cannot go on: triple fault, emulation failure or an unknown exit."""

    exit_status = ExitStatus.GUEST_CRASH


class GuestTimeout(PyvmmError):
    """The guest did not end in the time it was given."""

    exit_status = ExitStatus.TIMEOUT
