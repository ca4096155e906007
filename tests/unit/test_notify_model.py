"""Neither side of a virtqueue sleeps while there is work for it (virtio 1.2, 2.7.7 and 2.7.10).

The device's steps are those of ``pyvmm/_native/virtq.c``, one memory access each, on x86-TSO. Each
part of the handshake is left out once, to see that it is needed.
"""

from __future__ import annotations

import pytest
from support.interleavings import Explored, Thread, Tso, explore


def passed(event: int, new: int, old: int) -> bool:
    """The index went past `event`: vring_need_event, for counters too small to wrap."""
    return old <= event < new


class Handshake:
    """One side adds entries and wakes the other, which consumes them and then sleeps.

    The producer is the driver (available ring, notification) or the device (used ring,
    interrupt): the two directions are the same protocol. `batches` are the numbers of entries
    that the producer publishes at once. `omit` names the part of the protocol left out.
    """

    def __init__(self, batches: tuple[int, ...], event_idx: bool, omit: str = "") -> None:
        self.batches = batches
        self.event_idx = event_idx
        self.omit = omit
        self.memory = Tso(idx=0, event=0, suppress=0)
        self.woken = 0
        self.consumed = 0

    def threads(self) -> dict[str, Thread]:
        return {
            "producer": self.producer(),
            "consumer": self.consumer(),
            "producer's stores": self.memory.flusher("producer"),
            "consumer's stores": self.memory.flusher("consumer"),
        }

    def check(self) -> str | None:
        if self.consumed != sum(self.batches):
            return f"asleep with {self.consumed} of {sum(self.batches)} consumed"
        return None

    def producer(self) -> Thread:
        """virtq_publish and raise; on the driver's side add, kick_prepare and notify."""
        new = 0
        for batch in self.batches:
            old, new = new, new + batch
            yield None
            self.memory.store("producer", "idx", new)
            if self.omit != "producer's barrier":
                yield self.memory.fence("producer")
            yield None
            if self.event_idx:
                event = self.memory.load("producer", "event")
                first = new - 1 if self.omit == "whole batch" else old
                wanted = passed(event, new, first)
            else:
                wanted = not self.memory.load("producer", "suppress")
            if wanted:
                yield None
                self.woken = 1

    def consumer(self) -> Thread:
        """Sleep, disable_notify, pop until empty, enable_notify; the driver's NAPI-like loop."""
        while True:
            yield lambda: self.woken == 1
            self.woken = 0
            again = True
            while again:
                if not self.event_idx:
                    yield None
                    self.memory.store("consumer", "suppress", 1)
                yield None
                self.consumed = self.memory.load("consumer", "idx")
                yield None
                if self.event_idx:
                    self.memory.store("consumer", "event", self.consumed)
                else:
                    self.memory.store("consumer", "suppress", 0)
                if self.omit != "consumer's barrier":
                    yield self.memory.fence("consumer")
                yield None
                again = self.memory.load("consumer", "idx") != self.consumed
                if self.omit == "second look":
                    again = False


def run(batches: tuple[int, ...], event_idx: bool, omit: str = "") -> Explored:
    return explore(lambda: Handshake(batches, event_idx, omit))


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("batches", [(1, 1, 1), (2, 1), (1, 2), (3, 2, 1)])
def test_no_wakeup_is_lost(batches: tuple[int, ...], event_idx: bool) -> None:
    found = run(batches, event_idx)
    assert not found.failures
    assert found.ends > 0


@pytest.mark.parametrize("event_idx", [False, True], ids=["flags", "event_idx"])
@pytest.mark.parametrize("part", ["producer's barrier", "consumer's barrier", "second look"])
def test_without_this_part_a_wakeup_is_lost(part: str, event_idx: bool) -> None:
    assert run((1, 1, 1), event_idx, omit=part).failures


def test_only_the_last_entry_of_a_batch_is_not_enough() -> None:
    assert run((1, 2), event_idx=True, omit="whole batch").failures
