"""deploy/kuberay is what the operator's schema takes, and sets what the services know."""

import json
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
import yaml

from services.datastore.settings import DatastoreSettings

ROOT = Path(__file__).resolve().parents[2]
MANIFEST = ROOT / "deploy" / "kuberay" / "knnlm.yaml"
SCHEMA = json.loads(Path(__file__).with_name("raycluster_schema.json").read_text(encoding="utf-8"))


def documents() -> list[Any]:  # Any: YAML
    return list(yaml.safe_load_all(MANIFEST.read_text(encoding="utf-8")))


def cluster() -> Any:
    (found,) = (document for document in documents() if document["kind"] == "RayCluster")
    return found


def test_the_cluster_is_what_the_schema_takes() -> None:
    assert [problem.message for problem in jsonschema_rs.validator_for(SCHEMA).iter_errors(cluster())] == []


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("spec", "workers"), []),
        (("spec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("spec", "workerGroupSpecs", 0, "minReplicas"), "2"),
        (("spec", "autoscalerOptions", "upscalingMode"), "Fast"),
    ],
)
def test_the_schema_refuses_what_the_operator_would(path: tuple[str | int, ...], value: object) -> None:
    changed = at = json.loads(json.dumps(cluster()))
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    assert list(jsonschema_rs.validator_for(SCHEMA).iter_errors(changed))


def test_every_setting_exists_and_its_value_is_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (gateway,) = (group for group in cluster()["spec"]["workerGroupSpecs"] if group["groupName"] == "gateways")
    (container,) = gateway["template"]["spec"]["containers"]
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-the-test\n")
    prefix = "KNNLM_DATASTORE_"
    for pair in container["env"]:
        if pair["name"].startswith(prefix):
            assert pair["name"].removeprefix(prefix).lower() in DatastoreSettings.model_fields
            monkeypatch.setenv(pair["name"], str(keys) if pair["value"].startswith("/keys/") else pair["value"])
    settings = DatastoreSettings()
    assert (settings.cluster, settings.shard_min_replicas, settings.shard_max_replicas) == ("auto", 2, 6)
    (service,) = (document for document in documents() if document["kind"] == "Service")
    assert {port["port"] for port in service["spec"]["ports"]} == {settings.port, settings.grpc_port}
    assert service["spec"]["selector"].items() <= gateway["template"]["metadata"]["labels"].items()


def test_ray_is_the_version_that_the_extra_installs() -> None:
    version = cluster()["spec"]["rayVersion"]
    assert f"ray[data,serve]=={version}" in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
