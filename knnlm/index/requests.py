"""What a search may ask of an index, and a lookup of a version: checked before any work."""

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from knnlm.datastore.manifest import Manifest
from knnlm.errors import InvalidRequest, UnknownDomain, UnknownVersion
from knnlm.index.contract import Index
from knnlm.messages import PassagesRequest, SearchRequest
from knnlm.options import SEARCH_OPTIONS, SearchOptions

__all__ = [
    "SPARE_CANDIDATES",
    "Candidates",
    "check_lookup",
    "check_queries",
    "check_request",
    "check_version",
    "overfetched",
    "rescoring",
]

SPARE_CANDIDATES = 8  # beyond those wanted: which one is the last must not depend on the rounding of its distance
MAX_CANDIDATES = 1 << 62  # per query: keeps k times overfetch an int64


@dataclass(frozen=True)
class Candidates:
    """How many candidates of each query an index is asked for, beside SPARE_CANDIDATES (wanted), and how many of them,
    the nearest, are rescored: None = all, 0 = none, and then no SPARE_CANDIDATES are asked for."""

    wanted: int
    rescored: int | None

    @classmethod
    def of(cls, k: int, options: SearchOptions, index: Index, *, all_rescored: bool = False) -> "Candidates":
        """The candidates for k neighbors. all_rescored: rescore every one, but for a search that asks for none."""
        if not rescoring(options, index):
            return cls(k, 0)
        wanted = overfetched(k, options, index)
        asked = options.rescore is not None or options.overfetch is not None
        if index.rescored is None or asked or all_rescored or wanted <= index.rescored:
            return cls(wanted, None)
        return cls(max(k, index.rescored), index.rescored)

    @property
    def found(self) -> int:
        """Candidates that the index is asked for, SPARE_CANDIDATES included."""
        return self.wanted if self.rescored == 0 else self.wanted + SPARE_CANDIDATES


def overfetched(k: int, options: SearchOptions, index: Index) -> int:
    """Candidates that k neighbors are chosen from when all are rescored."""
    factor = index.overfetch if options.overfetch is None else options.overfetch
    return math.ceil(min(k * factor, MAX_CANDIDATES))


def rescoring(options: SearchOptions, index: Index) -> bool:
    """Whether distances of the answer are computed from keys, rather than those of the index itself."""
    return not index.exact if options.rescore is None else options.rescore


def check_request(request: SearchRequest, manifest: Manifest, index: Index, recipe: str) -> None:
    """Raises InvalidRequest, naming the parameter; UnknownDomain or UnknownVersion when another version is meant."""
    check_version(request.domain, request.version, manifest)
    check_queries(request.queries, manifest.key_dim)
    options = request.options
    for name, option in SEARCH_OPTIONS.items():
        if option.requires and getattr(options, name) is not None and name not in index.efforts:
            raise InvalidRequest(f"index {recipe} has no {option.requires}, so {name} means nothing to it", param=name)
    if options.overfetch is not None and not rescoring(options, index):
        raise InvalidRequest("overfetch means candidates for rescoring, which is off here", param="overfetch")
    _check_not_negative("passages", request.passages)
    _check_not_negative("passage_tokens", request.passage_tokens)


def check_lookup(request: PassagesRequest, manifest: Manifest) -> None:
    """Raises as `check_request`. That an entry was removed is not known here."""
    check_version(request.domain, request.version, manifest)
    _check_not_negative("passage_tokens", request.passage_tokens)
    entries = request.entries
    if entries.dtype != np.int64 or entries.ndim != 1:
        raise InvalidRequest(
            f"entries must be int64 of shape (m,), got {entries.dtype.name} of shape {entries.shape}", param="entries"
        )
    unknown = entries[(entries < 0) | (entries >= manifest.entries)]
    if len(unknown):
        raise InvalidRequest(
            f"entries must lie in [0, {manifest.entries}) of {manifest.domain} {manifest.version}, got {unknown[0]}",
            param="entries",
        )


def check_version(domain: str, version: str | None, manifest: Manifest) -> None:
    """Raises UnknownDomain or UnknownVersion when another version than this is meant."""
    if domain != manifest.domain:
        raise UnknownDomain(f"asked for domain {domain!r}, this is {manifest.domain}", param="domain")
    if version not in (None, manifest.version):
        raise UnknownVersion(
            f"domain {manifest.domain} answers from version {manifest.version}, version {version!r} was asked for",
            param="version",
        )


def _check_not_negative(name: str, number: int) -> None:
    if number < 0:
        raise InvalidRequest(f"{name} must be >= 0, got {number}", param=name)


def check_queries(queries: npt.NDArray[np.floating], dim: int) -> None:
    """Refuse queries that are not (n, dim) finite numbers in float16 or float32: raises InvalidRequest."""
    if queries.dtype not in (np.float32, np.float16):
        raise InvalidRequest(f"queries must be float32 or float16, got {queries.dtype.name}", param="queries")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise InvalidRequest(f"queries must have shape (n, {dim}), got {queries.shape}", param="queries")
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise InvalidRequest(f"query {int(np.argmin(finite))} is not finite", param="queries")
