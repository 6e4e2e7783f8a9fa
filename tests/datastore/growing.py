"""A domain that can grow, and short ways to change it and to look at it."""

from collections.abc import Iterable
from pathlib import Path

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.documents import add, remove
from knnlm.datastore.verify import verify
from knnlm.messages import Document, DomainChange
from knnlm.testing import ToyLanguageModel, toy_datastore

NEW = (
    Document("a", "the cat sat on the log, and the log sat on the cat. " * 2),
    Document("b", "y"),
    Document("c", "zz"),
)


def toy_catalog(store: Path) -> Catalog:
    """Domain toy, v1: documents "0" to "3", current."""
    toy_datastore(store)
    return Catalog(store)


def grow(
    catalog: Catalog, documents: Iterable[Document] = NEW, lm: ToyLanguageModel | None = None, *, replace: bool = False
) -> DomainChange:
    return add(documents, lm or ToyLanguageModel(), catalog, "toy", activate=catalog.activate, replace=replace)


def forget(catalog: Catalog, *ids: str) -> DomainChange:
    return remove(ids, catalog, "toy", activate=catalog.activate)


def folder(catalog: Catalog, change: DomainChange) -> Path:
    """Where the version lies that an update made."""
    return catalog.path(change.domain, change.version)


def sound(path: Path) -> bool:
    return all(check.problem is None for check in verify(path))


def listed(catalog: Catalog) -> list[str]:
    """All that is in the domain's folder but the lock."""
    return sorted(f.name for f in (catalog.store / "toy").iterdir() if f.name != ".change.lock")


def live(path: Path) -> list[str]:
    return [row.id for _, row in Datastore.open(path).live_rows()]
