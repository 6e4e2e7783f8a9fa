"""When a call has taken so long that another replica should be asked as well, and how often that may be done.

A replica that collects garbage, reads a cold file or shares its cores with something else is slow for a moment; the
others are not (Dean and Barroso 2013). What takes longer than 95 % of recent calls like it is asked twice, within a
budget: when everything is slow, asking twice would only make it slower.
"""

from collections import deque
from collections.abc import Hashable

__all__ = ["Hedging"]

WINDOW = 128  # recent calls of a kind
ENOUGH = 20  # calls of a kind before anything is known about it
REFRESH = 8  # calls between two looks at the window
LEAST_SECONDS = 0.005  # quicker than that nothing is won
CALLS_PER_HEDGE = 20  # a budget of 5 %
BURST = 5  # hedges that may come at once


class Hedging:
    """Kinds are keys such as (method, size): few, and fixed by the caller."""

    def __init__(self) -> None:
        self._kinds: dict[Hashable, _Recent] = {}
        self._saved = 0

    def delay(self, kind: Hashable) -> float | None:
        """Count a call. Seconds after which to ask another replica too; None while too little is known."""
        if self._saved < BURST * CALLS_PER_HEDGE:
            self._saved += 1
        recent = self._kinds.get(kind)
        return None if recent is None else recent.slow

    def spend(self) -> bool:
        """Whether the budget has room for one more hedge, which is then taken from it."""
        if self._saved < CALLS_PER_HEDGE:
            return False
        self._saved -= CALLS_PER_HEDGE
        return True

    def record(self, kind: Hashable, seconds: float) -> None:
        """How long an answer took from when it was first asked for."""
        recent = self._kinds.get(kind)
        if recent is None:
            recent = self._kinds[kind] = _Recent()
        recent.add(seconds)


class _Recent:
    """slow: what 95 % of the recent calls took less than, None before there are enough."""

    def __init__(self) -> None:
        self.slow: float | None = None
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._new = 0

    def add(self, seconds: float) -> None:
        self._seconds.append(seconds)
        self._new += 1
        if len(self._seconds) >= ENOUGH and (self.slow is None or self._new >= REFRESH):
            self._new = 0
            ordered = sorted(self._seconds)
            self.slow = max(LEAST_SECONDS, ordered[int(0.95 * len(ordered))])
