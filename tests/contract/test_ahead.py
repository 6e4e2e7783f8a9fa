"""Steps begun ahead, in requests to a running system."""

from pathlib import Path

import numpy as np

from tests.contract.system import store, system

__all__ = ["store"]


async def test_steps_begun_ahead_make_the_same_text(store: Path) -> None:
    body = {"prompt": "the cat", "max_tokens": 12, "temperature": 0, "ignore_eos": True, "logprobs": 1, "n": 2}
    async with system(store) as s:
        plain, ahead = [
            (await s.post("/v1/completions", {**body, "knn": {"domain": "cat", "lambda": 0.5, **more}}))["choices"]
            for more in ({}, {"reuse": {"ahead": 2}})
        ]
        error = (
            await s.post("/v1/completions", {**body, "knn": {"domain": "cat", "reuse": {"ahead": 17}}}, status=400)
        )["error"]
    assert [c["text"] for c in ahead] == [c["text"] for c in plain]
    for one, other in zip(ahead, plain, strict=True):
        np.testing.assert_allclose(one["logprobs"]["token_logprobs"], other["logprobs"]["token_logprobs"], rtol=1e-5)
    assert error["param"] == "knn.reuse.ahead"
