"""Making keys through a client: the same as in process, in answers that fit, from the model it was asked for."""

import asyncio
import dataclasses
import threading
from collections.abc import Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import pytest

from knnlm.clients import encoder as module
from knnlm.clients.encoder import RemoteEncoder
from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.reader import Datastore
from knnlm.errors import InvalidRequest, ModelError, Overloaded, TooLarge, Unavailable
from knnlm.messages import Document, ForwardRequest, ForwardResult, ModelInfo
from knnlm.testing import TEXTS, ToyLanguageModel
from knnlm.transport.context import outgoing, outgoing_id
from services.lm.app import service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running

DOCUMENTS = [Document(str(i), text) for i, text in enumerate(TEXTS)]


class Client:
    """A toy behind the protocol of clients. most_rows: more are too large for it."""

    def __init__(self, lm: ToyLanguageModel | None = None, most_rows: int = 1 << 30) -> None:
        self.lm = lm or ToyLanguageModel()
        self.most_rows = most_rows
        self.rows: list[int] = []
        self.loops: set[asyncio.AbstractEventLoop] = set()
        self.ids: list[str | None] = []
        self.closed = 0

    async def forward(self, request: ForwardRequest) -> ForwardResult:
        self.loops.add(asyncio.get_running_loop())
        self.ids.append(outgoing_id())
        self.rows.append(sum(map(len, request.positions)))
        if self.rows[-1] > self.most_rows:
            raise TooLarge(f"at most {self.most_rows}")
        return self.lm.forward(request)

    async def get_model(self) -> ModelInfo:
        return self.lm.info

    async def get_tokenizer(self) -> str:
        return self.lm.tokenizer.json

    async def get_chat_template(self) -> str | None:
        return None

    async def aclose(self) -> None:
        self.closed += 1


def request(*lengths: int) -> ForwardRequest:
    """Sequences of so many tokens, keys after each but the first."""
    rng = np.random.default_rng(0)
    return ForwardRequest(
        [rng.integers(2, 200, n).astype(np.int32) for n in lengths],
        [np.arange(1, n, dtype=np.int32) for n in lengths],
        keys=True,
    )


def keys(result: ForwardResult) -> np.ndarray[tuple[int, ...], np.dtype[np.floating]]:
    assert result.keys is not None
    return result.keys


def test_a_datastore_made_through_a_service_is_that_made_in_process(tmp_path: Path) -> None:
    made: list[Path] = []

    async def check() -> None:
        settings = LmSettings(model="toy", port=0, grpc_port=0, max_tokens=100, max_rows=70)
        async with running(service(settings, lambda _: ToyLanguageModel())) as host:

            def work() -> Path:
                with RemoteEncoder(GrpcLanguageModel(f"127.0.0.1:{host.grpc_port}")) as lm:
                    return build(DOCUMENTS, lm, Catalog(tmp_path / "remote"), "toy", key_dtype="float32")

            made.append(await asyncio.to_thread(work))

    asyncio.run(check())
    twin = Datastore.open(build(DOCUMENTS, ToyLanguageModel(), Catalog(tmp_path / "own"), "toy", key_dtype="float32"))
    remote = Datastore.open(made[0], expect=ToyLanguageModel().info)
    np.testing.assert_array_equal(remote.keys, twin.keys)
    np.testing.assert_array_equal(remote.values, twin.values)


@pytest.mark.parametrize("most_rows", [1, 2, 7, 31, 1000])
def test_what_is_too_large_for_the_service_is_sent_in_parts(most_rows: int) -> None:
    asked = request(32, 5, 1, 20, 32)
    client = Client(most_rows=most_rows)
    with RemoteEncoder(client) as lm:
        np.testing.assert_array_equal(keys(lm.forward(asked)), keys(ToyLanguageModel().forward(asked)))
    assert sum(n for n in client.rows if n <= most_rows) == 31 + 4 + 19 + 31


