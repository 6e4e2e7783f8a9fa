"""A graph of near keys that a query walks along (Malkov and Yashunin 2016, arXiv 1603.09320).

Recipes: "hnsw<M>[,<codec>]" with M links per key. Slow to build and large, as fast with one query as with many. A graph
must keep at least as many candidates as neighbors are wanted, so a kNN-LM's thousand cost it more than the lists.
"""

import re
from pathlib import Path
from typing import Any, Self

import faiss

from knnlm.errors import DatastoreCorrupt, InvalidRequest
from knnlm.index.codecs import Codec, codec, codec_names
from knnlm.index.contract import Float32, Int64, Parameters
from knnlm.index.faiss_family import FaissFamily, FaissIndex
from knnlm.index.pre_transform import PreTransform, split
from knnlm.options import SearchOptions

__all__ = ["Hnsw"]

EF_SEARCH = 1024  # candidates kept; raised to what is asked for
PLACE_BYTES = 12  # per key: where its links begin, and its level


class Hnsw(FaissFamily):
    flags = faiss.IO_FLAG_MMAP_IFC

    def __init__(
        self, recipe: str, pre_transform: PreTransform | None, links: int, codec: Codec, *, reduced: bool = False
    ) -> None:
        super().__init__(recipe, pre_transform, codec, reduced=reduced)
        self._links = links

    @classmethod
    def parse(cls, recipe: str) -> Self:
        pre_transform, rest, reduced = split(recipe)
        match = re.fullmatch(r"hnsw([1-9]\d{0,2})(?:,(.*))?", rest)
        chosen = codec(match[2] if match and match[2] is not None else "flat")
        if match is None or chosen is None or not 2 <= int(match[1]) <= 256 or not chosen.row.mapped:
            raise InvalidRequest(
                f"recipe {recipe!r} is not known: expected hnsw<links>[,<codec>] with 2 to 256 links, like "
                f"hnsw32,sq8; codecs: {codec_names()}, without those that end with fs",
                param="recipe",
            )
        return cls(recipe, pre_transform, int(match[1]), chosen, reduced=reduced)

    @property
    def base(self) -> str:
        return f"HNSW{self._links},{self.codec.factory}"

    def always_resident_bytes(self, entries: int, dim: int) -> int:
        return super().always_resident_bytes(entries, dim) + PLACE_BYTES * entries

    def defaults(self, index: Any) -> Parameters:
        del index
        return {"ef_search": EF_SEARCH}

    def opened(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> "HnswIndex":
        return HnswIndex(index, file, parameters, mapped)


class HnswIndex(FaissIndex):
    def __init__(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> None:
        super().__init__(index, file, parameters, mapped)
        if not isinstance(self._index, faiss.IndexHNSW):
            raise DatastoreCorrupt(f"{file} is {type(self._index).__name__}, expected IndexHNSW")
        self.efforts = {"ef_search": int(parameters.get("ef_search", EF_SEARCH))}

    def search_projected(self, queries: Float32, k: int, options: SearchOptions) -> tuple[Float32, Int64]:
        settings: Any = faiss.SearchParametersHNSW()  # type: ignore[attr-defined]
        # FAISS makes room for as many, whatever there are
        settings.efSearch = min(max(self.effort("ef_search", options), k), max(1, int(self._index.ntotal)))
        distances, ids = self._index.search(queries, k, params=settings)
        return distances, ids
