"""From mixed arrays to the shapes of schemas.py: probabilities, token texts, neighbors with their source."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knnlm.clients.rpc import ABSENT, DomainReplica
from knnlm.decoding import top_tokens
from knnlm.messages import DomainInfo
from knnlm.mixer import NextTokens, Score
from knnlm.tokenizer import Tokenizer
from knnlm.wire import array_to_json
from knnlm.wire.jsonable import to_json
from services.aggregator import schemas

__all__ = ["domain_shape", "domain_status_shape", "finite", "next_tokens", "scored_tokens", "used_domains"]


def next_tokens(
    request: schemas.NextTokenRequest,
    contexts: Sequence[npt.NDArray[np.int32]],
    answer: NextTokens,
    tokenizer: Tokenizer,
) -> list[schemas.NextToken]:
    """One for each context, in their order."""
    mixed = answer.mixed
    results = []
    for i, context in enumerate(contexts):
        p, p_lm = np.exp(mixed.log_probs[i]), np.exp(mixed.lm_log_probs[i].astype(np.float64))  # (V,)
        knn = None if mixed.knn_log_probs is None else mixed.knn_log_probs[i]
        p_knn = None if knn is None or np.isneginf(knn).all() else np.exp(knn)
        top = [
            schemas.TokenProbability(
                token_id=int(t),
                token=tokenizer.token(int(t)),
                p=float(p[t]),
                p_lm=float(p_lm[t]),
                p_knn=None if p_knn is None else float(p_knn[t]),
            )
            for t in top_tokens(mixed.log_probs[i], request.top_n)
        ]
        results.append(
            schemas.NextToken(
                context_tokens=len(context),
                lmbda=float(mixed.weight[i]),
                top=top,
                distribution=_distribution(p, p_lm, p_knn, request.encoding) if request.full else None,
                neighbors=_neighbors(answer, i, request.neighbors, tokenizer) if request.neighbors else None,
            )
        )
    return results


def scored_tokens(score: Score, tokenizer: Tokenizer) -> list[schemas.ScoredToken]:
    """One for each token but the first."""
    texts = tokenizer.pieces(score.tokens)[1:]
    tokens = score.tokens[1:].tolist()
    knn = [None] * len(tokens) if score.knn_log_probs is None else score.knn_log_probs.tolist()
    columns = (score.log_probs.tolist(), score.lm_log_probs.tolist(), knn, score.weight.tolist())
    return [
        schemas.ScoredToken(
            token_id=token,
            token=text,
            log_p=finite(log_p),
            log_p_lm=log_p_lm,
            log_p_knn=None if log_p_knn is None else finite(log_p_knn),
            lmbda=weight,
        )
        for token, text, log_p, log_p_lm, log_p_knn, weight in zip(tokens, texts, *columns, strict=True)
    ]


def used_domains(answer: NextTokens | Score) -> list[schemas.UsedDomain]:
    return [schemas.UsedDomain.model_validate(used, from_attributes=True) for used in answer.domains]


def domain_shape(info: DomainInfo) -> schemas.Domain:
    shape: schemas.Domain = schemas.Domain.model_validate(to_json(info))
    return shape


def domain_status_shape(info: DomainInfo, replicas: Sequence[DomainReplica]) -> schemas.DomainStatus:
    """replicas: as the client found them, those that do not have the domain left out."""
    shown = [
        schemas.DomainReplica(address=r.address, version=r.version, state=r.state, problem=r.problem)
        for r in replicas
        if r.state != ABSENT
    ]
    shape: schemas.DomainStatus = schemas.DomainStatus.model_validate({**to_json(info), "replicas": shown})
    return shape


def finite(value: float) -> float | None:
    """JSON has no infinity: null stands for it."""
    return value if math.isfinite(value) else None


def _neighbors(answer: NextTokens, row: int, count: int, tokenizer: Tokenizer) -> list[schemas.Neighbor]:
    """The nearest `count` over all domains, each with its share of its own domain's distribution."""
    shown = []
    for result, used in zip(answer.found, answer.domains, strict=True):
        neighbors = result.neighbors
        if not result.passages or not neighbors.present[row]:
            continue
        log_weights = neighbors.log_weights(used.temperature)[row]  # (k,)
        weights = np.exp(log_weights - np.logaddexp.reduce(log_weights))
        for j, passage in enumerate(result.passages[row]):
            value = int(neighbors.values[row, j])
            before, after = tokenizer.passage(
                passage.before, passage.after, inside=passage.position > len(passage.before)
            )
            shown.append(
                schemas.Neighbor(
                    domain=result.domain,
                    distance=float(neighbors.distances[row, j]),
                    weight=float(weights[j]),
                    token_id=value,
                    token=tokenizer.token(value),
                    document=passage.document,
                    position=passage.position,
                    before=before,
                    after=after,
                )
            )
    return sorted(shown, key=lambda n: n.distance)[:count]


def _distribution(
    p: npt.NDArray[np.float64],
    p_lm: npt.NDArray[np.float64],
    p_knn: npt.NDArray[np.float64] | None,
    encoding: str,
) -> schemas.Distribution:
    def shape(values: npt.NDArray[np.float64]) -> object:
        return array_to_json(values.astype(np.float32), encoding)

    return schemas.Distribution(p=shape(p), p_lm=shape(p_lm), p_knn=None if p_knn is None else shape(p_knn))
