"""In process, over gRPC and over HTTP a language model gives the same answers and the same errors."""

import asyncio
from dataclasses import fields, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.errors import InvalidRequest, KnnlmError, TooLarge
from knnlm.messages import ForwardRequest, ForwardResult
from knnlm.protocols import LanguageModelClient
from knnlm.testing import ToyLanguageModel
from services.lm.app import service
from services.lm.settings import LmSettings
from services.runtime.service import Service
from tests.services.faces import lm_faces
from tests.services.waiting import SlowModel, held, until


def ids(*tokens: int) -> npt.NDArray[np.int32]:
    return np.array(tokens, np.int32)


REQUEST = ForwardRequest([ids(0, 7, 9, 30), ids(0, 8)], [ids(1, 3), ids(0, 1)])
CANDIDATES = [ids(5, 6), ids(), ids(6, 6, 9), ids(0)]
TEMPERATURES = np.array([0.5, 1, 2, 0.01], np.float32)
EVERYTHING = replace(
    REQUEST, full=True, targets=ids(5, 6, 7, 8), top_n=3, keys=True, statistics=True, candidates=CANDIDATES,
    temperatures=TEMPERATURES, cache=True,
)  # fmt: skip


def lm_service(model: ToyLanguageModel | None = None, **settings: Any) -> Service:
    return service(LmSettings(model="toy", port=0, grpc_port=0, **settings), lambda _: model or ToyLanguageModel())


def same(left: ForwardResult, right: ForwardResult) -> bool:
    pairs = [(getattr(left, f.name), getattr(right, f.name)) for f in fields(left) if f.name != "timings"]
    return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)


async def outcome(client: LanguageModelClient, request: ForwardRequest) -> tuple[str, str | None]:
    try:
        await client.forward(request)
    except KnnlmError as err:
        return err.code, err.param
    return "ok", None


async def test_a_body_of_too_many_listed_numbers_is_not_parsed() -> None:
    async with lm_faces(lm_service()) as (_, clients):
        request = ForwardRequest([np.zeros(1 << 18, np.int32)], [ids(0)], keys=True)
        with pytest.raises(TooLarge, match=r"262144 values .* \(pack large arrays"):
            await clients["http list"].forward(request)


async def test_every_face_answers_as_the_model_does() -> None:
    requests = [
        EVERYTHING,
        replace(REQUEST, full=True),
        replace(REQUEST, targets=ids(1, 2, 3, 4)),
        replace(REQUEST, top_n=1),
        replace(REQUEST, keys=True),
        replace(REQUEST, statistics=True),
        replace(REQUEST, candidates=CANDIDATES),
        replace(REQUEST, candidates=[ids()] * 4),
        replace(REQUEST, temperatures=TEMPERATURES),
        replace(REQUEST, positions=[ids(), ids(1)], keys=True),
    ]

    model = ToyLanguageModel()
    async with lm_faces(lm_service()) as (_, clients):
        for request in requests:
            for name, client in clients.items():
                assert same(await client.forward(request), model.forward(request)), (name, request)


async def test_no_positions_give_no_rows_of_the_right_width() -> None:
    request = replace(REQUEST, positions=[ids(), ids()], top_n=2)
    async with lm_faces(lm_service()) as (_, clients):
        for name in ("grpc", "http base64"):  # a list of no rows cannot say how wide they would be
            top_tokens = (await clients[name].forward(request)).top_tokens
            assert top_tokens is not None
            assert top_tokens.shape == (0, 2)


async def test_every_face_tells_the_model_and_its_tokenizer() -> None:
    model = ToyLanguageModel()
    for template in (None, "", "{{ messages }}"):
        model.tokenizer.chat_template = template
        async with lm_faces(lm_service(model)) as (_, clients):
            for client in clients.values():
                assert await client.get_model() == model.info
                assert await client.get_tokenizer() == model.tokenizer.json
                assert await client.get_chat_template() == template


