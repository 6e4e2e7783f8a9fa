import math

import numpy as np
import pytest

from knnlm.errors import InvalidRequest
from knnlm.sampling import Known, SamplingOptions, choose, uniform

WAYS = [
    SamplingOptions(temperature=0),
    SamplingOptions(),
    SamplingOptions(temperature=0.3),
    SamplingOptions(temperature=2.5),
    SamplingOptions(top_k=1),
    SamplingOptions(top_k=7, temperature=0.8),
    SamplingOptions(top_p=0.6),
    SamplingOptions(top_p=0.95, top_k=40, min_p=0.01, temperature=1.3),
    SamplingOptions(min_p=0.2),
    SamplingOptions(presence_penalty=1.5, frequency_penalty=-0.7),
    SamplingOptions(logit_bias={3: 4.0, 17: -100.0}, frequency_penalty=2.0, top_p=0.9),
]
COUNTS = {0: 1, 3: 2, 250: 5}


def distribution(size: int, seed: int, sharpness: float = 3.0) -> np.ndarray:
    logits = sharpness * np.random.default_rng(seed).standard_normal(size)
    logits[seed % size] = -np.inf  # a token without probability
    log_probs: np.ndarray = logits - np.logaddexp.reduce(logits)
    return log_probs


def by_hand(log_probs: np.ndarray, options: SamplingOptions, counts: dict[int, int], draw: float) -> int:
    """The same in the plainest way: every token in order, one after another."""
    scores = log_probs.copy()
    for token, bias in options.logit_bias.items():
        scores[token] += bias
    for token, count in counts.items():
        scores[token] -= options.presence_penalty + options.frequency_penalty * count
    order = sorted((t for t in range(len(scores)) if scores[t] > -math.inf), key=lambda t: (-scores[t], t))
    if options.temperature == 0:
        return order[0]
    p = {t: math.exp((scores[t] - scores[order[0]]) / options.temperature) for t in order}
    order = [t for t in order if p[t] >= options.min_p]
    order = order[: options.top_k] if options.top_k else order
    total, kept, mass = sum(p[t] for t in order), [], 0.0
    for token in order:
        kept.append(token)
        mass += p[token]
        if mass >= options.top_p * total * (1 - 1e-12):
            break
    passed = 0.0
    for token in kept:
        passed += p[token]
        if passed > draw * mass:
            return token
    return kept[-1]


@pytest.mark.parametrize("options", WAYS)
def test_equals_the_plain_way(options: SamplingOptions) -> None:
    for seed in range(4):
        log_probs = distribution(400, seed)
        for draw in np.linspace(0, 0.999999, 40):
            chosen = choose(Known(np.arange(400), log_probs), options, COUNTS, draw)
            assert chosen == by_hand(log_probs, options, COUNTS, draw)


@pytest.mark.parametrize("options", WAYS)
def test_what_is_chosen_from_a_part_is_what_is_chosen_from_all(options: SamplingOptions) -> None:
    """The part: the likeliest, some neighbors' tokens and all that penalties and bias speak of."""
    size, undecided = 400, 0
    for seed in range(4):
        log_probs = distribution(size, seed)
        likeliest = np.argsort(-log_probs)[:60]
        bound = log_probs[likeliest[-1]]
        others = np.random.default_rng(seed).choice(size, 30, replace=False)
        tokens = np.unique(np.concatenate([likeliest, others, [*COUNTS, *options.logit_bias]]))
        rest = np.delete(log_probs, tokens) / (options.temperature or 1)
        known = Known(tokens, log_probs[tokens], bound, np.logaddexp.reduce(rest))
        for draw in np.linspace(0, 0.999999, 40):
            chosen = choose(known, options, COUNTS, draw)
            undecided += chosen is None
            if chosen is not None:
                assert chosen == by_hand(log_probs, options, COUNTS, draw)
    assert undecided <= 80  # of 160: the part holds nearly all that is likely, and a flat tail is asked for


def test_a_choice_that_hangs_on_the_unknown_rest_is_not_made() -> None:
    half = np.log([0.3, 0.2])
    known = Known(np.array([5, 9]), half, bound=half[1], log_rest=math.log(0.5))
    assert choose(known, SamplingOptions(temperature=0), {}, 0.0) == 5
    assert choose(known, SamplingOptions(), {}, 0.29) == 5
    assert choose(known, SamplingOptions(), {}, 0.31) is None  # another token of 0.2 may come before 9
    assert choose(known, SamplingOptions(top_k=1), {}, 0.99) == 5
    assert choose(known, SamplingOptions(top_k=2), {}, 0.1) is None
    assert choose(known, SamplingOptions(top_p=0.25), {}, 0.99) == 5
    assert choose(known, SamplingOptions(min_p=0.9), {}, 0.99) == 5
    assert choose(known, SamplingOptions(min_p=0.5), {}, 0.99) is None
    assert choose(known, SamplingOptions(temperature=0, logit_bias={5: -1.0}), {}, 0.0) is None


def test_ties_go_to_the_lower_id() -> None:
    flat = Known(np.arange(1000), np.full(1000, -math.log(1000)))
    assert choose(flat, SamplingOptions(temperature=0), {}, 0.9) == 0
    assert choose(flat, SamplingOptions(), {}, 0.5005) == 500
    assert choose(flat, SamplingOptions(top_k=3), {}, 0.99) == 2


def test_draws_are_spread_evenly_and_depend_on_seed_choice_and_step_alone() -> None:
    draws = np.array([uniform(1, choice, step) for choice in range(20) for step in range(100)])
    assert uniform(1, 2, 3) == draws[203]
    assert len(set(draws)) == 2000
    assert np.abs(np.histogram(draws, 10, (0, 1))[0] - 200).max() < 60
    assert uniform(2, 2, 3) != uniform(1, 2, 3)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"temperature": -0.1}, "temperature must be >= 0"),
        ({"temperature": 1e-9}, "temperature must be 0 or >= 0.001"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"top_k": -1}, "top_k must be >= 0"),
        ({"top_p": 0.0}, "top_p must be in (0, 1]"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": 1.5}, "min_p must be in [0, 1]"),
        ({"presence_penalty": 2.5}, "presence_penalty"),
        ({"frequency_penalty": math.nan}, "frequency_penalty"),
        ({"logit_bias": {1: 101.0}}, "logit_bias of token 1"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "logit_bias may name 1024"),
    ],
)
def test_values_out_of_range_are_named(given: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidRequest, match=named.replace("(", r"\(").replace("[", r"\[")):
        SamplingOptions(**given)  # type: ignore[arg-type]


def test_a_bias_that_leaves_nothing_is_refused() -> None:
    nothing = Known(np.arange(3), np.full(3, -np.inf))
    with pytest.raises(InvalidRequest, match="no token"):
        choose(nothing, SamplingOptions(), {}, 0.5)
