"""The toy must behave as a real model does, or what it tests means nothing."""

import numpy as np
import pytest

from knnlm.errors import InvalidRequest
from knnlm.messages import ForwardRequest
from knnlm.testing import BOS, TEXTS, ToyLanguageModel, byte_tokenizer

LM = ToyLanguageModel()
SEQUENCES = [LM.tokenizer.encode(text)[:32] for text in TEXTS]
EVERYWHERE = [np.arange(len(tokens), dtype=np.int32) for tokens in SEQUENCES]


def test_tokenizer_gives_back_every_text() -> None:
    tokenizer = byte_tokenizer()
    for text in (*TEXTS, "\0\n\t日本語 🎉", ""):
        tokens = tokenizer.encode(text)
        assert tokens[0] == BOS
        assert len(tokens) == 1 + len(text.encode())
        assert tokenizer.decode(tokens[1:]) == text


def test_answers_agree_with_one_another() -> None:
    n = sum(len(p) for p in EVERYWHERE)
    targets = np.random.default_rng(0).integers(0, LM.info.vocab_size, n).astype(np.int32)
    result = LM.forward(
        ForwardRequest(
            SEQUENCES, EVERYWHERE, full=True, targets=targets, top_n=5, keys=True, statistics=True,
            candidates=[np.array([target, 7], np.int32) for target in targets],
            temperatures=np.full(n, 0.5, np.float32),
        )
    )  # fmt: skip
    assert result.candidate_log_probs is not None
    assert result.log_power_sums is not None
    assert result.log_probs is not None
    assert result.keys is not None
    assert result.keys.shape == (n, LM.info.key_dim)
    np.testing.assert_allclose(np.exp(result.log_probs.astype(np.float64)).sum(axis=1), 1, atol=1e-5)  # float32 logs
    np.testing.assert_array_equal(result.target_log_probs, result.log_probs[np.arange(n), targets])
    np.testing.assert_array_equal(result.top_log_probs, -np.sort(-result.log_probs, axis=1)[:, :5])
    exact = result.log_probs.astype(np.float64)
    np.testing.assert_array_equal(result.candidate_log_probs[::2], result.target_log_probs)
    np.testing.assert_array_equal(result.candidate_log_probs[1::2], result.log_probs[:, 7])
    np.testing.assert_allclose(result.log_power_sums, np.log(np.exp(2 * exact).sum(axis=1)), rtol=1e-5)
    assert result.entropy is not None
    np.testing.assert_allclose(result.entropy, -(np.exp(exact) * exact).sum(axis=1), rtol=1e-5)
    np.testing.assert_array_equal(result.largest_log_prob, result.log_probs.max(axis=1))


def test_answer_does_not_depend_on_the_batch_or_on_later_tokens() -> None:
    together = LM.forward(ForwardRequest(SEQUENCES, EVERYWHERE, full=True, keys=True))
    assert together.keys is not None
    row = 0
    for tokens in SEQUENCES:
        for j in range(len(tokens)):
            one = LM.forward(ForwardRequest([tokens[: j + 1]], [np.array([j], np.int32)], full=True, keys=True))
            assert one.keys is not None
            assert one.log_probs is not None
            assert together.log_probs is not None
            np.testing.assert_array_equal(one.keys[0], together.keys[row])
            np.testing.assert_array_equal(one.log_probs[0], together.log_probs[row])
            row += 1


@pytest.mark.parametrize("changed", range(8))
def test_key_depends_on_every_token_of_the_context(changed: int) -> None:
    tokens = SEQUENCES[0][:8]
    other = tokens.copy()
    other[changed] += 1
    request = ForwardRequest([tokens, other], [np.array([7], np.int32)] * 2, keys=True)
    keys = LM.forward(request).keys
    assert keys is not None
    assert (keys[0] != keys[1]).any()


def test_key_depends_on_the_place_in_the_window() -> None:
    tokens = np.full(9, 5, np.int32)
    keys = LM.forward(ForwardRequest([tokens], [np.array([7, 8], np.int32)], keys=True)).keys
    assert keys is not None
    assert (keys[0] != keys[1]).any()


@pytest.mark.parametrize(
    "request_",
    [
        ForwardRequest(SEQUENCES, EVERYWHERE),
        ForwardRequest(SEQUENCES, EVERYWHERE[:1], keys=True),
        ForwardRequest([np.zeros(33, np.int32)], [np.array([0], np.int32)], keys=True),
        ForwardRequest([np.zeros(0, np.int32)], [np.zeros(0, np.int32)], keys=True),
        ForwardRequest([np.array([258], np.int32)], [np.array([0], np.int32)], keys=True),
        ForwardRequest([np.array([-1], np.int32)], [np.array([0], np.int32)], keys=True),
        ForwardRequest([np.zeros(3, np.int32)], [np.array([3], np.int32)], keys=True),
        ForwardRequest([np.zeros(3, np.int32)], [np.array([1, 1], np.int32)], keys=True),
        ForwardRequest([np.zeros(3, np.int32)], [np.array([0], np.int32)], targets=np.zeros(2, np.int32)),
        ForwardRequest([np.zeros(3, np.int32)], [np.array([0], np.int32)], targets=np.array([258], np.int32)),
        ForwardRequest([np.zeros(3, np.int32)], [np.array([0], np.int32)], top_n=-1),
    ],
)
def test_what_a_model_refuses_is_refused(request_: ForwardRequest) -> None:
    with pytest.raises(InvalidRequest):
        LM.forward(request_)
