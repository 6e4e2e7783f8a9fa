"""Forward requests against the plain model of transformers, run one sequence at a time."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from knnlm.errors import InvalidRequest, ModelError
from knnlm.lm import model as model_module
from knnlm.lm.architectures import KEY_FUNCTIONS
from knnlm.lm.capture import capture
from knnlm.lm.model import LanguageModel
from knnlm.messages import ForwardRequest
from tests.lm import tiny_models
from tests.lm.conftest import Tiny

# float32 through batches, chunks and sdpa against one sequence at a time, eager: seen below 2e-5 of values around 10
ATOL = 1e-4

LENGTHS = (9, 24, 1, 17, 24)


def sequences(lengths: tuple[int, ...] = LENGTHS) -> list[npt.NDArray[np.int32]]:
    rng = np.random.default_rng(3)
    return [rng.integers(tiny_models.VOCAB, size=n).astype(np.int32) for n in lengths]


def some_positions(lengths: tuple[int, ...] = LENGTHS) -> list[npt.NDArray[np.int32]]:
    """Every other position, never the last token's of a longer sequence."""
    return [np.arange(0, max(1, n - 1), 2, dtype=np.int32) for n in lengths]


def ask(lm: LanguageModel, tokens: Sequence[Any], positions: Sequence[Any], **wanted: Any) -> Any:
    """The result, as Any: what was asked for is there."""
    sequences, asked = ([np.asarray(values, np.int32) for values in side] for side in (tokens, positions))
    return lm.forward(ForwardRequest(sequences, asked, **wanted))


