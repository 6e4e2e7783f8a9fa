"""What experiments share: models, datastores and what both said about held-out tokens, made once and kept.

    lab.view(Sight(BASE, "recipes"))     the base beside a datastore of recipes: log-probabilities, neighbors, fitted

Everything lies in one folder per scale, text and model. A file is written whole or not at all, and follows from its
name: what was interrupted is continued, and gives the same numbers. Tables that only mix otherwise come from it.
"""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.models import BASE, Learner, train
from experiments.scale import Scale
from experiments.texts import Texts
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import write_atomic
from knnlm.datastore.reader import Datastore
from knnlm.evaluation.collect import HeldOut, observe
from knnlm.evaluation.splits import Encoded, Part, encode, sample
from knnlm.evaluation.tuning import Observations, fit
from knnlm.index.build import build_index
from knnlm.index.contract import to_float32
from knnlm.index.flat import Flat
from knnlm.index.rescore import nearest_first, rescored
from knnlm.index.searcher import Searcher
from knnlm.lm import loading
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document, LmStatistics, SearchRequest
from knnlm.mixture import Component, mix
from knnlm.neighbors import Neighbors, target_log_probs
from knnlm.options import SearchOptions

__all__ = ["BASE", "Lab", "Learner", "Seen", "Sight", "View", "kept", "mixed", "nearest"]

Floats = npt.NDArray[np.float64]
Arrays = Mapping[str, npt.NDArray[np.generic]]

VERSION = "v1"
SPARE_CANDIDATES = 8
QUERY_BLOCK = 1024
KEY_BLOCK = 1 << 17  # keys held as float32 at a time
MAX_VIEWS = 6  # held in memory
MAX_MODELS = 3


@dataclass(frozen=True)
class Sight:
    """A language model beside a datastore of `corpus` that it made itself. share, draw: of the documents to store, in
    the random order `draw`: smaller shares are parts of larger ones. k: None is the scale's. long: held-out tokens in
    long stretches."""

    learner: Learner
    corpus: str
    share: float = 1.0
    draw: int = 0
    key_function: str = "ffn_input"
    k: int | None = None
    long: bool = False


@dataclass(frozen=True)
class Seen:
    """n held-out tokens of one part. lm: (n,) natural log-probabilities. documents: (n,) the document of each.
    neighbors: with ids, entries of the whole datastore. held: the rest that was observed, keys among it."""

    lm: Floats
    targets: npt.NDArray[np.int32]
    documents: npt.NDArray[np.int64]
    neighbors: Neighbors
    held: HeldOut

    def knn(self, temperature: float, k: int | None = None) -> Floats:
        """(n,) log p_kNN of the tokens that came, from the k nearest; -inf where none of them stores the token."""
        near = self.neighbors
        return target_log_probs(Neighbors(near.distances[:, :k], near.values[:, :k]), self.targets, temperature)

    def observations(self, k: int | None = None) -> Observations:
        """What knnlm.evaluation.tuning fits to."""
        near = Neighbors(self.neighbors.distances[:, :k], self.neighbors.values[:, :k])
        return Observations(
            self.held.lm_log_probs, self.targets, near, self.held.documents, self.held.statistics, self.documents
        )


@dataclass(frozen=True)
class View:
    """Held-out tokens to fit on and to report on; temperature and lambda as fitted to the former with all neighbors."""

    tune: Seen
    report: Seen
    temperature: float
    lmbda: float

    @cached_property
    def knn(self) -> Floats:
        """(n,) log p_kNN of the reported tokens."""
        return self.report.knn(self.temperature)

    @cached_property
    def mixed(self) -> Floats:
        """(n,) log-probabilities of the reported tokens with retrieval."""
        return mixed(self.report.lm, self.knn, self.lmbda)


