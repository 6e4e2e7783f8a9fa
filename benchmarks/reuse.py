"""What it is worth to use what was found before: steps begun ahead, and entries that are followed instead of searched.

    python -m benchmarks.reuse [--size N] [--text PATH ...] [--rounds 5] [--tokens 4096]

One completion at a time through all three services, greedy and sampled: prompts of 40 tokens, 96 generated, k = 1024,
with and without `reuse.ahead`; the texts are compared, too. Then, in this process, the perplexity of held-out text by
`reuse.tau`, and for how many of its tokens nothing was searched.
"""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import arguments, figure, interleave, table
from benchmarks.load import HttpCallers, Post
from benchmarks.scoring import tokens_of
from benchmarks.system import System, system
from knnlm.options import DomainOptions, KnnOptions, ReuseOptions, SearchOptions
from knnlm.pipeline import Pipeline
from knnlm.tokenizer import Tokenizer

PROMPT, GENERATED, K = 40, 96, 1024
STRIDE = 400  # tokens between the beginnings of prompts
AHEAD = 2
TAUS = (None, 64, 16, 4, 1)
GOAL = 1.3

Ids = npt.NDArray[np.int64]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="of every way in turn (default 5)")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens that are scored (default 4096)")
    options = parser.parse_args()
    prepared = prepare(options.size, options.text)
    tokenizer_json = (prepared.model / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer(tokenizer_json, bos_token_id=None, eos_token_id=None)
    text = tokens_of(prepared, tokenizer, max(options.tokens, 64 * STRIDE))
    with system(prepared.store, prepared.model, FOLDER / "logs") as running, asyncio.Runner() as runner:
        for temperature in (0.0, 1.0):
            ahead(prepared, running, text, runner, options.rounds, temperature)
    followed(prepared, text[: options.tokens])


def ahead(
    prepared: Prepared, running: System, text: Ids, runner: asyncio.Runner, rounds: int, temperature: float
) -> None:
    """Tokens per second of one completion at a time, with and without steps that are begun ahead."""

    def body(steps: int, prompt: int) -> dict[str, Any]:  # Any: JSON
        begin = prompt * STRIDE
        knn = {"domain": prepared.domain, "k": K, "reuse": {"ahead": steps}}
        return {
            "prompt": text[begin : begin + PROMPT].tolist(),
            "max_tokens": GENERATED,
            "ignore_eos": True,
            "seed": prompt,
            "temperature": temperature,
            "knn": knn,
        }

    def one_at_a_time(steps: int) -> Callable[[], int]:
        posts = [Post("/v1/completions", json.dumps(body(steps, prompt)).encode()) for prompt in range(32)]
        caller = HttpCallers(running.aggregator.http, posts, 1)
        runner.run(caller.__aenter__())

        def program() -> int:
            runner.run(caller.call(0))
            return GENERATED

        return program

    with httpx.Client(base_url=running.aggregator.http, timeout=60) as client:
        for prompt in range(4):
            plain, drafted = (client.post("/v1/completions", json=body(steps, prompt)) for steps in (0, AHEAD))
            if plain.json()["choices"] != drafted.json()["choices"]:
                raise RuntimeError(f"prompt {prompt}: steps that are begun ahead made another text")
    rates = interleave({f"ahead {steps}": one_at_a_time(steps) for steps in (0, AHEAD)}, 2.0, rounds)
    name = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
    table(["", "tokens/s"], [[f"{name}, {way}", f"{rate.median:,.0f}"] for way, rate in rates.items()])
    ratio = rates[f"ahead {AHEAD}"].over(rates["ahead 0"])
    figure(
        f"one completion, {name}: tokens/s with reuse.ahead {AHEAD} / without", ratio, GOAL,
        size=prepared.entries, k=K, prompt=PROMPT, generated=GENERATED,
    )  # fmt: skip


def followed(prepared: Prepared, text: Ids) -> None:
    """Perplexity and skipped searches by tau."""
    tokens = text.astype(np.int32)
    found = {}
    with Pipeline.load(str(prepared.model), prepared.store, [prepared.domain]) as pipeline:
        for tau in TAUS:
            knn = KnnOptions((DomainOptions(prepared.domain),), search=SearchOptions(k=K), reuse=ReuseOptions(tau=tau))
            score = pipeline.score(tokens, knn)
            found[tau] = (score.perplexity, score.mixed.components[0].evidence.skipped.sum() / len(score.log_probs))
        alone = pipeline.score(tokens).perplexity
    rows = [["LM alone", f"{alone:.3f}", "100.0 %"]]
    rows += [
        ["every place" if tau is None else f"tau {tau}", f"{perplexity:.3f}", f"{skipped:.1%}"]
        for tau, (perplexity, skipped) in found.items()
    ]
    table(["searched", "perplexity", "not searched"], rows)
    searched = found[None][0]
    for tau, (perplexity, skipped) in found.items():
        if tau is not None:
            figure(
                f"perplexity with reuse.tau {tau} / searched at every place", perplexity / searched, 1.01,
                better="less", size=prepared.entries, k=K, skipped=round(skipped, 3),
            )  # fmt: skip


if __name__ == "__main__":
    main()
