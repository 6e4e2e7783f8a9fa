"""What a memory is trained on: the windows in which a version's keys were made, and for every entry its soft label.

A prediction is learnt in the window in which its key was made, so that the memory sees what the teacher saw.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from knnlm.datastore.reader import Datastore
from knnlm.decoding import Window, plan_fed_windows
from knnlm.errors import DatastoreCorrupt, DatastoreMismatch
from knnlm.lm.distillation import Batch
from knnlm.lm.requests import Feed
from knnlm.lm.soft_labels import soft_labels
from knnlm.memory.manifest import StoreRecord
from knnlm.memory.targets import Int64, Targets


class Examples:
    """Steps of entries, all of them once in every epoch, in an order that follows from the seed."""

    def __init__(
        self, datastore: Datastore, targets: Targets | None, *, beta: float, seed: int, batch_entries: int, keys: bool
    ) -> None:
        """targets: of this version; where they are those of some documents, these alone are learnt; None where beta is
        0. keys: whether the student reads them rather than tokens.

        Raises DatastoreMismatch, with both, when the targets were made from something else.
        """
        found = StoreRecord.of(datastore.manifest)
        if targets is not None and targets.manifest.store.content != found.content:
            theirs = targets.manifest.store
            raise DatastoreMismatch(
                f"{targets.folder} was made from {theirs.domain} {theirs.version} with content {theirs.content[:12]}, "
                f"{found.domain} {found.version} has {found.content[:12]}: make targets of this version",
                param="targets",
            )
        self._datastore = datastore
        self._targets = targets
        self._beta = beta
        self._seed = seed
        self._batch_entries = batch_entries
        self._keys = keys
        made = datastore.manifest
        bos = made.model.bos_token_id if made.windows.bos == "window" else None
        self._windows: list[tuple[int, Window]] = [
            (number, window)
            for number, row in datastore.live_rows()
            if row.entries and (targets is None or targets.has(int(datastore.documents.first_entries[number])))
            for window in plan_fed_windows(row.tokens, made.windows.context_length, made.windows.min_context, bos)
        ]
        self._entries = np.array([window.end - window.first for _, window in self._windows], np.int64)

    @property
    def entries(self) -> int:
        """Entries of one epoch."""
        return int(self._entries.sum())

    def batches(self) -> Iterator[Batch]:
        """Steps without end, the same each time: whole windows, in another order in every epoch, until they hold the
        entries of a step."""
        for chosen in self._orders():
            feeds, ids, rows = [], [], 0
            for number, window in (self._windows[i] for i in chosen):
                first = int(self._datastore.documents.first_entries[number])
                tokens = self._datastore.tokens_of(number)
                feeds.append(Feed(window.fed(tokens).astype(np.int64), window.positions.astype(np.int64), rows))
                ids.append(first + np.arange(window.first - 1, window.end - 1))
                self._refuse_shifted(ids[-1], tokens[window.first : window.end])
                rows += len(ids[-1])
            yield self._batch(feeds, np.concatenate(ids))

    def _batch(self, feeds: Sequence[Feed], ids: Int64) -> Batch:
        masses = None if self._targets is None else self._targets.rows(ids)[0]
        labels = soft_labels(masses, self._datastore.values_of(ids), self._beta)
        return Batch(feeds, labels, self._datastore.keys_of(ids) if self._keys else None)

    def _orders(self) -> Iterator[list[int]]:
        chosen: list[int] = []
        rows = epoch = 0
        while True:
            for i in np.random.default_rng((self._seed, epoch)).permutation(len(self._windows)).tolist():
                chosen.append(i)
                rows += int(self._entries[i])
                if rows >= self._batch_entries:
                    yield chosen
                    chosen, rows = [], 0
            epoch += 1

    def _refuse_shifted(self, ids: Int64, predicted: np.ndarray) -> None:
        """A label that belongs to another position still trains, to something that looks plausible."""
        values = self._datastore.values_of(ids)
        if not np.array_equal(values, predicted):
            at = int(np.argmin(values == predicted))
            raise DatastoreCorrupt(
                f"{self._datastore.path}: entry {ids[at]} has value {values[at]}, its window predicts {predicted[at]}"
            )
