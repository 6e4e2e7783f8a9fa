"""`knnlm index --report`: indexes of one datastore beside each other."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from knnlm.cli.common import parse_part, print_json, print_table, progress, remark
from knnlm.errors import InvalidRequest, KnnlmError

if TYPE_CHECKING:
    from knnlm.evaluation.index_report import IndexReport


def report(
    path: Path,
    sources: list[str],
    model: str,
    *,
    part: str,
    recipes: str | None,
    queries: int,
    min_context: int | None,
    page: Path | None,
    work: Path | None,
    seed: int,
    device: str,
    dtype: str,
    as_json: bool,
) -> None:
    """Compare indexes of the version in folder `path`, whose own index stays what it is."""
    from knnlm.datastore.manifest import Manifest
    from knnlm.datastore.text import read_documents
    from knnlm.evaluation.collect import observe
    from knnlm.evaluation.index_candidates import candidates, default_candidates
    from knnlm.evaluation.index_page import write_index_page
    from knnlm.evaluation.index_report import index_report
    from knnlm.evaluation.splits import encode, sample, select, unseen
    from knnlm.index.searcher import Searcher
    from knnlm.lm.model import LanguageModel

    if queries < 1:
        raise InvalidRequest(f"queries must be >= 1, got {queries}", param="queries")
    manifest = Manifest.load(path)
    size = (manifest.base_entries, manifest.key_dim)
    chosen = default_candidates(*size) if recipes is None else candidates(recipes.split(), *size)
    documents = list(select(read_documents(sources), parse_part(part)))
    lm = LanguageModel.load(model, device=device, dtype=dtype, key_function=manifest.key_function)
    opened = Searcher.open(path, index="flat", expect=lm.info)  # another model's keys are no queries here
    info = opened.info(())
    opened.close()
    held_out = unseen(encode(documents, lm.tokenizer), path)
    if not held_out:
        raise InvalidRequest(f"no document to ask for that is not in {path}", param="sources")
    few = sample(held_out, lm.tokenizer, queries)
    with progress("tokens", sum(len(d.tokens) - 1 for d in few), description="queries") as update:
        observed = observe(lm, few, domains=[info], min_context=min_context, on_progress=lambda done: update(done))
    folder = path.with_name(f".{path.name}.report") if work is None else work
    try:
        with progress("steps", None, description="comparing") as update:
            found = index_report(
                path,
                observed,
                chosen,
                folder,
                seed=seed,
                on_progress=lambda what, done, total: update(done, what, total),
            )
    except (KnnlmError, KeyboardInterrupt):
        remark(f"what was finished is in {folder}: the same command goes on from there")
        raise
    if work is None:
        shutil.rmtree(folder)
    if page is not None:
        write_index_page(page, found)
    if as_json:
        print_json(found.as_json())
    else:
        print_report(found)


def print_report(found: "IndexReport") -> None:
    """Two tables: what the answers are worth, and how fast they come."""
    columns = ["index", "bytes/key", "stored bytes/key", "build s", *(f"recall@{k}" for k in found.ks)]
    rows = []
    for line in found.lines:
        quality = line.quality
        recalls = [f"{quality.recalls[k]:.4f}" for k in found.ks]
        numbers = [f"{line.bytes_per_key:.1f}", str(line.stored_bytes_per_key), f"{line.build_seconds:.1f}", *recalls]
        rows.append([line.name, *numbers, f"{quality.total_variation:.4f}", f"{quality.perplexity:.4f}"])
    print_table([*columns, "total variation", "perplexity"], rows)
    cells = [(batch, k) for k in found.ks for batch in found.batches]
    print("\nqueries per second, by batch and k:")
    speeds = [[line.name, *(f"{line.speeds[cell]:,.0f}" for cell in cells)] for line in found.lines]
    print_table(["index", *(f"{batch}, {k}" for batch, k in cells)], speeds)
    print(
        f"\n{found.domain} {found.version}: {found.entries:,} entries; {found.queries:,} tokens of {found.documents:,} "
        f"documents; perplexity {found.lm_perplexity:.4f} of the LM alone, {found.exact.perplexity:.4f} with exact "
        f"search at temperature {found.exact.temperature:.5g}, lambda {found.exact.lmbda:.3f}"
    )
