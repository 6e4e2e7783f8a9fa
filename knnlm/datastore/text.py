"""Where documents come from: text files, JSON lines, Parquet, folders of them, or standard input.

A document is the unit everywhere above: it is tokenized whole, split between fitting and reporting whole, and an
entry's source is named by it. Nothing here knows about tokens.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TextIO

from knnlm.errors import InvalidRequest
from knnlm.messages import Document

SUFFIXES = (".txt", ".md", ".rst", ".jsonl", ".parquet")
CONTROL_CHARACTER = re.compile(r"[\x00-\x1f\x7f-\x9f]")
ENCODING = "utf-8-sig"  # UTF-8, and a byte order mark is not text


def read_documents(sources: Sequence[str | Path], *, stdin: TextIO | None = None) -> Iterator[Document]:
    """The documents of `sources`, in their order; a folder's files in sorted order, sub-folders included.

    .txt, .md and .rst: one document a file, named by its path below the given folder. .jsonl: one object a line,
    "text" required, "id" optional. .parquet: columns "text" and, optionally, "id". "-": standard input, as JSON lines
    when its first character is "{", else as one document. Documents with nothing but white space are skipped, and so
    are files and folders whose name begins with a dot, unless they are given themselves.
    Raises InvalidRequest that names the source (and line) that is missing, unreadable, of another kind or malformed, or
    whose id has a control character.
    """
    for source in sources:
        name = "standard input" if str(source) == "-" else str(source)
        try:
            if str(source) == "-":
                yield from _read_stream(stdin if stdin is not None else sys.stdin)
            else:
                yield from _read_path(Path(source))
        except OSError as err:
            raise _malformed(f"{err.filename or name} cannot be read: {err.strerror or err}") from err


def check_id(name: str, where: str, *, param: str) -> None:
    """Raises InvalidRequest for the id of a new document with a control character: no command line could name it."""
    if found := CONTROL_CHARACTER.search(name):
        raise InvalidRequest(
            f"{where} has the control character {found[0]!r} at {found.start()}: expected an id without", param=param
        )


def _read_path(path: Path) -> Iterator[Document]:
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        files = [f for f in files if not any(part.startswith(".") for part in f.relative_to(path).parts)]
        if not files:
            raise _malformed(f"no file with one of {', '.join(SUFFIXES)} in folder {path}")
        for file in files:
            yield from _read_file(file, name=file.relative_to(path).as_posix())
    elif path.is_file():
        yield from _read_file(path, name=path.name)
    else:
        raise _malformed(f"no such file or folder: {path}")


def _read_file(path: Path, *, name: str) -> Iterator[Document]:
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise _malformed(f"{path} has suffix {path.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    if suffix == ".jsonl":
        with path.open(encoding=ENCODING) as lines:
            yield from _read_json_lines(lines, name=name, where=str(path))
    elif suffix == ".parquet":
        yield from _read_parquet(path, name=name)
    else:
        with path.open(encoding=ENCODING) as file:
            yield from _whole("", file, name=name, where=str(path))


def _read_stream(stream: TextIO) -> Iterator[Document]:
    try:
        first = stream.read(1)
    except UnicodeDecodeError as err:
        raise _malformed(f"standard input is not UTF-8 text: {err}") from err
    if first == "{":
        rest = iter(stream)
        yield from _read_json_lines(
            chain((first + line for line in [next(rest, "")]), rest), name="stdin", where="standard input"
        )
    else:
        yield from _whole(first, stream, name="stdin", where="standard input")


def _whole(first: str, file: TextIO, *, name: str, where: str) -> Iterator[Document]:
    try:
        text = first + file.read()
    except UnicodeDecodeError as err:
        raise _malformed(f"{where} is not UTF-8 text: {err}") from err
    if text.strip():
        check_id(name, f"the name of {where!r}, which is its id,", param="sources")
        yield Document(name, text)


def _read_json_lines(lines: Iterable[str], *, name: str, where: str) -> Iterator[Document]:
    number = 0
    try:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield from _parse(line, default=f"{name}:{number}", where=f"{where}, line {number}")
    except UnicodeDecodeError as err:
        raise _malformed(f"{where} is not UTF-8 text after line {number}: {err}") from err


def _parse(line: str, *, default: str, where: str) -> Iterator[Document]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as err:
        raise _malformed(f"{where} is not JSON: {err}") from err
    if not isinstance(row, dict) or "text" not in row:
        raise _malformed(f'{where}: expected an object with a string "text"')
    yield from _document(row.get("id"), row["text"], default=default, where=where)


def _document(id_: object, text: object, *, default: str, where: str) -> Iterator[Document]:
    """One document, or none where there is only white space."""
    if not isinstance(text, str):
        raise _malformed(f'{where}: "text" is {type(text).__name__}, expected a string')
    name = default if id_ is None else str(id_)
    for part in (name, text):
        try:
            part.encode()
        except UnicodeEncodeError as err:  # "\ud800" is valid JSON
            raise _malformed(f"{where} is not text: {err}") from err
    if text.strip():
        check_id(name, f'{where}: "id"', param="sources")
        yield Document(name, text)


def _read_parquet(path: Path, *, name: str) -> Iterator[Document]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError as err:
        raise _malformed(f"{path}: reading Parquet needs pyarrow, install knnlm[parquet]") from err
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            columns = table.schema_arrow.names
            if "text" not in columns:
                raise _malformed(f'{path} has no column "text"; it has {", ".join(columns)}')
            wanted = [c for c in ("id", "text") if c in columns]
            for batch in table.iter_batches(columns=wanted, batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    where = f"{path}, row {number}"
                    yield from _document(row.get("id"), row["text"], default=f"{name}:{number}", where=where)
    except pyarrow.lib.ArrowException as err:
        raise _malformed(f"{path} is not a Parquet file that can be read, after row {number}: {err}") from err


def _malformed(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="sources")
