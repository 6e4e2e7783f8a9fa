"""The datastore that benchmarks run on: real keys of the pocket model over real text, made once and kept.

    from benchmarks.data import prepare
    prepared = prepare(100_000)

Documents are taken in the order of a hash of their ids, whole, each that still fits: so a smaller datastore holds
mostly what a larger one does, and no kind of text comes first. Queries come from documents that are held out, as
`knnlm build --part store` would. Everything lies under build/bench/, in a folder named by what it was made from.
"""

import hashlib
import importlib.metadata
import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.harness import ROOT
from demo import corpus
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import locked, sha256_of
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.progress import Progress
from knnlm.datastore.reader import Datastore
from knnlm.datastore.text import read_documents
from knnlm.datastore.updates.revise import with_tuning
from knnlm.evaluation.collect import observe
from knnlm.evaluation.splits import Part, encode, part_of, sample, unseen
from knnlm.evaluation.tuning import Observations, fit
from knnlm.index.build import build_index, suited
from knnlm.index.searcher import Searcher
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document, SearchRequest
from knnlm.options import SearchOptions

__all__ = ["DOMAIN", "MODEL", "Prepared", "add_datastore_option", "asked_for", "cut", "prepare"]

DOMAIN, VERSION = "bench", "v1"
MODEL = ROOT / "models" / "pocket"
FOLDER = ROOT / "build" / "bench"
MORE = {"torch": ("",), "transformers": ("",)}  # text for sizes that the domains of the demo are too small for
MIN_CONTEXT = 64
QUERIES = 4096
TUNED_K = 1024
HELD_OUT = "held_out.jsonl"
NEAR = 0.0005  # of the size may be missing: then the next document is not looked for any more
LINE_SECONDS = 10.0
FORMAT = 2  # version of the folders under build/bench: a new one has all of them made again


@dataclass(frozen=True)
class Prepared:
    """store/domain is current and has its default index and a tuning; `path` is the version's folder.

    queries: (q, d) float32, keys of held-out tokens. lm_log_probs: (q,) float32 of those tokens, targets: (q,) int32.
    documents: the held-out texts that they come from, cut to what was used. model: the folder of the model.
    """

    store: Path
    domain: str
    path: Path
    model: Path
    queries: npt.NDArray[np.float32]
    lm_log_probs: npt.NDArray[np.float32]
    targets: npt.NDArray[np.int32]
    documents: tuple[Document, ...]

    @property
    def entries(self) -> int:
        return Manifest.load(self.path).entries


def prepare(size: int, text: Sequence[Path] = (), *, queries: int = QUERIES) -> Prepared:
    """A datastore of `size` entries, or a few less, since no document is cut. Of `text`; docstrings by default.

    Made when it is not there; then it takes about `size` / 5,000 seconds on two cores. Its index is the default one of
    this very program: it is built anew when that has changed. Exits with a sentence when the text is too small.
    """
    folder = FOLDER / f"{size}-{_fingerprint(text)}"
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, wait=True, doing="preparing"):
        catalog = Catalog(folder / "store")
        if not catalog.domains():
            _build(folder, catalog, size, text)
        path = catalog.path(DOMAIN, VERSION)
        held_out = folder / f"queries-{queries}.npz"
        if not held_out.exists():
            _observe(folder, held_out, queries)
        with np.load(held_out, allow_pickle=False) as arrays:
            prepared = Prepared(
                store=catalog.store,
                domain=DOMAIN,
                path=path,
                model=MODEL,
                queries=arrays["queries"],
                lm_log_probs=arrays["lm_log_probs"],
                targets=arrays["targets"],
                documents=tuple(read_documents([held_out.with_suffix(".jsonl")])),
            )
        _index(prepared)
    return prepared


def add_datastore_option(parser: ArgumentParser) -> None:
    """For programs that need no service and no training text: a datastore of one's own."""
    parser.add_argument(
        "--datastore", type=Path, metavar="FOLDER",
        help="folder of a version that the pocket model made, instead of --size; --text is then what to ask for",
    )  # fmt: skip


def asked_for(options: Namespace, *, queries: int = QUERIES) -> Prepared:
    """What --datastore names, or else `prepare`. Of the text, what the datastore holds is left out."""
    if options.datastore is None:
        return prepare(options.size, options.text, queries=queries)
    if not options.text:
        raise SystemExit("--datastore needs --text: documents that it does not hold, to ask for")
    path = options.datastore.resolve()
    lm = LanguageModel.load(str(MODEL))
    Datastore.open(path, expect=lm.info).close()
    held_out = unseen(encode(read_documents(options.text), lm.tokenizer), path)
    if not held_out:
        raise SystemExit(f"{path} holds every document of --text: give others")
    few = sample(held_out, lm.tokenizer, queries)
    observed = observe(lm, few, min_context=MIN_CONTEXT)
    return Prepared(
        store=path.parent.parent,
        domain=path.parent.name,
        path=path,
        model=MODEL,
        queries=observed.queries,
        lm_log_probs=observed.lm_log_probs,
        targets=observed.targets,
        documents=tuple(Document(d.id, d.text) for d in few),
    )


