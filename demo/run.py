"""`make demo`: two domains and a memory from text on this machine, three services, and what they say. Every step prints
its command.

1. The docstrings of numpy and torch become documents; whole documents are kept for storing, tuning and reporting.
2. `knnlm build` and `knnlm tune` make a datastore of each domain, of numpy a smaller first version as well.
3. `knnlm memory` trains a small net on what retrieval from numpy would answer: it needs no datastore.
4. The lm, datastore and aggregator services start as processes of their own.
5. The same contexts are sent to the LM alone and to the LM with each domain; then the held-out documents are scored.
6. A domain is switched to its other version, and back, while the services run.

What exists already is not built again. Ends with status 1 if retrieval or the memory does not lower the held-out
perplexity.
"""

import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from demo import corpus, services
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.text import read_documents
from knnlm.evaluation.splits import Part, select
from knnlm.memory.manifest import MemoryManifest
from knnlm.messages import Document

CONSOLE = Console(highlight=False, soft_wrap=True)
ROOT = services.ROOT
DOMAINS = tuple(corpus.DOMAINS)
SMALL, FULL = "v1", "v2"  # versions of the domain numpy: linalg and fft only, and everything
CONTEXTS = {  # what is being typed; both packages are full of such passages, each in a style of its own
    "numpy": "Parameters\n----------\na : array_like\n    Input array.\naxis : int, optional\n    Axis",
    "torch": "Examples::\n\n    >>> m = nn.Softplus()\n    >>> input =",
}
CLEARLY = 0.9  # kNN-LM's perplexity must be below this share of the LM's
WIDTH = 5  # tokens listed per model
REPORTED = 20_000  # characters of a document that are scored, from its beginning: one module alone has 138,000


def main() -> None:
    started = time.monotonic()
    _say("1", "text: what numpy and torch say about themselves; the pocket LM has read neither")
    _write_text()
    _say("2", "datastores: one key per token, then an index, then temperature and lambda on documents held out")
    _build()
    _say("3", "a memory: a net that has learnt what retrieval from numpy would answer, from some of its entries")
    _train_memory()
    _say("4", "services: lm (torch), datastore (faiss), aggregator (neither), each its own process")
    services.up()
    CONSOLE.print(services.addresses())
    with httpx.Client(base_url=services.AGGREGATOR, timeout=120) as client:
        _say("5", f"the same context, four models: POST {services.AGGREGATOR}/v1/next_token")
        for domain, context in CONTEXTS.items():
            _show_distributions(client, context)
            _show_neighbors(client, context, domain)
        won = _show_perplexities(client)
        _say("6", "switching a domain while the services run: one file names the current version")
        _switch(client)
    CONSOLE.print(
        f"\nAll of it took {time.monotonic() - started:.0f} s. The services are running:\n" + services.addresses()
    )
    CONSOLE.print(
        "Try:\n  curl -s " + services.AGGREGATOR + "/v1/next_token -H 'content-type: application/json' \\\n"
        """       -d '{"text": "Returns a tensor", "model": "pocket+torch", "neighbors": 2}'"""
    )
    CONSOLE.print(f"Or look at the page: {services.AGGREGATOR}/")
    if not won:
        raise SystemExit("kNN-LM did not win clearly on every held-out domain, or the memory not at all")


def _write_text() -> None:
    services.RUN.mkdir(parents=True, exist_ok=True)
    for domain in DOMAINS:
        CONSOLE.print("  " + corpus.write(domain, _text(domain)).replace(f"{ROOT}/", ""))
    few = [json.loads(line) for line in _text("numpy").read_text(encoding="utf-8").splitlines()]
    few = [row for row in few if row["id"].split("/")[1] in ("linalg", "fft")]
    _text("numpy-small").write_text("".join(json.dumps(row) + "\n" for row in few), encoding="utf-8")


