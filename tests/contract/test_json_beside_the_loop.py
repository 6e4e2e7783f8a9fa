"""Arrays as JSON, which may be large, are read and written beside the event loop."""

import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from knnlm.wire.jsonable import from_json, to_json
from tests.contract.system import store, system  # noqa: F401  a fixture

FORWARD = {"tokens": [[1, 2, 3]], "positions": [[2]], "keys": True}
PASSAGES = {"version": "v1", "entries": [1, 2]}


async def test_bodies_and_answers(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    seen: list[bool] = []

    def noted(work: Any) -> Any:
        def run(*args: Any) -> Any:
            seen.append(threading.current_thread() is threading.main_thread())
            return work(*args)

        return run

    for room in ("lm", "datastore"):
        monkeypatch.setattr(f"services.{room}.rest.from_json", noted(from_json))
        monkeypatch.setattr(f"services.{room}.rest.to_json", noted(to_json))
    async with system(store) as running:

        async def asked(host: str, path: str, body: object) -> Any:  # JSON
            transport = httpx.ASGITransport(running.hosts[host].app)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                answer = await client.post(path, json=body)
            assert answer.status_code == 200, answer.text
            assert seen == [False, False]
            seen.clear()
            return answer.json()

        keys = (await asked("lm", "/v1/forward", FORWARD))["keys"]
        await asked("datastore", "/v1/domains/cat/search", {"queries": keys, "k": 2})
        await asked("datastore", "/v1/domains/cat/passages", PASSAGES)
