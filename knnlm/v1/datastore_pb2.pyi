from knnlm.v1 import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class SearchRequest(_message.Message):
    __slots__ = ("domain", "queries", "k", "version", "nprobe", "rescore", "overfetch", "ids", "passages", "passage_tokens", "ef_search", "exclude_entries", "exclude_own_documents", "exclude_documents", "follow")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    QUERIES_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    NPROBE_FIELD_NUMBER: _ClassVar[int]
    RESCORE_FIELD_NUMBER: _ClassVar[int]
    OVERFETCH_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EF_SEARCH_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_OWN_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    FOLLOW_FIELD_NUMBER: _ClassVar[int]
    domain: str
    queries: _common_pb2.Tensor
    k: int
    version: str
    nprobe: int
    rescore: bool
    overfetch: float
    ids: bool
    passages: int
    passage_tokens: int
    ef_search: int
    exclude_entries: _common_pb2.Tensor
    exclude_own_documents: bool
    exclude_documents: _containers.RepeatedScalarFieldContainer[str]
    follow: _common_pb2.Tensor
    def __init__(self, domain: _Optional[str] = ..., queries: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., k: _Optional[int] = ..., version: _Optional[str] = ..., nprobe: _Optional[int] = ..., rescore: _Optional[bool] = ..., overfetch: _Optional[float] = ..., ids: _Optional[bool] = ..., passages: _Optional[int] = ..., passage_tokens: _Optional[int] = ..., ef_search: _Optional[int] = ..., exclude_entries: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., exclude_own_documents: _Optional[bool] = ..., exclude_documents: _Optional[_Iterable[str]] = ..., follow: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...

class SearchResponse(_message.Message):
    __slots__ = ("domain", "version", "distances", "values", "ids", "passages", "timings")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DISTANCES_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    distances: _common_pb2.Tensor
    values: _common_pb2.Tensor
    ids: _common_pb2.Tensor
    passages: _containers.RepeatedCompositeFieldContainer[Passages]
    timings: _containers.RepeatedCompositeFieldContainer[_common_pb2.Timing]
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ..., distances: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., values: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., ids: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., passages: _Optional[_Iterable[_Union[Passages, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[_common_pb2.Timing, _Mapping]]] = ...) -> None: ...

class Passages(_message.Message):
    __slots__ = ("passages",)
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    passages: _containers.RepeatedCompositeFieldContainer[Passage]
    def __init__(self, passages: _Optional[_Iterable[_Union[Passage, _Mapping]]] = ...) -> None: ...

class Passage(_message.Message):
    __slots__ = ("document", "entry", "position", "before", "after")
    DOCUMENT_FIELD_NUMBER: _ClassVar[int]
    ENTRY_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    document: str
    entry: int
    position: int
    before: _common_pb2.Tensor
    after: _common_pb2.Tensor
    def __init__(self, document: _Optional[str] = ..., entry: _Optional[int] = ..., position: _Optional[int] = ..., before: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., after: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ...) -> None: ...

class GetPassagesRequest(_message.Message):
    __slots__ = ("domain", "version", "entries", "passage_tokens")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    PASSAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    entries: _common_pb2.Tensor
    passage_tokens: int
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ..., entries: _Optional[_Union[_common_pb2.Tensor, _Mapping]] = ..., passage_tokens: _Optional[int] = ...) -> None: ...

class GetPassagesResponse(_message.Message):
    __slots__ = ("domain", "version", "passages", "timings")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PASSAGES_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    passages: _containers.RepeatedCompositeFieldContainer[Passage]
    timings: _containers.RepeatedCompositeFieldContainer[_common_pb2.Timing]
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ..., passages: _Optional[_Iterable[_Union[Passage, _Mapping]]] = ..., timings: _Optional[_Iterable[_Union[_common_pb2.Timing, _Mapping]]] = ...) -> None: ...

class Tuning(_message.Message):
    __slots__ = ("temperature", "k", "lm_perplexity", "knn_perplexity", "tokens", "documents", "rule", "parameters", "cache", "search", "index", "quality", "rules")
    class ParametersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Parameter, _Mapping]] = ...) -> None: ...
    class CacheEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: Parameter
        def __init__(self, key: _Optional[str] = ..., value: _Optional[_Union[Parameter, _Mapping]] = ...) -> None: ...
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    LAMBDA_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    LM_PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    KNN_PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    RULE_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    CACHE_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    QUALITY_FIELD_NUMBER: _ClassVar[int]
    RULES_FIELD_NUMBER: _ClassVar[int]
    temperature: float
    k: int
    lm_perplexity: float
    knn_perplexity: float
    tokens: int
    documents: int
    rule: str
    parameters: _containers.MessageMap[str, Parameter]
    cache: _containers.MessageMap[str, Parameter]
    search: SearchOptions
    index: str
    quality: _containers.RepeatedCompositeFieldContainer[SearchQuality]
    rules: _containers.RepeatedCompositeFieldContainer[RuleQuality]
    def __init__(self, temperature: _Optional[float] = ..., k: _Optional[int] = ..., lm_perplexity: _Optional[float] = ..., knn_perplexity: _Optional[float] = ..., tokens: _Optional[int] = ..., documents: _Optional[int] = ..., rule: _Optional[str] = ..., parameters: _Optional[_Mapping[str, Parameter]] = ..., cache: _Optional[_Mapping[str, Parameter]] = ..., search: _Optional[_Union[SearchOptions, _Mapping]] = ..., index: _Optional[str] = ..., quality: _Optional[_Iterable[_Union[SearchQuality, _Mapping]]] = ..., rules: _Optional[_Iterable[_Union[RuleQuality, _Mapping]]] = ..., **kwargs) -> None: ...

