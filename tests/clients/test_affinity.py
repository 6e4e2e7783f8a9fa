"""The steps of a sequence go to one replica while it answers, and a request in parts is answered as the whole."""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack
from dataclasses import fields, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.clients import affinity
from knnlm.clients.call import Connection
from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.errors import InvalidRequest, Unavailable
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.testing import ToyLanguageModel
from services.lm.app import service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from tests.clients.fakes import LOOK_SECONDS, until


class Listening(ToyLanguageModel):
    """A toy that writes down what it is asked."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed=seed)
        self.seen: list[bytes] = []

    def forward(self, request: ForwardRequest) -> ForwardResult:
        self.seen += [tokens.tobytes() for tokens in request.tokens]
        return super().forward(request)


class Replicas:
    """Services of toys, which can be stopped one by one."""

    def __init__(self, *models: Listening) -> None:
        self.models = models
        self._stacks = [AsyncExitStack() for _ in models]
        self.target = ""

    async def __aenter__(self) -> "Replicas":
        ports = []
        for model, stack in zip(self.models, self._stacks, strict=True):
            settings = LmSettings(model="toy", port=0, grpc_port=0)
            host = await stack.enter_async_context(running(service(settings, partial(_given, model))))
            ports.append(host.grpc_port)
        self.target = ",".join(f"127.0.0.1:{port}" for port in ports)
        return self

    async def stop(self, number: int) -> None:
        await self._stacks[number].aclose()

    async def __aexit__(self, *exc: object) -> None:
        for stack in self._stacks:
            await stack.aclose()


def _given(model: Listening, _: LmSettings) -> Listening:
    return model


def sequences(count: int, length: int = 6) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(0)
    return [rng.integers(2, 200, length).astype(np.int32) for _ in range(count)]


def step(tokens: list[npt.NDArray[np.int32]], **wanted: Any) -> ForwardRequest:
    last = [np.array([len(one) - 1], np.int32) for one in tokens]
    return ForwardRequest(tokens, last, cache=True, **(wanted or {"keys": True}))


def grown(tokens: list[npt.NDArray[np.int32]], by: int) -> list[npt.NDArray[np.int32]]:
    return [np.append(one, np.int32(by + i)) for i, one in enumerate(tokens)]


def same(left: ForwardResult, right: ForwardResult) -> bool:
    pairs = [(getattr(left, f.name), getattr(right, f.name)) for f in fields(left) if f.name != "timings"]
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)


async def test_the_steps_of_a_sequence_go_to_one_replica() -> None:
    async with Replicas(Listening(), Listening(), Listening()) as replicas, GrpcLanguageModel(replicas.target) as lm:
        tokens = sequences(24)
        tokens += [tokens[0]] * 3  # choices of one prompt
        for by in range(5):
            await lm.forward(step(tokens))
            tokens = grown(tokens, by)
    homes = [{number for number, m in enumerate(replicas.models) if any(s.startswith(t) for s in m.seen)}
             for t in (one[:6].tobytes() for one in tokens)]  # fmt: skip
    assert all(len(home) == 1 for home in homes)
    assert homes[24] == homes[25] == homes[26] == homes[0]
    counts = Counter(next(iter(home)) for home in homes[:24])
    assert len(counts) == 3
    assert max(counts.values()) <= 16


async def test_the_parts_of_a_request_answer_as_the_whole() -> None:
    rng = np.random.default_rng(1)
    tokens = sequences(9, 12)
    positions = [np.sort(rng.choice(12, n, replace=False)).astype(np.int32) for n in (1, 0, 3, 2, 1, 0, 5, 1, 2)]
    n = sum(map(len, positions))
    request = ForwardRequest(
        tokens, positions, cache=True, full=True, keys=True, top_n=3, statistics=True,
        targets=rng.integers(200, size=n).astype(np.int32),
        candidates=[rng.integers(200, size=count).astype(np.int32) for count in rng.integers(0, 5, n)],
        temperatures=rng.uniform(0.5, 2, n).astype(np.float32),
    )  # fmt: skip
    whole = ToyLanguageModel().forward(request)
    async with Replicas(Listening(), Listening()) as replicas, GrpcLanguageModel(replicas.target) as lm:
        assert same(await lm.forward(request), whole)
        assert all(model.seen for model in replicas.models)
        assert same(await lm.forward(replace(request, cache=False)), replace(whole))
        with pytest.raises(InvalidRequest, match="nothing is wanted"):
            await lm.forward(ForwardRequest(tokens, positions, cache=True))


async def test_what_belongs_to_a_replica_that_is_away_is_asked_elsewhere() -> None:
    async with Replicas(Listening(), Listening()) as replicas:
        connection = Connection(replicas.target, look_seconds=LOOK_SECONDS)
        async with GrpcLanguageModel(connection) as lm:
            tokens = sequences(12)
            await lm.forward(step(tokens))
            stopped = asyncio.create_task(replicas.stop(0))
            for by in range(6):
                tokens = grown(tokens, by)
                result = await lm.forward(step(tokens))
                assert same(result, ToyLanguageModel().forward(step(tokens)))
            await stopped
            await until(lambda: sum(replica.up for replica in lm._caller.fleet.replicas) == 1)
            replicas.models[1].seen.clear()
            await lm.forward(step(grown(tokens, 9)))
    assert len(replicas.models[1].seen) == 12


async def test_replicas_with_different_models_give_no_answer() -> None:
    async with Replicas(Listening(), Listening(seed=1)) as replicas, GrpcLanguageModel(replicas.target) as lm:
        with pytest.raises(Unavailable, match="different models"):
            await lm.forward(step(sequences(12)))


def test_a_sequence_keeps_its_beginning_and_what_is_known_is_bounded() -> None:
    beginnings = affinity.Beginnings(max_known=100)
    tokens = sequences(1)[0]
    first = beginnings.of(tokens)
    for token in range(300):
        tokens = np.append(tokens, np.int32(token))
        assert beginnings.of(tokens) == first
        assert beginnings.of(tokens) == first  # asked twice in a step
    assert len(beginnings._known) == 100


def test_when_a_place_goes_only_its_own_move() -> None:
    places = [f"10.0.0.{i}:9001" for i in range(5)]
    names = [i.to_bytes(16, "big") for i in range(2000)]
    before = [affinity.highest(name, places) for name in names]
    after = [affinity.highest(name, places[:-1]) for name in names]
    assert all(a == b for a, b in zip(after, before, strict=True) if b != places[-1])
    assert min(Counter(before).values()) > 300
