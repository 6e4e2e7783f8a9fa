"""What the commands share: options that mean the same everywhere, and the two ways of answering.

People get tables on standard output; `--json` gives one JSON document there and nothing else. Progress and remarks go
to standard error in both cases. Nothing heavy is imported before a command runs.
"""

import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from knnlm.errors import InvalidRequest, UnknownVersion

if TYPE_CHECKING:
    from knnlm.datastore.catalog import Catalog
    from knnlm.datastore.progress import Progress, Report
    from knnlm.evaluation.splits import Part
    from knnlm.messages import DomainChange

DomainArgument = Annotated[str, typer.Argument(help="The domain: a-z, 0-9, '-', '_' and '.'.")]
SourcesArgument = Annotated[
    list[str], typer.Argument(help="Text: .txt, .md, .rst, .jsonl or .parquet files, folders of them, or - for stdin.")
]
OptionalSources = Annotated[
    list[str] | None,
    typer.Argument(help="Text: .txt, .md, .rst, .jsonl or .parquet files, folders of them, or - for stdin."),
]
TextArgument = Annotated[str, typer.Argument(help="The text, or - for standard input.")]
StoreOption = Annotated[Path, typer.Option("--store", envvar="KNNLM_STORE", help="The folder of all datastores.")]
ModelOption = Annotated[
    str, typer.Option("--model", envvar="KNNLM_MODEL", help="Hugging Face folder or hub id of the language model.")
]
VersionOption = Annotated[str | None, typer.Option("--version", help="A version; by default the current one.")]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
PartOption = Annotated[
    str, typer.Option("--part", help="Use this part of the documents: all, store (80 %), tune (10 %) or report (10 %).")
]
MinContextOption = Annotated[
    int | None,
    typer.Option("--min-context", help="Tokens that every prediction sees at least; by default half the context."),
]
WindowOption = Annotated[
    int | None,
    typer.Option(
        "--context-length", help="Tokens fed at once; by default as the domain was built, at most 2048 without."
    ),
]
IndexOption = Annotated[
    str | None, typer.Option("--index", help="Search with this index of the version; by default its default one.")
]
BuildVersionOption = Annotated[
    str | None,
    typer.Option("--version", help="Its name; by default the next of v1, v2, ..., or the unfinished one."),
]
BuildContextOption = Annotated[
    int | None,
    typer.Option("--context-length", help="Tokens fed at once; by default all that the model takes, at most 2048."),
]
BuildMinContextOption = Annotated[
    int | None,
    typer.Option("--min-context", help="Tokens that every key sees at least; by default half the context length."),
]
BosOption = Annotated[
    str,
    typer.Option(
        "--bos", help="BOS token before each document alone (document) or before each of its windows (window)."
    ),
]
KeyDtypeOption = Annotated[str, typer.Option("--key-dtype", help="float16 or float32.")]
KeyFunctionOption = Annotated[
    str,
    typer.Option(
        "--key-function",
        help="ffn_input, attention_input or model_output; each also with _before_norm; the first two with @-2 are "
        "those of the last layer but one.",
    ),
]
BatchTokensOption = Annotated[int, typer.Option("--batch-tokens", help="Tokens in the model at once.")]
RecipeOption = Annotated[
    str, typer.Option("--index", help="auto, a recipe of `knnlm index`, or none for exact search.")
]
ActivateOption = Annotated[bool, typer.Option(help="Make it the current version of the domain.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]

DEFAULT_STORE = Path("store")
PIPE_WIDTH = 160  # columns of a table that no terminal limits
LINE_SECONDS = 30.0  # between two lines of progress in a log


def print_json(value: Any) -> None:  # Any: JSON
    """One document on one line; numbers that JSON does not know (inf, nan) as null."""
    print(json.dumps(_finite(value), ensure_ascii=False, allow_nan=False))


def remark(text: str) -> None:
    """A line for the person at the terminal, not for what reads standard output."""
    print(text, file=sys.stderr, flush=True)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, left: Sequence[int] = (0,)) -> None:
    """rows of text; the columns numbered in `left` begin at the left, the others are numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in it are no markup
    console = Console()
    if not console.is_terminal:
        console.width = PIPE_WIDTH
    console.print(table)


class Bar(Protocol):
    """How a running command says how far it is."""

    def __call__(self, completed: int, description: str | None = None, total: int | None = None) -> None: ...


@contextmanager
def progress(unit: str, total: int | None, *, description: str) -> Iterator[Bar]:
    """A bar on standard error with `unit` per second and the time left; a line now and then where that is no terminal.

    Call what it gives with the count so far.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:,.0f} {task.fields[unit]}"),
        TextColumn("{task.fields[rate]}"), TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    console = Console(stderr=True)
    said = time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        task = bars.add_task(description, total=total, unit=unit, rate="")

        def update(completed: int, description: str | None = None, total: int | None = None) -> None:
            nonlocal said
            bars.update(task, completed=completed, description=description, total=total)
            state = bars.tasks[0]
            rate = f"{state.speed:,.0f} {unit}/s" if state.speed else ""
            bars.update(task, rate=rate)
            if not console.is_terminal and time.monotonic() - said > LINE_SECONDS:
                said = time.monotonic()
                share = f" of {state.total:,.0f}" if state.total else ""
                remark(f"{state.description}: {completed:,}{share} {unit}  {rate}")

        yield update


