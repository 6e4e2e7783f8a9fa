"""Memories trained in seconds: what they gain, what they are made of, what is refused."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.numpy import load_file, save_file

from knnlm.datastore.catalog import Catalog
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.datastore.updates.documents import remove
from knnlm.errors import Conflict, DatastoreCorrupt, DatastoreMismatch, InvalidRequest, ModelError
from knnlm.evaluation.collect import HeldOut, observe
from knnlm.evaluation.memory_training import MlpSizes, train_memory
from knnlm.evaluation.splits import encode
from knnlm.lm.distillation import DistilSettings
from knnlm.lm.model import LanguageModel
from knnlm.memories import MLP_FILE
from knnlm.memory.examples import Examples
from knnlm.memory.manifest import MemoryManifest
from knnlm.memory.mlp import Mlp
from knnlm.memory.targets import Targets
from knnlm.messages import Document, ForwardRequest
from tests.lm import tiny_models
from tests.memory.conftest import World
from tests.memory.trained import MLP, SETTINGS, Step, decoder, mlp, run

__all__ = ["decoder", "mlp"]


def observed(world: World, model: Path, documents: list[Document]) -> HeldOut:
    lm = LanguageModel.load(str(model), device="cpu")
    return observe(lm, encode(documents, lm.tokenizer), context_length=32, min_context=8)


def mixture_loss(lm: np.ndarray, memory: np.ndarray, lmbda: float) -> float:
    return -float(np.logaddexp(math.log1p(-lmbda) + lm, math.log(lmbda) + memory).mean())


def test_a_decoder_memory_beats_the_lm_alone_on_documents_that_nothing_was_fitted_to(
    world: World, decoder: tuple[Path, MemoryManifest]
) -> None:
    out, made = decoder
    lm = observed(world, world.model, world.report).lm_log_probs.astype(np.float64)
    memory = observed(world, out, world.report).lm_log_probs.astype(np.float64)
    assert 0 < made.tune.lmbda <= 0.99
    assert mixture_loss(lm, memory, made.tune.lmbda) < -0.9 * lm.mean()
    # what the manifest says of the tuning documents is what the folder gives as a model like any other
    of_tune = observed(world, out, world.held_out).lm_log_probs.astype(np.float64)
    assert -of_tune.mean() == pytest.approx(made.tune.memory_loss, abs=1e-5)
    assert made.tune.mixture_loss < made.tune.lm_loss


def test_an_mlp_memory_beats_the_lm_alone_from_the_keys_it_has_computed_already(
    world: World, mlp: tuple[Path, MemoryManifest]
) -> None:
    out, made = mlp
    net = Mlp.load(out)
    report = observed(world, world.model, world.report)
    memory = net.target_log_probs(report.queries, report.targets).astype(np.float64)
    lm = report.lm_log_probs.astype(np.float64)
    assert mixture_loss(lm, memory, made.tune.lmbda) < -0.9 * lm.mean()
    tune = observed(world, world.model, world.held_out)
    again = net.target_log_probs(tune.queries, tune.targets)
    assert -again.mean() == pytest.approx(made.tune.memory_loss, abs=1e-5)  # numpy says what torch said
    rows = net.log_probs(tune.queries[:50])
    np.testing.assert_allclose(np.exp(rows.astype(np.float64)).sum(axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rows[np.arange(50), tune.targets[:50]], again[:50], atol=1e-6)


def test_the_manifest_says_what_it_was_made_of(world: World, decoder: tuple[Path, MemoryManifest]) -> None:
    out, made = decoder
    assert MemoryManifest.open(out, check="all") == made
    assert (made.kind, made.beta, made.store.domain, made.store.version) == ("decoder", 0.5, "law", "v1")
    assert made.targets is not None
    assert made.targets.settings == Targets.open(world.targets).manifest.settings
    assert made.start.model_id == "model"
    assert made.tune.step in (6, 12, 18, 24)
    assert made.excess > 0
    assert made.files["model.safetensors"].bytes < 2 * made.parameters + 4096  # tied weights are there once
    assert not list(out.parent.glob(".*"))  # nothing of the work is left
    assert LanguageModel.load(str(out), device="cpu").info.tokenizer_sha256 == made.model.tokenizer_sha256


def test_the_manifest_names_every_model_and_text_that_went_into_it(
    world: World, decoder: tuple[Path, MemoryManifest], mlp: tuple[Path, MemoryManifest]
) -> None:
    """Whether a base model or a student had read the domain before is told by what they were, not by a figure."""
    base = LanguageModel.load(str(world.model), device="cpu").info
    for _, made in (decoder, mlp):
        assert (made.model.model_id, made.model.weights_sha256) == (base.model_id, base.weights_sha256)
        assert made.tune.documents == len(world.held_out)
    assert decoder[1].start.weights_sha256 == base.weights_sha256
    assert mlp[1].start.weights_sha256 is None


def test_an_mlp_takes_a_twentieth_of_the_store_where_nothing_else_is_said(
    world: World, tmp_path: Path, mlp: tuple[Path, MemoryManifest]
) -> None:
    manifest = Manifest.load(world.store / "law/v1")
    stored = sum(manifest.files[name].bytes for name in ("keys.npy", "values.npy", "tokens.npy"))

    def of_store(times: float) -> MlpSizes:
        counts = {name: int(getattr(manifest, name) * times) for name in ("entries", "tokens")}
        return MlpSizes.fitting(manifest.model_copy(update=counts))

    dim, tokens = manifest.key_dim, manifest.model.vocab_size
    assert of_store(1e6) == MlpSizes()  # no wider, however much is stored
    assert of_store(1e-6).bottleneck == 8
    found = of_store(8)
    wider = MlpSizes(found.hidden + 32, bottleneck=found.bottleneck + 8)
    assert 8 < found.bottleneck < 128
    assert found.bytes(dim, tokens) <= 0.05 * 8 * stored < wider.bytes(dim, tokens)
    settings = DistilSettings(**{**vars(SETTINGS), "steps": 1})
    made = run(world, tmp_path / "out", settings, kind="mlp", sizes=None)
    assert made.start.sizes == asdict(MlpSizes.fitting(manifest))
    for folder, sizes in ((tmp_path / "out", MlpSizes.fitting(manifest)), (mlp[0], MLP)):
        header = int.from_bytes((folder / MLP_FILE).read_bytes()[:8], "little")
        assert (folder / MLP_FILE).stat().st_size == 8 + header + sizes.bytes(dim, tokens)


def test_without_targets_it_learns_from_the_text_alone(world: World, tmp_path: Path) -> None:
    made = run(world, tmp_path / "out", DistilSettings(**{**vars(SETTINGS), "beta": 0.0}))
    assert made.targets is None
    assert made.tune.mixture_loss < 0.9 * made.tune.lm_loss
    assert made.excess == pytest.approx(made.train_loss)  # the floor of cross-entropy to one token is 0


def test_accumulated_gradients_are_those_of_the_whole_batch(world: World, tmp_path: Path) -> None:
    small, large = Step(), Step()
    run(world, tmp_path / "a", DistilSettings(**{**vars(SETTINGS), "steps": 4}), on_step=small)
    settings = DistilSettings(**{**vars(SETTINGS), "steps": 4, "pass_tokens": 100_000})
    run(world, tmp_path / "b", settings, on_step=large)
    np.testing.assert_allclose(small.losses, large.losses, rtol=1e-4)


def test_logits_made_in_chunks_give_the_same_loss(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, chunked = Step(), Step()
    settings = DistilSettings(**{**vars(SETTINGS), "steps": 4})
    run(world, tmp_path / "a", settings, on_step=whole)
    monkeypatch.setattr("knnlm.lm.distillation.CHUNK_BYTES", 300 * 4 * 50)
    run(world, tmp_path / "b", settings, on_step=chunked)
    np.testing.assert_allclose(whole.losses, chunked.losses, rtol=1e-4)


@pytest.mark.parametrize("kind", [pytest.param("decoder", marks=pytest.mark.slow), "mlp"])
def test_passes_in_bfloat16_learn_the_same(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """As on a GPU: weights, sums and what is compared stay float32."""
    single, half = Step(), Step()
    run(world, tmp_path / "single", kind=kind, on_step=single)
    monkeypatch.setattr("knnlm.lm.distillation.mixed_precision", lambda _: torch.autocast("cpu", torch.bfloat16))
    run(world, tmp_path / "half", kind=kind, on_step=half)
    assert single.losses != half.losses
    np.testing.assert_allclose(single.losses, half.losses, rtol=0.05)
    assert half.tried[-1].mixture_loss == pytest.approx(single.tried[-1].mixture_loss, rel=0.05)


def test_every_epoch_has_every_entry_once_in_the_window_of_its_key(world: World) -> None:
    datastore = Datastore.open(world.store / "law/v1")
    examples = Examples(
        datastore, Targets.open(world.targets), beta=0.5, seed=3, batch_entries=1, keys=True
    )  # a step is a window
    stream = examples.batches()
    lm = LanguageModel.load(str(world.model), device="cpu")
    orders = []
    for _ in range(2):
        values: list[npt.NDArray[np.int64]] = []
        keys = []
        while len(np.concatenate([[], *values])) < examples.entries:
            batch = next(stream)
            values.append(batch.labels.tokens[:, 0])
            keys.append(batch.keys)
        orders.append(np.concatenate(values))
        assert examples.entries == datastore.entries == len(orders[-1])
        np.testing.assert_array_equal(np.sort(orders[-1]), np.sort(datastore.values))
    assert not np.array_equal(orders[0], orders[1])
    feed = batch.feeds[0]
    asked = ForwardRequest([feed.tokens.astype(np.int32)], [feed.positions.astype(np.int32)], keys=True)
    made = lm.forward(asked).keys
    assert batch.keys is not None
    assert made is not None
    np.testing.assert_array_equal(made.astype(np.float16), batch.keys.astype(np.float16))


def test_a_label_of_another_position_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    datastore = Datastore.open(world.store / "law/v1")
    datastore.values = np.roll(datastore.values, 1)
    examples = Examples(datastore, None, beta=0.0, seed=0, batch_entries=1, keys=False)
    with pytest.raises(DatastoreCorrupt, match=r"entry \d+ has value \d+, its window predicts"):
        next(examples.batches())


def wrong(world: World, tmp_path: Path) -> Iterator[tuple[dict[str, Any], type[Exception], str]]:
    other = tmp_path / "other"
    tiny_models.save(tiny_models.random_model(tiny_models.CONFIGS["llama"]()), other)
    yield {"kind": "lstm"}, InvalidRequest, "kind must be one of decoder, mlp, got 'lstm'"
    yield {"targets": None}, InvalidRequest, "beta is 0.5: it needs targets"
    yield {"kind": "mlp", "start": "x"}, InvalidRequest, "start means nothing to it"
    yield {"sizes": MLP}, InvalidRequest, "sizes are those of an mlp memory"
    yield {"kind": "mlp", "sizes": MlpSizes(hidden=0)}, InvalidRequest, "hidden must be at least 1, got 0"
    yield {"start": str(other)}, ModelError, "has a tokenizer with sha256"
    yield {"targets": tmp_path / "none"}, DatastoreCorrupt, r"targets\.json cannot be read"
    short = tmp_path / "short"
    shutil.copytree(world.model, short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 16}))
    yield {"start": str(short)}, ModelError, "takes 16 tokens, the keys were made with windows of 32"
    yield {"start": str(short / "config.json")}, ModelError, "takes 16 tokens"
    narrow = tmp_path / "narrow"
    narrow.mkdir()
    (narrow / "config.json").write_text(json.dumps(config | {"vocab_size": 20}))
    yield {"start": str(narrow / "config.json")}, ModelError, "has 20 logits, the tokenizer 290 tokens"


def test_what_cannot_be_trained_is_refused_and_leaves_nothing(world: World, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(Conflict, match="out exists already"):
        run(world, tmp_path / "out")
    (tmp_path / "out").rmdir()
    for options, error, message in wrong(world, tmp_path):
        with pytest.raises(error, match=message.replace("290", r"\d+")):
            run(world, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists()
        assert not (tmp_path / ".out.building").exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("steps", 0, "steps must be at least 1, got 0"),
        ("beta", 1.5, r"beta must lie in \[0, 1\], got 1.5"),
        ("beta", math.nan, "beta must lie in"),
        ("learning_rate", 0.0, "learning_rate must be > 0"),
        ("warmup_steps", -1, "warmup_steps must lie in"),
        ("pass_tokens", 0, "pass_tokens must be at least 1"),
    ],
)
def test_wrong_settings_are_named(name: str, value: float, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        DistilSettings(**{"steps": 10, name: value})  # type: ignore[arg-type]
    assert caught.value.param == name


def test_the_learning_rate_rises_and_falls_to_zero() -> None:
    settings = DistilSettings(steps=100, warmup_steps=10, learning_rate=1.0)
    rates = [settings.rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * i for i in range(1, 11)])
    assert rates[55] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 90)


def test_targets_of_another_version_and_other_models_are_refused(world: World, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(world.store, store)
    catalog = Catalog(store)
    remove(["1-0"], catalog, "law", activate=catalog.activate)
    arguments: list[Any] = ["law", world.held_out, str(world.model), tmp_path / "out", SETTINGS]
    with pytest.raises(DatastoreMismatch, match="make targets of this version"):
        train_memory(store, *arguments, targets=world.targets, device="cpu")
    other = tmp_path / "other"
    shutil.copytree(world.model, other)
    tensors = load_file(other / "model.safetensors")
    save_file({n: t * np.float16(2) for n, t in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    arguments[2] = str(other)
    with pytest.raises(DatastoreMismatch, match="weights_sha256"):
        train_memory(world.store, *arguments, targets=world.targets, device="cpu")


def test_documents_of_the_store_are_not_chosen_by(world: World, tmp_path: Path) -> None:
    stored = [Document(r.id, "x") for _, r in Datastore.open(world.store / "law/v1").live_rows()]
    with pytest.raises(InvalidRequest, match="60 of 60 are in"):
        train_memory(world.store, "law", stored, str(world.model), tmp_path / "o", SETTINGS, targets=world.targets)


def test_a_damaged_mlp_is_refused(mlp: tuple[Path, MemoryManifest], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(mlp[0], broken)
    net = Mlp.load(broken)
    with pytest.raises(InvalidRequest, match=r"keys must have shape \(n, 32\), got \(3, 5\)"):
        net.log_probs(np.zeros((3, 5), np.float32))
    data = bytearray((broken / "mlp.safetensors").read_bytes())
    data[-1] ^= 1
    (broken / "mlp.safetensors").write_bytes(data)
    with pytest.raises(DatastoreCorrupt, match=r"mlp\.safetensors has sha256"):
        MemoryManifest.open(broken, check="all")
    whole = (mlp[0] / "mlp.safetensors").read_bytes()
    begin = 8 + int.from_bytes(whole[:8], "little")
    for damaged in (b"", b"\xff" * 100, whole[:begin], whole[:-2], whole[:8] + b"x" * (begin - 8) + whole[begin:]):
        (broken / "mlp.safetensors").write_bytes(damaged)
        with pytest.raises(DatastoreCorrupt, match="holds no MLP memory"):
            Mlp.load(broken)
    (broken / "mlp.safetensors").write_bytes(data[:100])
    with pytest.raises(DatastoreCorrupt, match="holds no MLP memory"):
        Mlp.load(broken)
    with pytest.raises(DatastoreCorrupt, match=r"mlp\.safetensors has 100 bytes"):
        MemoryManifest.open(broken)
