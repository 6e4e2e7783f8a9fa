"""Files of a version that somebody made on purpose: their checksums are right, what they say is not.

Each case is a name and what it does to a version's folder. None may crash a process, take memory that the files do not
have, or give anything but a KnnlmError.
"""

import hashlib
import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from knnlm.datastore.layout import DOCUMENTS, KEYS, MANIFEST, TOKENIZER, TOKENS, VALUES

__all__ = ["FILES", "LARGE", "MANIFESTS", "npy", "relisted", "rewritten"]

Damage = Callable[[Path], None]
HUGE = 10**18
LARGE = frozenset({"a hundred megabytes", "a hundred megabytes of text"})  # seconds each


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The manifest with another content and the checksum of that content, as only its writer would make it."""
    file = path / MANIFEST
    fields = json.loads(file.read_bytes())
    del fields["checksum"]
    change(fields)
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    checksum = hashlib.sha256(canonical.encode()).hexdigest()
    file.write_text(json.dumps({**fields, "checksum": checksum}, indent=2) + "\n")


def relisted(path: Path, name: str, data: bytes) -> None:
    """Another content of a file, which the manifest vouches for."""
    (path / name).write_bytes(data)
    record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewritten(path, lambda fields: fields["files"].update({name: record}))


def npy(header: str, data: bytes = b"", *, version: int = 1) -> bytes:
    """A .npy file with whatever header."""
    text = header.encode("latin-1")
    size = struct.pack("<H", len(text)) if version == 1 else struct.pack("<I", len(text))
    return b"\x93NUMPY" + bytes([version, 0]) + size + text + data


def _set(where: str, value: object) -> Damage:
    """The manifest's field at a dotted path."""

    def change(fields: dict[str, Any]) -> None:
        *parents, last = where.split(".")
        for parent in parents:
            fields = fields.setdefault(parent, {}) if fields.get(parent) is None else fields[parent]
        fields[last] = value

    return lambda path: rewritten(path, change)


def _listed(name: str) -> Damage:
    """A file more, which is not there."""
    return lambda path: rewritten(path, lambda fields: fields["files"].update({name: {"bytes": 1, "sha256": "0" * 64}}))


def _both(*damages: Damage) -> Damage:
    def apply(path: Path) -> None:
        for damage in damages:
            damage(path)

    return apply


def _text(name: str, text: object) -> Damage:
    """text: str or bytes."""
    return lambda path: relisted(path, name, text if isinstance(text, bytes) else str(text).encode())


def _bytes(name: str, data: Callable[[], bytes]) -> Damage:
    def write(path: Path) -> None:
        (path / name).write_bytes(data())

    return write


TUNING = {"temperature": 1.0, "lmbda": 0.5, "k": 8, "lm_perplexity": 1.0, "knn_perplexity": 1.0, "tokens": 1,
          "documents": 1}  # fmt: skip

