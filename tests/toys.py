"""A toy lambda rule and a toy source: each is one class here and one row of its table."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from knnlm.errors import InvalidRequest
from knnlm.evidence import Evidence, Step
from knnlm.messages import LmStatistics
from knnlm.options import option
from knnlm.rules import RULES, Observed, Parameters, Weighing, Weights
from knnlm.sources import SOURCES, Plan, Services

LEVEL, COUNTS = "level", "counts"


class Level:
    """High where the LM is unsure and a neighbor is near."""

    statistics = True
    features: Sequence[str] = ("nearest",)

    def weights(self, evidence: Evidence, lm: LmStatistics | None, parameters: Parameters) -> Weights:
        if lm is None:
            raise TypeError("statistics were asked for")
        near = np.exp(-evidence.features["nearest"] / np.asarray(parameters["scale"]))
        weights: Weights = np.asarray(parameters["most"]) * near * lm.entropy / (1 + lm.entropy)
        return weights

    def fit(self, observed: Observed) -> Parameters:
        present = observed.evidence.present
        return {"most": 0.5, "scale": float(np.median(observed.evidence.features["nearest"][present])) or 1.0}


@pytest.fixture
def level() -> Iterator[None]:
    RULES[LEVEL] = Level()
    yield
    del RULES[LEVEL]


@dataclass(frozen=True)
class CountOptions:
    lmbda: float = option(float, "Weight of the text's own tokens.", 0.2, minimum=0)

    def __post_init__(self) -> None:
        if not self.lmbda <= 1:
            raise InvalidRequest(f"lambda must lie in [0, 1], got {self.lmbda}", param="lambda")


@dataclass(frozen=True)
class CountSource:
    """How often each token stood earlier in the same text. What it has counted is kept from stretch to stretch."""

    weighing: Weighing
    vocab_size: int
    name: str = "own text"
    kind: str = COUNTS
    needs_keys: bool = False
    in_order: bool = True
    whole: bool = True
    optional: bool = False
    seen: list[tuple[int, int]] = field(default_factory=list)

    async def evidence(self, step: Step) -> Evidence:
        rows = []
        for stretch in step.stretches:
            counted, counts = stretch.state.get(self.name, (0, np.zeros(self.vocab_size)))
            self.seen.append((counted, int(stretch.predicted[0])))
            for place in stretch.predicted.tolist():
                counts = counts.copy()
                np.add.at(counts, stretch.text[counted:place], 1)
                counted = place
                rows.append(counts)
            stretch.state[self.name] = (counted, counts)
        with np.errstate(divide="ignore"):
            whole = np.log(np.stack(rows)) - np.log([[row.sum()] for row in rows])
        present = np.ones(len(rows), np.bool_)
        return Evidence(present, whole if step.targets is None else whole[np.arange(len(rows)), step.targets])


class Counts:
    options = CountOptions

    def optional(self, options: CountOptions) -> bool:
        del options
        return False

    async def resolve(self, options: CountOptions, services: Services) -> Plan:
        weighing = Weighing("fixed", {"lambda": options.lmbda}, asked=True)
        return Plan((CountSource(weighing, services.info.vocab_size),))


KIND = Counts()


@pytest.fixture
def counts() -> Iterator[None]:
    SOURCES[COUNTS] = "tests.toys:KIND"
    yield
    del SOURCES[COUNTS]
