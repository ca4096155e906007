"""Progress on stderr: one line that is drawn over on a terminal, one plain line elsewhere."""

from __future__ import annotations

import sys

_BAR_WIDTH = 30


class Progress:
    """A context manager that shows how far ``label`` has come."""

    def __init__(self, label: str) -> None:
        self._label = label
        self._drawn = sys.stderr.isatty()

    def __enter__(self) -> Progress:
        if self._drawn:
            self.update(0.0)
        else:
            print(f"{self._label} ...", file=sys.stderr, flush=True)
        return self

    def update(self, fraction: float) -> None:
        """``fraction`` is between 0 and 1."""
        if self._drawn:
            filled = round(_BAR_WIDTH * min(max(fraction, 0.0), 1.0))
            bar = "#" * filled + "-" * (_BAR_WIDTH - filled)
            print(f"\r{self._label} [{bar}]\033[K", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        if self._drawn:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