BAD = {
    "nothing wanted": (REQUEST, InvalidRequest, None),
    "no sequence": (ForwardRequest([], [], full=True), InvalidRequest, None),
    "empty sequence": (ForwardRequest([ids()], [ids()], full=True), InvalidRequest, "tokens"),
    "too long": (ForwardRequest([ids(*[1] * 33)], [ids(0)], full=True), InvalidRequest, "tokens"),
    "token over the vocabulary": (ForwardRequest([ids(9999)], [ids(0)], full=True), InvalidRequest, "tokens"),
    "negative token": (ForwardRequest([ids(-1)], [ids(0)], full=True), InvalidRequest, "tokens"),
    "position outside": (ForwardRequest([ids(1)], [ids(1)], full=True), InvalidRequest, "positions"),
    "positions descend": (ForwardRequest([ids(1, 2)], [ids(1, 0)], full=True), InvalidRequest, "positions"),
    "position twice": (ForwardRequest([ids(1, 2)], [ids(1, 1)], full=True), InvalidRequest, "positions"),
    "target outside": (replace(REQUEST, targets=ids(1, 2, 3, 9999)), InvalidRequest, "targets"),
    "too few targets": (replace(REQUEST, targets=ids(1)), InvalidRequest, "targets"),
    "candidate outside": (replace(REQUEST, candidates=[ids()] * 3 + [ids(9999)]), InvalidRequest, "candidates"),
    "too few candidates": (replace(REQUEST, candidates=CANDIDATES[:3]), InvalidRequest, None),
    "too few temperatures": (replace(REQUEST, temperatures=TEMPERATURES[:3]), InvalidRequest, "temperatures"),
    "temperature 0": (replace(REQUEST, temperatures=0 * TEMPERATURES), InvalidRequest, "temperatures"),
    "temperature nan": (replace(REQUEST, temperatures=np.nan * TEMPERATURES), InvalidRequest, "temperatures"),
    "too many candidates": (replace(REQUEST, candidates=[ids(*[1] * 4000)] * 4), TooLarge, "positions"),
    "top_n negative": (replace(REQUEST, top_n=-1), InvalidRequest, "top_n"),
    "top_n over the vocabulary": (replace(REQUEST, top_n=10**6), InvalidRequest, "top_n"),
    "too many tokens": (ForwardRequest([ids(*[1] * 30)] * 3, [ids(0)] * 3, keys=True), TooLarge, "tokens"),
    "too many rows": (ForwardRequest([ids(*[1] * 20)] * 4, [ids(*range(19))] * 4, keys=True), TooLarge, "positions"),
    "answer too large": (ForwardRequest([ids(1)] * 70, [ids(0)] * 70, full=True), TooLarge, "positions"),
}


async def test_every_face_refuses_bad_requests_alike() -> None:
    bounded = lm_service(max_tokens=80, max_rows=75, grpc_max_message_bytes=65536)
    async with lm_faces(bounded) as (_, clients):
        for name, (request, expected, param) in BAD.items():
            outcomes = {face: await outcome(client, request) for face, client in clients.items()}
            assert len(set(outcomes.values())) == 1, (name, outcomes)
            code, given = outcomes["grpc"]
            assert code == expected.code, name
            assert param in (None, given), name


async def test_requests_that_run_together_are_answered_as_alone() -> None:
    requests = [
        replace(
            EVERYTHING, tokens=[ids(0, i, i + 1, 5), ids(0, 8)], targets=ids(i, 2, 3, i),
            candidates=[ids(*range(i)), ids(), ids(4), ids(i)], temperatures=TEMPERATURES * i,
        )
        for i in range(2, 30)
    ]  # fmt: skip
    requests += (
        [replace(REQUEST, keys=True)] * 3
        + [replace(REQUEST, keys=True, cache=True)] * 3
        + [replace(REQUEST, keys=True, statistics=True)] * 3
    )
    model = ToyLanguageModel()
    slow = SlowModel()
    async with lm_faces(lm_service(slow)) as (host, clients):
        answers = [asyncio.create_task(clients["grpc"].forward(request)) for request in requests]
        await until(lambda: held(host) == 6 * len(requests))  # each has six tokens
        slow.gate.set()
        results = await asyncio.gather(*answers)
        batches = host.service.metrics.registry.get_sample_value("knnlm_batch_rows_count")
    assert all(same(result, model.forward(request)) for result, request in zip(results, requests, strict=True))
    assert batches in (4, 5)  # what came first and held up the others, and the rest of each of the four kinds


async def test_a_bad_request_does_not_spoil_the_batch_it_is_in() -> None:
    good, bad = replace(REQUEST, keys=True), ForwardRequest([ids(9999)], [ids(0)], keys=True)
    async with lm_faces(lm_service()) as (_, clients):
        requests = [good, bad] * 8
        codes = [await code for code in [outcome(clients["grpc"], r) for r in requests]]
        together = await asyncio.gather(*(outcome(clients["grpc"], r) for r in requests))
    assert codes == together == [("ok", None), ("invalid_request", "tokens")] * 8
