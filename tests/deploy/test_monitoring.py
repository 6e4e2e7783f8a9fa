"""What deploy/ asks Prometheus for exists: every metric, every label; and every alert is explained."""

import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from runpy import run_path
from typing import Any

import pytest
import yaml

from tests.test_docs import services

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
# given by Prometheus itself, or by its client library on Linux
OF_EVERY_PROCESS = {"up", "process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"}
OF_EVERY_METRIC = {"job", "instance", "le"}
WORDS = {"sum", "by", "rate", "increase", "histogram_quantile", "max", "min", "count", "or", "and", "unless"}


@cache
def known() -> dict[str, set[str]]:
    """Labels of every metric of ours, under each name that Prometheus stores it by."""
    found: dict[str, set[str]] = {}
    for service in services():
        collectors: Any = service.metrics.registry._collector_to_names  # no public way to the labels before a first use
        for collector, names in collectors.items():
            for name in names:
                found[name] = set(getattr(collector, "_labelnames", ()))
    return found


def panels() -> list[Any]:  # JSON
    return list(json.loads((DEPLOY / "grafana" / "knnlm.json").read_text(encoding="utf-8"))["panels"])


def alerts() -> list[Any]:  # YAML
    text = (DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def expressions() -> Iterator[str]:
    for panel in panels():
        yield from (target["expr"] for target in panel.get("targets", ()))
    yield from (alert["expr"] for alert in alerts())


@pytest.mark.parametrize("expression", list(expressions()))
def test_what_is_asked_for_exists(expression: str) -> None:
    metrics = known()
    bare = re.sub(r'"[^"]*"|\[[^\]]*\]', "", expression)
    outside = re.sub(r"\{[^}]*\}|by \([^)]*\)", "", bare)
    names = set(re.findall(r"\b[a-z_][a-z_0-9]*\b", outside)) - WORDS
    assert names, expression
    assert names <= metrics.keys() | OF_EVERY_PROCESS, names - metrics.keys() - OF_EVERY_PROCESS
    labels = {label for group in re.findall(r"by \(([^)]*)\)", bare) for label in re.findall(r"\w+", group)}
    labels |= {label for group in re.findall(r"\{([^}]*)\}", bare) for label in re.findall(r"(\w+)\s*[=!]", group)}
    having = set.union(*(metrics.get(name, set()) for name in names)) | OF_EVERY_METRIC
    assert labels <= having, labels - having
    assert bare.count("(") == bare.count(")")


def test_every_metric_of_ours_is_on_the_dashboard() -> None:
    drawn = " ".join(target["expr"] for panel in panels() for target in panel.get("targets", ()))
    stored = {re.sub(r"_(total|bucket|count|sum|created)$", "", name) for name in known() if name.startswith("knnlm_")}
    missing = {name for name in stored if name not in drawn}
    assert not missing


def test_the_dashboard_is_what_its_program_writes() -> None:
    serialized = run_path(str(DEPLOY / "grafana" / "make.py"))["serialized"]()
    assert (DEPLOY / "grafana" / "knnlm.json").read_text(encoding="utf-8") == serialized


def test_panels_do_not_cover_one_another() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in panels():
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert not cells & taken, panel["title"]
        assert all(x < 24 for x, _ in cells)
        taken |= cells


def test_every_alert_is_explained() -> None:
    text = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    for alert in alerts():
        assert f"`{alert['alert']}`" in text
        assert alert["annotations"]["summary"]


def test_a_memory_is_one_more_lm_service_of_the_compose_file() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
    lm, memory = services["lm"], dict(services["memory"])
    assert memory.pop("profiles") == ["memory"]
    for one in ("environment", "volumes"):  # another folder, and the same key
        assert len(memory[one]) == len(lm[one])
    assert {**memory, "environment": lm["environment"], "volumes": lm["volumes"]} == lm
    mounted = memory["volumes"][0].rsplit(":", 2)[1]
    assert mounted == memory["environment"]["KNNLM_LM_MODEL"]
    assert services["aggregator"]["environment"]["KNNLM_AGGREGATOR_MEMORY"] == "${KNNLM_MEMORY:-}"


def test_prometheus_finds_the_services_of_the_compose_file() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
    scraped = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text(encoding="utf-8"))["scrape_configs"]
    names = [name for job in scraped for name in job["dns_sd_configs"][0]["names"]]
    assert sorted(names) == sorted(compose["services"])
    for job in scraped:
        service = job["job_name"]
        dockerfile = (ROOT / "services" / service / "Dockerfile").read_text(encoding="utf-8")
        assert str(job["dns_sd_configs"][0]["port"]) in re.findall(r"EXPOSE (.*)", dockerfile)[0].split()
