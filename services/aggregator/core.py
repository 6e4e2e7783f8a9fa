"""The aggregator as a process: its connections to the other services, and the Aggregator made over them."""

import asyncio
import logging
import time
from collections.abc import Sequence

from knnlm.errors import DeadlineExceeded, KnnlmError, Unavailable
from knnlm.protocols import LanguageModelClient
from knnlm.transport.context import outgoing
from services.aggregator.completions.metrics import CompletionMetrics
from services.aggregator.engine import Aggregator, Datastore
from services.aggregator.settings import AggregatorSettings
from services.aggregator.upstream import Upstream, UpstreamMetrics
from services.runtime.observability import event

LOG = logging.getLogger(__name__)
RETRY_SECONDS = 0.5
ASK_SECONDS = 5.0  # the lm service gets to say what it is: a restart is waited for here, not in the client
LOOK_SECONDS = 5.0  # between two questions whether the lm service still runs the model it announced


class AggregatorCore:
    """Keeps the runtime's Core protocol. Ready once the lm service has told its model and tokenizer."""

    def __init__(
        self,
        settings: AggregatorSettings,
        metrics: UpstreamMetrics,
        completion_metrics: CompletionMetrics | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._completion_metrics = completion_metrics
        self._upstream: Upstream | None = None
        self._aggregator: Aggregator | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def aggregator(self) -> Aggregator:
        """Raises Unavailable before `start` has finished."""
        if self._aggregator is None:
            raise Unavailable("the service is waiting for the lm service")
        return self._aggregator

    def load(self) -> None:
        """Read keys and certificates; models and indexes live in the other services."""
        self._upstream = Upstream(self._settings, self._metrics)

    async def start(self) -> None:
        if self._upstream is None:
            raise RuntimeError("load comes first")
        lm, datastore = self._upstream.lm, self._upstream.datastore
        waiting = False
        while self._aggregator is None:
            try:
                self._aggregator = await self._connect(lm, datastore)
            except (Unavailable, DeadlineExceeded) as err:
                if not waiting:
                    event(LOG, "waiting_for_lm", target=self._settings.lm_target, reason=err.message)
                waiting = True
                await asyncio.sleep(RETRY_SECONDS)
        self._following = asyncio.create_task(self._follow(lm, datastore))

    async def look(self, lm: LanguageModelClient, datastore: Datastore) -> None:
        """Take over the model of an lm service that was restarted with another one; requests fail until then."""
        try:
            with outgoing(deadline=time.monotonic() + ASK_SECONDS):
                if (await lm.get_model()).fingerprint == self.aggregator.info.fingerprint:
                    return
            before, self._aggregator = self.aggregator, await self._connect(lm, datastore)
        except KnnlmError as err:
            event(LOG, "cannot_ask_lm", logging.WARNING, reason=err.message)
            return
        await before.completions.close()
        event(LOG, "model_changed", model=self.aggregator.info.model_id)

    async def _connect(self, lm: LanguageModelClient, datastore: Datastore) -> Aggregator:
        with outgoing(deadline=time.monotonic() + ASK_SECONDS):
            return await Aggregator.connect(
                lm,
                datastore,
                self._settings,
                memories=None if self._upstream is None else self._upstream.memories,
                degraded=self._metrics.degraded,
                skipped=self._metrics.skipped,
                completion_metrics=self._completion_metrics,
            )

    async def _follow(self, lm: LanguageModelClient, datastore: Datastore) -> None:
        await self.aggregator.log_memories()
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look(lm, datastore)
            except Exception:  # noqa: BLE001  the edge of a task that must outlive what nobody foresaw
                event(LOG, "following_failed", logging.ERROR)

    def problems(self) -> Sequence[str]:
        return [] if self._aggregator is not None else ["waiting for the lm service"]

    async def close(self) -> None:
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        if self._aggregator is not None:
            await self._aggregator.completions.close()
        if self._upstream is not None:
            await self._upstream.aclose()
