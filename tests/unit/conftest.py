"""What several unit tests share."""

from __future__ import annotations

import os

import pytest

from pyvmm._core import lib
from pyvmm.virtio import blk


@pytest.fixture(params=["io_uring", "sync"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the ways in which disks can be served; it is used from now on."""
    name: str = request.param
    error = lib.blk_io_uring_check()
    if name == "io_uring" and error:
        pytest.skip(f"this kernel does not let us use io_uring: {os.strerror(-error)}")
    monkeypatch.setattr(blk, "choose_engine", lambda in_memory: (name, ""))
    return name
