"""What the files of a datastore are called; what each holds is said where it is read and written."""

import re
from typing import NamedTuple

MANIFEST = "manifest.json"
KEYS = "keys.npy"  # (n, d) float16 or float32
VALUES = "values.npy"  # (n,) int32
TOKENS = "tokens.npy"  # (t,) int32
DOCUMENTS = "documents.jsonl"
TOKENIZER = "tokenizer.json"  # of the tokenizers library: text can be shown without the model
CURRENT = "CURRENT"  # one level up: the name of the version that answers
HIGHEST = ".highest"  # beside it: the highest number that a version had when one was removed
REMOVED = "removed.npy"  # (m,) int64, ascending: documents that do not count any more, numbered over all segments


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


def is_keys(name: str) -> bool:
    """Whether the file of this name holds the keys of the base or of a segment: most of the bytes of a version."""
    return re.fullmatch(r"keys(\.[1-9]\d*)?\.npy", name) is not None
