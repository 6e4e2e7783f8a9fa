"""Perplexity over documents: the LM alone and the mixture, side by side, with everything a reader needs to repeat it.

A perplexity means nothing without its tokenizer, window policy and token count, so a report carries them; bits per
byte is the figure that may be compared between tokenizers.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from knnlm.cache_source import NAME as CACHE
from knnlm.errors import InvalidRequest
from knnlm.evaluation.collect import LEAK_ALARM, LEAK_SEARCH, find, leak, observe
from knnlm.evaluation.splits import Encoded, sample
from knnlm.mixer import Options
from knnlm.options import MemoryOptions
from knnlm.pipeline import Pipeline
from knnlm.scoring import Score
from knnlm.sources import UsedDomain, UsedMemory

LEAK_TOKENS = 4096  # enough to see a leak of a few percent; the search is done a second time for them


@dataclass(frozen=True)
class DocumentFigures:
    """What one document cost. Nats are sums of negative log-probabilities over `tokens` predicted tokens.

    text_bytes, words: of the predicted text, as UTF-8 and split at white space. improved: tokens that the mixture finds
    likelier than the LM does. knn_nats: of the mixture, None where there is none.
    """

    id: str
    tokens: int
    text_bytes: int
    words: int
    lm_nats: float
    knn_nats: float | None
    improved: int


@dataclass(frozen=True)
class Figures:
    """One model over all documents."""

    perplexity: float
    bits_per_byte: float
    word_perplexity: float


@dataclass(frozen=True)
class Report:
    """context_length, min_context: the window policy, in tokens. leaks: share of coinciding queries, by domain.
    weights: of the components beside the LM by name, on average over the tokens."""

    model_id: str
    tokenizer_sha256: str
    context_length: int
    min_context: int
    documents: tuple[DocumentFigures, ...]
    domains: tuple[UsedDomain, ...] = ()
    leaks: Mapping[str, float] = field(default_factory=dict)
    memories: tuple[UsedMemory, ...] = ()
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def mixture(self) -> str:
        """What the mixture is called."""
        parts = ["kNN-LM" if self.domains else "LM", *(["memory"] if self.memories else [])]
        return " + ".join([*parts, *(["cache"] if CACHE in self.weights else [])])

    @property
    def tokens(self) -> int:
        return sum(d.tokens for d in self.documents)

    @property
    def lm(self) -> Figures:
        return self._figures([d.lm_nats for d in self.documents])

    @property
    def knn(self) -> Figures | None:
        nats = [d.knn_nats for d in self.documents if d.knn_nats is not None]
        return self._figures(nats) if nats else None

    @property
    def improved(self) -> float:
        """Share of the tokens that retrieval made likelier."""
        return sum(d.improved for d in self.documents) / self.tokens

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(
            f"{share:.0%} of the queries coincide with keys of {domain}: these documents are probably in the "
            "datastore, and the perplexity says nothing about new text"
            for domain, share in self.leaks.items()
            if share >= LEAK_ALARM
        )

    def as_json(self) -> dict[str, Any]:  # Any: JSON
        """The whole report, sums included."""
        return {
            "model_id": self.model_id,
            "tokenizer_sha256": self.tokenizer_sha256,
            "context_length": self.context_length,
            "min_context": self.min_context,
            "tokens": self.tokens,
            "text_bytes": sum(d.text_bytes for d in self.documents),
            "words": sum(d.words for d in self.documents),
            "lm": asdict(self.lm),
            "knn": asdict(self.knn) if self.knn else None,
            "improved": self.improved if self.knn else None,
            "domains": [d.as_json() for d in self.domains],
            "memories": [m.as_json() for m in self.memories],
            "weights": dict(self.weights),
            "leaks": dict(self.leaks),
            "warnings": list(self.warnings),
            "documents": [asdict(d) for d in self.documents],
        }

    def _figures(self, nats: Sequence[float]) -> Figures:
        total = math.fsum(nats)
        return Figures(
            perplexity=_exp(total / self.tokens),
            bits_per_byte=total / math.log(2) / max(1, sum(d.text_bytes for d in self.documents)),
            word_perplexity=_exp(total / max(1, sum(d.words for d in self.documents))),
        )


def evaluate(
    pipeline: Pipeline,
    documents: Sequence[Encoded],
    knn: Options = None,
    *,
    memory: MemoryOptions | None = None,
    context_length: int | None = None,
    min_context: int | None = None,
    on_progress: Callable[[int], None] | None = None,
) -> Report:
    """Score every document by itself. knn, memory: as in `Pipeline.score`. context_length, min_context: windows, see
    `choose_windows`; by default those of the first domain. on_progress: called with the tokens done.

    Raises InvalidRequest when there is no document, and what `Pipeline.score` raises.
    """
    if not documents:
        raise InvalidRequest("no document with at least two tokens", param="sources")
    figures = []
    used: Sequence[UsedDomain] = ()
    memories: Sequence[UsedMemory] = ()
    windows = (0, 0)
    weights: dict[str, float] = {}
    done = 0
    for document in documents:
        score = pipeline.score(
            document.tokens, knn, memory=memory, context_length=context_length, min_context=min_context
        )
        figures.append(_figures_of(document, score))
        used, memories, windows = score.domains, score.memories, (score.context_length, score.min_context)
        for share in score.mixed.components:
            weights[share.name] = weights.get(share.name, 0.0) + float(share.weight.sum())
        done += figures[-1].tokens
        if on_progress is not None:
            on_progress(done)
    return Report(
        model_id=pipeline.lm.info.model_id,
        tokenizer_sha256=pipeline.lm.info.tokenizer_sha256,
        context_length=windows[0],
        min_context=windows[1],
        documents=tuple(figures),
        domains=tuple(used),
        leaks=leaks(pipeline, documents, [d.domain for d in used], windows),
        memories=tuple(memories),
        weights={name: weight / done for name, weight in weights.items()},
    )


def leaks(
    pipeline: Pipeline, documents: Sequence[Encoded], domains: Sequence[str], windows: tuple[int, int]
) -> dict[str, float]:
    """The share of queries that coincide with a stored key, by domain, over an even sample of LEAK_TOKENS tokens."""
    if not domains:
        return {}
    lm = pipeline.lm
    few = sample(documents, lm.tokenizer, LEAK_TOKENS)
    opened = [pipeline.searchers[domain].info(()) for domain in domains[:1]]  # whose windows hold for all
    held_out = observe(lm, few, domains=opened, context_length=windows[0], min_context=windows[1])
    shares = {}
    for domain in domains:
        searcher = pipeline.searchers[domain]
        found = find(searcher, domain, held_out, LEAK_SEARCH).neighbors
        shares[domain] = leak(held_out, found, lm.info.dtype, searcher.info(()).model_dtype)
    return shares


def _figures_of(document: Encoded, score: Score) -> DocumentFigures:
    return DocumentFigures(
        id=document.id,
        tokens=len(score.log_probs),
        text_bytes=len(document.text.encode("utf-8", "replace")),
        words=len(document.text.split()),
        lm_nats=-float(score.lm_log_probs.sum(dtype=np.float64)),
        knn_nats=-float(score.log_probs.sum()) if score.mixed.components or score.memories else None,
        improved=int((score.log_probs > score.lm_log_probs).sum()),
    )


def _exp(x: float) -> float:
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf
