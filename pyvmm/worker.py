"""Threads that spend their life inside one blocking C call."""

from __future__ import annotations

import os
import threading

from pyvmm._core import lib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class WorkerThread:
    """Runs a ``struct worker *`` on a daemon thread until `stop`.

    A daemon, because a thread that is not would hang the interpreter's exit when nobody stops it.
    """

    def __init__(self, native: Any, name: str) -> None:
        self._native = native
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        result = lib.worker_run(self._native)
        if result:
            raise OSError(-result, os.strerror(-result))

    def stop(self) -> None:
        """Returns when the worker runs no more; idempotent."""
        lib.worker_stop(self._native)
        self._thread.join()
