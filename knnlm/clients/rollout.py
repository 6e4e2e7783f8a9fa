"""A domain on all the replicas of a datastore service: which version each of them answers from, and when all do."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from knnlm.errors import DeadlineExceeded, KnnlmError, Unavailable, UnknownDomain
from knnlm.messages import DomainInfo

__all__ = ["ABSENT", "DOWN", "DomainReplica", "Progress", "replica_says", "until_all_serve"]

POLL_SECONDS = 0.25
ABSENT, DOWN = "absent", "down"
LONGEST_MESSAGE = 200  # characters of what one replica says, in an error about several

Ask = Callable[[float], Awaitable[Sequence["DomainReplica"]]]  # with seconds it may take


@dataclass(frozen=True)
class DomainReplica:
    """version: the one it answers from, None when it does not serve the domain or does not answer.

    state: as in DomainInfo; "absent" when it does not serve the domain, "down" when it does not answer, else the code
    of the error it answers with. problem: what it said then, None when all is well.
    """

    address: str
    version: str | None
    state: str
    problem: str | None


Progress = Callable[[Sequence[DomainReplica]], None]


def replica_says(address: str, answer: DomainInfo | KnnlmError) -> DomainReplica:
    if isinstance(answer, DomainInfo):
        problem = answer.state if answer.state.startswith("stale") else None
        return DomainReplica(address, answer.version, answer.state, problem)
    if isinstance(answer, UnknownDomain):
        return DomainReplica(address, None, ABSENT, answer.message)
    state = DOWN if isinstance(answer, Unavailable | DeadlineExceeded) else answer.code
    return DomainReplica(address, None, state, answer.message)


async def until_all_serve(
    domain: str, version: str, ask: Ask, deadline: float, progress: Progress | None
) -> Sequence[DomainReplica]:
    """Ask until every replica answers from the version; those that do not have the domain at all do not count.

    deadline: of time.monotonic. Raises DeadlineExceeded that names who does not answer from it, and what they say.
    """
    while True:
        replicas = await ask(max(POLL_SECONDS, deadline - time.monotonic()))
        if progress is not None:
            progress(replicas)
        late = [r for r in replicas if r.version != version and r.state != ABSENT]
        if not late and any(r.version == version for r in replicas):
            return replicas
        if time.monotonic() + POLL_SECONDS >= deadline:
            raise DeadlineExceeded(_not_there(domain, version, replicas, late))
        await asyncio.sleep(POLL_SECONDS)


def _not_there(domain: str, version: str, replicas: Sequence[DomainReplica], late: Sequence[DomainReplica]) -> str:
    if not late:
        return f"no replica serves domain {domain}"
    counted = sum(r.state != ABSENT for r in replicas)
    names = "; ".join(f"{r.address} ({_said(r)})" for r in late)
    return f"{domain} {version} is not served yet by {len(late)} of {counted} replicas: {names}"


def _said(replica: DomainReplica) -> str:
    if replica.version is None:
        return (replica.problem or replica.state)[:LONGEST_MESSAGE]
    return f"serves {replica.version}, {replica.state}"[:LONGEST_MESSAGE]
