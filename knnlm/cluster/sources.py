"""What a cluster reads: the files of documents that `knnlm build` would read, in its order, also those at URLs.

Files are cut into units that are tokenized in parallel. What a file was is its size and its time of change, so that
nothing is read twice only to see that it is the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knnlm.cluster.objects import URL, below, located
from knnlm.datastore.text import check_suffix, files_of, read_opened
from knnlm.errors import InvalidRequest
from knnlm.messages import Document

UNIT_BYTES = 16 << 20  # files that one task tokenizes, and one file at least
MAX_UNIT_FILES = 4096


@dataclass(frozen=True)
class SourceFile:
    """where: an absolute path or a URL. name: what its documents are named by. stamp: changes when the file does."""

    where: str
    name: str
    size: int
    stamp: str


def source_files(sources: Sequence[str]) -> list[SourceFile]:
    """The files of `sources` in the order of knnlm.datastore.text.read_documents, which says what is raised."""
    found: list[SourceFile] = []
    for source in sources:
        if not source:
            raise InvalidRequest("sources must be files, folders or URLs, got an empty one", param="sources")
        if source == "-":
            raise InvalidRequest("standard input is read by one process: give files or URLs", param="sources")
        try:
            found += _at_url(source) if URL.match(source) else _local(Path(source).absolute())
        except OSError as err:
            raise InvalidRequest(f"{source} cannot be read: {err.strerror or err}", param="sources") from err
    return found


def units(files: Sequence[SourceFile], unit_bytes: int = UNIT_BYTES) -> Iterator[tuple[SourceFile, ...]]:
    """Consecutive files that are tokenized together; the same for the same files."""
    unit: list[SourceFile] = []
    size = 0
    for file in files:
        if unit and (size + file.size > unit_bytes or len(unit) >= MAX_UNIT_FILES):
            yield tuple(unit)
            unit, size = [], 0
        unit.append(file)
        size += file.size
    if unit:
        yield tuple(unit)


def read_files(files: Sequence[SourceFile]) -> Iterator[Document]:
    """The documents of files, which any node can read. Raises as read_documents does."""
    for file in files:
        where = file.where.partition("?")[0] if URL.match(file.where) else file.where
        try:
            with _opened(file.where) as opened:
                yield from read_opened(opened, name=file.name, where=where)
        except OSError as err:
            raise InvalidRequest(f"{where} cannot be read: {err.strerror or err}", param="sources") from err


def _local(path: Path) -> list[SourceFile]:
    found = []
    for file, name in files_of(path):
        status = file.stat()
        found.append(SourceFile(str(file), name, status.st_size, str(status.st_mtime_ns)))
    return found


def _at_url(url: str) -> list[SourceFile]:
    from pyarrow import fs

    system, path = located(url, "sources")
    found = system.get_file_info(path)
    if found.type == fs.FileType.File:
        check_suffix(path)
        return [_file(url, path.rpartition("/")[2], found)]
    if found.type == fs.FileType.NotFound:
        raise InvalidRequest(f"no such file or folder: {url}", param="sources")
    root = path.rstrip("/") + "/"
    files = []
    for info in sorted(system.get_file_info(fs.FileSelector(path, recursive=True)), key=lambda info: Path(info.path)):
        name = info.path.removeprefix(root)
        if info.type == fs.FileType.File and not any(part.startswith(".") for part in name.split("/")):
            try:
                check_suffix(name)
            except InvalidRequest:  # as in a local folder: other files are none of ours
                continue
            files.append(_file(below(url, name), name, info))
    if not files:
        raise InvalidRequest(f"no file of documents in {url}", param="sources")
    return files


def _file(url: str, name: str, info: Any) -> SourceFile:  # Any: pyarrow has no types
    return SourceFile(url, name, int(info.size), str(info.mtime_ns))


def _opened(where: str) -> Any:  # Any: a file of ours or of pyarrow
    if URL.match(where):
        system, path = located(where, "sources")
        return system.open_input_file(path)
    return Path(where).open("rb")
