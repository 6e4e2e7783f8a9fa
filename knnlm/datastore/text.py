"""Where documents come from: text files, JSON lines, Parquet, folders of them, or standard input.

A document is the unit everywhere above: it is tokenized whole, split between fitting and reporting whole, and an
entry's source is named by it. Nothing here knows about tokens.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from io import TextIOWrapper
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TextIO

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
    for file, name in files_of(path):
        with file.open("rb") as opened:
            yield from read_opened(opened, name=name, where=str(file))


def files_of(path: Path) -> list[tuple[Path, str]]:
    """The files of documents that a file or folder is, in the order in which they are read, each with the name that
    its documents are named by. Raises InvalidRequest when there is none."""
    if path.is_dir():
        files = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        found = [(f, f.relative_to(path)) for f in files]
        kept = [(f, name.as_posix()) for f, name in found if not any(part.startswith(".") for part in name.parts)]
        if not kept:
            raise _malformed(f"no file with one of {', '.join(SUFFIXES)} in folder {path}")
        return kept
    if path.is_file():
        check_suffix(str(path))
        return [(path, path.name)]
    raise _malformed(f"no such file or folder: {path}")


def check_suffix(where: str) -> str:
    """The suffix of a file of documents, in lower case. Raises InvalidRequest for another file."""
    suffix = PurePosixPath(where).suffix
    if suffix.lower() not in SUFFIXES:
        raise _malformed(f"{where} has suffix {suffix!r}; expected one of {', '.join(SUFFIXES)}")
    return suffix.lower()


def read_opened(file: BinaryIO, *, name: str, where: str) -> Iterator[Document]:
    """The documents of one opened file, whose path or address is `where`. Raises as read_documents does."""
    suffix = check_suffix(where)
    if suffix == ".parquet":
        yield from _read_parquet(file, name=name, where=where)
        return
    with TextIOWrapper(file, encoding=ENCODING) as text:
        if suffix == ".jsonl":
            yield from _read_json_lines(text, name=name, where=where)
        else:
            yield from _whole("", text, name=name, where=where)


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


def _read_parquet(file: BinaryIO, *, name: str, where: str) -> Iterator[Document]:
    try:
        import pyarrow.lib
        import pyarrow.parquet
    except ImportError as err:
        raise _malformed(f"{where}: reading Parquet needs pyarrow, install knnlm[parquet]") from err
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = table.schema_arrow.names
            if "text" not in columns:
                raise _malformed(f'{where} has no column "text"; it has {", ".join(columns)}')
            wanted = [c for c in ("id", "text") if c in columns]
            for batch in table.iter_batches(columns=wanted, batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    place = f"{where}, row {number}"
                    yield from _document(row.get("id"), row["text"], default=f"{name}:{number}", where=place)
    except pyarrow.lib.ArrowException as err:
        raise _malformed(f"{where} is not a Parquet file that can be read, after row {number}: {err}") from err


def _malformed(message: str) -> InvalidRequest:
    return InvalidRequest(message, param="sources")
