"""A memory of toys: another model of the same vocabulary, which writes down what it is asked."""

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from knnlm.errors import KnnlmError
from knnlm.messages import ForwardRequest, ForwardResult, ModelInfo
from knnlm.mixer import Mixer
from knnlm.options import MemoryOptions
from knnlm.testing import ToyLanguageModel
from tests.test_mixer import TEXT, TOY, BruteForce, Lm

TOKENS = TOY.tokenizer.encode(TEXT)
CONTEXTS = [TOY.tokenizer.encode(text) for text in ("the cat", "a dog sat on", "x")]
LEARNT = ToyLanguageModel(seed=5)


class Learnt(Lm):
    """A memory that writes down what it is fed. info: what it says it is; down: what it raises."""

    def __init__(self, model: ToyLanguageModel = LEARNT) -> None:
        super().__init__()
        self.model = model
        self.info = model.info
        self.asked: list[ForwardRequest] = []
        self.down: KnnlmError | None = None

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.events.append("forward")
        if self.down is not None:
            raise copy.copy(self.down)
        self.asked.append(request)
        return replace(self.model.forward(request), fingerprint=self.info.fingerprint)

    async def get_model(self) -> ModelInfo:
        self.events.append("get_model")
        if self.down is not None:
            raise copy.copy(self.down)
        return self.info


class Watched(Lm):
    """The LM, writing down what it is fed."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[ForwardRequest] = []

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.asked.append(request)
        return await super().forward(request)


def memory(lmbda: float | None = 0.4, fail: str | None = None, name: str = "law") -> MemoryOptions:
    return MemoryOptions(name, lmbda, fail)


def made(learnt: Learnt, datastore: BruteForce | None = None, lm: Lm | None = None) -> Mixer:
    return Mixer(lm or Lm(), datastore or BruteForce(), TOY.info, memories={"law": learnt})


def after(model: ToyLanguageModel, contexts: Sequence[npt.NDArray[np.int32]]) -> npt.NDArray[np.float64]:
    """(n, V) log-probabilities of the token after each context, of the model alone."""
    positions = [np.array([len(c) - 1], np.int32) for c in contexts]
    log_probs = model.forward(ForwardRequest(contexts, positions, full=True)).log_probs
    assert log_probs is not None
    return log_probs.astype(np.float64)
