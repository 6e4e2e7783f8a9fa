"""What experiments cost before they run: steps, tokens, time, disk. Pure; at full scale it needs no text to say so."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from experiments.experiment import Experiment, Need
from experiments.lab import Learner
from experiments.memories import MLP_EPOCHS, MLP_RATE, TARGET_RATE, Memory
from experiments.scale import Scale
from experiments.texts import WIKITEXT, Corpus, Texts

__all__ = ["NOMINAL", "Step", "steps", "table"]

NOMINAL = Texts(
    "WikiText-103 and two domains",
    tuple(Corpus(name, (), (), (), "") for name in ("recipes", "peps")),
    Corpus(WIKITEXT, (), (), (), ""),
)  # what a plan is made for where there is no text
NEIGHBOR_BYTES = 12  # distance, value and id
VALUE_BYTES = 4
TARGET_BYTES = 400  # of an entry, about
ADAM_BYTES = 16  # of a parameter: weight, gradient and two moments in float32
WEIGHT_BYTES = 4  # bytes of a parameter, where a model only reads
LOGIT_BYTES = 10  # bytes of one logit of one token of a pass: in bfloat16, in float32, and its gradient
ACTIVATION_BYTES = 34  # bytes for each dimension, layer and token of a pass (Korthikanti et al. 2022, arXiv 2205.05198)
READ_ROWS = 256  # positions whose logits are held at once


@dataclass(frozen=True)
class Step:
    """need: what is made, None for an experiment's own work. seconds, disk, memory (bytes): reckoned."""

    what: str
    seconds: float
    disk: float
    memory: float
    need: Need | None = None


def steps(experiments: Sequence[tuple[str, Experiment]], texts: Texts, scale: Scale) -> list[Step]:
    """All that these experiments ask for, each thing once, in order; then what they do themselves."""
    found: list[Step] = []
    done: set[object] = set()
    for name, experiment in experiments:
        for need in experiment.needs(texts, scale):
            found += [step for key, step in _made(need, scale) if key not in done and not done.add(key)]  # type: ignore[func-returns-value]
        if own := experiment.made(scale):
            found.append(Step(f"run {name}", own, 0, 0))
    return found


def table(planned: Iterable[Step], scale: Scale) -> str:
    """A line for each step and one of the sums, to be read by people."""
    lines, seconds, disk, memory = [], 0.0, 0.0, 0.0
    for number, step in enumerate(planned, start=1):
        lines.append(f"{number:3}  {step.what:<66} {_duration(step.seconds):>9} {step.disk / 1e9:>8.2f} GB disk")
        seconds, disk, memory = seconds + step.seconds, disk + step.disk, max(memory, step.memory)
    return "\n".join([
        *lines,
        f"in all {_duration(seconds)}, {disk / 1e9:.2f} GB of disk, {memory / 1e9:.2f} GB of memory at most, "
        f"on {scale.machine}; model {scale.model or 'the bundled one'} ({scale.base_parameters / 1e6:,.0f}M "
        f"parameters, keys of {scale.key_dim:,}, vocabulary {scale.vocabulary:,}), {scale.store_tokens:,} entries "
        f"each, windows {scale.context}/{scale.min_context}, k {scale.k}",
    ])  # fmt: skip


def _made(need: Need, scale: Scale) -> list[tuple[object, Step]]:
    if isinstance(need, Learner):
        return [_trained(need, scale)] if need.corpus is not None else []
    if isinstance(need, Memory):
        return _remembered(need, scale)
    size = scale.store_tokens
    step = scale.min_context if scale.min_context else scale.context
    reread = scale.context / (scale.context - min(step, scale.context // 2))  # tokens read for each that is predicted
    held = scale.tune_tokens + (scale.long_tokens if need.long else scale.report_tokens)
    k = need.k or scale.k
    whose = f"{need.learner.name}, {need.corpus}, {need.key_function}"
    held_out = "long stretches of held-out text" if need.long else "held-out text"
    reading = WEIGHT_BYTES * (scale.base_parameters + READ_ROWS * scale.vocabulary)
    searched = 4 * size * scale.key_dim if scale.index == "flat" else size * 80
    store = Step(
        f"build the datastore of {whose}: {size:,} entries", size * reread / scale.read_rate,
        size * (2 * scale.key_dim + VALUE_BYTES), max(reading, searched),
    )  # fmt: skip
    read = Step(
        f"read {held_out} of {whose}: {held:,} tokens", held * reread / scale.read_rate, held * 4 * scale.key_dim,
        reading,
    )  # fmt: skip
    share = f", {need.share:g} of the documents in order {need.draw}" if need.share < 1 else ""
    search = Step(
        f"search and fit {held_out} of {whose}, k {k}{share}: {held:,} queries", held * need.share / scale.search_rate,
        held * k * NEIGHBOR_BYTES, held * k * 2 * NEIGHBOR_BYTES, need,
    )  # fmt: skip
    trained = [_trained(need.learner, scale)] if need.learner.corpus is not None else []
    place = (need.learner, need.corpus, need.key_function)
    return [*trained, (("store", place), store), (("read", place, need.long), read), (need, search)]


def _remembered(memory: Memory, scale: Scale) -> list[tuple[object, Step]]:
    size = scale.store_tokens
    targets = Step(
        f"make targets of {memory.corpus}, {memory.teacher.name}: {size:,} entries",
        size / (TARGET_RATE * scale.search_rate), size * TARGET_BYTES, size * TARGET_BYTES,
    )  # fmt: skip
    tokens = round(scale.epochs * size * (MLP_EPOCHS if memory.mlp else 1))
    trained = Step(
        f"train memory {memory.name}: {tokens:,} tokens",
        tokens / scale.trained_rate / (MLP_RATE if memory.mlp else 1), 2 * scale.base_parameters, _training(scale),
        memory,
    )  # fmt: skip
    return [*([(("targets", memory.teacher, memory.corpus), targets)] if memory.beta else []), (memory, trained)]


def _trained(learner: Learner, scale: Scale) -> tuple[object, Step]:
    epochs = scale.epochs if learner.epochs is None else learner.epochs
    tokens = round(epochs * learner.share * scale.store_tokens)
    return learner, Step(
        f"train {learner.name}: {tokens:,} tokens",
        tokens / scale.trained_rate,
        2 * scale.base_parameters,
        _training(scale),
        learner,
    )


def _training(scale: Scale) -> float:
    """Bytes of training one model of the base's size."""
    of_token = LOGIT_BYTES * scale.vocabulary + ACTIVATION_BYTES * scale.layers * scale.key_dim
    return ADAM_BYTES * scale.base_parameters + min(scale.batch_tokens, scale.pass_tokens) * of_token


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.0f} h"
