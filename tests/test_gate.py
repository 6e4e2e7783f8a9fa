"""The network of gates: its gradient beside finite differences, its descent, and what it finds."""

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from knnlm.gate import (
    LOGIT_RANGE,
    Gated,
    descent,
    fit_gate,
    fit_gates,
    gate_logits,
    joint_loss_and_gradient,
    loss_and_gradient,
    sigmoid,
)
from knnlm.rules import softmax

LARGEST = 0.99
Array = npt.NDArray[np.float64]


def data(seed: int, n: int = 200, m: int = 3) -> tuple[Array, Array]:
    """Inputs on different scales, and ratios that are large where the first input is."""
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(n, m))
    ratio = np.expm1(rng.normal(size=n) + 2 * inputs[:, 0])
    return inputs * 10.0 ** np.arange(m) + 5, ratio


def mean_loss(weights: Array, ratio: Array) -> float:
    return -float(np.log1p(weights * ratio).mean())


@pytest.mark.parametrize("hidden", [0, 3])
def test_the_gradient_is_that_of_finite_differences(hidden: int) -> None:
    inputs, ratio = data(0, n=20)
    inputs = (inputs - inputs.mean(axis=0)) / inputs.std(axis=0)
    theta = np.random.default_rng(1).normal(size=4 + 5 * hidden)
    _, gradient = loss_and_gradient(theta, inputs, ratio, hidden, LARGEST)
    step = 1e-6
    for i in range(len(theta)):
        moved = [theta + side * step * (np.arange(len(theta)) == i) for side in (1, -1)]
        above, below = (loss_and_gradient(at, inputs, ratio, hidden, LARGEST)[0] for at in moved)
        assert gradient[i] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


def test_the_descent_goes_down_to_the_bottom() -> None:
    def banana(at: Array) -> tuple[float, Array]:
        x, y = at
        value = (1 - x) ** 2 + 100 * (y - x * x) ** 2
        return value, np.array([-2 * (1 - x) - 400 * x * (y - x * x), 200 * (y - x * x)])

    places = list(descent(banana, np.array([-1.2, 1.0])))
    values = [banana(at)[0] for at in places]
    assert values == sorted(values, reverse=True)
    np.testing.assert_allclose(places[-1], [1, 1], atol=1e-5)


def test_a_descent_divides_by_no_product_that_is_zero() -> None:
    def steep_beside_almost_flat(at: Array) -> tuple[float, Array]:
        return 5e-4 * float(at[0] * at[0]) + float(at[1]), np.array([1e-3 * at[0], 1.0])

    places = list(descent(steep_beside_almost_flat, np.array([1e-157, 0.0])))  # a division by zero would be a warning
    assert places[-1][1] < -1


def test_a_descent_ends_where_it_is_flat() -> None:
    def almost_flat(at: Array) -> tuple[float, Array]:
        return 5e-4 * float(at @ at), 1e-3 * at

    assert len(list(descent(almost_flat, np.array([1e-157])))) == 1


