"""`knnlm next`: the distribution of the next token, and the neighbors that shaped it."""

from math import exp
from typing import TYPE_CHECKING, Annotated, Any

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelOption,
    StoreOption,
    TextArgument,
    print_json,
    print_table,
    read_text,
)
from knnlm.cli.retrieval import domain_names, retrieving
from knnlm.errors import InvalidRequest
from knnlm.options import KnnOptions

if TYPE_CHECKING:
    from knnlm.mixer import NextTokens
    from knnlm.tokenizer import Tokenizer

PASSAGE_TOKENS = 16  # a side


@retrieving
def next_token(
    text: TextArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    knn: KnnOptions | None = None,
    top: Annotated[int, typer.Option(help="Number of likeliest tokens to show.")] = 10,
    neighbors: Annotated[int, typer.Option(help="Number of nearest neighbors of each domain to show.")] = 5,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show the likeliest next tokens after a text, by the mixture, the LM and the neighbors."""
    from knnlm.pipeline import Pipeline

    for name, value in (("--top", top), ("--neighbors", neighbors)):
        if value < 0:
            raise InvalidRequest(f"{name} must be at least 0, got {value}", param=name)
    domains = domain_names(knn)
    text = read_text(text)
    with Pipeline.load(model, store, domains, device=device, dtype=dtype) as pipeline:
        result = pipeline.next_token(text, knn, passages=neighbors, passage_tokens=PASSAGE_TOKENS)
        likeliest = _likeliest(result, pipeline.tokenizer, top)
        nearest = _nearest(result, pipeline.tokenizer)
    if as_json:
        used = [d.as_json() for d in result.domains]
        print_json({"model": pipeline.lm.info.model_id, "domains": used, "tokens": likeliest, "neighbors": nearest})
        return
    columns = ["p", "p_lm", "p_knn"][: 3 if result.domains else 2]
    print_table(["token", *columns], [[repr(t["token"]), *(f"{t[c]:.5f}" for c in columns)] for t in likeliest])
    for d in result.domains:
        print(f"\n{d.domain} {d.version}: lambda {d.lmbda:.3f}, temperature {d.temperature:.5g}, k {d.k}")
        rows = [
            [f"{n['distance']:.4g}", f"{n['before']!r} → {n['token']!r}", f"{n['document']}:{n['position']}"]
            for n in nearest
            if n["domain"] == d.domain
        ]
        if rows:
            print_table(["distance", "neighbor", "document:token"], rows, left=(1, 2))


def _likeliest(result: "NextTokens", tokenizer: "Tokenizer", top: int) -> list[dict[str, Any]]:  # Any: JSON
    from knnlm.decoding import top_tokens

    mixed = result.mixed
    tokens: list[int] = top_tokens(mixed.log_probs[0], top).tolist() if top else []
    return [
        {
            "id": token,
            "token": tokenizer.token(token),
            "p": exp(float(mixed.log_probs[0, token])),
            "p_lm": exp(float(mixed.lm_log_probs[0, token])),
            "p_knn": None if mixed.knn_log_probs is None else exp(float(mixed.knn_log_probs[0, token])),
        }
        for token in tokens
    ]


def _nearest(result: "NextTokens", tokenizer: "Tokenizer") -> list[dict[str, Any]]:  # Any: JSON
    """Every neighbor that came with its text, by domain and then distance."""
    shown = []
    for found in result.found:
        for passage, distance in zip(
            found.passages[0] if found.passages else (), found.neighbors.distances[0], strict=False
        ):
            inside = passage.position > len(passage.before)
            before, after = tokenizer.passage(passage.before, passage.after, inside=inside)
            shown.append(
                {
                    "domain": found.domain,
                    "entry": passage.entry,
                    "distance": float(distance),
                    "token": tokenizer.token(int(passage.after[0])),
                    "document": passage.document,
                    "position": passage.position,
                    "before": before,
                    "after": after,
                }
            )
    return shown
