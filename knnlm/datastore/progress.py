"""How far a build or a change is: enough for a display of the rate and the time that is left."""

import time
from collections.abc import Callable
from dataclasses import dataclass

MEASURED = ("encode", "copy", "index", "shards", "verify")  # phases whose end is known


@dataclass(frozen=True)
class Progress:
    """phase: "tokenize" (entries_total is not known yet and 0), "encode" (keys are made), "publish" (checksums), and of
    compacting "copy" and "index" (entries_done: keys that are in it). On a cluster also "start", "shards" (entries that
    are in a shard), "train" and "verify".

    tokens and seconds count this phase of this run: tokens of documents read, then tokens fed to the model.
    entries_resumed: of entries_done, those that an earlier run had finished. detail: of where it is done, for people.
    """

    phase: str
    entries_done: int
    entries_total: int
    tokens: int
    seconds: float
    entries_resumed: int = 0
    detail: str = ""

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """Time until the phase ends, at the rate so far; None while nothing can be said."""
        done = self.entries_done - self.entries_resumed
        if self.phase not in MEASURED or done <= 0:
            return None
        return self.seconds / done * (self.entries_total - self.entries_done)


Report = Callable[[Progress], None]


def silent(progress: Progress) -> None:
    """A Report that does nothing."""
    del progress


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start
