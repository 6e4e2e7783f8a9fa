"""docs/paper.md: what the records give, and nothing else, below a summary that is written by hand.

    python -m experiments report [--into FOLDER]

Writes FOLDER/paper.md and FOLDER/paper/ with the records and their figures; by default in build/paper. The summary is
FOLDER/paper/summary.md, where there is one. A page elsewhere is to be published: it is refused where it would show
passages of text from a folder; docstrings it may show.
"""

import argparse
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from experiments.figures import draw
from experiments.records import Cell, NotARecord, Record, Table, load_all
from experiments.table import NAMES, experiment
from experiments.texts import DOCSTRINGS
from experiments.verdicts import Outcome

__all__ = ["main", "render", "write"]

HEAD = """# The papers' experiments

What Khandelwal et al. 2020 (arXiv 1911.00172) and Cao et al. 2025 (arXiv 2508.09874) found, measured again at a small
size. `make paper` runs all of it, `python -m experiments NAME` one; with `--scale full` it is the papers' own size, and
`--plan` says what that takes. Without a folder of text (`make paper TEXT=FOLDER`) docstrings of installed packages
stand for its domains and for WikiText-103. This page is made by `python -m experiments report` from the records in
[paper/](paper/).
"""
OUT_OF_REACH = """## Out of reach at this size

Question answering and the nine tasks of Memory Decoder (Tables 2 and 5) need a model that can answer: one of four
million parameters cannot. At full size they run through lm-eval against the server, which tells it the tokenizer:

    knnlm build facts CORPUS --store store --model MODEL
    knnlm memory targets facts --store store --model MODEL
    knnlm memory train facts HELD_OUT --store store --model MODEL --out FOLDER
    knnlm serve --model MODEL --store store --memory facts=FOLDER
    OPENAI_API_KEY=none lm_eval run --model local-completions --tasks nq_open,longbench_hotpotqa,sst2,cb,rte \\
        --model_args base_url=http://127.0.0.1:8000/v1/completions,model=NAME~facts,max_length=CONTEXT --batch_size 8

NAME is the id that `GET /v1/models` gives, CONTEXT its `max_model_len`; `model=NAME+facts` is retrieval, `model=NAME`
the base. Of the nine tasks lm-eval has these three, and AG News and Yahoo with its unitxt; it scores answers by their
log-likelihood, not by that over the same answer without the question, as the paper does.
"""


def main(arguments: Sequence[str], folder: Path) -> int:
    """Make the page of the records in folder/records."""
    parser = argparse.ArgumentParser(prog="python -m experiments report", description=__doc__)
    parser.add_argument("--into", type=Path, default=folder, help="where to write (default build/paper)")
    options = parser.parse_args(arguments)
    try:
        if options.into != folder:
            _refuse_passages(load_all(folder / "records", NAMES))
        write(folder / "records", options.into)
    except NotARecord as err:
        raise SystemExit(str(err)) from err
    print(options.into / "paper.md")
    return 0


def _refuse_passages(records: Sequence[Record]) -> None:
    """Raises SystemExit where a page to publish would hold passages of text that came from a folder."""
    for record in records:
        if experiment(record.name).quotes and record.source != DOCSTRINGS:
            raise SystemExit(
                f"{record.name} shows passages of {record.source}: to publish the page run "
                f"`python -m experiments {record.name} --scale {record.scale} --text docstrings` before"
            )


def write(records: Path, into: Path) -> None:
    """The page, and beside it records and figures."""
    beside = into / "paper"
    beside.mkdir(parents=True, exist_ok=True)
    found = load_all(records, NAMES)
    for record in found:
        if (records / f"{record.name}.json").resolve() != (beside / f"{record.name}.json").resolve():
            shutil.copyfile(records / f"{record.name}.json", beside / f"{record.name}.json")
        for chart in record.findings.charts:
            draw(chart, beside / f"{record.name}-{chart.name}")
    summary = beside / "summary.md"
    text = render(load_all(beside, NAMES), summary.read_text(encoding="utf-8") if summary.is_file() else "")
    (into / "paper.md").write_text(text, encoding="utf-8")


def render(records: Sequence[Record], summary: str) -> str:
    """The whole page as Markdown."""
    parts = [
        HEAD,
        _about(records),
        summary.strip(),
        _overview(records),
        *(_section(record) for record in records),
        OUT_OF_REACH,
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def _overview(records: Sequence[Record]) -> str:
    if not records:
        return "No experiment has been run."
    rows: list[tuple[Cell, ...]] = []
    for record in records:
        counted = Counter(v.outcome for v in record.findings.verdicts)
        rows.append((f"[{record.title}](#{_anchor(record)})", record.paper, *(counted.get(o, 0) for o in Outcome)))
    table = Table("", ("experiment", "from", *map(str, Outcome)), tuple(rows))
    how = (
        "A shape *holds* where the 95 % interval of a paired bootstrap over documents lies on its side, *does not "
        "hold* where it lies on the other side, and is *within noise* where it contains zero. Weights and temperatures "
        "are fitted on other documents than those reported on."
    )
    return "\n\n".join(["## What came out", _markdown(table), how])


def _about(records: Sequence[Record]) -> str:
    """Text, model, machine, commit, memory and time."""
    if not records:
        return ""
    made: dict[str, float] = {}
    for record in records:
        made |= record.extra.get("made", {record.name: record.prepared_seconds})
    (usual, _), *others = Counter(r.source for r in records).most_common()
    texts = [usual, *(f"{text} in {', '.join(r.name for r in records if r.source == text)}" for text, _ in others)]

    def all_of(of: Callable[[Record], str]) -> str:
        return "; ".join(sorted(set(map(of, records))))

    return (
        f"Text: {'; '.join(texts)}. Model: {all_of(lambda r: r.model)}. Scale: {all_of(lambda r: r.scale)}. "
        f"Machine: {all_of(lambda r: r.machine)}. Commit: {all_of(lambda r: r.commit)}. "
        f"Peak memory: {max(r.peak_bytes for r in records) / 1e9:.1f} GB. Time: {sum(made.values()) / 60:.0f} minutes "
        f"for models, datastores, searches and memories, {sum(r.seconds for r in records) / 60:.0f} in the experiments."
    )


def _section(record: Record) -> str:
    one = experiment(record.name)
    parts = [f"## {record.title}", f"{record.paper}; `{record.command}`, commit {record.commit}.", one.about.strip()]
    for table in record.findings.tables:
        parts += [f"*{table.title}*", _markdown(table)]
    parts += [f"![{c.title}](paper/{record.name}-{c.name}.svg)" for c in record.findings.charts]
    parts += ["\n".join(f"- {verdict.line}" for verdict in record.findings.verdicts), *record.findings.notes]
    return "\n\n".join(part for part in parts if part)


def _markdown(table: Table) -> str:
    head = "| " + " | ".join(table.columns) + " |\n|" + "---|" * len(table.columns)
    return "\n".join([head, *("| " + " | ".join(map(_cell, row)) + " |" for row in table.rows)])


def _cell(value: Cell) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else value.replace("|", "\\|").replace("\n", "⏎")


def _anchor(record: Record) -> str:
    kept = "".join(c for c in record.title.lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")