# the manifest says something else than its files, or nothing that means anything
MANIFESTS: Mapping[str, Damage] = {
    **{f"{name} {value!r}": _set(name, value) for name in ("entries", "documents", "tokens", "key_dim")
       for value in (-1, 0, 3, 2**31, 2**63, HUGE**3, 1.5, "7", None, True, [1])},
    **{f"vocabulary of {n}": _set("model.vocab_size", n) for n in (1, 2**31, 2**63, HUGE**3)},
    **{f"tuning {name} {value!r}": _set("tuning", {**TUNING, name: value})
       for name, value in (("k", 2**40), ("k", 0), ("tokens", 2**70), ("documents", 2**70), ("temperature", 0.0),
                           ("temperature", 1e-300), ("lm_perplexity", -1e308), ("lmbda", 2))},
    **{f"file {name[:9]!r}": _listed(name)
       for name in ("/etc/passwd", "../x", "..", ".", "a/b", "", "x" * 5000, "\x00", "a\nb", "CON", "index.x.faiss")},
    "a file outside": _both(
        lambda path: rewritten(path, lambda fields: fields["files"].update({"../CURRENT": fields["files"][VALUES]}))
    ),
    "index file outside": _set("index", {"recipe": "ivf8,sq8", "file": "../../x", "parameters": {}}),
    "index file is the keys": _set("index", {"recipe": "ivf8,sq8", "file": KEYS, "parameters": {}}),
    "index file is the tokenizer": _set("index", {"recipe": "hnsw8", "file": TOKENIZER, "parameters": {}}),
    "index without its file": _set("index", {"recipe": "ivf8,sq8", "file": None, "parameters": {}}),
    **{f"recipe {recipe!r}": _set("index.recipe", recipe)
       for recipe in ("", "nothing", "ivf0", "ivf-1", f"ivf{10**30}", "faiss:", "faiss:Flat", "faiss:IVF8,Flat",
                      "pca8,", "ivf8,sq8,sq8", "pca999999,flat", "hnsw0", "flat+fp16", "\x00", "ivf8,pq3", "hnsw8")},
    **{f"parameter {name} {value!r}": _set(f"index.parameters.{name}", value)
       for name in ("nprobe", "ef_search", "overfetch", "unknown")
       for value in (-1, 0, 2**31, 2**63, HUGE**3, float("nan"), float("inf"), 1e300, 0.5, "8", None)},
    "a recipe of many letters": _set("index.recipe", "x" * 99_999),
    "no index": _set("index", None),
    "an index within": _set("other_indexes", [{"recipe": "flat", "file": None, "parameters": {}}] * 1000),
    "another domain": _set("domain", "../../x"),
    "another key dtype": _set("key_dtype", "float32"),
    "an object dtype": _set("key_dtype", "object"),
    "an unknown field": _set("unknown", "x" * 1_000_000),
    "a date without zone": _set("created", "2020-01-01T00:00:00"),
    "a date in numbers": _set("created", HUGE**3),
    "segments that are not there": _both(_set("format_version", 2), _set("segments", [{"number": 1, "entries": 5,
                                                                                      "documents": 1, "tokens": 6}])),
    "segments of nothing": _both(_set("format_version", 2), _set("segments", [])),
    "removed what is not there": _both(_set("format_version", 2), _set("removed", {"documents": 1, "entries": HUGE})),
    "format 3": _set("format_version", 3),
    "format true": _set("format_version", True),
    "format of a megabyte": _set("format_version", "x" * 1_000_000),
    "a checksum of a megabyte": _bytes(
        MANIFEST, lambda: json.dumps({"format_version": 1, "checksum": "x" * 1_000_000}).encode()
    ),
    "surrogates": _set("key_function", "\udc80"),
    "twenty thousand files": _set("files", {f"f{i}": {"bytes": 1, "sha256": "0" * 64} for i in range(20_000)}),
    "empty": _bytes(MANIFEST, lambda: b""),
    "binary": _bytes(MANIFEST, lambda: bytes(range(256))),
    "utf-16": _bytes(MANIFEST, lambda: '{"format_version": 1}'.encode("utf-16")),
    "a list": _bytes(MANIFEST, lambda: b"[1]"),
    "not a number": _bytes(MANIFEST, lambda: b'{"format_version": NaN}'),
    "a number of a million digits": _bytes(MANIFEST, lambda: b'{"format_version": ' + b"9" * 1_000_000 + b"}"),
    "deep lists": _bytes(MANIFEST, lambda: b"[" * 200_000),
    "deep objects": _bytes(MANIFEST, lambda: b'{"format_version": 1, "x":' + b'{"x":' * 90_000 + b"1" + b"}" * 90_001),
    "deep enough to read": _bytes(
        MANIFEST, lambda: b'{"format_version": 1, "x":' + b"[" * 900 + b"]" * 900 + b"}"
    ),
    "a hundred megabytes": _bytes(MANIFEST, lambda: b'{"format_version": 1, "x": [' + b"0," * 50_000_000 + b"0]}"),
    "a hundred megabytes of text": _bytes(MANIFEST, lambda: b'{"format_version": 1, "x": "' + b"x" * 10**8 + b'"}'),
}  # fmt: skip

