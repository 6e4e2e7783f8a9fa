"""The table of architectures: where each key is found in a model's last layer, and what it means there. The same
tensor of an earlier layer is named by counting from the end: `ffn_input@-2` is that of the last layer but one.

A new architecture is one row at the end of this file. Its tests are a tiny config in tests/lm/tiny_models.py and its
last layer written out by hand in tests/lm/test_capture.py; every test of the table then runs over it too.

A row is chosen by `config.model_type`; rows that share one are told apart by `when`. Paths start at the base model, the
one without the language-model head; -1 is the last layer. Nothing here runs a model: knnlm/lm/capture.py does.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from knnlm.errors import InvalidRequest, ModelError, UnknownArchitecture

if TYPE_CHECKING:
    import torch

KEY_FUNCTIONS = (
    "ffn_input",
    "ffn_input_before_norm",
    "attention_input",
    "attention_input_before_norm",
    "model_output",
    "model_output_before_norm",
)

IN_A_LAYER = KEY_FUNCTIONS[:4]  # what a layer gives to the next is the next one's attention_input_before_norm
EARLIER = re.compile(r"-([2-9]|[1-9][0-9]{1,2})")  # the last layer has one name

Masks = Literal["causal", "window", "by layer type", "own"]

# a transformers config: its attributes differ per architecture
Config = Any


@dataclass(frozen=True)
class Site:
    """A tensor in the model: what enters or leaves a module. `means` says what has happened to it there."""

    module: str
    side: Literal["input", "output"]
    means: str


@dataclass(frozen=True)
class Refusal:
    """This architecture has no such tensor. `reason` is a sentence for the person who asked for it."""

    reason: str


@dataclass(frozen=True)
class Architecture:
    """keys: one entry per key function. adjust_logits(logits, config): what the model does after its LM head.

    masks: which attention masks the base model takes in place of those it makes: one for all layers, causal or of the
    config's sliding window; a dictionary of both, by layer type; or none, where it goes by how much it has cached, and
    sequences can continue in one pass only where equally much is.
    """

    model_type: str
    keys: Mapping[str, Site | Refusal]
    variant: str = ""
    when: Callable[[Config], bool] = lambda _: True
    adjust_logits: Callable[["torch.Tensor", Config], "torch.Tensor"] = lambda logits, _: logits
    masks: Callable[[Config], Masks] = lambda _: "causal"

    @property
    def name(self) -> str:
        return f"{self.model_type} ({self.variant})" if self.variant else self.model_type

    def site(self, key_function: str) -> Site:
        """Raises InvalidRequest for a name that is no key function, ModelError where this architecture has none."""
        name, at, layer = key_function.partition("@")
        if name not in KEY_FUNCTIONS or (at and (name not in IN_A_LAYER or not EARLIER.fullmatch(layer))):
            raise InvalidRequest(
                f"key_function must be one of {', '.join(KEY_FUNCTIONS)}, or one of the first {len(IN_A_LAYER)} with "
                f"@-2, @-3 and so on for an earlier layer, got {key_function!r}",
                param="key_function",
            )
        found = self.keys[name]
        if isinstance(found, Refusal):
            raise ModelError(f"{self.name} has no {name}: {found.reason}", param="key_function")
        return replace(found, module=found.module.replace(".-1", f".{layer}")) if at else found


def find(config: Config) -> Architecture:
    """The row for a config. Raises UnknownArchitecture, whose message lists what is known and how to add a row."""
    for row in TABLE:
        if row.model_type == config.model_type and row.when(config):
            return row
    known = ", ".join(row.name for row in TABLE)
    raise UnknownArchitecture(
        f"no row for model_type {config.model_type!r} with this config; known: {known}. "
        "To add one, write its row in knnlm/lm/architectures.py",
        param="model",
    )


def _sequential(layer: str, attention_norm: str, ffn_norm: str, ffn: str, final_norm: str) -> dict[str, Site | Refusal]:
    """x' = x + attention(attention_norm(x)); x' + ffn(ffn_norm(x')): pre-norm, one after the other."""
    return {
        "ffn_input": Site(f"{layer}.{ffn}", "input", "the layer's attention added, then the FFN's norm"),
        "ffn_input_before_norm": Site(f"{layer}.{ffn_norm}", "input", "residual stream after the layer's attention"),
        "attention_input": Site(f"{layer}.{attention_norm}", "output", "residual stream, then the attention's norm"),
        "attention_input_before_norm": Site(f"{layer}.{attention_norm}", "input", "residual stream before the layer"),
        **_output(final_norm),
    }


def _parallel(layer: str, attention_norm: str, ffn_norm: str, ffn: str, final_norm: str) -> dict[str, Site | Refusal]:
    """x + attention(attention_norm(x)) + ffn(ffn_norm(x)): the FFN does not see its layer's attention."""
    unseen = "the layer's attention is not in it"
    return {
        "ffn_input": Site(
            f"{layer}.{ffn}", "input", f"residual stream before the layer, then the FFN's norm: {unseen}"
        ),
        "ffn_input_before_norm": Site(f"{layer}.{ffn_norm}", "input", f"residual stream before the layer: {unseen}"),
        "attention_input": Site(f"{layer}.{attention_norm}", "output", "residual stream, then the attention's norm"),
        "attention_input_before_norm": Site(f"{layer}.{attention_norm}", "input", "residual stream before the layer"),
        **_output(final_norm),
    }


def _output(final_norm: str) -> dict[str, Site | Refusal]:
    return {
        "model_output": Site(final_norm, "output", "residual stream after the last layer, then the final norm"),
        "model_output_before_norm": Site(final_norm, "input", "residual stream after the last layer"),
    }


def _norms_outputs(layer: str, final_norm: str) -> dict[str, Site | Refusal]:
    """x' = x + norm(attention(x)); x' + norm(ffn(x')): the branches' outputs are normalised, not their inputs."""
    same = "it normalises what leaves attention and FFN, not what enters; {} is that tensor"
    return {
        "ffn_input": Site(f"{layer}.mlp", "input", "residual stream after the layer's attention, not normalised"),
        "ffn_input_before_norm": Refusal(same.format("ffn_input")),
        "attention_input": Site(layer, "input", "residual stream before the layer, not normalised"),
        "attention_input_before_norm": Refusal(same.format("attention_input")),
        **_output(final_norm),
    }


_OPT_LAYER = "decoder.layers.-1"

# OPT's layer calls the two linear maps of its FFN itself: there is no FFN module, fc1 is where it begins
_OPT_PRE_NORM = _sequential(_OPT_LAYER, "self_attn_layer_norm", "final_layer_norm", "fc1", "decoder.final_layer_norm")

_OPT_NO_FINAL_NORM: dict[str, Site | Refusal] = _OPT_PRE_NORM | {
    "model_output": Site(_OPT_LAYER, "output", "residual stream after the last layer: there is no final norm"),
    "model_output_before_norm": Refusal("this checkpoint has no final norm; model_output is that tensor"),
}

# x' = norm(x + attention(x)); norm(x' + ffn(x')): the norms stand in the residual stream, behind each sum
_OPT_POST_NORM: dict[str, Site | Refusal] = {
    "ffn_input": Site(f"{_OPT_LAYER}.fc1", "input", "the layer's attention added, then the norm behind that sum"),
    "ffn_input_before_norm": Site(f"{_OPT_LAYER}.self_attn_layer_norm", "input", "the layer's attention just added"),
    "attention_input": Site(_OPT_LAYER, "input", "output of the layer before, normalised there"),
    "attention_input_before_norm": Refusal("the norm before the last attention belongs to the layer before"),
    "model_output": Site(f"{_OPT_LAYER}.final_layer_norm", "output", "the FFN added, then the layer's last norm"),
    "model_output_before_norm": Site(f"{_OPT_LAYER}.final_layer_norm", "input", "the last layer's FFN just added"),
}

_GPT2 = _sequential("h.-1", "ln_1", "ln_2", "mlp", "ln_f")
_LLAMA = _sequential("layers.-1", "input_layernorm", "post_attention_layernorm", "mlp", "norm")
_GEMMA = _sequential("layers.-1", "input_layernorm", "pre_feedforward_layernorm", "mlp", "norm")
_BLOOM = _sequential("h.-1", "input_layernorm", "post_attention_layernorm", "mlp", "ln_f")
_NEOX = ("layers.-1", "input_layernorm", "post_attention_layernorm", "mlp", "final_layer_norm")


def _soft_cap(logits: "torch.Tensor", config: Config) -> "torch.Tensor":
    cap = config.final_logit_softcapping
    return logits if cap is None else (logits / cap).tanh() * cap


def _falcon_norms(config: Config) -> int:
    """Norms before attention and FFN: one shared, or one each (the new decoder's default)."""
    count: int | None = config.num_ln_in_parallel_attn
    return (2 if config.new_decoder_architecture else 1) if count is None else count


def _own(_: Config) -> Masks:
    return "own"


def _window(_: Config) -> Masks:
    return "window"


def _by_layer_type(_: Config) -> Masks:
    return "by layer type"


def _falcon_masks(config: Config) -> Masks:
    return "own" if config.alibi else "causal"


TABLE = (
    Architecture("gpt2", _GPT2),
    Architecture("gpt_neo", _GPT2, masks=_own),
    Architecture("gptj", _parallel("h.-1", "ln_1", "ln_1", "mlp", "ln_f")),
    Architecture("gpt_neox", _parallel(*_NEOX), "parallel residual", lambda c: c.use_parallel_residual),
    Architecture("gpt_neox", _sequential(*_NEOX), "sequential", lambda c: not c.use_parallel_residual),
    Architecture(
        "opt", _OPT_PRE_NORM, "pre-norm", lambda c: c.do_layer_norm_before and not c._remove_final_layer_norm
    ),
    Architecture("opt", _OPT_NO_FINAL_NORM, "pre-norm, no final norm", lambda c: c.do_layer_norm_before),
    Architecture("opt", _OPT_POST_NORM, "post-norm", lambda c: not c.do_layer_norm_before),
    Architecture("llama", _LLAMA),
    Architecture("mistral", _LLAMA, masks=_window),
    Architecture("qwen2", _LLAMA, masks=_by_layer_type),
    Architecture("qwen3", _LLAMA, masks=_by_layer_type),
    Architecture("phi3", _LLAMA, masks=_window),
    Architecture("gemma2", _GEMMA, adjust_logits=_soft_cap, masks=_by_layer_type),
    Architecture("gemma3_text", _GEMMA, adjust_logits=_soft_cap, masks=_by_layer_type),
    Architecture("olmo2", _norms_outputs("layers.-1", "norm")),
    Architecture("bloom", _BLOOM, masks=_own),
    Architecture(
        "falcon",
        _BLOOM,
        "sequential",
        lambda c: not c.parallel_attn and not c.new_decoder_architecture,
        masks=_falcon_masks,
    ),
    Architecture(
        "falcon",
        _parallel("h.-1", "input_layernorm", "input_layernorm", "mlp", "ln_f"),
        "parallel, one norm",
        lambda c: c.parallel_attn and _falcon_norms(c) == 1,
        masks=_falcon_masks,
    ),
    Architecture(
        "falcon",
        _parallel("h.-1", "ln_attn", "ln_mlp", "mlp", "ln_f"),
        "parallel, two norms",
        lambda c: c.parallel_attn and c.new_decoder_architecture and _falcon_norms(c) == 2,
        masks=_falcon_masks,
    ),
)  # fmt: skip
