"""A number of thousands of digits is refused by its name, and not said in full."""

import json
from pathlib import Path
from typing import Any

import httpx

from knnlm.testing import ToyLanguageModel
from tests.contract.system import store, system  # noqa: F401  a fixture

HUGE = (10**4000, -(10**4000), 2**63, -(2**63) - 1)
NO_MAXIMUM = ("top_k", "truncate_prompt_tokens", "tau")  # more than there are is all, or is never reached
MAX_MESSAGE_CHARACTERS = 300
BODIES: dict[str, dict[str, Any]] = {  # that are answered, but for one number
    "/v1/next_token": {"text": "the", "knn": {"domain": "cat"}},
    "/v1/score": {"text": "the cat", "knn": {"domain": "cat"}},
    "/v1/explain": {"text": "the cat", "knn": {"domain": "cat"}},
    "/v1/completions": {"prompt": "the", "max_tokens": 1, "knn": {"domain": "cat"}},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": True, "knn": {"domain": "cat"}
    },
    "/v1/forward": {"tokens": [[1]], "positions": [[0]], "keys": True},
    "/v1/domains/{domain}/search": {"queries": [[0.0] * 16], "k": 1},
    "/v1/domains/{domain}/passages": {"version": "v1", "entries": [0]},
}  # fmt: skip


def numbered(schema: dict[str, Any], schemas: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where a body of the schema may hold integers."""
    if "$ref" in schema:
        schema = schemas[schema["$ref"].rpartition("/")[2]]
    found: list[tuple[str, ...]] = []
    for name, field in schema.get("properties", {}).items():
        kinds = field.get("anyOf", [field])
        found += [(name,)] if any(kind.get("type") == "integer" for kind in kinds) else []
        found += [(name, *rest) for kind in kinds for rest in numbered(kind, schemas)]
    return found


async def test_every_integer_of_every_body(store: Path) -> None:  # noqa: F811
    lm = ToyLanguageModel()
    lm.tokenizer.chat_template = "{{ messages[0].content }}"
    unexpected, asked = [], set()
    async with system(store, lm=lm) as running:
        for host in ("aggregator", "lm", "datastore"):
            transport = httpx.ASGITransport(running.hosts[host].app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                document = (await client.get("/openapi.json")).json()
                for path, methods in document["paths"].items():
                    schema = methods.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
                    if schema is None:
                        continue
                    for place in numbered(schema["schema"], document["components"]["schemas"]):
                        asked.add(path)
                        for number in HUGE:
                            answer = await client.post(
                                path.replace("{domain}", "cat"), json=holding(path, place, number)
                            )
                            said = answer.json().get("error", {})
                            if answer.status_code == 200 and place[-1] in NO_MAXIMUM and number > 0:
                                continue
                            if answer.status_code not in (400, 413) or len(said["message"]) > MAX_MESSAGE_CHARACTERS:
                                unexpected.append((path, place, str(number)[:9], answer.status_code, str(said)[:200]))
    assert asked == set(BODIES)
    assert not unexpected, "\n".join(map(str, unexpected))


def holding(path: str, place: tuple[str, ...], number: int) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(json.dumps(BODIES[path]))
    inside = body
    for name in place[:-1]:
        inside = inside.setdefault(name, {})
    inside[place[-1]] = number
    return body
