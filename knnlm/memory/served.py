"""Memories where they are served: what a folder says of the one in it, and MLP memories as sources of a mixture."""

from dataclasses import replace
from pathlib import Path

from knnlm.errors import InvalidRequest
from knnlm.memories import MLP_FILE, KeyMemory
from knnlm.memory.manifest import MEMORY, MemoryManifest
from knnlm.memory.mlp import Mlp
from knnlm.messages import ModelInfo


def with_memory(info: ModelInfo, folder: str | Path) -> ModelInfo:
    """The model with what it was trained on, where the folder it was loaded from is a memory's. Raises
    DatastoreCorrupt for a memory that was changed since it was trained."""
    path = Path(folder)
    if not (path / MEMORY).is_file():
        return info
    return replace(info, memory=MemoryManifest.open(path, check="small").trained)


def open_mlp(folder: str | Path) -> KeyMemory:
    """The MLP memory in a folder. Raises DatastoreCorrupt for what is none, or was changed since it was trained, and
    InvalidRequest for a decoder, which is a model."""
    path = Path(folder)
    manifest = MemoryManifest.open(path, check="small")
    if manifest.kind != "mlp":
        raise InvalidRequest(
            f"{path} is a memory of the kind {manifest.kind}, a model of its own: run `python -m services.lm --model "
            f"{path}` and give its address",
            param="memory",
        )
    return KeyMemory(
        Mlp.load(path),
        path.resolve().name,
        manifest.files[MLP_FILE].sha256[:16],
        manifest.key_fingerprint,
        manifest.trained,
    )
