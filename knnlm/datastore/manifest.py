"""manifest.json: what a version of a datastore is, and the checksum of every byte in it.

The manifest is written last and checks itself: a version without a valid one does not exist. The file must be, byte for
byte, what this module writes; so that no change goes unnoticed. What may change after publication: updates/revise.py.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AwareDatetime, Field, ValidationError, model_validator

from knnlm.datastore.files import write_atomic
from knnlm.datastore.layout import (
    MANIFEST,
    REMOVED,
    Count,
    FileName,
    FileRecord,
    Record,
    first_problem,
    segment_files,
    shard_name,
    shown,
)
from knnlm.datastore.tuning import TuningRecord
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreIncomplete, InvalidRequest
from knnlm.messages import DomainInfo, Memory, ModelInfo

FORMAT_VERSION: Final = 1
SHARDED_VERSION: Final = 3  # of shards in folders of their own, each of version 1
GROWN_VERSION: Final = 2  # with segments added to it, or documents removed: what reads version 1 alone would be wrong
FLAT: Final = "flat"
MAX_BYTES: Final = 8 << 20  # thousands of segments; reading a manifest takes many times as much memory

KeyDtype = Literal["float16", "float32"]


class ModelRecord(Record):
    """What made the keys. Another model's keys, or another tokenizer's tokens, mean nothing here.

    config_sha256, dtype: None in versions from before they were recorded; bos_token_id then says nothing, else None
    means that the model has no BOS.
    """

    model_id: str
    architecture: str
    weights_sha256: str
    tokenizer_sha256: str
    vocab_size: int = Field(ge=1, lt=1 << 31)
    config_sha256: str | None = None
    dtype: str | None = None
    bos_token_id: int | None = Field(None, ge=0, lt=1 << 31)

    @classmethod
    def of(cls, info: ModelInfo) -> Self:
        return cls(**{name: getattr(info, name) for name in cls.model_fields})


class WindowsRecord(Record):
    """How documents became what the model was fed: at most context_length tokens at a time, and every key sees at least
    min_context of them.

    parse_special: whether special tokens written in a text counted as such. True where it is not recorded: then it was
    not yet a choice. bos: whether the BOS token stands before each document alone, or before each of its windows; there
    it counts among the context_length tokens.
    """

    context_length: int = Field(ge=2, lt=1 << 53)
    min_context: int = Field(ge=1, lt=1 << 53)
    parse_special: bool = True
    bos: Literal["document", "window"] = "document"


class IndexRecord(Record):
    """The search structure. file: None when it is made from the keys on loading. parameters: defaults of a search.

    trained: of an index that shards share, sha256 of what was learned for all of them; in the manifest of the whole
    `file` is that, in a shard's the index of its keys.
    """

    recipe: str
    file: str | None = None
    trained: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    parameters: dict[str, Annotated[int | float, Field(ge=1, lt=1 << 31)]] = Field(default_factory=dict)


class SegmentRecord(Record):
    """Documents added to a version that was built: files of their own (layout.segment_files), entries after all former
    ones, no part of the index."""

    number: int = Field(ge=1, lt=1 << 31)
    entries: Count
    documents: int = Field(ge=1, lt=1 << 53)
    tokens: Count


class RemovedRecord(Record):
    """How many of the documents, and of the entries, do not count any more; layout.REMOVED says which."""

    documents: int = Field(ge=1, lt=1 << 53)
    entries: Count


class ShardRecord(Record):
    """Consecutive documents of a version, in a folder that can be opened as a version by itself; entries, documents and
    tokens are numbered from 0 there. content: `Manifest.content` of its manifest."""

    name: str = Field(pattern=r"^shard-[0-9]{5}$")
    entries: int = Field(ge=1, lt=1 << 53)
    documents: int = Field(ge=1, lt=1 << 53)
    tokens: Count
    content: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, number: int, manifest: "Manifest") -> Self:
        counts = {name: getattr(manifest, name) for name in ("entries", "documents", "tokens", "content")}
        return cls(name=shard_name(number), **counts)


class Manifest(Record):
    """One version of one domain. `checksum` is the sha256 of the canonical JSON of everything else.

    entries, documents, tokens: all that is stored, in the base and in every segment, removed ones included. index: the
    one that answers unless another is asked for; it holds the base. other_indexes: those beside it, each of another
    recipe. segments: ascending by number. parent: the version that this one shares its files with. shards: what holds
    everything, in the order of the documents; then `files` is what they share.
    """

    format_version: Literal[1, 2, 3] = FORMAT_VERSION
    domain: str
    version: str
    created: AwareDatetime = Field(default_factory=lambda: datetime.now(UTC))
    model: ModelRecord
    key_function: str
    windows: WindowsRecord
    key_dim: int = Field(ge=1, lt=1 << 31)
    key_dtype: KeyDtype
    entries: Count
    documents: Count
    tokens: Count
    index: IndexRecord = IndexRecord(recipe="flat")
    files: dict[FileName, FileRecord]
    tuning: TuningRecord | None = None
    other_indexes: tuple[IndexRecord, ...] = ()
    segments: tuple[SegmentRecord, ...] = ()
    removed: RemovedRecord | None = None
    parent: str | None = None
    shards: tuple[ShardRecord, ...] = ()

    @model_validator(mode="after")
    def _shards_are_sound(self) -> Self:
        if (self.format_version == SHARDED_VERSION) != bool(self.shards):
            raise ValueError(f"format version {self.format_version} with {len(self.shards)} shards")
        names = [shard.name for shard in self.shards]
        if names != [shard_name(number) for number in range(len(names))]:
            raise ValueError(f"shards are named {', '.join(names)}, expected numbers from 0 on")
        for name in ("entries", "documents", "tokens"):
            total = sum(getattr(shard, name) for shard in self.shards)
            if self.shards and total != getattr(self, name):
                raise ValueError(f"{name} are {getattr(self, name)}, in the shards there are {total}")
        return self

    @model_validator(mode="after")
    def _growth_is_sound(self) -> Self:
        if (self.format_version == GROWN_VERSION) != bool(self.segments or self.removed):
            raise ValueError(f"format version {self.format_version} with {len(self.segments)} segments")
        numbers = [segment.number for segment in self.segments]
        if numbers != sorted(set(numbers)):
            raise ValueError(f"segments are numbered {numbers}, expected ascending")
        named = [name for number in numbers for name in segment_files(number)] + [REMOVED] * (self.removed is not None)
        for name in named:
            if name not in self.files:
                raise ValueError(f"{name} is not among files")
        gone = self.removed or RemovedRecord.model_construct(documents=0, entries=0)
        for name, base, removed in (
            ("entries", self.base_entries, gone.entries),
            ("documents", self.base_documents, gone.documents),
            ("tokens", self.base_tokens, 0),
        ):
            if base < 0 or removed > getattr(self, name):
                raise ValueError(f"{name} are {getattr(self, name)}, fewer than in the segments or among the removed")
        return self

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
    def base_entries(self) -> int:
        return self.entries - sum(segment.entries for segment in self.segments)

    @property
    def base_documents(self) -> int:
        return self.documents - sum(segment.documents for segment in self.segments)

    @property
    def base_tokens(self) -> int:
        return self.tokens - sum(segment.tokens for segment in self.segments)

    @property
    def live_entries(self) -> int:
        """Entries that can be found: without those of removed documents."""
        return self.entries - (self.removed.entries if self.removed else 0)

    @property
    def live_documents(self) -> int:
        return self.documents - (self.removed.documents if self.removed else 0)

    @property
    def content(self) -> str:
        """sha256 over the checksums of keys, values, tokens, documents and tombstones; indexes and tunings may change
        without it."""
        if self.shards:
            return _checksum({shard.name: shard.content for shard in self.shards})
        names = [name for number in (0, *(s.number for s in self.segments)) for name in segment_files(number)]
        names += [REMOVED] if self.removed else []
        return _checksum({name: self.files[name].sha256 for name in names})

    @property
    def indexes(self) -> tuple[IndexRecord, ...]:
        """All indexes, the default first."""
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

    def info(self, recipe: str, memory: Memory, versions: Sequence[str], state: str) -> DomainInfo:
        """What the version is to who asks for it, searched by the index of this recipe. versions: all of the domain."""
        made = self.model
        return DomainInfo(
            domain=self.domain,
            version=self.version,
            versions=tuple(versions),
            state=state,
            entries=self.live_entries,
            documents=self.live_documents,
            key_dim=self.key_dim,
            key_dtype=self.key_dtype,
            key_function=self.key_function,
            index=recipe,
            model_id=made.model_id,
            weights_sha256=made.weights_sha256,
            tokenizer_sha256=made.tokenizer_sha256,
            tuning=None if self.tuning is None else self.tuning.message(),
            indexes=tuple(index.recipe for index in self.indexes),
            memory=memory,
            context_length=self.windows.context_length,
            min_context=self.windows.min_context,
            config_sha256=made.config_sha256,
            model_dtype=made.dtype,
            bos_token_id=made.bos_token_id,
            window_bos=self.windows.bos,
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
            size = file.stat().st_size
            if size > MAX_BYTES:
                raise DatastoreCorrupt(f"{file} has {size} bytes, expected at most {MAX_BYTES}")
            data = file.read_bytes()
        except (FileNotFoundError, NotADirectoryError) as err:
            raise DatastoreCorrupt(f"{file} is missing: expected the manifest of a datastore version") from err
        except OSError as err:
            raise DatastoreCorrupt(f"{file} cannot be read: {err.strerror}") from err
        try:
            fields = json.loads(data)
        except (ValueError, RecursionError) as err:  # not JSON, not UTF-8, or lists nested too deep
            raise DatastoreCorrupt(f"{file} is not JSON: {err}") from err
        if not isinstance(fields, dict):
            raise DatastoreCorrupt(f"{file} holds {type(fields).__name__}, expected an object")
        if fields.get("format_version") not in (FORMAT_VERSION, GROWN_VERSION, SHARDED_VERSION):
            raise DatastoreCorrupt(
                f"{file} has format version {shown(fields.get('format_version'))}, "
                f"this program reads {FORMAT_VERSION}, {GROWN_VERSION} and {SHARDED_VERSION}"
            )
        stored, expected = fields.pop("checksum", None), _checksum(fields)
        if stored != expected:
            raise DatastoreCorrupt(f"{file} was changed: its content has checksum {expected}, it says {shown(stored)}")
        try:
            manifest = cls.model_validate_json(json.dumps(fields))
        except ValidationError as err:
            raise DatastoreCorrupt(f"{file} is not a manifest: {first_problem(err)}") from err
        if data != manifest.serialized():
            raise DatastoreCorrupt(f"{file} was changed: expected exactly the bytes that were written")
        return manifest

    def save(self, path: Path) -> None:
        """Write into folder `path`, atomically and durably. Raises Conflict, with what helps, when it has grown larger
        than is read."""
        data = self.serialized()
        if len(data) > MAX_BYTES:
            raise Conflict(
                f"the manifest of domain {self.domain} would have {len(data)} bytes, at most {MAX_BYTES} are read: "
                f"`knnlm compact {self.domain}` folds its {len(self.segments)} additions into one"
            )
        write_atomic(path / MANIFEST, data)

    def serialized(self) -> bytes:
        fields = self.model_dump(mode="json")
        for name in (
            "other_indexes",
            "segments",
            "removed",
            "parent",
            "shards",
        ):  # without them as before there were any
            if not fields[name]:
                del fields[name]
        for index in (fields["index"], *fields.get("other_indexes", ())):
            if index["trained"] is None:
                del index["trained"]
        fields["model"] = {name: value for name, value in fields["model"].items() if value is not None}
        for name, unrecorded in (("parse_special", True), ("bos", "document")):
            if fields["windows"][name] == unrecorded:
                del fields["windows"][name]
        return (json.dumps({**fields, "checksum": _checksum(fields)}, indent=2) + "\n").encode()


def _checksum(fields: Mapping[str, Any]) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
