"""Runs a command inside an emulated AMD-V machine that has a real /dev/kvm.

QEMU's TCG emulates SVM with nested paging; in it, Debian's own kernel and kvm-amd give a genuine
/dev/kvm on any host, with the host's root file system around the command. Slow, but true.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING

from pyvmm.errors import NoKvmError
from pyvmm.nested.config import NestedConfig
from pyvmm.nested.machine import Machine, why_not

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["NestedConfig", "run_nested", "why_not"]


def run_nested(
    argv: Sequence[str], config: NestedConfig | None = None, *, control: str | None = None
) -> int:
    """Runs ``argv`` in an emulated machine with this process's streams, terminal and directory.

    `control` is the path of a socket on which this process listens meanwhile: who connects to it
    reaches the command's own one, if that is in `forward.inside`.

    Returns the command's exit status; 128 + n if signal n ended it, or if this process was told
    twice to end, by signal n. SIGINT, SIGTERM, SIGHUP and SIGQUIT go to the command.

    Raises `NoKvmError` if the machine cannot start or breaks down, `UsageError` where the kernel
    for it cannot be had, `GuestTimeout`.
    """
    from pyvmm.nested.bundle import bundle
    from pyvmm.nested.forward import forwarding, listening
    from pyvmm.nested.session import Interrupted, MachineFailed, Session

    reason = why_not()
    if reason is not None:
        raise NoKvmError(f"no emulated machine on this host: {reason}")
    config = config or NestedConfig()
    _open_missing_streams()
    with listening(control) as listener:
        files = bundle()
        deadline = None if config.timeout is None else time.monotonic() + config.timeout
        for attempt in (1, 2):
            with (
                Machine(files, cpus=config.cpus, memory=config.memory) as machine,
                forwarding(listener, machine),
            ):
                session = Session(machine, argv, deadline=deadline)
                try:
                    session.await_machine()
                    return session.run()
                except Interrupted as interrupted:
                    return 128 + interrupted.number
                except MachineFailed as failure:
                    if session.started or attempt == 2:
                        raise
                    print(f"pyvmm nested: {failure}\npyvmm nested: trying again", file=sys.stderr)
    raise AssertionError("both attempts returned or raised")


def _open_missing_streams() -> None:
    """Where the caller has closed stdin, stdout or stderr, a socket must not take its number."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
