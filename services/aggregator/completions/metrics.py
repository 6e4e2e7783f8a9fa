"""What is counted of texts that are generated."""

from prometheus_client import Counter, Histogram

from services.runtime.observability import BATCH_BUCKETS, LATENCY_BUCKETS, Metrics


class CompletionMetrics:
    def __init__(self, metrics: Metrics) -> None:
        registry = metrics.registry
        self._tokens = Counter("knnlm_generated_tokens_total", "Tokens generated.", registry=registry)
        self._first = Histogram(
            "knnlm_time_to_first_token_seconds", "From a request's arrival to the first token of each of its choices.",
            buckets=LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip
        self._next = Histogram(
            "knnlm_inter_token_latency_seconds", "From one token of a choice to the next.",
            buckets=LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip
        self._contexts = Histogram(
            "knnlm_round_contexts",
            "Contexts whose next token was made together.",
            buckets=BATCH_BUCKETS,
            registry=registry,
        )
        self._round = Histogram(
            "knnlm_round_seconds", "Time of a round: a forward pass and its searches.",
            buckets=LATENCY_BUCKETS, registry=registry,
        )  # fmt: skip

    def generated(self, seconds: float, *, first: bool) -> None:
        """One token. seconds: since the token before it in its choice; since the request arrived where it is the
        first."""
        self._tokens.inc()
        (self._first if first else self._next).observe(seconds)

    def round(self, contexts: int, seconds: float) -> None:
        self._contexts.observe(contexts)
        self._round.observe(seconds)
