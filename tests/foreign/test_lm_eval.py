"""lm-eval's `local-completions`, unmodified, against the aggregator: it agrees with lm-eval's own `hf`."""

import json
import sys
from typing import Any

import pytest

from tests.foreign.conftest import ENVIRONMENT, Served, last_json
from tests.reference import POCKET, ROOT

pytestmark = pytest.mark.clients

SCRIPT = ROOT / "tests" / "foreign" / "lm_eval_scores.py"
LONG = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")[:6000]
CASES: dict[str, Any] = {
    "max_length": 512,  # the pocket LM's context
    "until": ["\n\n", "#", "a", "b", "c", "zebra"],
    "pairs": [
        ["Returns a tensor", " of the same shape"],
        ["Returns a tensor of the same", " shape"],
        ["", "The license is granted"],
        ["naïve: ", "größer als 東京 — 🙂 end"],
        [LONG[:1500], LONG[1500:1560]],
        ["def search(", "self, query):"],
        ["The value is ", "<|endoftext|>"],
    ],
    "texts": ["A short text.", "", LONG, "Licensed under the Apache License, Version 2.0 (the"],
    "contexts": ["Every setting of a", "Licensed under the Apache License, Version 2.0 (the", LONG[:1200]],
}
TEXT_WAYS = ("texts", "texts in batches")


def scored(served: Served, *words: object, **cases: Any) -> dict[str, Any]:
    file = served.folder / "cases.json"
    file.write_text(json.dumps({**CASES, **cases}), encoding="utf-8")
    kind, where, python, *more = words
    found: dict[str, Any] = last_json(served.run(python, SCRIPT, kind, where, file, *more))
    return found


@pytest.fixture(scope="module")
def through_the_service(served: Served) -> dict[str, Any]:
    return scored(served, "local-completions", served.url, "python", model="pocket")


@pytest.fixture(scope="module")
def in_process(served: Served) -> dict[str, Any]:
    """With torch and transformers of the environment that the tests run in."""
    (packages,) = (ENVIRONMENT / "lib").glob("python*/site-packages")
    found: dict[str, Any] = scored(served, "hf", POCKET, sys.executable, packages)[""]
    return found


def test_log_likelihoods_agree(through_the_service: dict[str, Any], in_process: dict[str, Any]) -> None:
    for way, found in through_the_service.items():
        for pair, (got, greedy), (expected, expected_greedy) in zip(
            CASES["pairs"], found["loglikelihood"], in_process["loglikelihood"], strict=True
        ):
            assert got == pytest.approx(expected, abs=1e-4), (way, pair)
            assert greedy == expected_greedy, (way, pair)


def test_rolling_log_likelihoods_agree(through_the_service: dict[str, Any], in_process: dict[str, Any]) -> None:
    for way, found in through_the_service.items():
        for text, got, expected in zip(
            CASES["texts"], found["loglikelihood_rolling"], in_process["loglikelihood_rolling"], strict=True
        ):
            # a window that is sent as text may be cut into other tokens than it was made of
            relative = 0.01 if way in TEXT_WAYS and text == LONG else 1e-6
            assert got == pytest.approx(expected, abs=1e-4, rel=relative), (way, text[:40])


def test_what_is_generated_agrees(through_the_service: dict[str, Any], in_process: dict[str, Any]) -> None:
    for way, found in through_the_service.items():
        assert found["generate_until"] == in_process["generate_until"], way


def test_retrieval_changes_the_scores(served: Served, through_the_service: dict[str, Any]) -> None:
    found = scored(served, "local-completions", served.url, "python", model="pocket+manual")
    alone = through_the_service["tokens"]["loglikelihood_rolling"]
    for way in found.values():
        assert [pair[0] for pair in way["loglikelihood"]] == pytest.approx(
            [pair[0] for pair in found["tokens"]["loglikelihood"]], abs=1e-3
        )
        assert way["loglikelihood_rolling"] != alone
