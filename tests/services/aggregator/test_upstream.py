"""The clients as the aggregator's settings make them: keys, certificates, patience."""

from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr, ValidationError

from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.domains import NoDatastore
from knnlm.errors import InvalidRequest, Unauthenticated
from knnlm.testing import ToyLanguageModel
from services.aggregator.settings import AggregatorSettings
from services.aggregator.upstream import Upstream, UpstreamMetrics
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from services.runtime.observability import Metrics
from tests.services.certificates import Authority


def upstream(**settings: Any) -> Upstream:
    return Upstream(AggregatorSettings(**settings), UpstreamMetrics(Metrics("aggregator")))


async def test_a_key_in_a_file_is_sent_over_tls_by_a_certificate_of_ones_own(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    server_cert, server_key = authority.issue("lm")
    own_cert, own_key = authority.issue("aggregator")
    key_file = tmp_path / "key"
    key_file.write_text("secret\n")
    settings = LmSettings(
        model="toy", port=0, grpc_port=0, api_keys=(SecretStr("secret"),), tls_cert_file=server_cert,
        tls_key_file=server_key, tls_client_ca_file=authority.file,
    )  # fmt: skip

    async with running(lm_service(settings, lambda _: ToyLanguageModel())) as host:
        clients = upstream(
            lm_target=f"127.0.0.1:{host.grpc_port}",
            lm_api_key_file=key_file,
            lm_tls_ca_file=authority.file,
            lm_tls_cert_file=own_cert,
            lm_tls_key_file=own_key,
            datastore_target="",
        )
        assert isinstance(clients.datastore, NoDatastore)
        try:
            assert (await clients.lm.get_model()).model_id == "toy"
        finally:
            await clients.aclose()


async def test_memories_are_asked_with_the_key_of_the_lm_service() -> None:
    settings = LmSettings(model="toy", port=0, grpc_port=0, api_keys=(SecretStr("secret"),))
    async with running(lm_service(settings, lambda _: ToyLanguageModel(seed=5))) as host:
        memory = (f"law=127.0.0.1:{host.grpc_port}",)
        for key, refused in ((SecretStr("secret"), False), (SecretStr("other"), True)):
            clients = upstream(memory=memory, lm_api_key=key)
            law = clients.memories["law"]
            assert isinstance(law, GrpcLanguageModel)
            try:
                if refused:
                    with pytest.raises(Unauthenticated):
                        await law.get_model()
                else:
                    assert (await law.get_model()).fingerprint == ToyLanguageModel(seed=5).info.fingerprint
            finally:
                await clients.aclose()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm_target": "nowhere"}, "expected host:port"),
        ({"datastore_target": "127.0.0.1"}, "expected host:port"),
        ({"lm_api_key_file": Path("/no/such/file")}, "cannot read /no/such/file"),
        ({"datastore_api_key_file": Path("/no/such/file")}, "cannot read /no/such/file"),
        ({"datastore_tls_ca_file": Path("/no/such/file")}, "cannot read /no/such/file"),
    ],
)
def test_what_cannot_be_used_is_found_at_start(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        upstream(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lm_api_key": "a", "lm_api_key_file": "b"}, "give --lm-api-key .* or --lm-api-key-file .*, not both"),
        ({"datastore_api_key": "a", "datastore_api_key_file": "b"}, "not both"),
        ({"lm_tls_cert_file": "a"}, "--lm-tls-cert-file .* needs --lm-tls-key-file"),
        ({"datastore_tls_key_file": "a"}, "--datastore-tls-key-file .* needs --datastore-tls-cert-file"),
        ({"lm_wait_s": -1}, "lm_wait_s"),
        ({"datastore_wait_s": -1}, "datastore_wait_s"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        AggregatorSettings(**settings)
