"""What retrieval costs where it is used most: scoring a long text through all three services.

    python -m benchmarks.scoring [--size N] [--text PATH ...] [--tokens 8192]

Beside it, in this process: the plain model of transformers, forward and loss over the same windows, with no retrieval
and no service. Windows of 512 tokens, of which at least half are context, so that two tokens are fed for one that is
scored; every token is counted once. k = 1024. The same two threads for the plain model, the lm service and the
datastore service; all share the processor's cores.

The plain model is given as many windows at a time as the lm service gives its own.
"""

import math
from collections.abc import Callable, Sequence

import httpx
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import arguments, figure, interleave, table
from benchmarks.system import THREADS, System, system
from knnlm.decoding import Window, plan_windows
from knnlm.lm.model import CPU_BATCH_TOKENS
from knnlm.tokenizer import Tokenizer

__all__ = ["PlainModel", "main", "tokens_of"]

TOKENS, K, GOAL = 8192, 1024, 0.7
PLAIN, ALONE, MIXED = "plain model, forward and loss", "/v1/score, the LM alone", "/v1/score with retrieval"
IGNORED = -100  # the label that the loss of transformers leaves out

Ids = npt.NDArray[np.int64]


class PlainModel:
    """A model of transformers on the CPU, in float32, as a user without this program would call it."""

    def __init__(self, folder: str) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )  # in eval mode
        self.context_length: int = self.model.config.max_position_embeddings

    def nats(self, tokens: Ids, windows: Sequence[Window]) -> float:
        """Negative log-probability of the tokens that the windows predict, all together."""
        total = 0.0
        for batch in batches(windows):
            ids = torch.from_numpy(np.stack([tokens[w.start : w.end] for w in batch]))
            labels = ids.clone()
            for row, window in zip(labels, batch, strict=True):
                row[: window.first - window.start] = IGNORED
            with torch.no_grad():
                loss = self.model(ids, labels=labels, use_cache=False).loss.item()
            total += loss * sum(w.end - w.first for w in batch)
        return total


def batches(windows: Sequence[Window]) -> list[list[Window]]:
    """Windows of one length together, at most CPU_BATCH_TOKENS tokens."""
    found: list[list[Window]] = []
    for window in sorted(windows, key=lambda w: w.start - w.end):
        length = window.end - window.start
        last = found[-1] if found else []
        if last and last[0].end - last[0].start == length and (len(last) + 1) * length <= CPU_BATCH_TOKENS:
            last.append(window)
        else:
            found.append([window])
    return found


def tokens_of(prepared: Prepared, tokenizer: Tokenizer, count: int) -> Ids:
    """(count,) the held-out documents one after another, from the first again when they are too few."""
    parts = [tokenizer.encode(document.text) for document in prepared.documents]
    found = np.concatenate(parts).astype(np.int64)
    return np.resize(found, count)


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"length of the text (default {TOKENS})")
    parser.add_argument("--rounds", type=int, default=5, help="of every way in turn (default 5)")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    prepared = prepare(options.size, options.text)
    tokenizer_json = (prepared.model / "tokenizer.json").read_text(encoding="utf-8")
    tokens = tokens_of(prepared, Tokenizer(tokenizer_json, bos_token_id=None, eos_token_id=None), options.tokens)
    with system(prepared.store, prepared.model, FOLDER / "logs") as running:
        measure(prepared, running, tokens, options.rounds)


def measure(prepared: Prepared, running: System, tokens: Ids, rounds: int) -> None:
    plain = PlainModel(str(prepared.model))
    windows = plan_windows(len(tokens), plain.context_length, plain.context_length // 2)
    scored = len(tokens) - 1
    services = {"lm": running.lm, "datastore": running.datastore, "aggregator": running.aggregator}
    spent = {name: dict.fromkeys(services, 0.0) for name in (ALONE, MIXED)}
    calls = dict.fromkeys(spent, 0)
    with httpx.Client(base_url=running.aggregator.http, timeout=600) as client:
        same = {"context_length": plain.context_length, "min_context": plain.context_length // 2}

        def answer(body: dict[str, object]) -> dict[str, float]:
            response = client.post("/v1/score", json={"tokens": tokens.tolist(), **same, **body})
            response.raise_for_status()
            found: dict[str, float] = response.json()
            return found

        def through_services(name: str, body: dict[str, object]) -> Callable[[], int]:
            def program() -> int:
                before = {service: one.cpu_seconds() for service, one in services.items()}
                answer(body)
                for service, one in services.items():
                    spent[name][service] += one.cpu_seconds() - before[service]
                calls[name] += 1
                return scored

            return program

        def without() -> int:
            plain.nats(tokens, windows)
            return scored

        retrieval: dict[str, object] = {"knn": {"domain": prepared.domain, "k": K}}
        mixed = answer(retrieval)
        expected = math.exp(plain.nats(tokens, windows) / scored)
        if not math.isclose(mixed["perplexity_lm"], expected, rel_tol=1e-4):
            raise SystemExit(f"the services give the LM perplexity {mixed['perplexity_lm']}, transformers {expected}")
        rates = interleave(
            {PLAIN: without, ALONE: through_services(ALONE, {}), MIXED: through_services(MIXED, retrieval)},
            seconds=0.1,
            rounds=rounds,
        )
    table(
        ["", "tokens/s", "of the plain model", *(f"{service}, CPU us/token" for service in services)],
        [
            [
                name,
                f"{rate.median:,.0f}",
                f"{rate.over(rates[PLAIN]):.2f}",
                *(f"{1e6 * spent[name][s] / calls[name] / scored:.0f}" if name in spent else "" for s in services),
            ]
            for name, rate in rates.items()
        ],
    )
    print(f"perplexity {mixed['perplexity_lm']:.2f} without retrieval, {mixed['perplexity']:.2f} with it")
    figure(
        "scoring through three services / plain transformers forward and loss",
        rates[MIXED].over(rates[PLAIN]),
        GOAL,
        size=prepared.entries,
        tokens=len(tokens),
        k=K,
        tokens_per_second=round(rates[MIXED].median),
        alone=round(rates[ALONE].over(rates[PLAIN]), 3),
    )


if __name__ == "__main__":
    main()
