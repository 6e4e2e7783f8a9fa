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
from knnlm.cli.retrieval import (
    MemoryChoice,
    described,
    described_memory,
    domain_names,
    memory_here,
    mixed_with,
    retrieving,
)
from knnlm.errors import InvalidRequest, TooLarge
from knnlm.options import CacheOptions, KnnOptions

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from knnlm.mixer import NextTokens
    from knnlm.pipeline import Pipeline
    from knnlm.tokenizer import Tokenizer

PASSAGE_TOKENS = 16  # a side


@retrieving
def next_token(
    text: TextArgument,
    model: ModelOption,
    store: StoreOption = DEFAULT_STORE,
    knn: KnnOptions | None = None,
    memory: MemoryChoice | None = None,
    cache: CacheOptions | None = None,
    top: Annotated[int, typer.Option(help="Number of likeliest tokens to show.")] = 10,
    neighbors: Annotated[int, typer.Option(help="Number of nearest neighbors of each domain to show.")] = 5,
    context_length: Annotated[
        int | None, typer.Option(help="Tokens that the model may see; by default all that it takes.")
    ] = None,
    truncate: Annotated[
        str | None, typer.Option(help="left: of a longer text see the end; without it, it is refused.")
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show the likeliest next tokens after a text, by the mixture, the LM and the neighbors."""
    from knnlm.pipeline import Pipeline

    for name, value in (("--top", top), ("--neighbors", neighbors)):
        if value < 0:
            raise InvalidRequest(f"{name} must be at least 0, got {value}", param=name)
    if truncate not in (None, "left"):
        raise InvalidRequest(f"--truncate must be left, got {truncate!r}", param="--truncate")
    domains = domain_names(knn)
    text = read_text(text)
    asked, memories = memory_here(memory)
    with Pipeline.load(model, store, domains, device=device, dtype=dtype, memories=memories) as pipeline:
        context = _fitting(pipeline, text, context_length, truncate)
        passages = neighbors if domains else 0
        result = pipeline.next_token(
            context, mixed_with(knn, cache), memory=asked, passages=passages, passage_tokens=PASSAGE_TOKENS
        )
        likeliest = _likeliest(result, pipeline.tokenizer, top)
        nearest = _nearest(result, pipeline.tokenizer)
    if as_json:
        used = {"domains": [d.as_json() for d in result.domains], "memories": [m.as_json() for m in result.memories]}
        print_json({"model": pipeline.lm.info.model_id, **used, "tokens": likeliest, "neighbors": nearest})
        return
    columns = ["p", "p_lm", *(["p_knn"] if result.domains else []), *(["p_memory"] if result.memories else [])]
    columns += ["p_cache"] if cache is not None else []
    print_table(
        ["token", *columns],
        [[repr(t["token"]), *("" if t[c] is None else f"{t[c]:.5f}" for c in columns)] for t in likeliest],
    )
    for m in result.memories:
        print(f"\n{described_memory(m.as_json())}")
    for d in result.domains:
        print(f"\n{described(d)}")
        rows = [
            [f"{n['distance']:.4g}", f"{n['before']!r} → {n['token']!r}", f"{n['document']}:{n['position']}"]
            for n in nearest
            if n["domain"] == d.domain
        ]
        if rows:
            print_table(["distance", "neighbor", "document:token"], rows, left=(1, 2))


def _fitting(
    pipeline: "Pipeline", text: str, context_length: int | None, truncate: str | None
) -> "npt.NDArray[np.int32]":
    """The text's tokens, no more than are to be seen. Raises TooLarge for more, unless they are to be truncated."""
    from knnlm.decoding import end_of_context

    info = pipeline.lm.info
    most = info.context_length if context_length is None else context_length
    if not 1 <= most <= info.context_length:
        raise InvalidRequest(
            f"context_length must lie in [1, {info.context_length}], got {most}", param="context_length"
        )
    tokens = pipeline.tokenizer.encode(text)
    if len(tokens) > most and truncate is None:
        raise TooLarge(
            f"the text has {len(tokens)} tokens, at most {most} are taken: --truncate left keeps its end", param="text"
        )
    return end_of_context(tokens, most, info.bos_token_id)


def _likeliest(result: "NextTokens", tokenizer: "Tokenizer", top: int) -> list[dict[str, Any]]:  # Any: JSON
    from knnlm.decoding import top_tokens

    mixed = result.mixed
    by_kind = {kind: mixed.mean_row(0, kind) for kind in ("knn", "memory", "cache")}
    tokens: list[int] = top_tokens(mixed.log_probs[0], top).tolist() if top else []
    return [
        {
            "id": token,
            "token": tokenizer.token(token),
            "p": exp(float(mixed.log_probs[0, token])),
            "p_lm": exp(float(mixed.lm_log_probs[0, token])),
            **{f"p_{kind}": None if row is None else exp(float(row[token])) for kind, row in by_kind.items()},
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
            before, after = tokenizer.passage(passage.before, passage.after, position=passage.position)
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
