"""From mixed arrays to the shapes of answers: probabilities, token texts, neighbors with their source."""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knnlm.clients.rpc import ABSENT, DomainReplica
from knnlm.decoding import top_tokens
from knnlm.messages import DomainInfo
from knnlm.mixer import NextTokens
from knnlm.scoring import Score
from knnlm.sources import Plan
from knnlm.tokenizer import Tokenizer
from knnlm.wire import array_to_json
from knnlm.wire.jsonable import finite, to_json
from services.aggregator.schemas import mixing
from services.aggregator.schemas.domains import Domain, DomainStatus
from services.aggregator.schemas.domains import DomainReplica as ReplicaAnswer
from services.aggregator.schemas.tokenizer import TokenizeResponse

JSON_PORTION = 1 << 14  # values written at a time


def next_tokens(
    request: mixing.NextTokenRequest,
    contexts: Sequence[npt.NDArray[np.int32]],
    answer: NextTokens,
    tokenizer: Tokenizer,
) -> list[mixing.NextToken]:
    """One for each context, in their order."""
    return [_next_token(request, i, len(context), answer, tokenizer) for i, context in enumerate(contexts)]


def _next_token(
    request: mixing.NextTokenRequest, i: int, context_tokens: int, answer: NextTokens, tokenizer: Tokenizer
) -> mixing.NextToken:
    mixed = answer.mixed
    vocab_size = mixed.log_probs.shape[1]
    p, p_lm = np.exp(mixed.log_probs[i]), np.exp(mixed.lm_log_probs[i].astype(np.float64))  # (V,)
    knn = mixed.mean_row(i, "knn")
    p_knn = None if knn is None else np.exp(knn)
    shown = top_tokens(mixed.log_probs[i], request.top_n)
    rows = [(c, c.row(i, vocab_size)) for c in mixed.components]
    weights = [float(c.weight[i]) for c in mixed.components]
    components = [
        mixing.Component(name="lm", kind="lm", weight=1 - sum(weights), p=p_lm[shown].tolist()),
        *(
            mixing.Component(
                name=c.name,
                kind=c.kind,
                weight=weight,
                p=None if row is None else np.exp(row[shown]).tolist(),
                searches_skipped=int(c.evidence.skipped[i : i + 1].sum()),
            )
            for (c, row), weight in zip(rows, weights, strict=True)
        ),
    ]
    top = [
        mixing.TokenProbability(
            token_id=t,
            token=tokenizer.token(t),
            p=float(p[t]),
            p_lm=float(p_lm[t]),
            p_knn=None if p_knn is None else float(p_knn[t]),
        )
        for t in shown.tolist()
    ]
    return mixing.NextToken(
        context_tokens=context_tokens,
        lmbda=sum(weights),
        top=top,
        components=components,
        distribution=_distribution(p, p_lm, p_knn, request.encoding) if request.full else None,
        neighbors=_neighbors(answer, i, request.neighbors, tokenizer) if request.neighbors else None,
    )


def score_response(score: Score, model: str, tokenizer: Tokenizer) -> mixing.ScoreResponse:
    return mixing.ScoreResponse(
        model=model,
        domains=used_domains(score),
        memories=used_memories(score),
        degraded=score.degraded,
        first_token_id=int(score.tokens[0]),
        tokens=_scored_tokens(score, tokenizer),
        components=_scored_components(score),
        total_log_p=finite(score.total),
        total_log_p_lm=score.lm_total,
        perplexity=finite(score.perplexity),
        perplexity_lm=score.lm_perplexity,
        context_length=score.context_length,
        min_context=score.min_context,
    )


