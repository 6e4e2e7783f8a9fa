"""What generating costs: completions through all three services beside `generate` of transformers in this process.

    python -m benchmarks.generation [--size N] [--text PATH ...] [--rounds 5]

Prompts of 40 tokens from the held-out text, 96 tokens generated, temperature 1, k = 1024. `generate` has the same
prompts and number of tokens, samples as well, and uses its own cache of keys and values. One more completion is greedy,
with steps begun ahead (`reuse.ahead` 2), beside a greedy `generate`. The same two threads for it, the lm service and
the datastore service; all share the processor's cores with the aggregator and the caller.
"""

import asyncio
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoModelForCausalLM

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import arguments, figure, interleave, table
from benchmarks.load import HttpCallers, Post
from benchmarks.scoring import tokens_of
from benchmarks.system import THREADS, System, system
from knnlm.tokenizer import Tokenizer

PROMPT, GENERATED, K = 40, 96, 1024
MANY, CALLERS = 16, 64
SHORT, LONG, STEPS = 40, 400, 48  # tokens of context, and tokens generated after them

Ids = npt.NDArray[np.int64]
Body = dict[str, object]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="of every way in turn (default 5)")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    prepared = prepare(options.size, options.text)
    tokenizer_json = (prepared.model / "tokenizer.json").read_text(encoding="utf-8")
    text = tokens_of(prepared, Tokenizer(tokenizer_json, bos_token_id=None, eos_token_id=None), CALLERS * LONG)
    with system(prepared.store, prepared.model, FOLDER / "logs") as running, asyncio.Runner() as runner:
        Measure(prepared, running, text, runner, options.rounds).run()


