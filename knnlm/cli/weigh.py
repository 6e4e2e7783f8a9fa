"""`knnlm weigh`: the best weight of each component of a mixture on held-out documents, alone and together."""

from dataclasses import replace
from typing import Annotated, Any

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MinContextOption,
    ModelOption,
    PartOption,
    SourcesArgument,
    StoreOption,
    WindowOption,
    parse_part,
    print_json,
    print_table,
    progress,
    remark,
)
from knnlm.cli.retrieval import MemoryChoice, domain_names, memory_here, retrieving
from knnlm.errors import InvalidRequest
from knnlm.options import CacheOptions, KnnOptions

SOMETHING = 0.1  # what each component weighs while it is observed: it is asked, and its weight is fitted afterwards


@retrieving
def weigh(
    sources: SourcesArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    part: PartOption = "all",
    knn: KnnOptions | None = None,
    memory: MemoryChoice | None = None,
    cache: CacheOptions | None = None,
    context_length: WindowOption = None,
    min_context: MinContextOption = None,
    max_tokens: Annotated[
        int, typer.Option(help="Fit on a sample of this many tokens, spread over all documents.")
    ] = 20_000,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fit the weights of domains, a memory and the cache on held-out documents, alone with the LM and all together.

    Nothing is stored: the weights are for --lambda, --memory-lambda and --cache-lambda, or for requests.
    """
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation.collect import LEAK_ALARM
    from knnlm.evaluation.mixture_weights import weigh as fitted
    from knnlm.evaluation.perplexity import leaks
    from knnlm.evaluation.splits import encode, sample, select
    from knnlm.pipeline import Pipeline

    asked, memories = memory_here(memory)
    mixed: dict[str, Any] = {}  # Any: a record of options for each kind of source
    if knn is not None:
        domains = tuple(replace(d, lmbda=SOMETHING / len(knn.domains)) for d in knn.domains)
        mixed["knn"] = replace(knn, domains=domains)
    if asked is not None:
        mixed["memory"] = replace(asked, lmbda=SOMETHING)
    if cache is not None:
        mixed["cache"] = replace(cache, lmbda=SOMETHING)
    if not mixed:
        raise InvalidRequest("there is nothing to weigh: give --domain, --memory or --cache", param="--memory")
    chosen = list(select(read_documents(sources), parse_part(part)))
    names = domain_names(knn)
    with Pipeline.load(model, store, names, device=device, dtype=dtype, memories=memories) as pipeline:
        documents = sample(encode(chosen, pipeline.tokenizer), pipeline.tokenizer, max_tokens)
        with progress("tokens", sum(len(d.tokens) - 1 for d in documents), description="scoring") as update:
            found = fitted(
                pipeline,
                documents,
                mixed,
                context_length=context_length,
                min_context=min_context,
                on_progress=lambda done: update(done),
            )
        coinciding = leaks(pipeline, documents, names, (found.context_length, found.min_context))
    for domain, share in coinciding.items():
        if share >= LEAK_ALARM:
            remark(f"warning: {share:.0%} of the queries coincide with keys of {domain}: its weight is too high")
    if as_json:
        mixtures = [{"weights": dict(m.weights), "perplexity": m.perplexity} for m in found.mixtures]
        print_json({"mixtures": mixtures, "tokens": found.tokens, "documents": found.documents, "leaks": coinciding})
        return
    rows = []
    for m in found.mixtures:
        weights = ", ".join(f"{name} {weight:.3f}" for name, weight in m.weights.items())
        rows.append([" + ".join(["LM", *m.weights]), weights, f"{m.perplexity:.4f}"])
    print_table(["mixture", "weights", "perplexity"], rows, left=(0, 1))
    print(f"\non {found.tokens:,} tokens of {found.documents:,} documents")
