"""What a tuning stores is tried before it is used: what does not fit is an error that names domain and rule."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from knnlm.errors import DatastoreError, InvalidRequest
from knnlm.messages import LmStatistics
from knnlm.rules import RULES, Weighing, skipping
from knnlm.tuned import tuned_weighing
from tests.test_rules import observed

KEY_DIM = 4
Stored = Mapping[str, float | Sequence[float]]
GATE: Stored = {"bias": 0.5, "linear": [0.1] * 6}
HIDDEN: Stored = {**GATE, "hidden": [0.1] * 12, "hidden_bias": [0.0, 0.2], "output": [0.5, -0.5]}
EARLY: Stored = {"bias": 0.5, "linear": [0.1] * 2}
SKIPPING: Stored = {**EARLY, "gain": [0.1] * 6, "skip_below": 0.1}


@pytest.mark.parametrize("name", RULES)
def test_what_was_fitted_is_used_as_it_is(name: str) -> None:
    seen = observed(3, 400)
    assert seen.lm is not None
    keys = np.random.default_rng(0).standard_normal((400, KEY_DIM)).astype(np.float32)
    lm = LmStatistics(seen.lm.entropy, seen.lm.largest_log_prob, keys)
    with_keys = replace(seen, lm=lm)
    parameters = RULES[name].fit(with_keys)
    assert tuned_weighing("d", name, parameters, KEY_DIM) == Weighing(name, parameters)
    if name == "gate_lm":
        skips = skipping(name, parameters, with_keys, 0.5)
        assert tuned_weighing("d", name, skips, KEY_DIM) == Weighing(name, skips)


WRONG: list[tuple[str, Stored]] = [
    ("fixed", {}),
    ("fixed", {"lambda": 1.5}),
    ("fixed", {"lambda": [0.1, 0.2]}),
    ("bins", {"edges": [1.0], "lambdas": [0.1]}),
    ("bins", {"edges": [1.0], "lambdas": 0.1}),
    ("bins", {"edges": [1.0]}),
    ("relative", {"bias": 0.0, "linear": [0.1] * 6}),
    ("gate", {}),
    ("gate", {**GATE, "bias": [0.1, 0.2]}),
    ("gate", {**GATE, "linear": [0.1]}),
    ("gate", {**GATE, "linear": [0.1] * 7}),
    ("gate", {**GATE, "linear": 0.1}),
    ("gate", {**GATE, "linear": [1e200] * 6}),
    ("gate", {**GATE, "linear": [float("nan")] * 6}),
    ("gate", {**HIDDEN, "hidden": [0.1] * 11}),
    ("gate", {**HIDDEN, "output": [0.1]}),
    ("gate", {name: value for name, value in HIDDEN.items() if name != "output"}),
    ("gate_lm", {**EARLY, "linear": [0.1] * 3}),
    ("gate_lm", {**EARLY, "linear": [0.1] * (2 + KEY_DIM + 1)}),
    ("gate_lm", {**SKIPPING, "gain": [0.1] * 5}),
    ("gate_lm", {**SKIPPING, "gain": [0.1] * 7}),
    ("gate_lm", {**SKIPPING, "gain": 0.1}),
    ("gate_lm", {**SKIPPING, "skip_below": [0.1, 0.2]}),
    ("gate_lm", {name: value for name, value in SKIPPING.items() if name != "gain"}),
]


@pytest.mark.parametrize(("name", "parameters"), WRONG)
def test_what_no_fit_gives_is_refused(name: str, parameters: Stored) -> None:
    with pytest.raises(DatastoreError, match=re.escape(f"domain d has parameters that the rule {name} cannot have")):
        tuned_weighing("d", name, parameters, KEY_DIM)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gate", GATE), ("gate", HIDDEN), ("gate_lm", EARLY), ("gate_lm", {**EARLY, "linear": [0.1] * (2 + KEY_DIM)}),
        ("gate_lm", SKIPPING), ("gate_lm", {**SKIPPING, "gain": [0.1] * (6 + KEY_DIM)}),
        ("gate", {**GATE, "linear": [1e99, -1e99] * 3}), ("bins", {"edges": [], "lambdas": [0.1]}),
    ],
)  # fmt: skip
def test_what_a_fit_may_give_is_taken(name: str, parameters: Stored) -> None:
    assert tuned_weighing("d", name, parameters, KEY_DIM).parameters == parameters


def test_an_unknown_rule_is_named() -> None:
    with pytest.raises(InvalidRequest, match="unknown rule 'magic'"):
        tuned_weighing("d", "magic", {}, KEY_DIM)
