"""Versions of a datastore with an index file, their bytes damaged, and what may come of searching one.

Used by the long tests of this folder and, with fewer bytes, by the default run
(tests/services/datastore/test_damage.py).
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from knnlm.datastore.verify import verify
from knnlm.errors import DatastoreCorrupt
from knnlm.index.build import build_index
from knnlm.testing import ToyLanguageModel, toy_datastore

__all__ = ["QUERIES", "RECIPES", "copy", "flipped", "found", "indexed", "places", "replaced"]

RECIPES = ("ivf8,sq8", "pca8,ivf8,sq8+fp16", "hnsw8,sq8")
QUERIES = np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)


def indexed(store: Path, recipe: str, *, version: str = "v1", activate: bool = True) -> Path:
    """A small version of domain toy with an index file of this recipe."""
    path = toy_datastore(store, ToyLanguageModel(key_dim=16), version=version, activate=activate)
    assert build_index(path, recipe) == recipe, "the toy is too small for the recipe"
    return path


def places(size: int, most: int) -> Iterator[int]:
    """Bytes of a file to damage: all when they are few, else `most` spread over it, first and last among them."""
    yield from range(size) if size <= most else sorted({int(at) for at in np.linspace(0, size - 1, most)})


def flipped(file: Path, at: int, mask: int = 0xFF) -> Callable[[], None]:
    """Change one byte; the way back is returned. The file is one of its own: nothing else is linked to it."""
    with file.open("r+b") as opened:
        opened.seek(at)
        before = opened.read(1)
        opened.seek(at)
        opened.write(bytes([before[0] ^ mask]))

    def restore() -> None:
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(before)

    return restore


def found(path: Path) -> bool:
    """Whether verifying notices that something is wrong."""
    return any(check.problem is not None for check in verify(path))


def copy(path: Path, version: str) -> Path:
    """The same version beside it under another name: its manifest is written anew, with its own checksum."""
    from knnlm.datastore.manifest import Manifest

    target = path.with_name(version)
    shutil.copytree(path, target)
    manifest = Manifest.load(target)
    manifest.model_copy(update={"version": version}).save(target)
    return target


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def missing(file: Path) -> None:
    file.unlink()


def folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def emptied(file: Path) -> None:
    file.write_bytes(b"")


def longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def looped(file: Path) -> None:
    """A link to itself: opening it is an OSError of another kind."""
    file.unlink()
    file.symlink_to(file.name)


replaced: Sequence[Callable[[Path], None]] = (truncated, missing, folder, emptied, longer, looped)


def refused(open_version: Callable[[], object]) -> str:
    """The message of the refusal, which there must be."""
    try:
        open_version()
    except DatastoreCorrupt as err:
        return err.message
    raise AssertionError("a damaged version was opened")
