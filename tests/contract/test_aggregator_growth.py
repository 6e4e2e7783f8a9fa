"""Documents added and removed through the aggregator: real lm and datastore services behind it."""

from pathlib import Path

import numpy as np

from knnlm.index.searcher import Searcher
from knnlm.pipeline import Pipeline
from knnlm.testing import ToyLanguageModel
from tests.contract.system import System, store, with_system

__all__ = ["store"]

HERON = "a heron stands in the water and waits for the fish that never comes"
ASKED = {"text": "a heron stands in the wa", "model": "toy+cat", "full": True, "neighbors": 1}
DOCUMENTS = "/v1/domains/cat/documents"


def nearest(answer: dict[str, list[dict[str, list[dict[str, str]]]]]) -> str:
    return answer["results"][0]["neighbors"][0]["document"]


def test_what_is_added_is_mixed_at_once_as_the_library_mixes_it(store: Path) -> None:
    async def check(s: System) -> None:
        before = await s.post("/v1/next_token", ASKED)
        change = await s.post(DOCUMENTS, {"documents": [{"id": "heron", "text": HERON}]})
        assert (change["parent"], change["version"], change["added_documents"]) == ("v1", "v3", 1)
        after = await s.post("/v1/next_token", ASKED)
        assert nearest(before) != "heron" == nearest(after)
        assert after["domains"][0]["version"] == "v3"
        with Pipeline(ToyLanguageModel(), {"cat": Searcher.open(store / "cat" / "v3")}) as pipeline:
            expected = np.exp(pipeline.next_token(str(ASKED["text"]), "cat").mixed.log_probs[0])
        np.testing.assert_allclose(after["results"][0]["distribution"]["p"], expected, rtol=1e-6, atol=1e-9)

        await s.post(f"{DOCUMENTS}:remove", {"ids": ["heron"]})
        again = await s.post("/v1/next_token", ASKED)
        assert again["results"][0]["distribution"] == before["results"][0]["distribution"]
        assert again["domains"][0]["version"] == "v4"

    with_system(store, check)


def test_every_replica_follows_a_change(store: Path) -> None:
    async def check(s: System) -> None:
        change = await s.post(DOCUMENTS, {"documents": [{"id": "heron", "text": HERON}]})
        await s.post("/v1/domains/cat:activate", {"version": change["version"], "wait": True})
        assert [nearest(await s.post("/v1/next_token", ASKED)) for _ in range(6)] == ["heron"] * 6

    with_system(store, check, replicas=3)


def test_changes_that_cannot_be_made_are_refused(store: Path) -> None:
    async def check(s: System) -> None:
        for body, status in (
            ({"documents": []}, 400),
            ({"documents": [{"id": "x"}]}, 400),
            ({"documents": [{"id": "x", "text": " "}]}, 400),
            ({"documents": [{"id": "0", "text": HERON}]}, 409),
            ({"documents": [{"id": "x", "text": HERON}], "when": "now"}, 400),
        ):
            await s.post(DOCUMENTS, body, status=status)
        half = await s.client.post(DOCUMENTS, content=b'{"documents": [{"id": "x", "text": "\\ud800"}]}')
        assert half.status_code == 400, half.text
        await s.post(f"{DOCUMENTS}:remove", {"ids": ["no such"]}, status=404)
        await s.post("/v1/domains/cow/documents", {"documents": [{"id": "x", "text": HERON}]}, status=404)
        assert (await s.client.get("/v1/domains/cat")).json()["version"] == "v1"

    with_system(store, check)