def plain_log_probs(tiny: Tiny, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """(t, V): log_softmax of the whole model's logits."""
    with torch.no_grad():
        logits = tiny.plain(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0]
    found: npt.NDArray[np.float32] = torch.log_softmax(logits.float(), -1).numpy()
    return found


@pytest.fixture
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches of two or three sequences and chunks of four positions: every seam is crossed."""
    monkeypatch.setattr(model_module, "BATCH_TOKENS", 50)
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 4 * 4 * tiny_models.VOCAB)


def test_two_passes_at_once_do_not_run_into_each_other(llama: Tiny) -> None:
    """Keys and the narrowed FFN are hooks on the model's modules, which both passes go through."""

    def one(seed: int) -> Any:
        tokens = np.random.default_rng(seed).integers(tiny_models.VOCAB, size=24)
        asked = np.arange(seed % 5, 24, 2 + seed % 3)
        return ask(llama.lm, [tokens], [asked], targets=np.zeros(len(asked), np.int32), keys=True)

    alone = [one(seed) for seed in range(40)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(one, range(40)))
    for first, second in zip(alone, together, strict=True):
        np.testing.assert_array_equal(first.keys, second.keys)
        np.testing.assert_array_equal(first.target_log_probs, second.target_log_probs)


@pytest.mark.usefixtures("small_steps")
def test_log_probs_equal_the_plain_model_in_the_order_asked(tiny: Tiny) -> None:
    tokens, positions = sequences(), some_positions()
    expected = np.concatenate([plain_log_probs(tiny, t)[p] for t, p in zip(tokens, positions, strict=True)])
    targets = np.random.default_rng(4).integers(tiny_models.VOCAB, size=len(expected)).astype(np.int32)
    result = ask(tiny.lm, tokens, positions, full=True, targets=targets, top_n=7)
    assert result.log_probs.dtype == np.float32
    np.testing.assert_allclose(result.log_probs, expected, atol=ATOL, rtol=0)
    # targets and top n are read from the same numbers, exactly
    np.testing.assert_array_equal(result.target_log_probs, result.log_probs[np.arange(len(targets)), targets])
    assert result.top_tokens.dtype == np.int32
    np.testing.assert_array_equal(result.top_log_probs, -np.sort(-result.log_probs, axis=1)[:, :7])
    np.testing.assert_array_equal(result.top_log_probs, np.take_along_axis(result.log_probs, result.top_tokens, 1))
    assert result.keys is None
    assert set(result.timings) == {"forward", "logits"}


@pytest.mark.usefixtures("small_steps")
def test_statistics_equal_those_of_the_plain_model_whatever_else_is_asked(tiny: Tiny) -> None:
    tokens, positions = sequences(), some_positions()
    plain = [plain_log_probs(tiny, t)[p] for t, p in zip(tokens, positions, strict=True)]
    expected = np.concatenate(plain).astype(np.float64)
    alone = ask(tiny.lm, tokens, positions, statistics=True)
    assert alone.entropy.dtype == alone.largest_log_prob.dtype == np.float32
    np.testing.assert_allclose(alone.entropy, -(np.exp(expected) * expected).sum(axis=1), atol=1e-5, rtol=1e-5)
    np.testing.assert_allclose(alone.largest_log_prob, expected.max(axis=1), atol=ATOL, rtol=0)
    assert alone.log_probs is alone.keys is None
    targets = np.zeros(len(expected), np.int32)
    beside = ask(tiny.lm, tokens, positions, statistics=True, full=True, targets=targets, top_n=3, keys=True)
    np.testing.assert_array_equal(beside.entropy, alone.entropy)
    np.testing.assert_array_equal(beside.largest_log_prob, beside.log_probs.max(axis=1))
    assert ask(tiny.lm, tokens, positions, top_n=1).entropy is None


@pytest.mark.usefixtures("small_steps")
def test_candidates_and_log_power_sums_are_read_from_the_same_numbers(llama: Tiny) -> None:
    tokens, positions = sequences(), some_positions()
    n = sum(map(len, positions))
    rng = np.random.default_rng(5)
    candidates = [rng.integers(tiny_models.VOCAB, size=count).astype(np.int32) for count in rng.integers(0, 9, n)]
    temperatures = rng.choice([1e-3, 0.1, 1, 1.5, 1e3], n).astype(np.float32)
    result = ask(llama.lm, tokens, positions, full=True, candidates=candidates, temperatures=temperatures)
    chosen = [row[these] for row, these in zip(result.log_probs, candidates, strict=True)]
    np.testing.assert_array_equal(result.candidate_log_probs, np.concatenate(chosen))
    tempered = result.log_probs.astype(np.float64) / temperatures[:, None]
    np.testing.assert_allclose(result.log_power_sums, np.logaddexp.reduce(tempered, axis=1), rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(result.log_power_sums[temperatures == 1], 0, atol=1e-5)
    alone = ask(llama.lm, tokens, positions, candidates=candidates)
    np.testing.assert_array_equal(alone.candidate_log_probs, result.candidate_log_probs)
    none = ask(llama.lm, tokens, positions, candidates=[np.empty(0, np.int32)] * n)
    assert none.candidate_log_probs.shape == (0,)


@pytest.mark.usefixtures("small_steps")
def test_keys_do_not_depend_on_batching(tiny: Tiny) -> None:
    tokens, positions = sequences(), some_positions()
    together = ask(tiny.lm, tokens, positions, keys=True)
    assert together.keys.dtype == np.float32
    base, site = tiny.plain.base_model, tiny.row.site("ffn_input")
    with torch.no_grad():
        alone = [
            capture(base, site, torch.from_numpy(t.astype(np.int64))[None])[1][0].numpy()[p]
            for t, p in zip(tokens, positions, strict=True)
        ]
    np.testing.assert_allclose(together.keys, np.concatenate(alone), atol=ATOL, rtol=0)
    assert together.log_probs is together.target_log_probs is together.top_tokens is None


@pytest.mark.usefixtures("small_steps")
def test_keys_are_the_same_with_and_without_probabilities(tiny: Tiny) -> None:
    tokens, positions = sequences(), some_positions()
    alone = ask(tiny.lm, tokens, positions, keys=True)
    both = ask(tiny.lm, tokens, positions, keys=True, top_n=1)
    np.testing.assert_array_equal(both.keys, alone.keys)
    without = ask(tiny.lm, tokens, positions, top_n=1)
    np.testing.assert_array_equal(both.top_log_probs, without.top_log_probs)


def test_mean_of_targets_equals_the_plain_loss(tiny: Tiny) -> None:
    (tokens,) = sequences((40,))
    positions = np.arange(39, dtype=np.int32)
    result = ask(tiny.lm, [tokens], [positions], targets=tokens[1:])
    ids = torch.from_numpy(tokens.astype(np.int64))[None]
    with torch.no_grad():
        loss = float(tiny.plain(ids, labels=ids).loss)
    assert -float(result.target_log_probs.mean(dtype=np.float64)) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "opt-pre-norm"])  # one warns of such a token, one has a row for it
