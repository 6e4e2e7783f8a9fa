"""A small network from numbers about a prediction to the weight of a source, and how it is fitted. Pure numpy.

    lambda = LARGEST sigmoid(bias + linear x + output tanh(hidden x + hidden_bias))

Gates of several sources make one softmax with the language model: each source weighs o / (1 + sum of all o), where o =
lambda / (1 - lambda) are the odds of its own gate. A gate is fitted to the log-likelihood of the mixture itself (He et
al. 2021, arXiv 2109.04212) by L-BFGS, with the gradient written out. Inputs are standardised while it is fitted; the
parameters that come out take them as they are.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Parameters = Mapping[str, float | Sequence[float]]
Loss = Callable[[Array], tuple[float, Array]]  # its value and gradient

STEPS = 200  # of the descent, at most
FLAT_SLOPE = 1e-10  # the descent ends where no slope is larger
TINY = float(np.finfo(np.float64).tiny)  # smaller products have lost digits: L-BFGS divides by none of them
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


def loss_and_gradient(
    theta: Array, inputs: Array, ratio: Array, hidden: int, largest: float, decay: float = DECAY
) -> tuple[float, Array]:
    """Mean of -log(1 + lambda ratio) over n tokens, with the decay, and its gradient in all parameters (see _unpacked).

    inputs: (n, m). ratio: (n,) p_source / p_LM - 1 of the tokens that came. Where lambda is 0 the loss is that of the
    LM alone, which is 0 here.
    """
    logits, gradient_by = _network(theta, inputs, hidden, decay)
    share = sigmoid(logits)
    inner = 1 + largest * share * ratio
    slope = -largest * ratio * share * (1 - share) / inner / len(ratio)  # by the logit of each token
    return -float(np.log(inner).mean()) + _decayed(theta, decay), gradient_by(slope)


@dataclass(frozen=True)
class Gated:
    """One of several sources whose gates are fitted together, at n tokens. inputs: (n, m), finite. ratio: as in
    `loss_and_gradient`. present: (n,) where the source has a distribution; elsewhere it weighs nothing."""

    inputs: Array
    ratio: Array
    present: npt.NDArray[np.bool_]

    def at(self, rows: npt.NDArray[np.bool_]) -> "Gated":
        """The same at some of the tokens."""
        return Gated(self.inputs[rows], self.ratio[rows], self.present[rows])


def joint_loss_and_gradient(
    theta: Array, sources: Sequence[Gated], hidden: int, largest: float, decay: float = DECAY
) -> tuple[float, Array]:
    """`loss_and_gradient` of the softmax of several gates with the LM: the mean of -log((1 + sum of o p_source / p_LM)
    / (1 + sum of o)). theta: the parameters of all gates, one after another."""
    odds, steep, gradients = [], [], []
    ends = np.cumsum([_size(source.inputs.shape[1], hidden) for source in sources])
    parts = np.split(theta, ends[:-1])
    for source, part in zip(sources, parts, strict=True):
        logits, gradient_by = _network(part, source.inputs, hidden, decay)
        share = sigmoid(logits)
        rest = 1 - largest * share
        odds.append(np.where(source.present, largest * share / rest, 0.0))
        steep.append((1 - share) / rest)  # of log odds by the logit
        gradients.append(gradient_by)
    times = [source.ratio + 1 for source in sources]
    total = 1 + np.sum(odds, axis=0)
    mass = 1 + np.sum([o * q for o, q in zip(odds, times, strict=True)], axis=0)
    slopes = [o * s * (1 / total - q / mass) / len(total) for o, s, q in zip(odds, steep, times, strict=True)]
    loss = float((np.log(total) - np.log(mass)).mean()) + sum(_decayed(part, decay) for part in parts)
    return loss, np.concatenate([gradient_by(slope) for gradient_by, slope in zip(gradients, slopes, strict=True)])


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
    mean, scale = _moments(inputs)
    scaled = (inputs - mean) / scale

    def of(rows: npt.NDArray[np.bool_], decay: float) -> Loss:
        some = (scaled[rows], ratio[rows], hidden, largest, decay)
        return lambda at: loss_and_gradient(at, *some)

    share = start / largest
    theta = _first(inputs.shape[1], hidden, share, np.random.default_rng(seed))
    fixed = _constant(inputs.shape[1], hidden, share)
    return _unscaled(_best(of, theta, fixed, groups, hidden), mean, scale, hidden)


def fit_gates(
    sources: Sequence[Gated],
    groups: npt.NDArray[np.integer],
    *,
    starts: Sequence[float],
    largest: float,
    hidden: int = 0,
    seed: int = 0,
) -> list[Parameters]:
    """The parameters of the gates of several sources that make n tokens likeliest together; never worse on them than
    the same weights everywhere, whose odds are those of `starts`. The rest as in `fit_gate`."""
    moments = [_moments(source.inputs[source.present]) for source in sources]
    scaled = [
        Gated((source.inputs - mean) / scale, source.ratio, source.present)
        for source, (mean, scale) in zip(sources, moments, strict=True)
    ]

    def of(rows: npt.NDArray[np.bool_], decay: float) -> Loss:
        some = [source.at(rows) for source in scaled]
        return lambda at: joint_loss_and_gradient(at, some, hidden, largest, decay)

    rng = np.random.default_rng(seed)
    shapes = [(source.inputs.shape[1], hidden, start / largest) for source, start in zip(sources, starts, strict=True)]
    theta = np.concatenate([_first(*shape, rng) for shape in shapes])
    fixed = np.concatenate([_constant(*shape) for shape in shapes])
    best = _best(of, theta, fixed, groups, hidden)
    parts = np.split(best, np.cumsum([_size(m, hidden) for m, _, _ in shapes])[:-1])
    return [_unscaled(part, *moment, hidden) for part, moment in zip(parts, moments, strict=True)]


def _best(
    loss: Callable[[npt.NDArray[np.bool_], float], Loss],
    theta: Array,
    fixed: Array,
    groups: npt.NDArray[np.integer],
    hidden: int,
) -> Array:
    """The parameters where a descent from theta ends, or `fixed`, where these make the tokens as likely.

    loss: of some of the tokens, with a decay.
    """
    _, number = np.unique(groups, return_inverse=True)
    everywhere = np.ones(len(groups), np.bool_)
    held = number % 5 == 4 if hidden else ~everywhere
    train = ~held
    if not held.any():
        held = train
    best, best_loss, since = theta, np.inf, 0
    of_held = loss(held, DECAY)
    for at in descent(loss(train, DECAY), theta):
        found, _ = of_held(at)
        best, best_loss, since = (at, found, 0) if found < best_loss else (best, best_loss, since + 1)
        if since >= PATIENCE:
            break
    of_all = loss(everywhere, 0.0)
    return best if of_all(best)[0] < of_all(fixed)[0] else fixed


def descent(function: Loss, start: Array) -> Iterator[Array]:
    """The places of a descent by L-BFGS (Nocedal 1980), each lower than the one before. function: value, gradient."""
    at = start
    value, gradient = function(at)
    pairs: list[tuple[Array, Array]] = []
    yield at
    for _ in range(STEPS):
        if np.abs(gradient).max() <= FLAT_SLOPE:
            return
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
        bend, squared = float(moved @ turned), float(turned @ turned)
        if min(bend, squared) > TINY and bend > 1e-12 * squared:
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


def _network(theta: Array, inputs: Array, hidden: int, decay: float) -> tuple[Array, Callable[[Array], Array]]:
    """Logits (n,) of inputs (n, m); and what gives the gradient of a loss in theta, with that of the decay, from its
    slopes (n,) by the logits."""
    bias, linear, weights, hidden_bias, output = _unpacked(theta, inputs.shape[1], hidden)
    active = np.tanh(inputs @ weights + hidden_bias)  # (n, hidden)

    def gradient_by(slope: Array) -> Array:
        behind = slope[:, None] * output * (1 - active * active)  # by what goes into each tanh
        parts = ([slope.sum()], inputs.T @ slope, (inputs.T @ behind).ravel(), behind.sum(axis=0), active.T @ slope)
        gradient = np.concatenate(parts)
        gradient[1:] += decay * theta[1:]
        return gradient

    return bias[0] + inputs @ linear + active @ output, gradient_by


def _decayed(theta: Array, decay: float) -> float:
    return 0.5 * decay * float(theta[1:] @ theta[1:])


def _size(m: int, hidden: int) -> int:
    """Parameters of a network over m inputs."""
    return 1 + m + m * hidden + 2 * hidden


def _first(m: int, hidden: int, share: float, rng: np.random.Generator) -> Array:
    """Where a descent begins: far from 0 and 1, where the sigmoid has no slope."""
    theta = _constant(m, hidden, min(max(share, 0.02), 0.9))
    theta[1 + m : 1 + m + m * hidden] = rng.normal(0, 1 / np.sqrt(m), m * hidden)
    return theta


def _constant(m: int, hidden: int, share: float) -> Array:
    """The parameters by which the sigmoid is `share` everywhere."""
    theta = np.zeros(_size(m, hidden))
    theta[0] = _logit(share)
    return theta


def _moments(inputs: Array) -> tuple[Array, Array]:
    """Mean and scale (m,) of inputs (n, m); zeros and ones of none."""
    if not len(inputs):
        return np.zeros(inputs.shape[1]), np.ones(inputs.shape[1])
    scale = inputs.std(axis=0)
    return inputs.mean(axis=0), np.where(scale > 0, scale, 1.0)


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
