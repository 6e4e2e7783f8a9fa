"""What long texts cost everyone else: how long a service's event loop stands still while it tokenizes one.

The three services run as their users run them. Beside each request another process asks `/livez` of the service that
tokenizes, on one connection, again and again: the longest time an answer took, less the median of all, is how long the
loop had no turn. Requests: 16 MB of text to /tokenize, which is refused; as much text as is allowed, with token
texts; as many tokens to /detokenize as it takes; 16 MB of token ids to the routes that take them, and of wrong values,
which are refused; as many ids as are taken, to /v1/score, the last of them wrong; contexts of ids to /v1/next_token; a
document of 4 MB added to a domain, for as long as `--seconds` tell. Beside them the same without any request, with idle
cores and with every core busy, as the language model makes them: what the machine itself does to such a figure.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection

import httpx
import numpy as np

from benchmarks.data import MODEL
from benchmarks.harness import ROOT, arguments, figure, table
from benchmarks.system import system
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.lm.model import LanguageModel
from knnlm.messages import Document

GOAL_MS = 50
WORK = ROOT / "build" / "bench" / "tokenizing"
LARGE, DOCUMENT = 16_000_000, 4_000_000  # characters, which are bytes here
ALLOWED = 1 << 20  # --max-text-bytes
MOST_TOKENS = 131_072  # --max-score-tokens
IDLE, BUSY, ADDED = "no request", "no request, every core busy", "a document of 4 MB added"
IDS = b'{"tokens":[' + b"1," * 7_900_000 + b"1]}"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--seconds", type=float, default=20.0, help="of adding a document (default 20)")
    options = parser.parse_args()
    shutil.rmtree(WORK, ignore_errors=True)
    try:
        stalls = measured(options.seconds)
    finally:
        shutil.rmtree(WORK, ignore_errors=True)
    table(["the longest stall", "ms"], [[name, f"{1000 * stall:.1f}"] for name, stall in stalls.items()])
    aggregator = max(stall for name, stall in stalls.items() if name not in (IDLE, BUSY, ADDED))
    more = {"idle_ms": round(1000 * stalls[IDLE], 1), "busy_ms": round(1000 * stalls[BUSY], 1)}
    figure("stall of the aggregator, ms", 1000 * aggregator, GOAL_MS, better="less", **more)
    figure("stall of the datastore service, ms", 1000 * stalls[ADDED], GOAL_MS, better="less", **more)


def measured(seconds: float) -> dict[str, float]:
    """The longest stall in each part, in seconds."""
    text = prose(LARGE)
    lm = LanguageModel.load(str(MODEL), device="cpu")
    catalog = Catalog(WORK / "store")
    build([Document("short", text[:2000])], lm, catalog, "long", version="v1")
    catalog.activate("long", "v1")
    with system(WORK / "store", MODEL, WORK / "logs", lm_for_datastore=True) as running:
        aggregator, datastore = running.aggregator.http, running.datastore.http

        def tokenize(size: int, status: int) -> list[int]:
            answer = httpx.post(
                f"{aggregator}/tokenize", json={"prompt": text[:size], "return_token_strs": True}, timeout=600
            )
            assert answer.status_code == status, answer.text[:200]
            return list(json.loads(answer.content).get("tokens", ()))

        tokens = tokenize(ALLOWED, 200)
        document = json.dumps({"documents": [{"id": "large", "text": text[:DOCUMENT]}]})
        return {
            IDLE: stall(aggregator, lambda: time.sleep(3)),
            BUSY: stall(aggregator, partial(all_cores_busy, 5.0)),
            "/tokenize of 16 MB, refused": stall(aggregator, lambda: tokenize(LARGE, 413)),
            "/tokenize of 1 MiB, with texts": stall(aggregator, lambda: tokenize(ALLOWED, 200)),
            "/detokenize of 131,072 tokens": stall(
                aggregator, lambda: posted(f"{aggregator}/detokenize", {"tokens": tokens[:MOST_TOKENS]})
            ),
            **{
                f"{path} of 16 MB of token ids, refused": stall(
                    aggregator, partial(refused, f"{aggregator}{path}", IDS)
                )
                for path in ("/detokenize", "/v1/next_token", "/v1/score")
            },
            "/v1/score of 16 MB of wrong ids, refused": stall(
                aggregator, partial(refused, f"{aggregator}/v1/score", b'{"tokens":[' + b'"a",' * 3_900_000 + b'"a"]}')
            ),
            "/v1/score of 131,072 ids, the last wrong": stall(
                aggregator, partial(refused, f"{aggregator}/v1/score", _ids([*tokens[: MOST_TOKENS - 1], 10**9]))
            ),
            "/v1/next_token of 64 contexts of ids": stall(
                aggregator, lambda: posted(f"{aggregator}/v1/next_token", {"tokens": [tokens[:512]] * 64})
            ),
            ADDED: stall(datastore, lambda: added(f"{datastore}/v1/domains/long/documents", document, seconds)),
        }


def prose(size: int) -> str:
    """Lines of words of this repository's documentation, drawn at random."""
    words = " ".join(path.read_text("utf-8") for path in sorted((ROOT / "docs").glob("*.md"))).split()
    rng = np.random.default_rng(0)
    drawn = [words[i] for i in rng.integers(0, len(words), size // 5)]
    lines = "\n".join(" ".join(drawn[i : i + 15]) for i in range(0, len(drawn), 15))
    return lines.encode("ascii", "replace").decode("ascii")[:size]


def _ids(tokens: Sequence[int]) -> bytes:
    return json.dumps({"tokens": tokens}).encode()


def all_cores_busy(seconds: float) -> None:
    spinning = f"import time; end = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    for process in [subprocess.Popen([sys.executable, "-c", spinning]) for _ in range(os.cpu_count() or 1)]:
        process.wait()


def refused(url: str, body: bytes) -> None:
    answer = httpx.post(url, content=body, headers={"content-type": "application/json"}, timeout=600)
    assert answer.status_code in (400, 413), answer.text[:200]


def posted(url: str, body: object) -> None:
    httpx.post(url, json=body, timeout=600).raise_for_status()


def added(url: str, body: str, seconds: float) -> None:
    """Whether it is done in time or not: what is measured lies in the beginning."""
    headers = {"content-type": "application/json", "x-request-timeout": f"{seconds:g}"}
    answer = httpx.post(url, content=body, headers=headers, timeout=seconds + 60)
    assert answer.status_code in (200, 504), answer.text[:200]


def stall(address: str, work: Callable[[], object]) -> float:
    """The longest time that the service at `address` had no turn for others, in seconds, while `work` ran."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=asking, args=(f"{address}/livez", theirs))
    process.start()
    ours.recv()
    work()
    ours.send("enough")
    longest: float = ours.recv()
    process.join()
    return longest


def asking(url: str, pipe: Connection) -> None:
    seconds = []
    with httpx.Client(timeout=600) as client:
        client.get(url)
        pipe.send("begun")
        while not pipe.poll():
            begin = time.perf_counter()
            client.get(url).raise_for_status()
            seconds.append(time.perf_counter() - begin)
            time.sleep(0.002)
    pipe.send(max(seconds) - float(np.median(seconds)))


if __name__ == "__main__":
    main()
