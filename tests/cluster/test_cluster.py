"""The cluster that the other tests here run on is one: processes of several nodes."""

from typing import Any


def test_three_nodes_answer(cluster: Any) -> None:
    import ray

    ray.init(address=cluster.address)
    try:
        assert len([node for node in ray.nodes() if node["Alive"]]) == 3
        number = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(lambda: ray.get_runtime_context().get_node_id())
        assert len(set(ray.get([number.remote() for _ in range(6)]))) > 1
    finally:
        ray.shutdown()
