"""Many bad requests at a service in this process, and what none of them may come to."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.message import Message

from knnlm.protocols import LanguageModel
from knnlm.testing import ToyLanguageModel, toy_datastore
from knnlm.v1 import datastore_pb2, lm_pb2
from services.datastore.app import service as datastore_service
from services.datastore.settings import DatastoreSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import Host, running
from tests.faults.damage import indexed
from tests.faults.messages import Method, fuzzed

__all__ = ["MODULES", "PATIENCE", "codes", "datastore", "lm", "random_messages"]

PATIENCE = 30.0  # seconds for one answer: far more than any takes, far less than a hang
TOGETHER = 8
C = grpc.StatusCode
# what a caller can cause. UNAVAILABLE: adding documents where there is no lm service
REFUSALS = frozenset({C.OK, C.INVALID_ARGUMENT, C.NOT_FOUND, C.FAILED_PRECONDITION})
MODULES = {"datastore": datastore_pb2, "lm": lm_pb2}


@asynccontextmanager
async def datastore(store: Path, **settings: Any) -> AsyncIterator[Host]:
    """Domain toy with a version of each kind of index, domain grown to add to and remove from."""
    if not (store / "toy").exists():
        indexed(store, "ivf8,sq8")
        toy_datastore(store, version="v2", activate=False)
        toy_datastore(store, domain="grown")

    @contextmanager
    def encoder() -> Any:
        lm: LanguageModel = ToyLanguageModel()
        yield lm

    given = DatastoreSettings(store=store, port=0, grpc_port=0, log_level="error", **settings)
    async with running(datastore_service(given, open_encoder=encoder)) as host:
        yield host


@asynccontextmanager
async def lm(model: LanguageModel | None = None, **settings: Any) -> AsyncIterator[Host]:
    given = LmSettings(model="given", port=0, grpc_port=0, log_level="error", **settings)
    async with running(lm_service(given, lambda _: model or ToyLanguageModel())) as host:
        yield host


def random_messages(methods_: Sequence[Method], count: int, seed: int) -> list[tuple[str, type[Message], bytes]]:
    rng = random.Random(seed)
    chosen = (methods_[i % len(methods_)] for i in range(count))
    return [(path, taken, fuzzed(taken, rng)) for path, taken in chosen]


async def codes(host: Host, asked: Iterable[tuple[str, type[Message], bytes]]) -> Counter[str]:
    """Ask all of it over gRPC, some at a time. Statuses by rpc; AssertionError with the bytes of who got another."""
    waiting = list(asked)[::-1]
    seen: Counter[str] = Counter()
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{host.grpc_port}", options=options) as channel:

        async def client() -> None:
            while waiting:
                path, _, raw = waiting.pop()
                asked_for: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path)
                call = asked_for(raw, timeout=PATIENCE)
                code, detail = await call.code(), await call.details()
                assert code in REFUSALS, f"{path} of {raw[:200]!r} ({len(raw)} bytes) gave {code}: {detail}"
                seen[f"{path.rpartition('/')[2]} {code.name}"] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(TOGETHER):
                group.create_task(client())
    return seen
