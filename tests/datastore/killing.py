"""A process of one thread that makes changes in forks of itself, each killed by SIGKILL at a given disk operation.

Run as a program it reads a line of JSON per change, [store, name, operations], and writes how the fork ended. A signal
runs no `finally`, which an exception would: so what a change leaves is what a machine leaves that loses power, but for
what the system had not written yet.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.documents import add, remove
from knnlm.messages import Document, DomainChange
from knnlm.testing import ToyLanguageModel

ROOT = Path(__file__).parents[2]
OPERATIONS = ("fsync", "pwrite", "link", "rename", "replace", "unlink", "mkdir", "rmdir")
ADDED = [Document("a", "the cat sat on the log, and the log sat on the cat. "), Document("1", "another text")]


def adding(store: Path) -> DomainChange:
    catalog = Catalog(store)
    return add(
        ADDED, ToyLanguageModel(), catalog, "toy",
        replace=True, activate=catalog.activate, batch_tokens=64, part_entries=30,
    )  # fmt: skip


def removing(store: Path) -> DomainChange:
    catalog = Catalog(store)
    return remove(["0", "2"], catalog, "toy", activate=catalog.activate)


def compacting(store: Path) -> DomainChange:
    from knnlm.index.compact import compact

    catalog = Catalog(store)
    return compact(catalog, "toy", recipe="ivf4", activate=catalog.activate)


CHANGES: dict[str, Callable[[Path], DomainChange]] = {"add": adding, "remove": removing, "compact": compacting}


class Killer:
    """The process, as the tests see it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.datastore.killing"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process as process:
            process.kill()

    def killed(self, store: Path, name: str, operations: int) -> bool:
        """Make a change that dies before so many disk operations are done. False: it was done before that."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps([str(store), name, operations]), file=self._process.stdin, flush=True)
        code = int(self._process.stdout.readline())
        assert code in (0, -signal.SIGKILL), code
        return code != 0


def _die_at(operations: int) -> None:
    left = operations

    def dying(name: str) -> None:
        original = getattr(os, name)

        def operation(*args: Any, **more: Any) -> Any:  # Any: whatever the original takes
            nonlocal left
            left -= 1
            if left < 0:
                if name == "pwrite":  # in the middle of writing
                    original(args[0], args[1][: len(args[1]) // 2], args[2])
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **more)

        setattr(os, name, operation)

    for name in OPERATIONS:
        dying(name)


def main() -> None:
    for line in sys.stdin:
        store, name, operations = json.loads(line)
        child = os.fork()
        if child == 0:
            _die_at(operations)
            CHANGES[name](Path(store))
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
