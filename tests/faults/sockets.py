"""HTTP as no library sends it, straight to a socket: what comes back is an answer or a closed connection, in time."""

import re
import socket
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress

import httpx

__all__ = ["CASES", "alive", "crowd", "dripped", "exchanged", "statuses"]

PATIENCE = 30.0  # seconds until a silence is called a hang
BODY = b'{"queries": [[0.0]], "k": 1}'
POST = b"POST /v1/domains/toy/search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n"
CLOSE = b"Connection: close\r\n"
LARGEST = 65_536  # bytes of a body, as the services of these tests are set
STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")


def _post(*headers: bytes, body: bytes = b"") -> bytes:
    return POST + CLOSE + b"".join(header + b"\r\n" for header in headers) + b"\r\n" + body


def _get(target: bytes) -> bytes:
    return b"GET " + target + b" HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n"


def _chunks(*sizes: int) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (size, b" " * size) for size in sizes) + b"0\r\n\r\n"


# what is sent, and the statuses that are right; None: the connection may be closed without one
CASES: Mapping[str, tuple[bytes, set[int | None]]] = {
    "an absurd content-length": (_post(b"Content-Length: 99999999999999999999", body=BODY), {400, 413, None}),
    "a content-length over the limit": (_post(b"Content-Length: %d" % (LARGEST + 1), body=BODY), {413}),
    "a negative content-length": (_post(b"Content-Length: -1", body=BODY), {400}),
    "a content-length that is no number": (_post(b"Content-Length: 1e3", body=BODY), {400}),
    "a content-length in Arabic": (_post("Content-Length: ١٢".encode(), body=BODY), {400}),
    "two content-lengths": (_post(b"Content-Length: 5", b"Content-Length: 28", body=BODY), {400}),
    "length and chunks": (_post(b"Content-Length: 28", b"Transfer-Encoding: chunked", body=_chunks(28)), {400}),
    "chunks over the limit": (_post(b"Transfer-Encoding: chunked", body=_chunks(*[4096] * 20)), {413}),
    "a chunk of no number": (_post(b"Transfer-Encoding: chunked", body=b"zz\r\n\r\n"), {400}),
    "a chunk of huge size": (_post(b"Transfer-Encoding: chunked", body=b"f" * 40 + b"\r\nx"), {400, 413}),
    "chunks of one byte": (_post(b"Transfer-Encoding: chunked", body=_chunks(*[1] * 500)), {400}),
    "another transfer-encoding": (_post(b"Transfer-Encoding: gzip", body=BODY), {400, 501}),
    "a path that is not UTF-8": (_get(b"/v1/domains/%ff%fe"), {400, 404}),
    "a path of raw bytes": (_get(b"/v1/domains/\xff\xfe"), {400, 404}),
    "a path of zeros": (_get(b"/v1/domains/%00%00"), {400, 404}),
    "a path that goes up": (_get(b"/v1/domains/%2e%2e%2f%2e%2e%2fetc"), {400, 404}),
    "a query that is not UTF-8": (_get(b"/v1/domains/toy?version=%ff%fe"), {400, 404}),
    "a query of half escapes": (_get(b"/v1/domains/toy?version=%f&version=%"), {400, 404}),
    "a path of 60 KB": (_get(b"/v1/domains/" + b"x" * 60_000), {400, 404, 414, 431, None}),
    "an absolute target": (_get(b"http://elsewhere/livez"), {200, 400, 404}),
    "an asterisk": (b"OPTIONS * HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n", {400, 404, 405}),
    "a tunnel": (b"CONNECT elsewhere:443 HTTP/1.1\r\nHost: x\r\n\r\n", {400, 404, 405, None}),
    "an unknown method": (b"BREW /livez HTTP/1.1\r\nHost: x\r\n" + CLOSE + b"\r\n", {400, 405}),
    "HTTP/1.0": (b"GET /livez HTTP/1.0\r\n\r\n", {200}),
    "HTTP/1.0 kept alive": (b"GET /livez HTTP/1.0\r\nConnection: keep-alive\r\n\r\nGET /livez HTTP/1.0\r\n\r\n", {200}),
    "HTTP/0.9": (b"GET /livez\r\n\r\n", {200, 400, None}),
    "HTTP/2 without asking": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(30), {400, None}),
    "an upgrade": (GET + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Key: x\r\n"
                   b"Sec-WebSocket-Version: 13\r\n\r\n" + GET + CLOSE + b"\r\n", {200, 400}),
    "TLS": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) * 2, {400, None}),
    "zeros": (bytes(10_000), {400, None}),
    "no host": (b"GET /livez HTTP/1.1\r\n" + CLOSE + b"\r\n", {200, 400}),
    "a folded header": (_get(b"/livez")[:-2] + b"X: a\r\n b\r\n\r\n", {200, 400}),
    "a header with a return": (_get(b"/livez")[:-2] + b"X: a\rb\r\n\r\n", {200, 400}),
    "ten thousand headers": (_get(b"/livez")[:-2] + b"X-A: b\r\n" * 10_000 + b"\r\n", {200, 400, 431, None}),
    "a header of a megabyte": (_get(b"/livez")[:-2] + b"X-A: " + b"b" * 1_000_000 + b"\r\n\r\n", {200, 400, 431, None}),
    "a deadline of nothing": (_get(b"/v1/domains")[:-2] + b"X-Request-Timeout: nan\r\n\r\n", {400}),
    "a deadline of eternity": (_get(b"/v1/domains")[:-2] + b"X-Request-Timeout: inf\r\n\r\n", {200}),
    "an id that breaks lines": (_get(b"/v1/domains")[:-2] + b"X-Request-Id: a\tb%0d%0a\r\n\r\n", {200, 400}),
    "a trace that is none": (_get(b"/v1/domains")[:-2] + b"traceparent: 00-" + b"z" * 5000 + b"\r\n\r\n", {200}),
    "JSON so deep": (_post(b"Content-Length: 60000", body=b"[" * 60_000), {400}),
    "a number of many digits": (_post(b"Content-Length: 60000", body=b"9" * 60_000), {400}),
    "JSON in UTF-16": (_post(b"Content-Length: 10", body="{}".encode("utf-16") + b"\0\0\0\0"), {400}),
    "three at once": ((GET + b"\r\n") * 2 + GET + CLOSE + b"\r\n", {200}),
    "a body for who takes none": (GET + CLOSE + b"Content-Length: 5\r\n\r\nhello", {200, 400}),
}  # fmt: skip


