from knnlm.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class ForwardRequest(_message.Message):
    __slots__ = ("tokens", "lengths", "positions", "position_counts", "full", "targets", "top_n", "keys", "statistics", "candidates", "candidate_counts", "temperatures", "cache")
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    POSITIONS_FIELD_NUMBER: _ClassVar[int]
    POSITION_COUNTS_FIELD_NUMBER: _ClassVar[int]
    FULL_FIELD_NUMBER: _ClassVar[int]
    TARGETS_FIELD_NUMBER: _ClassVar[int]
    TOP_N_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STATISTICS_FIELD_NUMBER: _ClassVar[int]
    CANDIDATES_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_COUNTS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURES_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    tokens: _common_pb2.Tensor
    lengths: _containers.RepeatedScalarFieldContainer[int]
    positions: _common_pb2.Tensor
    position_counts: _containers.RepeatedScalarFieldContainer[int]
    full: bool
    targets: _common_pb2.Tensor
    top_n: int
    keys: bool
    statistics: bool
    candidates: _common_pb2.Tensor
    candidate_counts: _containers.RepeatedScalarFieldContainer[int]
    temperatures: _common_pb2.Tensor
    cache: bool
    def __init__(self, tokens: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., lengths: _Optional[_Iterable[int]] = ..., positions: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., position_counts: _Optional[_Iterable[int]] = ..., full: _Optional[bool] = ..., targets: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., top_n: _Optional[int] = ..., keys: _Optional[bool] = ..., statistics: _Optional[bool] = ..., candidates: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., candidate_counts: _Optional[_Iterable[int]] = ..., temperatures: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., cache: _Optional[bool] = ...) -> None: ...

class ForwardResponse(_message.Message):
    __slots__ = ("log_probs", "target_log_probs", "top_tokens", "top_log_probs", "keys", "timings", "fingerprint", "entropy", "largest_log_prob", "candidate_log_probs", "log_power_sums")
    LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    TARGET_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ENTROPY_FIELD_NUMBER: _ClassVar[int]
    LARGEST_LOG_PROB_FIELD_NUMBER: _ClassVar[int]
    CANDIDATE_LOG_PROBS_FIELD_NUMBER: _ClassVar[int]
    LOG_POWER_SUMS_FIELD_NUMBER: _ClassVar[int]
    log_probs: _common_pb2.Tensor
    target_log_probs: _common_pb2.Tensor
    top_tokens: _common_pb2.Tensor
    top_log_probs: _common_pb2.Tensor
    keys: _common_pb2.Tensor
    timings: _containers.RepeatedCompositeFieldContainer[_common_pb2.Timing]
    fingerprint: str
    entropy: _common_pb2.Tensor
    largest_log_prob: _common_pb2.Tensor
    candidate_log_probs: _common_pb2.Tensor
    log_power_sums: _common_pb2.Tensor
    def __init__(self, log_probs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., target_log_probs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., top_tokens: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., top_log_probs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., keys: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., timings: _Optional[_Iterable[_Union[_common_pb2.Timing, _Mapping]]] = ..., fingerprint: _Optional[str] = ..., entropy: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., largest_log_prob: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., candidate_log_probs: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., log_power_sums: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ("include_tokenizer", "include_chat_template")
    INCLUDE_TOKENIZER_FIELD_NUMBER: _ClassVar[int]
    INCLUDE_CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    include_tokenizer: bool
    include_chat_template: bool
    def __init__(self, include_tokenizer: _Optional[bool] = ..., include_chat_template: _Optional[bool] = ...) -> None: ...

class TrainedMemory(_message.Message):
    __slots__ = ("domain", "version", "content", "entries", "beta")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    BETA_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    content: str
    entries: int
    beta: float
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ..., content: _Optional[str] = ..., entries: _Optional[int] = ..., beta: _Optional[float] = ..., **kwargs) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model_id", "architecture", "weights_sha256", "tokenizer_sha256", "vocab_size", "context_length", "key_function", "key_dim", "dtype", "device", "bos_token_id", "eos_token_id", "tokenizer_json", "chat_template", "config_sha256", "memory")
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    KEY_FUNCTION_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_JSON_FIELD_NUMBER: _ClassVar[int]
    CHAT_TEMPLATE_FIELD_NUMBER: _ClassVar[int]
    CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    model_id: str
    architecture: str
    weights_sha256: str
    tokenizer_sha256: str
    vocab_size: int
    context_length: int
    key_function: str
    key_dim: int
    dtype: str
    device: str
    bos_token_id: int
    eos_token_id: int
    tokenizer_json: str
    chat_template: str
    config_sha256: str
    memory: TrainedMemory
    def __init__(self, model_id: _Optional[str] = ..., architecture: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., tokenizer_sha256: _Optional[str] = ..., vocab_size: _Optional[int] = ..., context_length: _Optional[int] = ..., key_function: _Optional[str] = ..., key_dim: _Optional[int] = ..., dtype: _Optional[str] = ..., device: _Optional[str] = ..., bos_token_id: _Optional[int] = ..., eos_token_id: _Optional[int] = ..., tokenizer_json: _Optional[str] = ..., chat_template: _Optional[str] = ..., config_sha256: _Optional[str] = ..., memory: _Optional[_Union[TrainedMemory, _Mapping]] = ...) -> None: ...
