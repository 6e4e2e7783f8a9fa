"""What the programs compare with: the same windows, the same numbers; and the texts that building is measured on."""

from itertools import islice
from pathlib import Path

import httpx
import numpy as np
import pytest

from benchmarks import building, prefixes, scoring
from benchmarks.data import MODEL
from benchmarks.system import service
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.decoding import plan_windows
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document, ForwardRequest

TEXTS = ("Returns the indices of the maximum values along an axis.", "x", "An array of ints, or ü, or nothing at all.")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return LanguageModel.load(str(MODEL), device="cpu")


@pytest.fixture(scope="module")
def plain() -> scoring.PlainModel:
    return scoring.PlainModel(str(MODEL))


def test_the_plain_models_loss_is_that_of_the_scored_tokens(lm: LanguageModel, plain: scoring.PlainModel) -> None:
    tokens = np.resize(lm.tokenizer.encode(" ".join(TEXTS)), 700)
    windows = plan_windows(len(tokens), plain.context_length, 100)
    assert len(windows) == 2  # of two lengths, so two batches
    answer = lm.forward(
        ForwardRequest(
            [tokens[w.start : w.end] for w in windows],
            [w.positions for w in windows],
            targets=np.concatenate([tokens[w.first : w.end] for w in windows]),
        )
    )
    assert answer.target_log_probs is not None
    assert not plain.model.training
    expected = -float(answer.target_log_probs.sum(dtype=np.float64))
    assert plain.nats(tokens.astype(np.int64), windows) == pytest.approx(expected, rel=1e-5)


def test_batches_hold_windows_of_one_length_and_every_window_once() -> None:
    windows = plan_windows(6000, 512, 256)
    found = scoring.batches(windows)
    assert sorted(w.start for batch in found for w in batch) == [w.start for w in windows]
    assert max(map(len, found)) == 4
    assert all(len({w.end - w.start for w in batch}) == 1 for batch in found)


def test_building_is_given_the_texts_of_a_datastore_again_and_again(lm: LanguageModel, tmp_path: Path) -> None:
    path = build([Document(f"d{i}", text) for i, text in enumerate(TEXTS)], lm, Catalog(tmp_path), "d")
    few = list(islice(building.documents(path, lm.tokenizer, 10**9), 7))
    assert [d.text for d in few] == [*TEXTS, *TEXTS, TEXTS[0]]
    assert len({d.id for d in few}) == 7
    enough = list(building.documents(path, lm.tokenizer, 40))
    entries = [len(lm.tokenizer.encode(d.text)) - 1 for d in enough]
    assert sum(entries[:-1]) < 40 <= sum(entries)


def test_the_bare_pass_counts_what_is_fed_without_padding(plain: scoring.PlainModel) -> None:
    texts = [np.arange(1, 600), np.arange(1, 40)]
    shapes = []
    program = building.bare(plain, texts, lambda ids: shapes.append(tuple(ids.shape)))
    # of 599 tokens: 512, then the last 87 with the 256 before them
    assert program() == 512 + (256 + 87) + 39
    assert shapes
    assert all(rows * width <= 2048 for rows, width in shapes)


def test_a_service_is_started_ready_and_ended(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with service("datastore", tmp_path / "logs", "--store", str(tmp_path / "store"), threads=1) as running:
        assert httpx.get(f"{running.http}/readyz").status_code == 200
        assert running.grpc
        if Path("/proc").is_dir():
            assert running.cpu_seconds() > 0
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{running.http}/readyz")


def test_a_service_that_does_not_start_says_why(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match=r"datastore service did not become ready[\s\S]*nowhere"),
        service("datastore", tmp_path, "--store", str(tmp_path), "--domains", "nowhere"),
    ):
        pass


def test_steps_of_completions_are_those_of_generate(lm: LanguageModel, plain: scoring.PlainModel) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, lm.info.vocab_size, 12).astype(np.int32) for _ in range(3)]
    forward = prefixes.local(lm)
    sequences = prompts
    for _ in range(8):
        sequences = prefixes.grown(sequences, forward(sequences))
    found = prefixes.generated(plain, np.stack(prompts).astype(np.int64), 8)
    np.testing.assert_array_equal(np.stack(sequences), found)
    program = prefixes.steps(forward, prompts)
    for _ in range(2 * prefixes.STEPS):
        program()
