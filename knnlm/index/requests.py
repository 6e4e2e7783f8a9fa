"""What a search request may ask of an index: checked before anything is searched."""

import numpy as np
import numpy.typing as npt

from knnlm.datastore.manifest import Manifest
from knnlm.errors import InvalidRequest, UnknownDomain, UnknownVersion
from knnlm.index.contract import Index
from knnlm.messages import SearchRequest

__all__ = ["check_request", "rescoring"]


def rescoring(request: SearchRequest, index: Index) -> bool:
    """Whether the distances of the answer are computed from keys, rather than those of the index itself."""
    return not index.exact if request.options.rescore is None else request.options.rescore


def check_request(request: SearchRequest, manifest: Manifest, index: Index, recipe: str) -> None:
    """Raises InvalidRequest, naming the parameter; UnknownDomain or UnknownVersion when another version is meant."""
    if request.domain != manifest.domain:
        raise UnknownDomain(f"asked for domain {request.domain!r}, this is {manifest.domain}", param="domain")
    if request.version not in (None, manifest.version):
        raise UnknownVersion(
            f"domain {manifest.domain} answers from version {manifest.version}, "
            f"version {request.version!r} was asked for",
            param="version",
        )
    _check_queries(request.queries, manifest.key_dim)
    options = request.options
    for name, asked, default, what in (
        ("nprobe", options.nprobe, index.nprobe, "has no lists"),
        ("ef_search", options.ef_search, index.ef_search, "is no graph"),
    ):
        if asked is not None and default is None:
            raise InvalidRequest(f"index {recipe} {what}, so {name} means nothing to it", param=name)
    if options.overfetch is not None and not rescoring(request, index):
        raise InvalidRequest("overfetch means candidates for rescoring, which is off here", param="overfetch")
    for name, number in (("passages", request.passages), ("passage_tokens", request.passage_tokens)):
        if number < 0:
            raise InvalidRequest(f"{name} must be >= 0, got {number}", param=name)


def _check_queries(queries: npt.NDArray[np.floating], dim: int) -> None:
    if queries.dtype not in (np.float32, np.float16):
        raise InvalidRequest(f"queries must be float32 or float16, got {queries.dtype.name}", param="queries")
    if queries.ndim != 2 or queries.shape[1] != dim:
        raise InvalidRequest(f"queries must have shape (n, {dim}), got {queries.shape}", param="queries")
    finite = np.isfinite(queries).all(axis=1)
    if not finite.all():
        raise InvalidRequest(f"query {int(np.argmin(finite))} is not finite", param="queries")
