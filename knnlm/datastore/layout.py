"""The files of a version: what each is called, and whether it still is what was recorded of it.

What a file holds is said where it is written and read.
"""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal, NamedTuple, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from knnlm.datastore.files import sha256_of
from knnlm.errors import DatastoreCorrupt, InvalidRequest

MANIFEST = "manifest.json"
KEYS = "keys.npy"  # (n, d) float16 or float32
VALUES = "values.npy"  # (n,) int32
TOKENS = "tokens.npy"  # (t,) int32
DOCUMENTS = "documents.jsonl"
TOKENIZER = "tokenizer.json"  # as the tokenizers library writes it: text can be shown without the model
BUILD_FOLDER = ".build"  # in a version that is being made: what a command that was killed continues with
CURRENT = "CURRENT"  # one level up: the name of the version that answers
HIGHEST = ".highest"  # beside it: the highest number that a version had when one was removed
REMOVED = "removed.npy"  # (m,) int64, ascending: documents that do not count any more, numbered over all segments

FileName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]  # exact in JSON wherever it is read

Checksums = Literal["none", "small", "all"]
CHECKSUMS: Final = get_args(Checksums)
MAX_SHOWN: Final = 100  # characters of a damaged file in an error


class Record(BaseModel):
    """Something stored as JSON: immutable, and nothing is accepted that is not known."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class FileRecord(Record):
    """What a manifest says of one file."""

    bytes: Count
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, file: Path) -> Self:
        """The record of a file as it is now. Reads all of it."""
        return cls(bytes=file.stat().st_size, sha256=sha256_of(file))

    def problem(self, file: Path) -> str | None:
        """What is wrong with `file`, with the found and the expected value; None when it is what this record says."""
        try:
            size = file.stat().st_size
            if size != self.bytes:
                return f"has {size} bytes, expected {self.bytes}"
            with file.open("rb", buffering=0) as opened:
                # into one buffer, hashed without the interpreter's lock: other threads go on
                sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
        except OSError as err:
            return f"cannot be read: {err.strerror}"
        return None if sha256 == self.sha256 else f"has sha256 {sha256}, expected {self.sha256}"


class SegmentFiles(NamedTuple):
    """The four files of one segment, each as its namesake of the base."""

    keys: str
    values: str
    tokens: str
    documents: str


def segment_files(number: int) -> SegmentFiles:
    """number: 1, 2, ... of documents added later; 0 is the base, what the version was built from."""
    if number == 0:
        return SegmentFiles(KEYS, VALUES, TOKENS, DOCUMENTS)
    return SegmentFiles(
        f"keys.{number}.npy", f"values.{number}.npy", f"tokens.{number}.npy", f"documents.{number}.jsonl"
    )


def shard_name(number: int) -> str:
    """The folder of a shard, 0 the first, inside of the version's."""
    return f"shard-{number:05d}"


def is_keys(name: str) -> bool:
    """Whether the file of this name holds the keys of the base or of a segment: most of the bytes of a version."""
    return re.fullmatch(r"keys(\.[1-9]\d*)?\.npy", name) is not None


def require_unchanged(path: Path, files: Mapping[str, FileRecord], check: Checksums) -> None:
    """Read files of the version in folder `path` and compare them with their records.

    check: "all" of them, "small" = all but the keys, whose values cannot break what reads them and which are most of
    the bytes, or "none". Raises DatastoreCorrupt for the first that differs, with what was found and what was expected.
    """
    if check not in CHECKSUMS:
        raise InvalidRequest(f"check must be one of {', '.join(CHECKSUMS)}, got {check!r}", param="check")
    for name, record in sorted(files.items()):
        wanted = check == "all" or (check == "small" and not is_keys(name))
        problem = record.problem(path / name) if wanted else None
        if problem is not None:
            raise DatastoreCorrupt(f"{path / name} {problem}")


def first_problem(err: ValidationError) -> str:
    """The first thing that is wrong with a record: which field, why, and its value, cut short."""
    problem = err.errors(include_url=False)[0]
    where = ".".join(str(part) for part in problem["loc"]) or "the whole"
    return f"{where[:MAX_SHOWN]}: {problem['msg'][: 2 * MAX_SHOWN]}, got {shown(problem['input'])}"


def shown(value: object) -> str:
    """A value for an error, cut short."""
    return repr(value)[:MAX_SHOWN]
