"""Each of the three services by its name, over toys, in this process: what fuzzers knock at."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from services.aggregator.app import service as aggregator_service
from services.aggregator.settings import AggregatorSettings
from services.runtime.lifecycle import Host, running
from tests.faults.knocking import datastore, lm

__all__ = ["SERVICES", "system"]

SERVICES = ("lm", "datastore", "aggregator")


@asynccontextmanager
async def system(name: str, store: Path) -> AsyncIterator[Host]:
    """The service, and those behind it."""
    async with AsyncExitStack() as stack:
        if name == "lm":
            yield await stack.enter_async_context(lm())
            return
        behind = await stack.enter_async_context(datastore(store))
        if name == "datastore":
            yield behind
            return
        model = await stack.enter_async_context(lm())
        settings = AggregatorSettings(
            port=0,
            lm_target=f"127.0.0.1:{model.grpc_port}",
            datastore_target=f"127.0.0.1:{behind.grpc_port}",
            log_level="error",
        )
        yield await stack.enter_async_context(running(aggregator_service(settings)))
