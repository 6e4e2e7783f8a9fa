"""A version whose shards are searched on a Ray cluster: every shard is asked at once, and what they find is merged.

What a gateway opens instead of a Searcher, with the same answers. All methods block; any number of threads may search.
"""

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray import serve

from knnlm.clients.failures import rebuild
from knnlm.cluster.applications import FAILURES, Applications, deployment
from knnlm.cluster.connection import first_line
from knnlm.cluster.registry import ShardOptions, Spec
from knnlm.cluster.shard import unpack
from knnlm.datastore.manifest import Manifest
from knnlm.errors import DatastoreError, DeadlineExceeded, KnnlmError, Unavailable
from knnlm.index.sharding import Sharding, ShardResult
from knnlm.messages import DomainInfo, Memory, Passage, PassagesRequest, PassagesResult, SearchRequest, SearchResult
from knnlm.transport.context import outgoing_deadline
from knnlm.v1 import datastore_pb2
from knnlm.wire.protos import from_proto, to_proto

SEARCH_SECONDS = 60.0  # the longest that a search may take where its caller says nothing
ATTEMPT_SECONDS = 15.0  # until a shard is asked again, which may then take twice as long
SLICE_SECONDS = 0.25  # how often it is looked whether anybody may still answer
MAX_REPLICA_DEATHS = 8  # replicas of a shard that may die while they answer one request: it may be what kills them
PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.05, 2.0  # before the next try, twice as long each time: 5 s of all together
INLINE_BYTES = 90_000  # a larger request to several shards lies in the object store once


def open_version(applications: Applications, path: Path, options: ShardOptions) -> "ClusterSearcher":
    """The version in folder `path`, deployed on the cluster unless it is there; without shards it is one. Raises as
    Manifest.load and Applications.hold."""
    manifest = Manifest.load(path)
    manifest.index_of(options.index)
    name = f"{manifest.domain}@{manifest.version}"
    applications.hold(name, Spec.of(path.absolute(), manifest, options))
    try:
        return ClusterSearcher(applications, name, manifest, options.index)
    except BaseException:
        applications.release(name)
        raise


@dataclass
class _Call:
    """One method of one shard's deployment that is being asked. request: bytes, or a reference to them in Ray's object
    store. response: serve.handle.DeploymentResponse of the present attempt, which began at `begun` on time.monotonic;
    None between two. late, failures: attempts that took too long, and that a replica did not survive."""

    number: int
    method: str
    request: Any
    response: Any = None
    begun: float = 0.0
    late: int = 0
    failures: int = 0


