"""A published version, opened: its arrays as read-only maps, and the text around an entry.

Opening is cheap, whatever the size: sizes and headers are compared with the manifest, contents are not (that is
verify.py). Immutable and safe for any number of threads.
"""

from pathlib import Path
from threading import Lock
from typing import Self

import numpy as np
import numpy.typing as npt

from knnlm.datastore.arrays import open_array
from knnlm.datastore.documents import DocumentTable, Int64
from knnlm.datastore.layout import DOCUMENTS, KEYS, TOKENS, VALUES
from knnlm.datastore.manifest import Manifest
from knnlm.errors import DatastoreCorrupt, DatastoreMismatch, InvalidRequest
from knnlm.messages import ModelInfo, Passage

__all__ = ["Datastore"]


class Datastore:
    """keys: (n, d) float16 or float32. values: (n,) int32. tokens: (t,) int32, all documents one after another."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        keys: npt.NDArray[np.floating],
        values: npt.NDArray[np.int32],
        tokens: npt.NDArray[np.int32],
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.keys = keys
        self.values = values
        self.tokens = tokens
        self._documents: DocumentTable | None = None
        self._lock = Lock()

    @classmethod
    def open(cls, path: Path, *, expect: ModelInfo | None = None) -> Self:
        """The version in folder `path`.

        Raises DatastoreIncomplete for one that is being built, DatastoreCorrupt where a file is missing, has another
        size or is no such array, and DatastoreMismatch, with both values, when the model `expect` did not make it.
        """
        manifest = Manifest.load(path)
        if expect is not None:
            _refuse_other_model(path, manifest, expect)
        for name, record in manifest.files.items():
            file = path / name
            size = file.stat().st_size if file.is_file() else None
            if size != record.bytes:
                found = "is missing" if size is None else f"has {size} bytes"
                raise DatastoreCorrupt(f"{file} {found}, expected {record.bytes} bytes")
        n = manifest.entries
        return cls(
            path,
            manifest,
            open_array(path / KEYS, (n, manifest.key_dim), np.dtype(manifest.key_dtype).newbyteorder("<")),
            open_array(path / VALUES, (n,), "<i4"),
            open_array(path / TOKENS, (manifest.tokens,), "<i4"),
        )

    @property
    def documents(self) -> DocumentTable:
        """Read on first use: a search that shows no text never needs it. Raises DatastoreCorrupt."""
        with self._lock:
            if self._documents is None:
                table = DocumentTable(self.path / DOCUMENTS)
                if len(table) != self.manifest.documents:
                    raise DatastoreCorrupt(
                        f"{self.path / DOCUMENTS} has {len(table)} documents, expected {self.manifest.documents}"
                    )
                self._documents = table
            return self._documents

    def document_of(self, entries: npt.NDArray[np.integer]) -> tuple[Int64, Int64]:
        """(n,) document numbers and (n,) places of the values in their documents, in tokens.

        Raises InvalidRequest for an entry that does not exist.
        """
        wrong = entries[(entries < 0) | (entries >= self.manifest.entries)]
        if len(wrong):
            raise InvalidRequest(f"no entry {wrong[0]}: expected [0, {self.manifest.entries})", param="entries")
        return self.documents.locate(entries)

    def passage(self, entry: int, before: int, after: int) -> Passage:
        """The text around an entry: the last `before` tokens of its context, then `after` tokens from its value on.

        Less where the document begins or ends: another document's tokens are never shown. Raises InvalidRequest for
        an entry that does not exist or negative numbers.
        """
        if before < 0 or after < 0:
            raise InvalidRequest(f"before and after must be >= 0, got {before} and {after}", param="passage_tokens")
        documents, positions = self.document_of(np.array([entry], np.int64))
        document, position = int(documents[0]), int(positions[0])
        start, length = int(self.documents.starts[document]), int(self.documents.lengths[document])
        at = start + position
        return Passage(
            document=self.documents.id(document),
            entry=int(entry),
            position=position,
            before=np.array(self.tokens[max(start, at - before) : at]),
            after=np.array(self.tokens[at : min(start + length, at + after)]),
        )

    def close(self) -> None:
        """Let go of the maps; they are unmapped when nobody holds an array of them any more."""
        self.keys = np.empty((0, self.manifest.key_dim), self.manifest.key_dtype)
        self.values = self.tokens = np.empty(0, np.int32)


def _refuse_other_model(path: Path, manifest: Manifest, info: ModelInfo) -> None:
    for name, made, wanted in (
        ("weights_sha256", manifest.model.weights_sha256, info.weights_sha256),
        ("tokenizer_sha256", manifest.model.tokenizer_sha256, info.tokenizer_sha256),
        ("key_function", manifest.key_function, info.key_function),
        ("key_dim", manifest.key_dim, info.key_dim),
        ("vocab_size", manifest.model.vocab_size, info.vocab_size),
    ):
        if made != wanted:
            raise DatastoreMismatch(
                f"{path} was made by model {manifest.model.model_id} with {name} {made}, "
                f"model {info.model_id} has {name} {wanted}",
                param=name,
            )
