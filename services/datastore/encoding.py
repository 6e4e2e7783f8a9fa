"""What turns documents into keys while a domain is served: the lm service, asked over gRPC."""

from collections.abc import Iterator
from contextlib import contextmanager

from knnlm.clients.encoder import RemoteEncoder
from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.protocols import LanguageModel
from services.datastore.settings import DatastoreSettings
from services.datastore.updates import EncoderOpener
from services.runtime.upstream import connection

WAIT_SECONDS = 30.0  # an update outlives a restart of the lm service


def encoder(settings: DatastoreSettings) -> EncoderOpener | None:
    """None when the settings name no lm service. Raises InvalidRequest for a file that cannot be used; opening what it
    gives raises what the lm service's client raises."""
    if not settings.lm_target:
        return None
    lm_service = connection(settings, "lm", wait=WAIT_SECONDS)

    @contextmanager
    def opened() -> Iterator[LanguageModel]:
        # made for each change: its connections belong to the event loop of the encoder, and end with it
        with RemoteEncoder(GrpcLanguageModel(lm_service)) as lm:
            yield lm

    return opened
