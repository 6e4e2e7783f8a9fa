"""Fewer or turned dimensions before an index: PCA and OPQ, learned from the keys.

Recipes begin with "pca<d>," (the d directions of most variance), "pcar<d>," (the same, then turned at random) or
"opq<M>[_<d>]," (a rotation that suits M codes per key, of d dimensions). Codes of equal size for equal parts of a key
want equal variance in each part; a random rotation gives it, whatever the variances of the directions were. He et al.
2021 (arXiv 2109.04212), who found fewer dimensions faster and better, turn their keys in this way, too. With "+fp16"
at their end the index keeps every key as the pre-transform makes it, in float16, and
distances are those between such keys; without, rescoring takes the stored keys, with all dimensions.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import faiss
import numpy as np

from knnlm.errors import InvalidRequest
from knnlm.index.contract import Float32, Keys
from knnlm.index.kernels import project
from knnlm.index.parallel import in_slices

__all__ = ["REDUCED_SUFFIX", "PreTransform", "Projection", "project_all", "reduce_all", "split"]

REDUCED_SUFFIX = "+fp16"
FORMS = "pca<d>, pcar<d> or opq<M>[_<d>]"
PATTERN = r"(pcar?|opq)([1-9]\d{0,4})(?:_([1-9]\d{0,4}))?"


@dataclass(frozen=True)
class PreTransform:
    """kind: "pca", "pcar" or "opq". dim: of what comes out; None = as many as go in. parts: of opq, codes per key."""

    kind: str
    dim: int | None
    parts: int = 1

    @classmethod
    def parse(cls, text: str) -> Self:
        match = re.fullmatch(PATTERN, text)
        if match is None or (match[1] != "opq" and match[3]):
            raise InvalidRequest(f"pre-transform {text!r} is not known: expected {FORMS}", param="recipe")
        if match[1] != "opq":
            return cls(match[1], int(match[2]))
        return cls("opq", int(match[3]) if match[3] else None, int(match[2]))

    @property
    def factory(self) -> str:
        if self.kind != "opq":
            return f"{self.kind.upper()}{self.dim}"
        return f"OPQ{self.parts}" + ("" if self.dim is None else f"_{self.dim}")

    def dim_out(self, dim: int) -> int:
        return self.dim or dim

    def why_unsuitable(self, entries: int, dim: int) -> str | None:
        if self.dim_out(dim) > dim:
            return f"{self.kind} cannot make {self.dim} dimensions of {dim}"
        if self.dim_out(dim) % self.parts:
            return f"opq{self.parts} cuts a key into {self.parts} equal parts, {self.dim_out(dim)} dimensions cannot be"
        if entries < self.least(dim):
            return (
                f"{self.kind} of {dim} dimensions is learned from at least {self.least(dim)} entries, "
                f"there are {entries}"
            )
        return None

    def least(self, dim: int) -> int:
        """Entries that it is learned from, at least."""
        return max(dim, 256) if self.kind == "opq" else dim


class Projection:
    """A chain of FAISS's linear maps as one: a matrix (m, d) and an offset (m,)."""

    def __init__(self, chain: Any) -> None:  # Any: faiss has no types
        matrix, offset = np.eye(chain.at(0).d_in), np.zeros(chain.at(0).d_in)
        for i in range(chain.size()):
            step: Any = faiss.downcast_VectorTransform(chain.at(i))
            a = faiss.vector_to_array(step.A).reshape(step.d_out, step.d_in).astype(np.float64)
            b = faiss.vector_to_array(step.b).astype(np.float64) if step.have_bias else np.zeros(step.d_out)
            matrix, offset = a @ matrix, a @ offset + b
        self._matrix, self._offset = matrix.astype(np.float32), offset.astype(np.float32)

    @staticmethod
    def possible(chain: Any) -> bool:
        """Whether all of it is linear."""
        steps = [faiss.downcast_VectorTransform(chain.at(i)) for i in range(chain.size())]
        return bool(steps) and all(isinstance(step, faiss.LinearTransform) for step in steps)

    def __call__(self, queries: Float32) -> Float32:
        """(n, m) of queries (n, d), each as if it were alone."""
        return project(queries, self._matrix, self._offset)


def project_all(projection: Callable[[Float32], Float32], keys: Float32) -> Float32:
    """(n, m) of keys (n, d), by all processors: what `projection` makes of each as if it were alone."""
    made = np.empty((len(keys), projection(keys[:0]).shape[1]), np.float32)

    def work(lo: int, hi: int) -> None:
        made[lo:hi] = projection(keys[lo:hi])

    in_slices(work, len(keys))
    return made


def reduce_all(projection: Callable[[Float32], Float32], keys: Float32) -> Keys:
    """(n, m) float16: what an index with +fp16 keeps of keys (n, d), the same when it is built and when more are added.

    Rounded by numpy, to the nearest and of two to the even one: FAISS rounds otherwise on some machines.
    """
    with np.errstate(over="ignore"):  # what is too large for it is infinite
        return project_all(projection, keys).astype(np.float16)


def split(recipe: str) -> tuple[PreTransform | None, str, bool]:
    """The pre-transform of a recipe, the recipe without it, and whether it keeps what the pre-transform makes of the
    keys (+fp16)."""
    kept = recipe.endswith(REDUCED_SUFFIX)
    recipe = recipe.removesuffix(REDUCED_SUFFIX)
    first, _, rest = recipe.partition(",")
    if not re.match("(pca|opq)", first):
        if kept:
            raise InvalidRequest(
                f"recipe {recipe + REDUCED_SUFFIX!r} has no pre-transform: {REDUCED_SUFFIX} keeps the keys that "
                f"{FORMS} makes",
                param="recipe",
            )
        return None, recipe, False
    if not rest:
        raise InvalidRequest(f"recipe {recipe!r} is a pre-transform without an index", param="recipe")
    return PreTransform.parse(first), rest, kept
