"""The memories of the experiments: targets and training on what the lab has, made once and kept; mixed and compared.

A memory is trained on the entries of one corpus, with the keys that one model, its teacher, made of them. It can be
mixed with any model of the same tokenizer; an MLP only with its teacher.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.lab import BASE, Lab, Learner, mixed
from experiments.models import config_of
from knnlm.datastore.manifest import Manifest
from knnlm.evaluation.memory_targets import build_targets
from knnlm.evaluation.memory_training import train_memory
from knnlm.evaluation.splits import Part
from knnlm.lm.distillation import DistilSettings
from knnlm.lm.model import LanguageModel
from knnlm.memory.served import open_mlp
from knnlm.rules import best_lambda

__all__ = ["MLP_EPOCHS", "MLP_RATE", "TARGET_RATE", "Beside", "Memory", "beside", "folder", "share"]

Floats = npt.NDArray[np.float64]

KL_WEIGHT = 0.5  # of the paper: beta
MLP_EPOCHS = 4.0  # times those of a decoder: it starts from nothing, and is cheap
TARGET_RATE = 0.5  # of a plan: targets/s over the scale's searches/s; each is searched for among all
MLP_RATE = 4.0  # of a plan: entries/s of training an MLP over tokens/s of training a decoder


@dataclass(frozen=True)
class Memory:
    """A memory of `corpus`. teacher: whose keys its targets come from. beta: their weight in the loss; 0 learns from
    the text alone, as continued training does. layers, width: 0 starts as the base; else that size, from scratch. mlp:
    a net that reads the teacher's keys."""

    corpus: str
    teacher: Learner = BASE
    beta: float = KL_WEIGHT
    layers: int = 0
    width: int = 0
    mlp: bool = False

    @property
    def name(self) -> str:
        """Distinct for distinct memories; a folder's name."""
        parts = [self.corpus.replace(" ", "-"), f"b{self.beta:g}"]
        parts += [f"of-{self.teacher.name}"] if self.beta and self.teacher != BASE else []
        parts += [f"{self.layers}x{self.width}"] if self.layers else []
        return "-".join([*parts, *(["mlp"] if self.mlp else [])])


@dataclass(frozen=True)
class Beside:
    """A memory beside a model. tune, report: (n,) log-probabilities of it alone; weight: the best one on the former;
    mixed: (n,) of the mixture on the latter."""

    tune: Floats
    report: Floats
    weight: float
    mixed: Floats


def beside(lab: Lab, memory: Memory, base: Learner = BASE) -> Beside:
    """A memory, trained where it is not there, mixed with `base`: the weight is fitted between 0 and 0.99."""
    folder(lab, memory)
    tune, report = (_log_probs(lab, memory, part) for part in (Part.TUNE, Part.REPORT))
    lm_tune, lm = (lab.held(base, memory.corpus, p).lm_log_probs.astype(np.float64) for p in (Part.TUNE, Part.REPORT))
    weight = best_lambda(lm_tune, tune)
    return Beside(tune, report, weight, mixed(lm, report, weight))


def folder(lab: Lab, memory: Memory) -> Path:
    """Its folder, trained where it is not there."""
    out = lab.folder / "memories" / memory.name
    scale = lab.scale
    version = lab.store(memory.teacher, memory.corpus)
    targets = _targets(lab, memory.teacher, memory.corpus) if memory.beta else None
    if out.exists():
        lab.use(memory, out)
        return out
    lab.say(f"training memory {memory.name}")
    epochs = scale.epochs * (MLP_EPOCHS if memory.mlp else 1.0)
    steps = max(1, round(epochs * Manifest.load(version).live_entries / scale.batch_tokens))
    settings = DistilSettings(
        steps=steps, beta=memory.beta, batch_entries=scale.batch_tokens, pass_tokens=scale.pass_tokens,
        learning_rate=scale.learning_rate, warmup_steps=steps // 10, evaluate_steps=max(1, steps // 4),
    )  # fmt: skip
    start = None
    if memory.layers:
        sized = Learner(memory.corpus, layers=memory.layers, width=memory.width)
        start = str(config_of(lab.base, sized, lab.folder / "memories" / f"{memory.name}.config"))
    begun = time.monotonic()

    def told(step: int, *_rest: object) -> None:
        if step % 20 == 0:
            lab.say(f"  step {step} of {steps}, {(time.monotonic() - begun) / step * (steps - step):.0f} s left")

    made = train_memory(
        version.parent.parent, version.parent.name, lab.texts.named(memory.corpus).tune,
        str(lab.weights(memory.teacher)), out, settings, kind="mlp" if memory.mlp else "decoder", targets=targets,
        start=start, max_tokens=scale.tune_tokens, on_step=told, save_seconds=30.0,
    )  # fmt: skip
    lab.took(out, made.seconds)
    lab.use(memory, out)
    return out


def share(lm: Floats, knn: Floats, found: Floats) -> float | None:
    """R, the share of retrieval's gain in nats that `found` has, all (n,) log-probabilities; None without a gain."""
    gain = float((knn - lm).mean())
    return float((found - lm).mean()) / gain if gain > 0 else None


def _targets(lab: Lab, teacher: Learner, corpus: str) -> Path:
    version = lab.store(teacher, corpus)
    out = lab.folder / "memories" / f"{corpus.replace(' ', '-')}-{teacher.name}.targets"
    if not out.exists():
        begun = time.monotonic()
        lab.say(f"making targets {out.name}")
        ks = [min(lab.scale.k, Manifest.load(version).live_entries)]
        build_targets(
            version.parent.parent, version.parent.name, str(lab.weights(teacher)), out, exclude="document", ks=ks,
            max_tokens=lab.scale.tune_tokens,
        )  # fmt: skip
        lab.took(out, time.monotonic() - begun)
    lab.note(out)
    return out


def _log_probs(lab: Lab, memory: Memory, part: Part) -> Floats:
    """(n,) of the held-out tokens of a part, of the memory alone."""
    if not memory.mlp:
        name = f"memory-{memory.name}"
        held = lab.held_by(name, lambda: LanguageModel.load(str(folder(lab, memory))), memory.corpus, part)
        return held.lm_log_probs.astype(np.float64)
    held = lab.held(memory.teacher, memory.corpus, part)
    net = open_mlp(folder(lab, memory)).net
    return net.target_log_probs(held.queries, held.targets).astype(np.float64)
