"""A store of two small domains made with the pocket LM, and questions about it whose right answers are known.

Domain licence has two versions, v1 (the licence of this project) and v2 (a page of its documentation); domain docs has
one. Used where real services are hurt and must still answer rightly: tests/compose, tests/faults.
"""

from pathlib import Path
from typing import Any

import numpy as np

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.revise import with_tuning
from knnlm.index.searcher import Searcher
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document
from knnlm.pipeline import Pipeline
from knnlm.tuning_records import Tuning
from tests.traffic import Ask

__all__ = ["CONTEXTS", "POCKET", "licence_store", "questions"]

ROOT = Path(__file__).resolve().parents[1]
POCKET = ROOT / "models" / "pocket"
TUNING = Tuning(temperature=20.0, lmbda=0.5, k=64, lm_perplexity=1.0, knn_perplexity=1.0, tokens=1, documents=1)
CONTEXTS = ("Licensed under the Apache License, Version 2.0 (the", "The aggregator fans out to the", "def search(")
VERSIONS = {"licence": {"v1": "LICENSE", "v2": "docs/architecture.md"}, "docs": {"v1": "docs/architecture.md"}}
CLOSE = 1e-4  # of probabilities: another number of threads adds in another order


def licence_store(folder: Path) -> Path:
    """The store, the first version of each domain current."""
    lm = LanguageModel.load(str(POCKET), device="cpu")
    catalog = Catalog(folder)
    for domain, versions in VERSIONS.items():
        for version, name in versions.items():
            text = (ROOT / name).read_text(encoding="utf-8")
            with_tuning(build([Document(name, text)], lm, catalog, domain, version=version), TUNING)
        catalog.activate(domain, "v1")
    return folder


def questions(store: Path) -> list[Ask]:
    """Distributions and scores of both domains; the version that answered decides what they must be. Versions that a
    test makes later are not judged here."""
    lm = LanguageModel.load(str(POCKET), device="cpu")
    asks = []
    for domain, versions in VERSIONS.items():
        probs: dict[str, list[np.ndarray[Any, Any]]] = {}
        totals: dict[str, list[float]] = {}
        for version in versions:
            with Pipeline(lm, {domain: Searcher.open(store / domain / version)}) as pipeline:
                probs[version] = [np.exp(pipeline.next_token(text, domain).mixed.log_probs[0]) for text in CONTEXTS]
                totals[version] = [pipeline.score(text, domain).total for text in CONTEXTS]
        for number, text in enumerate(CONTEXTS):
            asks.append(_next_token(domain, text, {version: rows[number] for version, rows in probs.items()}))
            asks.append(_score(domain, text, {version: rows[number] for version, rows in totals.items()}))
    return asks


def _next_token(domain: str, text: str, expected: dict[str, Any]) -> Ask:
    def problem(answer: Any) -> str | None:
        version = answer["domains"][0]["version"]
        for token in answer["results"][0]["top"] if version in expected else ():
            wanted = float(expected[version][token["token_id"]])
            if abs(token["p"] - wanted) > CLOSE:
                return f"{domain} {version} {text!r}: p({token['token_id']}) is {token['p']}, expected {wanted}"
        return None

    return Ask("/v1/next_token", {"text": text, "knn": {"domain": domain}, "top_n": 20}, problem)


def _score(domain: str, text: str, expected: dict[str, float]) -> Ask:
    def problem(answer: Any) -> str | None:
        version, total = answer["domains"][0]["version"], answer["total_log_p"]
        if version in expected and abs(total - expected[version]) > 10 * CLOSE * len(answer["tokens"]):
            return f"{domain} {version} {text!r}: total is {total}, expected {expected[version]}"
        return None

    return Ask("/v1/score", {"text": text, "knn": {"domain": domain}}, problem)
