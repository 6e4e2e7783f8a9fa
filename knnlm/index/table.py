"""The families, by the word their recipes begin with. A module is imported when its family is first used."""

import re
from importlib import import_module
from typing import Any

from knnlm.errors import InvalidRequest
from knnlm.index.contract import Family

__all__ = ["FAMILIES", "family"]

FAMILIES = {
    "flat": "knnlm.index.flat:Flat",
    "ivf": "knnlm.index.ivf:Ivf",
    "hnsw": "knnlm.index.hnsw:Hnsw",
    "fp": "knnlm.index.scan:Scan",
    "sq": "knnlm.index.scan:Scan",
    "pq": "knnlm.index.scan:Scan",
    "rabitq": "knnlm.index.scan:Scan",
    "rabitqfs": "knnlm.index.scan:Scan",
    "faiss": "knnlm.index.factory:Factory",
}
PRE_TRANSFORM = r"(?:(?:pcar?|opq)[\d_]*,)?"  # dimensions changed first, see pre_transform.py


def family(recipe: str) -> Family:
    """The family of a recipe, parsed. Raises InvalidRequest for one that is not known, listing those that are."""
    match = re.match(PRE_TRANSFORM + "([a-z]+)", recipe)
    name = match[1] if match else ""
    if name not in FAMILIES:
        raise InvalidRequest(
            f"unknown index recipe {recipe[:80]!r}; families: {', '.join(FAMILIES)}, each but flat and faiss with "
            "pca<d>, pcar<d> or opq<M>[_<d>] and a comma before it",
            param="recipe",
        )
    module, _, attribute = FAMILIES[name].partition(":")
    found: Any = getattr(import_module(module), attribute)  # Any: it comes by name; a test resolves every row
    parsed: Family = found.parse(recipe)
    return parsed
