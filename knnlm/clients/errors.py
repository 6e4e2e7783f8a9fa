"""The errors of a service, raised again where it was called: the same class, found by its stable code."""

from collections.abc import Iterator

from knnlm.errors import KnnlmError, Overloaded

__all__ = ["rebuild"]


def rebuild(code: str, message: str, *, param: str | None = None, retry_after: str | None = None) -> KnnlmError:
    """The error a service meant. A code that no class has (such as `internal`) gives a plain KnnlmError."""
    found = {cls.code: cls for cls in _family(KnnlmError)}.get(code, KnnlmError)
    if found is Overloaded:
        return Overloaded(message, param=param, retry_after=_seconds(retry_after))
    return found(message, param=param)


def _family(cls: type[KnnlmError]) -> Iterator[type[KnnlmError]]:
    for child in cls.__subclasses__():
        if child.__module__ == KnnlmError.__module__:
            yield child
            yield from _family(child)


def _seconds(text: str | None) -> float:
    try:
        return float(text or "1")
    except ValueError:
        return 1.0
