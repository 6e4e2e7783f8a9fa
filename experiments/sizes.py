"""The sizes of a language model without its weights, and a scale that is reckoned with them."""

import re
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from transformers import AutoModelForCausalLM

from experiments.scale import Scale
from knnlm.errors import ModelError
from knnlm.lm import loading

__all__ = ["Sizes", "fitted", "sizes_of"]

NUMBER = re.compile(r"(?<![0-9.])([0-9]+(?:\.[0-9]+)?)(m|b)(?![a-z0-9])")
UNITS = {"m": 1e6, "b": 1e9}
ASSUMED_CONTEXT = 1024
VOCABULARIES = {  # by what a name holds, the first that it does; else GPT-2's
    "llama-3": 128_256, "llama": 32_000, "mistral": 32_000, "qwen": 151_936, "gemma": 256_000, "pythia": 50_304,
    "smollm": 49_152, "phi": 51_200, "": 50_257,
}  # fmt: skip
FASTEST = 0.1  # a model of a tenth of the parameters is ten times as fast, a smaller one no faster: a guess
CLASSES = (  # parameters of published decoders, with their usual width and layers
    (70e6, 512, 6), (124e6, 768, 12), (360e6, 1024, 24), (1e9, 2048, 16), (1.5e9, 2048, 24), (3e9, 2560, 32),
    (7e9, 4096, 32), (13e9, 5120, 40), (30e9, 6656, 60), (70e9, 8192, 80),
)  # fmt: skip
NAMED = {"gpt2": 124e6, "distilgpt2": 82e6, "gpt2-medium": 355e6, "gpt2-large": 774e6, "gpt2-xl": 1558e6}


@dataclass(frozen=True)
class Sizes:
    """width: of a hidden state, and of a key. context: tokens at most. source: what they were read from, or that they
    were assumed, for people."""

    name: str
    width: int
    layers: int
    vocabulary: int
    parameters: int
    context: int
    source: str

    @property
    def line(self) -> str:
        return (
            f"model {self.name}: {self.parameters / 1e6:,.0f}M parameters, {self.layers} layers of width "
            f"{self.width:,}, vocabulary {self.vocabulary:,}, context {self.context:,} ({self.source})"
        )


def sizes_of(path_or_id: str) -> Sizes:
    """The sizes of a Hugging Face folder or hub id, by its config.json alone; by its name where that cannot be had.

    Raises ModelError where there is no config.json and the name says nothing, or the config cannot be used.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        if folder.exists() or path_or_id.startswith((".", "/", "~")) or path_or_id.count("/") > 1:
            raise ModelError(f"no model folder at {path_or_id!r}", param="model")
        try:
            folder = Path(hf_hub_download(path_or_id, "config.json")).parent
        except (OSError, ValueError) as err:  # what huggingface_hub raises, offline included, is one of these
            return _assumed(path_or_id, err)
    config = loading.load_config(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    return Sizes(
        path_or_id, config.hidden_size, config.num_hidden_layers, loading.output_head(model).out_features,
        sum(p.numel() for p in model.parameters()), loading.context_length(config), "from its config.json",
    )  # fmt: skip


def fitted(scale: Scale, sizes: Sizes) -> Scale:
    """The scale with a model of other sizes: windows that fit it, and the rates that are expected of it.

    Passes take time in proportion to parameters, searches in proportion to a key's dimensions.
    """
    slower = max(FASTEST, sizes.parameters / scale.base_parameters)
    context = min(scale.context, sizes.context)
    return replace(
        scale, key_dim=sizes.width, layers=sizes.layers, vocabulary=sizes.vocabulary, base_parameters=sizes.parameters,
        context=context, min_context=min(scale.min_context, context // 2), trained_rate=scale.trained_rate / slower,
        read_rate=scale.read_rate / slower, search_rate=scale.search_rate * scale.key_dim / sizes.width,
        model=sizes.name,
    )  # fmt: skip


def _assumed(name: str, err: Exception) -> Sizes:
    last = name.rpartition("/")[2].lower()
    found = NUMBER.search(last)
    parameters = NAMED.get(last) or (float(found[1]) * UNITS[found[2]] if found else None)
    if parameters is None:
        raise ModelError(
            f"{name!r} is no folder here, could not be had from the hub ({err}), and its name does not say how many "
            "parameters it has: name a folder with its config.json",
            param="model",
        ) from err
    _, width, layers = min(CLASSES, key=lambda one: abs(one[0] - parameters) / max(one[0], parameters))
    vocabulary = next(size for family, size in VOCABULARIES.items() if family in last)
    return Sizes(
        name, width, layers, vocabulary, round(parameters), ASSUMED_CONTEXT,
        f"assumed by its name, as decoders of {parameters / 1e6:,.0f}M parameters are; no config.json could be had",
    )  # fmt: skip
