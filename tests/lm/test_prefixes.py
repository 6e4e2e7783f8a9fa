"""Sequences that go on from what is kept of them answer as if nothing were kept, in whatever company."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from knnlm.errors import ModelError
from knnlm.lm import model as model_module
from knnlm.lm import prefixes as prefixes_module
from knnlm.lm.model import LanguageModel
from knnlm.lm.slots import Slots
from knnlm.messages import ForwardRequest
from tests.lm import tiny_models
from tests.lm.conftest import Tiny

TOLERANCE = 1e-5  # of log-probabilities, and of keys, whose values are around 5


@pytest.fixture
def fresh(tiny: Tiny) -> Tiny:
    """A tiny model whose prefix cache is empty."""
    tiny.lm.prefixes = kept_by(tiny.lm)
    return tiny


@pytest.fixture
def lm(llama: Tiny) -> LanguageModel:
    llama.lm.prefixes = kept_by(llama.lm)
    return llama.lm


def kept_by(lm: LanguageModel, max_bytes: int = 1 << 24) -> prefixes_module.Prefixes:
    return LanguageModel(lm._model, lm.tokenizer, lm.info, prefix_cache_bytes=max_bytes).prefixes  # type: ignore[return-value]


def tokens(rng: np.random.Generator, length: int) -> npt.NDArray[np.int32]:
    return rng.integers(tiny_models.VOCAB, size=length).astype(np.int32)


def ask(lm: LanguageModel, sequences: list[npt.NDArray[np.int32]], **wanted: Any) -> tuple[Any, Any]:
    """What is answered with the cache and without, of the last position of each."""
    positions = [np.array([len(sequence) - 1], np.int32) for sequence in sequences]
    request = ForwardRequest(sequences, positions, **(wanted or {"full": True, "keys": True}))
    return lm.forward(ForwardRequest(**(vars(request) | {"cache": True}))), lm.forward(request)


def check(lm: LanguageModel, sequences: list[npt.NDArray[np.int32]], tolerance: float = TOLERANCE) -> None:
    with_cache, without = ask(lm, sequences)
    np.testing.assert_allclose(with_cache.log_probs, without.log_probs, atol=tolerance, rtol=tolerance)
    np.testing.assert_allclose(with_cache.keys, without.keys, atol=tolerance, rtol=tolerance)


def fed(lm: LanguageModel) -> list[tuple[int, ...]]:
    """Shapes of the ids of every pass from now on."""
    seen: list[tuple[int, ...]] = []
    base: Any = lm._base
    base.get_input_embeddings().register_forward_hook(lambda _module, args, _out: seen.append(tuple(args[0].shape)))
    return seen


def test_sequences_of_different_lengths_go_on_together(fresh: Tiny) -> None:
    rng = np.random.default_rng(0)
    sequences = [tokens(rng, n) for n in (3, 17, 1, 30, 9)]
    check(fresh.lm, sequences)
    for step in range(14):
        some = [i for i in range(5) if (step + i) % 4]  # not all take part in each step
        for i in some:
            sequences[i] = np.append(sequences[i], tokens(rng, 1 + (step == 7) * i))
        check(fresh.lm, [sequences[i] for i in some])
        if step == 11:
            sequences[2] = tokens(rng, 20)
    prefixes = fresh.lm.prefixes
    assert prefixes is not None
    assert prefixes.found > 0.8 * prefixes.asked


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4, 5))])
def test_whatever_comes_the_answers_are_those_without_a_cache(lm: LanguageModel, seed: int) -> None:
    """Steps, new sequences, shared and repeated beginnings, several positions, too little room."""
    rng = np.random.default_rng(seed)
    lm.prefixes = kept_by(lm, int(rng.choice([40_000, 200_000, 1 << 24])))
    known = [tokens(rng, n) for n in rng.integers(1, 40, 6)]
    for _ in range(40):
        sequences = []
        for _ in range(rng.integers(1, 9)):
            one = known[rng.integers(len(known))]
            one = one[: rng.integers(1, len(one) + 1)] if rng.random() < 0.3 else one
            one = np.append(one, tokens(rng, int(rng.integers(0, 4))))[: tiny_models.CONTEXT]
            sequences.append(one)
        known = (known + sequences)[-12:]
        positions = [
            np.sort(rng.choice(len(s), size=rng.integers(0, min(3, len(s)) + 1), replace=False)).astype(np.int32)
            if rng.random() < 0.3 else np.array([len(s) - 1], np.int32)
            for s in sequences
        ]  # fmt: skip
        wanted: dict[str, Any] = {"full": True, "keys": bool(rng.random() < 0.5)}
        with_cache: Any = lm.forward(ForwardRequest(sequences, positions, cache=True, **wanted))
        without: Any = lm.forward(ForwardRequest(sequences, positions, **wanted))
        np.testing.assert_allclose(with_cache.log_probs, without.log_probs, atol=TOLERANCE, rtol=TOLERANCE)
        if with_cache.keys is not None:
            np.testing.assert_allclose(with_cache.keys, without.keys, atol=TOLERANCE, rtol=TOLERANCE)
        assert lm.prefixes.held_bytes <= lm.prefixes._max_bytes


def test_a_step_feeds_one_token_and_copies_nothing(lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    sequences = [tokens(rng, n) for n in (5, 9, 12)]
    ask(lm, sequences)
    monkeypatch.setattr(Slots, "swap", None)  # they are neighbors from the first
    monkeypatch.setattr(Slots, "moved", None)
    seen = fed(lm)
    for _ in range(9):
        sequences = [np.append(one, tokens(rng, 1)) for one in sequences]
        positions = [np.array([len(one) - 1], np.int32) for one in sequences]
        lm.forward(ForwardRequest(sequences, positions, keys=True, cache=True))
    assert seen == [(3, 1)] * 9


def test_a_prompt_does_not_widen_the_steps_beside_it(lm: LanguageModel) -> None:
    rng = np.random.default_rng(2)
    sequences = [tokens(rng, n) for n in (5, 9, 12)]
    ask(lm, sequences)
    seen = fed(lm)
    sequences = [*(np.append(one, tokens(rng, 1)) for one in sequences), tokens(rng, 40)]
    with_cache, without = ask(lm, sequences)
    assert seen[:2] == [(3, 1), (1, 40)]
    np.testing.assert_allclose(with_cache.log_probs, without.log_probs, atol=TOLERANCE)


def test_equal_sequences_are_computed_once_and_may_part(lm: LanguageModel) -> None:
    rng = np.random.default_rng(3)
    prompt = tokens(rng, 30)
    seen = fed(lm)
    n = 4
    temperatures = np.array([0.5, 1, 2, 4], np.float32)
    request = ForwardRequest([prompt] * n, [np.array([29], np.int32)] * n, temperatures=temperatures, cache=True)
    together: Any = lm.forward(request)
    assert seen == [(1, 30)]
    alone: Any = lm.forward(ForwardRequest(**(vars(request) | {"cache": False})))
    np.testing.assert_allclose(together.log_power_sums, alone.log_power_sums, atol=TOLERANCE)
    seen.clear()
    apart = [np.append(prompt, np.int32(i)) for i in range(n)]
    ask(lm, apart)
    assert seen[0] == (4, 1)
    check(lm, [np.append(one, np.int32(7)) for one in apart])


def test_a_prompt_that_begins_as_another_costs_the_rest(lm: LanguageModel) -> None:
    rng = np.random.default_rng(14)
    system = tokens(rng, 30)
    check(lm, [np.append(system, tokens(rng, 5))])
    seen = fed(lm)
    check(lm, [np.append(system, tokens(rng, 7)), np.append(system, tokens(rng, 5))])
    assert seen[0] == (2, 7)
    seen.clear()
    check(lm, [system[:20]])  # a beginning alone: its last position is computed again
    assert seen[0] == (1, 1)


def test_the_same_tokens_again_run_no_model(lm: LanguageModel) -> None:
    rng = np.random.default_rng(5)
    sequences = [tokens(rng, n) for n in (5, 9, 12)]
    first, _ = ask(lm, sequences, top_n=3, keys=True)
    seen = fed(lm)
    positions = [np.array([len(one) - 1], np.int32) for one in sequences]
    candidates = [np.array([1, 2, 3], np.int32)] * 3
    kinds: list[dict[str, Any]] = [
        {"candidates": candidates},
        {"full": True},
        {"top_n": 3},
        {"statistics": True},
        {"temperatures": np.full(3, 2, np.float32)},
        {"targets": np.array([4, 5, 6], np.int32), "full": True, "statistics": True},
    ]
    for wanted in kinds:
        again: Any = lm.forward(ForwardRequest(sequences[::-1], positions[::-1], cache=True, **wanted))
        assert seen == []
        plain = lm.forward(ForwardRequest(sequences[::-1], positions[::-1], **wanted))
        seen.clear()
        for name in (
            "candidate_log_probs",
            "log_probs",
            "top_log_probs",
            "entropy",
            "log_power_sums",
            "target_log_probs",
        ):
            ours, theirs = getattr(again, name), getattr(plain, name)
            assert (ours is None) == (theirs is None)
            if ours is not None:
                np.testing.assert_allclose(ours, theirs, atol=TOLERANCE, rtol=TOLERANCE)
    again = lm.forward(ForwardRequest(sequences, positions, top_n=3, cache=True))
    np.testing.assert_array_equal(again.top_log_probs, first.top_log_probs)
    lm.forward(ForwardRequest(sequences, positions, keys=True, cache=True))
    assert seen == [(3, 1)]  # keys are not kept
    sequences = [np.append(one, tokens(rng, 1)) for one in sequences]
    check(lm, sequences)  # and they go on from there


def test_what_is_not_asked_for_is_not_kept(lm: LanguageModel) -> None:
    sequence = tokens(np.random.default_rng(6), 20)
    prefixes = lm.prefixes
    assert prefixes is not None
    lm.forward(ForwardRequest([sequence], [np.array([19], np.int32)], keys=True))
    assert (prefixes.asked, prefixes.found, prefixes.held_bytes) == (0, 0, 0)
    lm.forward(ForwardRequest([sequence], [np.array([19], np.int32)], keys=True, cache=True))
    lm.forward(ForwardRequest([sequence], [np.array([18], np.int32)], keys=True, cache=True))
    assert (prefixes.asked, prefixes.found) == (39, 18)
    off = LanguageModel(lm._model, lm.tokenizer, lm.info, prefix_cache_bytes=0)
    assert off.prefixes is None
    check(off, [sequence, sequence[:5]])


def test_the_least_recently_used_goes_and_the_longest_is_left_out(lm: LanguageModel) -> None:
    rng = np.random.default_rng(7)
    slot = kept_by(lm)._shape.slot_bytes
    lm.prefixes = kept_by(lm, 3 * slot(65))
    first, second, third, fourth = (tokens(rng, 30) for _ in range(4))
    for one in (first, second, third, first, fourth):
        ask(lm, [one], top_n=1)
    seen = fed(lm)
    for one, width in ((first, 1), (third, 1), (fourth, 1), (second, 30)):
        positions = [np.array([29], np.int32)]
        lm.forward(ForwardRequest([one], positions, keys=True, cache=True))
        assert seen.pop() == (1, width)
    lm.prefixes = kept_by(lm, 2 * slot(41))
    sequences = [tokens(rng, n) for n in (60, 30, 40)]
    check(lm, sequences)
    seen.clear()
    ask(lm, [np.append(one, tokens(rng, 1))[-len(one) - 1 :] for one in sequences[1:2]], keys=True)
    assert seen[0] == (1, 1)
    seen.clear()
    ask(lm, [np.append(sequences[0], tokens(rng, 1))], keys=True)
    assert seen[0] == (1, 61)


def test_a_failed_pass_leaves_nothing_behind(llama: Tiny, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(8)
    good, bad = tokens(rng, 10), tokens(rng, 20)
    lm = LanguageModel.load(str(llama.folder), device="cpu")
    bad[5] = 299
    good[good == 299] = 0
    base: Any = lm._base
    with torch.no_grad():
        base.get_input_embeddings().weight[299] = float("nan")
    check(lm, [good])
    with pytest.raises(ModelError, match="overflow"):
        ask(lm, [bad, np.append(good, np.int32(3))], full=True)
    prefixes = lm.prefixes
    assert prefixes is not None
    assert all(bool(tensor.isfinite().all()) for tensor in (*prefixes.slots.keys, *prefixes.slots.values))
    check(lm, [np.append(good, np.int32(i)) for i in range(4)])


def test_callers_from_several_threads_take_turns(lm: LanguageModel) -> None:
    def one(seed: int) -> None:
        rng = np.random.default_rng(seed)
        sequence = tokens(rng, 5)
        for _ in range(20):
            sequence = np.append(sequence, tokens(rng, 1))
            check(lm, [sequence])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(one, range(8)))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_bfloat16_agrees_as_far_as_its_bits_go(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp(name)
    tiny_models.save(tiny_models.random_model(tiny_models.CONFIGS[name]()), folder)
    lm = LanguageModel.load(str(folder), device="cpu", dtype="bfloat16")
    rng = np.random.default_rng(9)
    sequences = [tokens(rng, n) for n in (3, 17, 9)]
    for _ in range(6):
        check(lm, sequences, tolerance=0.25)
        sequences = [np.append(one, tokens(rng, 1)) for one in sequences]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setattr(model_module, "CPU_BATCH_TOKENS", 2),
        lambda m: m.setattr(prefixes_module, "MAX_MASK_NUMBERS", 60),
    ],
)
def test_passes_are_bounded(lm: LanguageModel, change: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> None:
    change(monkeypatch)
    rng = np.random.default_rng(10)
    sequences = [tokens(rng, n) for n in (3, 17, 1, 30, 9)]
    check(lm, sequences)
    sequences = [np.append(one, tokens(rng, 2)) for one in sequences]
    check(lm, sequences)
    seen = fed(lm)
    lm.forward(
        ForwardRequest(
            [np.append(one, np.int32(1)) for one in sequences],
            [np.array([len(one)]) for one in sequences],
            keys=True,
            cache=True,
        )
    )
    assert len(seen) > 1
