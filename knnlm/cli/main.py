"""The `knnlm` command: the table of its sub-commands, and how errors end it.

This is the process edge: an error that the project raises on purpose becomes one sentence and an exit code, anything
else is a bug and keeps its traceback. Importing this loads no model code, so that `knnlm --help` is quick.
"""

import sys
from collections.abc import Sequence
from functools import cache
from typing import Annotated, Any

import typer
from typer.main import get_command

from knnlm import __version__
from knnlm.cli.add import add
from knnlm.cli.build import build
from knnlm.cli.cluster_serving import cluster
from knnlm.cli.compact import compact
from knnlm.cli.domains import domains
from knnlm.cli.evaluate import evaluate
from knnlm.cli.explain import explain
from knnlm.cli.forget import forget
from knnlm.cli.generate import generate
from knnlm.cli.index import index
from knnlm.cli.memory import memory
from knnlm.cli.next_token import next_token
from knnlm.cli.score import score
from knnlm.cli.serve import serve
from knnlm.cli.show import show
from knnlm.cli.train import train
from knnlm.cli.tune import tune
from knnlm.cli.verify import verify
from knnlm.cli.weigh import weigh
from knnlm.errors import InvalidRequest, KnnlmError

OK, FAILED, USAGE, INTERRUPTED = 0, 1, 2, 130
EXTRAS = {
    "torch": "lm", "transformers": "lm", "safetensors": "lm", "faiss": "index",
    "llvmlite": "index", "numba": "index", "pyarrow": "parquet", "rich": "cli", "grpc": "clients",
    "google": "clients", "httpx": "clients", "fastapi": "serve", "ray": "cluster",
}  # fmt: skip

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Exit codes: 0 done; 1 failed (not found, conflict, corrupt, ...); 2 wrong usage or value; 130 interrupted.",
)
app.command()(train)
app.command()(build)
app.command()(add)
app.command()(forget)
app.command()(compact)
app.add_typer(cluster, name="cluster")
app.add_typer(index, name="index")
app.command()(show)
app.command()(verify)
app.command()(tune)
app.command()(weigh)
app.command("eval")(evaluate)
app.add_typer(memory, name="memory")
app.add_typer(domains, name="domains")
app.command("next")(next_token)
app.command()(score)
app.command()(explain)
app.command()(generate)
app.command()(serve)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"knnlm {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Nearest-neighbour language models: train, build datastores, tune, evaluate, ask, serve."""


@cache
def _command() -> Any:
    """All commands, made from their signatures; Any: of a class that typer keeps to itself."""
    return get_command(app)


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; see the epilog of `knnlm --help`."""
    try:
        code = _command()(args=list(arguments), prog_name="knnlm", standalone_mode=False)
    except typer.TyperException as err:  # what the command line itself gets wrong
        return _fail(err.format_message(), err.exit_code)
    except InvalidRequest as err:
        return _fail(err.message, USAGE)
    except KnnlmError as err:
        return _fail(err.message, FAILED)
    except ModuleNotFoundError as err:
        package = (err.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        return _fail(f"this command needs {package}: pip install 'knnlm[{EXTRAS[package]}]'", FAILED)
    except OSError as err:
        return _fail(f"{err.filename}: {err.strerror}" if err.filename else str(err), FAILED)
    return code if isinstance(code, int) else OK


def main() -> None:
    code = run(sys.argv[1:])
    if code == INTERRUPTED:
        print("interrupted", file=sys.stderr)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
