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
from knnlm.cli.retrieval import MemoryChoice, domain_names, memory_here, mixed_with, retrieving
from knnlm.options import CacheOptions, KnnOptions

COLUMNS = ("log_prob", "lm_log_prob", "knn_log_prob", "memory_log_prob", "cache_log_prob")


@retrieving
def score(
    text: TextArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    knn: KnnOptions | None = None,
    memory: MemoryChoice | None = None,
    cache: CacheOptions | None = None,
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
    asked, memories = memory_here(memory)
    with Pipeline.load(model, store, domains, device=device, dtype=dtype, memories=memories) as pipeline:
        result = pipeline.score(
            text, mixed_with(knn, cache), memory=asked, context_length=context_length, min_context=min_context
        )
        pieces = pipeline.tokenizer.pieces(result.tokens)
    kinds = [result.mixed.mean(kind) for kind in ("knn", "memory", "cache")]
    others = [[None] * len(pieces[1:]) if found is None else found.tolist() for found in kinds]
    log_probs = list(zip(result.log_probs.tolist(), result.lm_log_probs.tolist(), *others, strict=True))
    if as_json:
        print_json(
            {
                "model": pipeline.lm.info.model_id,
                "domains": [used.as_json() for used in result.domains],
                "memories": [used.as_json() for used in result.memories],
                "tokens": [
                    {"id": int(i), "token": piece, **dict(zip(COLUMNS, row, strict=True))}
                    for i, piece, row in zip(result.tokens[1:], pieces[1:], log_probs, strict=True)
                ],
                "total": result.total,
                "perplexity": result.perplexity,
            }
        )
        return
    shown = [0, 1, 2, *([3] if result.memories else []), *([4] if cache is not None else [])]
    names = ["p", "p_LM", "p_kNN", "p_memory", "p_cache"]
    print_table(
        ["token", *(names[i] for i in shown)],
        [
            [repr(piece), *("" if row[i] is None else f"{exp(row[i]):.5f}" for i in shown)]
            for piece, row in zip(pieces[1:], log_probs, strict=True)
        ],
    )
    print(f"\n{len(log_probs)} tokens, total log-probability {result.total:.4f}, perplexity {result.perplexity:.4f}")
