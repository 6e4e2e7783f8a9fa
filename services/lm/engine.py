"""The lm service's core: limits, a queue, and requests that want the same run together. Knows neither HTTP nor gRPC.

It serves anything that is a language model: the real one is imported when it is loaded.
"""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from itertools import pairwise

import numpy as np
from prometheus_client import Counter, Gauge, Histogram

from knnlm.errors import TooLarge, Unavailable
from knnlm.lm.requests import check
from knnlm.memory.served import with_memory
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.protocols import LanguageModel
from services.lm.settings import LmSettings
from services.runtime.batching import Batcher
from services.runtime.context import RequestContext
from services.runtime.observability import LATENCY_BUCKETS, Metrics

__all__ = ["Engine"]

ENVELOPE_BYTES = 4096  # of an answer beside its arrays
WHOLE = ("fingerprint", "timings")  # of an answer: not split by rows


class Engine:
    """The core of the lm service (runtime.service.Core): one model, and a queue before it."""

    def __init__(
        self, settings: LmSettings, metrics: Metrics, load: Callable[[LmSettings], LanguageModel] | None = None
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._load = load or _load
        self._model: LanguageModel | None = None
        self._batcher: Batcher[ForwardRequest, ForwardResult] | None = None
        self._seconds = Histogram(
            "knnlm_lm_forward_seconds",
            "Time in the model per batch.",
            buckets=LATENCY_BUCKETS,
            registry=metrics.registry,
        )
        self._tokens = Counter(
            "knnlm_lm_tokens_total", "Tokens fed (input) and positions answered (rows).", ["kind"],
            registry=metrics.registry,
        )  # fmt: skip
        self._prefix_tokens = Counter(
            "knnlm_lm_prefix_tokens_total", "Tokens of requests with cache (asked), kept ones (found).", ["kind"],
            registry=metrics.registry,
        )  # fmt: skip
        self._prefix_bytes = Gauge("knnlm_lm_prefix_bytes", "Allocated for kept prefixes.", registry=metrics.registry)
        self._prefixes_seen = (0, 0)  # tokens asked and found so far

    def load(self) -> None:
        self._model = self._load(self._settings)

    async def start(self) -> None:
        self._batcher = Batcher(
            self._process,
            size=_tokens,
            group=lambda request: request.batch_key,
            max_queue=self._settings.max_queue_tokens,
            max_batch=self._settings.max_batch_tokens,
            metrics=self._metrics,
        )

    def problems(self) -> Sequence[str]:
        return []

    async def close(self) -> None:
        if self._batcher is not None:
            await self._batcher.close()

    @property
    def model(self) -> LanguageModel:
        if self._model is None:
            raise Unavailable("the model is being loaded")
        return self._model

    async def forward(self, request: ForwardRequest, call: RequestContext) -> ForwardResult:
        """The model's answer; its timings are those of the batch it ran in, and the time in the queue.

        Raises TooLarge over a limit of this service, what Batcher.submit raises, and what the model raises.
        """
        self._check(request)
        if self._batcher is None:
            raise Unavailable("the model is being loaded")
        result = await self._batcher.submit(request, call)
        call.timings.update(result.timings)
        return replace(result, timings=dict(call.timings))

    def _check(self, request: ForwardRequest) -> None:
        """Raises TooLarge over a limit of this service, InvalidRequest for what the model would refuse."""
        tokens, rows = _tokens(request), _rows(request)
        if tokens > self._settings.max_tokens:
            raise TooLarge(f"tokens must be at most {self._settings.max_tokens}, got {tokens}", param="tokens")
        if rows > self._settings.max_rows:
            raise TooLarge(f"positions must be at most {self._settings.max_rows}, got {rows}", param="positions")
        info = self.model.info
        check(request, vocab_size=info.vocab_size, context_length=info.context_length)
        numbers = info.vocab_size * request.full + info.key_dim * request.keys + 2 * request.top_n
        numbers += (request.targets is not None) + (request.temperatures is not None) + 2 * request.statistics
        answer = 4 * (rows * numbers + sum(_candidates(request)))
        if answer > self._settings.grpc_max_message_bytes - ENVELOPE_BYTES:
            raise TooLarge(
                f"the answer would have {answer} bytes, at most {self._settings.grpc_max_message_bytes} can be sent: "
                "ask for fewer positions, or for targets, candidates or top_n instead of full",
                param="positions",
            )

    def _process(self, requests: Sequence[ForwardRequest]) -> list[ForwardResult]:
        """Answer requests that want the same by one call of the model. Called in the worker thread."""
        first = requests[0]
        joined = first if len(requests) == 1 else _joined(requests)
        with self._seconds.time():
            result = self.model.forward(joined)
        self._tokens.labels("input").inc(_tokens(joined))
        self._tokens.labels("rows").inc(_rows(joined))
        self._count_prefixes()
        return [result] if len(requests) == 1 else _parts(result, requests)

    def _count_prefixes(self) -> None:
        prefixes = getattr(self.model, "prefixes", None)
        if prefixes is None:  # turned off, or a model that keeps nothing
            return
        seen, self._prefixes_seen = self._prefixes_seen, (prefixes.asked, prefixes.found)
        for kind, now, before in zip(("asked", "found"), self._prefixes_seen, seen, strict=True):
            self._prefix_tokens.labels(kind).inc(now - before)
        self._prefix_bytes.set(prefixes.held_bytes)


def _load(settings: LmSettings) -> LanguageModel:
    from knnlm.lm.model import LanguageModel  # torch: seconds to import, while /livez answers already

    lm = LanguageModel.load(
        settings.model, device=settings.device, dtype=settings.dtype, key_function=settings.key_function,
        prefix_cache_bytes=settings.prefix_cache_bytes,
    )  # fmt: skip
    lm.info = with_memory(lm.info, settings.model)
    return lm


def _tokens(request: ForwardRequest) -> int:
    return sum(len(tokens) for tokens in request.tokens)


def _rows(request: ForwardRequest) -> int:
    return sum(len(positions) for positions in request.positions)


def _candidates(request: ForwardRequest) -> list[int]:
    return [len(tokens) for tokens in request.candidates or ()]


def _joined(requests: Sequence[ForwardRequest]) -> ForwardRequest:
    targets = [request.targets for request in requests if request.targets is not None]
    temperatures = [request.temperatures for request in requests if request.temperatures is not None]
    candidates = [tokens for request in requests for tokens in request.candidates or ()]
    return replace(
        requests[0],
        tokens=[tokens for request in requests for tokens in request.tokens],
        positions=[positions for request in requests for positions in request.positions],
        targets=np.concatenate(targets) if targets else None,
        temperatures=np.concatenate(temperatures) if temperatures else None,
        candidates=None if requests[0].candidates is None else candidates,
    )


def _parts(result: ForwardResult, requests: Sequence[ForwardRequest]) -> list[ForwardResult]:
    rows = pairwise(np.cumsum([0, *map(_rows, requests)]))
    candidates = pairwise(np.cumsum([0, *(sum(_candidates(request)) for request in requests)]))
    arrays = {field.name: getattr(result, field.name) for field in fields(result) if field.name not in WHOLE}
    parts = []
    for row, candidate in zip(rows, candidates, strict=True):
        mine = {
            name: None if array is None else array[slice(*(candidate if name == "candidate_log_probs" else row))]
            for name, array in arrays.items()
        }
        parts.append(ForwardResult(**mine, fingerprint=result.fingerprint, timings=result.timings))
    return parts