class Measure:
    """All figures over one running system."""

    def __init__(self, prepared: Prepared, running: System, text: Ids, runner: asyncio.Runner, rounds: int) -> None:
        self._model: Any = AutoModelForCausalLM.from_pretrained(
            str(prepared.model), dtype=torch.float32, local_files_only=True
        )
        self._knn: Body = {"knn": {"domain": prepared.domain, "k": K}}
        self._ahead: Body = {"knn": {"domain": prepared.domain, "k": K, "reuse": {"ahead": 2}}}
        self._url = running.aggregator.http
        self._text = text
        self._runner = runner
        self._rounds = rounds
        self._size = prepared.entries

    def run(self) -> None:
        self._throughput()
        self._context()
        self._first_token()
        self._next_token()

    def _throughput(self) -> None:
        programs = {
            "generate, batch of 16": self._plain(MANY),
            "16 completions, LM alone": self._many(MANY, {}),
            "16 completions, retrieval": self._many(MANY, self._knn),
            "generate, one": self._plain(1),
            "one completion, LM alone": self._many(1, {}),
            "one completion, retrieval": self._many(1, self._knn),
            "generate, one, greedy": self._plain(1, greedy=True),
            "one completion, retrieval, greedy, steps ahead": self._many(1, {**self._ahead, "temperature": 0}),
        }
        rates = interleave(programs, 2.0, self._rounds)
        table(["", "tokens/s"], [[name, f"{rate.median:,.0f}"] for name, rate in rates.items()])
        together, alone = rates["generate, batch of 16"], rates["generate, one"]
        for name, rate, goal in (
            ("16 completions on the LM alone / generate, batch of 16", rates["16 completions, LM alone"], 0.8),
            ("16 completions with retrieval / generate, batch of 16", rates["16 completions, retrieval"], 0.6),
        ):
            self._figure(f"generated tokens/s: {name}", rate.over(together), goal, tokens_per_s=round(rate.median))
        greedy = rates["generate, one, greedy"]
        for name, rate, beside in (
            ("one completion with retrieval / generate of one", rates["one completion, retrieval"], alone),
            (
                "one greedy completion with retrieval and reuse.ahead 2 / greedy generate of one",
                rates["one completion, retrieval, greedy, steps ahead"],
                greedy,
            ),
        ):
            self._figure(f"generated tokens/s: {name}", rate.over(beside), 0.6, tokens_per_s=round(rate.median))

    def _context(self) -> None:
        """Seconds from the first token to the last, so that the prompt's own pass does not count."""
        found: dict[int, list[float]] = {SHORT: [], LONG: []}
        for _ in range(2 * self._rounds + 1):
            for length, seconds in found.items():
                arrivals = self._runner.run(self._stream(self._prompt(0, length), STEPS, {}))
                seconds.append((arrivals[-1] - arrivals[0]) / (len(arrivals) - 1))
        ratios = [long / short for short, long in zip(found[SHORT][1:], found[LONG][1:], strict=True)]
        self._figure(
            f"time per token at context {LONG} / at context {SHORT}", float(np.median(ratios)), 1.3, better="less",
            milliseconds=round(1000 * float(np.median(found[LONG])), 2),
        )  # fmt: skip

    def _first_token(self) -> None:
        idle, busy = self._runner.run(self._first_tokens())
        self._figure(
            "time to the first token with 16 streams under way / idle", busy / idle, 3.0, better="less",
            milliseconds=round(1000 * busy, 2),
        )  # fmt: skip

    async def _first_tokens(self) -> tuple[float, float]:
        async def first() -> float:
            begun = time.perf_counter()
            return (await self._stream(self._prompt(MANY, PROMPT), 1, {}))[0] - begun

        idle = [await first() for _ in range(20)]
        others = [asyncio.create_task(self._stream(self._prompt(i, PROMPT), 400, {})) for i in range(MANY)]
        await asyncio.sleep(0.3)
        busy = [await first() for _ in range(20)]
        if any(task.done() for task in others):
            raise RuntimeError("the streams ended before what was measured beside them")
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return float(np.median(idle)), float(np.median(busy))

    def _next_token(self) -> None:
        contexts = [self._prompt(i, PROMPT) for i in range(CALLERS)]
        rates = interleave(
            {
                "one caller, lists of 64": self._posts([{"tokens": contexts}], "/v1/next_token", CALLERS),
                "64 callers": self._posts([{"tokens": context} for context in contexts], "/v1/next_token", CALLERS),
            },
            2.0,
            self._rounds,
        )
        table(["/v1/next_token", "contexts/s"], [[name, f"{rate.median:,.0f}"] for name, rate in rates.items()])
        self._figure(
            "next_token: contexts/s of 64 callers / of one caller with lists of 64",
            rates["64 callers"].over(rates["one caller, lists of 64"]), 0.9,
        )  # fmt: skip

    def _figure(self, name: str, value: float, goal: float, *, better: str = "more", **more: Any) -> None:  # Any: JSON
        figure(name, value, goal, better=better, size=self._size, k=K, prompt=PROMPT, generated=GENERATED, **more)

    def _prompt(self, i: int, length: int) -> list[int]:
        start = i * LONG
        prompt: list[int] = self._text[start : start + length].tolist()
        return prompt

    def _plain(self, count: int, *, greedy: bool = False) -> Callable[[], int]:
        ids = torch.tensor([self._prompt(i, PROMPT) for i in range(count)])
        mask = torch.ones_like(ids)

        def program() -> int:
            self._model.generate(
                ids, attention_mask=mask, min_new_tokens=GENERATED, max_new_tokens=GENERATED, pad_token_id=0,
                **({"do_sample": False} if greedy else {"do_sample": True, "top_k": 0}),
            )  # fmt: skip
            return count * GENERATED

        return program

    def _many(self, count: int, more: Body) -> Callable[[], int]:
        bodies = [
            {"prompt": self._prompt(i, PROMPT), "max_tokens": GENERATED, "ignore_eos": True, "seed": i, **more}
            for i in range(count)
        ]
        return self._posts(bodies, "/v1/completions", count * GENERATED)

    def _posts(self, bodies: Sequence[Body], path: str, units: int) -> Callable[[], int]:
        """All at the same time, each over a connection that stays open."""
        callers = HttpCallers(self._url, [Post(path, json.dumps(body).encode()) for body in bodies], len(bodies))
        self._runner.run(callers.__aenter__())

        async def all_of_them() -> None:
            await asyncio.gather(*map(callers.call, range(len(bodies))))

        def program() -> int:
            self._runner.run(all_of_them())
            return units

        return program

    async def _stream(self, prompt: Sequence[int], tokens: int, more: Body) -> list[float]:
        """When each piece of a streamed completion arrived."""
        body = {"prompt": prompt, "max_tokens": tokens, "ignore_eos": True, "stream": True, "seed": 1, **more}
        async with (
            httpx.AsyncClient(base_url=self._url, timeout=120) as client,
            client.stream("POST", "/v1/completions", json=body) as response,
        ):
            response.raise_for_status()
            return [time.perf_counter() async for line in response.aiter_lines() if line.startswith("data: {")]


if __name__ == "__main__":
    main()
