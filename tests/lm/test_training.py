import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from knnlm.errors import Conflict, InvalidRequest
from knnlm.lm.model import LanguageModel
from knnlm.lm.training import TrainReport, TrainSettings, learning_rate, train
from knnlm.lm.training_data import split, windows
from knnlm.messages import Document, ForwardRequest

SETTINGS = TrainSettings(
    tokens=100 * 256, vocab_size=300, layers=1, width=32, heads=2, context=32, batch_tokens=256, learning_rate=2e-2
)
WORDS = ("the cat sat on the mat", "a dog ran to the door", "one fish swam in the sea")


def documents(count: int = 200) -> list[Document]:
    """Sentences of three kinds, in an order of their own for each document."""
    rng = np.random.default_rng(0)
    return [Document(f"doc{i}", ". ".join(WORDS[j] for j in rng.integers(len(WORDS), size=6))) for i in range(count)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainReport]:
    out = tmp_path_factory.mktemp("train") / "model"
    return out, train(documents(), out, SETTINGS)


def test_a_tiny_run_learns(finished: tuple[Path, TrainReport]) -> None:
    out, report = finished
    # from ln 300 = 5.7; three known sentences leave little to guess but which comes next
    assert report.held_out_loss < 0.5 * math.log(SETTINGS.vocab_size)
    assert json.loads((out / "training.json").read_text())["held_out_loss"] == report.held_out_loss
    assert not out.with_name("model.work").exists()


def test_the_folder_it_writes_is_a_model_with_the_reported_loss(finished: tuple[Path, TrainReport]) -> None:
    out, report = finished
    lm = LanguageModel.load(str(out), device="cpu")
    assert lm.info.context_length == SETTINGS.context
    assert lm.info.bos_token_id == lm.info.eos_token_id == 0
    _, held = split(documents())
    row = np.concatenate([lm.tokenizer.encode(d.text) for d in held])  # each behind its BOS, as in training
    starts = range(0, len(row) - 1, SETTINGS.context)
    tokens = [row[start : start + SETTINGS.context][: len(row) - 1 - start] for start in starts]
    positions = [np.arange(len(t), dtype=np.int32) for t in tokens]
    result = lm.forward(ForwardRequest(tokens, positions, targets=row[1:]))
    assert result.target_log_probs is not None
    assert -float(result.target_log_probs.mean(dtype=np.float64)) == pytest.approx(report.held_out_loss, abs=1e-5)


class Stopped(Exception):
    pass


def stop_at(step: int, loss: float, rate: float) -> None:
    if step == 13:
        raise Stopped


def test_an_interrupted_run_goes_on_to_the_same_weights(finished: tuple[Path, TrainReport], tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(Stopped):
        train(documents(), out, SETTINGS, on_step=stop_at, save_seconds=0)
    steps: list[int] = []
    report = train(documents(), out, SETTINGS, on_step=lambda step, _loss, _rate: steps.append(step))
    assert steps == list(range(13, 101))  # 12 steps had been saved
    assert report.held_out_loss == finished[1].held_out_loss
    whole, resumed = (load_file(folder / "model.safetensors") for folder in (finished[0], out))
    assert whole.keys() == resumed.keys()
    for name in whole:
        np.testing.assert_array_equal(whole[name].numpy(), resumed[name].numpy(), err_msg=name)


def test_an_unfinished_run_of_other_settings_or_text_is_a_conflict(tmp_path: Path) -> None:
    out = tmp_path / "model"
    with pytest.raises(Stopped):
        train(documents(), out, SETTINGS, on_step=stop_at, save_seconds=1e9)
    other = TrainSettings(tokens=SETTINGS.tokens, vocab_size=300, layers=2, width=32, heads=2, context=32,
                          batch_tokens=256, learning_rate=2e-2)  # fmt: skip
    with pytest.raises(Conflict, match="unfinished run with layers 1, this one has 2"):
        train(documents(), out, other)
    with pytest.raises(Conflict, match="text_sha256"):
        train(documents(199), out, SETTINGS)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tokens", 0, "tokens must be at least 1, got 0"),
        ("width", 30, r"width must be a multiple of 2 x heads \(8\), got 30"),
        ("batch_tokens", 100, r"batch_tokens must be a multiple of context \(512\), got 100"),
        ("vocab_size", 256, "vocab_size must be at least 257"),
    ],
)
def test_wrong_settings_are_named(name: str, value: int, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message) as caught:
        TrainSettings(**({"tokens": 1000} | {name: value}))
    assert caught.value.param == name


def test_too_little_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="too few documents to hold some out: 1"):
        train([Document("a", "text")], tmp_path / "m", SETTINGS)
    held = next(d for d in split(documents())[1])
    with pytest.raises(
        InvalidRequest, match=r"too little text: \d+ tokens to train on and \d+ held out, context is 512"
    ):
        train([*documents(3), held], tmp_path / "m", TrainSettings(tokens=1000, vocab_size=300))


def test_the_learning_rate_warms_up_and_falls_to_zero_over_the_last_quarter() -> None:
    settings = TrainSettings(tokens=8192 * 1000, learning_rate=1.0)
    rates = [learning_rate(step, settings) for step in range(1000)]
    assert rates[:2] == [1 / 200, 2 / 200]
    assert rates[199:751] == [1.0] * 552
    assert rates[875] == pytest.approx(0.5)
    assert rates[999] == pytest.approx(1 / 250)


def test_an_epoch_of_windows_covers_the_text_once_and_is_the_same_each_time() -> None:
    first, again = windows(1000, 32, 6, seed=5), windows(1000, 32, 6, seed=5)
    epoch = np.concatenate([next(first) for _ in range(5)])  # 30 of its 30 windows
    np.testing.assert_array_equal(epoch, np.concatenate([next(again) for _ in range(5)]))
    assert (np.diff(np.sort(epoch)) == 32).all()
    assert epoch.max() + 32 < 1000
