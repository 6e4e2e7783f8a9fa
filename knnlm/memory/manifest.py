"""What a folder of targets and what a memory was made from: records that check themselves, as a datastore's manifest.

Targets and memories hold what a version of a datastore said when they were made. They name it by its content, so that
a memory whose domain has moved on since, or has forgotten documents, can be told from one that is up to date.
"""

import hashlib
import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self, TypeVar

from pydantic import AwareDatetime, Field, ValidationError

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.files import write_atomic
from knnlm.datastore.layout import (
    Checksums,
    Count,
    FileName,
    FileRecord,
    Record,
    first_problem,
    require_unchanged,
    shown,
)
from knnlm.datastore.manifest import Manifest, ModelRecord, WindowsRecord
from knnlm.datastore.tuning import AskedOptions
from knnlm.errors import DatastoreCorrupt, KnnlmError
from knnlm.messages import TrainedMemory

TARGETS, MEMORY = "targets.json", "memory.json"
MAX_BYTES: Final = 1 << 20
Exclude = Literal["entry", "document"]
Kind = Literal["decoder", "mlp"]


class StoreRecord(Record):
    """The version of a datastore. content: `Manifest.content`; indexes and tunings may change."""

    domain: str
    version: str
    content: str = Field(pattern="^[0-9a-f]{64}$")
    entries: Count
    documents: Count

    @classmethod
    def of(cls, manifest: Manifest) -> Self:
        live = {"entries": manifest.live_entries, "documents": manifest.live_documents}
        return cls(domain=manifest.domain, version=manifest.version, content=manifest.content, **live)

    def stale(self, catalog: Catalog) -> str | None:
        """Why what was made from this version is not what its domain says now, or why that is not known; None when it
        is."""
        try:
            current = catalog.current(self.domain)
            if current is None:
                return f"stale: domain {self.domain} has no current version"
            now = StoreRecord.of(Manifest.load(catalog.path(self.domain, current)))
        except KnnlmError as err:
            return f"whether it is stale cannot be told: {err.message}"
        if now.content == self.content:
            return None
        counts = f"{self.entries:,} entries of {self.documents:,} documents"
        return (
            f"stale: made from {self.domain} {self.version} ({counts}), which answers from {now.version} now "
            f"({now.entries:,} of {now.documents:,}); what was removed since is not unlearnt"
        )


class Made(Record):
    """What targets and memories have in common. model, key_function: what made the keys. windows: how documents were
    fed to it. files: all beside this one."""

    format_version: Literal[1] = 1
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    store: StoreRecord
    model: ModelRecord
    key_function: str
    windows: WindowsRecord
    files: dict[FileName, FileRecord] = Field(default_factory=dict)


class Shape(Record):
    """Means over distributions of p_kNN. entropy: nats. largest: probability of the likeliest token. support: tokens
    with any probability. of_value: probability of the token that came."""

    entropy: float
    largest: float
    support: float
    of_value: float


class TargetSettings(Record):
    """What fixes the targets of a version. exclude: what does not count among the neighbors of an entry: itself alone,
    or its whole document. temperature, k: of p_kNN. top: tokens kept of each distribution. search: how the index was
    asked; distances are those to the stored keys whatever it is. max_entries: those of documents drawn at random until
    they have as many; None for all."""

    store: StoreRecord
    exclude: Exclude
    k: int = Field(ge=1, lt=1 << 31)
    temperature: float = Field(gt=0)
    top: int = Field(ge=1, le=1 << 16)
    index: str
    search: AskedOptions = Field(default_factory=dict)
    part_entries: int = Field(ge=1, lt=1 << 31)
    max_entries: int | None = Field(None, ge=1)


class FitRecord(Record):
    """How temperature and k were fitted: on `tokens` of documents of the store, each without its own document; with
    the LM they came to these perplexities at `lmbda`. shape: of p_kNN there, as new text would find it."""

    tokens: Count
    documents: Count
    lmbda: float
    lm_perplexity: float
    knn_perplexity: float
    shape: Shape


class Begun(Record):
    """What a run that makes targets was begun with. fit: None where temperature and k were given."""

    settings: TargetSettings
    fit: FitRecord | None = None


class TargetsManifest(Made):
    """targets.json. rows: entries with a distribution. empty: those that had no neighbor left, and are trained on their
    value alone. kept: mean mass of the tokens kept, before they were made to sum to one. shape: of all distributions,
    whole. fit: see Begun."""

    settings: TargetSettings
    rows: Count
    empty: Count
    masses: Count
    kept: float
    shape: Shape
    fit: FitRecord | None = None

    @property
    def entries(self) -> int:
        """Entries that are learnt from."""
        return self.rows + self.empty

    @property
    def too_sharp(self) -> bool:
        """Whether the teacher knows the rest of its documents: its distributions are sharper on the store than new
        text would find them, by more than a fifth."""
        return self.fit is not None and self.shape.largest > 1.2 * self.fit.shape.largest


