"""Any index that FAISS can name. Recipes: "faiss:<factory string>", such as "faiss:IVF1024_HNSW32,PQ64x4fsr".

What FAISS can do and the other families have no word for. Its searches take the options of lists or graphs when their
kind does; it is read into memory, since FAISS does not say what of it could be mapped. Whether its candidates for a
query depend on the other queries of a batch is up to FAISS; distances are rescored as everywhere.
"""

from pathlib import Path
from typing import Any, Self

import faiss

from knnlm.errors import InvalidRequest
from knnlm.index.codecs import Codec, Row
from knnlm.index.contract import Int64, Parameters
from knnlm.index.faiss_family import FaissFamily, FaissIndex, faiss_message
from knnlm.index.hnsw import HnswIndex
from knnlm.index.ivf import TRAINING_KEYS_PER_LIST, IvfIndex, default_nprobe, list_sizes, remark_on_lists

__all__ = ["Factory"]

PREFIX = "faiss:"
OVERFETCH = 1.5  # nothing is known of its codes


class Factory(FaissFamily):
    flags = 0

    def __init__(self, recipe: str, factory: str) -> None:
        super().__init__(recipe, None, Codec(factory, Row(factory, OVERFETCH, mapped=False)))

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

    def why_unsuitable(self, entries: int, dim: int) -> str | None:
        del entries
        try:
            index: Any = faiss.index_factory(dim, self.base, faiss.METRIC_L2)
        except RuntimeError as err:
            return f"FAISS says: {faiss_message(err)}"
        if isinstance(index, faiss.IndexPreTransform):
            index = faiss.downcast_index(index.index)
        if isinstance(index, faiss.IndexRefine):
            return "a refinement (Refine, RFlat) is not needed: every search is rescored, from more by overfetch"
        if not isinstance(index, faiss.IndexIVF) and faiss.try_extract_index_ivf(index) is not None:
            return f"the lists inside of {type(index).__name__} cannot be told how many to visit"
        return None

    def training_size(self, dim: int) -> int:
        lists = faiss.try_extract_index_ivf(faiss.index_factory(dim, self.base, faiss.METRIC_L2))
        return max(super().training_size(dim), 0 if lists is None else TRAINING_KEYS_PER_LIST * int(lists.nlist))

    def set_seed(self, index: Any, seed: int) -> None:
        if isinstance(index, faiss.IndexIVF):
            index.cp.seed = seed
        if hasattr(index, "pq"):
            index.pq.cp.seed = seed

    def defaults(self, index: Any) -> Parameters:
        return {"nprobe": default_nprobe(list_sizes(index))} if isinstance(index, faiss.IndexIVF) else {}

    def list_sizes(self, file: Path) -> Int64 | None:
        whole = faiss.read_index(str(file))  # owns the lists
        lists = faiss.try_extract_index_ivf(whole)
        return None if lists is None else list_sizes(lists)

    def remark(self, file: Path) -> str | None:
        index = faiss.read_index(str(file))
        return None if faiss.try_extract_index_ivf(index) is None else remark_on_lists(index)

    def opened(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> FaissIndex:
        plain = FaissIndex(index, file, parameters, mapped)
        for kind, opener in ((faiss.IndexIVF, IvfIndex), (faiss.IndexHNSW, HnswIndex)):
            if plain.is_a(kind):
                return opener(index, file, parameters, mapped)
        return plain
