"""What a user waits for: one `/v1/next_token` call with retrieval, beside the same call on the LM alone.

    python -m benchmarks.latency [--size N] [--text PATH ...] [--calls 100]

Through all three services, one call at a time, contexts of the held-out text of several lengths, k = 1024. The figure
is the one at 256 tokens, the length of a paragraph or two.
"""

from collections.abc import Callable
from itertools import count

import httpx
import numpy as np

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import Latency, arguments, figure, latencies, table
from benchmarks.scoring import Ids, tokens_of
from benchmarks.system import System, system
from knnlm.tokenizer import Tokenizer

LENGTHS, SHOWN = (16, 64, 256, 511), 256
K, GOAL = 1024, 1.3
CONTEXTS = 32  # different ones, in turn


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--calls", type=int, default=100, help="of every kind (default 100)")
    options = parser.parse_args()
    prepared = prepare(options.size, options.text)
    tokenizer_json = (prepared.model / "tokenizer.json").read_text(encoding="utf-8")
    text = tokens_of(prepared, Tokenizer(tokenizer_json, bos_token_id=None, eos_token_id=None), CONTEXTS * max(LENGTHS))
    with system(prepared.store, prepared.model, FOLDER / "logs") as running:
        measure(prepared, running, text, options.calls)


def measure(prepared: Prepared, running: System, text: Ids, calls: int) -> None:
    turn = count()
    with httpx.Client(base_url=running.aggregator.http, timeout=60) as client:

        def call(length: int, body: dict[str, object]) -> Callable[[], object]:
            def program() -> None:
                start = next(turn) % CONTEXTS * length
                tokens = text[start : start + length].tolist()
                client.post("/v1/next_token", json={"tokens": tokens, **body}).raise_for_status()

            return program

        found: dict[int, tuple[Latency, Latency]] = {}
        for length in LENGTHS:
            knn: dict[str, object] = {"knn": {"domain": prepared.domain, "k": K}}
            of = latencies({"alone": call(length, {}), "mixed": call(length, knn)}, calls)
            found[length] = (of["alone"], of["mixed"])
    table(
        ["tokens of context", "LM alone, p50 ms", "p99", "with retrieval, p50 ms", "p99", "ratio of p50"],
        [
            [str(length), *(f"{1000 * p:.1f}" for of in pair for p in (of.p50, of.p99)), f"{ratio(pair):.2f}"]
            for length, pair in found.items()
        ],
    )
    figure(
        "latency of next_token with retrieval / on the LM alone",
        ratio(found[SHOWN]),
        GOAL,
        better="less",
        size=prepared.entries,
        k=K,
        context=SHOWN,
        milliseconds=round(1000 * found[SHOWN][1].p50, 2),
        ratios={str(length): round(ratio(pair), 3) for length, pair in found.items()},
    )


def ratio(pair: tuple[Latency, Latency]) -> float:
    """The median with retrieval over that of the LM alone."""
    return float(np.divide(pair[1].p50, pair[0].p50))


if __name__ == "__main__":
    main()
