"""The two kinds of memories while they are trained: a decoder, which reads tokens, and an MLP, which reads the keys
that the language model has computed already.

A student is what knnlm/lm/distillation.py trains: hidden states of chosen positions, and logits of hidden states.
"""

import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from knnlm.errors import InvalidRequest, ModelError
from knnlm.lm import loading
from knnlm.lm.architectures import find
from knnlm.lm.capture import encode
from knnlm.lm.requests import Feed
from knnlm.memories import MLP_EPSILON, MLP_FILE

Float32 = npt.NDArray[np.float32]

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip


class Student(ABC):
    """module: what is trained. vocab_size: width of its logits. reads_keys: whether it reads keys, not tokens."""

    module: nn.Module
    vocab_size: int
    reads_keys: ClassVar[bool]

    @abstractmethod
    def hidden(self, feeds: Sequence[Feed], keys: Float32 | None) -> Tensor:
        """(m, h) of the m positions of all feeds, in their order. keys: (m, d) of these, where it reads them."""

    @abstractmethod
    def logits(self, hidden: Tensor) -> Tensor:
        """(m, V) float32 of hidden (m, h)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write it to an empty folder, in float16, and round it to that."""

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.module.parameters())

    def _halve(self) -> None:
        """Round all weights to float16. Raises ModelError when one does not fit."""
        with torch.no_grad():
            for name, parameter in self.module.named_parameters():
                parameter.copy_(parameter.half().float())
                if not parameter.isfinite().all():
                    raise ModelError(f"weight {name} of the memory does not fit float16: train with a lower rate")


class DecoderStudent(Student):
    """Any decoder-only model, in float32."""

    reads_keys = False

    def __init__(self, model: PreTrainedModel, tokenizer_folder: Path) -> None:
        self.module: nn.Module = model
        self._model = model
        self._architecture = find(model.config)
        self._head = loading.output_head(model)
        self.vocab_size = self._head.out_features
        self._tokenizer_folder = tokenizer_folder

    @classmethod
    def load(
        cls, start: str, base: str, device: torch.device, *, context_length: int, vocab_size: int, seed: int
    ) -> "DecoderStudent":
        """A student that starts as the model `start`, a folder or hub id, or, of a path to a config.json, from random
        weights.

        base: the model whose tokenizer it must have; vocab_size: how many tokens that has. context_length: tokens it is
        fed at once. Raises ModelError for another tokenizer, fewer logits than tokens or a shorter context, and as
        `loading` does.
        """
        tokenizer_folder = loading.resolve(base)
        drawn = Path(start).name == "config.json"
        folder = Path(start).expanduser().parent if drawn else loading.resolve(start)
        config = loading.load_config(folder)
        if drawn:
            torch.manual_seed(seed)
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
            nn.Module.to(model, device)
        else:
            model = loading.load_model(folder, config, device, torch.float32)
            theirs, ours = (loading.load_tokenizer(at, vocab_size=1 << 31).sha256 for at in (folder, tokenizer_folder))
            if theirs != ours:
                raise ModelError(
                    f"{start} has a tokenizer with sha256 {theirs}, the memory's must be that of {base}, {ours}: "
                    "tokens would mean other texts",
                    param="start",
                )
        width, length = loading.output_head(model).out_features, loading.context_length(config)
        if width < vocab_size:
            raise ModelError(f"{start} has {width} logits, the tokenizer {vocab_size} tokens", param="start")
        if length < context_length:
            raise ModelError(
                f"{start} takes {length} tokens, the keys were made with windows of {context_length}: the memory has "
                "to see what the keys saw",
                param="start",
            )
        return cls(model, tokenizer_folder)

    def hidden(self, feeds: Sequence[Feed], keys: Float32 | None) -> Tensor:
        del keys
        longest = max(len(feed.tokens) for feed in feeds)
        ids = np.zeros((len(feeds), longest), np.int64)
        for row, feed in zip(ids, feeds, strict=True):
            row[: len(feed.tokens)] = feed.tokens
        # padding is on the right, which a causal model cannot see: positions are told by place, never by a token
        asked = np.concatenate([row * longest + feed.positions for row, feed in enumerate(feeds)])
        hidden = encode(self._model.base_model, torch.from_numpy(ids).to(self.device))
        return hidden.flatten(0, 1)[torch.from_numpy(asked).to(self.device)]

    def logits(self, hidden: Tensor) -> Tensor:
        return self._architecture.adjust_logits(self._head(hidden), self._model.config).float()

    def save(self, folder: Path) -> None:
        self._halve()
        # not model.half(): that rounds what is no weight, too: the frequencies of rotary positions
        halves: dict[str, Tensor] = {}
        made: dict[tuple[int, torch.Size], Tensor] = {}  # by place in memory: what is tied stays one tensor
        for name, tensor in self._model.state_dict().items():
            half = tensor.half() if tensor.is_floating_point() else tensor
            halves[name] = made.setdefault((tensor.data_ptr(), tensor.shape), half)
        with loading.no_progress_bars():
            self._model.save_pretrained(folder, state_dict=halves)
        (folder / "model.safetensors").chmod(0o644)  # the library writes it for the owner alone
        for name in TOKENIZER_FILES:
            if (self._tokenizer_folder / name).is_file():
                shutil.copyfile(self._tokenizer_folder / name, folder / name)


