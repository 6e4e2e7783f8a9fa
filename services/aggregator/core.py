"""The aggregator as a process: its connections to the other services, and the Aggregator made over them."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AsyncExitStack

from knnlm.clients.rpc import GrpcDatastore, GrpcLanguageModel
from knnlm.errors import DeadlineExceeded, KnnlmError, Unavailable
from knnlm.messages import DatastoreClient, LanguageModelClient
from services.aggregator.engine import Aggregator
from services.aggregator.settings import AggregatorSettings
from services.runtime.logs import event

LOG = logging.getLogger(__name__)
RETRY_SECONDS = 0.5
LOOK_SECONDS = 5.0  # between two questions whether the lm service still runs the model it announced


class AggregatorCore:
    """Keeps the runtime's Core protocol. Ready once the lm service has told its model and tokenizer."""

    def __init__(self, settings: AggregatorSettings) -> None:
        self._settings = settings
        self._connections = AsyncExitStack()
        self._aggregator: Aggregator | None = None
        self._following: asyncio.Task[None] | None = None

    @property
    def aggregator(self) -> Aggregator:
        """Raises Unavailable before `start` has finished."""
        if self._aggregator is None:
            raise Unavailable("the service is waiting for the lm service")
        return self._aggregator

    def load(self) -> None:
        """Nothing to read: models and indexes live in the other services."""

    async def start(self) -> None:
        settings = self._settings
        lm_key = settings.lm_api_key.get_secret_value() if settings.lm_api_key else None
        lm = await self._connections.enter_async_context(GrpcLanguageModel(settings.lm_target, api_key=lm_key))
        datastore: DatastoreClient | None = None
        if settings.datastore_target:
            key = settings.datastore_api_key.get_secret_value() if settings.datastore_api_key else None
            datastore = await self._connections.enter_async_context(
                GrpcDatastore(settings.datastore_target, api_key=key)
            )
        waiting = False
        while self._aggregator is None:
            try:
                self._aggregator = await Aggregator.connect(lm, datastore, settings)
            except (Unavailable, DeadlineExceeded) as err:
                if not waiting:
                    event(LOG, "waiting_for_lm", target=settings.lm_target, reason=err.message)
                waiting = True
                await asyncio.sleep(RETRY_SECONDS)
        self._following = asyncio.create_task(self._follow(lm, datastore))

    async def look(self, lm: LanguageModelClient, datastore: DatastoreClient | None) -> None:
        """Take over the model of an lm service that was restarted with another one; requests fail until then."""
        try:
            if (await lm.get_model()).fingerprint == self.aggregator.info.fingerprint:
                return
            self._aggregator = await Aggregator.connect(lm, datastore, self._settings)
        except KnnlmError as err:
            event(LOG, "cannot_ask_lm", logging.WARNING, reason=err.message)
            return
        event(LOG, "model_changed", model=self.aggregator.info.model_id)

    async def _follow(self, lm: LanguageModelClient, datastore: DatastoreClient | None) -> None:
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
        await self._connections.aclose()
