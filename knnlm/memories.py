"""Memory Decoders as sources of a mixture: language models that have learnt what retrieval would answer (Cao et al.
2025, arXiv 2508.09874). A memory reads the tokens that the LM reads, and their next-token distributions are mixed."""

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from knnlm.errors import (
    DatastoreMismatch,
    InvalidRequest,
    KnnlmError,
    TooLarge,
    Unavailable,
    UnknownModel,
    UnknownVersion,
)
from knnlm.evidence import Evidence, Step, Stretch
from knnlm.messages import DomainInfo, ForwardRequest, ForwardResult, ModelInfo, TrainedMemory, required
from knnlm.options import MemoryOptions
from knnlm.protocols import LanguageModelClient
from knnlm.rules import FIXED, Weighing
from knnlm.sources import Plan, Services, UsedMemory, computed

MLP_FILE = "mlp.safetensors"  # in the folder of an MLP memory
MLP_EPSILON = 1e-6  # added to mean squares in it before their root
ALIKE = ("tokenizer_sha256", "bos_token_id")  # what a memory must share with the LM, by the names of ModelInfo's fields


@dataclass(frozen=True)
class MemorySource:
    """A memory that runs as a language model of its own. info: what it said it is when the plan was made.

    vocab_size: of the LM. Models of one tokenizer may have outputs of different widths, padded for their hardware: a
    memory's tokens beyond the LM's have no part in its distribution, and those that it lacks have probability zero.
    """

    name: str
    client: LanguageModelClient
    info: ModelInfo
    vocab_size: int
    weighing: Weighing
    optional: bool
    kind: str = "memory"
    needs_keys: bool = False
    in_order: bool = False
    whole: bool = True

    async def evidence(self, step: Step) -> Evidence:
        """See knnlm.sources.Source."""
        fed = [_fed(stretch) for stretch in step.stretches]
        self._check(fed)
        positions = [_positions(stretch) for stretch in step.stretches]
        n, beyond = sum(map(len, positions)), np.arange(self.vocab_size, self.info.vocab_size, dtype=np.int32)
        present = np.ones(n, np.bool_)
        if step.targets is None:
            result = await self._forward(ForwardRequest(fed, positions, full=True, cache=step.cache))
            log_probs = required(result.log_probs)
            return Evidence(present, await computed(log_probs.size, aligned, log_probs, self.vocab_size))
        request = ForwardRequest(fed, positions, targets=step.targets, candidates=[beyond] * n if len(beyond) else None)
        result = await self._forward(request)
        targets = required(result.target_log_probs).astype(np.float64)
        if len(beyond):
            outside = required(result.candidate_log_probs).astype(np.float64).reshape(n, len(beyond))
            targets = targets - _log_rest(np.logaddexp.reduce(outside, axis=1))
        return Evidence(present, targets)

    def _check(self, fed: Sequence[npt.NDArray[np.int32]]) -> None:
        longest = max(map(len, fed), default=0)
        if longest > self.info.context_length:
            raise TooLarge(
                f"memory {self.name} takes {self.info.context_length} tokens, the model was given {longest}",
                param="text",
            )
        largest = max((int(tokens.max(initial=0)) for tokens in fed), default=0)
        if largest >= self.info.vocab_size:
            raise InvalidRequest(
                f"token {largest} is outside the vocabulary of memory {self.name}, {self.info.vocab_size}",
                param="tokens",
            )

    async def _forward(self, request: ForwardRequest) -> ForwardResult:
        with _named(self.name):
            result = await self.client.forward(request)
        if result.fingerprint != self.info.fingerprint:
            raise UnknownVersion(
                f"memory {self.name} answers as another model (fingerprint {result.fingerprint}) than it was when this "
                f"call began ({self.info.fingerprint})",
                param="memory.name",
            )
        return result


def aligned(log_probs: npt.NDArray[np.floating], vocab_size: int) -> npt.NDArray[np.float64]:
    """(n, vocab_size) float64: distributions (n, V) over the first tokens alone, or with zeros for what they lack."""
    result = log_probs[:, :vocab_size].astype(np.float64)
    lacking = vocab_size - result.shape[1]
    if lacking:
        return np.pad(result, ((0, 0), (0, lacking)), constant_values=-np.inf)
    if log_probs.shape[1] > vocab_size:
        result -= np.logaddexp.reduce(result, axis=1, keepdims=True)
    return result


