"""HTTP as no library sends it: answered or closed, and the service lives on."""

import socket
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager

import pytest

from services.runtime.lifecycle import Host
from tests.faults.knocking import datastore
from tests.faults.sockets import BODY, CASES, GET, LARGEST, alive, crowd, dripped, exchanged, statuses
from tests.faults.threads import in_a_thread


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    store = tmp_path_factory.mktemp("store")

    def opened() -> AbstractAsyncContextManager[Host]:
        return datastore(store, max_body_bytes=LARGEST, request_timeout_s=2.0, keep_alive_timeout_s=1)

    with in_a_thread(opened) as host:
        yield host.port


@pytest.mark.parametrize("name", sorted(CASES))
def test_odd_http_is_answered_or_closed(name: str, port: int) -> None:
    data, expected = CASES[name]
    found = statuses(exchanged(port, data))
    assert {*found} <= expected, found
    assert found or None in expected, "closed without an answer"
    alive(port)


def test_half_closed_callers_are_answered(port: int) -> None:
    assert statuses(exchanged(port, GET + b"Connection: close\r\n\r\n", half_closed=True)) in ([200], [])
    alive(port)


def test_pipelined_requests_are_answered_in_order(port: int) -> None:
    many = (GET + b"\r\n") * 49 + b"GET /nowhere HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    assert statuses(exchanged(port, many)) == [200] * 49 + [404]


def test_a_body_that_never_ends_is_answered_when_the_time_is_over(port: int) -> None:
    """504, and the place in the service is free again."""
    head = b"POST /v1/domains/toy/search HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    announced = head + b"Connection: close\r\nContent-Length: 1000\r\n\r\n"
    assert statuses(dripped(port, [announced, *[b" "] * 900])) == [504]
    assert statuses(exchanged(port, announced + BODY, half_closed=True)) in ([504], [])
    alive(port)


def test_endless_headers_are_cut_off(port: int) -> None:
    """Before anything is known of the caller: what it may make the service hold is bounded."""
    megabyte = b"".join(b"X-%d: %s\r\n" % (number, b"b" * 1000) for number in range(1000))
    sent = []

    def flood() -> Iterator[bytes]:
        yield GET
        for number in range(16):
            sent.append(number)
            yield megabyte

    found = statuses(dripped(port, flood()))
    assert len(sent) < 16, "16 MB of headers were taken"
    assert set(found) <= {400, 431}
    alive(port)


def test_half_a_request_does_not_hold_its_connection_forever(port: int) -> None:
    """request_timeout_s is 2 here: the head of a request is part of it."""
    with socket.create_connection(("127.0.0.1", port), timeout=15) as connection:
        connection.sendall(GET)
        assert connection.recv(1000)[:12] in (b"", b"HTTP/1.1 408", b"HTTP/1.1 400")


def test_five_hundred_callers_that_say_half_keep_nobody_waiting(port: int) -> None:
    with crowd(port, 500) as connections:
        alive(port)
        for connection in connections[::50]:
            connection.sendall(b"Connection: close\r\n\r\n")
            assert statuses(connection.recv(1000)) in ([200], []), "neither answered nor closed"
    alive(port)