def test_a_token_equal_to_the_padding_is_text(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("transformers")  # it does not propagate to the root
    library.addHandler(caplog.handler)
    config = tiny_models.CONFIGS[name]()
    config.pad_token_id = 1
    model = tiny_models.random_model(config)
    tiny_models.save(model, tmp_path / name)
    lm = LanguageModel.load(str(tmp_path / name), device="cpu")
    tokens = torch.tensor([[1, 5, 1, 1]])
    result = ask(lm, [tokens[0], [2, 3]], [range(4), range(2)], full=True)
    with torch.no_grad():
        logits = model(tokens, attention_mask=torch.ones_like(tokens)).logits[0]
    np.testing.assert_allclose(result.log_probs[:4], torch.log_softmax(logits, -1), atol=ATOL, rtol=0)
    library.removeHandler(caplog.handler)
    assert not caplog.records


def test_the_head_never_sees_more_than_a_chunk(llama: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "CHUNK_BYTES", 5 * 4 * tiny_models.VOCAB)
    tokens = sequences((64, 64))
    seen: list[tuple[int, ...]] = []
    handle = llama.lm._head.register_forward_hook(lambda _module, _args, output: seen.append(tuple(output.shape)))
    positions = [np.arange(64), np.arange(63)]
    ask(llama.lm, tokens, positions, targets=np.zeros(127, np.int32), top_n=3)
    assert sum(rows for rows, _ in seen) == 127
    assert max(rows for rows, _ in seen) == 5
    seen.clear()
    ask(llama.lm, tokens, [np.array([63]), np.array([10])], full=True)
    assert seen == [(2, tiny_models.VOCAB)]  # asked positions only
    seen.clear()
    ask(llama.lm, tokens, positions, keys=True)
    assert seen == []  # no logits when keys are all that is wanted
    handle.remove()


def test_tokens_behind_the_last_asked_position_are_not_fed(llama: Tiny) -> None:
    seen: list[tuple[int, ...]] = []
    base: Any = llama.lm._base
    handle = base.get_input_embeddings().register_forward_hook(
        lambda _module, args, _output: seen.append(tuple(args[0].shape))
    )
    ask(llama.lm, sequences((30, 20)), [np.array([4]), np.array([6])], keys=True)
    handle.remove()
    assert seen == [(2, 7)]


def test_sequences_with_no_position_add_no_row(llama: Tiny) -> None:
    tokens, none = sequences((5, 6)), np.array([], np.int32)
    result = ask(llama.lm, tokens, [none, np.array([2])], full=True, keys=True)
    alone = ask(llama.lm, tokens[1:], [np.array([2])], full=True, keys=True)
    np.testing.assert_array_equal(result.log_probs, alone.log_probs)
    nothing = ask(llama.lm, tokens, [none, none], full=True, targets=none, top_n=2, keys=True)
    assert nothing.log_probs.shape == (0, tiny_models.VOCAB)
    assert nothing.keys.shape == (0, tiny_models.WIDTH)


def test_a_request_is_checked_against_the_models_own_limits(llama: Tiny) -> None:
    with pytest.raises(InvalidRequest, match=r"tokens\[0\] has 65 tokens, expected 1 \.\.\. 64"):
        ask(llama.lm, [np.zeros(65, np.int32)], [np.array([0])], keys=True)
    with pytest.raises(InvalidRequest, match=r"tokens\[0\] holds 300, expected 0 \.\.\. 299"):
        ask(llama.lm, [np.array([300])], [np.array([0])], keys=True)
    ids_of_padded_vocabulary = np.array([257, 299])
    result = ask(llama.lm, [ids_of_padded_vocabulary], [np.array([1])], top_n=300)
    assert sorted(result.top_tokens[0]) == list(range(300))


def test_every_key_function_can_be_loaded(llama: Tiny) -> None:
    tokens, positions = sequences((12,)), [np.arange(12)]
    ids = torch.from_numpy(tokens[0].astype(np.int64))[None]
    for name in (*KEY_FUNCTIONS, "ffn_input@-2"):
        lm = LanguageModel.load(str(llama.folder), device="cpu", key_function=name)
        assert (lm.info.key_function, lm.info.key_dim) == (name, tiny_models.WIDTH)
        with torch.no_grad():
            _, expected = capture(llama.plain.base_model, llama.row.site(name), ids)
        np.testing.assert_allclose(ask(lm, tokens, positions, keys=True).keys, expected[0], atol=ATOL, rtol=0)
    with pytest.raises(InvalidRequest, match="key_function must be one of"):
        LanguageModel.load(str(llama.folder), device="cpu", key_function="output")


def test_bfloat16_gives_float16_keys_and_float32_log_probs(llama: Tiny) -> None:
    lm = LanguageModel.load(str(llama.folder), device="cpu", dtype="bfloat16")
    half, single = (ask(model, sequences(), some_positions(), full=True, keys=True) for model in (lm, llama.lm))
    assert lm.info.dtype == "bfloat16"
    assert half.keys.dtype == np.float16
    assert half.log_probs.dtype == np.float32
    np.testing.assert_allclose(np.exp(half.log_probs).sum(1), 1, atol=1e-5)
    # bfloat16 has 8 bits: two layers of its rounding on values around 4
    assert np.abs(half.keys.astype(np.float32) - single.keys).max() < 0.25


@pytest.mark.parametrize(
    ("dtype", "factor", "message"),
    [
        ("bfloat16", 1e6, "keys .ffn_input. of this model pass 65504, the largest float16: load it as float32"),
        ("float32", float("nan"), "keys .ffn_input. of this model are not finite"),
    ],
)
def test_keys_that_do_not_fit_are_an_error(llama: Tiny, dtype: str, factor: float, message: str) -> None:
    lm = LanguageModel.load(str(llama.folder), device="cpu", dtype=dtype)
    with torch.no_grad():
        base: Any = lm._base
        base.layers[-1].post_attention_layernorm.weight.mul_(factor)
    with pytest.raises(ModelError, match=message):
        ask(lm, [np.array([1, 2])], [np.array([1])], keys=True)


def test_hidden_states_that_overflow_are_an_error(llama: Tiny) -> None:
    lm = LanguageModel.load(str(llama.folder), device="cpu")
    with torch.no_grad():
        base: Any = lm._base
        base.norm.weight.mul_(float("inf"))
    with pytest.raises(ModelError, match="numbers of this model overflow float32"):
        ask(lm, [np.array([1, 2])], [np.array([1])], full=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_answers_as_the_cpu_does(tiny: Tiny) -> None:
    lm = LanguageModel.load(str(tiny.folder), device="cuda", dtype="float32")
    n = sum(map(len, some_positions()))
    wanted = {"full": True, "targets": np.arange(n, dtype=np.int32), "top_n": 5, "keys": True}
    there, here = (ask(model, sequences(), some_positions(), **wanted) for model in (lm, tiny.lm))
    # other kernels, and TF32 is off by default
    np.testing.assert_allclose(there.log_probs, here.log_probs, atol=1e-3, rtol=0)
    np.testing.assert_allclose(there.target_log_probs, here.target_log_probs, atol=1e-3, rtol=0)
    np.testing.assert_allclose(there.keys, here.keys, atol=1e-3, rtol=0)
