"""What an index report compares: recipes, each with the options of its searches, and which are worth comparing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self

from knnlm.errors import InvalidRequest
from knnlm.index.auto_recipe import auto_recipe
from knnlm.index.ivf import lists_for
from knnlm.index.table import family
from knnlm.options import SEARCH_OPTIONS, SearchOptions

__all__ = ["Candidate", "candidates", "default_candidates"]

# options of a search that a recipe can be compared with, and how their numbers are read
NUMBERS: Mapping[str, type[int] | type[float]] = {
    name: option.kind for name, option in SEARCH_OPTIONS.items() if option.kind in (int, float) and name != "k"
}
PAPER_LISTS, PAPER_BYTES, PAPER_PROBES = 4096, 64, 32  # Khandelwal et al. 2020 (arXiv 1911.00172)
TRAINING_KEYS_PER_LIST = 39  # below which FAISS warns


@dataclass(frozen=True)
class Candidate:
    """name: as it is written, "ivf1024,sq8@nprobe=8"."""

    name: str
    recipe: str
    search: SearchOptions = field(default_factory=SearchOptions)

    def as_json(self) -> dict[str, object]:
        return {"name": self.name, "recipe": self.recipe, **{name: getattr(self.search, name) for name in NUMBERS}}

    @classmethod
    def parse(cls, text: str) -> Self:
        """Raises InvalidRequest for an option that is not known or no number."""
        recipe, at, options = text.partition("@")
        given: dict[str, int | float] = {}
        for option in options.split(",") if at else []:
            name, _, number = option.partition("=")
            if name not in NUMBERS:
                raise InvalidRequest(
                    f"{text}: unknown option {name!r}; there are {', '.join(NUMBERS)}", param="recipes"
                )
            try:
                given[name] = NUMBERS[name](number)
            except ValueError as err:
                kind = "a whole number" if NUMBERS[name] is int else "a number"
                raise InvalidRequest(f"{text}: {name} must be {kind} >= 1, got {number!r}", param="recipes") from err
        try:
            return cls(text, recipe, SearchOptions.of(given))
        except InvalidRequest as err:
            raise InvalidRequest(f"{text}: {err.message}", param="recipes") from err


def candidates(names: list[str], entries: int, dim: int) -> list[Candidate]:
    """Those that were asked for, each once. Raises InvalidRequest for one that does not suit, and for none."""
    if not names:
        raise InvalidRequest("expected at least one recipe", param="recipes")
    found = []
    for name in dict.fromkeys(names):
        candidate = Candidate.parse(name)
        why_not = family(candidate.recipe).why_unsuitable(entries, dim)
        if why_not is not None:
            raise InvalidRequest(f"index {candidate.recipe} does not suit: {why_not}", param="recipes")
        found.append(candidate)
    return found


def default_candidates(entries: int, dim: int) -> list[Candidate]:
    """One candidate of every family, as large as suits `entries` keys; those that do not suit are left out.

    Among them: exact search, the recipe of the paper and the one that `auto` takes.
    """
    n = lists_for(entries)
    paper = max(1, min(PAPER_LISTS, entries // TRAINING_KEYS_PER_LIST))
    half, coarse = _divisor(dim, dim // 2), _divisor(dim, dim // 4)
    reduced = max(1, dim // 2)
    names = [
        "flat",
        auto_recipe(entries, dim).recipe,
        f"ivf{paper},pq{_divisor(dim, PAPER_BYTES)}@nprobe={min(PAPER_PROBES, paper)}",
        f"ivf{n},pq{half}x4fs",
        f"ivf{n},pq{coarse}x4fs",
        f"ivf{n},fp16",
        f"ivf{n},sq8",
        f"ivf{n},rabitq",
        f"ivf{n},rabitqfs",
        f"pq{half}x4fs",
        "hnsw32",
        f"pca{reduced},ivf{n},sq8+fp16",
        f"pca{reduced},ivf{n},sq8",
        f"opq{coarse},ivf{n},pq{coarse}x4fs",
    ]
    found = [Candidate.parse(name) for name in dict.fromkeys(names)]
    return [c for c in found if family(c.recipe).why_unsuitable(entries, dim) is None]


def _divisor(dim: int, most: int) -> int:
    """The largest divisor of dim that is at most `most`."""
    return max(m for m in range(1, max(1, most) + 1) if dim % m == 0)
