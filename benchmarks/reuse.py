"""What it is worth to use what was found before: steps begun ahead, and entries that are followed instead of searched.

    python -m benchmarks.reuse [--size N] [--text PATH ...] [--rounds 5] [--tokens 4096]

One completion at a time through all three services, greedy and sampled: prompts of 40 tokens, 96 generated, k = 1024,
with and without `reuse.ahead`, where the texts are compared, too, and by `reuse.tau`, which makes other texts. Then, in
this process, the perplexity of held-out text by `reuse.tau`, and for how many of its tokens nothing was searched.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import Rate, arguments, figure, interleave, table
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
    parser.add_argument("--rounds", type=int, default=5, help="of every way in turn (default 5); 0: perplexities only")
    parser.add_argument("--tokens", type=int, default=4096, help="held-out tokens that are scored (default 4096)")
    options = parser.parse_args()
    prepared = prepare(options.size, options.text)
    tokenizer_json = (prepared.model / "tokenizer.json").read_text(encoding="utf-8")
    tokenizer = Tokenizer(tokenizer_json, bos_token_id=None, eos_token_id=None)
    text = tokens_of(prepared, tokenizer, max(options.tokens, 64 * STRIDE))
    if options.rounds:
        timed(prepared, text, options.rounds)
    followed(prepared, text[: options.tokens])


def timed(prepared: Prepared, text: Ids, rounds: int) -> None:
    """Tokens per second through the services, greedy and sampled."""
    with system(prepared.store, prepared.model, FOLDER / "logs") as running, asyncio.Runner() as runner:
        for temperature in (0.0, 1.0):
            caller = OneAtATime(prepared, running, text, runner, temperature)
            ahead(caller, rounds)
            pointers(caller, rounds)


class OneAtATime:
    """Completions of the running services, one after another. temperature: of all of them."""

    def __init__(
        self, prepared: Prepared, running: System, text: Ids, runner: asyncio.Runner, temperature: float
    ) -> None:
        self.name = "greedy" if temperature == 0 else f"sampled at temperature {temperature:g}"
        self.entries = prepared.entries
        self._domain, self._text, self._temperature = prepared.domain, text, temperature
        self._url, self._runner = running.aggregator.http, runner

    def choices(self, reuse: Mapping[str, int], prompts: int) -> list[Any]:  # Any: JSON
        """The choices of the answers to the first prompts."""
        with httpx.Client(base_url=self._url, timeout=60) as client:
            bodies = [self._body(reuse, prompt) for prompt in range(prompts)]
            return [client.post("/v1/completions", json=body).json()["choices"] for body in bodies]

    def rates(self, ways: Mapping[str, Mapping[str, int]], rounds: int) -> Mapping[str, Rate]:
        """Tokens per second by name, each way with these values of `reuse`."""
        return interleave({name: self._program(reuse) for name, reuse in ways.items()}, 2.0, rounds)

    def table(self, rates: Mapping[str, Rate]) -> None:
        rows = [
            [f"{self.name}, {way}", f"{rate.median:,.0f}", f"{1000 / rate.median:.1f}"] for way, rate in rates.items()
        ]
        table(["", "tokens/s", "ms per token"], rows)

    def _program(self, reuse: Mapping[str, int]) -> Callable[[], int]:
        posts = [Post("/v1/completions", json.dumps(self._body(reuse, prompt)).encode()) for prompt in range(32)]
        caller = HttpCallers(self._url, posts, 1)
        self._runner.run(caller.__aenter__())

        def program() -> int:
            self._runner.run(caller.call(0))
            return GENERATED

        return program

    def _body(self, reuse: Mapping[str, int], prompt: int) -> dict[str, Any]:  # Any: JSON
        begin = prompt * STRIDE
        return {
            "prompt": self._text[begin : begin + PROMPT].tolist(),
            "max_tokens": GENERATED,
            "ignore_eos": True,
            "seed": prompt,
            "temperature": self._temperature,
            "knn": {"domain": self._domain, "k": K, "reuse": dict(reuse)},
        }


def ahead(caller: OneAtATime, rounds: int) -> None:
    """Tokens per second with and without steps that are begun ahead, which make the same texts."""
    ways = {f"ahead {steps}": {"ahead": steps} for steps in (0, AHEAD)}
    plain, drafted = (caller.choices(reuse, 4) for reuse in ways.values())
    if plain != drafted:
        raise RuntimeError("steps that are begun ahead made another text")
    rates = caller.rates(ways, rounds)
    caller.table(rates)
    figure(
        f"one completion, {caller.name}: tokens/s with reuse.ahead {AHEAD} / without",
        rates[f"ahead {AHEAD}"].over(rates["ahead 0"]), GOAL,
        size=caller.entries, k=K, prompt=PROMPT, generated=GENERATED,
    )  # fmt: skip


def pointers(caller: OneAtATime, rounds: int) -> None:
    """Time per token by tau."""
    ways = {"every place" if tau is None else f"tau {tau}": {} if tau is None else {"tau": tau} for tau in TAUS}
    rates = caller.rates(ways, rounds)
    caller.table(rates)
    for name, rate in rates.items():
        if name != "every place":
            figure(
                f"one completion, {caller.name}: time per token with reuse.{name} / searched at every place",
                rates["every place"].over(rate), 1.0, better="less",
                size=caller.entries, k=K, prompt=PROMPT, generated=GENERATED,
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
