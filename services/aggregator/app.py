"""What the aggregator is to the runtime."""

from services.aggregator.completions.metrics import CompletionMetrics
from services.aggregator.core import AggregatorCore
from services.aggregator.page import page_files, page_routes
from services.aggregator.rest import routes
from services.aggregator.settings import AggregatorSettings
from services.aggregator.upstream import UpstreamMetrics
from services.runtime.observability import Metrics
from services.runtime.service import Service


def service(settings: AggregatorSettings) -> Service:
    metrics = Metrics("aggregator")
    core = AggregatorCore(settings, UpstreamMetrics(metrics), CompletionMetrics(metrics))
    files = page_files() if settings.web else {}
    return Service(
        name="aggregator",
        title="knnlm aggregator",
        settings=settings,
        core=core,
        metrics=metrics,
        routers=[*routes(core, settings), page_routes(files)],
        public=frozenset(files),
    )
