"""Trains a memory on a version, its targets and held-out documents, and writes it to a folder of its own."""

from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from knnlm.datastore.catalog import version_path
from knnlm.datastore.files import discard, disk_errors, locked, sha256_of, sync_folder
from knnlm.datastore.layout import FileRecord
from knnlm.datastore.manifest import Manifest
from knnlm.datastore.reader import Datastore
from knnlm.decoding import plan_fed_windows
from knnlm.errors import Conflict, InvalidRequest
from knnlm.evaluation.collect import HeldOut, observe
from knnlm.evaluation.splits import Encoded, encode, sample, unseen
from knnlm.index.contract import sample_rows
from knnlm.index.sharded_searcher import open_searcher
from knnlm.lm import loading
from knnlm.lm.distillation import DistilSettings, Held, Told, Tried, distil, tried
from knnlm.lm.model import LanguageModel
from knnlm.lm.optimizing import claim
from knnlm.lm.requests import Feed
from knnlm.lm.students import DecoderStudent, MlpStudent, Student
from knnlm.memory.examples import Examples
from knnlm.memory.manifest import (
    MEMORY,
    TARGETS,
    MemoryManifest,
    StartRecord,
    StoreRecord,
    TargetsUsed,
    TuneRecord,
    save,
)
from knnlm.memory.targets import Targets
from knnlm.messages import Document

if TYPE_CHECKING:
    import torch

KINDS = ("decoder", "mlp")
KEYS_SAMPLED = 1 << 16  # of the store, from which an MLP knows the spread of its input
MLP_SHARE = 0.05  # of the bytes of the store, what an MLP has at most unless its sizes are given
BOTTLENECKS = range(128, 7, -8)


@dataclass(frozen=True)
class MlpSizes:
    """hidden: width of each of `layers` layers. bottleneck: width before the vocabulary."""

    hidden: int = 512
    layers: int = 2
    bottleneck: int = 128

    @classmethod
    def fitting(cls, manifest: Manifest) -> "MlpSizes":
        """The widest net of the default's shape, at most the default, that has MLP_SHARE of the bytes of the version's
        keys and tokens; the narrowest where none is so small."""
        numbers = manifest.key_dim * np.dtype(manifest.key_dtype).itemsize + 4  # a key and its value
        stored = manifest.entries * numbers + 4 * manifest.tokens
        shapes = [cls(4 * width, bottleneck=width) for width in BOTTLENECKS]
        dim, tokens = manifest.key_dim, manifest.model.vocab_size
        return next((s for s in shapes if s.bytes(dim, tokens) <= MLP_SHARE * stored), shapes[-1])

    def bytes(self, key_dim: int, vocab_size: int) -> int:
        """Bytes of such a net on disk, but for the header: weights of 2 bytes, mean and scale of a key of 4."""
        layers = self.hidden * (key_dim + 1) + (self.layers - 1) * self.hidden * (self.hidden + 1)
        return 2 * (layers + self.bottleneck * self.hidden + vocab_size * (self.bottleneck + 1)) + 8 * key_dim


def check_kind(kind: str) -> None:
    """Raises InvalidRequest for a kind of memory that there is not."""
    if kind not in KINDS:
        raise InvalidRequest(f"kind must be one of {', '.join(KINDS)}, got {kind!r}", param="kind")


