"""`knnlm tune`: fit temperature, lambda and k of a domain, and store them with it."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DomainArgument,
    DtypeOption,
    IndexOption,
    JsonOption,
    MinContextOption,
    ModelOption,
    PartOption,
    SourcesArgument,
    StoreOption,
    VersionOption,
    WindowOption,
    parse_part,
    print_json,
    progress,
    remark,
    version_folder,
)
from knnlm.errors import InvalidRequest


def tune(
    domain: DomainArgument,
    sources: SourcesArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    part: PartOption = "all",
    k: Annotated[
        list[int] | None, typer.Option("--k", help="Neighbors to try; may be repeated. Default: 64, 256 and 1024.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(help="Fit on a sample of so many tokens, spread over all documents.")
    ] = 20_000,
    context_length: WindowOption = None,
    min_context: MinContextOption = None,
    index: IndexOption = None,
    page: Annotated[Path | None, typer.Option(help="Also write the tuning curve as an HTML page.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fit temperature, lambda and k on held-out documents and store them with the datastore.

    Documents that are in the datastore are left out.
    """
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.text import read_documents
    from knnlm.datastore.updates.revise import with_tuning
    from knnlm.evaluation.collect import find, leak, observe
    from knnlm.evaluation.plots import write_tuning_page
    from knnlm.evaluation.splits import encode, sample, select, unseen
    from knnlm.evaluation.tuning import fit, smallest_k
    from knnlm.index.searcher import Searcher
    from knnlm.lm.model import LanguageModel

    path = version_folder(Catalog(store), domain, version)
    manifest = Manifest.load(path)
    asked = k or [64, 256, 1024]
    if min(asked) < 1:
        raise InvalidRequest(f"k must be at least 1, got {min(asked)}", param="k")
    if not manifest.live_entries:
        raise InvalidRequest(f"{path} has no entries, so there is nothing to tune: add documents to {domain} first")
    ks = sorted({min(wanted, manifest.live_entries) for wanted in asked})
    chosen = list(select(read_documents(sources), parse_part(part)))
    lm = LanguageModel.load(model, device=device, dtype=dtype, key_function=manifest.key_function)
    searcher = Searcher.open(path, index=index, expect=lm.info)
    fits = []
    leaked = 0.0
    try:
        encoded = encode(chosen, lm.tokenizer)
        held_out = unseen(encoded, path)
        if len(held_out) < len(encoded):
            remark(f"{len(encoded) - len(held_out)} of {len(encoded)} documents are in the datastore and left out")
        if not held_out:
            raise InvalidRequest(f"no document to fit on that is not in {path}", param="sources")
        few = sample(held_out, lm.tokenizer, max_tokens)
        with progress("tokens", sum(len(d.tokens) - 1 for d in few), description="asking the model") as update:
            observed = observe(
                lm,
                few,
                domains=[searcher.info(())],
                context_length=context_length,
                min_context=min_context,
                on_progress=lambda done: update(done),
            )
        with progress("queries", len(ks) * len(observed.targets), description="searching") as update:
            for i, wanted in enumerate(ks):  # once for each: fewer neighbors are found among fewer candidates
                found = find(searcher, domain, observed, wanted)
                update((i + 1) * len(observed.targets))
                fits.append(fit(found))
                leaked = leak(observed, found.neighbors, lm.info.dtype, manifest.model.dtype)
    finally:
        searcher.close()
    result = smallest_k(fits)
    default = with_tuning(path, result.tuning).index.recipe
    if index not in (None, default):
        remark(
            f"fitted to neighbors found by {index}; {default} answers: `knnlm index {domain} --use {index}` changes it"
        )
    tuning = result.tuning
    warnings = _warnings(leaked, tuning.lmbda)
    if page is not None:
        write_tuning_page(page, result, f"{domain} {path.name}")
    for warning in warnings:
        remark(f"warning: {warning}")
    if as_json:
        curve = [asdict(point) for point in result.curve]
        answer = {"domain": domain, "version": path.name, **asdict(tuning), "leak": leaked}
        print_json({**answer, "warnings": warnings, "curve": curve})
        return
    print(f"{domain} {path.name}: temperature {tuning.temperature:.5g}, lambda {tuning.lmbda:.3f}, k {tuning.k}")
    print(
        f"perplexity {tuning.lm_perplexity:.4f} of the LM alone, {tuning.knn_perplexity:.4f} with neighbors, "
        f"on {tuning.tokens:,} tokens of {tuning.documents:,} documents"
    )


def _warnings(leak: float, lmbda: float) -> list[str]:
    from knnlm.evaluation.collect import LEAK_ALARM

    found = []
    if leak >= LEAK_ALARM:
        found.append(
            f"{leak:.0%} of the queries coincide with stored keys: the same text is in the datastore under other "
            "names, so lambda is too high for new text"
        )
    if lmbda == 0:
        found.append("retrieval does not help on these documents: lambda is 0, and the domain answers as the LM alone")
    return found
