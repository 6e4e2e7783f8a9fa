"""`knnlm eval`: perplexity of the language model alone and with neighbors."""

from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DtypeOption,
    IndexOption,
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
from knnlm.cli.retrieval import (
    MemoryChoice,
    described,
    described_memory,
    domain_names,
    memory_here,
    mixed_with,
    retrieving,
)
from knnlm.errors import InvalidRequest
from knnlm.options import CacheOptions, KnnOptions

if TYPE_CHECKING:
    from knnlm.evaluation.perplexity import Report


@retrieving
def evaluate(
    sources: SourcesArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    part: PartOption = "all",
    knn: KnnOptions | None = None,
    memory: MemoryChoice | None = None,
    cache: CacheOptions | None = None,
    index: IndexOption = None,
    context_length: WindowOption = None,
    min_context: MinContextOption = None,
    max_tokens: Annotated[
        int | None, typer.Option(help="Report on a sample of this many tokens, spread over all documents.")
    ] = None,
    per_document: Annotated[bool, typer.Option("--per-document", help="One line for each document too.")] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Report perplexity and bits per byte of the LM alone and, with --domain, --memory or --cache, of the mixture."""
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation import perplexity
    from knnlm.evaluation.splits import encode, sample, select
    from knnlm.pipeline import Pipeline

    domains = domain_names(knn)
    if index is not None and not domains:
        raise InvalidRequest("--index means nothing without --domain", param="--index")
    chosen = list(select(read_documents(sources), parse_part(part)))
    asked, memories = memory_here(memory)
    with Pipeline.load(model, store, domains, device=device, dtype=dtype, index=index, memories=memories) as pipeline:
        documents = encode(chosen, pipeline.tokenizer)
        if max_tokens is not None:
            documents = sample(documents, pipeline.tokenizer, max_tokens)
        with progress("tokens", sum(len(d.tokens) - 1 for d in documents), description="scoring") as update:
            report = perplexity.evaluate(
                pipeline,
                documents,
                mixed_with(knn, cache),
                memory=asked,
                context_length=context_length,
                min_context=min_context,
                on_progress=lambda done: update(done),
            )
    for warning in report.warnings:
        remark(f"warning: {warning}")
    if as_json:
        print_json(report.as_json())
    else:
        _print_report(report, per_document=per_document)


def _print_report(report: "Report", *, per_document: bool) -> None:
    if per_document:
        rows = []
        for d in report.documents:
            bits = [nats / d.tokens for nats in (d.lm_nats, d.knn_nats) if nats is not None]
            rows.append([d.id, f"{d.tokens:,}", *(f"{value:.4f}" for value in bits)])
        columns = ["document", "tokens", "LM nats/token", f"{report.mixture} nats/token"]
        print_table(columns[: 4 if report.knn else 3], rows)
        print()
    named = [("LM", report.lm)] + ([(report.mixture, report.knn)] if report.knn else [])
    print_table(
        ["", "perplexity", "bits/byte", "word perplexity"],
        [[n, f"{f.perplexity:.4f}", f"{f.bits_per_byte:.4f}", f"{f.word_perplexity:.4f}"] for n, f in named],
    )
    print(
        f"\n{report.tokens:,} tokens of {len(report.documents):,} documents; "
        f"windows of {report.context_length} tokens, at least {report.min_context} of context; model {report.model_id}"
    )
    for used in report.domains:
        print(f"{described(used)}; {report.leaks[used.domain]:.1%} of the queries coincide with a stored key")
    for memory in report.memories:
        print(described_memory(memory.as_json()))
    if report.knn:
        weights = ", ".join(f"{name} {weight:.3f}" for name, weight in report.weights.items())
        print(f"weights on average: {weights}")
        print(f"{report.improved:.1%} of the tokens became likelier")
