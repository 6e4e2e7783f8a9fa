"""The continuous cache as a source of a mixture: the tokens that came earlier in the text itself
where keys were like the present one.

The arithmetic is in knnlm/cache.py. From one stretch of a text to the next the keys of its last places are kept; their
tokens stand in the text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.cache import cache_evidence
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.evidence import Evidence, Step, Stretch
from knnlm.neighbors import TokenMasses, stacked
from knnlm.options import CacheOptions
from knnlm.rules import CACHE_GATE, FIXED, GATE, KNN_GATE, Weighing, part_of, rule
from knnlm.sources import Plan, Services, computed
from knnlm.tuned import tuned_weighing

NAME = "cache"
INLINE_PRODUCTS = 64  # products of two numbers made in the time that `computed` counts for one number
DEFAULT_SIZE = 2000  # places, as in Grave et al. 2017 (arXiv 1612.04426)


class Past:
    """The keys of the last places of one text, at most `size` before the newest stretch.

    keys: (m, d), of the places end - m to end - 1. Room for more is doubled, up to twice what is kept.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._room = np.empty((0, 0), np.float32)
        self._begin = self._end = 0  # rows of the room
        self.end = 1  # the place after the last; the first token of a text is no place

    @property
    def keys(self) -> npt.NDArray[np.floating]:
        return self._room[self._begin : self._end]

    def go_back(self, place: int) -> None:
        """Forget what is known of this place and those behind it: they are asked about once more."""
        if place < self.end:
            self._end = max(self._begin, self._end - (self.end - place))
            self.end = place

    def add(self, keys: npt.NDArray[np.floating]) -> None:
        """The keys (m, d) of the next places; only `size` places before them are kept."""
        self._begin = max(self._begin, self._end - self._size)
        if self._end + len(keys) > len(self._room) or keys.dtype != self._room.dtype:
            kept = self.keys.astype(keys.dtype).reshape(-1, keys.shape[1])
            self._room = np.empty((2 * (len(kept) + len(keys)), keys.shape[1]), keys.dtype)
            self._room[: len(kept)] = kept
            self._begin, self._end = 0, len(kept)
        self._room[self._end : self._end + len(keys)] = keys
        self._end += len(keys)
        self.end += len(keys)


@dataclass(frozen=True)
class CacheSource:
    """theta, size: as in CacheOptions."""

    theta: float
    size: int
    weighing: Weighing
    name: str = NAME
    kind: str = NAME
    needs_keys: bool = True
    in_order: bool = True
    whole: bool = False
    optional: bool = True  # it asks nothing of anybody

    @property
    def earlier(self) -> int:
        """See knnlm.sources.Remembering."""
        return self.size

    async def evidence(self, step: Step) -> Evidence:
        """See knnlm.sources.Source."""
        if step.keys is None:
            raise Unavailable("the language model service did not answer with the keys it was asked for")
        asked: list[tuple[Stretch, npt.NDArray[np.floating], int]] = []
        row = numbers = 0
        for stretch in step.stretches:
            m = len(stretch.predicted)
            keys = self._with_past(stretch, step.keys[row : row + m])
            asked.append((stretch, keys, row))
            row += m
            numbers += m * len(keys) * keys.shape[1] // INLINE_PRODUCTS
        return await computed(numbers, self._evidence, asked, step.targets)

    def _with_past(self, stretch: Stretch, keys: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
        """(b + m, d) the keys of the b places before the predicted ones, and of those."""
        past: Past = stretch.state.setdefault(self.name, Past(self.size))
        first = int(stretch.predicted[0])
        past.go_back(first)
        if past.end < first and stretch.before is not None:
            past.end = first - len(stretch.before)
            past.add(stretch.before)
        if past.end != first:
            raise RuntimeError(f"the places {past.end} ... {first - 1} of a text were left out")
        past.add(keys)
        return past.keys

    def _evidence(
        self, asked: Sequence[tuple[Stretch, npt.NDArray[np.floating], int]], targets: npt.NDArray[np.int32] | None
    ) -> Evidence:
        features = bool(rule(self.weighing.rule).features)
        found, columns = [], []
        present = []
        for stretch, keys, row in asked:
            m = len(stretch.predicted)
            before = len(keys) - m
            start = int(stretch.predicted[0]) - before
            tokens = stretch.text[start : start + len(keys)]
            wanted = None if targets is None else targets[row : row + m]
            log_probs, looked_at = cache_evidence(
                keys, tokens, before, theta=self.theta, size=self.size, targets=wanted, features=features
            )
            found.append(log_probs)
            columns.append(looked_at)
            present.append(np.arange(before, before + m) > 0)
        there = np.concatenate(present)
        joined = {name: np.concatenate([part[name] for part in columns]) for name in columns[0]}
        if targets is None:
            return Evidence(there, stacked([part for part in found if isinstance(part, TokenMasses)]), joined)
        return Evidence(there, np.concatenate([part for part in found if isinstance(part, np.ndarray)]), joined)


class CacheKind:
    """The continuous cache, as a kind of source."""

    options = CacheOptions

    def optional(self, options: CacheOptions) -> bool:
        del options
        return True

    async def resolve(self, options: CacheOptions, services: Services) -> Plan:
        """See knnlm.sources.SourceKind."""
        domains = [(i.tuning.cache, i, u) for i, u in zip(services.infos, services.used, strict=True) if i.tuning]
        tuned, info, beside = next((found for found in domains if found[0]), ({}, None, None))
        lmbda = _value("lambda", options.lmbda, tuned)
        theta = _value("theta", options.theta, tuned)
        size = _value("size", options.size, {"size": DEFAULT_SIZE, **tuned})
        if options.size is None and options.max_size is not None:
            size = min(size, options.max_size)
        try:
            CacheOptions(lmbda, theta, int(size))  # what was tuned is checked as if it were asked for
        except InvalidRequest as err:
            raise InvalidRequest(f"{err.message} for the cache", param=f"cache.{err.param}") from err
        weighing = Weighing(FIXED, {"lambda": lmbda}, asked=options.lmbda is not None)
        together = beside is not None and beside.weighing == Weighing(GATE, part_of(tuned, KNN_GATE))
        if info is not None and together and options.lmbda is None and options.theta is None:
            weighing = tuned_weighing(info.domain, GATE, part_of(tuned, CACHE_GATE), info.key_dim)
        return Plan((CacheSource(theta, int(size), weighing),))


def _value(name: str, asked: float | None, tuned: Mapping[str, float | Sequence[float]]) -> float:
    value = tuned.get(name) if asked is None else asked
    if isinstance(value, int | float):
        return value
    raise InvalidRequest(
        f"{name} of the cache has not been tuned: give it, or run `knnlm tune DOMAIN --cache` and name the domain",
        param=f"cache.{name}",
    )


CACHE = CacheKind()
