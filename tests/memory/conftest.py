"""A language model trained for a second, a domain that it has not read, and targets of that: made once per run."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.evaluation.memory_targets import build_targets
from knnlm.lm.model import LanguageModel
from knnlm.lm.training import TrainSettings, train
from knnlm.messages import Document

GENERAL = ("the cat sat on the mat", "a dog ran to the door", "one fish swam in the sea")
DOMAIN = ("the cat ran to the sea", "a fish sat on the door", "one dog swam in the mat", "the mat sat in a dog")


def texts(kind: tuple[str, ...], count: int, seed: int) -> list[Document]:
    rng = np.random.default_rng(seed)
    return [Document(f"{seed}-{i}", ". ".join(kind[j] for j in rng.integers(len(kind), size=6))) for i in range(count)]


@dataclass(frozen=True)
class World:
    """model: a folder. store: with the domain "law" of `stored` documents. held_out: others of the domain, to choose by
    and to report on. targets: a folder, of that version, each entry without its own document."""

    model: Path
    store: Path
    held_out: list[Document]
    report: list[Document]
    targets: Path


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("memories")
    settings = TrainSettings(
        tokens=60 * 256, vocab_size=300, layers=1, width=32, heads=2, context=32, batch_tokens=256, learning_rate=2e-2
    )
    train(texts(GENERAL, 200, 0), folder / "model", settings)
    catalog = Catalog(folder / "store")
    lm = LanguageModel.load(str(folder / "model"), device="cpu")
    path = build(texts(DOMAIN, 60, 1), lm, catalog, "law", min_context=8)
    catalog.activate("law", path.name)
    build_targets(
        catalog.store, "law", str(folder / "model"), folder / "targets", exclude="document", ks=[64], max_tokens=1000
    )
    return World(folder / "model", catalog.store, texts(DOMAIN, 10, 2), texts(DOMAIN, 10, 3), folder / "targets")
