"""Requests drawn from what a service says of itself in /openapi.json, valid ones and others, over a real socket."""

import contextlib
from collections import Counter
from collections.abc import Mapping
from typing import Any

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

__all__ = ["explored"]

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
PATIENCE = 30.0  # seconds
KNOWN = {
    "domain": "toy",
    "model": "toy",
}  # names that mean something, in every other request: the rest is then read, too
BUSY = (503, 504)  # documented, and no fault of the service


def explored(url: str, examples: int) -> Counter[str]:
    """Answers by operation and status. AssertionError, with the request, for one that breaks what the service says."""
    schema = schemathesis.openapi.from_url(f"{url}/openapi.json")
    seen: Counter[str] = Counter()
    for result in schema.get_all_operations():
        assert isinstance(result, Ok), result
        operation = result.ok()
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            strategy = operation.as_strategy(generation_mode=mode)

            @settings(
                max_examples=examples,
                deadline=None,
                database=None,
                derandomize=True,
                phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )
            @given(case=strategy)
            def ask(case: "schemathesis.Case[Any]") -> None:
                if seen.total() % 2:
                    _named(case.path_parameters, KNOWN)
                    _named(case.body, KNOWN)
                response = case.call(timeout=PATIENCE)
                seen[f"{case.operation.label} {response.status_code}"] += 1
                if response.status_code not in BUSY:
                    case.validate_response(response, checks=CHECKS)

            with contextlib.suppress(Unsatisfiable):  # what takes nothing cannot be given anything wrong
                ask()
    return seen


def _named(part: object, names: Mapping[str, str]) -> None:
    """Put the names where they are asked for, at any depth; anything else stays what was drawn."""
    if not isinstance(part, dict):
        return
    for name, value in part.items():
        if name in names and isinstance(value, str):
            part[name] = names[name]
        else:
            _named(value, names)
