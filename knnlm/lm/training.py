"""Training a small language model from text: how the bundled pocket LM was made.

A Llama-shaped decoder with a byte-level BPE tokenizer, both learned from the given documents, written as a plain
Hugging Face folder. Whole documents are held out. Everything is derived from the settings and the seed, the state is
saved as it goes (safetensors, never pickle), and the same command continues a run that was stopped. The learning rate
is constant after the warm-up and falls to zero over the last quarter, so the token budget of a running job may be
changed as long as the decay has not begun.
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from knnlm.errors import InvalidRequest
from knnlm.lm.loading import no_progress_bars
from knnlm.lm.optimizing import adamw, claim, mixed_precision, optimize
from knnlm.lm.training_data import BOS, encode, learn_tokenizer, split, windows
from knnlm.messages import Document

WARMUP_STEPS = 200
DECAY_SHARE = 0.25  # the last part of the budget


@dataclass(frozen=True)
class TrainSettings:
    """What fixes a run. Sizes in tokens; `tokens` is how many are trained on, repeats included."""

    tokens: int
    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    heads: int = 4
    context: int = 512
    batch_tokens: int = 8192
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "vocab_size", "layers", "width", "heads", "context", "batch_tokens"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {getattr(self, name)}", param=name)
        if self.width % (2 * self.heads):
            raise InvalidRequest(
                f"width must be a multiple of 2 x heads ({2 * self.heads}), got {self.width}", param="width"
            )
        if self.batch_tokens % self.context:
            raise InvalidRequest(
                f"batch_tokens must be a multiple of context ({self.context}), got {self.batch_tokens}",
                param="batch_tokens",
            )
        if self.vocab_size < 257:
            raise InvalidRequest(
                f"vocab_size must be at least 257 (256 bytes and {BOS}), got {self.vocab_size}", param="vocab_size"
            )

    @property
    def steps(self) -> int:
        return math.ceil(self.tokens / self.batch_tokens)


@dataclass(frozen=True)
class TrainReport:
    """What a run gives. Losses are mean negative log-likelihoods in nats per token."""

    settings: TrainSettings
    documents: int
    text_bytes: int
    text_sha256: str
    train_tokens: int
    held_out_tokens: int
    held_out_loss: float
    held_out_bits_per_byte: float
    parameters: int
    seconds: float


def train(
    documents: Sequence[Document],
    out: Path,
    settings: TrainSettings,
    *,
    device: str = "cpu",
    compile_model: bool = False,
    on_step: Callable[[int, float, float], None] | None = None,
    save_seconds: float = 120.0,
) -> TrainReport:
    """Learn tokenizer and model, write `out` as a Hugging Face folder (float16 weights), and report.

    `on_step(step, loss, tokens_per_second)` is called after every step. State lives in `out`.work until the end.
    Raises InvalidRequest for too little text, Conflict when `out`.work belongs to a run with other settings or text.
    """
    work = out.with_name(out.name + ".work")
    train_docs, held_docs = split(documents)
    if not train_docs or not held_docs:
        raise InvalidRequest(f"too few documents to hold some out: {len(documents)}", param="sources")
    digest = hashlib.sha256()
    for document in documents:
        digest.update(json.dumps([document.id, document.text]).encode())
    identity = {**asdict(settings), "text_sha256": digest.hexdigest()}
    identity.pop("tokens")  # the budget of a running job may change
    claim(work, identity)
    tokenizer = learn_tokenizer(train_docs, settings.vocab_size, work / "tokenizer.json")
    stream, held = encode(tokenizer, train_docs), encode(tokenizer, held_docs)
    if min(len(stream), len(held)) <= settings.context:
        raise InvalidRequest(
            f"too little text: {len(stream)} tokens to train on and {len(held)} held out, "
            f"context is {settings.context}",
            param="sources",
        )
    torch.manual_seed(settings.seed)
    model = LlamaForCausalLM(_config(settings, tokenizer))
    nn.Module.to(model, device)
    seconds = _fit(model, stream, settings, work, compile_model, on_step, save_seconds)

    model.half()  # type: ignore[no-untyped-call]
    _save_model(model, tokenizer, settings, out)
    loss = evaluate(model.float(), held, settings.context)  # type: ignore[no-untyped-call]
    held_bytes = sum(len(d.text.encode("utf-8", "replace")) for d in held_docs)
    report = TrainReport(
        settings=settings,
        documents=len(documents),
        text_bytes=sum(len(d.text.encode("utf-8", "replace")) for d in documents),
        text_sha256=digest.hexdigest(),
        train_tokens=len(stream),
        held_out_tokens=len(held),
        held_out_loss=loss,
        held_out_bits_per_byte=loss * len(held) / math.log(2) / held_bytes,
        parameters=model.num_parameters(),
        seconds=seconds,
    )
    (out / "training.json").write_text(json.dumps(asdict(report), indent=2) + "\n")
    for file in work.iterdir():
        file.unlink()
    work.rmdir()
    return report


def evaluate(model: LlamaForCausalLM, tokens: npt.NDArray[np.int32], context: int) -> float:
    """Mean negative log-likelihood over consecutive windows of `context` tokens, nats per token."""
    device = next(model.parameters()).device
    model.eval()  # type: ignore[no-untyped-call]
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, len(tokens) - 1, context):
            window = torch.from_numpy(tokens[start : start + context + 1].astype(np.int64)).to(device)
            logits = model(input_ids=window[None, :-1]).logits[0]
            total += float(torch.nn.functional.cross_entropy(logits.float(), window[1:], reduction="sum"))
            count += len(window) - 1
    return total / count


def learning_rate(step: int, settings: TrainSettings) -> float:
    """Warm-up, constant, then linear to zero over the last DECAY_SHARE of the steps. `step` counts from 0."""
    warm = min(1.0, (step + 1) / WARMUP_STEPS)
    left = (settings.steps - step) / max(1.0, DECAY_SHARE * settings.steps)
    return settings.learning_rate * min(warm, left, 1.0)


def _fit(
    model: LlamaForCausalLM,
    stream: npt.NDArray[np.int32],
    settings: TrainSettings,
    work: Path,
    compile_model: bool,
    on_step: Callable[[int, float, float], None] | None,
    save_seconds: float,
) -> float:
    """Train in place, from the saved state if there is one. Returns the seconds spent, earlier runs included."""
    device = next(model.parameters()).device
    forward: Any = torch.compile(model) if compile_model else model
    offsets = np.arange(settings.context + 1)
    batches = enumerate(
        windows(len(stream), settings.context, settings.batch_tokens // settings.context, settings.seed)
    )

    def losses(step: int) -> Iterator[torch.Tensor]:
        starts = next(starts for number, starts in batches if number == step)
        rows = torch.from_numpy(stream[starts[:, None] + offsets].astype(np.int64)).to(device)  # (batch, T + 1)
        with mixed_precision(device):
            logits = forward(input_ids=rows[:, :-1]).logits
        yield torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())

    def told(step: int, loss: float, seconds: float) -> None:
        if on_step is not None:
            on_step(step, loss, settings.batch_tokens / seconds)

    return optimize(
        model, adamw(model, settings.weight_decay), work, steps=settings.steps, losses=losses, notes={},
        rate=lambda step: learning_rate(step, settings), on_step=told, save_seconds=save_seconds,
    )  # fmt: skip


def _config(settings: TrainSettings, tokenizer: Tokenizer) -> LlamaConfig:
    bos = tokenizer.token_to_id(BOS)
    return LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(with_added_tokens=True),
        hidden_size=settings.width,
        intermediate_size=max(32, settings.width * 11 // 4 // 32 * 32),
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        max_position_embeddings=settings.context,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=bos,
    )


def _save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, settings: TrainSettings, out: Path) -> None:
    wrapped = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, model_max_length=settings.context
    )
    with no_progress_bars():
        model.save_pretrained(out)
    wrapped.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # the library writes it for the owner alone; a service may be another user
