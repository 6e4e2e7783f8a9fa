"""Neighbors of consecutive places of a text, of which some are found without a search (RetoMaton, Alon et al. 2022,
arXiv 2201.12431).

An entry that was near one place and stores the token that came there points at the entry behind it in its document.
Where enough neighbors point somewhere, these are the candidates of the next place, by their distances to its key;
elsewhere the index is searched as always.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from knnlm.evidence import Step, Stretch
from knnlm.messages import SearchRequest, SearchResult
from knnlm.neighbors import MISSING_DISTANCE, Neighbors
from knnlm.protocols import DatastoreClient
from knnlm.sources import together

Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Found:
    """The neighbors of one place: ids and values (k,), -1 for padding."""

    place: int
    ids: Ids
    values: npt.NDArray[np.int32]

    def pointing(self, token: int) -> Ids:
        """(c,) those that store the token."""
        entries: Ids = self.ids[(self.values == token) & (self.ids >= 0)]
        return entries


async def searched_by_pointers(
    datastore: DatastoreClient, request: SearchRequest, step: Step, name: str, tau: int
) -> tuple[SearchResult, npt.NDArray[np.bool_]]:
    """The neighbors of every prediction of a step, and (n,) for which of them no index was searched.

    request: all predictions of the step. Places of one stretch come one after another, all stretches at the same time.
    name: under which the neighbors of a text's last place are kept in its state, where each step has one place. Raises
    what the datastore raises.
    """
    n, k = len(request.queries), request.k
    distances, values = np.full((n, k), MISSING_DISTANCE, np.float32), np.full((n, k), -1, np.int32)
    ids = np.full((n, k), -1, np.int64)
    first_rows = np.cumsum([0, *(len(s.predicted) for s in step.stretches)])[:-1].tolist()
    before = [_kept(stretch, name, step) for stretch in step.stretches]
    answering = request.domain, request.version or ""
    saved = np.zeros(n, np.bool_)
    widest = 0
    for at in range(max((len(s.predicted) for s in step.stretches), default=0)):
        going = [i for i, s in enumerate(step.stretches) if at < len(s.predicted)]
        pointed = {i: _pointed(step.stretches[i], at, before[i], tau) for i in going}
        follow = [(i, entries) for i, entries in pointed.items() if entries is not None]
        plain = [i for i in going if pointed[i] is None]
        parts = [(plain, replace(request, queries=_rows(request, first_rows, plain, at), ids=True))] if plain else []
        if follow:
            rows = [i for i, _ in follow]
            asked = replace(
                request, queries=_rows(request, first_rows, rows, at), ids=True, follow=_padded([e for _, e in follow])
            )
            parts.append((rows, asked))
        results = await together([datastore.search(asked) for _, asked in parts])
        saved[[first_rows[i] + at for i, _ in follow]] = True
        for (stretches, _), result in zip(parts, results, strict=True):
            answering = result.domain, result.version
            near = result.neighbors
            if near.ids is None:
                raise TypeError("ids were asked for")
            width = near.values.shape[1]
            widest = max(widest, width)
            rows = [first_rows[i] + at for i in stretches]
            distances[rows, :width], values[rows, :width], ids[rows, :width] = near.distances, near.values, near.ids
            for i, row in zip(stretches, rows, strict=True):
                before[i] = _Found(int(step.stretches[i].predicted[at]), ids[row], values[row])
    for stretch, last in zip(step.stretches, before, strict=True):
        if last is not None:
            stretch.state[name] = _Found(last.place, last.ids.copy(), last.values.copy())  # and not all rows with it
    found = Neighbors(distances[:, :widest], values[:, :widest], ids[:, :widest])
    return SearchResult(*answering, found), saved


def _kept(stretch: Stretch, name: str, step: Step) -> _Found | None:
    """What was found at the place before; of a known text, whose windows are searched in any order, nothing."""
    found = stretch.state.get(name) if step.targets is None and len(stretch.predicted) == 1 else None
    return found if isinstance(found, _Found) else None


def _pointed(stretch: Stretch, at: int, before: _Found | None, tau: int) -> Ids | None:
    """Entries to follow to the prediction `at` of a stretch; None where an index must be searched."""
    place = int(stretch.predicted[at])
    if before is None or before.place != place - 1:
        return None
    entries = before.pointing(int(stretch.text[place - 1]))
    return entries if len(entries) >= tau else None


def _rows(
    request: SearchRequest, first_rows: Sequence[int], stretches: Sequence[int], at: int
) -> npt.NDArray[np.floating]:
    rows: npt.NDArray[np.floating] = request.queries[[first_rows[i] + at for i in stretches]]
    return rows


def _padded(entries: Sequence[Ids]) -> Ids:
    """(n, c) with as many columns as the longest row has."""
    padded = np.full((len(entries), max(map(len, entries))), -1, np.int64)
    for row, some in zip(padded, entries, strict=True):
        row[: len(some)] = some
    return padded
