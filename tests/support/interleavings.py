"""Explores every interleaving of a few threads: a model checker small enough to read.

A model is a class whose attributes are the shared state and whose threads are generators. What a
generator does between two ``yield`` is one atomic step; ``yield guard`` waits until ``guard()``
is true (a lock, an interrupt, a notification). `explore` runs the model along every schedule,
skipping states that were seen before, and calls ``model.check()`` wherever no thread can go on.

Memory is x86-TSO for variables declared through `Tso`: a store waits in the storing thread's
buffer until a later step, any number of steps away, makes it visible; a fence waits for that.
On such a machine the handshakes of virtio 1.2, 2.7.7 and 2.7.10, need their barriers.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Generator, Iterator
from types import GeneratorType
from typing import Protocol

Guard = Callable[[], bool]
Thread = Generator[Guard | None, None, None]


class Model(Protocol):
    """What `explore` runs: shared state in attributes, threads in `threads`."""

    def threads(self) -> dict[str, Thread]:
        """Every thread by name, started anew."""

    def check(self) -> str | None:
        """Called where no thread can go on: what went wrong, or None."""


class Tso:
    """Shared integers as x86-TSO shows them to each thread.

    `flusher` is the store buffer of one thread; list it among the threads of the model.
    """

    def __init__(self, **initial: int) -> None:
        self.memory = dict(initial)
        self.buffers: dict[str, list[tuple[str, int]]] = {}

    def store(self, thread: str, variable: str, value: int) -> None:
        self.buffers.setdefault(thread, []).append((variable, value))

    def load(self, thread: str, variable: str) -> int:
        for name, value in reversed(self.buffers.get(thread, [])):
            if name == variable:
                return value
        return self.memory[variable]

    def fence(self, thread: str) -> Guard:
        """For ``yield``: waits until the stores of `thread` are visible to all."""
        return lambda: not self.buffers.get(thread)

    def flusher(self, thread: str) -> Thread:
        while True:
            yield lambda: bool(self.buffers.get(thread))
            variable, value = self.buffers[thread].pop(0)
            self.memory[variable] = value


_LOOP_ITERATORS: tuple[type, ...] = (type(iter(range(0))), type(iter(())), type(iter([])))


class _Run:
    """A model with its threads, each stopped before its next step."""

    def __init__(self, make: Callable[[], Model]) -> None:
        self.model = make()
        self.running = self.model.threads()
        self.guards = {name: next(thread) for name, thread in self.running.items()}

    def step(self, name: str) -> None:
        try:
            self.guards[name] = self.running[name].send(None)
        except StopIteration:
            del self.running[name], self.guards[name]

    def enabled(self) -> list[str]:
        return [name for name, guard in self.guards.items() if guard is None or guard()]

    def state(self) -> object:
        frames = [(name, *_frames(thread)) for name, thread in self.running.items()]
        return (_freeze(vars(self.model)), _freeze(frames))


def _frames(thread: Thread) -> Iterator[object]:
    """Where a generator stands, down its chain of ``yield from``.

    That is the instruction, the locals, and how far each ``for`` loop has come: its iterator is
    nowhere but on the generator's stack, where the garbage collector sees it.
    """
    inner: object = thread
    while isinstance(inner, GeneratorType):
        frame = inner.gi_frame
        assert frame is not None, "a thread that ended has no state"
        loops = [each for each in gc.get_referents(inner) if type(each) in _LOOP_ITERATORS]
        yield frame.f_lasti
        yield _freeze({k: v for k, v in frame.f_locals.items() if k != "self"})
        yield [repr(loop.__reduce__()) for loop in loops]
        inner = inner.gi_yieldfrom


def _freeze(value: object) -> object:
    if isinstance(value, dict):
        return tuple((key, _freeze(item)) for key, item in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_freeze, value))
    if isinstance(value, Tso):
        return _freeze(vars(value))
    return value


class Explored:
    """What `explore` found: `states` visited, `ends` reached, and one schedule per failure."""

    def __init__(self) -> None:
        self.states = 0
        self.ends = 0
        self.failures: dict[str, list[str]] = {}


def explore(make: Callable[[], Model], stop_at_failure: bool = True) -> Explored:
    """Runs the model that `make` builds along every schedule.

    Threads cannot be copied, so each state is reached by running its schedule from the start;
    a branch goes on in the run that found it, so only the siblings are paid for twice.
    """
    found = Explored()
    seen: set[object] = set()
    waiting: list[list[str]] = [[]]
    while waiting:
        schedule = waiting.pop()
        run = _Run(make)
        for name in schedule:
            run.step(name)
        while True:
            state = run.state()
            if state in seen:
                break
            seen.add(state)
            enabled = run.enabled()
            if not enabled:
                found.ends += 1
                failure = run.model.check()
                if failure is not None:
                    found.failures.setdefault(failure, schedule)
                    if stop_at_failure:
                        found.states = len(seen)
                        return found
                break
            waiting.extend([*schedule, name] for name in enabled[1:])
            schedule = [*schedule, enabled[0]]
            run.step(enabled[0])
    found.states = len(seen)
    return found
