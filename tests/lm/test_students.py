"""Every architecture as a memory: what it says while it is trained is what it says when it is served."""

from pathlib import Path

import numpy as np
import pytest
import torch

from knnlm.errors import ModelError
from knnlm.lm.distillation import Held, log_probs
from knnlm.lm.model import LanguageModel
from knnlm.lm.requests import Feed
from knnlm.lm.students import DecoderStudent
from knnlm.messages import ForwardRequest
from tests.lm import tiny_models
from tests.lm.conftest import Tiny

CPU = torch.device("cpu")
# one of padding's id, and windows of several lengths: padding is told by place
TOKENS = [np.array(t, np.int32) for t in ([256, 7, 0, 0, 12, 80], [256, 0], [9, 10, 11, 12, 13, 14, 15, 16, 17])]
POSITIONS = [np.array(p, np.int32) for p in ([1, 2, 4], [0], [5, 7, 8])]
TARGETS = np.array([0, 12, 256, 0, 15, 3, 299], np.int32)


def held() -> Held:
    firsts = np.cumsum([0, *(len(p) for p in POSITIONS)])
    feeds = [
        Feed(t.astype(np.int64), p.astype(np.int64), int(first))
        for t, p, first in zip(TOKENS, POSITIONS, firsts, strict=False)
    ]
    return Held(feeds, None, TARGETS, np.zeros(len(TARGETS)))


def served(lm: LanguageModel) -> np.ndarray:
    answer = lm.forward(ForwardRequest(TOKENS, POSITIONS, targets=TARGETS)).target_log_probs
    assert answer is not None
    return answer


def test_a_student_says_what_its_model_says_and_is_saved_as_one(tiny: Tiny, tmp_path: Path) -> None:
    folder = str(tiny.folder)
    student = DecoderStudent.load(folder, folder, CPU, context_length=64, vocab_size=257, seed=0)
    for pass_tokens in (1000, 9):  # all together, then one by one
        np.testing.assert_allclose(log_probs(student, held(), pass_tokens), served(tiny.lm), atol=1e-4)
    student.save(tmp_path / "memory")
    saved = LanguageModel.load(str(tmp_path / "memory"), device="cpu")
    np.testing.assert_allclose(log_probs(student, held(), 1000), served(saved), atol=1e-4)  # both rounded
    assert saved.info.tokenizer_sha256 == tiny.lm.info.tokenizer_sha256


def test_random_weights_follow_from_the_seed(llama: Tiny, tmp_path: Path) -> None:
    config, folder = str(llama.folder / "config.json"), str(llama.folder)
    one, same, other = (
        log_probs(DecoderStudent.load(config, folder, CPU, context_length=64, vocab_size=257, seed=s), held(), 99)
        for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert not np.allclose(one, served(llama.lm), atol=1e-2)


def test_weights_that_float16_cannot_hold_are_not_saved(llama: Tiny, tmp_path: Path) -> None:
    folder = str(llama.folder)
    student = DecoderStudent.load(folder, folder, CPU, context_length=64, vocab_size=257, seed=0)
    with torch.no_grad():
        next(student.module.parameters())[0, 0] = 1e6
    with pytest.raises(ModelError, match="does not fit float16"):
        student.save(tmp_path)


def test_one_folder_cannot_start_a_memory_of_another_tokenizer(llama: Tiny, tmp_path: Path) -> None:
    other = tmp_path / "other"
    tiny_models.save(tiny_models.random_model(tiny_models.CONFIGS["llama"]()), other)
    text = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(text + "\n")
    with pytest.raises(ModelError, match="has a tokenizer with sha256"):
        DecoderStudent.load(str(other), str(llama.folder), CPU, context_length=64, vocab_size=257, seed=0)
