"""How much crosses the wire for a generated token when the vocabulary is large.

    python -m benchmarks.wire_bytes [--size N] [--text PATH ...] [--tokens 256] [--memory]

Bytes of all messages to and from the lm service and the datastore service, for each token of completions at temperature
1 with retrieval, k = 1024. The model is the pocket LM with its vocabulary widened to 150,000: 5 % of every distribution
falls on the added tokens, by Zipf's law. A whole row of it is 600,000 bytes. With --memory the same model is also a
memory beside it, and every token takes a whole row of both: at temperatures 0 and 1 alone would the likeliest tokens of
either be enough, since elsewhere what the other tokens have together is no sum of the two models'.
"""

import asyncio
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from benchmarks.data import prepare
from benchmarks.harness import arguments, figure
from benchmarks.scoring import tokens_of
from knnlm.generation import GenerationOptions, Generator
from knnlm.index.searcher import Searcher
from knnlm.joined import JoinedSearches
from knnlm.lm.model import LanguageModel
from knnlm.local import LocalDatastore, LocalLanguageModel
from knnlm.messages import ForwardRequest, ForwardResult, ModelInfo, SearchRequest, SearchResult
from knnlm.mixer import Mixer
from knnlm.options import DomainOptions, KnnOptions, MemoryOptions, SearchOptions
from knnlm.v1 import datastore_pb2, lm_pb2
from knnlm.wire.protos import forward_request_to_proto, to_proto

VOCABULARY, ADDED_MASS, K = 150_000, 0.05, 1024
PROMPT, COMPLETIONS = 40, 8
GOAL = 64 * 1024


class Counted:
    """Bytes of the messages that calls would send and be sent. calls: by what the lm was asked for."""

    def __init__(self) -> None:
        self.bytes = 0
        self.whole_rows = 0


class WidenedModel(LocalLanguageModel):
    """The pocket LM with more tokens; an added one is fed as an old one."""

    def __init__(self, lm: LanguageModel, counted: Counted) -> None:
        super().__init__(lm)
        self.info = replace(lm.info, vocab_size=VOCABULARY)
        self._counted = counted
        ranks = np.arange(1, VOCABULARY - lm.info.vocab_size + 1)
        self._added = np.log(ADDED_MASS / ranks) - np.log((1 / ranks).sum())

    async def get_model(self) -> ModelInfo:
        return self.info

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        size = VOCABULARY - len(self._added)
        plain = ForwardRequest([t % size for t in request.tokens], request.positions, full=True, keys=request.keys)
        found = await super().forward(plain)
        if found.log_probs is None:
            raise RuntimeError("the model left out what it was asked for")
        added = np.broadcast_to(self._added, (len(found.log_probs), len(self._added)))
        rows = np.concatenate([found.log_probs + np.log(1 - ADDED_MASS), added], axis=1).astype(np.float32)
        result = answer(request, rows, found)
        self._counted.whole_rows += request.full * len(rows)
        self._counted.bytes += forward_request_to_proto(request).ByteSize()
        self._counted.bytes += to_proto(result, lm_pb2.ForwardResponse).ByteSize()
        return result


def answer(request: ForwardRequest, rows: npt.NDArray[np.float32], found: ForwardResult) -> ForwardResult:
    """What the request asks of these rows."""
    top = np.argsort(-rows, axis=1, kind="stable")[:, : request.top_n].astype(np.int32)
    candidates = [row[tokens] for row, tokens in zip(rows, request.candidates or (), strict=False)]
    sums = None
    if request.temperatures is not None:
        sums = np.logaddexp.reduce(rows / request.temperatures[:, None], axis=1).astype(np.float32)
    return ForwardResult(
        log_probs=rows if request.full else None,
        top_tokens=top if request.top_n else None,
        top_log_probs=np.take_along_axis(rows, top, axis=1) if request.top_n else None,
        candidate_log_probs=None if request.candidates is None else np.concatenate(candidates),
        log_power_sums=sums,
        keys=found.keys,
        fingerprint=found.fingerprint,
    )


class CountedDatastore(LocalDatastore):
    def __init__(self, path: Path, domain: str, counted: Counted) -> None:
        super().__init__({domain: Searcher.open(path)})
        self._counted = counted

    async def search(self, request: SearchRequest) -> SearchResult:
        result = await super().search(request)
        self._counted.bytes += to_proto(request, datastore_pb2.SearchRequest).ByteSize()
        self._counted.bytes += to_proto(result, datastore_pb2.SearchResponse).ByteSize()
        return result


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--tokens", type=int, default=256, help="of each completion (default 256)")
    parser.add_argument("--memory", action="store_true", help="mix a memory with the same vocabulary, too")
    options = parser.parse_args()
    prepared = prepare(options.size, options.text)
    counted = Counted()
    lm = LanguageModel.load(str(prepared.model))
    model = WidenedModel(lm, counted)
    datastore = CountedDatastore(prepared.path, prepared.domain, counted)
    text = tokens_of(prepared, lm.tokenizer, COMPLETIONS * PROMPT).astype(np.int32)
    sources: dict[str, KnnOptions | MemoryOptions] = {
        "knn": KnnOptions((DomainOptions(prepared.domain, lmbda=0.25, temperature=10.0),), SearchOptions(k=K))
    }
    if options.memory:
        sources["memory"] = MemoryOptions("twin", 0.25)

    async def run() -> int:
        generator = Generator(
            Mixer(model, JoinedSearches(datastore), model.info, memories={"twin": model}), lm.tokenizer
        )

        async def one(i: int) -> int:
            made = GenerationOptions(max_tokens=options.tokens, ignore_eos=True)
            prompt = text[i * PROMPT : (i + 1) * PROMPT]
            return len([new async for new in generator.generate(prompt, made, sources, seed=options.seed + i)])

        return sum(await asyncio.gather(*map(one, range(COMPLETIONS))))

    tokens = asyncio.run(run())
    said = ", with a memory" if options.memory else ""
    figure(
        f"bytes on the wire for a generated token, vocabulary of {VOCABULARY:,}{said}", counted.bytes / tokens,
        None if options.memory else GOAL, better="less", size=prepared.entries, k=K, tokens=tokens,
        whole_rows=counted.whole_rows,
    )  # fmt: skip


if __name__ == "__main__":
    main()