def cut(documents: Iterable[Document], size: int, entries: Callable[[Document], int]) -> list[Document]:
    """Documents of the stored part of `documents`, in the order of a hash: each that still fits into `size` entries.

    entries: how many a document gives. Raises ValueError when all together are fewer than `size`.
    """
    chosen = []
    total = left = 0
    for document in sorted(documents, key=lambda d: (_digest(f"benchmark {d.id}"), d.id)):
        if part_of(document.id) is not Part.STORE:
            continue
        length = entries(document)
        total += length
        if 0 < length <= size - left:
            chosen.append(document)
            left += length
        if left > size - NEAR * size and total >= size:
            break
    if total < size:
        raise ValueError(f"the text gives {total:,} entries, {size:,} were asked for")
    return chosen


def _build(folder: Path, catalog: Catalog, size: int, text: Sequence[Path]) -> None:
    """Write the documents, stored and held out, then build the datastore. Continues where it was stopped."""
    lm = LanguageModel.load(str(MODEL))
    sources = [list(read_documents(list(text)))] if text else _default_texts()
    for documents in sources:
        try:
            stored = cut(documents, size, lambda d: max(0, len(lm.tokenizer.encode(d.text)) - 1))
        except ValueError as err:
            problem = str(err)
        else:
            break
    else:
        raise SystemExit(f"{problem}: give more with --text, or a smaller --size")
    others = [d for d in documents if part_of(d.id) is not Part.STORE]
    if not others:
        raise SystemExit(f"none of {len(documents)} documents is held out for queries: more of them are needed")
    _write(folder / HELD_OUT, others)
    build(stored, lm, catalog, DOMAIN, version=VERSION, min_context=MIN_CONTEXT, on_progress=_Line())
    catalog.activate(DOMAIN, VERSION)


def _default_texts() -> Iterator[list[Document]]:
    """What the demo uses; then, when that is too little, more of what is installed."""
    found = {package: list(_documents(package, parts)) for package, parts in corpus.DOMAINS.items()}
    yield [d for documents in found.values() for d in documents]
    found |= {package: list(_documents(package, parts)) for package, parts in MORE.items()}
    yield [d for documents in found.values() for d in documents]


def _documents(package: str, parts: tuple[str, ...]) -> Iterator[Document]:
    return (Document(row["id"], row["text"]) for row in corpus.documents(package, parts))


def _observe(folder: Path, file: Path, queries: int) -> None:
    """What the model says about the first `queries` tokens of the held-out documents: an even sample of them."""
    lm = LanguageModel.load(str(MODEL))
    few = sample(encode(read_documents([folder / HELD_OUT]), lm.tokenizer), lm.tokenizer, queries)
    observed = observe(lm, few, min_context=MIN_CONTEXT)
    _write(file.with_suffix(".jsonl"), [Document(d.id, d.text) for d in few])
    np.savez(file, queries=observed.queries, lm_log_probs=observed.lm_log_probs, targets=observed.targets)


def _index(prepared: Prepared) -> None:
    """The default index, and a tuning fitted to what it finds; where they are not there already."""
    manifest = Manifest.load(prepared.path)
    recipe = suited(prepared.path).recipe
    if manifest.index.recipe != recipe:
        build_index(prepared.path, recipe)
    elif manifest.tuning is not None:
        return
    searcher = Searcher.open(prepared.path)
    try:
        found = searcher.search(SearchRequest(DOMAIN, prepared.queries, SearchOptions(k=TUNED_K))).neighbors
    finally:
        searcher.close()
    observed = Observations(prepared.lm_log_probs, prepared.targets, found, len(prepared.documents))
    with_tuning(prepared.path, fit(observed).tuning)


def _fingerprint(text: Sequence[Path]) -> str:
    """A hash of what a datastore would be made from: the model, and the files of text or the packages that give it."""
    parts = [str(FORMAT), sha256_of(MODEL / "model.safetensors"), sha256_of(MODEL / "tokenizer.json")]
    if text:
        for path in text:
            if not path.exists():
                raise SystemExit(f"--text {path}: there is no such file or folder")
            files = sorted(f for f in path.rglob("*") if f.is_file()) if path.is_dir() else [path]
            parts += [f"{f.resolve()} {f.stat().st_size} {f.stat().st_mtime_ns}" for f in files]
    else:
        parts += [f"{package} {importlib.metadata.version(package)}" for package in corpus.DOMAINS | MORE]
    return _digest("\n".join(parts)).hex()[:12]


def _write(file: Path, documents: Iterable[Document]) -> None:
    rows = (json.dumps({"id": d.id, "text": d.text}, ensure_ascii=False) + "\n" for d in documents)
    file.write_text("".join(rows), encoding="utf-8")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()


class _Line:
    """A line on standard error now and then."""

    def __init__(self) -> None:
        self._said = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            of = f" of {progress.entries_total:,}" if progress.entries_total else ""
            print(f"preparing: {progress.entries_done:,}{of} entries", file=sys.stderr, flush=True)
