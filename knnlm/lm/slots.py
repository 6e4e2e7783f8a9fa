"""Slots for the keys and values of sequences: tensors that are allocated ahead, written in place, moved together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

TOKEN_BYTES = 8  # bytes of one token id, and of its part of the name by which a sequence is found


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one layer: a token has `heads` keys of `key_dim` numbers, and as many values of `value_dim`."""

    heads: int
    key_dim: int
    value_dim: int


@dataclass(frozen=True)
class SlotShape:
    """Sizes of every slot. Tensors are on `device`, in the model's dtype, log-probabilities in float32."""

    layers: Sequence[LayerShape]
    vocab_size: int
    dtype: torch.dtype
    device: torch.device

    def slot_bytes(self, length: int) -> int:
        """Bytes of a slot with room for `length` tokens."""
        numbers = sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in self.layers)
        return length * (numbers * self.dtype.itemsize + TOKEN_BYTES) + 4 * self.vocab_size

    def zeros(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        # zeros: what is masked must be finite nevertheless
        return torch.zeros(shape, dtype=dtype or self.dtype, device=self.device)


class Slots:
    """`count` slots with room for `length` tokens each; a sequence has one token fewer at most.

    keys, values: one tensor (slots, heads, length, dim) per layer; new slots have none yet, see `moved`. rows:
    (slots, V) float32, the log-probabilities after the last token, valid where has_row. tokens: (slots, length) int32.
    lengths: (slots,) int64, tokens that a slot holds, 0 where it is free. used: (slots,) int64, the time of the last
    use as `fill` and `cut` are given it, -1 where free.
    """

    def __init__(self, shape: SlotShape, count: int = 0, length: int = 0) -> None:
        self.shape = shape
        self.keys = [shape.zeros(0, layer.heads, 0, layer.key_dim) for layer in shape.layers]
        self.values = [shape.zeros(0, layer.heads, 0, layer.value_dim) for layer in shape.layers]
        self.rows = shape.zeros(count, shape.vocab_size, dtype=torch.float32)
        self.tokens = np.zeros((count, length), np.int32)
        self.lengths = np.zeros(count, np.int64)
        self.used = np.full(count, -1, np.int64)
        self.has_row = np.zeros(count, np.bool_)
        self._names: list[bytes | None] = [None] * count
        self._by_name: dict[bytes, int] = {}

    @property
    def count(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def length(self) -> int:
        return int(self.tokens.shape[1])

    @property
    def held_bytes(self) -> int:
        """Bytes that are allocated."""
        return self.count * self.shape.slot_bytes(self.length)

    def find(self, tokens: npt.NDArray[np.int64]) -> int | None:
        """The slot that holds exactly these tokens, None where there is none."""
        return self._by_name.get(_name(tokens))

    def fill(self, slot: int, tokens: npt.NDArray[np.int64], known: int, now: int) -> None:
        """Record that the slot holds these tokens, the first `known` of which it held before. now: for `used`."""
        name = _name(tokens)
        self.tokens[slot, known : len(tokens)] = tokens[known:]
        self.lengths[slot] = len(tokens)
        self.used[slot] = now
        self._names[slot] = name
        self._by_name[name] = slot

    def cut(self, slot: int, length: int, now: int, *, row: bool = False) -> None:
        """Keep the first `length` tokens of a slot; `find` does not see it. row: its log-probabilities are those after
        the last of them. now: for `used`."""
        name = self._names[slot]
        if name is not None and self._by_name.get(name) == slot:
            del self._by_name[name]
        self._names[slot] = None
        self.lengths[slot] = length
        self.used[slot] = now
        self.has_row[slot] = row

    def clear(self, slot: int) -> None:
        """Free the slot. Its numbers become zeros: what is masked must be finite nevertheless."""
        self.cut(slot, 0, -1)
        for tensor in (*self.keys, *self.values):
            tensor[slot].zero_()

    def copy(self, source: int, slot: int, length: int) -> None:
        """Put the first `length` tokens of one slot, their keys and values, into another."""
        for tensor in (*self.keys, *self.values):
            tensor[slot, :, :length] = tensor[source, :, :length]
        self.tokens[slot, :length] = self.tokens[source, :length]

    def swap(self, one: int, other: int) -> None:
        """Exchange what is in two slots."""
        longest = int(max(self.lengths[one], self.lengths[other]))
        pair, turned = [one, other], [other, one]
        for tensor in (*self.keys, *self.values):
            tensor[pair, :, :longest] = tensor[turned, :, :longest]
        if self.has_row[pair].any():
            self.rows[pair] = self.rows[turned]
        for array in (self.tokens, self.lengths, self.used, self.has_row):
            array[pair] = array[turned]
        self._names[one], self._names[other] = self._names[other], self._names[one]
        for slot in pair:
            if (name := self._names[slot]) is not None:
                self._by_name[name] = slot

    def moved(self, kept: npt.NDArray[np.int64], count: int, length: int) -> "Slots":
        """New slots, the first of which hold what the slots `kept` hold here. This object's tensors are freed one layer
        after another: it must not be used any more."""
        new = Slots(self.shape, count, length)
        known = int(self.lengths[kept].max(initial=0))
        chosen = torch.from_numpy(kept).to(self.shape.device)
        for old_layers, new_layers in ((self.keys, new.keys), (self.values, new.values)):
            for number, before in enumerate(old_layers):
                new_layers[number] = after = self.shape.zeros(count, before.shape[1], length, before.shape[3])
                after[: len(kept), :, :known] = before[chosen, :, :known]
                old_layers[number] = before = self.shape.zeros(0)
        new.rows[: len(kept)] = self.rows[chosen]
        new.tokens[: len(kept), :known] = self.tokens[kept, :known]
        for mine, others in ((self.lengths, new.lengths), (self.used, new.used), (self.has_row, new.has_row)):
            others[: len(kept)] = mine[kept]
        new._names[: len(kept)] = [self._names[slot] for slot in kept]
        new._by_name = {name: slot for slot, name in enumerate(new._names) if name is not None}
        return new


def _name(tokens: npt.NDArray[np.int64]) -> bytes:
    return tokens.astype(np.int32).tobytes()
