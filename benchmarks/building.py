"""Building a datastore beside the bare forward pass over the same windows, and the memory it takes.

    python -m benchmarks.building [--size N] [--text PATH ...] [--entries 32768] [--no-memory]

Speed: `build`, all of it - reading, tokenizing, the model, keys and values on disk and synced, checksums, publishing -
against the model of transformers run over the same windows and thrown away. That pass is given its best form: without
logits, which a datastore does not need, and in batches of the size that building uses. With logits, as a plain call of
the model has them, it is shown too. Counted are the tokens fed.

Memory: the peak of a process that builds a tenth of --size, and of one that builds all of it. The second may need no
more than the first: what is held is one part of 16,384 entries and one batch, whatever the corpus.
"""

import multiprocessing
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.data import FOLDER, Prepared, prepare
from benchmarks.harness import arguments, figure, interleave, table
from benchmarks.scoring import PlainModel
from benchmarks.system import THREADS
from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.reader import Datastore
from knnlm.decoding import plan_windows
from knnlm.lm.model import CPU_BATCH_TOKENS, LanguageModel
from knnlm.lm.requests import Feed, batches
from knnlm.messages import Document
from knnlm.tokenizer import Tokenizer

GOAL, MEMORY_GOAL = 0.9, 1.1
ENTRIES = 32_768  # of one build that is timed: two parts
BUILD, BARE, WITH_LOGITS = "build", "bare forward pass", "bare forward pass with logits"


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--entries", type=int, default=ENTRIES, help=f"of a build that is timed (default {ENTRIES})")
    parser.add_argument("--rounds", type=int, default=5, help="of every way in turn (default 5)")
    parser.add_argument("--no-memory", action="store_true", help="only the speed")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    prepared = prepare(options.size, options.text)
    speed(prepared, options.entries, options.rounds)
    if not options.no_memory:
        memory(prepared, options.size)


def speed(prepared: Prepared, entries: int, rounds: int) -> None:
    lm = LanguageModel.load(str(prepared.model), device="cpu")
    plain = PlainModel(str(prepared.model))
    chosen = list(documents(prepared.path, lm.tokenizer, entries))
    texts = [lm.tokenizer.encode(document.text).astype(np.int64) for document in chosen]
    context = plain.context_length
    fed = sum(w.end - w.start for tokens in texts for w in plan_windows(len(tokens), context, context // 2))
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        number = count()

        def building() -> int:
            build(chosen, lm, Catalog(Path(folder) / str(next(number))), "bench")
            return fed

        rates = interleave(
            {
                BUILD: building,
                BARE: bare(plain, texts, lambda ids: plain.model.base_model(ids, use_cache=False)),
                WITH_LOGITS: bare(plain, texts, lambda ids: plain.model(ids, use_cache=False)),
            },
            seconds=0.1,
            rounds=rounds,
        )
    table(
        ["", "tokens/s", "of the bare pass"],
        [[name, f"{rate.median:,.0f}", f"{rate.over(rates[BARE]):.2f}"] for name, rate in rates.items()],
    )
    figure(
        "building / bare forward pass",
        rates[BUILD].over(rates[BARE]),
        GOAL,
        size=prepared.entries,
        entries=entries,
        tokens_per_second=round(rates[BUILD].median),
        of_pass_with_logits=round(rates[BUILD].over(rates[WITH_LOGITS]), 3),
    )


def bare(
    plain: PlainModel, texts: Sequence[npt.NDArray[np.int64]], run: Callable[[torch.Tensor], object]
) -> Callable[[], int]:
    """A program that runs over the windows of the texts, those of similar length together; counted without padding."""
    context = plain.context_length
    feeds = [
        Feed(tokens[w.start : w.end], w.positions.astype(np.int64), 0)
        for tokens in texts
        for w in plan_windows(len(tokens), context, context // 2)
    ]
    inputs = []
    for batch in batches(feeds, CPU_BATCH_TOKENS):
        ids = np.zeros((len(batch), len(batch[0].tokens)), np.int64)  # padded on the right, as building does
        for row, feed in zip(ids, batch, strict=True):
            row[: len(feed.tokens)] = feed.tokens
        inputs.append(torch.from_numpy(ids))
    fed = sum(len(feed.tokens) for feed in feeds)

    def program() -> int:
        with torch.no_grad():
            for ids in inputs:
                run(ids)
        return fed

    return program


def memory(prepared: Prepared, size: int) -> None:
    few = max(1, size // 10)
    peaks = {entries: peak(prepared, entries) for entries in (few, size)}
    table(
        ["entries", "peak memory, MB"], [[f"{entries:,}", f"{bytes_ / 1e6:,.0f}"] for entries, bytes_ in peaks.items()]
    )
    figure(
        "building: peak memory / that of a tenth of the entries",
        peaks[size] / peaks[few],
        MEMORY_GOAL,
        better="less",
        size=size,
        megabytes=round(peaks[size] / 1e6),
        megabytes_of_a_tenth=round(peaks[few] / 1e6),
    )


def peak(prepared: Prepared, entries: int) -> int:
    """Bytes that a process of its own held at most while it built so many entries."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_build_apart, args=(prepared.path, prepared.model, entries, sender))
    process.start()
    sender.close()
    try:
        found: int = receiver.recv()
    except EOFError as err:
        raise RuntimeError(f"the process that builds {entries} entries failed") from err
    process.join()
    return found


def documents(path: Path, tokenizer: Tokenizer, entries: int) -> Iterator[Document]:
    """The texts that a datastore was made from, again and again under new ids, for at least so many entries."""
    datastore = Datastore.open(path)
    rows = [(int(s), int(n)) for s, n in zip(datastore.documents.starts, datastore.documents.lengths, strict=True)]
    begins = 0 if tokenizer.bos_token_id is None else 1
    for round_ in count():
        for number, (start, length) in enumerate(rows):
            if entries <= 0:
                datastore.close()
                return
            yield Document(f"{round_}-{number}", tokenizer.decode(datastore.tokens[start + begins : start + length]))
            entries -= length - 1


def _build_apart(path: Path, model: Path, entries: int, sender: Connection) -> None:
    torch.set_num_threads(THREADS)
    lm = LanguageModel.load(str(model), device="cpu")
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        build(documents(path, lm.tokenizer, entries), lm, Catalog(Path(folder)), "bench")
    sender.send(peak_bytes())
    sender.close()


def peak_bytes() -> int:
    """The most memory that this process has held; ru_maxrss would begin with what its parent held."""
    status = Path("/proc/self/status")
    if status.is_file():
        lines = (line.split() for line in status.read_text(encoding="ascii").splitlines())
        return next(1024 * int(words[1]) for words in lines if words[0] == "VmHWM:")
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


if __name__ == "__main__":
    main()
