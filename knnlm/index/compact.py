"""Compacting a domain (knnlm/datastore/updates/compact.py) with an index of FAISS's for the version that is made."""

from pathlib import Path

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.progress import Clock, Progress, Report, silent
from knnlm.datastore.updates import compact as folding
from knnlm.datastore.updates.transaction import Activate
from knnlm.index.build import build_index, suited
from knnlm.index.memory import available_bytes
from knnlm.index.table import family
from knnlm.messages import DomainChange

__all__ = ["compact"]

AUTO = "auto"


def compact(
    catalog: Catalog,
    domain: str,
    *,
    recipe: str | None = None,
    activate: Activate | None = None,
    wait: bool = False,
    on_progress: Report | None = None,
) -> DomainChange:
    """Do as `folding.compact`, whose errors it raises. recipe: what index to build, as in `build_index`; None = the
    recipe of the former default index.

    Raises InvalidRequest for a recipe that is not known, or that does not suit (the version is published by then, but
    neither indexed nor activated).
    """
    report = on_progress or silent
    if recipe not in (None, AUTO):
        family(recipe)

    def index(path: Path, former: str) -> None:
        choice = suited(path, former if recipe is None else recipe, memory_bytes=available_bytes())
        if Manifest.load(path).index.recipe == choice.recipe:
            return
        clock = Clock()

        def on_keys(done: int, total: int) -> None:
            report(Progress("index", done, total, 0, clock.seconds))

        build_index(path, choice.recipe, on_progress=on_keys)

    return folding.compact(catalog, domain, index=index, activate=activate, wait=wait, on_progress=on_progress)
