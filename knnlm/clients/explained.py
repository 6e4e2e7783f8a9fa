"""An explained text as the aggregator answers it: records of its JSON, and how the library's score becomes them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from knnlm.attribution import Carrier, DocumentShare
from knnlm.clients.answers import UsedDomain, UsedMemory
from knnlm.decoding import Share
from knnlm.generation import NewToken
from knnlm.scoring import Score
from knnlm.tokenizer import Tokenizer
from knnlm.wire.jsonable import finite


@dataclass(frozen=True)
class ExplainedPassage:
    """An entry that stores a token. position: where the token stands in the document, in tokens. distance: squared L2.
    share: its part of what all entries that store the token gave it. after: the token and what followed it."""

    domain: str
    document: str
    position: int
    distance: float
    share: float
    before: str
    after: str


@dataclass(frozen=True)
class ExplainedComponent:
    """One distribution of the mixture at one token: `lm`, or a source's, of its kind. weight: 0 where it found nothing.
    passages: those that gave most first."""

    name: str
    kind: str
    weight: float
    log_p: float | None
    passages: Sequence[ExplainedPassage]


@dataclass(frozen=True)
class ExplainedToken:
    """Natural logarithms; None stands for minus infinity. lmbda: what all components but the LM weighed here.
    components: all that was mixed, the LM first."""

    token_id: int
    token: str
    log_p: float | None
    log_p_lm: float
    lmbda: float
    components: Sequence[ExplainedComponent]

    @property
    def retrieved(self) -> float:
        """The part of p that the components beside the LM gave, in [0, 1]: sum of weight times p of each, over p."""
        log_p = self.log_p
        if log_p is None:
            return 0.0
        others = (c for c in self.components if c.kind != "lm" and c.log_p is not None)
        return min(1.0, math.fsum(c.weight * math.exp(c.log_p - log_p) for c in others if c.log_p is not None))


@dataclass(frozen=True)
class Explained:
    """A text, and where each token's probability comes from. context: what stands before the first token.
    searches_skipped: tokens for which nothing was searched, over all components."""

    model: str
    domains: Sequence[UsedDomain]
    degraded: str | None
    context: str
    tokens: Sequence[ExplainedToken]
    documents: Sequence[DocumentShare]
    total_log_p: float | None
    total_log_p_lm: float
    perplexity: float | None
    perplexity_lm: float
    context_length: int
    min_context: int
    memories: Sequence[UsedMemory] = ()
    searches_skipped: int = 0


def explained(score: Score, model: str, tokenizer: Tokenizer) -> Explained:
    """score: of `Mixer.explain`."""
    pieces, mixed = tokenizer.pieces(score.tokens), score.mixed
    columns = (
        score.tokens[score.first :].tolist(), pieces[score.first :], mixed.log_probs.tolist(),
        mixed.lm_log_probs.tolist(), mixed.weight.tolist(),
    )  # fmt: skip
    tokens = []
    for i, (token, piece, log_p, log_p_lm, weight) in enumerate(zip(*columns, strict=True)):
        lm = ExplainedComponent("lm", "lm", 1 - weight, log_p_lm, [])
        others = [_component(share, i, tokenizer) for share in mixed.components]
        tokens.append(ExplainedToken(token, piece, finite(log_p), log_p_lm, weight, [lm, *others]))
    return Explained(
        model=model,
        domains=[
            UsedDomain(used.domain, used.version, used.k, used.lmbda, used.temperature, used.rule)
            for used in score.domains
        ],
        degraded=score.degraded,
        context="".join(pieces[: score.first]),
        tokens=tokens,
        documents=score.documents,
        total_log_p=finite(score.total),
        total_log_p_lm=score.lm_total,
        perplexity=finite(score.perplexity),
        perplexity_lm=score.lm_perplexity,
        context_length=score.context_length,
        min_context=score.min_context,
        memories=[UsedMemory(used.name, used.lmbda, used.model_id, used.fingerprint) for used in score.memories],
        searches_skipped=sum(int(share.evidence.skipped.sum()) for share in mixed.components),
    )


def explained_token(new: NewToken, tokenizer: Tokenizer) -> ExplainedToken:
    """A token that was generated."""
    parts = new.row.components(new.token)
    weight = math.fsum(part[2] for part in parts)
    lm = ExplainedComponent("lm", "lm", 1 - weight, finite(new.lm_log_prob), [])
    others = [
        ExplainedComponent(
            name, kind, share, None if log_p is None else finite(log_p), [_passage(c, tokenizer) for c in carried]
        )
        for (name, kind, share, log_p), carried in zip(parts, new.carried or [()] * len(parts), strict=True)
    ]
    return ExplainedToken(new.token, new.piece, finite(new.log_prob), new.lm_log_prob, weight, [lm, *others])


def _component(share: Share, i: int, tokenizer: Tokenizer) -> ExplainedComponent:
    carried = share.evidence.carried[i] if share.evidence.carried else ()
    log_p = finite(float(share.evidence.of_targets[i]))
    passages = [_passage(carrier, tokenizer) for carrier in carried]
    return ExplainedComponent(share.name, share.kind, float(share.weight[i]), log_p, passages)


def _passage(carrier: Carrier, tokenizer: Tokenizer) -> ExplainedPassage:
    found = carrier.passage
    before, after = tokenizer.passage(found.before, found.after, position=found.position)
    return ExplainedPassage(
        carrier.domain, found.document, found.position, carrier.distance, carrier.share, before, after
    )
