"""The documentation tells all: settings, routes, rpcs, errors and metrics that exist are in docs/."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from knnlm.v1 import datastore_pb2, lm_pb2
from services.aggregator.app import service as aggregator
from services.aggregator.settings import AggregatorSettings
from services.datastore.app import service as datastore
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm
from services.lm.settings import LmSettings
from services.runtime import errors
from services.runtime.http import build_app
from services.runtime.service import Admission, Service
from services.runtime.settings import HttpSettings

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, type[HttpSettings]] = {
    "lm": LmSettings,
    "datastore": DatastoreSettings,
    "aggregator": AggregatorSettings,
}


def services() -> list[Service]:
    return [
        lm(LmSettings(model="models/pocket")),
        datastore(DatastoreSettings(store=Path("store"))),
        aggregator(AggregatorSettings()),
    ]


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def routes(service: Service) -> Iterator[str]:
    app = build_app(service, Admission(service)).app  # type: ignore[attr-defined]  # the FastAPI app inside the edge
    for path, methods in app.openapi()["paths"].items():
        for method in methods:
            yield f"{method.upper()} {path}"


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_documented_with_flag_variable_and_default(name: str) -> None:
    text = page("configuration.md")
    prefix = f"KNNLM_{name.upper()}_"
    for field, info in SETTINGS[name].model_fields.items():
        flag = "--" + field.replace("_", "-")
        rows = [line for line in text.splitlines() if f"`{flag}`" in line and line.startswith("|")]
        assert rows, f"{flag} of the {name} service is not in docs/configuration.md"
        described = [row for row in rows if info.description and info.description.replace("|", "\\|") in row]
        assert described, f"{flag}: docs/configuration.md does not say {info.description!r}"
        if not info.is_required() and info.default not in (None, (), ""):
            assert any(f"`{info.default}`" in row for row in described), f"{flag}: {info.default} is not documented"
    assert prefix in text


def test_every_route_is_documented() -> None:
    text = page("api.md")
    for service in services():
        for route in routes(service):
            assert f"`{route}`" in text, f"{route} of the {service.name} service is not in docs/api.md"


def test_every_documented_route_exists() -> None:
    known = {route for service in services() for route in routes(service)}
    for route in re.findall(r"`((?:GET|POST|PUT|DELETE|PATCH) /[^`\s]*)`", page("api.md")):
        assert route in known, f"docs/api.md documents {route}, which no service has"


def test_every_rpc_is_documented() -> None:
    text = page("api.md")
    for module in (lm_pb2, datastore_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            for method in service.methods:
                assert f"`{service.full_name}/{method.name}`" in text


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = [line for line in page("api.md").splitlines() if line.startswith("|")]
    for code, error in errors.TABLE.items():
        row = next((r for r in rows if r.startswith(f"| `{code}` |")), "")
        assert f"| {error.status} | {error.grpc.name} |" in row, f"{code} is not in docs/api.md with its status"


def test_every_metric_is_documented() -> None:
    text = page("operations.md")
    for service in services():
        for family in service.metrics.registry.collect():
            if family.name.startswith("knnlm_"):
                assert f"`{family.name}" in text, f"{family.name} is not in docs/operations.md"


def test_the_documented_layers_are_those_that_are_enforced() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    layers = next(contract["layers"] for contract in contracts if contract["type"] == "layers")
    assert " > ".join(layers) in " ".join(page("architecture.md").split())


def test_links_between_pages_lead_somewhere() -> None:
    for file in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "models").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", file.read_text(encoding="utf-8")):
            assert (file.parent / target).exists(), f"{file.relative_to(ROOT)} links to {target}, which is not there"
