"""How fast things are beside each other. Nothing is timed alone: a machine is never as quiet twice.

What is compared runs in turn, in several rounds, and a ratio is taken within each round.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Rate:
    """Units per second, one for each round, in the order of the rounds."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    @property
    def spread(self) -> float:
        """The distance from the slowest round to the fastest, as a share of the median."""
        return (max(self.rounds) - min(self.rounds)) / self.median

    def over(self, other: "Rate") -> float:
        """How many times as fast as `other`: the median of the ratios within each round of one `interleave`."""
        return statistics.median(a / b for a, b in zip(self.rounds, other.rounds, strict=True))


def interleave(programs: Mapping[str, Callable[[], int]], seconds: float = 1.0, rounds: int = 5) -> dict[str, Rate]:
    """Run the programs in turn, each for about `seconds` in every one of `rounds`, and say how fast they were.

    A program does some work and returns how many units that was, at least one. All run once before anything is timed;
    every other round goes through them backwards, so that none always follows the same one.
    """
    if seconds <= 0 or rounds < 1 or not programs:
        raise ValueError(f"expected programs, seconds > 0, rounds >= 1, got {len(programs)}, {seconds}, {rounds}")
    for name, program in programs.items():
        if program() < 1:
            raise ValueError(f"program {name} did nothing")
    found: dict[str, list[float]] = {name: [] for name in programs}
    for round_ in range(rounds):
        for name in list(programs)[:: -1 if round_ % 2 else 1]:
            units, begun = 0, time.perf_counter()
            while not units or time.perf_counter() - begun < seconds:
                units += programs[name]()
            found[name].append(units / (time.perf_counter() - begun))
    return {name: Rate(tuple(rates)) for name, rates in found.items()}