@pytest.mark.parametrize("hidden", [0, 4])
def test_what_is_fitted_is_better_than_one_weight_and_holds_for_inputs_as_they_are(hidden: int) -> None:
    inputs, ratio = data(2, n=2000)
    grid = np.linspace(0, LARGEST, 500)
    fixed = grid[np.argmin([mean_loss(np.full(len(ratio), w), ratio) for w in grid])]
    parameters = fit_gate(inputs, ratio, np.arange(2000) // 50, start=fixed, largest=LARGEST, hidden=hidden)
    weights = LARGEST * sigmoid(gate_logits(inputs, parameters))
    assert mean_loss(weights, ratio) < mean_loss(np.full(len(ratio), fixed), ratio) - 0.05
    assert np.corrcoef(weights, inputs[:, 0])[0, 1] > 0.8
    other, other_ratio = data(3, n=2000)
    assert mean_loss(LARGEST * sigmoid(gate_logits(other, parameters)), other_ratio) < mean_loss(
        np.full(len(ratio), fixed), other_ratio
    )


def test_two_logistic_parameters_are_those_of_a_dense_grid() -> None:
    rng = np.random.default_rng(4)
    inputs = rng.uniform(size=(300, 1))
    ratio = np.expm1(rng.normal(size=300) + 3 - 6 * inputs[:, 0])
    parameters = fit_gate(inputs, ratio, np.zeros(300, np.int64), start=0.5, largest=LARGEST)
    found = mean_loss(LARGEST * sigmoid(gate_logits(inputs, parameters)), ratio)
    biases, slopes = np.meshgrid(np.linspace(-10, 20, 151), np.linspace(-40, 10, 251))
    best = min(
        mean_loss(LARGEST * sigmoid(bias + slope * inputs[:, 0]), ratio)
        for bias, slope in zip(biases.ravel(), slopes.ravel(), strict=True)
    )
    assert best - 1e-3 < found < best + 1e-3


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), hidden=st.sampled_from([0, 2]), start=st.floats(0, LARGEST))
def test_it_is_never_worse_than_where_it_starts(seed: int, n: int, hidden: int, start: float) -> None:
    inputs, ratio = data(seed, n)
    parameters = fit_gate(inputs, ratio, np.arange(n) // 4, start=start, largest=LARGEST, hidden=hidden)
    weights = LARGEST * sigmoid(gate_logits(inputs, parameters))
    assert mean_loss(weights, ratio) <= mean_loss(np.full(n, start), ratio) + 1e-9


def test_logits_are_bounded() -> None:
    assert gate_logits(np.array([[1e9], [-1e9]]), {"bias": 0.0, "linear": [1.0]}).tolist() == [
        LOGIT_RANGE, -LOGIT_RANGE,
    ]  # fmt: skip
    with pytest.raises(KeyError):
        gate_logits(np.zeros((1, 1)), {"lambda": 0.5})


def several(seed: int, n: int = 200) -> list[Gated]:
    """Three sources with other inputs each, absent at other tokens."""
    rng = np.random.default_rng(seed)
    found = [data(seed + i, n, m) for i, m in enumerate((3, 2, 4))]
    return [Gated(inputs, ratio, rng.random(n) < 0.9) for inputs, ratio in found]


def joint_loss(weights: list[Array], sources: list[Gated]) -> float:
    """Mixed as probabilities: the LM has what is left."""
    there = [np.where(source.present, w, 0.0) for w, source in zip(weights, sources, strict=True)]
    mixed = 1 - np.sum(there, axis=0) + np.sum([w * (s.ratio + 1) for w, s in zip(there, sources, strict=True)], axis=0)
    return -float(np.log(mixed).mean())


@pytest.mark.parametrize("hidden", [0, 3])
def test_the_gradient_of_gates_together_is_that_of_finite_differences(hidden: int) -> None:
    sources = [Gated((s.inputs - 5) / 10.0 ** np.arange(s.inputs.shape[1]), s.ratio, s.present) for s in several(0, 20)]
    theta = np.random.default_rng(1).normal(size=12 + 15 * hidden)
    _, gradient = joint_loss_and_gradient(theta, sources, hidden, LARGEST)
    step = 1e-6
    for i in range(len(theta)):
        moved = [theta + side * step * (np.arange(len(theta)) == i) for side in (1, -1)]
        above, below = (joint_loss_and_gradient(at, sources, hidden, LARGEST)[0] for at in moved)
        assert gradient[i] == pytest.approx((above - below) / (2 * step), rel=1e-5, abs=1e-8)


def test_one_gate_alone_has_the_loss_of_one_and_several_that_of_the_mixture_they_make() -> None:
    sources = several(3)
    theta = np.random.default_rng(4).normal(size=14) / 1000
    alone = Gated(sources[0].inputs, sources[0].ratio, np.ones(200, np.bool_))
    found, gradient = joint_loss_and_gradient(theta, [alone], 2, LARGEST)
    expected, expected_gradient = loss_and_gradient(theta, alone.inputs, alone.ratio, 2, LARGEST)
    assert found == pytest.approx(expected, rel=1e-9)
    np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-6, atol=1e-12)
    fitted = fit_gates(sources, np.arange(200) // 10, starts=[0.2, 0.3, 0.1], largest=LARGEST, hidden=2)
    flat = [np.concatenate([np.ravel(gate[n]) for n in ("bias", "linear", "hidden", "hidden_bias", "output")])
            for gate in fitted]  # fmt: skip
    weights = softmax(
        [
            np.where(source.present, LARGEST * sigmoid(gate_logits(source.inputs, gate)), 0.0)
            for source, gate in zip(sources, fitted, strict=True)
        ]
    )
    found, _ = joint_loss_and_gradient(np.concatenate(flat), sources, 2, LARGEST, decay=0.0)
    assert found == pytest.approx(joint_loss(weights, sources), rel=1e-6)


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), hidden=st.sampled_from([0, 2]), most=st.floats(0, 0.33))
def test_gates_together_are_never_worse_than_the_weights_they_begin_with(
    seed: int, n: int, hidden: int, most: float
) -> None:
    sources = several(seed, n)
    weights = [most, most / 2, most / 3]
    odds = [w / (1 - sum(weights)) for w in weights]
    fitted = fit_gates(sources, np.arange(n) // 4, starts=[o / (1 + o) for o in odds], largest=LARGEST, hidden=hidden)
    found = softmax(
        [
            np.where(source.present, LARGEST * sigmoid(gate_logits(source.inputs, gate)), 0.0)
            for source, gate in zip(sources, fitted, strict=True)
        ]
    )
    odds_alone = [np.where(source.present, o / (1 + o), 0.0) for source, o in zip(sources, odds, strict=True)]
    assert joint_loss(found, sources) <= joint_loss(softmax(odds_alone), sources) + 1e-8


def test_gates_that_see_which_source_is_right_are_better_than_weights() -> None:
    sources = several(5, 2000)
    fitted = fit_gates(sources, np.arange(2000) // 50, starts=[0.3, 0.3, 0.3], largest=LARGEST, hidden=4)
    found = softmax(
        [
            np.where(source.present, LARGEST * sigmoid(gate_logits(source.inputs, gate)), 0.0)
            for source, gate in zip(sources, fitted, strict=True)
        ]
    )
    grid = np.linspace(0, 0.9, 10)
    fixed = min(
        joint_loss([np.full(2000, a), np.full(2000, b), np.full(2000, c)], sources)
        for a in grid for b in grid for c in grid if a + b + c < 1
    )  # fmt: skip
    assert joint_loss(found, sources) < fixed - 0.1