class Lab:
    """One scale, one text, one base model, and the folder where everything is kept."""

    def __init__(
        self, scale: Scale, texts: Texts, folder: Path, *, model: str | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:  # fmt: skip
        """folder: made where it is not there. model: folder or hub id of the base. say: hears what is being done."""
        from benchmarks.data import MODEL

        self.scale = scale
        self.texts = texts
        self.base = loading.resolve(model or scale.model or str(MODEL))
        self.folder = folder
        self.say = say
        self.asked: set[object] = set()  # what was used, as experiments declare their needs
        self.made: dict[str, float] = {}  # the seconds that making what was used took once, by its name
        self._models: dict[tuple[str, str], LanguageModel] = {}
        self._views: dict[Sight, View] = {}
        self._trained = 0.0  # seconds in which models were trained, which a view that needs them does not count
        self._capped: dict[str, tuple[list[Document], list[int]]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def base_sha256(self) -> str:
        return loading.weights_sha256(self.base)

    def documents(self, corpus: str, part: Part, *, long: bool = False) -> list[Encoded]:
        """Held-out documents, cut to the scale's tokens."""
        scale = self.scale
        tokens = {Part.TUNE: scale.tune_tokens, Part.REPORT: scale.report_tokens}[part]
        tokens = scale.long_tokens if long else tokens
        tokenizer = self.model(BASE).tokenizer
        return sample(encode(self.texts.named(corpus).part(part), tokenizer), tokenizer, tokens)

    def stored(self, corpus: str, share: float = 1.0, draw: int = 0) -> list[Document]:
        """Documents of the datastore of `corpus`, or, with a share, the beginning of a random order of them."""
        documents, lengths = self._cap(corpus)
        return [documents[i] for i in sorted(_chosen(np.array(lengths), share, draw))]

    def stored_tokens(self, corpus: str, share: float = 1.0) -> int:
        """Entries of `stored`, about."""
        return round(share * sum(self._cap(corpus)[1]))

    def weights(self, learner: Learner) -> Path:
        """The Hugging Face folder of a model, trained where it is not there."""
        if learner.corpus is None and not learner.layers:
            return self.base
        out = self.folder / "models" / learner.name
        if not (out / "config.json").is_file():
            out.parent.mkdir(exist_ok=True)
            begun = time.monotonic()
            base = self.model(BASE)
            if learner.corpus is None:
                raise ValueError("a model from scratch needs a corpus")
            documents = self.stored(learner.corpus, learner.share, learner.draw)
            tokens = [d.tokens for d in encode(documents, base.tokenizer)]
            self.say(f"training {learner.name}")
            vocab_size = base.info.vocab_size
            train(learner, self.base, tokens, out, self.scale, vocab_size, lambda done, of: self._step(done, of, begun))
            self.took(out, seconds := time.monotonic() - begun)
            self._trained += seconds
        self.use(learner, out)
        return out

    def use(self, need: object, folder: Path) -> None:
        """Note that `folder`, made for `need`, is used."""
        self.asked.add(need)
        self.note(folder)

    def note(self, folder: Path) -> None:
        """Note how long `folder` once took."""
        path = folder.with_name(f"{folder.name}.seconds")
        self.made[folder.relative_to(self.folder).as_posix()] = float(path.read_text()) if path.is_file() else 0.0

    def took(self, folder: Path, seconds: float) -> None:
        """Keep how long making `folder` took."""
        write_atomic(folder.with_name(f"{folder.name}.seconds"), f"{seconds:.1f}".encode())

    def model(self, learner: Learner, key_function: str = "ffn_input") -> LanguageModel:
        """Loaded; the last few stay."""
        key = (learner.name, key_function)
        if key not in self._models:
            if len(self._models) >= MAX_MODELS:
                self._models.pop(next(k for k in self._models if k != ("base", "ffn_input")))
            folder = self.weights(learner)
            self._models[key] = LanguageModel.load(str(folder), key_function=key_function, prefix_cache_bytes=0)
        elif learner != BASE:
            self.weights(learner)
        return self._models[key]

    def store(self, learner: Learner, corpus: str, key_function: str = "ffn_input") -> Path:
        """The folder of the datastore's version, whole, built where it is not there. Its store folder is two above it,
        its domain the name of its parent."""
        catalog = Catalog(self.folder / "stores" / f"{learner.name}-{key_function}")
        domain = corpus.replace(" ", "-")
        if domain not in catalog.domains():
            self.say(f"building {catalog.store.name}/{domain}")
            path = build(
                self.stored(corpus), self.model(learner, key_function), catalog, domain, version=VERSION,
                context_length=self.scale.context, min_context=self.scale.min_context,
            )  # fmt: skip
            build_index(path, self.scale.index)
            catalog.activate(domain, VERSION)
        return catalog.path(domain, VERSION)

    def held(
        self, learner: Learner, corpus: str, part: Part, *, key_function: str = "ffn_input", long: bool = False
    ) -> HeldOut:
        """What a model says about the held-out tokens of a part."""
        name = f"{learner.name}-{key_function}"
        return self.held_by(name, lambda: self.model(learner, key_function), corpus, part, long=long)

    def held_by(
        self, name: str, model: Callable[[], LanguageModel], corpus: str, part: Part, *, long: bool = False
    ) -> HeldOut:
        """The same of any model, under a name of its own. It must have the base's tokenizer."""

        def make() -> Arrays:
            found = observe(
                model(), documents, context_length=self.scale.context, min_context=self.scale.min_context,
                statistics=True,
            )  # fmt: skip
            lm = found.statistics
            assert lm is not None
            assert found.depths is not None
            assert found.document_of is not None
            return {
                "queries": found.queries, "lm": found.lm_log_probs, "targets": found.targets, "depths": found.depths,
                "documents": found.document_of, "entropy": lm.entropy, "largest": lm.largest_log_prob,
            }  # fmt: skip

        documents = self.documents(corpus, part, long=long)
        a = self.kept(f"held/{name}-{corpus}-{part}{'-long' if long else ''}", make)
        lm = LmStatistics(a["entropy"], a["largest"])  # type: ignore[arg-type]
        return HeldOut(a["queries"], a["lm"], a["targets"], len(documents), a["depths"], lm, a["documents"])  # type: ignore[arg-type]

    def view(self, sight: Sight) -> View:
        """Held-out tokens of a corpus beside a datastore, searched and fitted."""
        begun, trained = time.monotonic(), self._trained
        out = self.folder / f"views/{_name(sight)}"
        if sight not in self._views:
            path = out.with_name(f"{out.name}.json")
            new = not path.is_file()
            if new:
                self.say(f"looking up {_name(sight)}")
            tune, report = (self._seen(sight, part) for part in (Part.TUNE, Part.REPORT))
            if new:
                tuned = fit(tune.observations()).tuning
                self.took(out, time.monotonic() - begun - (self._trained - trained))
                write_atomic(path, json.dumps({"temperature": tuned.temperature, "lambda": tuned.lmbda}).encode())
            raw = json.loads(path.read_text())
            while len(self._views) >= MAX_VIEWS:
                self._views.pop(next(iter(self._views)))
            self._views[sight] = View(tune, report, raw["temperature"], raw["lambda"])
        self.use(sight, out)
        return self._views[sight]

    def kept(self, name: str, make: Callable[[], Arrays]) -> dict[str, npt.NDArray[np.generic]]:
        """The arrays of a name, made where they are not there."""
        return kept(self.folder / f"{name}.npz", make)

    def _seen(self, sight: Sight, part: Part) -> Seen:
        held = self.held(sight.learner, sight.corpus, part, key_function=sight.key_function, long=sight.long)

        def make() -> Arrays:
            path = self.store(sight.learner, sight.corpus, sight.key_function)
            k = sight.k or self.scale.k
            rows = None if sight.share >= 1 else self._rows(path, sight)
            found = self._search(path, held.queries, k, rows)
            assert found.ids is not None
            return {"distances": found.distances, "values": found.values, "ids": found.ids.astype(np.int32)}

        a = self.kept(f"views/{_name(sight)}-{part}", make)
        near = Neighbors(a["distances"], a["values"], a["ids"].astype(np.int64))  # type: ignore[arg-type]
        assert held.document_of is not None
        return Seen(held.lm_log_probs.astype(np.float64), held.targets, held.document_of, near, held)

    def _search(
        self, path: Path, queries: npt.NDArray[np.floating], k: int, rows: npt.NDArray[np.int64] | None
    ) -> Neighbors:
        datastore = Datastore.open(path)
        if self.scale.index == "flat" or rows is not None:
            return nearest(datastore, queries, k, rows)
        searcher = Searcher.open(path)
        parts = []
        for start in range(0, len(queries), QUERY_BLOCK):
            some = queries[start : start + QUERY_BLOCK]
            request = SearchRequest(path.parent.name, some, SearchOptions(k=k, rescore=True), ids=True)
            parts.append(searcher.search(request).neighbors)
        searcher.close()
        ids = np.concatenate([p.ids for p in parts if p.ids is not None])
        return Neighbors(np.concatenate([p.distances for p in parts]), np.concatenate([p.values for p in parts]), ids)

    def _rows(self, path: Path, sight: Sight) -> npt.NDArray[np.int64]:
        """Entries of the chosen documents, ascending."""
        datastore = Datastore.open(path)
        lengths = [row.entries for _, row in datastore.live_rows()]
        starts = np.cumsum([0, *lengths])
        chosen = sorted(_chosen(np.array(lengths), sight.share, sight.draw))
        return np.concatenate([np.arange(starts[i], starts[i + 1]) for i in chosen])

    def _cap(self, corpus: str) -> tuple[list[Document], list[int]]:
        """Documents to store, at most the scale's tokens of them, and the entries of each."""
        if corpus in self._capped:
            return self._capped[corpus]
        tokenizer = self.model(BASE).tokenizer
        documents: list[Document] = []
        lengths: list[int] = []
        for document in self.texts.named(corpus).store:
            entries = len(tokenizer.encode(document.text)) - 1
            if entries > 0 and sum(lengths) + entries <= self.scale.store_tokens:
                documents.append(document)
                lengths.append(entries)
            if sum(lengths) > 0.98 * self.scale.store_tokens:
                break
        if not documents:
            raise SystemExit(f"{corpus}: no document of at most {self.scale.store_tokens} tokens")
        self._capped[corpus] = documents, lengths
        return self._capped[corpus]

    def _step(self, done: int, of: int, begun: float) -> None:
        if done % 20 == 0:
            rest = (time.monotonic() - begun) / done * (of - done)
            self.say(f"  step {done} of {of}, {rest:.0f} s left")


def nearest(
    datastore: Datastore, queries: npt.NDArray[np.floating], k: int, rows: npt.NDArray[np.int64] | None = None
) -> Neighbors:
    """The k nearest of the entries `rows`, ascending (None: of all), by squared L2 to the stored keys, with ids."""
    keys = datastore.keys
    rows = np.arange(len(keys)) if rows is None else rows
    k = min(k, len(rows))
    wanted = min(k + SPARE_CANDIDATES, len(rows))
    asked = to_float32(queries)
    near = np.empty((len(asked), 0), np.float32)
    found = np.empty((len(asked), 0), np.int64)
    for start in range(0, len(rows), KEY_BLOCK):
        block = rows[start : start + KEY_BLOCK]
        index = Flat().opened(np.asarray(keys[block]))
        distances, ids = index.search(asked, min(wanted, len(block)))
        index.close()
        both = np.concatenate([near, distances], axis=1), np.concatenate([found, block[ids]], axis=1)
        near, found = nearest_first(*both, wanted)
    near, found = rescored(keys, asked, found, k)
    return Neighbors(near, datastore.values_of(found), found)


def mixed(lm: Floats, beside: Floats, weight: float) -> Floats:
    """(n,) log((1 - weight) p_LM + weight p)."""
    return mix(lm, [Component("knn", beside, np.full(len(lm), weight))])


def kept(path: Path, make: Callable[[], Arrays]) -> dict[str, npt.NDArray[np.generic]]:
    """The arrays of an .npz file, which is made, at once, where it is not there."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer = BytesIO()
        arrays = dict(make())
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        write_atomic(path, buffer.getvalue())
    with np.load(path, allow_pickle=False) as found:
        return dict(found)


def _chosen(lengths: npt.NDArray[np.int64], share: float, draw: int) -> list[int]:
    """Numbers of documents, in a random order, until they hold `share` of all entries; at least one."""
    if share >= 1:
        return list(range(len(lengths)))
    order = np.random.default_rng((draw, 1)).permutation(len(lengths))
    before = np.cumsum(lengths[order]) - lengths[order]
    return [int(i) for i, passed in zip(order, before, strict=True) if passed < share * lengths.sum()]


def _name(sight: Sight) -> str:
    default = Sight(sight.learner, sight.corpus)
    parts = [sight.learner.name, sight.corpus.replace(" ", "-")]
    parts += [f"{sight.share:g}of{sight.draw}"] if sight.share < 1 else []
    parts += [sight.key_function] if sight.key_function != default.key_function else []
    parts += [f"k{sight.k}"] if sight.k else []
    return "-".join([*parts, *(["long"] if sight.long else [])])