def train_memory(
    store: str | Path,
    domain: str,
    documents: Iterable[Document],
    model: str,
    out: str | Path,
    settings: DistilSettings,
    *,
    kind: str = "decoder",
    targets: str | Path | None = None,
    version: str | None = None,
    start: str | None = None,
    sizes: MlpSizes | None = None,
    max_tokens: int = 20_000,
    device: str = "auto",
    dtype: str = "auto",
    on_step: Told | None = None,
    save_seconds: float = 120.0,
) -> MemoryManifest:
    """Train a memory of a domain and write it to the folder `out`; the same call continues a run that was stopped.

    documents: held out from the store, by which the weights are chosen; those that it holds are left out. model: what
    made the keys. targets: a folder that build_targets wrote for this version; None only where settings.beta is 0.
    version: None for the current one. kind: "decoder", which starts as `start` (default: `model`; a path to a
    config.json for random weights), or "mlp" with `sizes`, None for MlpSizes.fitting. max_tokens: of a sample of the
    held-out documents. device, dtype: of the language model; the memory is trained there, in float32 with bfloat16
    passes on a GPU.

    Raises InvalidRequest for a value out of range, missing targets or no held-out document; Conflict when `out` exists
    or was begun as something else; DatastoreMismatch for targets of another version, or a model that did not make the
    keys; ModelError for a start with another tokenizer or a shorter context; UnknownDomain, UnknownVersion,
    DatastoreCorrupt, DatastoreError, and as LanguageModel.load does.
    """
    target = Path(out)
    taught = _check(kind, settings, targets, start, sizes, target)
    path = version_path(store, domain, version)
    with closing(Datastore.open(path)) as datastore:
        manifest = datastore.manifest
        lm = LanguageModel.load(
            model, device=device, dtype=dtype, key_function=manifest.key_function, prefix_cache_bytes=0
        )
        with closing(open_searcher(path, expect=lm.info)) as searcher:
            windows = searcher.info(())
        examples = Examples(
            datastore, taught, beta=settings.beta, seed=settings.seed, batch_entries=settings.batch_entries,
            keys=kind == "mlp",
        )  # fmt: skip
        if not examples.entries:
            raise InvalidRequest(f"{domain} {manifest.version} has no entries, so there is nothing to learn")
        encoded = encode(documents, lm.tokenizer)
        held_out = unseen(encoded, path)
        if not held_out:
            raise InvalidRequest(
                f"no document to choose by: {len(encoded)} of {len(encoded)} are in {path}", param="sources"
            )
        few = sample(held_out, lm.tokenizer, max_tokens)
        observed = observe(lm, few, domains=[windows])
        held = _held(observed, few, datastore, keys=kind == "mlp")
        info, where = lm.info, loading.pick_device(device)
        tokens = len(lm.tokenizer)
        del lm  # before another model is loaded
        if kind == "mlp":
            student, begun = _mlp(datastore, sizes, where, info.vocab_size, settings.seed)
        else:
            student, begun = _decoder(
                start or model, model, where, manifest.windows.context_length, tokens, settings.seed
            )
        used = None if taught is None else _used(taught)
        work = target.with_name(f".{target.name}.building")
        identity: dict[str, Any] = {
            "kind": kind, **asdict(settings), "start": begun.model_dump(mode="json"), "model": info.fingerprint,
            "store": StoreRecord.of(manifest).content, "targets": used and used.sha256,
            "documents": [d.id for d in few], "tokens": len(observed.targets),
        }  # fmt: skip
        claim(work, identity)
        with locked(work, wait=False, doing="training this memory"):
            told: Told = on_step or (lambda *_: None)
            rows, seconds = distil(
                student, examples.batches, held, settings, work, on_step=told, save_seconds=save_seconds
            )
            best = min(rows, key=lambda row: row.mixture_loss)
            folder = work / "memory"
            discard(folder)
            folder.mkdir()
            student.save(folder)
            stored = tried(student, held, settings.pass_tokens, best.step)  # rounded as it is stored
            made = MemoryManifest(
                store=StoreRecord.of(manifest), model=manifest.model, key_function=manifest.key_function,
                windows=manifest.windows, files={f.name: FileRecord.of(f) for f in sorted(folder.iterdir())},
                kind="mlp" if kind == "mlp" else "decoder", key_fingerprint=info.fingerprint,
                vocab_size=student.vocab_size, parameters=student.parameters, start=begun, training=asdict(settings),
                targets=used, tune=_tune(observed, stored), train_loss=best.train_loss, excess=best.excess,
                seconds=seconds,
            )  # fmt: skip
            save(made, folder / MEMORY)
            with disk_errors(target):
                folder.rename(target)
                sync_folder(target.parent)
    discard(work)
    return made


