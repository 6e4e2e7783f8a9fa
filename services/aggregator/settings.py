"""The aggregator's settings."""

import re
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from services.runtime.settings import HttpSettings, Names, OptionalPath, named
from services.runtime.upstream import check_upstream

MEMORY_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")  # as domains are named


class AggregatorSettings(HttpSettings):
    """The public face: next-token distributions and scores of a language model mixed with retrieved neighbors."""

    model_config = SettingsConfigDict(env_prefix="KNNLM_AGGREGATOR_")

    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one, which is logged")
    lm_target: str = Field(
        "127.0.0.1:9001", description="gRPC addresses of the lm service: host:port, dns:///host:port, or a comma list"
    )
    lm_api_key: SecretStr | None = Field(None, description="key to send to the lm service")
    lm_api_key_file: OptionalPath = Field(
        None, description="file with the key to send to the lm service; read again when it changes"
    )
    lm_tls_ca_file: OptionalPath = Field(
        None, description="PEM of the authorities that vouch for the lm service, which is then asked over TLS"
    )
    lm_tls_cert_file: OptionalPath = Field(
        None, description="PEM certificate to present to the lm service, which is then asked over TLS"
    )
    lm_tls_key_file: OptionalPath = Field(None, description="PEM key of lm_tls_cert_file")
    lm_wait_s: float = Field(
        30.0, ge=0, description="seconds to try again while no replica of the lm service answers; a restart fits in"
    )
    datastore_target: str = Field(
        "127.0.0.1:9002",
        description="gRPC addresses of the datastore service, as of the lm service; empty: no retrieval",
    )
    datastore_api_key: SecretStr | None = Field(
        None, description="key to send to the datastore service; an admin key where domains are switched from here"
    )
    datastore_api_key_file: OptionalPath = Field(
        None, description="file with the key to send to the datastore service; read again when it changes"
    )
    datastore_tls_ca_file: OptionalPath = Field(
        None, description="PEM of the authorities that vouch for the datastore service, which is then asked over TLS"
    )
    datastore_tls_cert_file: OptionalPath = Field(
        None, description="PEM certificate to present to the datastore service, which is then asked over TLS"
    )
    datastore_tls_key_file: OptionalPath = Field(None, description="PEM key of datastore_tls_cert_file")
    datastore_wait_s: float = Field(
        5.0, ge=0, description="seconds to try again while no replica of the datastore service answers"
    )
    on_datastore_error: Literal["fail", "lm_only"] = Field(
        "fail", description="when retrieval is down: fail with 503, or answer from the LM alone and say so"
    )
    memory: Names = Field(
        (),
        description="Memory Decoders: NAME=ADDRESS of the lm service that runs a decoder, reached with the key and TLS "
        "of lm_target (several times for replicas), or NAME=FOLDER of an mlp memory, which runs here",
    )
    memory_wait_s: float = Field(5.0, ge=0, description="seconds to try again while no replica of a memory answers")
    on_memory_error: Literal["fail", "lm_only"] = Field(
        "fail", description="when a memory is down: fail with 503, or answer from the LM alone and say so"
    )
    context_length: int | None = Field(
        None,
        ge=2,
        description="tokens fed at once in scoring; by default as the domain was built, else at most 2048",
    )
    min_context: int | None = Field(
        None, ge=1, description="tokens that every scored token sees at least; by default as the domain was built"
    )
    max_context_length: int = Field(
        65_536, ge=2, description="tokens fed at once at most; not more than the lm service's max_tokens"
    )
    max_distribution_numbers: int = Field(
        1 << 24,
        ge=1,
        description="contexts times vocabulary of a next_token request, and of all under way; others wait",
    )
    max_texts: int = Field(64, ge=1, description="contexts in one next_token request")
    max_top_n: int = Field(1000, ge=0, description="tokens listed per context")
    max_neighbors: int = Field(256, ge=0, description="neighbors shown per context, and tokens of text beside each")
    max_explained_passages: int = Field(
        16_384, ge=1, description="tokens that are explained in one request, times passages of each"
    )
    max_choices: int = Field(128, ge=1, description="choices of one request for text, of all its prompts together")
    max_running_choices: int = Field(
        1024, ge=1, description="choices of all requests for text that are generated at a time; others wait"
    )
    max_completion_tokens: int = Field(
        65_536, ge=1, description="tokens that one request for text may generate, all its choices together"
    )
    max_logprobs: int = Field(20, ge=0, description="likeliest tokens listed beside each token of a text")
    max_cache_size: int = Field(4096, ge=1, description="earlier places of a text that a request's cache may look at")
    max_cache_bytes: int = Field(
        1 << 30, ge=1, description="bytes of keys that the caches of all requests under way hold; others wait"
    )
    max_domains: int = Field(8, ge=1, description="domains in one request")
    max_k: int = Field(4096, ge=1, description="neighbors retrieved per query and domain")
    max_text_bytes: int = Field(
        1 << 20, ge=1, description="bytes (UTF-8) of the texts of a request, which are tokenized here"
    )
    max_score_tokens: int = Field(
        131_072, ge=2, description="tokens of the longest text that is scored, and token ids in any request"
    )
    score_batch_tokens: int = Field(4096, ge=1, description="tokens of windows sent to the lm service at once")

    web: bool = Field(True, description="serve the web page at /: files that need no key")

    @property
    def memory_targets(self) -> Mapping[str, str]:
        """The addresses of every memory, or its folder, by its name. Raises ValueError for what is no name with one."""
        targets: dict[str, str] = {}
        for given in self.memory:
            name, _, address = given.partition("=")
            if not MEMORY_NAME.fullmatch(name) or not address:
                raise ValueError(f"{named(self, 'memory')} must be NAME=HOST:PORT or NAME=FOLDER, got {given!r:.80}")
            targets[name] = f"{targets[name]},{address}" if name in targets else address
        return targets

    @model_validator(mode="after")
    def _memories_are_named(self) -> Self:
        _ = self.memory_targets
        return self

    @model_validator(mode="after")
    def _upstreams_are_consistent(self) -> Self:
        if self.min_context is not None and (self.context_length is None or self.min_context >= self.context_length):
            raise ValueError(f"{named(self, 'min_context')} needs a larger {named(self, 'context_length')} beside it")
        if self.max_choices > self.max_running_choices:
            raise ValueError(f"{named(self, 'max_running_choices')} must be at least {named(self, 'max_choices')}")
        for service in ("lm", "datastore"):
            check_upstream(self, service)
        return self
