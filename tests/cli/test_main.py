"""How the command starts and how it ends."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from knnlm import __version__
from knnlm.cli import main
from tests.cli.conftest import Knnlm

HEAVY = ("torch", "faiss", "transformers", "pyarrow", "rich", "pydantic", "tokenizers")


def test_importing_the_command_imports_nothing_heavy() -> None:
    code = f"import sys, knnlm.cli.main; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "knnlm.cli.main", "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"knnlm {__version__}\n", "")


def test_help_lists_every_command_and_the_exit_codes(knnlm: Knnlm) -> None:
    answer = knnlm("--help")
    assert answer.code == 0
    for name in ("train", "build", "add", "forget", "compact", "index", "show", "verify", "tune", "eval", "domains",
                 "next", "score", "serve"):  # fmt: skip
        assert f"\n  {name} " in answer.out
    assert "Exit codes: 0 done; 1 failed" in answer.out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["bogus"], 2, "No such command 'bogus'"),
        (["eval"], 2, "Missing argument 'sources'"),
        (["score", "x", "--k", "many"], 2, "Invalid value for '--k'"),
        (["score", "x", "--bogus"], 2, "No such option: --bogus"),
        (["score", "x", "--lambda", "0.3"], 2, "--lambda means nothing without --domain"),
        (["eval", "x", "--combine", "union"], 2, "--combine means nothing without --domain"),
        (["score", "x", "--domain", "toy", "--lambda", "1.5"], 2, "lambda must lie in [0, 1], got 1.5"),
        (["score", "x", "--domain", "toy", "--temperature", "0"], 2, "temperature must be > 0, got 0.0"),
        (["score", "x", "--domain", "toy", "--combine", "magic"], 2, "combine must be mixture or union"),
        (["score", "x", "--device", "tpu"], 2, "device must be auto, cpu, cuda or cuda:N, got 'tpu'"),
        (["score", ""], 2, "the text is empty"),
        (["next", "x", "--top", "-1"], 2, "--top must be at least 0, got -1"),
        (["show", "toy", "--around", "0"], 2, "--around must be at least 1"),
        (["show", "toy", "--entry", "1000000000"], 2, "no entry 1000000000"),
        (["eval", "/nowhere.txt"], 2, "no such file or folder: /nowhere.txt"),
        (["tune", "toy", "/nowhere.txt"], 2, "no such file or folder"),
        (["build", "Bad Name", "x"], 2, "domain 'Bad Name' is not a name"),
        (["build", "toy", "x", "--part", "half"], 2, "part must be one of all, store, tune, report, got 'half'"),
        (["build", "toy", "x", "--index", "magic"], 2, "unknown index recipe 'magic'"),
        (["index", "build", "toy", "--recipe", "magic"], 2, "unknown index recipe 'magic'"),
        (["verify"], 2, "expected either a domain or --all"),
        (["verify", "toy", "--all"], 2, "expected either a domain or --all"),
        (["score", "x", "--domain", "law"], 1, "unknown domain 'law'"),
        (["show", "toy", "--version", "v9"], 1, "has no version 'v9'; it has v1"),
        (["domains", "remove", "toy", "v1"], 1, "version v1 of domain toy is current"),
        (["score", "x", "--model", "/nowhere"], 1, "no model folder at '/nowhere'"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("store")
def test_errors_are_one_sentence_and_an_exit_code(knnlm: Knnlm, arguments: list[str], code: int, message: str) -> None:
    answer = knnlm(*arguments)
    assert (answer.code, answer.out) == (code, "")
    assert answer.err.startswith("error: ")
    assert message in answer.err
    assert answer.err.count("\n") == 1


@pytest.mark.usefixtures("store")
def test_a_missing_extra_is_named_with_its_remedy(knnlm: Knnlm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)  # what import does when a package is not there
    monkeypatch.delitem(sys.modules, "knnlm.lm.model", raising=False)
    monkeypatch.delitem(sys.modules, "knnlm.lm.loading", raising=False)
    answer = knnlm("score", "x")
    assert (answer.code, answer.err) == (1, "error: this command needs torch: pip install 'knnlm[lm]'\n")


def test_a_page_that_cannot_be_written_is_an_error(knnlm: Knnlm, store: Path, corpus: Path) -> None:
    answer = knnlm("tune", "toy", corpus, "--part", "tune", "--page", store / "no" / "folder.html")
    assert answer.code == 1
    assert "folder.html: No such file or directory" in answer.err.splitlines()[-1]


def test_what_is_no_error_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**_: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(main, "_command", lambda: broken)
    with pytest.raises(ZeroDivisionError):
        main.run([])


def test_an_interrupted_command_exits_with_130(monkeypatch: pytest.MonkeyPatch) -> None:
    app = typer.Typer()

    @app.command()
    def wait() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(main, "_command", lambda: get_command(app))
    assert main.run([]) == 130
