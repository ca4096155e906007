"""The model checker finds what is there to find: each of its own parts seen to matter."""

from __future__ import annotations

from support.interleavings import Thread, Tso, explore


class LostUpdate:
    """Two threads that add 1 in two steps: load, store."""

    def __init__(self) -> None:
        self.total = 0

    def threads(self) -> dict[str, Thread]:
        return {"a": self.add(), "b": self.add()}

    def add(self) -> Thread:
        yield None
        loaded = self.total
        yield None
        self.total = loaded + 1

    def check(self) -> str | None:
        return f"total {self.total}"


def test_every_outcome_is_found_with_a_schedule_for_each() -> None:
    found = explore(LostUpdate, stop_at_failure=False)
    assert set(found.failures) == {"total 1", "total 2"}
    assert sorted(found.failures["total 1"]) == ["a", "a", "b", "b"]


class StoreBuffering:
    """Each thread stores its variable and loads the other's: both may load 0, unless fenced."""

    def __init__(self, fenced: bool) -> None:
        self.fenced = fenced
        self.memory = Tso(x=0, y=0)
        self.loaded: dict[str, int] = {}

    def threads(self) -> dict[str, Thread]:
        return {
            "x": self.thread("x", "y"),
            "y": self.thread("y", "x"),
            "x flusher": self.memory.flusher("x"),
            "y flusher": self.memory.flusher("y"),
        }

    def thread(self, own: str, other: str) -> Thread:
        yield None
        self.memory.store(own, own, 1)
        if self.fenced:
            yield self.memory.fence(own)
        yield None
        self.loaded[own] = self.memory.load(own, other)

    def check(self) -> str | None:
        return "both 0" if self.loaded == {"x": 0, "y": 0} else None


def test_stores_pass_later_loads_unless_fenced() -> None:
    assert explore(lambda: StoreBuffering(fenced=False)).failures
    assert not explore(lambda: StoreBuffering(fenced=True)).failures


class Loops:
    """The one difference between two states is how far a loop is."""

    def __init__(self) -> None:
        self.stopped = False
        self.turns = 0

    def threads(self) -> dict[str, Thread]:
        return {"loop": self.loop(), "stop": self.stop()}

    def loop(self) -> Thread:
        for _ in ("same", "same", "same"):
            yield None
        yield None
        self.turns = 0 if self.stopped else 1

    def stop(self) -> Thread:
        yield None
        self.stopped = True

    def check(self) -> str | None:
        return f"turns {self.turns}"


def test_the_progress_of_a_loop_is_part_of_the_state() -> None:
    found = explore(Loops, stop_at_failure=False)
    assert set(found.failures) == {"turns 0", "turns 1"}
    # Before the loop's end: 4 places, stopped or not. After: stopped or not, before it or after.
    assert found.states == 4 * 2 + 3
