"""`knnlm tune`: fit temperature, lambda, k and how to search of a domain, and store them with it."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    OptionalSources,
    PartOption,
    StoreOption,
    VersionOption,
    WindowOption,
    parse_part,
    print_json,
    print_table,
    progress,
    remark,
    version_folder,
)
from knnlm.cli.remote import is_given
from knnlm.cli.retrieval import weight_of
from knnlm.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from knnlm.evaluation.cache_fit import CacheFit
    from knnlm.evaluation.search_settings import Tuned
    from knnlm.tuning_records import RuleQuality, SearchQuality


def tune(
    context: typer.Context,
    domain: DomainArgument,
    sources: OptionalSources = None,
    *,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    version: VersionOption = None,
    part: PartOption = "all",
    k: Annotated[
        list[int] | None, typer.Option("--k", help="Neighbors to try; may be repeated. Default: 64, 256 and 1024.")
    ] = None,
    quality: Annotated[
        str,
        typer.Option(
            help="Search as near to exact search as: exact (0.05 % of perplexity), balanced (0.3 %), fast (1 %)."
        ),
    ] = "balanced",
    rule: Annotated[
        str,
        typer.Option(
            help="Fit this lambda rule, which weighs what is retrieved; auto: whichever is better than fixed on "
            "documents that it was not fitted to."
        ),
    ] = "fixed",
    skip: Annotated[
        float,
        typer.Option(help="With --rule gate_lm: the share of the searches to leave out, those that matter least."),
    ] = 0.0,
    cache: Annotated[
        bool,
        typer.Option(
            "--cache", help="Fit the continuous cache, too. With documents in place of DOMAIN: beside the LM alone."
        ),
    ] = False,
    max_tokens: Annotated[
        int, typer.Option(help="Fit on a sample of this many tokens, spread over all documents.")
    ] = 20_000,
    exact_queries: Annotated[
        int, typer.Option(help="Search for this many of them exactly too; 0: take the index's own way to search.")
    ] = 4096,
    context_length: WindowOption = None,
    min_context: MinContextOption = None,
    index: IndexOption = None,
    page: Annotated[Path | None, typer.Option(help="Also write the tuning curve as an HTML page.")] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Fit temperature, lambda, k and how to search on held-out documents and store them with the datastore.

    Documents that are in the datastore are left out.
    """
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation import search_settings
    from knnlm.evaluation.plots import write_tuning_page
    from knnlm.evaluation.splits import select
    from knnlm.wire.jsonable import to_json

    if cache and domain not in Catalog(store).domains() and (domain == "-" or Path(domain).exists()):
        _refuse_with_a_domain_alone(context)
        _cache_alone(
            [domain, *(sources or [])], model, part, max_tokens, context_length, min_context, device, dtype,
            as_json=as_json,
        )  # fmt: skip
        return
    if not sources:
        raise InvalidRequest("expected documents after the domain", param="sources")
    path = version_folder(Catalog(store), domain, version)
    chosen = list(select(read_documents(sources), parse_part(part)))
    with progress("steps", None, description="asking the model") as update:
        found = search_settings.tune(
            store,
            domain,
            chosen,
            model,
            version=path.name,
            ks=k or search_settings.KS,
            quality=quality,
            exact_queries=exact_queries,
            rule=rule,
            skip=skip,
            cache=cache,
            max_tokens=max_tokens,
            context_length=context_length,
            min_context=min_context,
            index=index,
            device=device,
            dtype=dtype,
            on_progress=lambda what, done, total: update(done, what, total),
        )
    if found.left_out:
        remark(f"{found.left_out} of {len(chosen)} documents are in the datastore and left out")
    tuning, default = found.fit.tuning, Manifest.load(path).index.recipe
    if index not in (None, default):
        remark(
            f"fitted to neighbors found by {index}; {default} answers: `knnlm index use {domain} {index}` changes it"
        )
    warnings = _warnings(found)
    if page is not None:
        write_tuning_page(page, found.fit, f"{domain} {path.name}")
    for warning in warnings:
        remark(f"warning: {warning}")
    if as_json:
        curve = [to_json(point) for point in found.fit.curve]
        answer = {"domain": domain, "version": path.name, **to_json(tuning), "leak": found.leak}
        measured = {} if found.cache is None else {"cache_fit": to_json(found.cache)}
        print_json({**answer, **measured, "warnings": warnings, "curve": curve})
        return
    _print_quality(tuning.quality)
    _print_rules(tuning.rules, "rule")
    if found.cache is not None:
        _print_cache(found.cache)
        _print_rules(found.cache.compared, "retrieval and cache")
    weight = weight_of(tuning.rule, tuning.parameters or {"lambda": tuning.lmbda})
    print(f"{domain} {path.name}: temperature {tuning.temperature:.5g}, {weight}, k {tuning.k}")
    print(
        f"perplexity {tuning.lm_perplexity:.4f} of the LM alone, {tuning.knn_perplexity:.4f} with neighbors, "
        f"on {tuning.tokens:,} tokens of {tuning.documents:,} documents"
    )


