"""What the datastore service is to the runtime."""

from services.datastore.engine import Engine
from services.datastore.loaded import Opener
from services.datastore.rest import protobuf_routes, routes
from services.datastore.rpc import rpc_service
from services.datastore.settings import DatastoreSettings
from services.datastore.updates import EncoderOpener
from services.runtime.observability import Metrics
from services.runtime.service import Service


def service(
    settings: DatastoreSettings, open_searcher: Opener | None = None, open_encoder: EncoderOpener | None = None
) -> Service:
    """open_searcher: how a version's folder is opened; by default as the settings say. open_encoder:
    what makes the keys of documents that are added; by default the lm service of the settings."""
    metrics = Metrics("datastore")
    engine = Engine(settings, metrics, open_searcher, open_encoder)
    return Service(
        name="datastore",
        title="knnlm datastore service",
        settings=settings,
        core=engine,
        metrics=metrics,
        routers=[routes(engine)],
        rpc=[rpc_service(engine)],
        protobuf=protobuf_routes(engine),
    )
