from collections.abc import Iterator

import pytest

from knnlm import errors as core
from knnlm.clients.failures import rebuild
from services.runtime import errors


def family(cls: type[core.KnnlmError]) -> Iterator[type[core.KnnlmError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from family(child)


@pytest.mark.parametrize("cls", list(family(core.KnnlmError)), ids=lambda cls: cls.__name__)
def test_every_error_has_a_row_and_one_shape(cls: type[core.KnnlmError]) -> None:
    err = cls("a sentence", param="k")
    row = errors.row(err)
    assert 400 <= row.status < 600
    assert errors.body(err) == {"error": {"message": "a sentence", "type": row.type, "param": "k", "code": cls.code}}


def test_the_table_has_no_row_too_many() -> None:
    assert set(errors.TABLE) == {cls.code for cls in family(core.KnnlmError)}


@pytest.mark.parametrize("name", core.__all__)
def test_clients_rebuild_what_services_sent(name: str) -> None:
    sent: core.KnnlmError = getattr(core, name)("a sentence", param="k")
    given = dict(errors.metadata(sent))
    rebuilt = rebuild(
        given["knnlm-error-code"], sent.message, param=given["knnlm-error-param"], retry_after=given.get("retry-after")
    )
    assert (type(rebuilt), rebuilt.message, rebuilt.param) == (type(sent), sent.message, sent.param)


def test_a_full_queue_says_when_to_come_back() -> None:
    err = core.Overloaded("full", retry_after=2.5)
    assert errors.headers(err) == {"retry-after": "3"}  # whole seconds
    rebuilt = rebuild("overloaded", "full", retry_after=dict(errors.metadata(err))["retry-after"])
    assert isinstance(rebuilt, core.Overloaded)
    assert rebuilt.retry_after == 2.5


def test_a_conflict_tells_clients_not_to_retry() -> None:
    assert errors.headers(core.Conflict("current")) == {"x-should-retry": "false"}


def test_metadata_holds_ascii_only() -> None:
    assert errors.metadata(core.InvalidRequest("x", param="größe")) == (("knnlm-error-code", "invalid_request"),)


def test_an_unknown_code_becomes_a_plain_error() -> None:
    assert type(rebuild("internal", "x")) is core.KnnlmError
