"""The datastore service's settings."""

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, model_validator
from pydantic_settings import SettingsConfigDict

from knnlm.cluster.connection import MAX_REPLICAS
from services.runtime.settings import GrpcSettings, Names, OptionalPath
from services.runtime.upstream import check_upstream


class DatastoreSettings(GrpcSettings):
    """Serve the domains of a store: batched k-NN search, versions switched while serving."""

    model_config = SettingsConfigDict(env_prefix="KNNLM_DATASTORE_")

    port: int = Field(8002, ge=0, le=65535, description="HTTP port; 0 picks a free one, which is logged")
    grpc_port: int = Field(9002, ge=0, le=65535, description="gRPC port; 0 picks a free one, which is logged")
    store: Path = Field(description="folder with one folder per domain; may be empty or not exist yet")
    domains: Names = Field((), description="serve these alone, and do not start without them; none: all of the store")
    index: str = Field("", description="which index of a version answers, by its recipe, or flat; empty: its default")
    memory: Literal["mapped", "resident"] = Field(
        "mapped", description="index and stored keys: mapped files where that is possible, or read into memory"
    )
    device: str = Field(
        "cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="where the index is searched: cpu, cuda or cuda:N"
    )
    max_memory_bytes: int | None = Field(
        None,
        ge=1,
        description="bytes that loaded versions may take together without mapped files; none: what there is",
    )
    max_k: int = Field(4096, ge=1, description="neighbors per query")
    max_overfetch: float = Field(16.0, ge=1, description="candidates per neighbor that a request may ask for")
    max_nprobe: int = Field(1024, ge=1, description="lists that a request may ask to visit")
    max_ef_search: int = Field(8192, ge=1, description="candidates that a request may ask a graph search to keep")
    max_candidates: int = Field(
        1 << 20,
        ge=1 << 12,
        description="candidates of one query, over-fetched ones and those in place of excluded ones counted",
    )
    max_queries: int = Field(4096, ge=1, description="queries in one request")
    max_passages: int = Field(256, ge=0, description="neighbors per query shown with their text")
    max_passage_tokens: int = Field(512, ge=0, description="tokens of text on each side of a shown neighbor")
    max_entries: int = Field(65_536, ge=1, description="entries whose passages one request may look up")
    max_documents: int = Field(1024, ge=1, description="documents added or removed in one request")
    max_queue_queries: int = Field(65_536, ge=1, description="queries waiting or in work; more are refused with 429")
    max_batch_queries: int = Field(1024, ge=1, description="queries of several requests searched together")
    check: Literal["none", "small", "all"] = Field(
        "small", description="what is compared with its checksum before a version is served: small = all but its keys"
    )
    lm_target: str = Field("", description="gRPC address of the lm service, for adding documents; empty: none is added")
    lm_api_key: SecretStr | None = Field(None, description="key to send to the lm service")
    lm_api_key_file: OptionalPath = Field(None, description="file with that key, read again when it changes")
    lm_tls_ca_file: OptionalPath = Field(
        None, description="PEM of the authorities that vouch for the lm service, which is then asked over TLS"
    )
    lm_tls_cert_file: OptionalPath = Field(
        None, description="PEM certificate to present to the lm service, which is then asked over TLS"
    )
    lm_tls_key_file: OptionalPath = Field(None, description="PEM key of lm_tls_cert_file")
    cluster: str = Field(
        "",
        description="Ray cluster whose nodes search, shard by shard: auto, local, HOST:PORT or ray://HOST:PORT; empty: "
        "this process searches",
    )
    cluster_searches: int = Field(8, ge=1, le=256, description="batches that the cluster is asked for at once")
    shard_min_replicas: int = Field(
        1, ge=1, le=MAX_REPLICAS, description="replicas that each shard has on the cluster at least"
    )
    shard_max_replicas: int = Field(
        1, ge=1, le=MAX_REPLICAS, description="replicas that each shard has on the cluster at most"
    )
    shard_target_requests: float = Field(
        2.0,
        gt=0,
        allow_inf_nan=False,
        description="batches at a time beyond which a replica of a shard gets another one beside it",
    )
    shard_upscale_delay_s: float = Field(
        30.0,
        ge=0,
        allow_inf_nan=False,
        description="how long there are more batches than that before a replica of a shard is added",
    )
    shard_downscale_delay_s: float = Field(
        600.0,
        ge=0,
        allow_inf_nan=False,
        description="how long there are fewer before a replica of a shard is taken away",
    )
    shard_cpus: float = Field(
        1.0, ge=0, allow_inf_nan=False, description="processors that Ray reserves for a replica of a shard"
    )
    shard_replicas_per_node: int | None = Field(
        None, ge=1, le=100, description="replicas of one shard on one node of the cluster at most; none: any number"
    )
    watch_interval_s: float = Field(1.0, gt=0, description="how often the store is looked at for changes")
    grace_s: float = Field(
        60.0, ge=0, description="how long a version that was replaced still answers requests that pin it"
    )

    @model_validator(mode="after")
    def _upstream_is_consistent(self) -> Self:
        check_upstream(self, "lm")
        return self

    @model_validator(mode="after")
    def _cluster_gives_the_gpu(self) -> Self:
        if self.cluster and ":" in self.device:
            raise ValueError(
                f"device must be cpu or cuda where a cluster searches, got {self.device}: Ray gives a replica one GPU"
            )
        return self

    @model_validator(mode="after")
    def _replicas_are_a_range(self) -> Self:
        if self.shard_min_replicas > self.shard_max_replicas:
            raise ValueError(
                f"shard_min_replicas must be at most shard_max_replicas, got {self.shard_min_replicas} and "
                f"{self.shard_max_replicas}"
            )
        return self

    @model_validator(mode="after")
    def _largest_request_fits_the_queue(self) -> Self:
        if self.max_queries > self.max_queue_queries:
            raise ValueError(
                f"max_queries must be at most max_queue_queries, got {self.max_queries} and {self.max_queue_queries}"
            )
        return self