class TargetsUsed(Record):
    """The targets a memory was trained on. sha256: of their targets.json."""

    sha256: str
    settings: TargetSettings
    kept: float
    empty: Count


class StartRecord(Record):
    """What a memory was before its training: a model with these weights, None where they were drawn at random; and the
    sizes of an MLP."""

    model_id: str | None = None
    weights_sha256: str | None = None
    sizes: dict[str, int] = Field(default_factory=dict)


class TuneRecord(Record):
    """Losses by which the weights were chosen, those after `step` steps: in nats per token of documents that are not in
    the store, of the LM alone, the memory alone (as it is stored), and the mixture where the memory weighs `lmbda`."""

    documents: Count
    tokens: Count
    step: Count
    lm_loss: float
    memory_loss: float
    mixture_loss: float
    lmbda: float = Field(ge=0, le=1)


class MemoryManifest(Made):
    """memory.json. kind: "decoder", a model folder like any other, or "mlp", which reads the keys of the model with
    `key_fingerprint` (ModelInfo.fingerprint). vocab_size: width of its logits. training: the settings of
    knnlm.lm.distillation.DistilSettings. targets: None where beta is 0. train_loss, excess: of the last steps before
    the chosen one, and how far that is above what any model could reach."""

    kind: Kind
    key_fingerprint: str
    vocab_size: int = Field(ge=1, lt=1 << 31)
    parameters: Count
    start: StartRecord
    training: dict[str, int | float]
    targets: TargetsUsed | None
    tune: TuneRecord
    train_loss: float
    excess: float
    seconds: float

    @property
    def beta(self) -> float:
        return float(self.training["beta"])

    @property
    def trained(self) -> TrainedMemory:
        """What its users know of it."""
        store = self.store
        return TrainedMemory(store.domain, store.version, store.content, store.entries, self.beta, self.tune.lmbda)

    @classmethod
    def open(cls, folder: Path, *, check: Checksums = "none") -> Self:
        """The memory in a folder. Raises DatastoreCorrupt for what is none, or was changed since it was trained."""
        found = load(cls, folder / MEMORY)
        require_files(found, folder, check)
        return found


RecordType = TypeVar("RecordType", bound=Record)


def save(record: Record, file: Path) -> None:
    """Write a record as JSON with its checksum, atomically."""
    fields = record.model_dump(mode="json")
    write_atomic(file, (json.dumps({**fields, "checksum": _digest(fields)}, indent=2) + "\n").encode())


def load(kind: type[RecordType], file: Path) -> RecordType:
    """What `save` wrote. Raises DatastoreCorrupt, with the path, for anything else."""
    try:
        if file.stat().st_size > MAX_BYTES:
            raise DatastoreCorrupt(f"{file} has {file.stat().st_size} bytes, expected at most {MAX_BYTES}")
        fields = json.loads(file.read_bytes())
    except OSError as err:
        raise DatastoreCorrupt(f"{file} cannot be read: {err.strerror}") from err
    except (ValueError, RecursionError) as err:
        raise DatastoreCorrupt(f"{file} is not JSON: {err}") from err
    if not isinstance(fields, dict):
        raise DatastoreCorrupt(f"{file} holds {type(fields).__name__}, expected an object")
    stored, expected = fields.pop("checksum", None), _digest(fields)
    if stored != expected:
        raise DatastoreCorrupt(f"{file} was changed: its content has checksum {expected}, it says {shown(stored)}")
    try:
        return kind.model_validate_json(json.dumps(fields))
    except ValidationError as err:
        raise DatastoreCorrupt(f"{file} is not what this program writes: {first_problem(err)}") from err


def require_files(made: Made, folder: Path, check: Checksums) -> None:
    """Raises DatastoreCorrupt where a file is missing or has another size; `check` as in layout.require_unchanged."""
    for name, record in made.files.items():
        file = folder / name
        size = file.stat().st_size if file.is_file() else None
        if size != record.bytes:
            found = "is missing" if size is None else f"has {size} bytes"
            raise DatastoreCorrupt(f"{file} {found}, expected {record.bytes} bytes")
    require_unchanged(folder, made.files, check)


def _digest(fields: Mapping[str, Any]) -> str:  # Any: JSON
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
