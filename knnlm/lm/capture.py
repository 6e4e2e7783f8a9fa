"""One forward pass of a base model, with the key tensor taken out on its way.

A hook lives for the duration of one call and is removed whatever happens. The base model is run, not the one with the
head: the logits of a whole batch are never made here. What a site means is written in knnlm/lm/architectures.py.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from knnlm.errors import ModelError
from knnlm.lm.architectures import Site


class _Reached(Exception):
    """The site has been seen and nothing behind it is wanted. Never leaves this file."""


def encode(
    base: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    continuing: Mapping[str, Any] | None = None,
) -> Tensor:
    """Final hidden states (batch, T, h), what the language-model head reads, on the model's device.

    input_ids: (batch, T) int64. attention_mask: (batch, T), 1 at tokens and 0 at padding, on either side; it may be
    left out when the padding is on the right, where a causal model cannot see it. What comes out at padding has no
    meaning. Position ids are counted over the tokens, so that left padding moves nothing. continuing: the arguments of
    knnlm.lm.attention.continuing, where input_ids are what follows kept sequences.
    """
    arguments: dict[str, Any] = {"input_ids": input_ids, "use_cache": False, "return_dict": True}
    if attention_mask is not None:
        arguments["attention_mask"] = attention_mask
        if takes_positions(base):
            arguments["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
    arguments |= continuing or {}
    hidden: Tensor = base(**arguments).last_hidden_state
    return hidden


def takes_positions(base: nn.Module) -> bool:
    """Whether a base model is told the positions of its tokens. Those with ALiBi read the mask instead."""
    return _takes(type(base).forward, "position_ids")


@cache
def _takes(function: Callable[..., Any], argument: str) -> bool:
    return argument in inspect.signature(function).parameters


def capture(
    base: nn.Module,
    site: Site,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    continuing: Mapping[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """What `encode` gives, and the keys (batch, T, d) found at `site` in the same pass.

    Raises ModelError when the model has no such module, or what is there is not one tensor with a row per token.
    """
    with _recorded(_module(base, site), site) as seen:
        hidden = encode(base, input_ids, attention_mask, continuing)
    return hidden, _keys(seen, site, input_ids)


def capture_keys(base: nn.Module, site: Site, input_ids: Tensor) -> Tensor:
    """The keys (batch, T, d) of `capture`, from a pass that ends at `site`: what lies behind it is not computed."""
    with _recorded(_module(base, site), site, last=True) as seen, suppress(_Reached):
        encode(base, input_ids)
    return _keys(seen, site, input_ids)


@contextmanager
def only_at(base: nn.Module, ffn: Site, input_ids: Tensor, rows: Tensor) -> Iterator[None]:
    """Inside, a pass over input_ids (batch, T) runs the last layer's FFN at the positions `rows` alone.

    rows: (m,) int64, of the batch * T positions one below the other. An FFN treats every position by itself and no
    attention comes after this one, so what the model gives at `rows` stays what it was; elsewhere it has no meaning.
    """
    shapes = (input_ids.shape, (input_ids.numel(),))

    def narrow(value: Any) -> Any:
        """Every tensor with a row per position: BLOOM's FFN is also given the residual stream."""
        if not isinstance(value, Tensor) or value.shape[:-1] not in shapes:
            return value
        taken = value.flatten(0, -2)[rows]
        return taken if value.dim() == 2 else taken[None]

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(map(narrow, args)), {name: narrow(value) for name, value in kwargs.items()}

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = torch.zeros((input_ids.numel(), output.shape[-1]), dtype=output.dtype, device=output.device)
        whole[rows] = output.flatten(0, -2)
        return whole if output.dim() == 2 else whole.view(*input_ids.shape, -1)

    module = _module(base, ffn)
    handles = [module.register_forward_pre_hook(before, with_kwargs=True), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _keys(seen: list[Tensor], site: Site, input_ids: Tensor) -> Tensor:
    rows = input_ids.shape
    # OPT flattens to (batch * T, d) before its FFN
    if len(seen) != 1 or seen[0].shape[:-1] not in (rows, (rows.numel(),)):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in seen) or "nothing"
        raise ModelError(f"the {site.side} of {site.module} was {shapes}, expected one vector for each of {rows}")
    return seen[0].reshape(*rows, -1)


@contextmanager
def _recorded(module: nn.Module, site: Site, *, last: bool = False) -> Iterator[list[Tensor]]:
    """last: end the pass, by raising _Reached, when the tensor has been seen."""
    seen: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])
        if last:
            raise _Reached

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        if last:
            raise _Reached

    if site.side == "input":
        # prepended: before `only_at` narrows it
        handle = module.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
    else:
        handle = module.register_forward_hook(after)
    try:
        yield seen
    finally:
        handle.remove()


def _module(base: nn.Module, site: Site) -> nn.Module:
    found: Any = base
    for part in site.module.split("."):
        if isinstance(found, nn.ModuleList):
            if -int(part) > len(found):
                raise ModelError(f"{site.module}: this model has {len(found)} layers", param="key_function")
            found = found[int(part)]
        else:
            found = getattr(found, part, None)
    if not isinstance(found, nn.Module):
        raise ModelError(f"{type(base).__name__} has no module {site.module!r}")
    return found
