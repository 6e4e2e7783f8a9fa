"""Training a memory: soft labels (soft_labels.py) for a student (students.py), with the loop of optimizing.py.

What is served is the mixture with the language model, so it is the mixture's loss on held-out documents that chooses
among the weights that a run passes through: the memory's own loss goes on falling long after, or rises long before.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from knnlm.errors import InvalidRequest
from knnlm.lm.optimizing import adamw, mixed_precision, optimize
from knnlm.lm.requests import Feed, batches
from knnlm.lm.soft_labels import SoftLabels
from knnlm.lm.students import Float32, Student
from knnlm.mixture import Component, mix
from knnlm.rules import best_lambda

BEST = "best.safetensors"
CHUNK_BYTES = 256 << 20  # of float32 logits that are held for the gradient at a time


@dataclass(frozen=True)
class DistilSettings:
    """What fixes a run. beta: weight of KL(p_kNN || p_memory), the rest is that of the tokens that came. batch_entries:
    entries of one step, at least; a step takes whole windows. pass_tokens: tokens of one pass, padding included, of
    which a step takes several. evaluate_steps: after how many steps the mixture is tried, besides at the end."""

    steps: int
    beta: float = 0.5
    batch_entries: int = 8192
    pass_tokens: int = 8192
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    weight_decay: float = 0.0
    evaluate_steps: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("steps", "batch_entries", "pass_tokens", "evaluate_steps"):
            if getattr(self, name) < 1:
                raise InvalidRequest(f"{name} must be at least 1, got {getattr(self, name)}", param=name)
        for name, least, most in (("beta", 0, 1), ("warmup_steps", 0, math.inf), ("weight_decay", 0, math.inf)):
            if not least <= getattr(self, name) <= most:
                raise InvalidRequest(f"{name} must lie in [{least}, {most}], got {getattr(self, name)}", param=name)
        if not 0 < self.learning_rate < math.inf:
            raise InvalidRequest(f"learning_rate must be > 0, got {self.learning_rate}", param="learning_rate")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0: it rises over warmup_steps, then falls to zero in a line."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        left = (self.steps - step) / max(self.steps - self.warmup_steps, 1)
        return self.learning_rate * min(warm, left)


@dataclass(frozen=True)
class Batch:
    """What one step learns. feeds: windows; their positions are n rows. keys: (n, d), None where tokens are read."""

    feeds: Sequence[Feed]
    labels: SoftLabels
    keys: Float32 | None


@dataclass(frozen=True)
class Held:
    """Held-out text, by which weights are chosen. targets: (n,). lm_log_probs: (n,) of these."""

    feeds: Sequence[Feed]
    keys: Float32 | None
    targets: npt.NDArray[np.int32]
    lm_log_probs: npt.NDArray[np.floating]


@dataclass(frozen=True)
class Tried:
    """What the weights after `step` steps give on held-out text. Losses in nats per token; the mixture's at the best
    lambda, the weight of the memory. excess: of the training loss since the last time, above its floor."""

    step: int
    memory_loss: float
    mixture_loss: float
    lmbda: float
    train_loss: float = math.nan
    excess: float = math.nan


Told = Callable[[int, float, float, Tried | None], None]


def distil(
    student: Student,
    data: Callable[[], Iterator[Batch]],
    held: Held,
    settings: DistilSettings,
    work: Path,
    *,
    on_step: Told,
    save_seconds: float,
) -> tuple[list[Tried], float]:
    """Train the student in place, from the state in `work` if there is one, and leave it with the weights whose mixture
    was best on `held`. Returns what was tried, and the seconds spent.

    data: the steps' batches, from the first one and without end, the same each time. on_step(steps done, loss, its
    excess above the floor, what was tried after it).
    """
    stream = enumerate(data())
    notes: dict[str, Any] = {"tried": [], "since": [0, 0.0, 0.0]}  # since: steps, losses and excesses
    floor = 0.0
    constant = 0.0

    def losses(step: int) -> Iterator[Tensor]:
        nonlocal floor, constant
        batch = next(batch for number, batch in stream if number == step)
        floor, constant = float(batch.labels.floor.mean()), float(batch.labels.constant.mean())
        yield from _losses(student, batch, settings.pass_tokens)

    def told(step: int, cross_entropy: float, seconds: float) -> None:
        del seconds
        loss = cross_entropy - constant
        steps, total, above = notes["since"]
        notes["since"] = [steps + 1, total + loss, above + loss - floor]
        found = None
        if step % settings.evaluate_steps == 0 or step == settings.steps:
            steps, total, above = notes["since"]
            found = tried(student, held, settings.pass_tokens, step, total / steps, above / steps)
            if found.mixture_loss < min((row["mixture_loss"] for row in notes["tried"]), default=math.inf):
                _keep(student, work)
            notes["tried"].append(vars(found))
            notes["since"] = [0, 0.0, 0.0]
        on_step(step, loss, loss - floor, found)

    torch.manual_seed(settings.seed)
    seconds = optimize(
        student.module, adamw(student.module, settings.weight_decay), work, steps=settings.steps, rate=settings.rate,
        losses=losses, notes=notes, on_step=told, save_seconds=save_seconds,
    )  # fmt: skip
    best = load_file(work / BEST)
    with torch.no_grad():
        for name, parameter in student.module.named_parameters():
            parameter.copy_(best[name])
    return [Tried(**row) for row in notes["tried"]], seconds


def tried(
    student: Student, held: Held, pass_tokens: int, step: int, train_loss: float = math.nan, excess: float = math.nan
) -> Tried:
    """What the student gives on held-out text as it is."""
    memory = log_probs(student, held, pass_tokens)
    lmbda = best_lambda(held.lm_log_probs, memory)
    mixed = mix(held.lm_log_probs, [Component("memory", memory, np.full(len(memory), lmbda))])
    return Tried(step, -float(memory.mean()), -float(mixed.mean()), lmbda, train_loss, excess)


def log_probs(student: Student, held: Held, pass_tokens: int) -> npt.NDArray[np.float64]:
    """(n,) of held.targets, in eval mode; the student trains on afterwards."""
    student.module.eval()
    found = np.empty(len(held.targets))
    with torch.no_grad():
        for feeds, rows in _passes(held.feeds, pass_tokens):
            hidden = _hidden(student, feeds, held.keys, rows)
            targets = torch.from_numpy(held.targets[rows].astype(np.int64)).to(student.device)
            for h, target in zip(_chunks(student, hidden), _chunks(student, targets), strict=True):
                with mixed_precision(student.device):
                    logits = student.logits(h)
                own = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
                found[rows[: len(own)]], rows = own.double().cpu().numpy(), rows[len(own) :]
    student.module.train()
    return found


def cross_entropy(logits: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
    """Sum over rows of CE(t, q), with log q = log_softmax(logits (m, V)) looked up at the tokens (m, s) alone."""
    return (logits.logsumexp(1) * weights.sum(1) - (logits.gather(1, tokens) * weights).sum(1)).sum()


def _losses(student: Student, batch: Batch, pass_tokens: int) -> Iterator[Tensor]:
    """Parts of the mean of CE(t, q) over the rows of a batch."""
    n = len(batch.labels.entropy)
    for feeds, rows in _passes(batch.feeds, pass_tokens):
        hidden = _hidden(student, feeds, batch.keys, rows)
        labels = batch.labels.rows(rows)
        tokens = torch.from_numpy(labels.tokens).to(student.device)
        weights = torch.from_numpy(labels.weights.astype(np.float32)).to(student.device)
        parts = list(zip(*(_chunks(student, part) for part in (hidden, tokens, weights)), strict=True))

        def part_loss(h: Tensor, tokens: Tensor, weights: Tensor) -> Tensor:
            with mixed_precision(student.device):
                logits = student.logits(h)
            return cross_entropy(logits, tokens, weights)

        if len(parts) == 1:
            yield part_loss(*parts[0]) / n
        else:  # logits are made again for the gradient: those of one chunk are held at a time
            yield torch.stack([checkpoint(part_loss, *part, use_reentrant=False) for part in parts]).sum() / n


def _hidden(student: Student, feeds: Sequence[Feed], keys: Float32 | None, rows: npt.NDArray[np.int64]) -> Tensor:
    with mixed_precision(student.device):
        return student.hidden(feeds, None if keys is None else keys[rows])


def _passes(feeds: Sequence[Feed], pass_tokens: int) -> Iterator[tuple[list[Feed], npt.NDArray[np.int64]]]:
    """Windows that are fed together, of similar length, and the rows that they answer, in their order."""
    for some in batches(feeds, pass_tokens):
        yield some, np.concatenate([feed.first_row + np.arange(len(feed.positions)) for feed in some])


def _chunks(student: Student, rows: Tensor) -> Sequence[Tensor]:
    return torch.split(rows, max(1, CHUNK_BYTES // (4 * student.vocab_size)))


def _keep(student: Student, work: Path) -> None:
    temporary = work / f"{BEST}.tmp"
    tensors = {name: p.detach().cpu().contiguous() for name, p in student.module.named_parameters()}
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, temporary)
    temporary.replace(work / BEST)
