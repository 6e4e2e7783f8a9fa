"""Indexes of one datastore beside each other: how fast they answer, and what their answers are worth.

All indexes are built in a folder of work, none becomes the datastore's. What an interrupted report has built and judged
there is taken up by the next one; speed is measured at the end, of all in turn. Perplexities are fitted to and taken
of the same held-out tokens, so they compare indexes, and are a little too good as figures of their own.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.datastore.files import disk_errors, locked
from knnlm.datastore.layout import Record
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.evaluation.collect import HeldOut
from knnlm.evaluation.index_candidates import Candidate
from knnlm.evaluation.index_quality import Quality, judge
from knnlm.evaluation.index_work import ReportFolder
from knnlm.evaluation.timing import interleave
from knnlm.evaluation.tuning import Observations, fit
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.neighbors import Neighbors

__all__ = ["BATCHES", "KS", "IndexReport", "Line", "index_report"]

BATCHES = (1, 16, 64, 512)
KS = (64, 1024)
BLOCK = 64  # queries searched at a time, where nothing is timed
EXACT = Candidate("flat", "flat")

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Line:
    """One index, with rescoring or without. speeds: queries per second by (batch, k).

    bytes_per_key: of the index; stored_bytes_per_key: of the keys that rescoring reads beside it.
    """

    candidate: Candidate
    rescored: bool
    bytes_per_key: float
    stored_bytes_per_key: int
    build_seconds: float
    quality: Quality
    speeds: dict[tuple[int, int], float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return self.candidate.name + ("" if self.rescored else ", not rescored")

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        return {
            **self.candidate.as_json(),
            "rescored": self.rescored,
            "bytes_per_key": self.bytes_per_key,
            "stored_bytes_per_key": self.stored_bytes_per_key,
            "build_seconds": self.build_seconds,
            **self.quality.as_json(),
            "queries_per_second": [{"batch": b, "k": k, "value": v} for (b, k), v in self.speeds.items()],
        }


@dataclass(frozen=True)
class IndexReport:
    """perplexity: of exact search, with its temperature and lambda; lm_perplexity: of the model alone."""

    domain: str
    version: str
    entries: int
    key_dim: int
    queries: int
    documents: int
    batches: tuple[int, ...]
    ks: tuple[int, ...]
    lm_perplexity: float
    exact: Quality
    lines: tuple[Line, ...]

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in ("exact", "lines")}
        return {**own, "exact": self.exact.as_json(), "indexes": [line.as_json() for line in self.lines]}


def refuse_shards(path: Path) -> None:
    """Raises InvalidRequest for a version of shards: its indexes are compared on one of them."""
    if shards := Manifest.load(path).shards:
        raise InvalidRequest(
            f"{path} has {len(shards)} shards, and a report needs all keys in one folder: compare indexes on a "
            "version that `knnlm build` makes of a part of the text",
            param="version",
        )


def index_report(
    path: Path,
    held_out: HeldOut,
    candidates: Sequence[Candidate],
    work: Path,
    *,
    batches: Sequence[int] = BATCHES,
    ks: Sequence[int] = KS,
    seconds: float = 0.25,
    rounds: int = 5,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> IndexReport:
    """Compare `candidates` over the version in folder `path`, for the queries of `held_out`.

    work: a folder of its own, made when it is not there. seconds, rounds: of timing, for each index, batch and k;
    batches with more queries than there are are left out. on_progress hears (what is done now, steps done, steps).
    Raises InvalidRequest for a number out of range, Conflict when another report works in the folder,
    InsufficientMemory when the indexes do not fit beside each other, and what building and searching raise.
    """
    refuse_shards(path)
    if not candidates or not ks or min(ks) < 1 or seconds <= 0 or rounds < 1:
        raise InvalidRequest(
            f"expected recipes, k >= 1, seconds > 0 and rounds >= 1, got {len(candidates)} recipes, k {list(ks)}, "
            f"{seconds} seconds and {rounds} rounds"
        )
    with disk_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    fitting = tuple(b for b in batches if b <= len(held_out.queries))
    steps = _Steps(on_progress or _silent, 1 + 2 * len(candidates) + len(fitting) * len(ks))
    with locked(work, wait=False, doing="reporting"):
        shop = ReportFolder(work, Datastore.open(path), seed)
        try:
            return _Run(shop, held_out, tuple(sorted(ks)), steps).report(candidates, fitting, seconds, rounds)
        finally:
            shop.datastore.close()


class _Judged(Record):
    """What is kept of one line."""

    bytes_per_key: float
    recalls: dict[int, float]
    total_variation: float
    perplexity: float
    temperature: float
    lmbda: float


class _Steps:
    def __init__(self, report: Progress, total: int) -> None:
        self._report, self._total, self._done = report, total, 0

    def __call__(self, what: str) -> None:
        """The step before this one is done."""
        self._report(what, min(self._done, self._total), self._total)
        self._done += 1


class _Run:
    def __init__(self, shop: ReportFolder, held_out: HeldOut, ks: tuple[int, ...], steps: _Steps) -> None:
        self._shop = shop
        self._held_out = held_out
        self._ks = ks
        self._steps = steps
        self._manifest = shop.datastore.manifest
        arrays = (held_out.queries, held_out.lm_log_probs, held_out.targets)
        self._asked = (ks, *(hashlib.sha256(array.tobytes()).hexdigest() for array in arrays))

    def report(
        self, candidates: Sequence[Candidate], batches: tuple[int, ...], seconds: float, rounds: int
    ) -> IndexReport:
        manifest = self._manifest
        self._steps("exact search")
        exact = self._exact()
        observed = Observations(self._held_out.lm_log_probs, self._held_out.targets, exact, self._held_out.documents)
        tuning = fit(observed).tuning
        best = Quality(dict.fromkeys(self._ks, 1.0), 0.0, tuning.knn_perplexity, tuning.temperature, tuning.lmbda)
        lines = [line for candidate in candidates for line in self._lines(candidate, exact, tuning.temperature)]
        timed = self._timed(lines, batches, seconds, rounds)
        return IndexReport(
            domain=manifest.domain,
            version=manifest.version,
            entries=manifest.live_entries,
            key_dim=manifest.key_dim,
            queries=len(self._held_out.queries),
            documents=self._held_out.documents,
            batches=batches,
            ks=self._ks,
            lm_perplexity=tuning.lm_perplexity,
            exact=best,
            lines=tuple(timed),
        )

    def _exact(self) -> Neighbors:
        """The neighbors that all others are compared with."""
        return self._shop.kept_neighbors(
            lambda: self._search_all(self._shop.opened(EXACT.recipe), EXACT, rescore=True), self._asked
        )

    def _lines(self, candidate: Candidate, exact: Neighbors, temperature: float) -> list[Line]:
        """The lines of one candidate: with rescoring and, where that changes anything, without."""
        self._steps(f"building {candidate.recipe}")
        built = self._shop.built(candidate.recipe)
        self._steps(f"searching {candidate.name}")
        # exact search has nothing to rescore, and over-fetching is for rescoring
        alone = candidate.recipe == EXACT.recipe or candidate.search.overfetch is not None
        found = []
        for rescored in (True,) if alone else (True, False):
            judged = self._judged(candidate, rescored, exact, temperature)
            quality = Quality(**judged.model_dump(exclude={"bytes_per_key"}))
            stored = self._rescored_bytes(candidate.recipe) if rescored else 0
            found.append(Line(candidate, rescored, judged.bytes_per_key, stored, built.build_seconds, quality))
        return found

    def _rescored_bytes(self, recipe: str) -> int:
        """Bytes of one entry, in what rescoring reads."""
        return self._shop.opened(recipe).memory.keys_bytes // max(1, self._manifest.entries)

    def _judged(self, candidate: Candidate, rescored: bool, exact: Neighbors, temperature: float) -> _Judged:
        def judged() -> _Judged:
            searcher = self._shop.opened(candidate.recipe)
            is_exact = candidate.recipe == EXACT.recipe
            found = exact if is_exact else self._search_all(searcher, candidate, rescore=rescored)
            quality = judge(found, exact, self._held_out, self._ks, temperature)
            indexed = max(1, self._manifest.base_entries)
            return _Judged(bytes_per_key=searcher.memory_bytes / indexed, **quality.as_json())

        return self._shop.kept(_Judged, judged, "line", candidate, rescored, self._asked)

    def _search_all(self, searcher: Searcher, candidate: Candidate, *, rescore: bool) -> Neighbors:
        queries = self._held_out.queries
        parts = [
            searcher.search(self._request(queries[i : i + BLOCK], candidate, self._ks[-1], rescore, ids=True)).neighbors
            for i in range(0, len(queries), BLOCK)
        ]
        return Neighbors(
            np.concatenate([part.distances for part in parts]),
            np.concatenate([part.values for part in parts]),
            np.concatenate([part.ids for part in parts if part.ids is not None]),
        )

    def _timed(self, lines: list[Line], batches: tuple[int, ...], seconds: float, rounds: int) -> list[Line]:
        """The lines with their speeds, all open at once so that they can take turns."""
        recipes = dict.fromkeys(line.candidate.recipe for line in lines)
        searchers = {recipe: self._shop.opened(recipe) for recipe in recipes}
        speeds: list[dict[tuple[int, int], float]] = [{} for _ in lines]
        for batch in batches:
            for k in self._ks:
                self._steps(f"speed: batch {batch}, k {k}")
                programs = {
                    str(i): self._program(searchers[line.candidate.recipe], line, batch, k)
                    for i, line in enumerate(lines)
                }
                for name, rate in interleave(programs, seconds, rounds).items():
                    speeds[int(name)][batch, k] = rate.median
        return [replace(line, speeds=speed) for line, speed in zip(lines, speeds, strict=True)]

    def _program(self, searcher: Searcher, line: Line, batch: int, k: int) -> Callable[[], int]:
        queries = self._held_out.queries
        starts = cycle(range(0, len(queries) - batch + 1, batch))

        def search() -> int:
            start = next(starts)
            searcher.search(self._request(queries[start : start + batch], line.candidate, k, line.rescored))
            return batch

        return search

    def _request(
        self, queries: npt.NDArray[np.float32], candidate: Candidate, k: int, rescore: bool, *, ids: bool = False
    ) -> SearchRequest:
        return SearchRequest(
            self._manifest.domain,
            queries,
            replace(candidate.search, k=k, rescore=None if rescore else False),
            ids=ids,
        )


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total
