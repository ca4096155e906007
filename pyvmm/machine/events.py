"""What happens to a virtual machine, told to whoever listens."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    Listener = Callable[["Event"], None]


class Event:
    """Something that happened: its `name` and its `data` are those of QMP (qapi/run-state.json and
    others in QEMU's documentation of it); `time` is in seconds since 1970.
    """

    __slots__ = ("data", "name", "time")

    def __init__(self, name: str, data: dict[str, object]) -> None:
        self.name = name
        self.data = data
        self.time = time.time()

    def __repr__(self) -> str:
        return f"Event({self.name!r}, {self.data!r})"


class Listeners:
    """Those who are told of events, on the thread on which each happens."""

    def __init__(self) -> None:
        self._all: tuple[Listener, ...] = ()

    def add(self, listener: Listener) -> None:
        self._all += (listener,)

    def tell(self, name: str, **data: object) -> None:
        """A listener that fails is logged, and neither the machine nor the others suffer."""
        event = Event(name, data)
        for listener in self._all:
            try:
                listener(event)
            except Exception:
                import logging

                logging.getLogger("pyvmm.machine").exception("who listens to events failed")
