"""What is kept of a console, and how a kernel panic is noticed in it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvmm._core import ffi, lib

PANIC = b"Kernel panic - not syncing"


class Watch:
    def __init__(self) -> None:
        self.panic_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.native: Any = lib.console_watch_create(self.panic_fd)

    def feed(self, data: bytes) -> None:
        lib.console_watch_feed(self.native, data, len(data))

    def tail(self) -> bytes:
        buffer = ffi.new("uint8_t[]", lib.CONSOLE_TAIL_SIZE)
        return bytes(ffi.buffer(buffer, lib.console_watch_tail(self.native, buffer)))

    def panics(self) -> int:
        try:
            return os.eventfd_read(self.panic_fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        lib.console_watch_destroy(self.native)
        os.close(self.panic_fd)


@pytest.fixture
def watch() -> Iterator[Watch]:
    watch = Watch()
    yield watch
    watch.close()


def test_panic_is_noticed_across_pieces_and_after_a_false_start(watch: Watch) -> None:
    for piece in (b"[ 1.0] Kernel Kernel pan", b"ic - not sync", b"ing: VFS"):
        assert watch.panics() == 0
        watch.feed(piece)
    assert watch.panics() == 1
    watch.feed(PANIC)
    assert watch.panics() == 1


def test_other_words_are_no_panic(watch: Watch) -> None:
    watch.feed(b"Kernel panic - not synced; kernel panic - not syncing")
    assert watch.panics() == 0


@given(st.lists(st.binary(max_size=6000), max_size=12))
def test_tail_is_the_end_of_all_output(pieces: list[bytes]) -> None:
    watch = Watch()
    for piece in pieces:
        watch.feed(piece)
    assert watch.tail() == b"".join(pieces)[-lib.CONSOLE_TAIL_SIZE :]
    watch.close()
