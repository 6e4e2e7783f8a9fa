"""The lm service's settings."""

from typing import Self

from pydantic import Field, model_validator
from pydantic_settings import SettingsConfigDict

from services.runtime.settings import GrpcSettings


class LmSettings(GrpcSettings):
    """Serve a causal language model: log-probabilities and keys (context vectors) of token sequences."""

    model_config = SettingsConfigDict(env_prefix="KNNLM_LM_")

    port: int = Field(8001, ge=0, le=65535, description="HTTP port; 0 picks a free one, which is logged")
    grpc_port: int = Field(9001, ge=0, le=65535, description="gRPC port; 0 picks a free one, which is logged")
    model: str = Field(description="folder or Hugging Face hub id of the model")
    device: str = Field("auto", description="auto (cuda when there is one), cpu, cuda or cuda:N")
    dtype: str = Field("auto", description="auto (float32 on CPU, bfloat16 on CUDA), float32, bfloat16 or float16")
    key_function: str = Field("ffn_input", description="which vector of the model is the key of a context")
    max_tokens: int = Field(65_536, ge=1, description="tokens in one request")
    max_rows: int = Field(65_536, ge=1, description="positions asked for in one request")
    max_queue_tokens: int = Field(1_048_576, ge=1, description="tokens waiting or in work; more are refused with 429")
    max_batch_tokens: int = Field(16_384, ge=1, description="tokens of several requests run together")
    prefix_cache_bytes: int = Field(
        536_870_912,
        ge=0,
        description="bytes of keys and values kept of recent sequences, to compute only what is new; 0: none",
    )

    @model_validator(mode="after")
    def _largest_request_fits_the_queue(self) -> Self:
        if self.max_tokens > self.max_queue_tokens:
            raise ValueError(
                f"max_tokens must be at most max_queue_tokens, got {self.max_tokens} and {self.max_queue_tokens}"
            )
        return self
