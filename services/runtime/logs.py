"""Events, one line each: key=value or JSON, with the ids of request and trace. Never prompt text, never a secret."""

import json
import logging
import math
import re
import sys
import time
from collections.abc import Mapping
from functools import lru_cache

from services.runtime.calls import ids

__all__ = ["configure", "event"]

_FIELDS = "knnlm_fields"
_SUSPECT = re.compile(
    r'[ "=]|[^\x20-\x7e]'
)  # what may need quotes: of the letters beyond ASCII, those that do not print


def event(logger: logging.Logger, name: str, level: int = logging.INFO, /, **fields: object) -> None:
    """Log one event with its fields; at level ERROR, with the traceback of the exception being handled."""
    traced = level == logging.ERROR and sys.exc_info()[0] is not None
    if logger.isEnabledFor(level):
        # made here: Logger.log looks through the stack for its caller, which no line shows
        record = logging.LogRecord(logger.name, level, "", 0, name, (), sys.exc_info() if traced else None)
        setattr(record, _FIELDS, fields)
        logger.handle(record)


def configure(log_format: str, log_level: str) -> None:
    """Send every log line of the process to stderr in one form. Called once, by the process' main."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if log_format == "json" else _KeyValue())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(log_level.upper())
    for chatty in ("uvicorn", "grpc", "httpx", "httpcore", "asyncio", "faiss", "opentelemetry", "urllib3"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))


def _record(record: logging.LogRecord) -> dict[str, object]:
    stamp = f"{_second(int(record.created))}.{int(record.msecs):03d}Z"
    fields: Mapping[str, object] = getattr(record, _FIELDS, {})
    line: dict[str, object] = {"time": stamp, "level": record.levelname.lower(), "event": record.getMessage()}
    return {**line, **ids(), **fields}


@lru_cache(maxsize=8)  # many lines share a second
def _second(number: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(number))


class _KeyValue(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = " ".join(f"{key}={_plain(value)}" for key, value in _record(record).items())
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = _record(record)
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps({key: _finite(value) for key, value in line.items()}, default=str)


def _finite(value: object) -> object:
    """JSON has no NaN and no infinity: they are text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    text = str(value)
    if text and _SUSPECT.search(text) is None:
        return text
    return text if text and not any(c in ' "=' or not c.isprintable() for c in text) else json.dumps(text)
