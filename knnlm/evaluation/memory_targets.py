"""Targets of a version: temperature and k of p_kNN fitted to documents of the store, each without itself, then p_kNN of
every entry (knnlm/memory/targets.py)."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np

from knnlm.datastore.catalog import version_path
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest
from knnlm.evaluation.collect import HeldOut, find, observe
from knnlm.evaluation.splits import Encoded, sample
from knnlm.evaluation.tuning import fit, smallest_k
from knnlm.index.contract import Int64
from knnlm.index.sharded_searcher import OpenedSearcher, open_searcher
from knnlm.memory.making import Progress, begun_with, make_targets, shape_of, target_rows
from knnlm.memory.manifest import Begun, Exclude, FitRecord, StoreRecord, TargetSettings, TargetsManifest
from knnlm.neighbors import Neighbors
from knnlm.options import DEFAULT_K, DomainOptions, SearchOptions

EXCLUDE: tuple[Exclude, ...] = ("entry", "document")
TOP = 128  # tokens kept of each distribution
KS = (64, 256, DEFAULT_K)
SAMPLE_TOKENS = 20_000


def build_targets(
    store: str | Path,
    domain: str,
    model: str,
    out: str | Path,
    *,
    version: str | None = None,
    exclude: str = "entry",
    ks: Sequence[int] = KS,
    temperature: float | None = None,
    top: int = TOP,
    max_tokens: int = SAMPLE_TOKENS,
    max_entries: int | None = None,
    part_entries: int = 1 << 14,
    device: str = "auto",
    dtype: str = "auto",
    on_progress: Progress | None = None,
) -> TargetsManifest:
    """Write p_kNN of every entry of a version to the folder `out`, what a memory is trained on.

    model: what made the keys, a Hugging Face folder or hub id; asked only where something is fitted. version: None for
    the current one. exclude: what does not count among the neighbors of an entry, itself alone ("entry") or its
    whole document ("document"). temperature: None to fit it, and k out of `ks`, to a sample of max_tokens tokens of the
    store's documents, whose own documents do not count, mixed with the LM at the best lambda; else `ks` is one number.
    top: tokens kept of each distribution. max_entries: documents are taken, drawn at random, until they have this many
    entries; None for all. part_entries: entries that a killed run loses at most. on_progress hears
    (what is done now, done, total). Raises InvalidRequest for a value out of range, Conflict when `out` exists or was
    begun with other settings, UnknownDomain, UnknownVersion, DatastoreMismatch, DatastoreError, and as
    LanguageModel.load does.
    """
    report: Progress = on_progress or _silent
    target = Path(out)
    sizes = {"top": top, "max_tokens": max_tokens, "part_entries": part_entries}
    _check(exclude, ks, temperature, **sizes, max_entries=1 if max_entries is None else max_entries)
    path = version_path(store, domain, version)
    with closing(open_searcher(path)) as searcher:
        manifest, datastore = searcher.manifest, searcher.datastore
        if not manifest.live_entries:
            raise InvalidRequest(f"{domain} {manifest.version} has no entries, so there is nothing to imitate")
        search = SearchOptions() if manifest.tuning is None else manifest.tuning.message().search
        asked = {n: v for n, v in search.asked().items() if n in searcher.index.efforts or n == "overfetch"}
        ks = sorted({min(k, manifest.live_entries) for k in ks})
        settings = TargetSettings(
            store=StoreRecord.of(manifest),
            exclude="document" if exclude == "document" else "entry",
            k=ks[-1],
            temperature=temperature or 1.0,
            top=top,
            index=searcher.recipe,
            search=asked,
            part_entries=part_entries,
            max_entries=max_entries,
        )
        earlier = begun_with(target)
        if temperature is not None:
            begun = Begun(settings=settings)
        elif earlier is not None and earlier.fit is not None and earlier.settings.k in ks:
            fitted = {"k": earlier.settings.k, "temperature": earlier.settings.temperature}
            begun = Begun(settings=settings.model_copy(update=fitted), fit=earlier.fit)
        else:
            held_out, ids = _sample(searcher, model, max_tokens, device, dtype, report)
            begun = _fitted(searcher, settings, held_out, ids, ks, report)
        return make_targets(searcher, datastore, _order(searcher, max_entries), begun, target, report)


def _sample(
    searcher: OpenedSearcher, model: str, max_tokens: int, device: str, dtype: str, report: Progress
) -> tuple[HeldOut, Int64]:
    """What the LM says about some of the store's own text, and the entries (n,) that it is."""
    from knnlm.lm.model import LanguageModel

    manifest, datastore = searcher.manifest, searcher.datastore
    lm = LanguageModel.load(model, device=device, dtype=dtype, key_function=manifest.key_function)
    Datastore.open(datastore.path, expect=lm.info).close()
    stored = [
        Encoded(str(number), "", datastore.tokens_of(number)) for number, row in datastore.live_rows() if row.entries
    ]
    few = sample(stored, lm.tokenizer, max_tokens)
    tokens = sum(len(d.tokens) - 1 for d in few)
    report("asking the model about tokens", 0, tokens)
    held_out = observe(
        lm,
        few,
        domains=[searcher.info(())],
        on_progress=lambda done: report("asking the model about tokens", done, tokens),
    )
    firsts = datastore.documents.first_entries
    ids = [firsts[int(d.id)] + np.arange(len(d.tokens) - 1) for d in few]
    return held_out, np.concatenate(ids)