def _print_quality(rows: "Sequence[SearchQuality]") -> None:
    """How each way to search compares with exact search, the first row."""
    if not rows:
        return
    lines = []
    for row in rows:
        speed = "" if row.queries_per_second is None else f"{row.queries_per_second:,.0f}"
        share = f"{100 * (row.perplexity / rows[0].perplexity - 1):+.2f} %"
        lines.append(["*" if row.chosen else "", row.name, f"{row.perplexity:.4f}", share, speed])
    print_table(["", "search", "perplexity", "beside exact", "queries/s"], lines, left=(0, 1))
    print()


def _print_rules(rows: "Sequence[RuleQuality]", what: str) -> None:
    """How each rule compares with one lambda for everything, on documents that it was not fitted to."""
    if not rows:
        return
    lines = [
        ["*" if row.chosen else "", row.name, f"{row.perplexity:.4f}", f"{_percent(row.difference):+.2f} %",
         f"{_percent(row.low):+.2f} % to {_percent(row.high):+.2f} %"]
        for row in rows
    ]  # fmt: skip
    print_table(["", what, "perplexity", "beside fixed", "95 % interval"], lines, left=(0, 1))
    print()


def _cache_alone(
    sources: "Sequence[str]",
    model: str,
    part: str,
    max_tokens: int,
    context_length: int | None,
    min_context: int | None,
    device: str,
    dtype: str,
    *,
    as_json: bool,
) -> None:
    """Fit the cache beside the LM alone and print it; nothing is stored."""
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation.cache_fit import tune_cache
    from knnlm.evaluation.splits import select
    from knnlm.wire.jsonable import to_json

    chosen = select(read_documents(list(sources)), parse_part(part))
    with progress("tokens", None, description="asking the model") as update:
        fitted, tokens, documents = tune_cache(
            chosen,
            model,
            max_tokens=max_tokens,
            context_length=context_length,
            min_context=min_context,
            device=device,
            dtype=dtype,
            on_progress=lambda done, of: update(done, None, of),
        )
    if as_json:
        print_json({**to_json(fitted), "tokens": tokens, "documents": documents})
        return
    _print_cache(fitted)
    print(f"on {tokens:,} tokens of {documents:,} documents")


def _print_cache(fitted: "CacheFit") -> None:
    rows = [
        ("LM", fitted.lm_perplexity),
        ("+ cache", fitted.cache_perplexity),
        ("+ kNN", fitted.knn_perplexity),
        ("+ kNN + cache", fitted.both_perplexity),
    ]
    print_table(["", "perplexity"], [[name, f"{value:.4f}"] for name, value in rows if value is not None])
    beside = "" if fitted.knn_lambda is None else f", lambda of retrieval beside it {fitted.knn_lambda:.3f}"
    print(f"cache: lambda {fitted.lmbda:.3f}, theta {fitted.theta:.5g}, size {fitted.size}{beside}\n")


def _refuse_with_a_domain_alone(context: typer.Context) -> None:
    for name in ("version", "k", "quality", "rule", "skip", "exact_queries", "index", "page"):
        if is_given(context, name):
            raise InvalidRequest(f"--{name.replace('_', '-')} means nothing without a domain", param=name)


def _percent(nats: float) -> float:
    """Percent of perplexity that a difference of mean log-likelihoods makes."""
    return 100 * math.expm1(nats)


def _warnings(found: "Tuned") -> list[str]:
    from knnlm.evaluation.collect import LEAK_ALARM

    warnings = []
    if found.leak >= LEAK_ALARM:
        warnings.append(
            f"{found.leak:.0%} of the queries coincide with stored keys: the same text is in the datastore under other "
            "names, so lambda is too high for new text"
        )
    if not found.near:
        warnings.append(
            "no way to search this index is as near to exact search as was asked for: the nearest one was taken; "
            "`knnlm index build` can build another index"
        )
    if found.fit.tuning.rule == "fixed" and found.fit.tuning.lmbda == 0:
        warnings.append(
            "retrieval does not help on these documents: lambda is 0, and the domain answers as the LM alone"
        )
    return warnings
