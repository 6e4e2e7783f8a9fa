"""From an explained text to its answer: each token with the passages that gave it most, and the documents of all."""

from dataclasses import asdict

from knnlm.attribution import Carrier
from knnlm.decoding import Share
from knnlm.scoring import Score
from knnlm.tokenizer import Tokenizer
from services.aggregator.responses import finite, totals, used_domains
from services.aggregator.schemas.explaining import (
    ExplainedComponent,
    ExplainedDocument,
    ExplainedPassage,
    ExplainedToken,
    ExplainResponse,
)


def explain_response(score: Score, model: str, tokenizer: Tokenizer) -> ExplainResponse:
    """score: of `Mixer.explain`."""
    pieces = tokenizer.pieces(score.tokens)
    mixed = score.mixed
    columns = (
        score.tokens[score.first :].tolist(), pieces[score.first :], mixed.log_probs.tolist(),
        mixed.lm_log_probs.tolist(), mixed.weight.tolist(),
    )  # fmt: skip
    tokens = [
        ExplainedToken(
            token_id=token,
            token=piece,
            log_p=finite(log_p),
            log_p_lm=log_p_lm,
            lmbda=weight,
            components=[
                ExplainedComponent(name="lm", kind="lm", weight=1 - weight, log_p=log_p_lm, passages=[]),
                *(_component(share, i, tokenizer) for share in mixed.components),
            ],
        )
        for i, (token, piece, log_p, log_p_lm, weight) in enumerate(zip(*columns, strict=True))
    ]
    return ExplainResponse(
        model=model,
        domains=used_domains(score),
        degraded=score.degraded,
        context="".join(pieces[: score.first]),
        tokens=tokens,
        documents=[ExplainedDocument(**asdict(document)) for document in score.documents],
        **totals(score),
    )


def _component(share: Share, i: int, tokenizer: Tokenizer) -> ExplainedComponent:
    carried = share.evidence.carried[i] if share.evidence.carried else ()
    return ExplainedComponent(
        name=share.name,
        kind=share.kind,
        weight=float(share.weight[i]),
        log_p=finite(float(share.evidence.of_targets[i])),
        passages=[_passage(carrier, tokenizer) for carrier in carried],
    )


def _passage(carrier: Carrier, tokenizer: Tokenizer) -> ExplainedPassage:
    found = carrier.passage
    before, after = tokenizer.passage(found.before, found.after, inside=found.position > len(found.before))
    return ExplainedPassage(
        domain=carrier.domain,
        document=found.document,
        position=found.position,
        distance=carrier.distance,
        share=carrier.share,
        before=before,
        after=after,
    )
