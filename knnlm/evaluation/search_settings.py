"""How to search a domain's index, and what is fitted to it: exact search beside a few settings, the cheapest taken.

An index finds faster than exact search, and not always the nearest. How much perplexity that costs differs between
models and corpora, so it is measured: on a sample of the held-out tokens every setting is searched as it is served,
temperature and lambda are fitted to what it found, and the perplexities are compared with that of exact search.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

from knnlm.datastore.catalog import version_path
from knnlm.datastore.manifest import FLAT, Manifest
from knnlm.datastore.updates.revise import with_tuning
from knnlm.errors import InvalidRequest
from knnlm.evaluation.cache_fit import CacheFit, fit_cache
from knnlm.evaluation.collect import LEAK_SEARCH, HeldOut, find, leak, observe
from knnlm.evaluation.rule_choice import compare
from knnlm.evaluation.splits import encode, sample, unseen
from knnlm.evaluation.timing import Rate, interleave
from knnlm.evaluation.tuning import Fit, Observations, Point, fit, smallest_k, with_rule
from knnlm.index.contract import Index
from knnlm.index.exact import exact_neighbors
from knnlm.index.sharded_searcher import OpenedSearcher, open_searcher
from knnlm.messages import Document, SearchRequest
from knnlm.neighbors import Neighbors
from knnlm.options import SearchOptions
from knnlm.rules import AUTO, FIXED, GATE, check_skip
from knnlm.rules import rule as known_rule
from knnlm.tuning_records import SearchQuality, Tuning

KS = (64, 256, 1024)
QUALITIES: Mapping[str, float] = {"exact": 5e-4, "balanced": 3e-3, "fast": 1e-2}  # share of perplexity
EXACT_QUERIES = 4096  # compared with exact search: of two million keys of 512 dimensions, minutes on two cores
EXACT, DEFAULT = "exact search", "default"  # rows of the table: exact search, and the index's own setting
EFFORTS = (0.5, 2.0, 4.0)  # times the index's own
OVERFETCH = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 8.0)  # times the index's own
GAIN = 1e-4  # share of perplexity: where more work gains less twice, still more is not tried
BATCH = 64  # queries in a call that is timed
TIMING_SECONDS, TIMING_ROUNDS = 0.2, 3  # how long each setting is timed
SPEED_TOLERANCE = 0.05  # rates this near are one: the better perplexity decides

Progress = Callable[[str, int, int], None]
Timing = Callable[[Mapping[str, Callable[[], int]]], Mapping[str, Rate]]


@dataclass(frozen=True)
class Ladder:
    """Settings by name, each with more candidates to rescore than the one before. costlier: than the default, so that
    it is only worth its cost when its first one gains something on the default."""

    steps: Mapping[str, SearchOptions]
    costlier: bool = False


@dataclass(frozen=True)
class Tuned:
    """fit: its tuning holds how to search and the table of what was measured. leak: share of the queries that coincide
    with a stored key. near: whether the chosen setting is as near to exact search as was asked for. left_out:
    documents that the datastore holds. cache: None where it was not asked for."""

    fit: Fit
    leak: float
    near: bool = True
    left_out: int = 0
    cache: CacheFit | None = None


def tune(
    store: str | Path,
    domain: str,
    documents: Iterable[Document],
    model: str,
    *,
    version: str | None = None,
    ks: Sequence[int] = KS,
    quality: str = "balanced",
    exact_queries: int = EXACT_QUERIES,
    rule: str = FIXED,
    skip: float = 0.0,
    cache: bool = False,
    max_tokens: int = 20_000,
    context_length: int | None = None,
    min_context: int | None = None,
    index: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: Progress | None = None,
) -> Tuned:
    """Fit how a domain in the folder `store` is searched and mixed to documents that it does not hold, and store that
    with the version.

    Documents that it holds are left out. model: what made the keys, a Hugging Face folder or hub id. version: None for
    the current one. max_tokens: of a sample, spread over all documents. context_length, min_context: see
    knnlm.decoding.choose_windows. cache: fit the continuous cache as well, beside retrieval with one lambda; and,
    unless `rule` names one that gives no place to it, gates for both (knnlm.evaluation.cache_fit.fit_cache).
    index: the recipe to search, None for the default. The rest, and what on_progress hears, as in `tune_searcher`.
    Raises as it does; UnknownDomain, UnknownVersion; DatastoreMismatch for a model that
    did not make the domain; InvalidRequest when no document is left; and as LanguageModel.load does.
    """
    from knnlm.lm.model import LanguageModel

    path = version_path(store, domain, version)
    manifest, report = Manifest.load(path), on_progress or _silent
    ks = check(manifest, ks, quality, exact_queries, rule, skip)
    documents = list(documents)
    lm = LanguageModel.load(model, device=device, dtype=dtype, key_function=manifest.key_function)
    with closing(open_searcher(path, index=index, expect=lm.info)) as searcher:
        encoded = encode(documents, lm.tokenizer)
        held_out = unseen(encoded, path)
        if not held_out:
            raise InvalidRequest(
                f"no document to fit on: {len(encoded)} of {len(encoded)} are in {path}", param="sources"
            )
        few = sample(held_out, lm.tokenizer, max_tokens)
        tokens = sum(len(d.tokens) - 1 for d in few)
        observed = observe(
            lm,
            few,
            domains=[searcher.info(())],
            context_length=context_length,
            min_context=min_context,
            statistics=cache or rule == AUTO or known_rule(rule).statistics,
            on_progress=lambda done: report("asking the model about tokens", done, tokens),
        )
        found = tune_searcher(
            searcher,
            observed,
            lm.info.dtype,
            ks=ks,
            quality=quality,
            exact_queries=exact_queries,
            rule=rule,
            skip=skip,
            on_progress=report,
        )
        if cache:
            report("fitting the cache", 0, 1)
            tuning = found.fit.tuning
            neighbors = find(searcher, domain, observed, replace(tuning.search, k=tuning.k)).neighbors
            gates = rule in (FIXED, GATE, AUTO)  # another one was asked for by name
            fitted = fit_cache(observed, neighbors, tuning.temperature, gates=gates)
            found = replace(found, cache=fitted)
            found = replace(found, fit=replace(found.fit, tuning=replace(tuning, cache=fitted.parameters)))
    with_tuning(path, found.fit.tuning)
    return replace(found, left_out=len(encoded) - len(held_out))


def tune_searcher(
    searcher: OpenedSearcher,
    held_out: HeldOut,
    dtype: str,
    *,
    ks: Sequence[int] = KS,
    quality: str = "balanced",
    exact_queries: int = EXACT_QUERIES,
    rule: str = FIXED,
    skip: float = 0.0,
    on_progress: Progress | None = None,
    timing: Timing | None = None,
) -> Tuned:
    """Fit k, how to search, temperature and a lambda rule of one version of a domain to held-out tokens.

    First, by exact search for `exact_queries` of them: k, the smallest of `ks` that is as good as any. Then, for the
    same ones, the fastest setting whose perplexity at this k lies within QUALITIES[quality] of exact search, else the
    nearest one. Then, for all of them, temperature and lambda, as served with both. exact_queries = 0, or an index
    that is exact search itself: the index's own setting, with the smallest of `ks` that is as good as any. Then the
    rule at this temperature; "auto": the one that knnlm.evaluation.rule_choice.compare chooses. skip: the share of the
    searches that a rule may leave out (knnlm.rules.skipping).

    dtype: of the model that made the queries. on_progress hears (what is done now, steps done, steps). timing: measures
    programs in turn. Raises InvalidRequest for a quality that is not known, a number out of range or a version without
    entries, and as `compare` and `skipping`.
    """
    manifest, report = searcher.manifest, on_progress or _silent
    ks = check(manifest, ks, quality, exact_queries, rule, skip)
    search, near = SearchOptions(), True
    rows: tuple[SearchQuality, ...] = ()
    curve: tuple[Point, ...] = ()
    if exact_queries and searcher.recipe != FLAT:
        few = held_out.sample(exact_queries)
        exact = smallest_k(_exact_fits(searcher, few, ks, report))
        ks, curve = [exact.tuning.k], exact.curve
        limit = exact.tuning.knn_perplexity * (1 + QUALITIES[quality])
        measured = _measured(searcher, few, ks[0], limit, report, timing or _in_turn)
        chosen = choose(measured, limit)
        search, near = chosen.search, chosen.perplexity <= limit
        best = SearchQuality(EXACT, SearchOptions(), exact.tuning.knn_perplexity)
        rows = (best, *(replace(row, chosen=row == chosen) for row in measured))
    fits, observed = [], {}
    for i, k in enumerate(ks):  # once for each: fewer neighbors are found among fewer candidates
        report(f"searching, k {k}", i, len(ks))
        observed[k] = find(searcher, manifest.domain, held_out, replace(search, k=k))
        fits.append(fit(observed[k]))
    nearest = find(searcher, manifest.domain, held_out, LEAK_SEARCH).neighbors
    leaked = leak(held_out, nearest, dtype, manifest.model.dtype)
    found = smallest_k(fits)
    report(f"fitting the rule {rule}", len(ks), len(ks))
    tuning = _with_rule(found.tuning, observed[found.tuning.k], rule, skip)
    tuning = replace(tuning, search=search, index=searcher.recipe, quality=rows)
    others = tuple(point for point in curve if point.k != tuning.k)
    return Tuned(Fit(tuning, tuple(sorted((*others, *found.curve), key=lambda p: (p.k, p.temperature)))), leaked, near)


def _with_rule(tuning: Tuning, observations: Observations, rule: str, skip: float) -> Tuning:
    if rule != AUTO:
        return with_rule(tuning, observations, rule, skip=skip)
    rows = compare(observations, tuning.temperature)
    chosen = next(row.name for row in rows if row.chosen)
    return replace(with_rule(tuning, observations, chosen), rules=tuple(rows))


def settings(index: Index) -> list[Ladder]:
    """Ways to search `index` that are worth measuring; the first is its default.

    With its own, less and more effort (lists, or candidates of a graph) and more and more candidates to rescore; all by
    the stored keys, where it rescores by reduced ones or only the nearest; and without rescoring.
    """
    kinds: list[tuple[dict[str, Any], bool]] = [({}, False)]  # Any: the values of search options
    for effort, own in index.efforts.items():
        kinds += [({effort: max(1, round(own * factor))}, factor > 1) for factor in EFFORTS]
    if index.reduced is not None or index.rescored is not None:
        kinds.append(({"rescore": True}, False))
    ladders = []
    for kind, costlier in kinds:
        # where all are rescored by the stored keys as soon as more are asked for, the default's steps are the same ones
        factors = OVERFETCH[:1] if "rescore" in kind and index.reduced is None else OVERFETCH
        steps = [kind if more == 1 else {**kind, "overfetch": index.overfetch * more} for more in factors]
        ladders.append(Ladder({_named(step): SearchOptions(**step) for step in steps}, costlier))
    return [*ladders, Ladder({"rescore=false": SearchOptions(rescore=False)})]


def choose(rows: Sequence[SearchQuality], limit: float) -> SearchQuality:
    """The fastest row whose perplexity is at most `limit`; of rows about as fast, the one with the lowest perplexity.
    Without such a row the one with the lowest perplexity of all."""
    allowed = [row for row in rows if row.perplexity <= limit]
    fastest = max((row.queries_per_second or 0.0 for row in allowed), default=0.0)
    among = [row for row in allowed if (row.queries_per_second or 0.0) >= (1 - SPEED_TOLERANCE) * fastest]
    return min(among or rows, key=lambda row: row.perplexity)


def check(
    manifest: Manifest, ks: Sequence[int], quality: str, exact_queries: int, rule: str, skip: float = 0.0
) -> list[int]:
    """ks, ascending, each once and none beyond the entries. Raises as `tune_searcher`, before a model is asked."""
    if quality not in QUALITIES:
        raise InvalidRequest(f"quality must be one of {', '.join(QUALITIES)}, got {quality!r}", param="quality")
    if rule != AUTO:
        known_rule(rule)
    check_skip(rule, skip)
    if exact_queries < 0:
        raise InvalidRequest(f"exact_queries must be at least 0, got {exact_queries}", param="exact_queries")
    if min(ks, default=0) < 1:
        raise InvalidRequest(f"k must be at least 1, got {min(ks, default=0)}", param="k")
    if not manifest.live_entries:
        raise InvalidRequest(
            f"{manifest.domain} {manifest.version} has no entries, so there is nothing to tune: add documents first"
        )
    return sorted({min(k, manifest.live_entries) for k in ks})


def _exact_fits(searcher: OpenedSearcher, held_out: HeldOut, ks: Sequence[int], report: Progress) -> list[Fit]:
    """What is fitted to exact search, for every k: its k nearest are the first of more."""
    entries = searcher.manifest.entries

    def on_progress(done: int) -> None:
        report(EXACT, done, entries)

    found = exact_neighbors(searcher.datastore, held_out.queries, ks[-1], on_progress=on_progress)
    return [fit(held_out.with_neighbors(Neighbors(found.distances[:, :k], found.values[:, :k]))) for k in ks]


def _measured(
    searcher: OpenedSearcher, held_out: HeldOut, k: int, limit: float, report: Progress, timing: Timing
) -> list[SearchQuality]:
    """Settings with their perplexities and speeds. Of each ladder no more than the first below `limit`, which is the
    cheapest, and none after two that gain nothing."""
    domain, queries = searcher.manifest.domain, held_out.queries
    ladders = settings(searcher.index)
    measured: dict[str, tuple[SearchOptions, float]] = {}
    for done, ladder in enumerate(ladders):
        best, misses = (measured[DEFAULT][1], 1) if ladder.costlier else (math.inf, 0)
        for name, options in ladder.steps.items():
            report(f"searching, {name}", done, len(ladders) + 1)
            perplexity = fit(find(searcher, domain, held_out, replace(options, k=k))).tuning.knn_perplexity
            measured[name] = options, perplexity
            misses += perplexity > best * (1 - GAIN)
            if perplexity <= limit or misses > 1:
                break
            best = min(best, perplexity)
    report("measuring speed", len(ladders), len(ladders) + 1)

    def program(options: SearchOptions) -> Callable[[], int]:
        batch = min(BATCH, len(queries))
        starts = cycle(range(0, len(queries) - batch + 1, batch))

        def search() -> int:
            start = next(starts)
            searcher.search(SearchRequest(domain, queries[start : start + batch], replace(options, k=k)))
            return batch

        return search

    rates = timing({name: program(options) for name, (options, _) in measured.items()})
    return [SearchQuality(name, way, value, rates[name].median) for name, (way, value) in measured.items()]


def _in_turn(programs: Mapping[str, Callable[[], int]]) -> Mapping[str, Rate]:
    return interleave(programs, TIMING_SECONDS, TIMING_ROUNDS)


def _named(options: Mapping[str, float | bool]) -> str:
    """nprobe=8,overfetch=2"""
    shown = {name: str(v).lower() if isinstance(v, bool) else f"{v:g}" for name, v in options.items()}
    return ",".join(f"{name}={value}" for name, value in shown.items()) or DEFAULT


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total
