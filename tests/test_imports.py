"""Who loads what: importing has no weight, and no service carries the weight of another."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "faiss", "grpc", "fastapi", "pyarrow", "matplotlib")


def loaded(module: str) -> set[str]:
    """Top-level packages in memory after importing a module in a fresh interpreter."""
    code = f"import {module}, sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


@pytest.mark.parametrize("module", ["knnlm", "knnlm.decoding", "knnlm.mixer", "knnlm.testing"])
def test_the_light_half_of_the_library_loads_nothing_heavy(module: str) -> None:
    assert not loaded(module) & set(HEAVY)


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("services.aggregator.app", {"torch", "transformers", "faiss"}),
        ("services.datastore.app", {"torch", "transformers"}),
        ("services.lm.app", {"faiss"}),
    ],
)
def test_no_process_carries_what_it_does_not_run(module: str, absent: set[str]) -> None:
    assert not loaded(module) & absent
