"""Valid JSON bodies of every route that takes one, and the same with half of a surrogate pair in each of their texts.

JSON can write "\\ud800"; UTF-8, and so protobuf, has no bytes for it.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

__all__ = ["BODIES", "HALF", "IGNORING", "broken"]

HALF = "a\ud800"
_KNN = {"domain": "toy", "version": "v1", "exclude_documents": ["0"], "combine": "mixture", "rule": "fixed"}
_PACKED = {"dtype": "float32", "shape": [0, 16], "data": ""}

# of the toy model (258 tokens, 16 dimensions) and its domain "toy"
BODIES: Mapping[str, Sequence[tuple[str, dict[str, Any]]]] = {
    "lm": (("/v1/forward", {"tokens": [[1]], "positions": [[0]], "keys": True, "encoding": "list"}),),
    "datastore": (
        (
            "/v1/domains/toy/search",
            {"queries": _PACKED, "k": 1, "version": "v1", "exclude_documents": ["0"], "encoding": "list"},
        ),
        ("/v1/domains/toy/passages", {"entries": [0], "version": "v1", "encoding": "list"}),
        ("/v1/domains/toy:activate", {"version": "v1"}),
        ("/v1/domains/toy/documents", {"documents": [{"id": "x", "text": "a text"}]}),
        ("/v1/domains/toy/documents:remove", {"ids": ["0"]}),
    ),
    "aggregator": (
        ("/v1/next_token", {"text": "a", "model": "toy", "knn": _KNN, "on_datastore_error": "fail"}),
        ("/v1/next_token", {"text": ["a"], "model": "toy+toy", "encoding": "list"}),
        ("/v1/next_token", {"text": "a", "knn": {"domains": ["toy"]}}),
        ("/v1/next_token", {"text": "a", "knn": {"domains": [{"domain": "toy", "version": "v1"}]}}),
        ("/v1/score", {"text": "a text", "model": "toy", "knn": _KNN}),
        ("/v1/explain", {"text": "a text", "model": "toy", "knn": _KNN, "on_datastore_error": "fail"}),
        ("/v1/explain", {"prompt": "a", "completion": " text", "knn": {"domains": ["toy"]}}),
        ("/v1/completions", {"prompt": "a", "model": "toy", "knn": _KNN, "stop": ["a"], "user": "a"}),
        ("/v1/completions", {"prompt": ["a", "b"], "stop": "a", "logit_bias": {"5": 1}, "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "a", "content": "a", "name": "a"}], "knn": _KNN}),
        ("/v1/chat/completions", {"messages": [{"role": "a", "content": [{"type": "text", "text": "a"}]}]}),
        ("/v1/domains/toy:activate", {"version": "v1"}),
        ("/v1/domains/toy/documents", {"documents": [{"id": "x", "text": "a text"}]}),
        ("/v1/domains/toy/documents:remove", {"ids": ["0"]}),
        ("/tokenize", {"prompt": "a", "model": "toy"}),
        ("/detokenize", {"tokens": [1], "model": "toy"}),
    ),
}
IGNORING = ("/v1/completions", "/v1/chat/completions")  # fields that nobody knows


def broken(body: Any, *, names: bool = True) -> Iterator[bytes]:
    """The body as JSON, each time with one of its texts, or with `names` the name of one of its fields, replaced."""
    for changed in _changed(body, names):
        yield json.dumps(changed).encode()


def _changed(value: Any, names: bool) -> Iterator[Any]:
    if isinstance(value, str):
        yield HALF
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from ([*value[:i], new, *value[i + 1 :]] for new in _changed(item, names))
    elif isinstance(value, dict):
        if names:
            yield {**value, HALF: 1}
        for name, item in value.items():
            yield from ({**value, name: new} for new in _changed(item, names))
