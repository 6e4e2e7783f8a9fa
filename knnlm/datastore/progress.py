"""How far a build is: enough for a display of tokens per second and the time that is left."""

from dataclasses import dataclass

__all__ = ["Progress"]


@dataclass(frozen=True)
class Progress:
    """phase: "tokenize" (entries_total is not known yet and 0), "encode" (keys are made) or "publish" (checksums).

    tokens and seconds count this phase of this run: tokens of documents read, then tokens fed to the model.
    entries_resumed: of entries_done, those that an earlier run had finished.
    """

    phase: str
    entries_done: int
    entries_total: int
    tokens: int
    seconds: float
    entries_resumed: int = 0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0

    @property
    def seconds_left(self) -> float | None:
        """None while nothing can be said."""
        done = self.entries_done - self.entries_resumed
        if self.phase != "encode" or done <= 0:
            return None
        return self.seconds / done * (self.entries_total - self.entries_done)
