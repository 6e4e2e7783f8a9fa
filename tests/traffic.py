"""Clients that never stop asking while something is done to the services: who failed, what was wrong, how long it took.

Every answer is compared with what it must be; a client that gets another one, or an error, notes it and goes on. Used
by tests/compose and tests/faults.
"""

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

import httpx

__all__ = ["Ask", "Seen", "Traffic"]


@dataclass(frozen=True)
class Ask:
    """One request, and what its answer must be: `problem` gives None, or what is wrong with the JSON."""

    path: str
    body: Mapping[str, Any]
    problem: Callable[[Any], str | None]


@dataclass(frozen=True)
class Seen:
    """begun: of time.monotonic. problem: None when the answer was the right one."""

    begun: float
    seconds: float
    status: int
    problem: str | None
    answer: Any = field(default=None, repr=False)


class Traffic:
    """`clients` threads, each asking one thing after another until the block ends. accepted: statuses beside 200 that
    are no failure (429, where overload is the point)."""

    def __init__(
        self,
        base_url: str,
        asks: Sequence[Ask],
        *,
        clients: int = 4,
        headers: Mapping[str, str] | None = None,
        timeout: float = 90.0,
        accepted: Sequence[int] = (),
    ) -> None:
        self._base_url = base_url
        self._asks = asks
        self._headers = dict(headers or {})
        self._timeout = timeout
        self._accepted = set(accepted)
        self._stop = threading.Event()
        self._seen: list[Seen] = []  # appended to by all clients
        self._threads = [threading.Thread(target=self._client, args=[number]) for number in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def since(self, begun: float) -> list[Seen]:
        """What was asked at or after `begun` and is answered by now."""
        return [seen for seen in list(self._seen) if seen.begun >= begun]

    def failures(self, begun: float = 0.0) -> list[Seen]:
        return [seen for seen in self.since(begun) if seen.problem is not None]

    def more(self, count: int, *, within: float = 120.0) -> list[Seen]:
        """Wait for `count` answers to what is asked from now on. Raises AssertionError when they do not come."""
        begun = time.monotonic()
        while len(seen := self.since(begun)) < count:
            assert time.monotonic() < begun + within, f"{len(seen)} of {count} answers in {within:g} s"
            time.sleep(0.05)
        return seen

    def _client(self, number: int) -> None:
        with httpx.Client(base_url=self._base_url, headers=self._headers, timeout=self._timeout) as client:
            while not self._stop.is_set():
                self._seen.append(self._asked(client, self._asks[number % len(self._asks)]))
                number += 1

    def _asked(self, client: httpx.Client, ask: Ask) -> Seen:
        begun = time.monotonic()
        try:
            response = client.post(ask.path, json=ask.body)
        except httpx.HTTPError as err:
            return Seen(begun, time.monotonic() - begun, 0, f"{type(err).__name__}: {err}")
        seconds = time.monotonic() - begun
        if response.status_code in self._accepted:
            return Seen(begun, seconds, response.status_code, None)
        if response.status_code != 200:
            return Seen(begun, seconds, response.status_code, f"{response.status_code}: {response.text[:300]}")
        answer = response.json()
        return Seen(begun, seconds, 200, ask.problem(answer), answer)
