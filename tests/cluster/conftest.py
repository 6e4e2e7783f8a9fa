"""A Ray cluster of several nodes on this machine, each with processes of its own: a head, and nodes that can be killed.

Every test here has the marker `cluster`. Ray is imported by fixtures alone, so that the files can be read without it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
STORE_BYTES = 100 << 20  # of each node's object store
# a cluster on loopback addresses, and nothing that is sent anywhere
ENVIRONMENT = {
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.5",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
    "RAY_worker_niceness": "0",
    # for the server that stands for an object store
    "AWS_ACCESS_KEY_ID": "key",
    "AWS_SECRET_ACCESS_KEY": "secret",
    "AWS_EC2_METADATA_DISABLED": "true",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("cluster")
            item.add_marker(pytest.mark.filterwarnings("ignore"))  # Ray's own are none of our business


@pytest.fixture(scope="session", autouse=True)
def cluster_environment() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def cluster(cluster_environment: None) -> Iterator[Any]:
    """The head and two nodes of two processors each; `cluster.address` is theirs. Nodes can be added and removed."""
    from ray.cluster_utils import Cluster

    arguments = {"num_cpus": 2, "object_store_memory": STORE_BYTES, "node_ip_address": "127.0.0.1"}
    nodes = Cluster(initialize_head=True, head_node_args={**arguments, "include_dashboard": False})
    try:
        for _ in range(2):
            nodes.add_node(**arguments)
        nodes.wait_for_nodes(60)
        yield nodes
    finally:
        nodes.shutdown()
