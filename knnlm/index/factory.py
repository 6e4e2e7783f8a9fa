"""Any index that FAISS can name. Recipes: "faiss:<factory string>", such as "faiss:IVF1024_HNSW32,PQ64x4fsr".

What FAISS can do and the other families have no word for. Its searches take nprobe or ef_search when their kind does;
it is read into memory, since FAISS does not say what of it could be mapped. Whether its candidates for a query depend
on the other queries of a batch is up to FAISS; distances are rescored as everywhere.
"""

from pathlib import Path
from typing import Any, Self

import faiss

from knnlm.errors import InvalidRequest
from knnlm.index.codecs import Codec, Row
from knnlm.index.contract import Parameters
from knnlm.index.faiss_family import LEAST_POINTS, FaissFamily, FaissIndex, said
from knnlm.index.hnsw import EF_SEARCH, HnswIndex
from knnlm.index.ivf import POINTS_PER_LIST, IvfIndex, default_nprobe

__all__ = ["Factory"]

PREFIX = "faiss:"
OVERFETCH = 1.5  # nothing is known of its codes


class Factory(FaissFamily):
    flags = 0

    def __init__(self, recipe: str, factory: str) -> None:
        super().__init__(recipe, None, Codec(factory, Row(factory, OVERFETCH, mapped=False)))
        self._nlist = 0

    @classmethod
    def parse(cls, recipe: str) -> Self:
        factory = recipe.removeprefix(PREFIX)
        if not recipe.startswith(PREFIX) or not factory:
            raise InvalidRequest(
                f"recipe {recipe!r} is not known: expected {PREFIX}<factory string of FAISS>", param="recipe"
            )
        return cls(recipe, factory)

    @property
    def base(self) -> str:
        return self.codec.factory

    def refusal(self, entries: int, dim: int) -> str | None:
        del entries
        try:
            faiss.index_factory(dim, self.base, faiss.METRIC_L2)
        except RuntimeError as err:
            return f"FAISS says: {said(err)}"
        return None

    def points(self) -> int:
        return max(LEAST_POINTS, POINTS_PER_LIST * self._nlist)

    def seeded(self, index: Any, seed: int) -> None:
        if isinstance(index, faiss.IndexIVF):
            self._nlist = int(index.nlist)
            index.cp.seed = seed
        if hasattr(index, "pq"):
            index.pq.cp.seed = seed

    def defaults(self, entries: int) -> Parameters:
        return {"nprobe": default_nprobe(entries, self._nlist)} if self._nlist else {"ef_search": EF_SEARCH}

    def opened(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> FaissIndex:
        plain = FaissIndex(index, file, parameters, mapped)
        for kind, opener in ((faiss.IndexIVF, IvfIndex), (faiss.IndexHNSW, HnswIndex)):
            if plain.is_a(kind):
                return opener(index, file, parameters, mapped)
        return plain
