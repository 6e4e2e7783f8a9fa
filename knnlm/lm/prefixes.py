"""Keys and values of recent sequences: a sequence that goes on costs what is new in it.

Sequences stand in slots (slots.py) and are written in place: no step copies what is there. Those of one pass are moved
to be neighbors, once, so that each layer reads a view. The least recently used sequence makes room for a new one; a new
one that begins as another copies that beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm.lm.requests import Feed
from knnlm.lm.slots import Slots, SlotShape

DEFAULT_BYTES = 512 << 20
MIN_SHARED = 16  # tokens: a shorter beginning is not copied from another sequence
FIRST_SLOTS = 8
LENGTH_STEP = 64  # tokens
MAX_MASK_NUMBERS = 1 << 25  # numbers of the mask of one pass over sequences of different lengths


@dataclass(eq=False, slots=True)
class CachedSequence:
    """A sequence of the request under way that has a slot. feeds: all that ask for it, at the same positions.

    past: tokens found in the cache, which are not computed again; where that is all of them, the log-probabilities
    after the last are in the cache, too.
    """

    feeds: list[Feed]
    slot: int
    past: int

    @property
    def tokens(self) -> npt.NDArray[np.int64]:
        return self.feeds[0].tokens

    @property
    def new(self) -> int:
        return len(self.tokens) - self.past


class Prefixes:
    """A cache of at most max_bytes. asked, found: tokens of all sequences so far, and how many were not computed again.

    Not for several threads at once.
    """

    def __init__(self, shape: SlotShape, *, context_length: int, max_bytes: int = DEFAULT_BYTES) -> None:
        self.asked = self.found = 0
        self.slots = Slots(shape)
        self._shape = shape
        self._context_length = context_length
        self._max_bytes = max_bytes
        self._now = 0
        self._taken: dict[int, CachedSequence] = {}  # by slot, the sequences of the request under way

    @property
    def held_bytes(self) -> int:
        """Bytes that are allocated."""
        return self.slots.held_bytes

    def place(self, feeds: Sequence[Feed], *, keys: bool) -> tuple[list[CachedSequence], list[Feed]]:
        """The sequences that have a slot now, and the feeds of those for which there is no room.

        keys: they are wanted, so that known log-probabilities are not enough.

        The first are to be computed and committed, or else discarded.
        """
        self._now += 1
        self._taken.clear()
        self.asked += sum(len(feed.tokens) for feed in feeds)
        groups, rest = _grouped(feeds)
        groups, left_out = self._affordable(groups)
        rest += [feed for group in left_out for feed in group]
        there = {slot for group in groups if (slot := self._exact(group[0])) is not None}
        self.slots.used[list(there)] = self._now  # not to be evicted while room is made
        if groups:
            self._make_room(len(groups) - len(there), len(groups), len(groups[-1][0].tokens))
        others = [group for group in groups if not self._go_on(group, keys=keys)]
        for group in others:
            self._begin(group)
        kept = list(self._taken.values())
        self.found += sum(one.past * len(one.feeds) + len(one.tokens) * (len(one.feeds) - 1) for one in kept)
        return kept, rest

    def window(self, batch: list[CachedSequence]) -> int:
        """Make the sequences of one pass neighbors, in the order of their slots; the first one's slot."""
        mine = sorted(one.slot for one in batch)
        count = len(mine)
        batch.sort(key=lambda one: one.slot)
        if mine[-1] - mine[0] < count:
            return mine[0]
        starts = np.minimum(mine, self.slots.count - count)
        ends = np.searchsorted(mine, starts + count)
        start = int(starts[np.argmax(ends - np.searchsorted(mine, starts))])
        inside = set(range(start, start + count))
        for stray, hole in zip(sorted(set(mine) - inside), sorted(inside - set(mine)), strict=True):
            self._swap(stray, hole)
        batch.sort(key=lambda one: one.slot)
        return start

    def rows(self, slots: npt.NDArray[np.int64]) -> Tensor:
        """The last log-probabilities (m, V) of sequences of which nothing is new, by their slots: a copy."""
        return self.slots.rows[torch.from_numpy(slots).to(self._shape.device)]

    def keep_rows(self, slots: npt.NDArray[np.int64], log_probs: Tensor) -> None:
        """Keep the last log-probabilities (m, V) of the sequences in these slots; -1: of none."""
        last = slots >= 0
        if not last.all():
            slots, log_probs = slots[last], log_probs[torch.from_numpy(last)]
        self.slots.rows[torch.from_numpy(slots).to(self._shape.device)] = log_probs
        self.slots.has_row[slots] = True

    def commit(self, batch: Sequence[CachedSequence]) -> None:
        """Record that these have been computed: later requests find them."""
        for one in batch:
            self.slots.fill(one.slot, one.tokens, one.past, self._now)
            del self._taken[one.slot]

    def discard(self) -> None:
        """Forget what was placed and not committed."""
        for slot in self._taken:
            self.slots.clear(slot)
        self._taken.clear()

    def _go_on(self, group: list[Feed], *, keys: bool) -> bool:
        """Whether the sequence, or all of it but its last token, is there and goes on in its slot."""
        slot = self._exact(group[0])
        if slot is None or slot in self._taken:
            return False
        feed = group[0]
        past = int(feed.positions[0])
        if not keys and self.slots.has_row[slot] and self.slots.lengths[slot] == len(feed.tokens) == past + 1:
            past += 1
        self._take(group, slot, past)
        return True

    def _begin(self, group: list[Feed]) -> None:
        """Give the sequence a slot: that of a kept beginning of it, or the least recently used one."""
        tokens, limit = group[0].tokens, int(group[0].positions[0])
        slots = self.slots
        same = slots.tokens[:, :limit] == tokens[:limit]
        common = np.where(same.all(1), limit, np.argmin(same, 1)) if limit else 0 * slots.lengths
        common = np.minimum(common, slots.lengths)
        free = np.ones(len(slots.lengths), np.bool_)
        free[list(self._taken)] = False
        whole = free & (common == slots.lengths)  # nothing of it is lost when it goes on as this sequence
        source = int(np.argmax(2 * common + whole))
        past = int(common[source])
        past = past if past >= MIN_SHARED else 0
        slot = source if past and whole[source] else int(np.argmin(np.where(free, slots.used, self._now + 1)))
        if slot != source and past:
            slots.copy(source, slot, past)
        self._take(group, slot, past)

    def _take(self, group: list[Feed], slot: int, past: int) -> None:
        self.slots.cut(slot, past, self._now, row=past == len(group[0].tokens))
        self._taken[slot] = CachedSequence(group, slot, past)

    def _exact(self, feed: Feed) -> int | None:
        """The slot of these tokens, or of all but the last, when what is asked lies behind what is there."""
        slot = self.slots.find(feed.tokens)
        if slot is None and feed.positions[0] == len(feed.tokens) - 1:
            slot = self.slots.find(feed.tokens[:-1])
        return slot

    def _affordable(self, groups: list[list[Feed]]) -> tuple[list[list[Feed]], list[list[Feed]]]:
        """The sequences for which there is room together, and the others: the longest. Both by length."""
        groups = sorted(groups, key=lambda group: len(group[0].tokens))
        count = len(groups)
        while count and count * self._shape.slot_bytes(len(groups[count - 1][0].tokens) + 1) > self._max_bytes:
            count -= 1
        return groups[:count], groups[count:]

    def _make_room(self, missing: int, count: int, longest: int) -> None:
        """Have `count` slots for sequences of up to `longest` tokens; of those, `missing` are not there yet."""
        old, length = self.slots, self.slots.length
        live = np.flatnonzero(old.lengths)
        new_length = length
        if longest >= length:
            new_length = min(_rounded(max(longest + 1, length * 3 // 2)), self._context_length + 1)
        if (len(live) + missing) * self._shape.slot_bytes(new_length) > self._max_bytes:
            needed = _rounded(1 + max(longest, int(old.lengths.max(initial=0))))
            new_length = needed if needed <= new_length // 2 else new_length
        if count * self._shape.slot_bytes(new_length) > self._max_bytes:
            new_length = longest + 1
        affordable = self._max_bytes // self._shape.slot_bytes(new_length)
        wanted = min(max(len(live) + missing, count), affordable)
        if wanted <= old.count and new_length == length:
            return
        new_slots = min(old.count if wanted <= old.count else max(wanted, 2 * old.count, FIRST_SLOTS), affordable)
        kept = live[old.lengths[live] < new_length]
        kept = np.sort(kept[np.argsort(-old.used[kept], kind="stable")[:new_slots]])
        self.slots = Slots(self._shape)  # should memory not suffice
        self.slots = old.moved(kept, new_slots, new_length)

    def _swap(self, one: int, other: int) -> None:
        self.slots.swap(one, other)
        moved = {slot: self._taken.pop(slot) for slot in (one, other) if slot in self._taken}
        for slot, kept in moved.items():
            kept.slot = one + other - slot
            self._taken[kept.slot] = kept


def passes(kept: Sequence[CachedSequence], max_tokens: int, *, alike: bool) -> list[list[CachedSequence]]:
    """Sequences of which something is new, put together where they waste little: a step beside steps, and not padded to
    the length of a prompt. alike: those of one pass have equally many tokens that are found.

    New tokens and padding of one pass are at most max_tokens, unless a sequence alone has more.
    """
    grouped: list[list[CachedSequence]] = []
    for one in sorted((one for one in kept if one.new), key=lambda one: (one.past == 0, -one.new, one.past)):
        batch = grouped[-1] if grouped else []
        if batch:
            width, rows = batch[0].new, len(batch) + 1
            longest = max(len(batch[0].tokens), len(one.tokens))
            begin = one.past == 0
            fits = rows * width <= max_tokens and (begin or rows * width * longest <= MAX_MASK_NUMBERS)
            same = (batch[0].past == 0) == begin and (not alike or batch[0].past == one.past)
            if fits and same and 2 * one.new >= width:
                batch.append(one)
                continue
        grouped.append([one])
    return grouped


def _grouped(feeds: Sequence[Feed]) -> tuple[list[list[Feed]], list[Feed]]:
    """Feeds of the same tokens and positions together; and those of the same tokens, but other positions."""
    groups: dict[bytes, list[Feed]] = {}
    rest = []
    for feed in feeds:
        group = groups.setdefault(feed.tokens.tobytes(), [])
        if group and not np.array_equal(group[0].positions, feed.positions):
            rest.append(feed)
        else:
            group.append(feed)
    return list(groups.values()), rest


def _rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP
