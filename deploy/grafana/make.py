"""The Grafana dashboard of the three services: `python deploy/grafana/make.py` writes knnlm.json beside this file.

Grafana's JSON repeats much for every panel; here a panel is one line: a title, its unit, and what is drawn. The metrics
are explained in docs/operations.md.
"""

import json
from pathlib import Path
from typing import Any

Panel = tuple[str, str, list[tuple[str, str]]]  # title, unit, [(query, legend)]

RATE = "[$__rate_interval]"


def quantiles(metric: str, by: str = "") -> list[tuple[str, str]]:
    """The median, the 95th and the 99th percentile of a histogram; by: a label that is kept, too."""
    labels, legend = (f"le, {by}", f" {{{{{by}}}}}") if by else ("le", "")
    return [
        (f'histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket{{job=~"$job"}}{RATE})))', f"p{name}{legend}")
        for q, name in ((0.5, "50"), (0.95, "95"), (0.99, "99"))
    ]


def rate(metric: str, by: str, where: str = "") -> list[tuple[str, str]]:
    chosen = 'job=~"$job"' + (f", {where}" if where else "")
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return [(f"sum by ({by}) (rate({metric}{{{chosen}}}{RATE}))", legend)]


def value(metric: str, by: str) -> list[tuple[str, str]]:
    legend = " ".join(f"{{{{{label.strip()}}}}}" for label in by.split(","))
    return [(f'sum by ({by}) ({metric}{{job=~"$job"}})', legend)]


ROWS: list[tuple[str, list[Panel]]] = [
    (
        "Requests",
        [
            ("Requests by status", "reqps", rate("knnlm_requests_total", "job, code")),
            ("Latency", "s", quantiles("knnlm_request_duration_seconds", "job")),
            ("Refused and dropped", "reqps", rate("knnlm_rejected_total", "job, reason")),
            ("In work", "short", value("knnlm_inflight_requests", "job, instance")),
            ("Still arriving", "short", value("knnlm_receiving_requests", "job, instance")),
            ("Bytes of requests in work", "bytes", value("knnlm_inflight_bytes", "job, instance")),
        ],
    ),
    (
        "Queues and batches",
        [
            ("Rows or tokens held", "short", value("knnlm_queue_items", "job, instance")),
            ("Time in the queue", "s", quantiles("knnlm_queue_wait_seconds", "job")),
            ("Batch size", "short", quantiles("knnlm_batch_rows", "job")),
            ("Time in the model per batch", "s", quantiles("knnlm_lm_forward_seconds")),
        ],
    ),
    (
        "Retrieval",
        [
            ("Queries searched", "ops", rate("knnlm_search_queries_total", "domain")),
            ("Time in the index per batch", "s", quantiles("knnlm_search_seconds", "domain")),
            ("Entries served", "short", value("knnlm_domain_entries", "domain, version, instance")),
            ("Memory of domains", "bytes", value("knnlm_domain_memory_bytes", "domain, part, place")),
            ("Replicas of shards", "short", value("knnlm_shard_replicas", "domain, shard, instance")),
            ("Versions opened", "ops", rate("knnlm_domain_loads_total", "domain, result")),
            ("Time to open a version", "s", quantiles("knnlm_domain_load_seconds", "domain")),
            ("Documents added and removed", "ops", rate("knnlm_documents_changed_total", "domain, change")),
            ("Tokens through the model", "ops", rate("knnlm_lm_tokens_total", "kind")),
            ("Tokens of prefixes", "ops", rate("knnlm_lm_prefix_tokens_total", "kind")),
            ("Memory of prefixes", "bytes", value("knnlm_lm_prefix_bytes", "job, instance")),
        ],
    ),
    (
        "Text",
        [
            ("Tokens generated", "ops", [(f"sum(rate(knnlm_generated_tokens_total{RATE}))", "tokens")]),
            ("Time to the first token", "s", quantiles("knnlm_time_to_first_token_seconds")),
            ("Time from token to token", "s", quantiles("knnlm_inter_token_latency_seconds")),
            ("Contexts in a round", "short", quantiles("knnlm_round_contexts")),
            ("Time of a round", "s", quantiles("knnlm_round_seconds")),
        ],
    ),
    (
        "Between the services",
        [
            ("Time of calls", "s", quantiles("knnlm_upstream_seconds", "service")),
            ("Calls by code", "ops", rate("knnlm_upstream_seconds_count", "service, code")),
            ("Replicas", "short", value("knnlm_upstream_replicas", "service, state")),
            ("Retries", "ops", rate("knnlm_upstream_retries_total", "service")),
            ("Answers without retrieval", "ops", [(f"sum(rate(knnlm_knn_degraded_total{RATE}))", "degraded")]),
            (
                "Searches skipped",
                "ops",
                [(f"sum(rate(knnlm_aggregator_searches_skipped_total{RATE}))", "skipped")],
            ),
        ],
    ),
    (
        "Processes",
        [
            ("Resident memory", "bytes", value("process_resident_memory_bytes", "job, instance")),
            ("Processor", "percentunit", rate("process_cpu_seconds_total", "job, instance")),
            ("Open files", "short", value("process_open_fds", "job, instance")),
            ("Versions running", "short", value("knnlm_build_info", "service, version")),
        ],
    ),
]


def dashboard() -> dict[str, Any]:
    """The whole, as Grafana reads it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        panels.append(_panel(len(panels) + 1, title, "row", 0, y, 24, 1))
        y += 1
        for number, (name, unit, queries) in enumerate(row):
            panel = _panel(len(panels) + 1, name, "timeseries", 12 * (number % 2), y, 12, 8)
            panel["datasource"] = {"type": "prometheus", "uid": "${datasource}"}
            panel["fieldConfig"] = {"defaults": {"unit": unit, "min": 0}, "overrides": []}
            panel["targets"] = [
                {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend}
                for i, (query, legend) in enumerate(queries)
            ]
            panels.append(panel)
            y += 8 * (number % 2)
        y += 8 * (len(row) % 2)
    return {
        "uid": "knnlm",
        "title": "knnlm",
        "tags": ["knnlm"],
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [_datasource(), _jobs()]},
        "panels": panels,
    }


def _panel(number: int, title: str, kind: str, x: int, y: int, width: int, height: int) -> dict[str, Any]:
    return {"id": number, "title": title, "type": kind, "gridPos": {"x": x, "y": y, "w": width, "h": height}}


def _datasource() -> dict[str, Any]:
    return {"name": "datasource", "type": "datasource", "query": "prometheus", "label": "Data source"}


def _jobs() -> dict[str, Any]:
    return {
        "name": "job",
        "type": "query",
        "label": "Service",
        "datasource": {"type": "prometheus", "uid": "${datasource}"},
        "query": "label_values(knnlm_build_info, job)",
        "refresh": 2,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": "All", "value": "$__all"},
    }


def serialized() -> str:
    return json.dumps(dashboard(), indent=1) + "\n"


if __name__ == "__main__":
    Path(__file__).with_name("knnlm.json").write_text(serialized(), encoding="utf-8")
