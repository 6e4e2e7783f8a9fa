"""Who wants to know how calls to other services go: counted by whoever implements this, by nobody without."""

from typing import Protocol

__all__ = ["Observer", "Silent"]


class Observer(Protocol):
    """Called in the event loop of the client: must return at once. service: "lm" or "datastore"."""

    def called(self, service: str, code: str, seconds: float) -> None:
        """A call is over, retries and hedges included. code: the name of a gRPC status."""
        ...

    def retried(self, service: str) -> None:
        """A call that failed is made again."""
        ...

    def hedged(self, service: str, won: bool) -> None:
        """A call was made to a second replica as well. won: that one's answer was the first good one."""
        ...

    def replica(self, service: str, address: str, problem: str | None) -> None:
        """A replica was found down, or (None) has come back."""
        ...

    def replicas(self, service: str, up: int, down: int) -> None:
        """How many replicas there are now."""
        ...


class Silent:
    """An observer that does nothing."""

    def called(self, service: str, code: str, seconds: float) -> None: ...
    def retried(self, service: str) -> None: ...
    def hedged(self, service: str, won: bool) -> None: ...
    def replica(self, service: str, address: str, problem: str | None) -> None: ...
    def replicas(self, service: str, up: int, down: int) -> None: ...
