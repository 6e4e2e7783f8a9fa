"""The tree of errors: complete, with distinct codes, drawn in the module's docstring."""

import knnlm.errors
from knnlm.errors import KnnlmError


def every_error() -> list[type[KnnlmError]]:
    found: list[type[KnnlmError]] = []
    pending = [KnnlmError]
    while pending:
        cls = pending.pop()
        found.append(cls)
        pending += [c for c in cls.__subclasses__() if c.__module__ == "knnlm.errors"]
    return found


def test_all_names_are_exported() -> None:
    assert sorted(c.__name__ for c in every_error()) == sorted(knnlm.errors.__all__)


def test_codes_are_distinct() -> None:
    codes = [c.code for c in every_error()]
    assert len(set(codes)) == len(codes)


def test_docstring_draws_the_tree() -> None:
    lines = (knnlm.errors.__doc__ or "").splitlines()
    for cls in every_error():
        assert any(cls.__name__ in line and (cls is KnnlmError or cls.code in line) for line in lines), cls
