"""`knnlm score`: how likely every token of a text is."""

from dataclasses import asdict
from math import exp

from knnlm.cli.common import (
    COMBINE,
    DEFAULT_STORE,
    CombineOption,
    DeviceOption,
    DomainsOption,
    DtypeOption,
    EfSearchOption,
    ExcludeOption,
    JsonOption,
    KOption,
    LambdaOption,
    MinContextOption,
    ModelOption,
    StoreOption,
    TemperatureOption,
    TextArgument,
    WindowOption,
    knn_options,
    print_json,
    print_table,
    read_text,
)


def score(
    text: TextArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    domain: DomainsOption = None,
    k: KOption = None,
    lmbda: LambdaOption = None,
    temperature: TemperatureOption = None,
    combine: CombineOption = COMBINE,
    ef_search: EfSearchOption = None,
    exclude_document: ExcludeOption = None,
    context_length: WindowOption = None,
    min_context: MinContextOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Score a text token by token: natural log-probabilities of the mixture, the LM and the neighbors."""
    from knnlm.pipeline import Pipeline

    domains = domain or []
    knn = knn_options(
        domains,
        k=k,
        lmbda=lmbda,
        temperature=temperature,
        combine=combine,
        ef_search=ef_search,
        exclude_documents=exclude_document or (),
    )
    text = read_text(text)
    with Pipeline.load(model, store, domains, device=device, dtype=dtype) as pipeline:
        result = pipeline.score(text, knn, context_length=context_length, min_context=min_context)
        pieces = [pipeline.tokenizer.token(token) for token in result.tokens]
    neighbors = [None] * len(pieces[1:]) if result.knn_log_probs is None else result.knn_log_probs.tolist()
    log_probs = list(zip(result.log_probs.tolist(), result.lm_log_probs.tolist(), neighbors, strict=True))
    if as_json:
        print_json(
            {
                "model": pipeline.lm.info.model_id,
                "domains": [asdict(used) for used in result.domains],
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