class MlpStudent(Student):
    """MLP Memory (Wei et al. 2025, arXiv 2508.01832): a feed-forward net from a key to the vocabulary.

    x = (key - mean) / scale; h = silu(A x + a); h = h + silu(B norm(h) + b) for every further layer; logits =
    U (D norm(h)) + u, with norm(h) = h / sqrt(mean(h^2) + MLP_EPSILON). D leads to a bottleneck, so that U, which has a
    row for every token, stays small. knnlm/memory/mlp.py computes the same with numpy.
    """

    reads_keys = True

    def __init__(
        self, keys: Float32, counts: npt.NDArray[np.int64], device: torch.device, *, hidden: int, layers: int,
        bottleneck: int, seed: int,
    ) -> None:  # fmt: skip
        """keys: (m, d), a sample, from which mean and scale are taken. counts: (V,) how often each token comes: the net
        begins with their frequencies."""
        for name, size in {"hidden": hidden, "layers": layers, "bottleneck": bottleneck}.items():
            if size < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {size}", param=name)
        torch.manual_seed(seed)
        self.vocab_size = len(counts)
        self.sizes = {"hidden": hidden, "layers": layers, "bottleneck": bottleneck}
        scale = keys.std(axis=0) + MLP_EPSILON
        self._mean, self._scale = (torch.from_numpy(a).to(device) for a in (keys.mean(axis=0), scale))
        first = nn.Linear(keys.shape[1], hidden)
        further = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(layers - 1))
        down, up = nn.Linear(hidden, bottleneck, bias=False), nn.Linear(bottleneck, len(counts))
        with torch.no_grad():
            up.bias.copy_(torch.from_numpy(np.log((counts + 1) / (counts + 1).sum())))
        self.module = nn.ModuleDict({"first": first, "further": further, "down": down, "up": up})
        self.module.to(device)
        self._first, self._further, self._down, self._up = first, further, down, up

    def hidden(self, feeds: Sequence[Feed], keys: Float32 | None) -> Tensor:
        del feeds
        x = (torch.from_numpy(keys).to(self.device) - self._mean) / self._scale
        h = nn.functional.silu(self._first(x))
        for layer in self._further:
            h = h + nn.functional.silu(layer(_norm(h)))
        projected: Tensor = self._down(_norm(h))
        return projected

    def logits(self, hidden: Tensor) -> Tensor:
        logits: Tensor = self._up(hidden).float()
        return logits

    def save(self, folder: Path) -> None:
        self._halve()
        tensors = {name: p.detach().half().contiguous() for name, p in self.module.named_parameters()}
        tensors |= {"mean": self._mean, "scale": self._scale}
        save_file(tensors, folder / MLP_FILE, {"mlp": json.dumps(self.sizes)})


def _norm(h: Tensor) -> Tensor:
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + MLP_EPSILON)
