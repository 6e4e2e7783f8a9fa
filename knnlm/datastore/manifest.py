"""manifest.json: what a version of a datastore is, and the checksum of every byte in it.

The manifest is written last and checks itself: a version without a valid one does not exist. Only tuning and index may
change after publication. The file must be, byte for byte, what this module writes; so that no change goes unnoticed.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, ValidationError, model_validator

from knnlm.datastore.files import locked, write_atomic
from knnlm.datastore.layout import MANIFEST
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreIncomplete, InvalidRequest
from knnlm.messages import ModelInfo, Tuning

__all__ = ["FORMAT_VERSION", "FileRecord", "IndexRecord", "Manifest", "ModelRecord", "TuningRecord", "WindowsRecord",
           "with_default_index", "with_index", "with_tuning", "without_index"]  # fmt: skip

FORMAT_VERSION: Final = 1
FLAT: Final = "flat"

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
    """One version of one domain. `checksum` is the sha256 of the canonical JSON of everything else.

    index: the one that answers unless another is asked for. other_indexes: those beside it, each of another recipe.
    """

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
    other_indexes: tuple[IndexRecord, ...] = ()

    @model_validator(mode="after")
    def _indexes_are_listed(self) -> Self:
        for index in self.indexes:
            if index.file is not None and index.file not in self.files:
                raise ValueError(f"index file {index.file} is not among files")
        recipes = [index.recipe for index in self.indexes]
        if len(set(recipes)) != len(recipes):
            raise ValueError(f"two indexes of one recipe: {', '.join(recipes)}")
        return self

    @property
    def indexes(self) -> tuple[IndexRecord, ...]:
        """All of them, the default first."""
        return (self.index, *self.other_indexes)

    def index_of(self, recipe: str | None) -> IndexRecord:
        """The index of a recipe, None = the default. "flat" needs no file, so every version has it.

        Raises InvalidRequest for one that this version does not have.
        """
        for index in self.indexes:
            if recipe in (None, index.recipe):
                return index
        if recipe == FLAT:
            return IndexRecord(recipe=FLAT)
        known = ", ".join(sorted({FLAT, *(index.recipe for index in self.indexes)}))
        raise InvalidRequest(
            f"domain {self.domain} version {self.version} has no index {recipe!r}: it has {known}", param="index"
        )

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
        if not self.other_indexes:  # as it was written before there could be several
            del fields["other_indexes"]
        return (json.dumps({**fields, "checksum": _checksum(fields)}, indent=2) + "\n").encode()


def with_tuning(path: Path, tuning: Tuning) -> Manifest:
    """Store what was fitted for the version in folder `path`. Raises InvalidRequest for numbers out of range."""
    record = TuningRecord.of(tuning)
    return _rewrite(path, lambda old: old.model_copy(update={"tuning": record}))


def with_index(path: Path, index: IndexRecord, files: Mapping[str, FileRecord], *, beside: bool = False) -> Manifest:
    """Make `index`, whose `files` lie in folder `path` already, the default index of the version.

    It takes the place of one of the same recipe, and of the former default; with `beside` the former default stays and
    the new one is added to the others.
    """

    def change(old: Manifest) -> Manifest:
        others = [other for other in old.other_indexes if other.recipe != index.recipe]
        if not beside or old.index.recipe == index.recipe:
            return _indexed(old, [index, *others], files)
        return _indexed(old, [old.index, *others, index], files)

    return _rewrite(path, change)


def with_default_index(path: Path, recipe: str) -> Manifest:
    """Make an index that the version has its default. Raises InvalidRequest for another recipe."""

    def change(old: Manifest) -> Manifest:
        chosen = old.index_of(recipe)
        return _indexed(old, [chosen, *(index for index in old.indexes if index.recipe != recipe)], {})

    return _rewrite(path, change)


def without_index(path: Path, recipe: str) -> Manifest:
    """Take an index from the version. Raises InvalidRequest for one it does not have, Conflict for its default."""

    def change(old: Manifest) -> Manifest:
        if recipe == old.index.recipe:
            raise Conflict(f"{recipe} is the default index of {path}: make another one the default first")
        if recipe not in {index.recipe for index in old.indexes}:
            raise InvalidRequest(f"{path} has no index {recipe!r} to remove: it has {_names(old)}", param="index")
        return _indexed(old, [index for index in old.indexes if index.recipe != recipe], {})

    return _rewrite(path, change)


def _indexed(old: Manifest, indexes: Sequence[IndexRecord], files: Mapping[str, FileRecord]) -> Manifest:
    """With these indexes, the default first, and of the files those that are still named."""
    gone = {index.file for index in old.indexes} - {index.file for index in indexes}
    kept = {name: record for name, record in old.files.items() if name not in gone}
    update = {"index": indexes[0], "other_indexes": tuple(indexes[1:]), "files": {**kept, **files}}
    return old.model_copy(update=update)


def _names(manifest: Manifest) -> str:
    return ", ".join(index.recipe for index in manifest.indexes)


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