class Parameter(_message.Message):
    __slots__ = ("number", "numbers")
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    number: float
    numbers: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, number: _Optional[float] = ..., numbers: _Optional[_Iterable[float]] = ...) -> None: ...

class SearchOptions(_message.Message):
    __slots__ = ("k", "nprobe", "rescore", "overfetch", "ef_search", "exclude_own_documents", "exclude_documents")
    K_FIELD_NUMBER: _ClassVar[int]
    NPROBE_FIELD_NUMBER: _ClassVar[int]
    RESCORE_FIELD_NUMBER: _ClassVar[int]
    OVERFETCH_FIELD_NUMBER: _ClassVar[int]
    EF_SEARCH_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_OWN_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    EXCLUDE_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    k: int
    nprobe: int
    rescore: bool
    overfetch: float
    ef_search: int
    exclude_own_documents: bool
    exclude_documents: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, k: _Optional[int] = ..., nprobe: _Optional[int] = ..., rescore: _Optional[bool] = ..., overfetch: _Optional[float] = ..., ef_search: _Optional[int] = ..., exclude_own_documents: _Optional[bool] = ..., exclude_documents: _Optional[_Iterable[str]] = ...) -> None: ...

class SearchQuality(_message.Message):
    __slots__ = ("name", "search", "perplexity", "queries_per_second", "chosen")
    NAME_FIELD_NUMBER: _ClassVar[int]
    SEARCH_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    QUERIES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    search: SearchOptions
    perplexity: float
    queries_per_second: float
    chosen: bool
    def __init__(self, name: _Optional[str] = ..., search: _Optional[_Union[SearchOptions, _Mapping]] = ..., perplexity: _Optional[float] = ..., queries_per_second: _Optional[float] = ..., chosen: _Optional[bool] = ...) -> None: ...

class RuleQuality(_message.Message):
    __slots__ = ("name", "perplexity", "difference", "low", "high", "chosen")
    NAME_FIELD_NUMBER: _ClassVar[int]
    PERPLEXITY_FIELD_NUMBER: _ClassVar[int]
    DIFFERENCE_FIELD_NUMBER: _ClassVar[int]
    LOW_FIELD_NUMBER: _ClassVar[int]
    HIGH_FIELD_NUMBER: _ClassVar[int]
    CHOSEN_FIELD_NUMBER: _ClassVar[int]
    name: str
    perplexity: float
    difference: float
    low: float
    high: float
    chosen: bool
    def __init__(self, name: _Optional[str] = ..., perplexity: _Optional[float] = ..., difference: _Optional[float] = ..., low: _Optional[float] = ..., high: _Optional[float] = ..., chosen: _Optional[bool] = ...) -> None: ...

class Domain(_message.Message):
    __slots__ = ("domain", "version", "versions", "state", "entries", "documents", "key_dim", "key_dtype", "key_function", "index", "model_id", "weights_sha256", "tokenizer_sha256", "tuning", "indexes", "memory", "context_length", "min_context", "config_sha256", "model_dtype", "bos_token_id", "window_bos")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    VERSIONS_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    ENTRIES_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    KEY_DIM_FIELD_NUMBER: _ClassVar[int]
    KEY_DTYPE_FIELD_NUMBER: _ClassVar[int]
    KEY_FUNCTION_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    MODEL_ID_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_SHA256_FIELD_NUMBER: _ClassVar[int]
    TOKENIZER_SHA256_FIELD_NUMBER: _ClassVar[int]
    TUNING_FIELD_NUMBER: _ClassVar[int]
    INDEXES_FIELD_NUMBER: _ClassVar[int]
    MEMORY_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_LENGTH_FIELD_NUMBER: _ClassVar[int]
    MIN_CONTEXT_FIELD_NUMBER: _ClassVar[int]
    CONFIG_SHA256_FIELD_NUMBER: _ClassVar[int]
    MODEL_DTYPE_FIELD_NUMBER: _ClassVar[int]
    BOS_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    WINDOW_BOS_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    versions: _containers.RepeatedScalarFieldContainer[str]
    state: str
    entries: int
    documents: int
    key_dim: int
    key_dtype: str
    key_function: str
    index: str
    model_id: str
    weights_sha256: str
    tokenizer_sha256: str
    tuning: Tuning
    indexes: _containers.RepeatedScalarFieldContainer[str]
    memory: Memory
    context_length: int
    min_context: int
    config_sha256: str
    model_dtype: str
    bos_token_id: int
    window_bos: str
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ..., versions: _Optional[_Iterable[str]] = ..., state: _Optional[str] = ..., entries: _Optional[int] = ..., documents: _Optional[int] = ..., key_dim: _Optional[int] = ..., key_dtype: _Optional[str] = ..., key_function: _Optional[str] = ..., index: _Optional[str] = ..., model_id: _Optional[str] = ..., weights_sha256: _Optional[str] = ..., tokenizer_sha256: _Optional[str] = ..., tuning: _Optional[_Union[Tuning, _Mapping]] = ..., indexes: _Optional[_Iterable[str]] = ..., memory: _Optional[_Union[Memory, _Mapping]] = ..., context_length: _Optional[int] = ..., min_context: _Optional[int] = ..., config_sha256: _Optional[str] = ..., model_dtype: _Optional[str] = ..., bos_token_id: _Optional[int] = ..., window_bos: _Optional[str] = ...) -> None: ...

