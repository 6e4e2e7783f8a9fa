"""`knnlm explain`: what retrieval gave each token of a text, and the documents that it leans on."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from knnlm.cli.common import (
    DEFAULT_STORE,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MinContextOption,
    StoreOption,
    TextArgument,
    WindowOption,
    print_json,
    print_table,
    read_text,
    remark,
)
from knnlm.cli.remote import (
    ModelNameOption,
    RemoteKeyOption,
    RemoteOption,
    TlsCaOption,
    TlsCertOption,
    TlsKeyOption,
    is_given,
    refuse_beside,
    refuse_without,
    service,
)
from knnlm.cli.retrieval import MemoryChoice, described_memory, domain_names, memory_here, mixed_with, retrieving
from knnlm.errors import InvalidRequest
from knnlm.messages import PASSAGE_TOKENS
from knnlm.options import CacheOptions, KnnOptions

if TYPE_CHECKING:
    from rich.text import Text

    from knnlm.clients.explained import Explained

SHOWN_DOCUMENTS = 10
LEAST_SHADED = 0.02  # share of a token's probability


@retrieving
def explain(
    context: typer.Context,
    text: TextArgument,
    prompt: Annotated[
        str | None, typer.Option(help="Explain the text as it follows this one, rather than by itself.")
    ] = None,
    model: ModelNameOption = None,
    store: StoreOption = DEFAULT_STORE,
    knn: KnnOptions | None = None,
    memory: MemoryChoice | None = None,
    cache: CacheOptions | None = None,
    passages: Annotated[int, typer.Option(help="Passages of each token, those that gave it most first.")] = 3,
    passage_tokens: Annotated[int, typer.Option(help="Tokens of text on each side of a passage.")] = PASSAGE_TOKENS,
    html: Annotated[
        Path | None, typer.Option(help="Also write a page to this file, where each token shows its passages.")
    ] = None,
    context_length: WindowOption = None,
    min_context: MinContextOption = None,
    remote: RemoteOption = None,
    api_key_file: RemoteKeyOption = None,
    tls_ca_file: TlsCaOption = None,
    tls_cert_file: TlsCertOption = None,
    tls_key_file: TlsKeyOption = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Show where the probability of each token of a text comes from, and which documents the text leans on."""
    for name, value in (("--passages", passages), ("--passage-tokens", passage_tokens)):
        if value < 0:
            raise InvalidRequest(f"{name} must be at least 0, got {value}", param=name)
    text = read_text(text)
    if remote is not None:
        refuse_beside("--remote", context, "store", "device", "dtype")
        with service(remote, api_key_file, (tls_ca_file, tls_cert_file, tls_key_file)) as client:
            answer = client.explain(
                text if prompt is None else None,
                prompt=prompt,
                completion=None if prompt is None else text,
                model=model if is_given(context, "model") else None,
                knn=knn,
                memory=None if memory is None else memory.asked(),
                cache=cache,
                passages=passages,
                passage_tokens=passage_tokens,
                context_length=context_length,
                min_context=min_context,
            )
    else:
        refuse_without("--remote", context, "api_key_file", "tls_ca_file", "tls_cert_file", "tls_key_file")
        if model is None:
            raise InvalidRequest("give --model to load a model here, or --remote to ask a service", param="--model")
        from knnlm.clients.explained import explained
        from knnlm.pipeline import Pipeline

        asked, memories = memory_here(memory)
        with Pipeline.load(model, store, domain_names(knn), device=device, dtype=dtype, memories=memories) as pipeline:
            score = pipeline.explain(
                text,
                mixed_with(knn, cache),
                memory=asked,
                prompt=prompt,
                passages=passages,
                passage_tokens=passage_tokens,
                context_length=context_length,
                min_context=min_context,
            )
            answer = explained(score, pipeline.lm.info.model_id, pipeline.tokenizer)
    _show(answer, html, as_json=as_json)


def _show(answer: "Explained", page: Path | None, *, as_json: bool) -> None:
    if page is not None:
        from knnlm.cli.explained_page import explained_page
        from knnlm.datastore.files import write_atomic

        write_atomic(page, explained_page(answer).encode(errors="replace"))
        remark(f"the page is in {page}")
    from knnlm.wire.jsonable import to_json

    if as_json:
        print_json(to_json(answer))
        return
    from rich.console import Console

    Console(highlight=False).print(shaded(answer), soft_wrap=True)
    print()
    shown = answer.documents[:SHOWN_DOCUMENTS]
    if shown:
        rows = [[f"{d.share:.1%}", str(d.tokens), f"{printable(d.document)} ({d.domain})"] for d in shown]
        print_table(["of retrieval", "tokens", "document"], rows, left=(2,))
        if len(answer.documents) > len(shown):
            print(f"and {len(answer.documents) - len(shown)} other documents")
        print()
    for d in answer.domains:
        print(f"{d.domain} {d.version}: temperature {d.temperature:.5g}, k {d.k}, rule {d.rule}")
    for used in answer.memories:
        print(described_memory(to_json(used)))
    if answer.degraded is not None:
        remark(f"nothing was retrieved: {answer.degraded}")
    given = sum(t.retrieved for t in answer.tokens) / len(answer.tokens)
    perplexity = "infinite" if answer.perplexity is None else f"{answer.perplexity:.4f}"
    print(
        f"{len(answer.tokens)} tokens, perplexity {perplexity} (LM {answer.perplexity_lm:.4f}); "
        f"retrieval gave {given:.1%} of a token's probability on average"
    )


def shaded(answer: "Explained") -> "Text":
    """The text, each token on a ground that is the fuller the more of its probability was retrieved."""
    from rich.style import Style
    from rich.text import Text

    text = Text(printable(answer.context), style="dim")
    for token in answer.tokens:
        part = token.retrieved
        if part < LEAST_SHADED:
            text.append(printable(token.token), style="not dim")
            continue
        ground = f"rgb(255,{round(240 - 110 * part)},{round(200 - 160 * part)})"
        text.append(printable(token.token), Style(color="black", bgcolor=ground, dim=False))
    return text


def printable(text: str) -> str:
    """The text without characters by which a terminal takes orders."""
    return "".join(c if c in "\n\t" or c.isprintable() else "\ufffd" for c in text)
