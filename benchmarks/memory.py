"""What memories recover of retrieval's gain, and what they cost, on each of several corpora.

    python -m benchmarks.memory [--text CORPUS ...] [--text CORPUS ...] [--size N] [--epochs N] [--exclude document]

Each --text is a corpus of its own. On each: the LM alone; with kNN; with a decoder memory, which starts as the LM; with
an MLP memory; with a control, a decoder of the same size, steps and start that learns from the text alone (beta 0); and
with kNN and the decoder memory together. Weights, and kNN's temperature, are fitted on the documents for tuning, the
weights of each row jointly; everything is reported on the documents for reporting, with bootstrap intervals (95 %) over
these. R is the recovered share: the gain of a row over that of kNN, in nats per token. Below, for the case study of the
paper: mean log-probability by class of token. What was trained is kept beside the datastore. Tables are Markdown, as
they stand in docs/evaluation.md.
"""

import hashlib
import json
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.data import DOMAIN, HELD_OUT, MODEL, prepare
from benchmarks.harness import figure
from benchmarks.token_classes import CLASSES, classes
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.text import read_documents
from knnlm.evaluation.collect import HeldOut, find, observe
from knnlm.evaluation.memory_targets import EXCLUDE, build_targets
from knnlm.evaluation.memory_training import train_memory
from knnlm.evaluation.splits import Encoded, Part, encode, part_of, sample
from knnlm.evaluation.timing import Rate, interleave
from knnlm.evaluation.tuning import fit
from knnlm.index.searcher import Searcher
from knnlm.lm.distillation import DistilSettings
from knnlm.lm.model import LanguageModel
from knnlm.memories import KeyMemory
from knnlm.memory.manifest import MemoryManifest
from knnlm.memory.served import open_mlp
from knnlm.messages import Document, DomainInfo
from knnlm.neighbors import target_log_probs
from knnlm.options import SearchOptions
from knnlm.weights import fit_weights

Float64 = npt.NDArray[np.float64]
Memory = LanguageModel | KeyMemory

SIZE, TOKENS = 20_000, 20_000  # entries of the store; held-out tokens of each part
K = 1024
ROUNDS = 7  # rounds in which the ways are timed in turn
DRAWS = 1000  # resamples of the documents, for the intervals
MEMORIES = {"decoder": ("decoder", 0.5), "mlp": ("mlp", 0.5), "control": ("decoder", 0.0)}  # kind and beta
ROWS = {  # what stands beside the LM
    "LM": (), "LM + kNN": ("knn",), "LM + decoder": ("decoder",), "LM + mlp": ("mlp",), "LM + control": ("control",),
    "LM + kNN + decoder": ("knn", "decoder"),
}  # fmt: skip
MLP_TIME, MLP_BYTES, DECODER_SPEED = 1.3, 0.05, 0.5


