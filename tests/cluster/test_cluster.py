"""The cluster that the other tests here run on is one: processes of several nodes."""

from typing import Any


def test_tasks_run_on_every_node(cluster: Any) -> None:
    import ray

    ray.init(address=cluster.address)
    try:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 3
        number = ray.remote(num_cpus=1)(lambda: ray.get_runtime_context().get_node_id())
        assert set(ray.get([number.remote() for _ in range(6)])) <= {node["NodeID"] for node in ray.nodes()}
    finally:
        ray.shutdown()
