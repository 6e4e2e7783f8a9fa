"""What one call or one completion is made with: resolved once by knnlm.mixer, before any work."""

from dataclasses import dataclass

from knnlm.domains import UsedDomain
from knnlm.messages import DomainInfo
from knnlm.sources import Source

__all__ = ["Plan"]


@dataclass(frozen=True)
class Plan:
    """What one call or one completion is made with: resolved, pinned, checked and possibly degraded, once.

    sources: what is mixed with the LM, in the order of the answer. domains: those among them, as answers show them.
    window: (context_length, min_context) in which texts are scored unless others are asked for. pinned: whether the
    caller chose every version. degraded: why the LM alone answers, None when it is as asked.
    """

    sources: tuple[Source, ...] = ()
    domains: tuple[UsedDomain, ...] = ()
    infos: tuple[DomainInfo, ...] = ()
    pinned: bool = True
    degraded: str | None = None

    @property
    def needs_keys(self) -> bool:
        return any(source.needs_keys for source in self.sources)

    @property
    def statistics(self) -> bool:
        return any(source.weighing.statistics for source in self.sources)

    @property
    def in_order(self) -> bool:
        return any(source.in_order for source in self.sources)

    @property
    def optional(self) -> bool:
        """Whether the LM alone may answer when a source cannot."""
        return all(source.optional for source in self.sources)

    def without_sources(self, reason: str) -> "Plan":
        return Plan(degraded=reason)
