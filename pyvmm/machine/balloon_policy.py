"""What the automatic balloon does, and why: numbers in, a number out."""

from __future__ import annotations

# Shares of the memory that the guest has at the time. With less than SHORT available it gets some
# back, so that it has ENOUGH; only with more than AMPLE is anything taken, and ENOUGH is left. The
# gaps between them keep the balloon from swinging.
SHORT, ENOUGH, AMPLE = 0.10, 0.20, 0.25

# PSI, "some avg10": the percentage of the last ten seconds in which somebody waited for memory.
CALM, PRESSED, HARD_PRESSED = 1.0, 10.0, 40.0

# What one decision changes at most, as shares of the machine's memory.
STEP, BIG_STEP = 1 / 16, 1 / 4

# What the guest always keeps.
KEPT = 1 / 8


class BalloonPolicy:
    """Decides how much of its `memory` (bytes) the guest should have; at least `least` of it."""

    def __init__(self, memory: int, least: int) -> None:
        self.memory = memory
        self.least = min(memory, max(least, int(memory * KEPT)))

    def decide(self, has: int, available: int, pressure: float | None) -> int:
        """How many bytes the guest should have now.

        It `has` so many, `available` of which it could use without swapping, by its own words.
        `pressure` is the host's, in percent; None, where it tells none, takes memory that lies idle
        as light pressure would.

        The guest's need comes before the host's: a guest that is short of memory kills processes,
        a host can still swap.
        """
        available = min(available, has)
        if available < SHORT * has:
            # The share is one of what it will have: (available + x) = ENOUGH * (has + x).
            wanted = has + int((ENOUGH * has - available) / (1 - ENOUGH))
        elif pressure is not None and pressure < CALM:
            wanted = has + int(self.memory * STEP)
        elif (pressure is None or pressure >= PRESSED) and available > AMPLE * has:
            hard = pressure is not None and pressure >= HARD_PRESSED
            spare = int((available - ENOUGH * has) / (1 - ENOUGH))
            wanted = has - min(spare, int(self.memory * (BIG_STEP if hard else STEP)))
        else:
            return has
        return max(self.least, min(wanted, self.memory))
