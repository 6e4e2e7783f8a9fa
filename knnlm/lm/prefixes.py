"""Keys and values of recent sequences: a sequence that goes on costs what is new in it.

Sequences stand in the slots of tensors that are allocated ahead, (slots, heads, length, dim) per layer, and are written
in place: no step copies what is there. Those of one pass are moved to be neighbors, once, so that each layer reads a
view. The least recently used sequence makes room for a new one; a new one that begins as another copies that beginning.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from knnlm.lm.requests import Feed

DEFAULT_BYTES = 512 << 20
MIN_SHARED = 16  # tokens: a shorter beginning is not copied from another sequence
FIRST_SLOTS = 8
LENGTH_STEP = 64  # tokens
MAX_MASK_NUMBERS = 1 << 25  # of the mask of one pass, in which sequences of different lengths go on


@dataclass(frozen=True)
class LayerShape:
    """What one token of one layer takes: `heads` keys of `key_dim` and values of `value_dim` numbers."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(eq=False, slots=True)
class Kept:
    """A sequence of the request under way that has a slot. feeds: all that ask for it, at the same positions.

    past: how many of its tokens are found, and not computed again. All of them: its last log-probabilities are known.
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


@dataclass(slots=True)
class _Slots:
    """What is in the slots. keys, values: one tensor per layer. rows: (slots, V), the last log-probabilities."""

    keys: list[Tensor]
    values: list[Tensor]
    rows: Tensor
    tokens: npt.NDArray[np.int32]  # (slots, length)
    lengths: npt.NDArray[np.int64] = field(init=False)  # (slots,), 0: free
    used: npt.NDArray[np.int64] = field(init=False)  # (slots,), when: -1 where free
    has_row: npt.NDArray[np.bool_] = field(init=False)
    names: list[bytes | None] = field(init=False)  # by which the sequence is found

    def __post_init__(self) -> None:
        count = len(self.tokens)
        self.lengths = np.zeros(count, np.int64)
        self.used = np.full(count, -1, np.int64)
        self.has_row = np.zeros(count, np.bool_)
        self.names = [None] * count


class Prefixes:
    """At most max_bytes of memory. asked, found: tokens of the sequences so far, and how many were not computed again.

    Not for several threads at once. Tensors are on `device`, in the model's dtype.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        vocab_size: int,
        context_length: int,
        dtype: torch.dtype,
        device: torch.device,
        max_bytes: int = DEFAULT_BYTES,
    ) -> None:
        self.asked = self.found = 0
        self._shapes = shapes
        self._vocab_size = vocab_size
        self._context_length = context_length
        self.dtype = dtype
        self.device = device
        self._max_bytes = max_bytes
        numbers = sum(shape.heads * (shape.key_dim + shape.value_dim) for shape in shapes)
        self._token_bytes = numbers * dtype.itemsize + 8  # the tokens themselves, and a name made of them
        self._now = 0
        self._taken: dict[int, Kept] = {}  # by their slots: of the request under way
        self._slots = self._empty(0, 0)
        self._by_name: dict[bytes, int] = {}

    @property
    def held_bytes(self) -> int:
        """Bytes that are allocated."""
        return len(self._slots.tokens) * self._slot_bytes(self._slots.tokens.shape[1])

    def place(self, feeds: Sequence[Feed], *, keys: bool) -> tuple[list[Kept], list[Feed]]:
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
        self._slots.used[list(there)] = self._now  # not to be evicted while room is made
        if groups:
            self._make_room(len(groups) - len(there), len(groups), len(groups[-1][0].tokens))
        others = [group for group in groups if not self._go_on(group, keys=keys)]
        for group in others:
            self._begin(group)
        kept = list(self._taken.values())
        self.found += sum(one.past * len(one.feeds) + len(one.tokens) * (len(one.feeds) - 1) for one in kept)
        return kept, rest

    def window(self, batch: list[Kept]) -> int:
        """Make the sequences of one pass neighbors, in the order of their slots; the first one's slot."""
        mine = sorted(one.slot for one in batch)
        count, slots = len(mine), len(self._slots.tokens)
        batch.sort(key=lambda one: one.slot)
        if mine[-1] - mine[0] < count:
            return mine[0]
        starts = np.minimum(mine, slots - count)
        ends = np.searchsorted(mine, starts + count)
        start = int(starts[np.argmax(ends - np.searchsorted(mine, starts))])
        inside = set(range(start, start + count))
        for stray, hole in zip(sorted(set(mine) - inside), sorted(inside - set(mine)), strict=True):
            self._swap(stray, hole)
        batch.sort(key=lambda one: one.slot)
        return start

    def layer(self, number: int, start: int, count: int) -> tuple[Tensor, Tensor]:
        """Keys (count, heads, length, dim) and values of neighboring slots in a layer, to be read and written."""
        chosen = slice(start, start + count)
        return self._slots.keys[number][chosen], self._slots.values[number][chosen]

    @property
    def length(self) -> int:
        """Tokens for which a slot has room; a sequence leaves the last of them free."""
        return int(self._slots.tokens.shape[1])

    def rows(self, slots: npt.NDArray[np.int64]) -> Tensor:
        """The last log-probabilities (m, V) of sequences of which nothing is new, by their slots: a copy."""
        return self._slots.rows[torch.from_numpy(slots).to(self.device)]

    def keep_rows(self, slots: npt.NDArray[np.int64], log_probs: Tensor) -> None:
        """Keep the last log-probabilities (m, V) of the sequences in these slots; -1: of none."""
        last = slots >= 0
        if not last.all():
            slots, log_probs = slots[last], log_probs[torch.from_numpy(last)]
        self._slots.rows[torch.from_numpy(slots).to(self.device)] = log_probs
        self._slots.has_row[slots] = True

    def commit(self, batch: Sequence[Kept]) -> None:
        """These are computed."""
        for one in batch:
            slot, name = one.slot, _name(one.tokens)
            self._slots.tokens[slot, one.past : len(one.tokens)] = one.tokens[one.past :]
            self._slots.lengths[slot] = len(one.tokens)
            self._slots.used[slot] = self._now
            self._slots.names[slot] = name
            self._by_name[name] = slot
            del self._taken[slot]

    def discard(self) -> None:
        """Forget what was placed and not committed. No number that is not finite stays."""
        for slot in self._taken:
            self._forget(slot)
            for tensor in (*self._slots.keys, *self._slots.values):
                tensor[slot].zero_()
        self._taken.clear()

    def _go_on(self, group: list[Feed], *, keys: bool) -> bool:
        """Whether the sequence, or all of it but its last token, is there and goes on in its slot."""
        slot = self._exact(group[0])
        if slot is None or slot in self._taken:
            return False
        feed = group[0]
        past = int(feed.positions[0])
        if not keys and self._slots.has_row[slot] and self._slots.lengths[slot] == len(feed.tokens) == past + 1:
            past += 1
        self._take(group, slot, past)
        return True

    def _begin(self, group: list[Feed]) -> None:
        """Give the sequence a slot: that of a kept beginning of it, or the least recently used one."""
        tokens, limit = group[0].tokens, int(group[0].positions[0])
        slots = self._slots
        same = slots.tokens[:, :limit] == tokens[:limit]
        common = np.where(same.all(1), min(limit, self.length), np.argmin(same, 1)) if limit else 0 * slots.lengths
        common = np.minimum(common, slots.lengths)
        free = np.ones(len(slots.lengths), np.bool_)
        free[list(self._taken)] = False
        whole = free & (common == slots.lengths)  # nothing of it is lost when it goes on as this sequence
        source = int(np.argmax(2 * common + whole))
        past = int(common[source])
        past = past if past >= MIN_SHARED else 0
        slot = source if past and whole[source] else int(np.argmin(np.where(free, slots.used, self._now + 1)))
        if slot != source and past:
            for tensor in (*slots.keys, *slots.values):
                tensor[slot, :, :past] = tensor[source, :, :past]
            slots.tokens[slot, :past] = tokens[:past]
        self._take(group, slot, past)

    def _take(self, group: list[Feed], slot: int, past: int) -> None:
        row = past == len(group[0].tokens)
        self._forget(slot)
        self._slots.lengths[slot] = past
        self._slots.has_row[slot] = row
        self._slots.used[slot] = self._now
        self._taken[slot] = Kept(group, slot, past)

    def _forget(self, slot: int) -> None:
        name = self._slots.names[slot]
        if name is not None and self._by_name.get(name) == slot:
            del self._by_name[name]
        self._slots.names[slot] = None
        self._slots.lengths[slot] = 0
        self._slots.used[slot] = -1
        self._slots.has_row[slot] = False

    def _exact(self, feed: Feed) -> int | None:
        """The slot of these tokens, or of all but the last, when what is asked lies behind what is there."""
        slot = self._by_name.get(_name(feed.tokens))
        if slot is None and feed.positions[0] == len(feed.tokens) - 1:
            slot = self._by_name.get(_name(feed.tokens[:-1]))
        return slot

    def _affordable(self, groups: list[list[Feed]]) -> tuple[list[list[Feed]], list[list[Feed]]]:
        """The sequences for which there is room together, and the others: the longest. Both by length."""
        groups = sorted(groups, key=lambda group: len(group[0].tokens))
        count = len(groups)
        while count and count * self._slot_bytes(len(groups[count - 1][0].tokens) + 1) > self._max_bytes:
            count -= 1
        return groups[:count], groups[count:]

    def _make_room(self, missing: int, count: int, longest: int) -> None:
        """Have `count` slots for sequences of up to `longest` tokens; of those, `missing` are not there yet."""
        slots, length = self._slots.tokens.shape
        live = np.flatnonzero(self._slots.lengths)
        new_length = length
        if longest >= length:
            new_length = min(_rounded(max(longest + 1, length * 3 // 2)), self._context_length + 1)
        if (len(live) + missing) * self._slot_bytes(new_length) > self._max_bytes:
            needed = _rounded(1 + max(longest, int(self._slots.lengths.max(initial=0))))
            new_length = needed if needed <= new_length // 2 else new_length
        if count * self._slot_bytes(new_length) > self._max_bytes:
            new_length = longest + 1
        affordable = self._max_bytes // self._slot_bytes(new_length)
        wanted = min(max(len(live) + missing, count), affordable)
        if wanted <= slots and new_length == length:
            return
        new_slots = min(slots if wanted <= slots else max(wanted, 2 * slots, FIRST_SLOTS), affordable)
        kept = live[self._slots.lengths[live] < new_length]
        kept = np.sort(kept[np.argsort(-self._slots.used[kept], kind="stable")[:new_slots]])
        self._move(kept, new_slots, new_length)

    def _move(self, kept: npt.NDArray[np.int64], slots: int, length: int) -> None:
        """Allocate anew, one layer after another, with the sequences of the slots `kept` in the first ones."""
        old, self._slots, self._by_name = self._slots, self._empty(0, 0), {}  # should memory not suffice
        count, known = len(kept), int(old.lengths[kept].max(initial=0))
        chosen = torch.from_numpy(kept).to(self.device)
        new = self._empty(slots, length)
        for old_layers, new_layers in ((old.keys, new.keys), (old.values, new.values)):
            for number, before in enumerate(old_layers):
                new_layers[number] = after = self._zeros(slots, before.shape[1], length, before.shape[3])
                after[:count, :, :known] = before[chosen, :, :known]
                old_layers[number] = before = self._zeros(0)  # let go of before the next layer is allocated
        new.rows[:count] = old.rows[chosen]
        new.tokens[:count, :known] = old.tokens[kept, :known]
        for name in ("lengths", "used", "has_row"):
            getattr(new, name)[:count] = getattr(old, name)[kept]
        new.names[:count] = [old.names[slot] for slot in kept]
        self._by_name = {name: slot for slot, name in enumerate(new.names) if name is not None}
        self._slots = new

    def _swap(self, one: int, other: int) -> None:
        slots = self._slots
        longest = int(max(slots.lengths[one], slots.lengths[other]))
        pair, turned = [one, other], [other, one]
        for tensor in (*slots.keys, *slots.values):
            tensor[pair, :, :longest] = tensor[turned, :, :longest]
        if slots.has_row[pair].any():
            slots.rows[pair] = slots.rows[turned]
        for array in (slots.tokens, slots.lengths, slots.used, slots.has_row):
            array[pair] = array[turned]
        slots.names[one], slots.names[other] = slots.names[other], slots.names[one]
        for slot in pair:
            if (name := slots.names[slot]) is not None:
                self._by_name[name] = slot
        moved = {slot: self._taken.pop(slot) for slot in pair if slot in self._taken}
        for slot, kept in moved.items():
            kept.slot = one + other - slot
            self._taken[kept.slot] = kept

    def _slot_bytes(self, length: int) -> int:
        return length * self._token_bytes + 4 * self._vocab_size

    def _empty(self, slots: int, length: int) -> _Slots:
        """Slots without layers: those are still those of no slot."""
        keys = [self._zeros(0, shape.heads, 0, shape.key_dim) for shape in self._shapes]
        values = [self._zeros(0, shape.heads, 0, shape.value_dim) for shape in self._shapes]
        rows = self._zeros(slots, self._vocab_size, dtype=torch.float32)
        return _Slots(keys, values, rows, np.zeros((slots, length), np.int32))

    def _zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # zeros: what is masked must be finite nevertheless
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)


def passes(kept: Sequence[Kept], max_tokens: int, *, alike: bool) -> list[list[Kept]]:
    """Sequences of which something is new, put together where they waste little: a step beside steps, and not padded to
    the length of a prompt. alike: those of one pass have equally many tokens that are found.

    New tokens and padding of one pass are at most max_tokens, unless a sequence alone has more.
    """
    grouped: list[list[Kept]] = []
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
        group = groups.setdefault(_name(feed.tokens), [])
        if group and not np.array_equal(group[0].positions, feed.positions):
            rest.append(feed)
        else:
            group.append(feed)
    return list(groups.values()), rest


def _name(tokens: npt.NDArray[np.int64]) -> bytes:
    return tokens.astype(np.int32).tobytes()


def _rounded(length: int) -> int:
    return -(-length // LENGTH_STEP) * LENGTH_STEP