class ClusterSearcher:
    """knnlm.protocols.Searching over the shards of one application."""

    held_bytes = 0  # nothing of a version lies in this process

    def __init__(self, applications: Applications, name: str, manifest: Manifest, index: str | None) -> None:
        """index: the recipe of the index that answers, None = the version's default one."""
        self.manifest = manifest
        self._applications = applications
        self._name = name
        self._recipe = manifest.index_of(index).recipe
        self._sharding = Sharding(manifest)
        self._closed = False
        self._handles = [
            serve.get_deployment_handle(deployment(number), app_name=name, _check_exists=False)
            for number in range(len(self._sharding))
        ]
        self.memory = self._measured()

    def search(self, request: SearchRequest) -> SearchResult:
        """Search as Searcher.search does. Raises Unavailable, naming the shard, when one has no replica;
        DeadlineExceeded.

        timings: `search` and `rescore` are those of the slowest shard, `shards` is all other time until the last
        answer, merges of earlier answers included; `merge` is what follows.
        """
        self._refuse_closed()
        begun = time.perf_counter()
        parts = self._sharding.split(request)
        if request.exclude_entries is None and request.follow is None:  # then every shard is asked the same
            packed = to_proto(parts[0].request, datastore_pb2.SearchRequest).SerializeToString()
            asked = dict.fromkeys(range(len(parts)), packed)
        else:
            asked = {
                part.shard: to_proto(part.request, datastore_pb2.SearchRequest).SerializeToString() for part in parts
            }
        timings: dict[str, float] = {}
        waited = begun

        def answers() -> Iterator[ShardResult]:
            nonlocal waited
            for _, header, body in asking:
                one = _result(header, body)
                for stage, seconds in one.result.timings.items():
                    timings[stage] = max(timings.get(stage, 0.0), seconds)
                waited = time.perf_counter()
                yield one

        with closing(self._ask("search", asked)) as asking:
            merged = self._sharding.merge(request, parts, answers())
        timings["shards"] = max(0.0, waited - begun - sum(timings.values()))
        timings["merge"] = time.perf_counter() - waited
        return replace(merged, timings=timings)

    def passages(self, request: PassagesRequest) -> Sequence[Passage]:
        """Look up passages as Searcher.passages does. Raises Unavailable and DeadlineExceeded as `search`."""
        self._refuse_closed()
        asked = {
            number: to_proto(part, datastore_pb2.GetPassagesRequest).SerializeToString()
            for number, part in self._sharding.split_lookup(request).items()
        }
        with closing(self._ask("passages", asked)) as answers:
            found = {number: _passages(body) for number, _, body in answers}
        return self._sharding.merge_lookup(request, found)

    def info(self, versions: Sequence[str], state: str = "ready") -> DomainInfo:
        """The version's description; state "ready" becomes "degraded: WHY" where shards have no replica."""
        problems = self.problems()
        if state == "ready" and problems:
            state = f"degraded: {'; '.join(problems)}"
        return self.manifest.info(self._recipe, self.memory, versions, state)

    def problems(self) -> Sequence[str]:
        """The shards that nobody answers for."""
        return [f"{self._shard(number)} has no replica" for number, count in self.replicas().items() if not count]

    def replicas(self) -> Mapping[int, int]:
        """How many replicas of each shard answer."""
        counts = self._applications.replicas(self._name)
        return {number: counts.get(deployment(number), 0) for number in range(len(self._handles))}

    def warm(self) -> None:
        """Do nothing: a replica warms its shard before it answers."""

    def close(self) -> None:
        """Give the application up; it is deleted when no gateway needs it."""
        if not self._closed:
            self._closed = True
            self._applications.release(self._name)

    def _ask(self, method: str, requests: Mapping[int, bytes]) -> Generator[tuple[int, dict[str, Any], bytes]]:
        """Ask all these shards at once; number, header (Any: JSON) and body of what each of them answers, in their
        order. No answer is held here once the next one is asked for. Raises the error that one of them answers with."""
        deadline = outgoing_deadline() or time.monotonic() + SEARCH_SECONDS
        stored: dict[int, Any] = {}  # references, by the identity of what they refer to: equal requests are stored once
        calls = []
        try:
            for number, request in requests.items():
                if len(request) > INLINE_BYTES and len(requests) > 1 and id(request) not in stored:
                    stored[id(request)] = ray.put(request)
                call = _Call(number, method, stored.get(id(request), request))
                calls.append(call)
                with suppress(*FAILURES):  # begun again below
                    self._begin(call)
            for call in calls:
                yield call.number, *_checked(self._finish(call, deadline))
        finally:
            for call in calls:
                self._abandon(call)

    def _begin(self, call: _Call) -> None:
        call.begun = time.monotonic()
        call.response = getattr(self._handles[call.number], call.method).remote(call.request)

    def _abandon(self, call: _Call) -> None:
        if call.response is not None:
            call.response.cancel()
            call.response = None

    def _finish(self, call: _Call, deadline: float) -> bytes:
        """The answer of whichever replica gives it. Searching twice does no harm: a replica that dies or hangs is no
        reason to fail."""
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                raise DeadlineExceeded(f"{self._shard(call.number)} did not answer in time")
            try:
                if call.response is None:
                    self._begin(call)
                answer: bytes = call.response.result(timeout_s=min(left, SLICE_SECONDS))
                call.response = None
                return answer
            except TimeoutError:
                self._refuse_missing(call.number)
                if time.monotonic() - call.begun >= ATTEMPT_SECONDS * 2**call.late:
                    self._abandon(call)
                    call.late += 1  # the next one may take longer, or a long search would be begun again and again
            except ray.exceptions.RayTaskError as err:
                raise KnnlmError(f"{self._shard(call.number)} failed: {err.cause!r}") from err
            except FAILURES as err:
                call.response = None
                self._refuse_missing(call.number)
                call.failures += 1
                if call.failures >= MAX_REPLICA_DEATHS:
                    raise Unavailable(
                        f"{self._shard(call.number)} failed {MAX_REPLICA_DEATHS} times: {first_line(err)}",
                        param="domain",
                    ) from err
                time.sleep(min(PAUSE_SECONDS * 2 ** (call.failures - 1), MAX_PAUSE_SECONDS, left))

    def _refuse_missing(self, number: int) -> None:
        if not self.replicas()[number]:
            raise Unavailable(f"{self._shard(number)} has no replica", param="domain")

    def _refuse_closed(self) -> None:
        if self._closed:
            raise DatastoreError(f"{self._name} was closed")

    def _shard(self, number: int) -> str:
        return f"shard {number} of {len(self._handles)} of {self.manifest.domain} {self.manifest.version}"

    def _measured(self) -> Memory:
        """Bytes of one replica of each shard together, as of opening; zero when a shard did not answer then."""
        if self.problems():
            return Memory("none", 0, "mapped", 0)
        with closing(self._ask("describe", dict.fromkeys(range(len(self._handles)), b""))) as answers:
            each = [Memory(**header["memory"]) for _, header, _ in answers]
        sizes = {name: sum(getattr(memory, name) for memory in each) for name in ("index_bytes", "keys_bytes")}
        return replace(each[0], **sizes)


def _checked(answer: bytes) -> tuple[dict[str, Any], bytes]:
    header, body = unpack(answer)
    if "error" in header:
        raise rebuild(header["error"]["code"], header["error"]["message"], param=header["error"]["param"])
    return header, body


def _result(header: Mapping[str, Any], body: bytes) -> ShardResult:
    result = from_proto(SearchResult, datastore_pb2.SearchResponse.FromString(body))
    return ShardResult(result, tuple(header["unknown"]))


def _passages(body: bytes) -> Sequence[Passage]:
    return from_proto(PassagesResult, datastore_pb2.GetPassagesResponse.FromString(body)).passages
