"""Server-sent events, as the aggregator streams completions."""

import json
from collections.abc import Iterator

from knnlm.clients.failures import rebuild
from knnlm.clients.routes import Json
from knnlm.errors import KnnlmError, Unavailable


class EventReader:
    """The events of a stream: lines that begin with data:, the last of which says [DONE]."""

    def __init__(self, where: str) -> None:
        self._where = where
        self._rest = b""
        self._complete = False

    def events(self, chunk: bytes) -> Iterator[Json]:
        """Those that the chunk completes. Raises the error that the service tells in one of them."""
        *lines, self._rest = (self._rest + chunk).split(b"\n")
        for line in lines:
            data = line.removeprefix(b"data:").strip()
            if data == line.strip():
                continue  # empty, a comment or another field
            if data == b"[DONE]":
                self._complete = True
                continue
            yield self._event(data)

    def check_complete(self) -> None:
        """Raises Unavailable for a stream that ended before it said so."""
        if not self._complete:
            raise Unavailable(f"{self._where} broke the stream off")

    def _event(self, data: bytes) -> Json:
        try:
            event = json.loads(data)
        except ValueError as err:
            raise KnnlmError(f"{self._where} streamed something that is not JSON") from err
        if not isinstance(event, dict):
            raise KnnlmError(f"{self._where} streamed {type(event).__name__}, expected a JSON object")
        error = event.get("error")
        if isinstance(error, dict):
            raise rebuild(str(error.get("code")), str(error.get("message")), param=error.get("param"))
        return event
