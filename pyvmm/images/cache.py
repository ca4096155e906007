"""The user's cache: what was fetched or built once, each entry a directory that appears whole."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def root() -> Path:
    """``$XDG_CACHE_HOME/pyvmm``, or ``~/.cache/pyvmm`` (XDG base directory specification)."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if base.startswith("/") else Path.home() / ".cache") / "pyvmm"


def entry(name: str, make: Callable[[Path], None]) -> Path:
    """The cache entry ``name``, made by ``make(directory)`` if it is not there yet.

    ``make`` fills a temporary directory that is renamed when it is complete, so an interrupted
    build leaves nothing behind that looks finished. Two processes that want the same entry wait
    for each other.
    """
    final = root() / name
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(final.name + ".partial")
    locks = root() / "locks"
    locks.mkdir(exist_ok=True)
    with (locks / name.replace("/", "-")).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if final.is_dir():
            return final
        if partial.exists():
            shutil.rmtree(partial)
        partial.mkdir()
        try:
            make(partial)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        partial.rename(final)
    return final
