"""What the lm service is to the runtime."""

from collections.abc import Callable

from knnlm.protocols import LanguageModel
from services.lm.engine import Engine
from services.lm.rest import protobuf_routes, routes
from services.lm.rpc import rpc_service
from services.lm.settings import LmSettings
from services.runtime.observability import Metrics
from services.runtime.service import Service

__all__ = ["service"]

# turns of a waiting thread, some tenths of a millisecond: longer than the gap between two operations of a pass, shorter
# than that between two passes
OMP_SPINS = 20_000


def service(settings: LmSettings, load: Callable[[LmSettings], LanguageModel] | None = None) -> Service:
    """load: where the model comes from; by default knnlm.lm.model.LanguageModel of settings.model."""
    metrics = Metrics("lm")
    engine = Engine(settings, metrics, load)
    return Service(
        name="lm",
        title="knnlm lm service",
        settings=settings,
        core=engine,
        metrics=metrics,
        routers=[routes(engine)],
        rpc=[rpc_service(engine)],
        protobuf=protobuf_routes(engine),
        omp_spins=OMP_SPINS,
    )
