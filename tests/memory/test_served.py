"""Memories that were trained, of both kinds, in one process and in a running system."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
import pytest

from knnlm import GenerationOptions, LanguageModel, MemoryOptions, Pipeline, SamplingOptions
from knnlm.cli import serve
from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.errors import DatastoreCorrupt, DatastoreMismatch, InvalidRequest
from knnlm.evaluation.memory_training import MlpSizes, train_memory
from knnlm.lm.distillation import DistilSettings
from knnlm.memories import MLP_FILE, KeyMemory
from knnlm.memory.manifest import MemoryManifest
from knnlm.memory.served import open_mlp
from knnlm.messages import ForwardRequest
from services.aggregator.app import service as aggregator_service
from services.aggregator.settings import AggregatorSettings
from services.lm.app import service as lm_service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import running
from tests.memory.conftest import World

TEXT = "the cat ran to the sea. one dog swam in the mat"
SETTINGS = DistilSettings(steps=3, batch_entries=300)


@dataclass(frozen=True)
class Trained:
    decoder: Path
    mlp: Path


@pytest.fixture(scope="module")
def trained(world: World, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    for kind, sizes in (("decoder", None), ("mlp", MlpSizes(16, 1, 8))):
        train_memory(
            world.store, "law", world.held_out, str(world.model), folder / kind, SETTINGS, kind=kind, sizes=sizes,
            targets=world.targets, device="cpu",
        )  # fmt: skip
    return Trained(folder / "decoder", folder / "mlp")


@pytest.fixture(scope="module")
def pipeline(world: World, trained: Trained) -> Pipeline:
    memories = {"decoder": trained.decoder, "mlp": trained.mlp}
    return Pipeline.load(str(world.model), memories=memories, device="cpu")


@asynccontextmanager
async def served(world: World, trained: Trained) -> AsyncIterator[httpx.AsyncClient]:
    async with AsyncExitStack() as stack:
        ports = []
        for model in (world.model, trained.decoder):
            settings = LmSettings(model=str(model), device="cpu", port=0, grpc_port=0)
            ports.append((await stack.enter_async_context(running(lm_service(settings)))).grpc_port)
        told = await stack.enter_async_context(GrpcLanguageModel(f"127.0.0.1:{ports[1]}"))
        assert (await told.get_model()).memory == MemoryManifest.open(trained.decoder).trained
        memory = (f"decoder=127.0.0.1:{ports[1]}", f"mlp={trained.mlp}")
        mixing = AggregatorSettings(port=0, lm_target=f"127.0.0.1:{ports[0]}", datastore_target="", memory=memory)
        host = await stack.enter_async_context(running(aggregator_service(mixing)))
        transport = httpx.ASGITransport(host.app)
        yield await stack.enter_async_context(httpx.AsyncClient(transport=transport, base_url="http://test"))


@pytest.mark.parametrize("kind", ["decoder", "mlp"])
def test_the_library_mixes_what_was_trained_with_its_fitted_weight(
    world: World, trained: Trained, pipeline: Pipeline, kind: str
) -> None:
    lm = LanguageModel.load(str(world.model), device="cpu")
    tokens = lm.tokenizer.encode(TEXT)[: lm.info.context_length]
    positions = [np.arange(len(tokens) - 1, dtype=np.int32)]
    forward = lm.forward(ForwardRequest([tokens], positions, targets=tokens[1:], keys=True))
    assert forward.target_log_probs is not None
    assert forward.keys is not None
    memory = pipeline.memories[kind]
    if isinstance(memory, KeyMemory):
        remembered = memory.net.target_log_probs(forward.keys, tokens[1:])
    else:
        assert isinstance(memory, LanguageModel)
        answer = memory.forward(ForwardRequest([tokens], positions, targets=tokens[1:])).target_log_probs
        assert answer is not None
        remembered = answer
    lmbda = MemoryManifest.open(getattr(trained, kind)).tune.lmbda
    score = pipeline.score(tokens, memory=kind)
    expected = np.log((1 - lmbda) * np.exp(forward.target_log_probs.astype(np.float64)) + lmbda * np.exp(remembered))
    np.testing.assert_allclose(score.log_probs, expected, atol=1e-5)
    np.testing.assert_allclose(pipeline.score(tokens, memory=MemoryOptions(kind, 1.0)).log_probs, remembered, atol=1e-5)
    assert (score.memories[0].name, score.memories[0].lmbda) == (kind, lmbda)
    rows = pipeline.next_token([tokens[: i + 1] for i in range(len(tokens) - 1)], memory=kind).mixed.log_probs
    np.testing.assert_allclose(rows[np.arange(len(rows)), tokens[1:]], score.log_probs, atol=1e-5)


async def test_a_running_system_answers_as_the_library(world: World, trained: Trained, pipeline: Pipeline) -> None:
    options = GenerationOptions(8, SamplingOptions(temperature=0), ignore_eos=True)
    async with served(world, trained) as client:
        ids = [m["id"] for m in (await client.get("/v1/models")).json()["data"]]
        name = world.model.name
        assert ids == [name, f"{name}~decoder", f"{name}~mlp"]
        for kind in ("decoder", "mlp"):
            expected = await asyncio.to_thread(pipeline.score, TEXT, memory=kind)
            made = await asyncio.to_thread(pipeline.generate, "the cat", None, options, memory=kind)
            scored = (await client.post("/v1/score", json={"text": TEXT, "model": f"{name}~{kind}"})).json()
            np.testing.assert_allclose([t["log_p"] for t in scored["tokens"]], expected.log_probs, atol=1e-5)
            shown = {**expected.memories[0].as_json()}
            assert scored["memories"] == [shown]
            body = {"prompt": "the cat", "model": f"{name}~{kind}", "max_tokens": 8, "temperature": 0}
            answer = (await client.post("/v1/completions", json={**body, "ignore_eos": True, "add_bos": True})).json()
            assert answer["choices"][0]["text"] == made.text
            assert answer["memories"] == [shown]


def test_serving_gives_a_process_to_decoders_alone(trained: Trained) -> None:
    targets, processes = serve._memories([f"a={trained.mlp}", f"b={trained.decoder}"])
    assert targets[0] == f"a={trained.mlp}"
    assert list(processes) == ["memory b"]
    assert processes["memory b"]["KNNLM_LM_MODEL"] == str(trained.decoder)


def test_an_mlp_memory_is_called_by_its_folder_and_no_answer_shows_where_that_is(trained: Trained) -> None:
    assert open_mlp(trained.mlp).model_id == trained.mlp.name


def test_what_is_no_mlp_memory_is_refused(trained: Trained, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"services\.lm --model"):
        open_mlp(trained.decoder)
    with pytest.raises(DatastoreCorrupt, match="cannot be read"):
        open_mlp(tmp_path)
    for file in trained.mlp.iterdir():
        if file.is_file():
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / MLP_FILE).write_bytes((trained.mlp / MLP_FILE).read_bytes()[:-1])
    with pytest.raises(DatastoreCorrupt, match="expected"):
        open_mlp(tmp_path)


def test_an_mlp_memory_is_not_mixed_with_a_model_whose_keys_it_does_not_read(world: World, trained: Trained) -> None:
    other = LanguageModel.load(str(trained.decoder), device="cpu")
    pipeline = Pipeline(other, memories={"law": open_mlp(trained.mlp)})
    with pytest.raises(DatastoreMismatch, match="reads keys of model"):
        pipeline.score(TEXT, memory="law")
