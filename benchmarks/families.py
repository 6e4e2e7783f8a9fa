"""Every family of index on the same keys and queries: speed, size, recall, total variation and perplexity.

    python -m benchmarks.families [--size N] [--text PATH ...] [--datastore FOLDER] [--recipes "..."] [--queries N]

The report of `knnlm index report`. The plot is written to build/bench/families-ENTRIES.html. Each index has a line of
its own, whose value is its queries/s at batch 64, k = 1024; there is no goal.
"""

import sys

from benchmarks.data import FOLDER, add_datastore_option, asked_for
from benchmarks.harness import arguments, figure
from knnlm.cli.index import print_report
from knnlm.evaluation.collect import HeldOut
from knnlm.evaluation.index_candidates import candidates, default_candidates
from knnlm.evaluation.index_page import plotted_cell, write_index_page
from knnlm.evaluation.index_report import index_report

SECONDS, ROUNDS = 0.2, 3  # of timing, for each of some twenty lines and eight cells


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--recipes", default=None, help="separated by spaces; by default one of every family")
    parser.add_argument("--queries", type=int, default=1024, help="held-out tokens (default 1024)")
    add_datastore_option(parser)
    options = parser.parse_args()
    prepared = asked_for(options, queries=options.queries)
    held_out = HeldOut(prepared.queries, prepared.lm_log_probs, prepared.targets, len(prepared.documents))
    size = (prepared.entries, prepared.queries.shape[1])
    chosen = default_candidates(*size) if options.recipes is None else candidates(options.recipes.split(), *size)
    found = index_report(
        prepared.path,
        held_out,
        chosen,
        FOLDER / f"families-{prepared.entries}-{prepared.domain}",
        seconds=SECONDS,
        rounds=ROUNDS,
        seed=options.seed,
        on_progress=lambda what, done, total: print(f"{done}/{total} {what}", file=sys.stderr, flush=True),
    )
    page = FOLDER / f"families-{prepared.entries}.html"
    write_index_page(page, found)
    print_report(found)
    print(f"\nplot: {page.relative_to(FOLDER.parent.parent)}")
    cell = plotted_cell(found)
    for line in found.lines:
        name = f"queries/s of {line.name}, batch {cell[0]}, k {cell[1]}"
        figure(name, line.speeds[cell], None, size=found.entries, exact=found.exact.as_json(), index=line.as_json())


if __name__ == "__main__":
    main()
