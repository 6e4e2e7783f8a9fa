"""Every code of every key, with no lists and no graph. Recipes: a codec of codecs.py alone, such as "pq128x4fs"."""

from pathlib import Path
from typing import Any, Self

import faiss

from knnlm.errors import InvalidRequest
from knnlm.index.codecs import codec, codec_names
from knnlm.index.contract import Parameters
from knnlm.index.faiss_family import FaissFamily, FaissIndex
from knnlm.index.pre_transform import split

__all__ = ["Scan"]


class Scan(FaissFamily):
    flags = faiss.IO_FLAG_MMAP_IFC

    @classmethod
    def parse(cls, recipe: str) -> Self:
        pre_transform, rest, reduced = split(recipe)
        chosen = codec(rest)
        if chosen is None:
            raise InvalidRequest(
                f"recipe {recipe!r} is not known: expected a codec, one of {codec_names()}", param="recipe"
            )
        return cls(recipe, pre_transform, chosen, reduced=reduced)

    @property
    def base(self) -> str:
        return self.codec.factory

    def set_seed(self, index: Any, seed: int) -> None:
        if hasattr(index, "pq"):
            index.pq.cp.seed = seed

    def defaults(self, index: Any) -> Parameters:
        del index
        return {}

    def opened(self, index: Any, file: Path, parameters: Parameters, mapped: bool) -> FaissIndex:
        return FaissIndex(index, file, parameters, mapped)