_I4 = "{{'descr': '<i4', 'fortran_order': False, 'shape': ({}), }}\n"
_ROW = '{{"id": {}, "start": {}, "tokens": {}}}\n'

# the manifest vouches for files that hold something else
FILES: Mapping[str, Damage] = {
    **{f"{name} of shape {shape}": _text(name, npy(_I4.format(shape), b"\x00" * 64))
       for name in (VALUES, TOKENS, KEYS)
       for shape in (f"{HUGE},", f"{2**62}, 4", "-1,", "", "16,", "290,", "9" * 400 + ",", "290.0,", "None,")},
    **{f"{name} is an object array": _text(name, npy("{'descr': '|O', 'fortran_order': False, 'shape': (290,), }\n",
                                                     b"\x80\x04cposix\nsystem\n")) for name in (VALUES, TOKENS, KEYS)},
    **{f"{name} in Fortran's order": _text(name, npy("{'descr': '<f2', 'fortran_order': True, 'shape': (290, 16), }\n",
                                                     b"\x00" * 9280)) for name in (VALUES, KEYS)},
    **{f"{name} has a header that is a program": _text(
        name, npy("{'descr': __import__('os').abort(), 'fortran_order': False, 'shape': (1,), }\n"))
       for name in (VALUES, TOKENS, KEYS)},
    **{f"{name} of version {v}": _text(name, npy(_I4.format("290,"), b"\x00" * 1160, version=v))
       for name in (VALUES, TOKENS) for v in (2, 3, 9)},
    **{f"{name} has a header of 64 KB": _text(name, npy("{" * 65_535)) for name in (VALUES, KEYS)},
    **{f"{name} is empty": _text(name, b"") for name in (VALUES, TOKENS, KEYS, DOCUMENTS, TOKENIZER)},
    **{f"{name} is a pickle": _text(name, b"\x80\x04\x95\x00cposix\nsystem\n.") for name in (VALUES, TOKENS, KEYS)},
    "values beyond the vocabulary": lambda path: _overwritten(path, VALUES, struct.pack("<i", 2**31 - 1)),
    "values below zero": lambda path: _overwritten(path, VALUES, struct.pack("<i", -5)),
    "keys that are not numbers": lambda path: _overwritten(path, KEYS, b"\xff\x7f"),
    "keys that are infinite": lambda path: _overwritten(path, KEYS, b"\x00\x7c"),
    **{f"documents {name}": _text(DOCUMENTS, text) for name, text in {
        "are binary": bytes(range(256)),
        "are deep lists": b"[" * 200_000,
        "are one endless line": b'{"id": "' + b"x" * 5_000_000,
        "start below zero": _ROW.format('"a"', -1, 294) * 4,
        "are huge": _ROW.format('"a"', 0, HUGE**3),
        "overflow together": "".join(_ROW.format('"a"', i * (2**47), 2**47) for i in range(4)),
        "overlap": _ROW.format('"a"', 0, 294) * 4,
        "have a number for a name": _ROW.format(7, 0, 294),
        "have fractions": _ROW.format('"a"', 0.5, 294),
        "have truth for numbers": _ROW.format('"a"', "false", "true"),
        "have a surrogate for a name": _ROW.format('"\\udc80"', 0, 294),
        "have no name": '{"start": 0, "tokens": 294}\n',
        "are lists": "[1, 2, 3]\n" * 4,
        "have a number of many digits": _ROW.format('"a"', 0, "9" * 100_000),
        "are too many": '{"id": "a", "start": 0, "tokens": 0}\n' * 1000,
    }.items()},
    **{f"tokenizer {name}": _text(TOKENIZER, text) for name, text in {
        "is binary": bytes(range(256)),
        "is an empty object": b"{}",
        "is deep lists": b"[" * 200_000,
        "is of another kind": b'{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": [["a", "b"]]}}',
    }.items()},
}  # fmt: skip


def _overwritten(path: Path, name: str, end: bytes) -> None:
    """The last bytes of a file replaced."""
    data = (path / name).read_bytes()
    relisted(path, name, data[: -len(end)] + end)
