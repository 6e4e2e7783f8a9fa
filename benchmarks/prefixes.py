"""What a step of completions costs: one token more of several sequences, from the lm service over gRPC.

    python -m benchmarks.prefixes [--rounds 5] [--calls 200]

The pocket model. Beside it, in this process, `generate` of transformers with its own cache: prompts of 40 tokens and 96
new ones, greedy, in batches of 1 and 16; both feed the prompts first. What is asked of the service is what completions
ask with this vocabulary: keys and all log-probabilities of the last position. Then single steps at a context of 400
tokens beside those at 40: a few new tokens each, from the same prompts again and again.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.data import FOLDER, MODEL
from benchmarks.harness import arguments, figure, interleave, latencies, table
from benchmarks.scoring import PlainModel
from benchmarks.system import THREADS, service
from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.lm.model import LanguageModel
from knnlm.messages import ForwardRequest

PROMPT, NEW = 40, 96
BATCHES = (1, 16)
CONTEXTS = (40, 400)
STEPS = 8  # steps from one prompt, where single steps are timed
RATE_GOAL, CONTEXT_GOAL = 0.8, 1.3

Sequences = list[npt.NDArray[np.int32]]
Forward = Callable[[Sequences], npt.NDArray[np.int32]]


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="of every way in turn (default 5)")
    parser.add_argument("--calls", type=int, default=200, help="steps at each context (default 200)")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    rng = np.random.default_rng(options.seed)
    with service("lm", FOLDER / "logs", "--model", str(MODEL)) as running, asyncio.Runner() as runner:
        client = GrpcLanguageModel(running.grpc)
        try:
            measure(remote(client, runner), rng, options.rounds, options.calls)
        finally:
            runner.run(client.aclose())


def measure(forward: Forward, rng: np.random.Generator, rounds: int, calls: int) -> None:
    plain, lm = PlainModel(str(MODEL)), LanguageModel.load(str(MODEL), device="cpu")

    def prompts(batch: int, length: int) -> Sequences:
        """Random token ids, sequences of somewhat different lengths."""
        return [rng.integers(2, lm.info.vocab_size, length - i % 8).astype(np.int32) for i in range(batch)]

    def ours(forward: Forward, batch: int) -> Callable[[], int]:
        def program() -> int:
            sequences = prompts(batch, PROMPT)
            for _ in range(NEW):
                sequences = grown(sequences, forward(sequences))
            return NEW * batch

        return program

    def theirs(batch: int) -> Callable[[], int]:
        def program() -> int:
            generated(plain, rng.integers(2, lm.info.vocab_size, (batch, PROMPT)), NEW)
            return NEW * batch

        return program

    names = [(way, batch) for batch in BATCHES for way in ("generate", "in process", "gRPC")]
    programs: dict[str, Callable[[int], Callable[[], int]]] = {
        "generate": theirs,
        "in process": lambda b: ours(local(lm), b),
        "gRPC": lambda b: ours(forward, b),
    }
    rates = interleave({f"{way}, {b}": programs[way](b) for way, b in names}, seconds=0.5, rounds=rounds)
    cells = [(way, b, rates[f"{way}, {b}"]) for way, b in names]
    rows = [[way, str(b), f"{r.median:,.0f}", f"{r.over(rates[f'generate, {b}']):.2f}"] for way, b, r in cells]
    table(["", "sequences", "tokens/s", "of generate"], rows)
    for batch in BATCHES:
        rate = rates[f"gRPC, {batch}"]
        figure(
            f"steps of {batch} sequences over gRPC / generate of transformers", rate.over(rates[f"generate, {batch}"]),
            RATE_GOAL, tokens_per_second=round(rate.median), prompt=PROMPT, new=NEW,
            in_process=round(rates[f"in process, {batch}"].over(rates[f"generate, {batch}"]), 3),
        )  # fmt: skip
    for batch in BATCHES:
        found = latencies({str(c): steps(forward, prompts(batch, c)) for c in CONTEXTS}, calls)
        short, long = (1000 * found[str(c)].p50 for c in CONTEXTS)
        print(f"a step of {batch} sequences: {short:.2f} ms at {CONTEXTS[0]} tokens, {long:.2f} ms at {CONTEXTS[1]}")
        figure(
            f"time of a step of {batch} at context {CONTEXTS[1]} / at {CONTEXTS[0]}", long / short, CONTEXT_GOAL,
            better="less", milliseconds=[round(short, 2), round(long, 2)],
        )  # fmt: skip


def steps(forward: Forward, prompts: Sequences) -> Callable[[], None]:
    """One step more with each call, and from the prompts again after STEPS."""
    state = {"sequences": prompts}

    def program() -> None:
        before = state["sequences"]
        after = grown(before, forward(before))
        state["sequences"] = after if len(after[0]) < len(prompts[0]) + STEPS else prompts

    return program


def remote(client: GrpcLanguageModel, runner: asyncio.Runner) -> Forward:
    return lambda sequences: _best(runner.run(client.forward(_request(sequences))).log_probs)


def local(lm: LanguageModel) -> Forward:
    return lambda sequences: _best(lm.forward(_request(sequences)).log_probs)


def generated(plain: PlainModel, ids: npt.NDArray[np.int64], new: int) -> npt.NDArray[np.int64]:
    """(batch, prompt + new): prompts and what follows them."""
    model: Any = plain.model  # generate of transformers is typed for no caller
    given = torch.from_numpy(ids)
    found = model.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=new, min_new_tokens=new,
        pad_token_id=0,
    )  # fmt: skip
    return np.asarray(found)


def grown(sequences: Sequences, tokens: npt.NDArray[np.int32]) -> Sequences:
    return [np.append(one, token) for one, token in zip(sequences, tokens, strict=True)]


def _request(sequences: Sequences) -> ForwardRequest:
    last = [np.array([len(one) - 1], np.int32) for one in sequences]
    return ForwardRequest(sequences, last, full=True, keys=True, cache=True)


def _best(log_probs: npt.NDArray[np.float32] | None) -> npt.NDArray[np.int32]:
    if log_probs is None:
        raise ValueError("the answer has no log-probabilities, which were asked for")
    best: npt.NDArray[np.int32] = log_probs.argmax(axis=1).astype(np.int32)
    return best


if __name__ == "__main__":
    main()