PHASES = {
    "tokenize": "reading documents", "encode": "making keys", "copy": "copying", "index": "index",
    "publish": "checksums", "start": "starting workers", "shards": "writing shards", "train": "training the index",
    "verify": "verifying shards",
}  # fmt: skip


@contextmanager
def showing() -> Iterator["Report"]:
    """A bar for all phases of a build or a change."""
    with progress("entries", None, description=PHASES["tokenize"]) as update:

        def on_progress(p: "Progress") -> None:
            rate = f", {p.tokens_per_second:,.0f} tokens/s" if p.tokens else ""
            where = f" ({p.detail})" if p.detail else ""
            update(p.entries_done, f"{PHASES[p.phase]}{rate}{where}", p.entries_total or None)

        yield on_progress


def print_change(catalog: "Catalog", change: "DomainChange", *, active: bool, as_json: bool) -> None:
    """What adding, removing or compacting made of a domain."""
    from dataclasses import asdict

    from knnlm.datastore.manifest import Manifest

    path = catalog.path(change.domain, change.version)
    manifest = Manifest.load(path)
    if as_json:
        counts = {"entries": manifest.live_entries, "documents": manifest.live_documents}
        print_json(asdict(change) | {"path": str(path), "active": active, "index": manifest.index.recipe} | counts)
        return
    print(f"{path}: {manifest.live_entries:,} entries of {manifest.live_documents:,} documents")
    for word, documents, entries in (
        ("added", change.added_documents, change.added_entries),
        ("removed", change.removed_documents, change.removed_entries),
    ):
        if documents:
            print(f"  {word} since {change.parent}: {entries:,} entries of {documents:,} documents")
    if change.advice is not None:
        remark(change.advice)
    if active:
        print(f"{change.version} is now the current version of {change.domain} (was {change.parent})")
    else:
        print(f"not activated: `knnlm domains activate {change.domain} {change.version}`")


def read_text(text: str) -> str:
    """The argument itself, or standard input for "-". Raises InvalidRequest when it is empty or no UTF-8."""
    if text == "-":
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as err:
            raise InvalidRequest(f"standard input is not UTF-8 text: {err}", param="text") from err
    if not text:
        raise InvalidRequest("the text is empty", param="text")
    return text


def parse_part(name: str) -> "Part":
    from knnlm.evaluation.splits import Part

    try:
        return Part(name)
    except ValueError as err:
        raise InvalidRequest(f"part must be one of {', '.join(Part)}, got {name!r}", param="part") from err


def version_folder(catalog: "Catalog", domain: str, version: str | None) -> Path:
    """The folder of a version, of the current one for None. Raises UnknownDomain or UnknownVersion."""
    chosen = catalog.current(domain) if version is None else version
    if chosen is None:
        raise UnknownVersion(
            f"domain {domain} has no current version: name one with --version, it has "
            f"{', '.join(catalog.versions(domain))}",
            param="version",
        )
    return catalog.path(domain, chosen)


def _finite(value: Any) -> Any:  # Any: JSON
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
