"""What the lm service's HTTP face takes and gives."""

from pydantic import BaseModel, Field, StrictBool, StrictInt

from services.runtime.schemas import Array, Encoding, Strict

MAX_SEQUENCES = 65_536  # each is an array to be made on the event loop


class ForwardBody(Strict):
    """Sequences, the positions asked of each, and what is wanted there: at least one of full, targets, top_n, keys,
    statistics."""

    tokens: list[Array] = Field(
        max_length=MAX_SEQUENCES, description="Token ids, one array per sequence, BOS included by the caller."
    )
    positions: list[Array] = Field(
        max_length=MAX_SEQUENCES,
        description="One ascending array per sequence; position j asks for the token after tokens[0..j].",
    )
    full: StrictBool = Field(False, description="Log-probabilities of every token.")
    targets: Array | None = Field(None, description="One token per position: their log-probabilities.")
    top_n: StrictInt = Field(0, description="So many of the likeliest tokens.")
    keys: StrictBool = Field(False, description="Context vectors.")
    statistics: StrictBool = Field(False, description="Entropy and largest log-probability of each distribution.")
    encoding: Encoding = "list"


class ForwardAnswer(BaseModel):
    """What was asked for, null elsewhere. n rows: the positions of all sequences in order. Natural logarithms."""

    log_probs: Array | None = Field(description="(n, vocabulary) float32")
    target_log_probs: Array | None = Field(description="(n,) float32")
    top_tokens: Array | None = Field(description="(n, top_n) int32, likeliest first")
    top_log_probs: Array | None = Field(description="(n, top_n) float32")
    keys: Array | None = Field(description="(n, key_dim) float32, or float16 when the model runs in half precision")
    entropy: Array | None = Field(description="(n,) float32, nats")
    largest_log_prob: Array | None = Field(description="(n,) float32: the likeliest token's")
    fingerprint: str = Field(description="Of the model: differs when answers could, see knnlm.v1.ForwardResponse.")
    timings: dict[str, float] = Field(description="Seconds per stage.")


class ModelAnswer(BaseModel):
    model_id: str
    architecture: str
    weights_sha256: str
    tokenizer_sha256: str = Field(description="Of the text that /v1/tokenizer gives.")
    config_sha256: str = Field(description="Of what the model's configuration says that answers depend on.")
    vocab_size: int = Field(description="The width of the logits.")
    context_length: int = Field(description="Tokens of the longest sequence.")
    key_function: str
    key_dim: int
    dtype: str
    device: str
    bos_token_id: int | None
    eos_token_id: int | None
