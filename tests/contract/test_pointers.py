"""Entries that are followed, in requests to a running system: as in process."""

import json
from pathlib import Path

import numpy as np

from knnlm.generation import GenerationOptions
from knnlm.options import DomainOptions, KnnOptions, ReuseOptions
from knnlm.sampling import SamplingOptions
from knnlm.testing import toy_datastore
from tests.contract.system import TEXT, store, system
from tests.contract.test_aggregator import pipeline

__all__ = ["store"]


async def test_all_routes_answer_as_in_process_and_say_what_was_saved(store: Path) -> None:
    knn = {"domain": "cat", "lambda": 0.4, "reuse": {"tau": 2}}
    options = KnnOptions((DomainOptions("cat", lmbda=0.4),), reuse=ReuseOptions(tau=2))
    prompt = [256, *TEXT[:12].encode()]
    async with system(store) as s:
        scored = await s.post("/v1/score", {"text": TEXT, "knn": knn})
        asked = {"prompt": prompt, "max_tokens": 8, "temperature": 0, "ignore_eos": True, "knn": knn, "logprobs": 0}
        answer = await s.post("/v1/completions", asked)
        made = answer["choices"][0]
        several = await s.post("/v1/completions", {**asked, "n": 2, "temperature": 1.0, "seed": 3})
        explained = await s.post("/v1/explain", {"text": TEXT, "knn": knn})
        end = await s.post("/v1/explain", {"prompt": TEXT[:40], "completion": TEXT[40:], "knn": knn})
        streamed = await s.client.post(
            "/v1/completions", json={**asked, "stream": True, "stream_options": {"include_usage": True}}
        )
        metrics = (await s.client.get("/metrics")).text
        union = {"domains": ["cat", "dog"], "combine": "union", "lambda": 0.1, "temperature": 1.0, "reuse": {"tau": 2}}
        error = (await s.post("/v1/score", {"text": "abc", "knn": union}, status=400))["error"]
        low = (await s.post("/v1/score", {"text": "abc", "knn": {**knn, "reuse": {"tau": 0}}}, status=400))["error"]
    greedy = GenerationOptions(max_tokens=8, sampling=SamplingOptions(temperature=0.0), ignore_eos=True)
    with pipeline(store) as p:
        score = p.score(TEXT, options)
        expected = p.generate(prompt, options, greedy, seed=0)
    np.testing.assert_allclose([t["log_p"] for t in scored["tokens"]], score.log_probs, rtol=1e-5)
    saved = score.mixed.components[0].evidence.skipped.sum()
    assert scored["components"][1]["searches_skipped"] == saved > 0
    assert explained["searches_skipped"] == saved > end["searches_skipped"] > 0
    assert 0 < answer["usage"]["searches_skipped"] < 8
    assert 0 < several["usage"]["searches_skipped"] <= 14
    usage = json.loads(streamed.text.split("data: ")[-2])["usage"]
    assert usage == answer["usage"]
    np.testing.assert_allclose(made["logprobs"]["token_logprobs"], expected.log_probs, rtol=1e-5)
    counted = next(line for line in metrics.splitlines() if line.startswith("knnlm_aggregator_searches_skipped_total"))
    made_by = (scored["components"][1], explained, end, answer["usage"], several["usage"], usage)
    assert float(counted.split()[1]) == sum(part["searches_skipped"] for part in made_by)
    assert (error["param"], low["param"]) == ("knn.reuse.tau", "knn.reuse.tau")


async def test_a_domain_may_be_called_as_another_kind_of_source(store: Path) -> None:
    toy_datastore(store, domain="cache")
    body = {
        "knn": {"domain": "cache", "lambda": 0.4, "temperature": 1.0, "reuse": {"tau": 1}},
        "cache": {"lambda": 0.2, "theta": 0.5, "size": 9},
    }
    async with system(store) as s:
        made = await s.post("/v1/completions", {"prompt": "the cat", "max_tokens": 5, "ignore_eos": True, **body})
    assert made["usage"]["completion_tokens"] == 5
