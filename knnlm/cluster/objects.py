"""Files at URLs, in an object store or wherever else pyarrow's file systems reach."""

import re
from typing import Any
from urllib.parse import quote, urlsplit

import numpy as np
import numpy.typing as npt

from knnlm.errors import DatastoreCorrupt, DatastoreError, InvalidRequest

URL = re.compile(r"[a-z][a-z0-9+.-]*://")
BUCKETS = ("s3", "gs", "gcs")  # schemes whose address begins with a bucket


def located(url: str, param: str) -> tuple[Any, str]:  # Any: pyarrow has no types
    """The file system of a URL, and the path in it. Raises InvalidRequest that names `param`, also for a URL with a
    password: URLs are written down in the build's folder and shown."""
    from pyarrow import ArrowException, fs

    try:
        parts = urlsplit(url)
        secret = parts.password
    except ValueError as err:
        raise InvalidRequest(f"{param} is no address of files: {err}", param=param) from err
    if parts.scheme in BUCKETS and not parts.netloc:
        raise InvalidRequest(f"{url} names no bucket: expected {parts.scheme}://BUCKET/FOLDER", param=param)
    if secret is not None:
        raise InvalidRequest(
            f"{param} holds a password: give keys by the environment (AWS_ACCESS_KEY_ID) or the store's own files",
            param=param,
        )
    try:
        system, path = fs.FileSystem.from_uri(url)
    except (ArrowException, ValueError) as err:
        raise InvalidRequest(f"{url} is no address of files: {err}", param=param) from err
    except OSError as err:  # a bucket's region is asked for
        raise InvalidRequest(f"{url} cannot be reached: {err}", param=param) from err
    return system, path.rstrip("/")


def below(url: str, name: str) -> str:
    """The URL of the file `name`, whatever its characters, in the folder at `url`; options after a question mark stay
    where they are."""
    folder, mark, options = url.partition("?")
    return f"{folder.rstrip('/')}/{quote(name)}{mark}{options}"


def make_folder(url: str, param: str) -> None:
    """Make the folder at `url`. Raises InvalidRequest that names `param` where nothing can be written."""
    system, path = located(url, param)
    try:
        system.create_dir(path, recursive=True)
    except OSError as err:
        raise InvalidRequest(f"{url} cannot be written: {err}", param=param) from err


def write_object(url: str, rows: npt.NDArray[Any]) -> None:  # Any: float16, float32 or int32
    """Write the bytes of an array as one object, in a folder that exists. A writer that is killed leaves none, or
    one of another size or content. Raises OSError."""
    system, path = located(url, "parts_at")
    with system.open_output_stream(path) as stream:
        stream.write(np.ascontiguousarray(rows).data.cast("B"))


def read_object(url: str, shape: tuple[int, ...], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """What `write_object` wrote. Raises DatastoreCorrupt when it is not there or has another size; OSError."""
    system, path = located(url, "parts_at")
    try:
        with system.open_input_stream(path) as stream:
            data: bytes = stream.read()
    except FileNotFoundError as err:
        raise DatastoreCorrupt(f"{url} is missing") from err
    expected = np.dtype(dtype).itemsize * int(np.prod(shape))
    if len(data) != expected:
        raise DatastoreCorrupt(f"{url} has {len(data)} bytes, expected {expected}")
    return np.frombuffer(data, dtype).reshape(shape)


def discard_objects(url: str) -> None:
    """Remove the folder at `url` and all that is in it; nothing where there is none. Raises DatastoreError."""
    from pyarrow import fs

    system, path = located(url, "parts_at")
    try:
        if system.get_file_info(path).type == fs.FileType.Directory:
            system.delete_dir(path)
    except OSError as err:
        raise DatastoreError(f"{url} cannot be removed: {err}") from err
