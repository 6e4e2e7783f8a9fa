"""Traces: what a service tells of the request it answers, and what it hands on to the services it asks in turn.

W3C trace context comes in (the traceparent and tracestate of an HTTP header or gRPC metadata) and goes out with every
call to another service: as it came when no collector is configured, else with this service's own span in it. What is
sent to a collector is in otlp.py, which is imported where there is one.
"""

import re
from dataclasses import dataclass
from typing import Protocol

from knnlm.errors import InvalidRequest
from services.runtime.calls import Call
from services.runtime.settings import HttpSettings, named

__all__ = ["Outcome", "Tracing", "carried", "tracing"]

_PARENT = re.compile(
    r"(?P<version>[0-9a-f]{2})-(?P<trace>[0-9a-f]{32})-(?P<span>[0-9a-f]{16})-[0-9a-f]{2}(?P<more>-.*)?"
)
_PRINTABLE = re.compile(r"[\x20-\x7e]{1,512}")


@dataclass(frozen=True)
class Outcome:
    """How a request ended. name: of its span. attributes: of the face, as OpenTelemetry calls them. failed: and by the
    service's fault.
    """

    name: str
    attributes: dict[str, str | int]
    failed: bool


class Tracing(Protocol):
    def begin(self, call: Call, traceparent: str | None, tracestate: str | None) -> None:
        """Put on the call what its own calls carry, and the trace's id."""
        ...

    def end(self, call: Call, outcome: Outcome) -> None:
        """Once per call that was begun."""
        ...

    def close(self) -> None:
        """Send what is left. Blocks, at most some seconds."""
        ...


class _Passing:
    """No collector: what comes in goes out."""

    def begin(self, call: Call, traceparent: str | None, tracestate: str | None) -> None:
        if traceparent is not None:
            call.carried = carried(traceparent, tracestate)
            if call.carried:
                call.trace_id = traceparent[3:35]

    def end(self, call: Call, outcome: Outcome) -> None:
        pass

    def close(self) -> None:
        pass


def tracing(service: str, settings: HttpSettings) -> Tracing:
    """By the settings. Raises InvalidRequest when OpenTelemetry is asked for and not installed."""
    if not settings.otlp_endpoint:
        return _Passing()
    try:
        from services.runtime.otlp import Recording  # where it is asked for, alone
    except ModuleNotFoundError as err:
        if not (err.name or "").startswith("opentelemetry"):
            raise
        raise InvalidRequest(
            f"{named(settings, 'otlp_endpoint')} needs OpenTelemetry: pip install 'knnlm[tracing]'"
        ) from err
    return Recording(service, settings.otlp_endpoint, settings.trace_sample_ratio)


def carried(traceparent: str, tracestate: str | None) -> tuple[tuple[str, str], ...]:
    """The pairs to hand on; none when the traceparent is not one, as the standard asks."""
    found = _PARENT.fullmatch(traceparent)
    if found is None or found["version"] == "ff" or (found["version"] == "00" and found["more"]):
        return ()
    if not (found["trace"].strip("0") and found["span"].strip("0") and _PRINTABLE.fullmatch(traceparent)):
        return ()
    state = tracestate is not None and _PRINTABLE.fullmatch(tracestate) is not None
    return (("traceparent", traceparent), *((("tracestate", str(tracestate)),) if state else ()))