def _build() -> None:
    """Both domains, two versions of one; nothing that is there already and was made by this model."""
    catalog = Catalog(services.STORE)
    stamp = services.STORE / "model.sha256"
    weights = _sha256(services.MODEL / "model.safetensors")
    if stamp.exists() and stamp.read_text() != weights:
        services.down()  # they hold the former model
        shutil.rmtree(services.STORE)  # the demo's own store, made by that model
    services.STORE.mkdir(parents=True, exist_ok=True)
    stamp.write_text(weights)
    for domain, version, source in (
        ("numpy", SMALL, "numpy-small"),
        ("numpy", FULL, "numpy"),
        ("torch", "v1", "torch"),
    ):
        if domain in catalog.domains() and version in catalog.versions(domain):
            CONSOLE.print(f"  {domain} {version} is there")
        else:
            _knnlm("build", domain, _text(source), "--version", version, "--part", Part.STORE, "--min-context", "64")
            tuning = ("--k", "64", "--k", "256", "--max-tokens", "4000")
            _knnlm("tune", domain, _text(domain), "--version", version, "--part", Part.TUNE, *tuning)
    catalog.activate("numpy", FULL)


def _train_memory() -> None:
    """Train the memory of its domain's current version, unless it is there."""
    folder, domain = services.MEMORY, services.MEMORY.name
    if folder.is_dir() and MemoryManifest.open(folder).store.stale(Catalog(services.STORE)) is None:
        CONSOLE.print(f"  memory {domain} is there")
        return
    targets = services.RUN / f"{domain}.targets"
    for former in (folder, targets):
        shutil.rmtree(former, ignore_errors=True)
    sampled = ("--max-entries", "40000", "--exclude", "document", "--k", "256", "--max-tokens", "2000")
    _knnlm("memory", "targets", domain, "--out", targets, *sampled)
    trained = ("--kind", "mlp", "--epochs", "4", "--batch-entries", "1024", "--learning-rate", "0.002")
    tried = ("--part", Part.TUNE, "--max-tokens", "4000", "--evaluations", "4")
    _knnlm("memory", "train", domain, _text(domain), *tried, "--targets", targets, "--out", folder, *trained)
    if services.PID.exists():
        services.down()  # what runs does not know it


def _show_distributions(client: httpx.Client, context: str) -> None:
    """The likeliest tokens of each model, and what each gives to the others' tokens."""
    answers: dict[str, dict[str, float]] = {}
    top: dict[str, None] = {}
    for model in ("pocket", *(f"pocket+{domain}" for domain in DOMAINS), f"pocket~{services.MEMORY.name}"):
        body = {"text": context, "model": model, "top_n": 1000}
        rows = _post(client, "/v1/next_token", body)["results"][0]["top"]
        answers[model] = {row["token"]: row["p"] for row in rows}
        top |= dict.fromkeys(row["token"] for row in rows[:WIDTH])
    CONSOLE.print(Text("\n  …" + _one_line(context)[-66:], style="italic"))
    table = Table(box=None, padding=(0, 2))
    table.add_column("next token")
    for model in answers:
        table.add_column(model, justify="right")
    for token in top:
        cells = [answers[model].get(token, 0.0) for model in answers]
        best = max(cells)
        table.add_row(Text(repr(token)), *(Text(f"{p:.3f}", style="bold" if p == best else "") for p in cells))
    CONSOLE.print(table)


def _show_neighbors(client: httpx.Client, context: str, domain: str) -> None:
    body = {"text": context, "model": f"pocket+{domain}", "neighbors": 3, "neighbor_tokens": 12, "top_n": 1}
    answer = _post(client, "/v1/next_token", body)
    used = answer["domains"][0]
    CONSOLE.print(
        f"  the nearest passages in {used['domain']} {used['version']} "
        f"(k {used['k']}, lambda {used['lambda']:.2f}, temperature {used['temperature']:.2f}):"
    )
    for n in answer["results"][0]["neighbors"]:
        passage = Text("      …" + _one_line(n["before"])[-40:])
        passage.append(_one_line(n["token"]), style="bold reverse")
        passage.append(_one_line(n["after"][len(n["token"]) :])[:24] + "…")
        CONSOLE.print(f"    distance {n['distance']:.2f}, {n['document']}, says {n['token']!r}:")
        CONSOLE.print(passage)


