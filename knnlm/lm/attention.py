"""One pass over sequences of which something is kept: what the model attends to, and where what is new is written."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache

from knnlm.lm.architectures import Architecture
from knnlm.lm.capture import takes_positions
from knnlm.lm.prefixes import CachedSequence, Prefixes
from knnlm.lm.slots import LayerShape, Slots


def layer_shapes(base: nn.Module, device: torch.device) -> list[LayerShape]:
    """What each layer keeps of one token, seen in a pass over one."""
    cache = DynamicCache()
    base(input_ids=torch.zeros((1, 1), dtype=torch.int64, device=device), past_key_values=cache, use_cache=True)
    layers: list[Any] = cache.layers
    return [LayerShape(layer.keys.shape[1], layer.keys.shape[3], layer.values.shape[3]) for layer in layers]


def continuing(
    base: nn.Module, architecture: Architecture, prefixes: Prefixes, batch: list[CachedSequence]
) -> dict[str, Any]:
    """Arguments of a pass over the new tokens of a batch, padded on the right; they are written to their slots.

    The batch is put in the order of its slots. Equally much of each is kept where the architecture takes no mask.
    """
    start = prefixes.window(batch)
    pasts = np.array([one.past for one in batch])
    width, longest = max(one.new for one in batch), max(len(one.tokens) for one in batch)
    alike = bool((pasts == pasts[0]).all())
    places = torch.from_numpy(pasts[:, None] + np.arange(width)).to(prefixes.slots.shape.device)  # (b, width)
    cache = _Window(prefixes.slots, start, int(pasts[0]) if alike else places, longest, width)
    arguments: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if takes_positions(base):
        # rows beyond a sequence's end have no meaning, but must have a place
        arguments["position_ids"] = places.clamp(max=longest - 1)
    if not alike:
        arguments["attention_mask"] = _masks(base.config, architecture, places, longest, prefixes.slots.shape.dtype)
    return arguments


class _Window(Cache):
    """What a model of transformers sees of the slots start, start + 1, ... in one pass.

    places: where in their slots the new tokens go, (b, width), or where those of all of them begin.
    """

    is_compileable = False

    def __init__(self, slots: Slots, start: int, places: Tensor | int, longest: int, width: int) -> None:
        super().__init__(layers=[])
        self._slots = slots
        self._start = start
        self._places = places
        self._longest = longest
        self._width = width
        if isinstance(places, Tensor):
            self._columns = places.clamp(max=slots.length - 1)  # where no sequence has a token
            self._rows = torch.arange(len(places), device=places.device)[:, None]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Write what is new and return all there is, (b, heads, longest, dim) each: views."""
        mine = slice(self._start, self._start + len(key_states))
        keys, values = self._slots.keys[layer_idx][mine], self._slots.values[layer_idx][mine]
        if isinstance(self._places, int):
            new = slice(self._places, self._places + self._width)
            keys[:, :, new] = key_states
            values[:, :, new] = value_states
            if not self._places:
                return key_states, value_states
        elif self._width == 1:
            keys[self._rows[:, 0], :, self._columns[:, 0]] = key_states[:, :, 0]
            values[self._rows[:, 0], :, self._columns[:, 0]] = value_states[:, :, 0]
        else:
            keys[self._rows, :, self._columns] = key_states.transpose(1, 2)
            values[self._rows, :, self._columns] = value_states.transpose(1, 2)
        return keys[:, :, : self._longest], values[:, :, : self._longest]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self._longest - self._width

    def get_query_offset(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        return self._longest - self._width

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:  # noqa: ARG002
        return self._longest, 0


def _masks(config: Any, architecture: Architecture, places: Tensor, longest: int, dtype: torch.dtype) -> Any:
    """What transformers would make for each sequence, (b, 1, width, longest), added to the scores; by layer type where
    the architecture has several."""
    behind = places[:, None, :, None] - torch.arange(longest, device=places.device)  # how far a key lies behind a query
    lowest = torch.finfo(dtype).min

    def mask(window: int | None) -> Tensor:
        seen = behind >= 0 if window is None else (behind >= 0) & (behind < window)
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, lowest)

    if architecture.masks(config) == "by layer type":
        windows = {"full_attention": None, "sliding_attention": config.sliding_window}
        return {kind: mask(windows[kind]) for kind in set(config.layer_types)}
    return mask(getattr(config, "sliding_window", None) if architecture.masks(config) == "window" else None)
