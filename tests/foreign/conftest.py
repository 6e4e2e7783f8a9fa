"""The system that clients of other makes are tried on, and the environments that they are installed in."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from knnlm import build, read_documents, train_memory
from knnlm.datastore.updates.revise import with_tuning
from knnlm.lm.distillation import DistilSettings
from tests.cli.test_serve import serving
from tests.reference import POCKET, ROOT, TUNING

ENVIRONMENT = ROOT / ".venv-clients"
PROMPT, TOKENS = "Every setting of a", 24  # as in docs/clients.md
# nothing is looked for in the network
OFFLINE = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}


@dataclass
class Served:
    """A running system. text: what the prompt of docs/clients.md goes on with, greedily."""

    url: str
    folder: Path
    text: str

    def run(self, *command: object, folder: Path | None = None, **environment: str) -> str:
        """What the command prints; it must succeed. It finds the programs of .venv-clients first."""
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("KNNLM_", "OPENAI_"))}
        path = f"{ENVIRONMENT / 'bin'}{os.pathsep}{kept['PATH']}"
        caches = {"HF_HOME": str(self.folder / "hf"), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [str(word) for word in command], capture_output=True, text=True, timeout=300, check=False,
            cwd=folder or self.folder, env={**kept, **OFFLINE, **caches, "PATH": path, **environment},
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The pocket LM with the domain manual, as `knnlm serve` serves them."""
    if not (ENVIRONMENT / "bin" / "python").exists():
        pytest.fail("there is no .venv-clients: `make test-clients` makes it")
    folder = tmp_path_factory.mktemp("foreign")
    with_tuning(build(folder / "store", "manual", read_documents([ROOT / "docs" / "api.md"]), str(POCKET)), TUNING)
    settings = DistilSettings(steps=2, beta=0.0, batch_entries=512)
    held_out = read_documents([ROOT / "docs" / "clients.md"])
    train_memory(folder / "store", "manual", held_out, str(POCKET), folder / "facts", settings, device="cpu")
    flags = ("--device", "cpu", "--memory", f"facts={folder / 'facts'}")
    with serving(POCKET, folder / "store", folder, *flags) as running:
        url = running.line(lambda line: line.startswith("ready: ")).split()[1]
        body = {"model": "pocket+manual", "prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
        answer: Any = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        yield Served(url, folder, answer["choices"][0]["text"])


@pytest.fixture(scope="session")
def node(served: Served) -> Path:
    """A folder with openai for node in it."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")
    folder = ENVIRONMENT / "node"
    if not (folder / "node_modules" / "openai").is_dir():
        pytest.skip("npm could not install openai")
    return folder


def last_json(out: str) -> Any:  # Any: JSON
    return json.loads(out.splitlines()[-1])
