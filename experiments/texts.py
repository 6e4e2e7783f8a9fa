"""The text that experiments run on: WikiText-103 and domains in a folder, or what is on every machine.

A folder may hold, at any depth, `wiki.train*.tokens`, `wiki.valid.tokens` and `wiki.test.tokens` (WikiText-103, of
which the training file may be a part), and domains: folders or files of documents as `knnlm build` reads them. Without
one, docstrings of installed packages are the domains, as in the demo.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT
from demo import corpus
from knnlm.datastore.text import read_documents
from knnlm.errors import InvalidRequest
from knnlm.evaluation.splits import Part, part_of
from knnlm.messages import Document

__all__ = ["DOCSTRINGS", "WIKITEXT", "Corpus", "Texts", "find_texts", "of_documents"]

SHARED = ROOT.parent / "shared" / "data"  # text that may lie beside a checkout
WIKITEXT = "wikitext103"
DOCSTRINGS = "docstrings of installed packages"
PREFERRED = ("recipes", "peps", "movie_reviews")  # domains with the most to find come first
MAX_DOMAINS = 2  # more would show the same again
ARTICLE = re.compile(r"^ = [^=].*[^=] = $")
MIN_DOCUMENTS = 4


@dataclass(frozen=True)
class Corpus:
    """Documents to store and train on, to fit on, and to report on. sha256: of the ids and texts of all."""

    name: str
    store: tuple[Document, ...]
    tune: tuple[Document, ...]
    report: tuple[Document, ...]
    sha256: str

    def part(self, part: Part) -> tuple[Document, ...]:
        """Raises KeyError for Part.ALL."""
        return {Part.STORE: self.store, Part.TUNE: self.tune, Part.REPORT: self.report}[part]


@dataclass(frozen=True)
class Texts:
    """source: what was read, for people. domains: at least one. wikitext: None where it is not there."""

    source: str
    domains: tuple[Corpus, ...]
    wikitext: Corpus | None

    @property
    def main(self) -> Corpus:
        """The domain of what runs on one domain alone."""
        return self.domains[0]

    @property
    def prose(self) -> Corpus:
        """WikiText-103, or the last domain where there is none."""
        return self.wikitext or self.domains[-1]

    @property
    def all(self) -> tuple[Corpus, ...]:
        return (*self.domains, *((self.wikitext,) if self.wikitext else ()))

    def named(self, name: str) -> Corpus:
        """Raises KeyError for a corpus that is not there."""
        return {c.name: c for c in self.all}[name]


def find_texts(folder: Path | None = None) -> Texts:
    """What `folder` holds; without one, what lies beside the checkout, or else docstrings of installed packages,
    which the name "docstrings" asks for.

    Raises SystemExit for a folder that holds neither WikiText-103 nor a domain.
    """
    if folder is None and SHARED.is_dir():
        folder = SHARED
    if folder is None or (folder == Path("docstrings") and not folder.exists()):
        found = [of_documents(f"docstrings of {name}", _docstrings(name)) for name in corpus.DOMAINS]
        return Texts(DOCSTRINGS, tuple(found), None)
    if not folder.is_dir():
        raise SystemExit(f"--text {folder}: no such folder")
    domains = list(_domains(folder))
    wikitext = _wikitext(folder)
    if not domains and wikitext is None:
        raise SystemExit(f"--text {folder}: expected wiki.*.tokens or .jsonl files of documents, found neither")
    domains.sort(key=lambda c: (PREFERRED.index(c.name) if c.name in PREFERRED else len(PREFERRED), c.name))
    source = ", ".join(c.name for c in [*domains[:MAX_DOMAINS], *([wikitext] if wikitext else [])])
    return Texts(source, tuple(domains[:MAX_DOMAINS]) or tuple(filter(None, [wikitext])), wikitext)


def of_documents(name: str, documents: Iterable[Document]) -> Corpus:
    """A corpus split by the ids of its documents: 8 of 10 to store, one to tune, one to report.

    Within each part they stand in the order of a hash, so that a beginning of it is a sample. Raises SystemExit when a
    part is left empty.
    """
    parts: dict[Part, list[Document]] = {Part.STORE: [], Part.TUNE: [], Part.REPORT: []}
    for document in documents:
        parts[part_of(document.id)].append(document)
    return _corpus(name, *(sorted(parts[p], key=_place) for p in (Part.STORE, Part.TUNE, Part.REPORT)))


def _corpus(name: str, store: Sequence[Document], tune: Sequence[Document], report: Sequence[Document]) -> Corpus:
    digest = hashlib.sha256()
    for part in (store, tune, report):
        if not part:
            raise SystemExit(f"{name}: too few documents to store, to tune and to report on")
        for document in part:
            digest.update(f"{document.id}\0{document.text}\0".encode("utf-8", "surrogatepass"))
    return Corpus(name, tuple(store), tuple(tune), tuple(report), digest.hexdigest())


def _domains(folder: Path) -> Iterator[Corpus]:
    for file in sorted(folder.rglob("*.jsonl")):
        try:
            documents = list(read_documents([file]))
        except InvalidRequest as err:
            raise SystemExit(err.message) from err
        if len(documents) >= MIN_DOCUMENTS and {part_of(d.id) for d in documents} >= set(Part) - {Part.ALL}:
            yield of_documents(file.parent.name if file.stem == "docs" else file.stem, documents)


def _wikitext(folder: Path) -> Corpus | None:
    files = [sorted(folder.rglob(f"wiki.{part}*.tokens")) for part in ("train", "valid", "test")]
    if not all(files):
        return None
    try:
        return _corpus(WIKITEXT, *(list(_articles(found[0])) for found in files))
    except UnicodeDecodeError as err:
        raise SystemExit(f"{folder}: wiki.*.tokens are not UTF-8: {err}") from err


def _articles(file: Path) -> Iterator[Document]:
    """The articles of a file of WikiText-103, each from its heading on."""
    lines: list[str] = []
    number = 0
    with file.open(encoding="utf-8") as text:
        for line in text:
            if ARTICLE.match(line.rstrip("\n")) and any(part.strip() for part in lines):
                yield Document(f"{file.name}/{number}", "".join(lines).strip())
                lines, number = [], number + 1
            lines.append(line)
    if any(part.strip() for part in lines):
        yield Document(f"{file.name}/{number}", "".join(lines).strip())


def _docstrings(name: str) -> Iterator[Document]:
    return (Document(row["id"], row["text"]) for row in corpus.documents(name))


def _place(document: Document) -> tuple[bytes, str]:
    return hashlib.sha256(f"experiment {document.id}".encode("utf-8", "surrogatepass")).digest(), document.id