def _show_perplexities(client: httpx.Client) -> bool:
    """Per domain over all held-out documents: POST /v1/score for each. True when kNN-LM wins clearly on every one, and
    the memory wins."""
    CONSOLE.print(
        "\n  perplexity per token on documents that were neither stored nor tuned on "
        f"(their first {REPORTED:,} characters): POST /v1/score"
    )
    table = Table(box=None, padding=(0, 2))
    for name in ("domain", "documents", "tokens", "LM alone", "kNN-LM", "ratio", "LM + memory", "ratio"):
        table.add_column(name, justify="left" if name == "domain" else "right")
    won = True
    for domain in DOMAINS:
        documents = list(select(read_documents([_text(domain)]), Part.REPORT))
        lm, knn, tokens = _score(client, documents, f"pocket+{domain}")
        won = won and knn < CLEARLY * lm
        row = [domain, str(len(documents)), f"{tokens:,}", f"{lm:.2f}", f"{knn:.2f}", f"{knn / lm:.2f}"]
        if domain == services.MEMORY.name:
            _, memory, _ = _score(client, documents, f"pocket~{domain}")
            won = won and memory < lm
            row += [f"{memory:.2f}", f"{memory / lm:.2f}"]
        table.add_row(*row)
    CONSOLE.print(table)
    sizes = (_bytes(services.STORE / services.MEMORY.name / FULL), _bytes(services.MEMORY))
    CONSOLE.print(
        "  on disk: the datastore of {} {:.1f} MB, the memory {:.1f} MB".format(
            services.MEMORY.name, *(size / 1e6 for size in sizes)
        )
    )
    return won


def _bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def _score(client: httpx.Client, documents: list[Document], model: str) -> tuple[float, float, int]:
    """(perplexity of the LM, of the mixture, tokens) over all documents together."""
    lm = mixture = 0.0
    tokens = 0
    for document in documents:
        answer = _post(client, "/v1/score", {"text": document.text[:REPORTED], "model": model})
        lm += answer["total_log_p_lm"]
        mixture += answer["total_log_p"]
        tokens += len(answer["tokens"])
    return math.exp(-lm / tokens), math.exp(-mixture / tokens), tokens


def _switch(client: httpx.Client) -> None:
    body = {"text": CONTEXTS["numpy"], "model": "pocket+numpy", "top_n": WIDTH}
    for version in (None, SMALL, FULL):
        if version is not None:
            CONSOLE.print(f"\n  POST /v1/domains/numpy:activate {{version: {version}}}")
            _post(client, "/v1/domains/numpy:activate", {"version": version})
        answer = _post(client, "/v1/next_token", body)
        tokens = "  ".join(f"{row['token']!r} {row['p']:.3f}" for row in answer["results"][0]["top"])
        CONSOLE.print(Text(f"  numpy {answer['domains'][0]['version']}: {tokens}"))


def _knnlm(command: str, *arguments: str | Path) -> None:
    """Run a `knnlm` command, showing it as a user would type it."""
    shown = " ".join(str(a).replace(f"{ROOT}/", "") for a in (command, *arguments))
    CONSOLE.print(f"  $ knnlm {shown}", style="dim")
    environment = {**os.environ, "KNNLM_STORE": str(services.STORE), "KNNLM_MODEL": str(services.MODEL)}
    call = [sys.executable, "-m", "knnlm.cli.main", command, *map(str, arguments)]
    if subprocess.run(call, cwd=ROOT, env=environment, check=False).returncode:
        raise SystemExit(f"`knnlm {shown}` failed; its message is above")


def _post(client: httpx.Client, path: str, body: dict[str, Any]) -> Any:  # JSON
    response = client.post(path, json=body)
    if response.is_error:
        raise SystemExit(f"POST {path} answered {response.status_code}: {response.text}")
    return response.json()


def _one_line(text: str) -> str:
    """Line ends shown, runs of spaces as one."""
    return re.sub(" +", " ", text.replace("\n", "⏎"))


def _text(name: str) -> Path:
    return services.RUN / f"{name}.jsonl"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _say(step: str, text: str) -> None:
    CONSOLE.print(f"\n[bold]{step}. {text}[/bold]")


if __name__ == "__main__":
    main()
