"""What people get who install a wheel: the library, the command and the services, and nothing under a common name."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("knnlm", "services", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The content of a wheel that was built offline from a copy of the sources, unpacked."""
    source = tmp_path_factory.mktemp("source")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*build, "-w", str(out), str(source)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.iterdir()
    folder = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder)
    return folder


def test_a_wheel_has_two_packages_with_names_of_ours_and_all_modules(installed: Path) -> None:
    assert {path.name.partition("-")[0] for path in installed.iterdir()} == {"knnlm", "knnlm_servers"}
    for package, place in (("knnlm", installed), ("services", installed / "knnlm_servers")):
        modules = {path.relative_to(ROOT) for path in (ROOT / package).rglob("*.py")}
        assert modules == {path.relative_to(place) for path in (place / package).rglob("*.py")}
    assert (installed / "knnlm" / "py.typed").exists()
    web = Path("services/aggregator/web")
    shipped = {file.name for file in (installed / "knnlm_servers" / web).iterdir()}
    assert shipped == {file.name for file in (ROOT / web).iterdir()}


def test_serve_starts_the_services_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    """They come as far as reading their settings, one of which is bad."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("KNNLM_")}
    command = [sys.executable, "-m", "knnlm.cli.main", "serve", "--model", "any", "--store", "store"]
    done = subprocess.run(
        [*command, "--lm-port", "0", "--lm-grpc-port", "0", "--datastore-port", "0", "--datastore-grpc-port", "0"],
        env={**kept, "PYTHONPATH": str(installed), "KNNLM_LM_DEVICE": "", "KNNLM_LM_MAX_ROWS": "many"},
        cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "KNNLM_LM_MAX_ROWS" in done.stderr
    asked = "import services.lm, knnlm; print(services.__file__, knnlm.__file__)"
    path = os.pathsep.join((str(installed / "knnlm_servers"), str(installed)))
    files = subprocess.run(
        [sys.executable, "-c", asked], env={**kept, "PYTHONPATH": path}, cwd=tmp_path, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert all(file.startswith(str(installed)) for file in files.stdout.split())