class Memory(_message.Message):
    __slots__ = ("index", "index_bytes", "keys", "keys_bytes")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    INDEX_BYTES_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    KEYS_BYTES_FIELD_NUMBER: _ClassVar[int]
    index: str
    index_bytes: int
    keys: str
    keys_bytes: int
    def __init__(self, index: _Optional[str] = ..., index_bytes: _Optional[int] = ..., keys: _Optional[str] = ..., keys_bytes: _Optional[int] = ...) -> None: ...

class ListDomainsRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ListDomainsResponse(_message.Message):
    __slots__ = ("domains",)
    DOMAINS_FIELD_NUMBER: _ClassVar[int]
    domains: _containers.RepeatedCompositeFieldContainer[Domain]
    def __init__(self, domains: _Optional[_Iterable[_Union[Domain, _Mapping]]] = ...) -> None: ...

class GetDomainRequest(_message.Message):
    __slots__ = ("domain", "version")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class GetDomainResponse(_message.Message):
    __slots__ = ("domain",)
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    domain: Domain
    def __init__(self, domain: _Optional[_Union[Domain, _Mapping]] = ...) -> None: ...

class ActivateVersionRequest(_message.Message):
    __slots__ = ("domain", "version")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ...) -> None: ...

class ActivateVersionResponse(_message.Message):
    __slots__ = ("domain",)
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    domain: Domain
    def __init__(self, domain: _Optional[_Union[Domain, _Mapping]] = ...) -> None: ...

class Document(_message.Message):
    __slots__ = ("id", "text")
    ID_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    id: str
    text: str
    def __init__(self, id: _Optional[str] = ..., text: _Optional[str] = ...) -> None: ...

class AddDocumentsRequest(_message.Message):
    __slots__ = ("domain", "documents", "replace")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    REPLACE_FIELD_NUMBER: _ClassVar[int]
    domain: str
    documents: _containers.RepeatedCompositeFieldContainer[Document]
    replace: bool
    def __init__(self, domain: _Optional[str] = ..., documents: _Optional[_Iterable[_Union[Document, _Mapping]]] = ..., replace: _Optional[bool] = ...) -> None: ...

class DomainChange(_message.Message):
    __slots__ = ("domain", "version", "parent", "added_documents", "added_entries", "removed_documents", "removed_entries", "advice")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    PARENT_FIELD_NUMBER: _ClassVar[int]
    ADDED_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    ADDED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    REMOVED_DOCUMENTS_FIELD_NUMBER: _ClassVar[int]
    REMOVED_ENTRIES_FIELD_NUMBER: _ClassVar[int]
    ADVICE_FIELD_NUMBER: _ClassVar[int]
    domain: str
    version: str
    parent: str
    added_documents: int
    added_entries: int
    removed_documents: int
    removed_entries: int
    advice: str
    def __init__(self, domain: _Optional[str] = ..., version: _Optional[str] = ..., parent: _Optional[str] = ..., added_documents: _Optional[int] = ..., added_entries: _Optional[int] = ..., removed_documents: _Optional[int] = ..., removed_entries: _Optional[int] = ..., advice: _Optional[str] = ...) -> None: ...

class AddDocumentsResponse(_message.Message):
    __slots__ = ("change",)
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    change: DomainChange
    def __init__(self, change: _Optional[_Union[DomainChange, _Mapping]] = ...) -> None: ...

class RemoveDocumentsRequest(_message.Message):
    __slots__ = ("domain", "ids")
    DOMAIN_FIELD_NUMBER: _ClassVar[int]
    IDS_FIELD_NUMBER: _ClassVar[int]
    domain: str
    ids: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, domain: _Optional[str] = ..., ids: _Optional[_Iterable[str]] = ...) -> None: ...

class RemoveDocumentsResponse(_message.Message):
    __slots__ = ("change",)
    CHANGE_FIELD_NUMBER: _ClassVar[int]
    change: DomainChange
    def __init__(self, change: _Optional[_Union[DomainChange, _Mapping]] = ...) -> None: ...