def _check(
    kind: str,
    settings: DistilSettings,
    targets: str | Path | None,
    start: str | None,
    sizes: MlpSizes | None,
    out: Path,
) -> Targets | None:
    """The targets to train on. Everything that can be refused before a model is loaded is refused here."""
    check_kind(kind)
    if out.exists():
        raise Conflict(f"{out} exists already: remove it, or name another folder", param="out")
    if kind == "mlp" and start is not None:
        raise InvalidRequest("an mlp memory starts from random weights: start means nothing to it", param="start")
    if kind == "decoder" and sizes is not None:
        raise InvalidRequest("sizes are those of an mlp memory, a decoder has its model's", param="sizes")
    if settings.beta == 0:
        if targets is not None:
            raise InvalidRequest("targets mean nothing where beta is 0: it learns from the text alone", param="targets")
        return None
    if targets is None:
        raise InvalidRequest(
            f"beta is {settings.beta}: it needs targets, or 0 to learn from the text alone", param="beta"
        )
    return Targets.open(Path(targets), check="all")


def _held(observed: HeldOut, documents: Sequence[Encoded], datastore: Datastore, *, keys: bool) -> Held:
    """The windows of `observe`, fed to the memory as they were to the model."""
    made = datastore.manifest
    bos = made.model.bos_token_id if made.windows.bos == "window" else None
    feeds: list[Feed] = []
    rows = 0
    for document in documents:
        length, least = made.windows.context_length, made.windows.min_context
        for window in plan_fed_windows(len(document.tokens), length, least, bos):
            fed = window.fed(document.tokens).astype(np.int64)
            feeds.append(Feed(fed, window.positions.astype(np.int64), rows))
            rows += window.end - window.first
    queries = observed.queries.astype(np.float32) if keys else None
    return Held(feeds, queries, observed.targets, observed.lm_log_probs)


def _decoder(
    start: str, base: str, device: "torch.device", context_length: int, tokens: int, seed: int
) -> tuple[Student, StartRecord]:
    student = DecoderStudent.load(start, base, device, context_length=context_length, vocab_size=tokens, seed=seed)
    if Path(start).name == "config.json":
        return student, StartRecord()
    folder = loading.resolve(start)
    name = folder.resolve().name if Path(start).expanduser().is_dir() else start
    return student, StartRecord(model_id=name, weights_sha256=loading.weights_sha256(folder))


def _mlp(
    datastore: Datastore, sizes: MlpSizes | None, device: "torch.device", vocab_size: int, seed: int
) -> tuple[Student, StartRecord]:
    live = datastore.live_entries()
    some = live[sample_rows(len(live), KEYS_SAMPLED, seed)]
    counts = np.zeros(vocab_size, np.int64)
    for start in range(0, len(live), KEYS_SAMPLED):
        counts += np.bincount(datastore.values_of(live[start : start + KEYS_SAMPLED]), minlength=vocab_size)
    chosen = sizes or MlpSizes.fitting(datastore.manifest)
    student = MlpStudent(datastore.keys_of(some), counts, device, seed=seed, **asdict(chosen))
    return student, StartRecord(sizes=student.sizes)


def _used(targets: Targets) -> TargetsUsed:
    made = targets.manifest
    digest = sha256_of(targets.folder / TARGETS)
    return TargetsUsed(sha256=digest, settings=made.settings, kept=made.kept, empty=made.empty)


def _tune(observed: HeldOut, found: Tried) -> TuneRecord:
    return TuneRecord(
        documents=observed.documents,
        tokens=len(observed.targets),
        step=found.step,
        lm_loss=-float(observed.lm_log_probs.mean(dtype=np.float64)),
        memory_loss=found.memory_loss,
        mixture_loss=found.mixture_loss,
        lmbda=found.lmbda,
    )
