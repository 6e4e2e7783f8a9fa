"""`knnlm score`: how likely every token of a text is."""

from math import exp

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MinContextOption,
    ModelOption,
    StoreOption,
    TextArgument,
    WindowOption,
    print_json,
    print_table,
    read_text,
)
from knnlm.cli.retrieval import domain_names, retrieving
from knnlm.options import KnnOptions


@retrieving
def score(
    text: TextArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    knn: KnnOptions | None = None,
    context_length: WindowOption = None,
    min_context: MinContextOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score a text token by token: natural log-probabilities of the mixture, the LM and the neighbors."""
    from knnlm.pipeline import Pipeline

    domains = domain_names(knn)
    text = read_text(text)
    with Pipeline.load(model, store, domains, device=device, dtype=dtype) as pipeline:
        result = pipeline.score(text, knn, context_length=context_length, min_context=min_context)
        pieces = pipeline.tokenizer.pieces(result.tokens)
    neighbors = [None] * len(pieces[1:]) if result.knn_log_probs is None else result.knn_log_probs.tolist()
    log_probs = list(zip(result.log_probs.tolist(), result.lm_log_probs.tolist(), neighbors, strict=True))
    if as_json:
        print_json(
            {
                "model": pipeline.lm.info.model_id,
                "domains": [used.as_json() for used in result.domains],
                "tokens": [
                    {"id": int(i), "token": piece, "log_prob": p, "lm_log_prob": p_lm, "knn_log_prob": p_knn}
                    for i, piece, (p, p_lm, p_knn) in zip(result.tokens[1:], pieces[1:], log_probs, strict=True)
                ],
                "total": result.total,
                "perplexity": result.perplexity,
            }
        )
        return
    print_table(
        ["token", "p", "p_LM", "p_kNN"],
        [
            [repr(piece), *("" if x is None else f"{exp(x):.5f}" for x in row)]
            for piece, row in zip(pieces[1:], log_probs, strict=True)
        ],
    )
    print(f"\n{len(log_probs)} tokens, total log-probability {result.total:.4f}, perplexity {result.perplexity:.4f}")
