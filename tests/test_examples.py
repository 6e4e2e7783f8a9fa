"""The notebook runs, in the small and without Jupyter, and uses public names alone."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import knnlm

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "examples" / "first-steps.ipynb"


def code() -> list[str]:
    """The cells of code."""
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.slow
def test_the_notebook_runs_and_retrieval_helps_in_it() -> None:
    environment = {**os.environ, "DOCUMENTS": "15", "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code())], cwd=NOTEBOOK.parent, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    *_, last = done.stdout.splitlines()
    by_lambda, by_k = (ast.literal_eval(part) for part in last.replace("} {", "}|{").split("|"))
    assert min(by_lambda.values()) < by_lambda[0.0]
    assert set(by_k) == {1, 4, 16, 64}


def test_the_notebook_uses_public_names_and_has_no_outputs() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    assert all(not cell.get("outputs") and cell.get("execution_count") is None for cell in cells)
    tree = ast.parse("\n".join(code()))
    used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "knnlm"}
    assert used <= set(knnlm.__all__)
    assert len(used) >= 6
    modules = {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert not any((module or "").startswith("knnlm") for module in modules)
