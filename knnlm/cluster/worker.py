"""What runs on the nodes of a cluster while a version is built: functions as tasks, and actors that hold the model."""

import socket
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

import knnlm
from knnlm.cluster.parts import Done, Job, PartPlan, UnitTokens, encode_part, tokenize_unit
from knnlm.cluster.sources import SourceFile
from knnlm.datastore.corpus import Sources
from knnlm.datastore.manifest import IndexRecord
from knnlm.errors import DatastoreError, DatastoreMismatch, ModelError
from knnlm.evaluation.splits import Part
from knnlm.messages import ModelInfo, differs
from knnlm.tokenizer import Tokenizer

if TYPE_CHECKING:
    from knnlm.lm.model import LanguageModel


@dataclass(frozen=True)
class ModelSource:
    """The arguments of LanguageModel.load."""

    path_or_id: str
    device: str
    dtype: str
    key_function: str

    def load(self) -> "LanguageModel":
        """The model, without a prefix cache. Raises as LanguageModel.load does."""
        from knnlm.lm.model import LanguageModel

        return LanguageModel.load(
            self.path_or_id, device=self.device, dtype=self.dtype, key_function=self.key_function, prefix_cache_bytes=0
        )


@dataclass(frozen=True)
class Described:
    """What the driver knows of the model, which it never loads."""

    info: ModelInfo
    tokenizer: str
    version: str


def describe(source: ModelSource, folder: Path) -> Described:
    """Load the model, and see whether this node sees `folder`. Raises as LanguageModel.load does; DatastoreError."""
    _require_seen(folder)
    lm = source.load()
    if lm.tokenizer.sha256 != lm.info.tokenizer_sha256:
        raise ModelError(f"the tokenizer of model {lm.info.model_id} is not the one that it says it has")
    return Described(lm.info, lm.tokenizer.json, knnlm.__version__)


class KeyMaker:
    """An actor: the model, and the build that it makes parts of."""

    def __init__(self, source: ModelSource, job: Job) -> None:
        self._source = source
        self._job = job
        self._node = node_name()

    def ready(self) -> str:
        """Load the model and return the node's name. Raises DatastoreMismatch for another model than the one that the
        build began with, DatastoreError where the folder of the build is not seen."""
        _require_seen(self._job.folder)
        self._lm = self._source.load()
        identity = self._job.identity
        made_by = {**identity.model.model_dump(), "key_function": identity.key_function, "key_dim": identity.key_dim}
        name = differs(made_by, self._lm.info)
        if name is not None:
            raise DatastoreMismatch(
                f"on node {self._node} the model has {name} {getattr(self._lm.info, name)}, "
                f"the build was begun with {made_by[name]}",
                param=name,
            )
        self._tokens = UnitTokens(self._job)
        return self._node

    def do(self, planned: PartPlan) -> Done:
        return encode_part(self._lm, self._job, self._tokens, planned, self._node)


def tokenize(
    folder: Path, number: int, files: tuple[SourceFile, ...], part: Part, model: Described, parse_special: bool
) -> Sources:
    """knnlm.cluster.parts.tokenize_unit."""
    tokenizer = Tokenizer(model.tokenizer, bos_token_id=model.info.bos_token_id, eos_token_id=model.info.eos_token_id)
    return tokenize_unit(folder, number, files, part, tokenizer, model.info.vocab_size, parse_special)


def train(folders: list[Path], recipe: str, seed: int, into: Path) -> IndexRecord:
    """knnlm.index.sharded_build.train_shards."""
    from knnlm.index.sharded_build import train_shards

    return train_shards(folders, recipe, seed, into)


def add(folder: Path, trained: Path, index: IndexRecord) -> tuple[IndexRecord, npt.NDArray[np.int64] | None]:
    """knnlm.index.sharded_build.add_shard."""
    from knnlm.index.sharded_build import add_shard

    made = add_shard(folder, trained, index)
    return made.index, made.sizes


def checked(folder: Path) -> list[str]:
    """What is wrong with a shard; every byte of it is read."""
    from knnlm.index.verify import verify

    return [f"{folder.name}/{check.name} {check.problem}" for check in verify(folder) if check.problem is not None]


def node_name() -> str:
    """The machine and, since several nodes may share one, the beginning of the node's id."""
    import ray

    return f"{socket.gethostname()}-{ray.get_runtime_context().get_node_id()[:4]}"


def _require_seen(folder: Path) -> None:
    if not folder.is_dir():
        raise DatastoreError(
            f"node {node_name()} does not see {folder}: every node needs the store at the same path, on a file "
            "system that they share"
        )
