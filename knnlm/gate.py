"""A small network from numbers about a prediction to the weight of a source, and how it is fitted. Pure numpy.

    lambda = LARGEST sigmoid(bias + linear x + output tanh(hidden x + hidden_bias))

It is fitted to the log-likelihood of the mixture itself (He et al. 2021, arXiv 2109.04212) by L-BFGS, with the gradient
written out. Inputs are standardised while it is fitted; the parameters that come out take them as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Parameters = Mapping[str, float | Sequence[float]]

STEPS = 200  # of the descent, at most
PATIENCE = 20  # steps without a better likelihood of the held-out documents
MEMORY = 10  # pairs of steps and gradients that L-BFGS keeps
SHRINK, ENOUGH, HALVINGS = 0.5, 1e-4, 30  # of the line search: a step must gain this share of what the slope promises
DECAY = 1e-4  # times half the sum of squares of all parameters but the bias
LOGIT_RANGE = 40.0  # beyond it a weight differs from 0 or its largest by less than 1e-17


def gate_logits(inputs: Array, parameters: Parameters) -> Array:
    """(n,) of inputs (n, m), before the sigmoid. Raises KeyError for parameters of something else."""
    logits: Array = np.asarray(parameters["bias"]) + inputs @ np.asarray(parameters["linear"])
    bias = np.asarray(parameters.get("hidden_bias", ()))
    if bias.size:
        hidden = np.tanh(inputs @ np.reshape(parameters["hidden"], (-1, len(bias))) + bias)
        logits = logits + hidden @ np.asarray(parameters["output"])
    return np.clip(logits, -LOGIT_RANGE, LOGIT_RANGE)


def sigmoid(logits: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    result: Array = 0.5 * (1 + np.tanh(0.5 * logits))
    return result


def loss_and_gradient(theta: Array, inputs: Array, ratio: Array, hidden: int, largest: float) -> tuple[float, Array]:
    """Mean of -log(1 + lambda ratio) over n tokens, with the decay, and its gradient in all parameters (see _unpacked).

    inputs: (n, m). ratio: (n,) p_source / p_LM - 1 of the tokens that came. Where lambda is 0 the loss is that of the
    LM alone, which is 0 here.
    """
    bias, linear, weights, hidden_bias, output = _unpacked(theta, inputs.shape[1], hidden)
    active = np.tanh(inputs @ weights + hidden_bias)  # (n, hidden)
    share = sigmoid(bias[0] + inputs @ linear + active @ output)
    inner = 1 + largest * share * ratio
    loss = -float(np.log(inner).mean()) + 0.5 * DECAY * float(theta[1:] @ theta[1:])
    slope = -largest * ratio * share * (1 - share) / inner / len(ratio)  # by the logit of each token
    behind = slope[:, None] * output * (1 - active * active)  # by what goes into each tanh
    parts = ([slope.sum()], inputs.T @ slope, (inputs.T @ behind).ravel(), behind.sum(axis=0), active.T @ slope)
    gradient = np.concatenate(parts)
    gradient[1:] += DECAY * theta[1:]
    return loss, gradient


def fit_gate(
    inputs: Array,
    ratio: Array,
    groups: npt.NDArray[np.integer],
    *,
    start: float,
    largest: float,
    hidden: int = 0,
    seed: int = 0,
) -> Parameters:
    """The parameters that make n tokens likeliest; never worse on them than the same weight `start` everywhere.

    inputs: (n, m). ratio: as in `loss_and_gradient`. groups: (n,) the document of each token: with hidden units every
    fifth document is held out, and the descent ends where these become less likely.
    """
    mean, scale = inputs.mean(axis=0), inputs.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    scaled = (inputs - mean) / scale
    m = inputs.shape[1]
    theta = np.zeros(1 + m + m * hidden + 2 * hidden)
    # far from 0 and 1, where the sigmoid has no slope
    theta[0] = _logit(min(max(start, 0.02), 0.9 * largest) / largest)
    theta[1 + m : 1 + m + m * hidden] = np.random.default_rng(seed).normal(0, 1 / np.sqrt(m), m * hidden)
    _, number = np.unique(groups, return_inverse=True)
    held = number % 5 == 4 if hidden else np.zeros(len(ratio), np.bool_)
    if not held.any():
        held[:] = True
        train = held
    else:
        train = ~held

    def loss(at: Array, rows: npt.NDArray[np.bool_]) -> float:
        return loss_and_gradient(at, scaled[rows], ratio[rows], hidden, largest)[0]

    train_inputs, train_ratio = scaled[train], ratio[train]
    best, best_loss, since = theta, np.inf, 0
    steps = descent(lambda at: loss_and_gradient(at, train_inputs, train_ratio, hidden, largest), theta)
    for theta in steps:
        found = loss(theta, held)
        best, best_loss, since = (theta, found, 0) if found < best_loss else (best, best_loss, since + 1)
        if since >= PATIENCE:
            break
    fixed = np.zeros_like(best)
    fixed[0] = _logit(start / largest)
    everywhere = np.ones(len(ratio), np.bool_)
    likelihood = loss(best, everywhere) - 0.5 * DECAY * float(best[1:] @ best[1:])
    chosen = best if likelihood < loss(fixed, everywhere) else fixed
    return _unscaled(chosen, mean, scale, hidden)


def descent(function: Callable[[Array], tuple[float, Array]], start: Array) -> Iterator[Array]:
    """The places of a descent by L-BFGS (Nocedal 1980), each lower than the one before. function: value, gradient."""
    at = start
    value, gradient = function(at)
    pairs: list[tuple[Array, Array]] = []
    yield at
    for _ in range(STEPS):
        direction = -_times_inverse_hessian(gradient, pairs)
        promised = float(direction @ gradient)
        length = 1.0 if pairs else min(1.0, 1.0 / (1e-12 + float(np.abs(gradient).sum())))
        for _ in range(HALVINGS):
            there = at + length * direction
            new_value, new_gradient = function(there)
            if new_value <= value + ENOUGH * length * promised:
                break
            length *= SHRINK
        if not new_value < value:
            return
        moved, turned = there - at, new_gradient - gradient
        if float(moved @ turned) > 1e-12 * float(turned @ turned):
            pairs = [*pairs[-MEMORY + 1 :], (moved, turned)]
        at, value, gradient = there, new_value, new_gradient
        yield at


def _times_inverse_hessian(gradient: Array, pairs: Sequence[tuple[Array, Array]]) -> Array:
    """The two loops of L-BFGS."""
    result = gradient.copy()
    factors = []
    for moved, turned in reversed(pairs):
        factor = (moved @ result) / (moved @ turned)
        result -= factor * turned
        factors.append(factor)
    if pairs:
        moved, turned = pairs[-1]
        result *= (moved @ turned) / (turned @ turned)
    for (moved, turned), factor in zip(pairs, reversed(factors), strict=True):
        result += moved * (factor - (turned @ result) / (moved @ turned))
    return result


def _unpacked(theta: Array, m: int, hidden: int) -> tuple[Array, Array, Array, Array, Array]:
    """bias (1,), linear (m,), hidden (m, hidden), hidden_bias (hidden,), output (hidden,)."""
    bias, linear, weights, hidden_bias, output = np.split(theta, np.cumsum([1, m, m * hidden, hidden]))
    return bias, linear, weights.reshape(m, hidden), hidden_bias, output


def _unscaled(theta: Array, mean: Array, scale: Array, hidden: int) -> Parameters:
    """The parameters for inputs that are not standardised."""
    bias, linear, weights, hidden_bias, output = _unpacked(theta, len(mean), hidden)
    linear, weights = linear / scale, weights / scale[:, None]
    parameters: dict[str, float | Sequence[float]] = {"bias": float(bias[0] - mean @ linear), "linear": linear.tolist()}
    if hidden:
        moved = hidden_bias - mean @ weights
        parameters |= {"hidden": weights.ravel().tolist(), "hidden_bias": moved.tolist(), "output": output.tolist()}
    return parameters


def _logit(share: float) -> float:
    with np.errstate(divide="ignore"):
        return float(np.clip(np.log(share) - np.log1p(-share), -LOGIT_RANGE, LOGIT_RANGE))
