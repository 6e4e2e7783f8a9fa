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
}


def family(recipe: str) -> Family:
    """The family of a recipe, parsed. Raises InvalidRequest for one that is not known, listing those that are."""
    word = re.match("[a-z]*", recipe)
    name = word.group() if word else ""
    if name not in FAMILIES:
        raise InvalidRequest(f"unknown index recipe {recipe!r}; families: {', '.join(FAMILIES)}", param="recipe")
    module, _, attribute = FAMILIES[name].partition(":")
    found: Any = getattr(import_module(module), attribute)  # Any: it comes by name; a test resolves every row
    parsed: Family = found.parse(recipe)
    return parsed
