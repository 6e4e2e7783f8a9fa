"""What README and docs/clients.md tell people to run, runs; and README's tree names what is there."""

import asyncio
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from runpy import run_path

import pytest

from knnlm.cli.main import run as knnlm
from knnlm.datastore.updates.revise import with_tuning
from knnlm.testing import toy_datastore
from tests.contract.system import TUNING, system

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TEXT_CHARACTERS = 6_000  # characters kept of each document: the model reads them in seconds


def blocks(language: str, page: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder that looks like a fresh clone with shorter texts, in which blocks may write."""
    (tmp_path / "models").symlink_to(ROOT / "models")
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/api.md"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8")[:TEXT_CHARACTERS], encoding="utf-8")
    return tmp_path


def run(command: list[str], folder: Path, **environment: str) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    env = {**kept, "PATH": path, **environment}
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_python_block_runs_and_retrieval_helps(
    checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has loaded torch."""
    (block,) = (block for block in blocks("python") if "knnlm.build(" in block)
    (checkout / "program.py").write_text(block, encoding="utf-8")
    monkeypatch.chdir(checkout)
    run_path("program.py", run_name="__main__")
    perplexities = [float(word) for word in capsys.readouterr().out.split()[-2:]]
    assert perplexities[1] < perplexities[0]


async def test_programs_with_a_client_run(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    programs = [*blocks("python"), *blocks("python", page)]
    with_tuning(toy_datastore(tmp_path, domain="manual"), TUNING)
    async with system(tmp_path) as s:
        url = f"http://127.0.0.1:{s.hosts['aggregator'].port}"
        for program in programs:
            if "knnlm.Client(" in program or "knnlm.AsyncClient(" in program:
                program = program.replace("http://127.0.0.1:8000", url).replace("pocket+", "toy+")
                out = await asyncio.to_thread(run, [sys.executable, "-c", program], tmp_path, KNNLM_URL=url)
                assert re.search(r"\d\.\d", out)


def test_the_commands_run(checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The last as a shell starts it; those before it in this process, which has loaded torch."""
    monkeypatch.chdir(checkout)
    *commands, last = [line for block in blocks("sh") for line in block.splitlines()]
    assert all(command.startswith("knnlm ") for command in (*commands, last))
    for command in commands:
        assert knnlm(shlex.split(command)[1:]) == 0, capsys.readouterr().err
    assert "kNN-LM" in capsys.readouterr().out
    run(["bash", "-euc", last], checkout)
    assert (checkout / "build" / "explained.html").exists()


def test_every_folder_and_module_of_the_tree_exists() -> None:
    tree = re.search(r"## The tree\n\n```\n(.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    parent = Path()
    for line in tree[1].splitlines():
        indented = line.startswith("  ")
        names = re.findall(r"(?:^|(?<=\s))([a-z0-9_./]+(?:/|\.py))(?=\s|$)", line)
        for name in names if indented else names[:1]:
            if not indented:
                parent = Path(name)
            path = ROOT / (parent / name if indented else name)
            assert path.exists(), f"README's tree has {name}, which is not there"


def test_every_package_is_in_the_tree() -> None:
    for folder in [*(ROOT / "knnlm").iterdir(), *(ROOT / "services").iterdir()]:
        if folder.is_dir() and (folder / "__init__.py").exists():
            assert f"{folder.name}/" in README, f"{folder.name} is not in README's tree"