def statuses(answer: bytes) -> list[int]:
    return [int(found) for found in STATUS.findall(answer)]


def exchanged(port: int, data: bytes, *, half_closed: bool = False) -> bytes:
    """All that comes back until the service closes. Raises TimeoutError when it stays silent and open."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        with suppress(ConnectionError):  # it may have refused before all was sent
            connection.sendall(data)
            if half_closed:
                connection.shutdown(socket.SHUT_WR)
        received = b""
        with suppress(ConnectionError):
            while part := connection.recv(65_536):
                received += part
        return received


def dripped(port: int, parts: Iterable[bytes]) -> bytes:
    """Send part by part until the service answers or closes, without an end of it; what it said."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        received = b""
        with suppress(ConnectionError):
            for part in parts:
                connection.sendall(part)
                connection.settimeout(0.05)
                with suppress(TimeoutError):
                    received += connection.recv(65_536)
                    break
                connection.settimeout(PATIENCE)
        return received


@contextmanager
def crowd(port: int, count: int) -> Iterator[list[socket.socket]]:
    """So many open connections that have said half of a request."""
    connections = []
    try:
        for _ in range(count):
            connection = socket.create_connection(("127.0.0.1", port), timeout=PATIENCE)
            connection.sendall(GET)
            connections.append(connection)
        yield connections
    finally:
        for connection in connections:
            connection.close()


def alive(port: int) -> None:
    """It answers as if nothing had been."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE) as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 200
        found = client.post("/v1/domains/toy/search", json={"queries": [[0.0] * 16], "k": 1})
        assert found.status_code == 200, found.text