@pytest.mark.parametrize(("name", "limit"), [("MAX_ANSWER_BYTES", 16 * 4 * 10), ("MAX_REQUEST_TOKENS", 10)])
def test_what_is_known_not_to_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch, name: str, limit: int) -> None:
    monkeypatch.setattr(module, name, limit)
    asked = request(9, 9, 3, 3, 11)
    client = Client()
    with RemoteEncoder(client) as lm:
        np.testing.assert_array_equal(keys(lm.forward(asked)), keys(ToyLanguageModel().forward(asked)))
    assert max(client.rows) <= 10
    assert len(client.rows) > 2


def test_what_cannot_be_parted_is_the_error_of_the_service() -> None:
    with RemoteEncoder(Client(most_rows=0)) as lm, pytest.raises(TooLarge, match="at most 0"):
        lm.forward(request(3))


def test_errors_of_the_client_pass() -> None:
    class Busy(Client):
        async def forward(self, request: ForwardRequest) -> ForwardResult:
            raise Overloaded(f"{len(request.tokens)} are too many now", retry_after=3.0)

    with RemoteEncoder(Busy()) as lm, pytest.raises(Overloaded, match="2 are too many now") as caught:
        lm.forward(request(3, 3))
    assert caught.value.retry_after == 3.0


def test_a_model_that_was_changed_is_not_used() -> None:
    client = Client()
    with RemoteEncoder(client) as lm:
        fingerprint = lm.info.fingerprint
        client.lm = ToyLanguageModel(seed=1)
        with pytest.raises(
            Unavailable, match=f"has fingerprint {fingerprint}, the answer {client.lm.info.fingerprint}"
        ):
            lm.forward(request(3))


def test_nothing_but_keys_is_given() -> None:
    with RemoteEncoder(Client()) as lm:
        targets = {"targets": np.zeros(2, np.int32)}
        for change in ({"full": True}, {"top_n": 3}, targets, {"statistics": True}, {"keys": False}):
            with pytest.raises(InvalidRequest, match="expected keys alone"):
                lm.forward(dataclasses.replace(request(3), **change))


def test_its_own_loop_and_the_client_end_with_it() -> None:
    before = threading.active_count()
    client = Client()
    with RemoteEncoder(client) as lm:
        lm.forward(request(3))
        assert threading.active_count() == before + 1
    lm.close()
    assert (threading.active_count(), client.closed) == (before, 1)
    assert all(loop.is_closed() for loop in client.loops)


def test_nothing_is_left_when_the_model_cannot_be_asked() -> None:
    class Gone(Client):
        async def get_model(self) -> ModelInfo:
            raise Unavailable("nobody there")

    class Odd(Client):
        async def get_tokenizer(self) -> str:
            return "{}"

    before = threading.active_count()
    for client, error in ((Gone(), Unavailable), (Odd(), ModelError)):
        with pytest.raises(error):
            RemoteEncoder(client)
        assert (threading.active_count(), client.closed) == (before, 1)


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield loop
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_a_loop_that_is_given_stays_and_so_does_its_client(loop: asyncio.AbstractEventLoop) -> None:
    client = Client()
    with RemoteEncoder(client, loop=loop) as lm:
        lm.forward(request(3))
    assert (client.loops, client.closed, loop.is_running()) == ({loop}, 0, True)


def test_the_id_of_the_request_it_serves_goes_with_its_calls() -> None:
    client = Client()
    with RemoteEncoder(client) as lm, outgoing(request_id="abc"):
        lm.forward(request(3))
    assert client.ids == ["abc"]


def test_a_call_that_nobody_waits_for_is_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    cancelled = threading.Event()

    class Slow(Client):
        async def forward(self, request: ForwardRequest) -> ForwardResult:
            self.rows.append(len(request.tokens))
            try:
                return await asyncio.Future()
            except asyncio.CancelledError:
                cancelled.set()
                raise

    begin = asyncio.run_coroutine_threadsafe

    def interrupted(
        call: Coroutine[None, None, ForwardResult], loop: asyncio.AbstractEventLoop
    ) -> "Future[ForwardResult]":
        future = begin(call, loop)

        def result() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(future, "result", result)
        return future

    lm = RemoteEncoder(Slow())
    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm.forward(request(3))
    monkeypatch.undo()
    assert cancelled.wait(30)
    lm.close()
