"""No interleaving of device and driver loses an interrupt, though InterruptACK is coalesced.

The protocol is that of ``pyvmm/_native/virtio_irq.c``. The guest reads InterruptStatus from
memory, without an exit, and its write to InterruptACK may wait in a ring until somebody drains it.

Why it holds: a driver acknowledges bits *before* it looks at what they stand for (Linux's
vm_interrupt does). So an acknowledgement is followed by a look at the used rings. Either this look
sees the event that is being raised, and then the bit may go; or it came before the event
was published, and then the acknowledgement is in the ring already when `raise` drains it, before
it sets the bit. What matters is that order (publish, drain, set) and that nobody else drains in
between. The variants below that break it lose an interrupt here.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from support.interleavings import Explored, Guard, Thread, explore

ACK_RING_SIZE = 2  # small, so that the ring is full in some schedules: then the write exits


Workers = tuple[tuple[int, int], ...]  # the device of each, and the number of its events


class Interrupts:
    """One or two devices with their workers, one guest CPU, one ACK ring.

    `raise_steps` names what virtio_irq_raise does under its lock, in order: "drain" applies the
    waiting acknowledgements, "set" sets the bit.
    """

    def __init__(
        self, raise_steps: tuple[str, ...], workers: Workers, ack_first: bool = True
    ) -> None:
        self.raise_steps = raise_steps
        self.ack_first = ack_first
        self.workers = workers
        self.published = [0, 0]
        self.handled = [0, 0]
        self.status = [0, 0]
        self.pending = [0, 0]  # the interrupt controller's latch (edge-triggered)
        self.acks: list[int] = []  # device numbers: each device has the one bit VRING
        self.locked = 0

    def threads(self) -> dict[str, Thread]:
        workers = {f"worker {n}": self.worker(*what) for n, what in enumerate(self.workers)}
        return {"guest": self.guest(), **workers}

    def check(self) -> str | None:
        if self.handled != self.published:
            return f"lost: published {self.published}, handled {self.handled}"
        return None

    def worker(self, device: int, events: int) -> Thread:
        for _ in range(events):
            yield None
            self.published[device] += 1  # virtq_publish, a full barrier in it
            yield from self.lock()
            for step in self.raise_steps:
                if step == "set":
                    self.status[device] = 1
                else:
                    yield from self.drain()
                yield None
            self.locked = 0
            yield None
            self.pending[device] = 1  # irqfd

    def lock(self) -> Iterator[Guard]:
        yield lambda: not self.locked
        self.locked = 1

    def drain(self) -> Iterator[None]:
        """Each entry is a step of its own: more may come in meanwhile."""
        yield None
        for _ in range(len(self.acks)):
            self.status[self.acks.pop(0)] = 0
            yield None

    def guest(self) -> Thread:
        """vm_interrupt of Linux's virtio_mmio.c, for whichever device interrupts."""
        while True:
            yield lambda: any(self.pending)
            device = self.pending.index(1)
            self.pending[device] = 0
            yield None
            status = self.status[device]
            if not status:
                continue
            if self.ack_first:
                yield from self.acknowledge(device)
                yield None
                self.handled[device] = self.published[device]
            else:
                yield None
                self.handled[device] = self.published[device]
                yield from self.acknowledge(device)

    def acknowledge(self, device: int) -> Iterator[Guard | None]:
        yield None
        if len(self.acks) < ACK_RING_SIZE:
            self.acks.append(device)
            return
        # KVM's ring is full, so the write exits: virtio_irq_ack.
        yield from self.lock()
        yield from self.drain()
        self.status[device] = 0
        yield None
        self.locked = 0


def run(raise_steps: tuple[str, ...], workers: Workers, ack_first: bool = True) -> Explored:
    return explore(lambda: Interrupts(raise_steps, workers, ack_first))


@pytest.mark.parametrize(
    "workers",
    [((0, 4),), ((0, 2), (1, 1)), ((0, 2), (1, 2)), ((0, 2), (0, 2))],
    ids=["alone", "two to one", "two each", "two queues of one device"],
)
def test_no_interrupt_is_lost(workers: Workers) -> None:
    found = run(("drain", "set"), workers)
    assert not found.failures
    assert found.states > 100


@pytest.mark.parametrize("raise_steps", [("set",), ("set", "drain")])
def test_setting_before_draining_loses_one(raise_steps: tuple[str, ...]) -> None:
    """An old acknowledgement, drained later, clears the bit of an event nobody looked for."""
    assert run(raise_steps, ((0, 2), (1, 2))).failures


def test_a_driver_that_acknowledges_last_loses_one_anyhow() -> None:
    """As on any virtio-mmio device: the bit of an event that came between is cleared with it."""
    assert run(("drain", "set"), ((0, 2), (1, 1)), ack_first=False).failures
