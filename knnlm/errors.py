"""Every error this project raises on purpose, each with a stable code.

KnnlmError
├── InvalidRequest            invalid_request        a value the caller gave is wrong
│   └── TooLarge              too_large              the value is fine, there is too much of it
├── NotFound                  not_found
│   ├── UnknownDomain         unknown_domain
│   ├── UnknownVersion        unknown_version
│   └── UnknownModel          unknown_model
├── Conflict                  conflict               the state forbids it (deleting the current version)
├── Unauthenticated           unauthenticated        no key, or a wrong one
├── PermissionDenied          permission_denied      a valid key that may not do this
├── Overloaded                overloaded             the queue is full: try again
├── Unavailable               unavailable            loading, draining, or a service behind is down
├── DeadlineExceeded          deadline_exceeded
├── DatastoreError            datastore_error        a datastore on disk cannot be used
│   ├── DatastoreCorrupt      datastore_corrupt      a checksum, size or header is wrong
│   ├── DatastoreMismatch     datastore_mismatch     made by another model, tokenizer, key function or dtype
│   ├── DatastoreIncomplete   datastore_incomplete   a build that has not finished
│   └── InsufficientMemory    insufficient_memory    there is no room for it in memory now
└── ModelError                model_error            a model cannot be loaded or used
    └── UnknownArchitecture   unknown_architecture   no row for it in knnlm/lm/architectures.py

What HTTP status or gRPC code an error becomes is known to services/runtime/errors.py alone.
"""

from typing import ClassVar

__all__ = [
    "Conflict",
    "DatastoreCorrupt",
    "DatastoreError",
    "DatastoreIncomplete",
    "DatastoreMismatch",
    "DeadlineExceeded",
    "InsufficientMemory",
    "InvalidRequest",
    "KnnlmError",
    "ModelError",
    "NotFound",
    "Overloaded",
    "PermissionDenied",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "UnknownArchitecture",
    "UnknownDomain",
    "UnknownModel",
    "UnknownVersion",
]


class KnnlmError(Exception):
    """Base of all. `message` is one sentence for a person; `param` names the field it is about, if one is."""

    code: ClassVar[str] = "error"

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class InvalidRequest(KnnlmError):
    code = "invalid_request"


class TooLarge(InvalidRequest):
    code = "too_large"


class NotFound(KnnlmError):
    code = "not_found"


class UnknownDomain(NotFound):
    code = "unknown_domain"


class UnknownVersion(NotFound):
    code = "unknown_version"


class UnknownModel(NotFound):
    code = "unknown_model"


class Conflict(KnnlmError):
    code = "conflict"


class Unauthenticated(KnnlmError):
    code = "unauthenticated"


class PermissionDenied(KnnlmError):
    code = "permission_denied"


class Overloaded(KnnlmError):
    """`retry_after` is in seconds: when it makes sense to try again."""

    code = "overloaded"

    def __init__(self, message: str, *, param: str | None = None, retry_after: float = 1.0) -> None:
        super().__init__(message, param=param)
        self.retry_after = retry_after


class Unavailable(KnnlmError):
    code = "unavailable"


class DeadlineExceeded(KnnlmError):
    code = "deadline_exceeded"


class DatastoreError(KnnlmError):
    code = "datastore_error"


class DatastoreCorrupt(DatastoreError):
    code = "datastore_corrupt"


class DatastoreMismatch(DatastoreError):
    code = "datastore_mismatch"


class DatastoreIncomplete(DatastoreError):
    code = "datastore_incomplete"


class InsufficientMemory(DatastoreError):
    code = "insufficient_memory"


class ModelError(KnnlmError):
    code = "model_error"


class UnknownArchitecture(ModelError):
    code = "unknown_architecture"
