"""Who loads what: importing has no weight, and no service carries the weight of another."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import knnlm

HEAVY = ("torch", "transformers", "faiss", "grpc", "fastapi", "pyarrow", "matplotlib")


ROOT = Path(__file__).resolve().parent.parent


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


@pytest.mark.parametrize("name", knnlm.__all__)
def test_every_public_name_is_there_and_listed(name: str) -> None:
    public = getattr(knnlm, name)
    assert name in dir(knnlm)
    home = public.__module__ if hasattr(public, "__module__") else public.__name__
    assert home.startswith("knnlm.")
    assert public is (import_module(home) if name == "errors" else getattr(import_module(home), name))


def test_type_checkers_and_programs_see_the_same_public_names() -> None:
    tree = ast.parse((ROOT / "knnlm" / "__init__.py").read_text(encoding="utf-8"))
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in guarded.body if isinstance(node, ast.ImportFrom)]
    seen = {alias.name: node.module for node in imports for alias in node.names}
    assert seen == {"errors": "knnlm", **{name: f"knnlm.{module}" for name, module in knnlm._MODULES.items()}}
    assert sorted(seen) == sorted(knnlm.__all__)


def test_an_unknown_name_is_an_ordinary_error() -> None:
    with pytest.raises(AttributeError, match="module 'knnlm' has no attribute 'Pipelines'"):
        _ = knnlm.Pipelines  # type: ignore[attr-defined]  # so it is for type checkers