def _scored_tokens(score: Score, tokenizer: Tokenizer) -> list[mixing.ScoredToken]:
    """One for each token but the first."""
    texts = tokenizer.pieces(score.tokens)[1:]
    tokens = score.tokens[1:].tolist()
    knn = [None] * len(tokens) if score.knn_log_probs is None else score.knn_log_probs.tolist()
    columns = (score.log_probs.tolist(), score.lm_log_probs.tolist(), knn, score.weight.tolist())
    return [
        mixing.ScoredToken(
            token_id=token,
            token=text,
            log_p=finite(log_p),
            log_p_lm=log_p_lm,
            log_p_knn=None if log_p_knn is None else finite(log_p_knn),
            lmbda=weight,
        )
        for token, text, log_p, log_p_lm, log_p_knn, weight in zip(tokens, texts, *columns, strict=True)
    ]


def _scored_components(score: Score) -> list[mixing.ScoredComponent]:
    """The components that were mixed, the LM first."""
    mixed = score.mixed
    columns = [("lm", "lm", 1 - mixed.weight, mixed.lm_log_probs, 0)]
    columns += [
        (c.name, c.kind, c.weight, c.evidence.of_targets, int(c.evidence.skipped.sum())) for c in mixed.components
    ]
    return [
        mixing.ScoredComponent(
            name=name,
            kind=kind,
            weight=weight.tolist(),
            log_p=[finite(value) for value in log_probs.tolist()],
            searches_skipped=skipped,
        )
        for name, kind, weight, log_probs, skipped in columns
    ]


def tokenized(answer: TokenizeResponse) -> bytes:
    """The answer as JSON, made in portions: other threads run meanwhile."""
    lists = {"tokens": answer.tokens, "token_strs": answer.token_strs}
    parts = {name: "null" if values is None else _json_list(values) for name, values in lists.items()}
    head = f'"count":{answer.count},"max_model_len":{answer.max_model_len}'
    return f'{{{head},"tokens":{parts["tokens"]},"token_strs":{parts["token_strs"]}}}'.encode()


def _json_list(values: Sequence[int] | Sequence[str]) -> str:
    starts = range(0, len(values), JSON_PORTION)
    return f"[{','.join(json.dumps(values[at : at + JSON_PORTION])[1:-1] for at in starts)}]"


def used_domains(answer: NextTokens | Score | Plan) -> list[mixing.UsedDomain]:
    return [mixing.UsedDomain.model_validate(used, from_attributes=True) for used in answer.domains]


def used_memories(answer: NextTokens | Score | Plan) -> list[mixing.UsedMemory]:
    return [mixing.UsedMemory.model_validate(used, from_attributes=True) for used in answer.memories]


def domain_shape(info: DomainInfo) -> Domain:
    shape: Domain = Domain.model_validate(to_json(info))
    return shape


def domain_status_shape(info: DomainInfo, replicas: Sequence[DomainReplica]) -> DomainStatus:
    """replicas: as the client found them, those that do not have the domain left out."""
    shown = [
        ReplicaAnswer(address=r.address, version=r.version, state=r.state, problem=r.problem)
        for r in replicas
        if r.state != ABSENT
    ]
    shape: DomainStatus = DomainStatus.model_validate({**to_json(info), "replicas": shown})
    return shape


def _neighbors(answer: NextTokens, row: int, count: int, tokenizer: Tokenizer) -> list[mixing.Neighbor]:
    """The nearest `count` over all domains, each with its share of its own domain's distribution."""
    shown = []
    temperatures = {used.domain: used.temperature for used in answer.domains}
    for result in answer.found:
        neighbors = result.neighbors
        if result.domain not in temperatures or not result.passages or not neighbors.present[row]:
            continue
        log_weights = neighbors.log_weights(temperatures[result.domain])[row]  # (k,)
        weights = np.exp(log_weights - np.logaddexp.reduce(log_weights))
        for j, passage in enumerate(result.passages[row]):
            value = int(neighbors.values[row, j])
            before, after = tokenizer.passage(passage.before, passage.after, position=passage.position)
            shown.append(
                mixing.Neighbor(
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
) -> mixing.Distribution:
    def shape(values: npt.NDArray[np.float64]) -> object:
        return array_to_json(values.astype(np.float32), encoding)  # how many there are was checked before

    return mixing.Distribution(p=shape(p), p_lm=shape(p_lm), p_knn=None if p_knn is None else shape(p_knn))