def _fitted(
    searcher: OpenedSearcher,
    settings: TargetSettings,
    held_out: HeldOut,
    ids: Int64,
    ks: Sequence[int],
    report: Progress,
) -> Begun:
    """The settings with the smallest of ks that is as good as any, and its temperature, for neighbors in other
    documents."""
    options = SearchOptions.of({**settings.search, "k": ks[-1], "rescore": True, "exclude_own_documents": True})
    observed = find(
        searcher,
        searcher.manifest.domain,
        held_out,
        options,
        exclude_entries=ids,
        on_progress=lambda done: report("neighbors of a sample", done, len(ids)),
    )
    report("fitting temperature and k", len(ids), len(ids))
    near, values = observed.neighbors.distances, observed.neighbors.values
    best = smallest_k(fit(held_out.with_neighbors(Neighbors(near[:, :k], values[:, :k]))) for k in ks).tuning
    chosen = settings.model_copy(update={"k": best.k, "temperature": best.temperature})
    without = chosen.model_copy(update={"exclude": "document"})
    record = FitRecord(
        tokens=best.tokens,
        documents=best.documents,
        lmbda=best.lmbda,
        lm_perplexity=best.lm_perplexity,
        knn_perplexity=best.knn_perplexity,
        shape=shape_of(target_rows(searcher, searcher.datastore, ids, without).sums),
    )
    return Begun(settings=chosen, fit=record)


def _order(searcher: OpenedSearcher, max_entries: int | None) -> Int64:
    """Live entries, those of the base as the index groups them; of some documents only, once they have max_entries."""
    grouped, datastore = searcher.index.grouped(), searcher.datastore
    wanted = np.zeros(datastore.entries, np.bool_)
    rows = list(datastore.live_rows())
    left = datastore.entries if max_entries is None else max_entries
    for i in np.random.default_rng(0).permutation(len(rows)).tolist():
        number, row = rows[i]
        first = int(datastore.documents.first_entries[number])
        wanted[first : first + row.entries] = left > 0
        left -= row.entries
    chosen = np.flatnonzero(wanted)
    if grouped is None:
        return chosen
    return np.concatenate([grouped[wanted[grouped]], chosen[chosen >= len(datastore.keys)]])


def _check(exclude: str, ks: Sequence[int], temperature: float | None, **sizes: int) -> None:
    if exclude not in EXCLUDE:
        raise InvalidRequest(f"exclude must be one of {', '.join(EXCLUDE)}, got {exclude!r}", param="exclude")
    for name, value in {"k": min(ks, default=0), **sizes}.items():
        if value < 1:
            raise InvalidRequest(f"{name} must be at least 1, got {value}", param=name)
    if temperature is not None:
        DomainOptions("", temperature=temperature)  # refuses what is out of range
        if len(ks) != 1:
            raise InvalidRequest(f"a given temperature belongs to one k, got {list(ks)}", param="k")


def _silent(what: str, done: int, total: int) -> None:
    del what, done, total