@dataclass(frozen=True)
class Observed:
    """log_probs: (n,) of the tokens that came, by component. document: (n,) the number of each token's document."""

    held: HeldOut
    documents: Sequence[Encoded]
    log_probs: Mapping[str, Float64]
    document: npt.NDArray[np.int64]


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument(
        "--text", type=Path, nargs="+", action="append", metavar="PATH",
        help="documents of one corpus (default: docstrings of packages)",
    )  # fmt: skip
    parser.add_argument("--size", type=int, default=SIZE, help=f"entries of each datastore (default {SIZE})")
    parser.add_argument("--epochs", type=float, default=2.0, help="how often every entry is learnt (default 2)")
    parser.add_argument("--mlp-epochs", type=float, default=10.0, help="the same for the MLP (default 10)")
    parser.add_argument("--exclude", choices=EXCLUDE, default="document", help="what is no neighbor of an entry")
    parser.add_argument(
        "--tokens", type=int, default=TOKENS, help=f"held-out tokens to tune and to report (default {TOKENS})"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for text in options.text or [[]]:
        name = ", ".join(path.parent.name if path.stem == "docs" else path.stem for path in text) or "docstrings"
        epochs = {"decoder": options.epochs, "control": options.epochs, "mlp": options.mlp_epochs}
        compare(name, text, options.size, epochs, options.exclude, options.tokens, options.seed)


def compare(
    name: str, text: Sequence[Path], size: int, epochs: Mapping[str, float], exclude: str, tokens: int, seed: int
) -> None:
    """Print the tables and figures of one corpus."""
    prepared = prepare(size, text)
    folder = prepared.path.parents[2]
    held_out = list(read_documents([folder / HELD_OUT]))
    tune, report = ([d for d in held_out if part_of(d.id) is part] for part in (Part.TUNE, Part.REPORT))
    if not tune or not report:
        raise SystemExit(f"{name}: {len(tune)} documents to tune and {len(report)} to report on: give more text")
    folders = trained(prepared.store, folder, prepared.entries, tune, epochs, exclude, tokens, seed)
    lm = LanguageModel.load(str(MODEL))
    memories: dict[str, Memory] = {
        memory: open_mlp(at) if memory == "mlp" else LanguageModel.load(str(at)) for memory, at in folders.items()
    }
    searcher = Searcher.open(prepared.path, expect=lm.info)
    info = searcher.info(())
    parts, temperature = [], None
    for documents in (tune, report):
        few = sample(encode(documents, lm.tokenizer), lm.tokenizer, tokens)
        held = observe(lm, few, domains=[info])
        found = find(searcher, DOMAIN, held, SearchOptions(k=min(K, prepared.entries)))
        temperature = temperature or fit(found).tuning.temperature
        log_probs = {m: memory_log_probs(memory, few, held, info) for m, memory in memories.items()}
        log_probs["knn"] = target_log_probs(found.neighbors, held.targets, temperature)
        log_probs["LM"] = held.lm_log_probs.astype(np.float64)
        document = np.repeat(np.arange(len(few)), [len(d.tokens) - 1 for d in few])
        parts.append(Observed(held, few, log_probs, document))
    tuned, reported = parts
    speeds = rates(lm, memories, searcher, reported, info)
    sizes = {m: sum(f.bytes for f in MemoryManifest.open(at).files.values()) for m, at in folders.items()}
    sizes["knn"] = sum(f.bytes for f in Manifest.load(prepared.path).files.values())
    perplexities(name, tuned, reported, speeds, sizes, entries=prepared.entries, epochs=epochs, exclude=exclude)
    by_class(lm, tuned, reported)
    searcher.close()


def trained(
    store: Path, folder: Path, entries: int, tune: Sequence[Document], epochs: Mapping[str, float], exclude: str,
    tokens: int, seed: int,
) -> dict[str, Path]:  # fmt: skip
    """Folders of the three memories, made where they are not there."""
    targets = folder / f"{exclude}.targets"
    if not targets.exists():
        print(f"making {targets.name}", flush=True)
        build_targets(store, DOMAIN, str(MODEL), targets, exclude=exclude, on_progress=lambda *_: None)
    found = {}
    for name, (kind, beta) in MEMORIES.items():
        batch = min(8192, max(512, entries // 20))
        steps = max(1, round(epochs[name] * entries / batch))
        settings = DistilSettings(
            steps=steps, beta=beta, batch_entries=batch, warmup_steps=min(100, steps // 4), seed=seed,
            evaluate_steps=max(1, steps // 10),
        )  # fmt: skip
        identity = json.dumps([kind, exclude if beta else "", tokens, asdict(settings)], sort_keys=True)
        found[name] = folder / f"memory-{name}-{hashlib.sha256(identity.encode()).hexdigest()[:8]}"
        if not found[name].exists():
            print(f"training {found[name].name}: {steps} steps", flush=True)
            made = train_memory(
                store, DOMAIN, tune, str(MODEL), found[name], settings, kind=kind, max_tokens=tokens,
                targets=targets if beta else None,
            )  # fmt: skip
            print(f"  {made.seconds:.0f} s, the mixture's best was after step {made.tune.step}", flush=True)
    return found


def memory_log_probs(memory: Memory, documents: Sequence[Encoded], held: HeldOut, info: DomainInfo) -> Float64:
    """(n,) of the tokens of `held`, in the same windows."""
    if isinstance(memory, KeyMemory):
        return memory.net.target_log_probs(held.queries, held.targets).astype(np.float64)
    return observe(memory, documents, domains=[info]).lm_log_probs.astype(np.float64)


def rates(
    lm: LanguageModel, memories: Mapping[str, Memory], searcher: Searcher, seen: Observed, info: DomainInfo
) -> Mapping[str, Rate]:
    """Tokens/s of scoring the first documents with the LM, and with one component beside it, one after the other."""
    few = seen.documents[:4]
    n = sum(len(d.tokens) - 1 for d in few)
    held = observe(lm, few, domains=[info])
    options = SearchOptions(k=min(K, searcher.manifest.live_entries))

    def timed(component: str) -> int:
        observe(lm, few, domains=[info])
        if component == "knn":
            target_log_probs(find(searcher, DOMAIN, held, options).neighbors, held.targets, 1.0)
        elif component in memories:
            memory_log_probs(memories[component], few, held, info)
        return n

    names = ("LM", "knn", *(name for name in memories if name != "control"))
    return interleave({name: lambda name=name: timed(name) for name in names}, 0.5, ROUNDS)  # type: ignore[misc]


def joint_weights(log_probs: Float64) -> Float64:
    """(c,) weights that make tokens likeliest under the mixture of log_probs (c, n), the LM's first."""
    there = np.ones(log_probs.shape[1], np.bool_)
    beside, _ = fit_weights(log_probs[0], list(log_probs[1:]), [there] * (len(log_probs) - 1))
    return np.concatenate([[1 - beside.sum()], beside])


def mixed(log_probs: Float64, weights: Float64) -> Float64:
    """(n,) of log_probs (c, n)."""
    with np.errstate(divide="ignore"):
        found: Float64 = np.logaddexp.reduce(log_probs + np.log(weights)[:, None], axis=0)
    return found


def rows_of(tuned: Observed, reported: Observed) -> dict[str, tuple[Float64, Float64]]:
    """Weights and (n,) log-probabilities of the reported tokens, of every row."""
    found = {}
    for row, beside in ROWS.items():
        names = ("LM", *beside)
        fitted, seen = (np.stack([part.log_probs[name] for name in names]) for part in (tuned, reported))
        weights = joint_weights(fitted)
        found[row] = (weights, mixed(seen, weights))
    return found


def perplexities(
    name: str, tuned: Observed, reported: Observed, speeds: Mapping[str, Rate], sizes: Mapping[str, int],
    *, entries: int, epochs: Mapping[str, float], exclude: str,
) -> None:  # fmt: skip
    """The first table, and the figures."""
    rows = rows_of(tuned, reported)
    document, n_docs = reported.document, len(reported.documents)
    losses = np.stack([np.bincount(document, -log_probs, n_docs) for _, log_probs in rows.values()])  # (rows, docs)
    tokens = np.bincount(document, minlength=n_docs)
    text_bytes = np.array([len(d.text.encode("utf-8", "replace")) for d in reported.documents])
    draws = np.random.default_rng(0).multinomial(n_docs, np.full(n_docs, 1 / n_docs), DRAWS)  # (draws, docs)
    counts = np.concatenate([np.ones((1, n_docs), np.int64), draws])  # the first: every document once
    nats = (counts @ losses.T) / (counts @ tokens)[:, None]  # (1 + draws, rows)
    bits = (counts @ losses.T) / (counts @ text_bytes)[:, None] / np.log(2)
    with np.errstate(divide="ignore", invalid="ignore"):
        recovered = (nats[:, :1] - nats) / (nats[:, :1] - nats[:, 1:2])
    lines, shares = [], {}
    for i, (row, (weights, _)) in enumerate(rows.items()):
        beside = ROWS[row]
        rate = speeds.get(beside[0] if beside else "LM") if len(beside) < 2 else None
        held_bytes = sum(sizes[b] for b in beside)
        shares[row] = float(recovered[0, i])
        lines.append([
            row, " ".join(f"{w:.2f}" for w in weights), _interval(np.exp(nats[:, i]), 2), _interval(bits[:, i], 4),
            _interval(recovered[:, i], 2) if beside else "", f"{rate.median:,.0f}" if rate else "", f"{held_bytes:,}",
        ])  # fmt: skip
    print(f"\n{name}: {entries:,} entries; {tokens.sum():,} tokens of {n_docs} documents reported")
    _table(["", "weights", "perplexity", "bits/byte", "R", "tokens/s", "bytes beside the LM"], lines)
    said: dict[str, Any] = {"size": entries, "epochs": dict(epochs), "exclude": exclude, "documents": n_docs}
    found = {row: round(float(np.exp(nats[0, i])), 4) for i, row in enumerate(rows)}
    control = shares["LM + control"]
    figure(
        f"recovered share R of the decoder memory beside that of the control, {name}", shares["LM + decoder"],
        round(control, 4), recovered={r: round(v, 4) for r, v in shares.items()}, perplexities=found, **said,
    )  # fmt: skip
    slower = speeds["LM"].over(speeds["mlp"])
    figure(f"mlp memory / LM alone: time per token, {name}", slower, MLP_TIME, better="less", **said)
    figure(f"mlp memory / datastore: bytes, {name}", sizes["mlp"] / sizes["knn"], MLP_BYTES, better="less", **said)
    faster = speeds["decoder"].over(speeds["LM"])
    figure(f"with a decoder memory / LM alone: tokens/s of scoring, {name}", faster, DECODER_SPEED, **said)


def by_class(lm: LanguageModel, tuned: Observed, reported: Observed) -> None:
    """The second table: mean natural log-probability by class of token; of kNN where it stores the token at all."""
    found = classes(lm.tokenizer, reported.documents)
    rows = rows_of(tuned, reported)
    stored = np.isfinite(reported.log_probs["knn"])
    lines = []
    for kind in CLASSES:
        own = found == kind
        if not own.any():
            continue
        alone = [reported.log_probs[c][own].mean() for c in ("LM", "decoder", "mlp")]
        knn = reported.log_probs["knn"][own & stored]
        mixtures = [rows[row][1][own].mean() for row in ("LM + kNN", "LM + decoder", "LM + mlp")]
        better = (rows["LM + decoder"][1] > reported.log_probs["LM"])[own].mean()
        lines.append([
            kind, f"{own.sum():,}", *(f"{x:.3f}" for x in alone), f"{knn.mean():.3f}" if len(knn) else "",
            f"{stored[own].mean():.2f}", *(f"{x:.3f}" for x in mixtures), f"{better:.2f}",
        ])  # fmt: skip
    print("\nmean log p of the tokens that came, by class")
    _table(
        ["", "tokens", "LM", "decoder", "mlp", "kNN if stored", "stored", "LM + kNN", "LM + decoder", "LM + mlp",
         "likelier with decoder"], lines,
    )  # fmt: skip


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """In Markdown, after an empty line."""
    for cells in ([], columns, ["---"] * len(columns), *rows):
        print("| " + " | ".join(cells) + " |" if cells else "", flush=True)


def _interval(values: Float64, digits: int) -> str:
    """The first value, and the interval that holds 95 % of the others."""
    low, high = np.nanquantile(values[1:], (0.025, 0.975))
    return f"{values[0]:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


if __name__ == "__main__":
    main()
