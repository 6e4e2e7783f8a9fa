"""A body that is wrong in a million places costs no more than one that is wrong in one."""

from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from services.aggregator.completions.schemas import ChatRequest, CompletionRequest
from services.aggregator.schemas.domains import ActivateRequest
from services.aggregator.schemas.mixing import Knn, NextTokenRequest, ScoreRequest
from services.aggregator.schemas.tokenizer import DetokenizeRequest, TokenizeRequest
from services.datastore.schemas import ActivateBody, SearchBody
from services.lm.schemas import ForwardBody
from services.runtime.errors import MAX_SHOWN_CHARACTERS, from_validation
from services.runtime.schemas import AddDocumentsBody, RemoveDocumentsBody, Strict

MANY = 10_000
BODIES: list[type[BaseModel]] = [
    ActivateBody, ActivateRequest, AddDocumentsBody, ChatRequest, CompletionRequest, DetokenizeRequest, ForwardBody,
    Knn, NextTokenRequest, RemoveDocumentsBody, ScoreRequest, SearchBody, TokenizeRequest,
]  # fmt: skip


class Wrong:
    """Of no type that any field takes."""

    def __repr__(self) -> str:
        return "wrong"


def problems(schema: type[BaseModel], body: Any) -> list[Any]:  # Any: JSON, and pydantic's description
    with pytest.raises(ValidationError) as caught:
        schema.model_validate(body)
    return caught.value.errors(include_url=False)


@pytest.mark.parametrize("schema", BODIES, ids=lambda schema: schema.__name__)
@pytest.mark.parametrize("element", [Wrong(), {"a": 1}, ["a"], 1.5, "\ud800"], ids=repr)
def test_a_list_is_left_at_its_first_wrong_element(schema: type[BaseModel], element: object) -> None:
    fields = {field.alias or name for name, field in schema.model_fields.items()}
    found = problems(schema, dict.fromkeys(fields, [element] * MANY))
    assert 1 <= len(found) <= len(fields) + 5  # an element that is an object may want fields itself
    inside = [place for problem in found for place in problem["loc"] if isinstance(place, int)]
    assert set(inside) <= {0}


@pytest.mark.parametrize("schema", [b for b in BODIES if issubclass(b, Strict)], ids=lambda schema: schema.__name__)
def test_of_unknown_fields_the_first_is_named(schema: type[BaseModel]) -> None:
    found = problems(schema, {f"field {i}": i for i in range(MANY)})
    assert [p["loc"] for p in found if p["type"] == "extra_forbidden"] == [("field 0",)]
    assert len(found) <= 1 + len(schema.model_fields)


@pytest.mark.parametrize(
    ("schema", "field", "most"), [(AddDocumentsBody, "documents", 16_384), (RemoveDocumentsBody, "ids", 16_384),
                                  (Knn, "domains", 1024), (Knn, "exclude_documents", 1024)]
)  # fmt: skip
def test_lists_have_a_bound(schema: type[BaseModel], field: str, most: int) -> None:
    element = {"id": "a", "text": "b"} if field == "documents" else "a"
    schema.model_validate({field: [element] * most})
    assert [problem["type"] for problem in problems(schema, {field: [element] * (most + 1)})] == ["too_long"]


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"knn": {"domains": ["a", {"domain": "b", "lambda": 2}]}}, "knn.domains.1.lambda", "less than or equal to 1"),
        ({"knn": {"domains": ["a", {"lambda": 0.5}]}}, "knn.domains.1.domain", "is required"),
        ({"knn": {"domains": ["a", {"domain": "b", "k": 3}]}}, "knn.domains.1.k", "is not a known field"),
        ({"knn": {"domains": ["a", 7]}}, "knn.domains.1", "expected a name or an object, got 7"),
        ({"knn": {"domains": "a"}}, "knn.domains", "valid list"),
        ({"text": ["a", 7]}, "text.1", "valid string, got 7"),
        ({"text": {"a": 1}}, "text", "expected a text or a list of texts, got {'a': 1}"),
    ],
)
def test_the_fault_itself_is_named(body: dict[str, Any], param: str, message: str) -> None:
    (problem,) = problems(NextTokenRequest, body)
    error = from_validation({**problem, "loc": ("body", *problem["loc"])}, body)
    assert error.param == param
    assert message in error.message


@pytest.mark.parametrize("given", ["x" * 10**6, ["x" * 10**6] * 100, {f"{i}": ["x" * 1000] * 1000 for i in range(100)}])
def test_of_a_large_value_little_is_shown(given: object) -> None:
    error = from_validation(
        {"type": "int_type", "loc": ("body", "k"), "msg": "Input should be a number", "input": given}
    )
    assert len(error.message) < MAX_SHOWN_CHARACTERS + 60
    assert error.message.endswith("…")
