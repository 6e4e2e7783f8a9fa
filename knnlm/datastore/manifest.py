"""manifest.json: what a version of a datastore is, and the checksum of every byte in it.

The manifest is written last and checks itself: a version without a valid one does not exist. Only tuning and index may
change after publication. The file must be, byte for byte, what this module writes; so that no change goes unnoticed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from knnlm.datastore.files import locked, write_atomic
from knnlm.datastore.layout import MANIFEST
from knnlm.errors import DatastoreCorrupt, DatastoreIncomplete, InvalidRequest
from knnlm.messages import ModelInfo, Tuning

__all__ = ["FORMAT_VERSION", "FileRecord", "IndexRecord", "Manifest", "ModelRecord", "TuningRecord", "WindowsRecord",
           "with_index", "with_tuning"]  # fmt: skip

FORMAT_VERSION: Final = 1

KeyDtype = Literal["float16", "float32"]
FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]


class Record(BaseModel):
    """Immutable, and nothing is accepted that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class ModelRecord(Record):
    """What made the keys. Another model's keys, or another tokenizer's tokens, mean nothing here."""

    model_id: str
    architecture: str
    weights_sha256: str
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1)

    @classmethod
    def of(cls, info: ModelInfo) -> Self:
        return cls(
            model_id=info.model_id,
            architecture=info.architecture,
            weights_sha256=info.weights_sha256,
            tokenizer_sha256=info.tokenizer_sha256,
            vocab_size=info.vocab_size,
        )


class WindowsRecord(Record):
    """How documents were cut: at most context_length tokens are fed, every key sees at least min_context of them."""

    context_length: int = Field(ge=2)
    min_context: int = Field(ge=1)


class IndexRecord(Record):
    """The search structure. file: None when it is made from the keys on loading. parameters: defaults of a search."""

    recipe: str
    file: str | None = None
    parameters: dict[str, int | float] = Field(default_factory=dict)


class FileRecord(Record):
    bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class TuningRecord(Record):
    """messages.Tuning, as it is stored."""

    temperature: float = Field(gt=0)
    lmbda: float = Field(ge=0, le=1)
    k: int = Field(ge=1)
    lm_perplexity: float
    knn_perplexity: float
    tokens: int = Field(ge=0)
    documents: int = Field(ge=0)

    @classmethod
    def of(cls, tuning: Tuning) -> Self:
        """Raises InvalidRequest when a number is not finite or out of its range."""
        try:
            return cls.model_validate(tuning, from_attributes=True)
        except ValidationError as err:
            raise InvalidRequest(f"not a usable tuning: {_first(err)}", param="tuning") from err

    def message(self) -> Tuning:
        return Tuning(**self.model_dump())


class Manifest(Record):
    """One version of one domain. `checksum` is the sha256 of the canonical JSON of everything else."""

    format_version: Literal[1] = FORMAT_VERSION
    domain: str
    version: str
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    model: ModelRecord
    key_function: str
    windows: WindowsRecord
    key_dim: int = Field(ge=1)
    key_dtype: KeyDtype
    entries: int = Field(ge=0)
    documents: int = Field(ge=0)
    tokens: int = Field(ge=0)
    index: IndexRecord = IndexRecord(recipe="flat")
    files: dict[FileName, FileRecord]
    tuning: TuningRecord | None = None

    @model_validator(mode="after")
    def _index_is_listed(self) -> Self:
        if self.index.file is not None and self.index.file not in self.files:
            raise ValueError(f"index file {self.index.file} is not among files")
        return self

    @classmethod
    def load(cls, path: Path) -> Self:
        """The manifest of the version in folder `path`.

        Raises DatastoreIncomplete for a build that has not been published, and DatastoreCorrupt, with the path and
        what was expected, for everything else that is not a manifest of this format version, unchanged.
        """
        if path.name.startswith("."):
            raise DatastoreIncomplete(f"{path} is not published: a build that has not finished, or a version removed")
        file = path / MANIFEST
        try:
            data = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as err:
            raise DatastoreCorrupt(f"{file} is missing: expected the manifest of a datastore version") from err
        except OSError as err:
            raise DatastoreCorrupt(f"{file} cannot be read: {err.strerror}") from err
        try:
            fields = json.loads(data)
        except ValueError as err:  # of JSON or of UTF-8
            raise DatastoreCorrupt(f"{file} is not JSON: {err}") from err
        if not isinstance(fields, dict):
            raise DatastoreCorrupt(f"{file} holds {type(fields).__name__}, expected an object")
        if fields.get("format_version") != FORMAT_VERSION:
            raise DatastoreCorrupt(
                f"{file} has format version {fields.get('format_version')!r}, this program reads {FORMAT_VERSION}"
            )
        stored, expected = fields.pop("checksum", None), _checksum(fields)
        if stored != expected:
            raise DatastoreCorrupt(f"{file} was changed: its content has checksum {expected}, it says {stored!r}")
        try:
            manifest = cls.model_validate_json(json.dumps(fields))
        except ValidationError as err:
            raise DatastoreCorrupt(f"{file} is not a manifest: {_first(err)}") from err
        if data != manifest.serialized():
            raise DatastoreCorrupt(f"{file} was changed: expected exactly the bytes that were written")
        return manifest

    def save(self, path: Path) -> None:
        """Write into folder `path`, atomically and durably."""
        write_atomic(path / MANIFEST, self.serialized())

    def serialized(self) -> bytes:
        fields = self.model_dump(mode="json")
        return (json.dumps({**fields, "checksum": _checksum(fields)}, indent=2) + "\n").encode()


def with_tuning(path: Path, tuning: Tuning) -> Manifest:
    """Store what was fitted for the version in folder `path`. Raises InvalidRequest for numbers out of range."""
    record = TuningRecord.of(tuning)
    return _rewrite(path, lambda old: old.model_copy(update={"tuning": record}))


def with_index(path: Path, index: IndexRecord, files: Mapping[str, FileRecord]) -> Manifest:
    """Make `index`, whose `files` lie in folder `path` already, the index of the version, in place of the former."""

    def change(old: Manifest) -> Manifest:
        kept = {name: record for name, record in old.files.items() if name != old.index.file}
        return old.model_copy(update={"index": index, "files": {**kept, **files}})

    return _rewrite(path, change)


def _rewrite(path: Path, change: Callable[[Manifest], Manifest]) -> Manifest:
    Manifest.load(path)  # for the better error: the folder may not exist
    with locked(path, wait=True, doing="changing the manifest"):
        new = change(Manifest.load(path))
        new.save(path)
    return new


def _checksum(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _first(err: ValidationError) -> str:
    problem = err.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{where}: {problem['msg']}, got {problem['input']!r}"