def _log_rest(log_mass: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """log(1 - exp(log_mass)), as far as float32 tells a mass from one."""
    rest: npt.NDArray[np.float64] = np.log1p(-np.minimum(np.exp(log_mass), 1 - np.finfo(np.float32).eps))
    return rest


def _fed(stretch: Stretch) -> npt.NDArray[np.int32]:
    """What the LM was fed of a stretch."""
    fed = stretch.text[stretch.start : int(stretch.predicted[-1]) + 1]
    return fed if stretch.bos is None else np.concatenate([np.array([stretch.bos], np.int32), fed])


def _positions(stretch: Stretch) -> npt.NDArray[np.int32]:
    """(m,) positions in what was fed whose next token is predicted."""
    positions: npt.NDArray[np.int32] = (stretch.predicted - 1 - stretch.start + (stretch.bos is not None)).astype(
        np.int32
    )
    return positions


def check_fits(name: str, memory: "ModelInfo | KeyMemory", model: ModelInfo) -> None:
    """Raises DatastoreMismatch, with both values, for a memory that cannot be mixed with this language model: a decoder
    that reads other tokens, an MLP that reads the keys of another model."""
    if isinstance(memory, KeyMemory):
        if memory.key_fingerprint != model.fingerprint or memory.net.vocab_size != model.vocab_size:
            raise DatastoreMismatch(
                f"memory {name} reads keys of model {memory.key_fingerprint} with {memory.net.vocab_size} tokens, the "
                f"language model is {model.fingerprint} with {model.vocab_size} ({model.model_id})",
                param="memory.name",
            )
        return
    for field in ALIKE:
        theirs, ours = getattr(memory, field), getattr(model, field)
        if theirs != ours:
            raise DatastoreMismatch(
                f"memory {name} has {field} {theirs} (model {memory.model_id}), the language model has {ours} "
                f"(model {model.model_id}): both must read the same tokens",
                param="memory.name",
            )


def stale(trained: TrainedMemory | None, domains: Sequence[DomainInfo]) -> str | None:
    """Why a memory does not say what its domain says now; None where it does, or that is not known."""
    now = None if trained is None else next((d for d in domains if d.domain == trained.domain), None)
    if trained is None or now is None or now.version == trained.version:
        return None
    return (
        f"trained on {trained.domain} {trained.version} ({trained.entries:,} entries), which answers from "
        f"{now.version} now ({now.entries:,}); what was removed since is not unlearnt"
    )


class KeyNet(Protocol):
    """What computes an MLP memory, as knnlm.memory.mlp.Mlp. Called on several threads."""

    @property
    def vocab_size(self) -> int: ...
    def log_probs(self, keys: npt.NDArray[np.floating]) -> npt.NDArray[np.float32]:
        """(n, V) of keys (n, d). Raises InvalidRequest for keys of another dimension."""
        ...

    def target_log_probs(
        self, keys: npt.NDArray[np.floating], targets: npt.NDArray[np.integer]
    ) -> npt.NDArray[np.float32]:
        """(n,) of one token for each of keys (n, d). Raises as log_probs."""
        ...


@dataclass(frozen=True)
class KeyMemory:
    """An MLP memory, which reads the keys that the LM has computed, in this process. model_id: its folder.
    fingerprint: 16 hexadecimal digits of its weights. key_fingerprint: of the one model whose keys it reads."""

    net: KeyNet
    model_id: str
    fingerprint: str
    key_fingerprint: str
    trained: TrainedMemory


@dataclass(frozen=True)
class KeyMemorySource:
    """An MLP memory, asked about the keys of each prediction."""

    name: str
    net: KeyNet
    weighing: Weighing
    optional: bool
    kind: str = "memory"
    needs_keys: bool = True
    in_order: bool = False
    whole: bool = True

    async def evidence(self, step: Step) -> Evidence:
        """See knnlm.sources.Source."""
        if step.keys is None:
            raise Unavailable("the language model service did not answer with the keys it was asked for")
        if step.targets is None:
            log_probs = await asyncio.to_thread(self.net.log_probs, step.keys)
        else:
            log_probs = await asyncio.to_thread(self.net.target_log_probs, step.keys, step.targets)
        return Evidence(np.ones(len(step.keys), np.bool_), log_probs.astype(np.float64))


class MemoryKind:
    """A memory, as a kind of source."""

    options = MemoryOptions

    def optional(self, options: MemoryOptions) -> bool:
        return options.on_memory_error == "lm_only"

    async def resolve(self, options: MemoryOptions, services: Services) -> Plan:
        """The memory with its weight, as it is now; see knnlm.sources.SourceKind. One of weight 0 is not asked."""
        name = options.name or ""
        memory = _known(name, services.memories)
        if options.lmbda == 0:
            return Plan(memories=(UsedMemory(name, 0.0),))
        if isinstance(memory, KeyMemory):
            check_fits(name, memory, services.info)
            used = UsedMemory(name, _weight(options, memory.trained), memory.model_id, memory.fingerprint)
            key_source = KeyMemorySource(name, memory.net, _weighing(options, used), self.optional(options))
            return Plan((key_source,), memories=(used,))
        with _named(name):
            info = await memory.get_model()
        check_fits(name, info, services.info)
        used = UsedMemory(name, _weight(options, info.memory), info.model_id, info.fingerprint)
        size, weighing = services.info.vocab_size, _weighing(options, used)
        source = MemorySource(name, memory, info, size, weighing, self.optional(options))
        return Plan((source,), pinned=False, memories=(used,), context_length=info.context_length)


def _weight(options: MemoryOptions, trained: TrainedMemory | None) -> float:
    """The weight that was asked for, else the fitted one."""
    if options.lmbda is not None:
        return options.lmbda
    if trained is None:
        raise InvalidRequest(f"memory {options.name} has no fitted weight: give lambda", param="memory.lambda")
    return trained.lmbda


def _weighing(options: MemoryOptions, used: UsedMemory) -> Weighing:
    return Weighing(FIXED, {"lambda": used.lmbda}, asked=options.lmbda is not None)


MEMORY = MemoryKind()


def _known(name: str, memories: Mapping[str, LanguageModelClient | KeyMemory]) -> LanguageModelClient | KeyMemory:
    if name not in memories:
        known = ", ".join(sorted(memories)) or "none"
        raise UnknownModel(f"unknown memory {name!r:.200}; known: {known}", param="memory.name")
    return memories[name]


@contextmanager
def _named(name: str) -> Iterator[None]:
    """Errors of a memory's service say whose they are."""
    try:
        yield
    except KnnlmError as err:
        err.message = f"memory {name}: {err.message}"
        err.args = (err.message,)
        raise
