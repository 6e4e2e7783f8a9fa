"""Search requests that differ in a few fields, of the request or of its options."""

from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.messages import SearchRequest
from knnlm.options import SEARCH_OPTIONS, SearchOptions


def asking(request: SearchRequest, **fields: Any) -> SearchRequest:
    """The request with other fields; those that are search options are replaced in its options."""
    options = {name: fields.pop(name) for name in list(fields) if name in SEARCH_OPTIONS}
    return replace(request, options=replace(request.options, **options), **fields)


def search(domain: str, queries: npt.NDArray[np.floating], k: int, **fields: Any) -> SearchRequest:
    """A request for k neighbors, and fields as in `asking`."""
    return asking(SearchRequest(domain, queries, SearchOptions(k=k)), **fields)
