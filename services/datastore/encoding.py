"""What turns documents into keys while a domain is served: the lm service, asked over gRPC."""

from collections.abc import Iterator
from contextlib import contextmanager

from knnlm.clients.encoder import RemoteEncoder
from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.clients.secrets import ApiKey, SecretFile
from knnlm.clients.tls import Tls
from knnlm.datastore.encode import KeyEncoder
from services.datastore.growth import EncoderOpener
from services.datastore.settings import DatastoreSettings

__all__ = ["encoder"]

WAIT_SECONDS = 30.0  # for an lm service that is being restarted: a change is not lost for that


def encoder(settings: DatastoreSettings) -> EncoderOpener | None:
    """None when the settings name no lm service. Raises InvalidRequest for a file that cannot be used; opening what it
    gives raises what the lm service's client raises."""
    if not settings.lm_target:
        return None
    target = settings.lm_target
    key: ApiKey = settings.lm_api_key.get_secret_value() if settings.lm_api_key else None
    if settings.lm_api_key_file is not None:
        key = SecretFile(settings.lm_api_key_file)
    tls = Tls.of(settings.lm_tls_ca_file, settings.lm_tls_cert_file, settings.lm_tls_key_file)

    @contextmanager
    def opened() -> Iterator[KeyEncoder]:
        # made for each change: its connections belong to the event loop of the encoder, and end with it
        with RemoteEncoder(GrpcLanguageModel(target, api_key=key, tls=tls, wait=WAIT_SECONDS)) as lm:
            yield lm

    return opened
