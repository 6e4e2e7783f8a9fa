"""How an index writes down a key: the table of codes that lists, graphs and plain scans share."""

import re
from dataclasses import dataclass

__all__ = ["CODECS", "Codec", "Row", "codec", "codec_names"]


@dataclass(frozen=True)
class Row:
    """factory: FAISS's name of it, {m} being the number in a recipe. overfetch: candidates per neighbor, unless a
    search says otherwise. points: keys it needs. mapped: whether FAISS can leave its codes in the file.
    """

    factory: str
    overfetch: float
    points: int = 1
    mapped: bool = True


# overfetch: for the perplexity that comes of it, not for recall: benchmarks/README.md
CODECS = {
    "flat": Row("Flat", 1.0),
    "fp16": Row("SQfp16", 1.0),
    "sq8": Row("SQ8", 1.0),
    "sq4": Row("SQ4", 1.25),
    # np: without polysemous codes, which take longest to train and serve a kind of search that is not ours
    "pq<M>": Row("PQ{m}np", 1.25, points=256),
    "pq<M>x4fs": Row("PQ{m}x4fs", 1.25, points=256, mapped=False),
    "rabitq": Row("RaBitQ", 1.5),
    "rabitqfs": Row("RaBitQfs", 1.5, mapped=False),
}


@dataclass(frozen=True)
class Codec:
    """A row with its number. name: as in the recipe."""

    name: str
    row: Row
    parts: int = 0

    @property
    def factory(self) -> str:
        return self.row.factory.format(m=self.parts)

    def why_unsuitable(self, entries: int, dim: int) -> str | None:
        if self.parts and dim % self.parts:
            return f"{self.name} cuts a key into {self.parts} equal parts, {dim} dimensions cannot be"
        if entries < self.row.points:
            return f"{self.name} needs at least {self.row.points} entries, there are {entries}"
        return None


def codec(name: str) -> Codec | None:
    """None for one that is not known."""
    match = re.fullmatch(r"pq([1-9]\d{0,3})(x4fs)?", name)
    if match is not None:
        return Codec(name, CODECS["pq<M>" + (match[2] or "")], int(match[1]))
    return Codec(name, CODECS[name]) if name in CODECS and "<" not in name else None


def codec_names() -> str:
    return ", ".join(CODECS)
