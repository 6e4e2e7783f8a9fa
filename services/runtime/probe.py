"""`python -m services.runtime.probe datastore`: is the service in this container ready? Ends with 0 or 1, in 2 seconds.
`... datastore livez` asks whether it lives, which a service that is loading or drains does as well.

For HEALTHCHECK and exec probes. It reads the variables that the service itself reads (host, port, TLS), so that one
command fits however it is configured; flags of the service it cannot know. Over HTTPS it does not check the name in the
certificate, which is not that of loopback; where clients must present one, it presents the service's own, which
therefore must be of an authority in tls_client_ca_file. The standard library alone: it runs every few seconds.
"""

import http.client
import os
import signal
import ssl
import sys
from collections.abc import Mapping, Sequence
from types import FrameType

PORTS = {"aggregator": 8000, "lm": 8001, "datastore": 8002}  # as in the services' settings
ROUTES = ("readyz", "livez")
TIMEOUT_SECONDS = 2.0
ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  where a service that listens everywhere is asked


def main(arguments: Sequence[str]) -> int:
    """The exit status; why it is not 0 goes to standard error."""
    service, route = (*arguments, "", "")[:2]
    route = route or ROUTES[0]
    if len(arguments) > 2 or service not in PORTS or route not in ROUTES:
        print(f"usage: python -m services.runtime.probe {'|'.join(PORTS)} [{'|'.join(ROUTES)}]", file=sys.stderr)
        return 1
    signal.signal(signal.SIGALRM, _too_late)  # sockets have time limits per step, not for all of them together
    signal.setitimer(signal.ITIMER_REAL, TIMEOUT_SECONDS)
    try:
        said = problem(service, route, os.environ)
    except (OSError, ValueError, http.client.HTTPException) as err:
        said = f"{type(err).__name__}: {err}"
    if said is not None:
        print(said, file=sys.stderr)
    return 0 if said is None else 1


def problem(service: str, route: str, environ: Mapping[str, str]) -> str | None:
    """What the service says when its answer is not 200. Raises OSError, ValueError, HTTPException."""
    given = {name.upper(): value for name, value in environ.items()}  # as the service: either case

    def setting(name: str) -> str:
        return given.get(f"KNNLM_{service}_{name}".upper(), "")

    host, port = setting("host") or "127.0.0.1", int(setting("port") or PORTS[service])
    where = (ANY.get(host, host), port)
    cert_file = setting("tls_cert_file")
    connection: http.client.HTTPConnection
    if cert_file:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # loopback, and nothing is said that others must not hear
        if setting("tls_client_ca_file"):
            context.load_cert_chain(cert_file, setting("tls_key_file"))
        connection = http.client.HTTPSConnection(*where, timeout=TIMEOUT_SECONDS, context=context)
    else:
        connection = http.client.HTTPConnection(*where, timeout=TIMEOUT_SECONDS)
    try:
        connection.request("GET", f"/{route}")
        answer = connection.getresponse()
        text = answer.read(4096).decode(errors="replace")
    finally:
        connection.close()
    return None if answer.status == 200 else f"{answer.status} {text}"


def _too_late(number: int, frame: FrameType | None) -> None:  # noqa: ARG001  as signal.signal wants it
    raise TimeoutError(f"no answer within {TIMEOUT_SECONDS:g} s")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
