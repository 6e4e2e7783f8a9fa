"""What a cluster is to build, and with whom."""

from dataclasses import dataclass

from knnlm.cluster.connection import LOCAL
from knnlm.cluster.objects import below, located
from knnlm.cluster.worker import ModelSource
from knnlm.datastore.build import check_sizes
from knnlm.datastore.manifest import FLAT
from knnlm.errors import InvalidRequest
from knnlm.evaluation.splits import Part

PART_ENTRIES = 16_384


@dataclass(frozen=True)
class Workers:
    """The workers of a build. address: of the cluster, "local" for one in this process. count: how many hold the model,
    None = one for each GPU, where there is none for each `cpus` processors. processors: that a cluster in this process
    says it has, None = as many as there are."""

    address: str = LOCAL
    count: int | None = None
    cpus: int = 2
    processors: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be built, as `knnlm.datastore.build.build` takes it; index: auto, a recipe, or flat. shards or
    shard_bytes: how many, or how large at most, by their keys and values. parts_at: the URL of a folder that holds keys
    until they are in shards, None = the build's own."""

    model: ModelSource
    version: str | None = None
    part: Part = Part.ALL
    context_length: int | None = None
    min_context: int | None = None
    bos: str = "document"
    key_dtype: str = "float16"
    batch_tokens: int = 8192
    part_entries: int = PART_ENTRIES
    index: str = "auto"
    seed: int = 0
    shards: int | None = None
    shard_bytes: int | None = None
    parts_at: str | None = None

    def parts_of(self, domain: str, version: str) -> str | None:
        """The URL of the folder that holds the parts of a version and nothing else, None = the build's own."""
        return None if self.parts_at is None else below(self.parts_at, f"{domain}/{version}.parts")


def check(wanted: Plan, workers: Workers) -> None:
    """Refuse what can be refused before any work: raises InvalidRequest, naming the parameter."""
    check_sizes(batch_tokens=wanted.batch_tokens, part_entries=wanted.part_entries, worker_cpus=workers.cpus)
    for name, value in (
        ("shards", wanted.shards), ("shard_bytes", wanted.shard_bytes), ("workers", workers.count)
    ):  # fmt: skip
        if value is not None:
            check_sizes(**{name: value})
    if wanted.shards is not None and wanted.shard_bytes is not None:
        raise InvalidRequest("expected either shards or shard_bytes, not both", param="shards")
    if wanted.parts_at is not None:
        located(wanted.parts_at, "parts_at")
    if wanted.index not in ("auto", FLAT):
        from knnlm.index.table import family

        family(wanted.index)
