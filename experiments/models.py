"""The language models of the experiments: the base as it is, the base trained further on a corpus, or one from scratch.

All have the base's tokenizer and context, so that their probabilities of one text can be compared and mixed. What is
trained is kept; a run that was stopped continues, and gives the same bits on one machine.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from experiments.scale import Scale
from knnlm.datastore.files import write_atomic
from knnlm.lm import loading
from knnlm.lm.optimizing import adamw, claim, mixed_precision, optimize
from knnlm.lm.students import DecoderStudent
from knnlm.lm.training_data import windows

__all__ = ["BASE", "LOG", "Learner", "config_of", "train"]

LOG = "training.json"
WARM_SHARE = 0.1  # of the steps, in which the learning rate rises
SCRATCH_RATE = 2.0  # times the learning rate of training further: weights that are drawn have further to go
HEAD_WIDTH = 64


@dataclass(frozen=True)
class Learner:
    """A language model. corpus: what it is trained on, None is the base as it is. epochs: None is the scale's.

    share, draw: of the corpus' documents to store, as of a Sight. layers, width: 0 is the base, trained further; else
    a model of that size from scratch.
    """

    corpus: str | None = None
    epochs: float | None = None
    share: float = 1.0
    draw: int = 0
    layers: int = 0
    width: int = 0
    seed: int = 0

    @property
    def name(self) -> str:
        """Distinct for distinct models; a folder's name."""
        if self.corpus is None and not self.layers:
            return "base"
        parts = [(self.corpus or "none").replace(" ", "-")]
        parts += [f"e{self.epochs:g}"] if self.epochs is not None else []
        parts += [f"{self.share:g}of{self.draw}"] if self.share < 1 else []
        parts += [f"{self.layers}x{self.width}"] if self.layers else []
        return "-".join([*parts, *([f"s{self.seed}"] if self.seed else [])])


BASE = Learner()

Progress = Callable[[int, int], None]


def train(
    learner: Learner,
    base: Path,
    documents: Sequence[npt.NDArray[np.int32]],
    out: Path,
    scale: Scale,
    vocab_size: int,
    on_progress: Progress,
) -> None:
    """Write the model as a Hugging Face folder `out`, in float16, and beside it LOG: losses in nats by step.

    base: the folder of the base, which has vocab_size logits. documents: their tokens, each behind its BOS.
    on_progress hears (steps done, steps).
    """
    epochs = scale.epochs if learner.epochs is None else learner.epochs
    stream = np.concatenate(documents)
    context = min(scale.context, (len(stream) - 1) // 2)
    rows = max(1, scale.batch_tokens // context)
    passed = max(1, scale.pass_tokens // context)
    steps = max(1, round(epochs * len(stream) / (rows * context)))
    peak = scale.learning_rate * (SCRATCH_RATE if learner.layers else 1.0)
    work = out.with_name(out.name + ".work")
    claim(work, {"learner": learner.name, "steps": steps, "tokens": len(stream), "rate": peak})
    device = loading.pick_device("auto")
    start = str(config_of(base, learner, work)) if learner.layers else str(base)
    student = DecoderStudent.load(
        start, str(base), device, context_length=context, vocab_size=vocab_size, seed=learner.seed
    )
    offsets = np.arange(context + 1)
    batches = enumerate(windows(len(stream), context, rows, learner.seed))
    losses: list[float] = []
    notes: dict[str, list[float]] = {"losses": losses}

    def loss(step: int) -> Iterator[torch.Tensor]:
        starts = next(starts for number, starts in batches if number == step)
        for part in np.split(starts, range(passed, len(starts), passed)):
            ids = torch.from_numpy(stream[part[:, None] + offsets].astype(np.int64)).to(device)  # (.., context + 1)
            with mixed_precision(device):
                logits = student.module(input_ids=ids[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())
            yield loss * (len(part) / len(starts))

    def rate(step: int) -> float:
        warm = (step + 1) / max(1.0, WARM_SHARE * steps)
        return peak * min(1.0, warm, (steps - step) / max(1.0, (1 - WARM_SHARE) * steps))

    def told(step: int, found: float, _seconds: float) -> None:
        notes["losses"].append(found)
        on_progress(step, steps)

    torch.manual_seed(learner.seed)
    seconds = optimize(
        student.module, adamw(student.module, 0.1), work, steps=steps, rate=rate, losses=loss, notes=notes,
        on_step=told, save_seconds=30.0,
    )  # fmt: skip
    made = work / "model"
    made.mkdir(exist_ok=True)
    student.module.eval()
    student.save(made)
    log = {"losses": notes["losses"], "steps": steps, "tokens": len(stream), "epochs": epochs, "seconds": seconds,
           "parameters": student.parameters}  # fmt: skip
    write_atomic(made / LOG, (json.dumps(log) + "\n").encode())
    made.rename(out)
    shutil.rmtree(work)


def config_of(base: Path, learner: Learner, folder: Path) -> Path:
    """The base's config with other sizes. Raises SystemExit for an architecture whose sizes have other names."""
    config = json.loads((base / "config.json").read_text())
    sizes = {
        "num_hidden_layers": learner.layers,
        "hidden_size": learner.width,
        "intermediate_size": max(32, learner.width * 11 // 4 // 32 * 32),
        "num_attention_heads": max(1, learner.width // HEAD_WIDTH),
        "num_key_value_heads": max(1, learner.width // HEAD_WIDTH),
        "head_dim": min(HEAD_WIDTH, learner.width),
    }
    if missing := sorted(sizes.keys() - config.keys()):
        raise SystemExit(f"models of other sizes need a base whose config.json has {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "config.json"
    path.write_text(json.dumps(config | sizes))
    return path
