"""Model and datastores in one process: the entrance of the library, and what the services must equal.

It runs the Mixer of the services over objects instead of connections (knnlm/local.py) and computes nothing. This is the
one module where torch and faiss may meet.
"""

import asyncio
import secrets
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import numpy as np
import numpy.typing as npt

from knnlm.errors import InvalidRequest
from knnlm.generation import Completion, GenerationOptions, Generator, NewToken
from knnlm.local import CalledModel, LocalDatastore, LocalLanguageModel
from knnlm.memories import KeyMemory
from knnlm.messages import PASSAGE_TOKENS, Document
from knnlm.mixer import Mixer, NextTokens, Options
from knnlm.options import DomainOptions, KnnOptions, MemoryOptions
from knnlm.protocols import LanguageModel, Searching
from knnlm.scoring import Score
from knnlm.tokenizer import Tokenizer

T = TypeVar("T")
Context = str | Sequence[int] | npt.NDArray[np.integer]


def build(
    store: str | Path,
    domain: str,
    documents: Iterable[Document],
    model: str | LanguageModel,
    *,
    version: str | None = None,
    context_length: int | None = None,
    min_context: int | None = None,
    index: str = "auto",
    activate: bool = True,
) -> Path:
    """Make `documents` a version of `domain` in the folder `store`: indexed and, unless told otherwise, current.
    Returns its folder.

    model: what makes the keys, or the Hugging Face folder or hub id to load. version: None for the next of v1, v2, ...,
    or the one whose building was interrupted, which is continued. index: auto, a recipe, or flat for exact search. The
    rest, and what is raised, as in knnlm.datastore.build.build and knnlm.index.build.build_index; InvalidRequest for an
    unknown recipe before any work.
    """
    from knnlm.datastore.build import build as build_keys
    from knnlm.datastore.catalog import Catalog
    from knnlm.index.build import build_index, suited
    from knnlm.index.memory import available_bytes
    from knnlm.index.table import family
    from knnlm.lm.model import LanguageModel as TorchModel

    if index != "auto":
        family(index)
    catalog = Catalog(Path(store))
    lm = TorchModel.load(model) if isinstance(model, str) else model
    path = build_keys(
        documents, lm, catalog, domain, version=version, context_length=context_length, min_context=min_context
    )
    build_index(path, suited(path, index, memory_bytes=available_bytes()).recipe)
    if activate:
        catalog.activate(domain, path.name)
    return path


class Pipeline:
    """A model and the datastores it may look into, by domain, and its memories, by name. Close it, or use it in a
    `with` block.

    Works in a plain program and where an event loop runs already (Jupyter): then on a thread of its own.
    """

    def __init__(
        self,
        lm: LanguageModel,
        searchers: Mapping[str, Searching] | None = None,
        memories: Mapping[str, LanguageModel | KeyMemory | CalledModel] | None = None,
    ) -> None:
        self.lm = lm
        self.searchers = dict(searchers or {})
        self.memories = dict(memories or {})
        local = {
            name: memory if isinstance(memory, KeyMemory | CalledModel) else LocalLanguageModel(memory)
            for name, memory in self.memories.items()
        }
        self._mixer = Mixer(LocalLanguageModel(lm), LocalDatastore(self.searchers), lm.info, memories=local)

    @classmethod
    def load(
        cls,
        model: str,
        store: str | Path | None = None,
        domains: Sequence[str] | None = None,
        *,
        device: str = "auto",
        dtype: str = "auto",
        key_function: str | None = None,
        index: str | None = None,
        memories: Mapping[str, str | Path] | None = None,
    ) -> Self:
        """A Hugging Face folder or hub id, and the current versions of `domains` in `store`: by default, of all domains
        that have one. memories: Memory Decoders by the names they are asked for: the folder of one of either kind, or
        the host:port of a decoder's lm service.

        key_function: by default the one that the first domain was made with. index: the recipe of the index to search
        with, by default that of each version. Raises UnknownDomain, UnknownVersion for a named domain without a current
        version, InvalidRequest for one without such an index, DatastoreMismatch for one of another model, and as
        LanguageModel.load does.
        """
        from knnlm.datastore.catalog import current_versions
        from knnlm.datastore.manifest import Manifest
        from knnlm.index.sharded_searcher import open_searcher
        from knnlm.lm.model import LanguageModel

        paths = current_versions(store, domains)  # first: a model takes longer to load than a name to be refused
        functions = [key_function] if key_function else [Manifest.load(p).key_function for p in paths.values()]
        lm = LanguageModel.load(model, device=device, dtype=dtype, key_function=(functions or ["ffn_input"])[0])
        learnt = {name: _opened(path, device, dtype) for name, path in (memories or {}).items()}
        searchers = {domain: open_searcher(path, index=index, expect=lm.info) for domain, path in paths.items()}
        return cls(lm, searchers, learnt)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.lm.tokenizer

    def next_token(
        self,
        contexts: Context | Sequence[Context],
        knn: Options | str = None,
        *,
        memory: MemoryOptions | str | None = None,
        passages: int = 0,
        passage_tokens: int = PASSAGE_TOKENS,
    ) -> NextTokens:
        """The distribution of the token after a context, or after each of several: one row each.

        A context is a text or token ids (with their BOS). knn: None for the LM alone, the name of a domain for that
        domain as it was tuned, or options: of retrieval, or of several sources by their names (knnlm.sources.SOURCES).
        memory: the name of a memory, or its options. The rest, and what is raised, as in `Mixer.next_token`.
        """
        encoded = [self._tokens(c) for c in _listed(contexts)]
        call = self._mixer.next_token(encoded, _options(knn, memory), passages=passages, passage_tokens=passage_tokens)
        return _run(call)

    def score(
        self,
        text: Context,
        knn: Options | str = None,
        *,
        memory: MemoryOptions | str | None = None,
        context_length: int | None = None,
        min_context: int | None = None,
    ) -> Score:
        """Log-probability of every token of a text but its first; `knn` and `memory` as in `next_token`, see
        `Mixer.score`."""
        tokens, options = self._tokens(text), _options(knn, memory)
        return _run(self._mixer.score_text(tokens, options, context_length=context_length, min_context=min_context))

    def explain(
        self,
        text: Context,
        knn: Options | str = None,
        *,
        memory: MemoryOptions | str | None = None,
        prompt: Context | None = None,
        passages: int = 3,
        passage_tokens: int = PASSAGE_TOKENS,
        context_length: int | None = None,
        min_context: int | None = None,
    ) -> Score:
        """`score`, and where each token's retrieved probability came from; see `Mixer.explain`.

        prompt: explain the tokens of the text as they follow it, rather than all but the first; of the same kind, a
        text or token ids.
        """
        tokens, first = self._tokens(text), 1
        if isinstance(prompt, str) and isinstance(text, str):
            tokens, first = self.tokenizer.continued(prompt, text)
        elif isinstance(prompt, str) or (prompt is not None and isinstance(text, str)):
            raise InvalidRequest("prompt and text must both be texts, or both token ids", param="prompt")
        elif prompt is not None:
            before = self._tokens(prompt)
            tokens, first = np.concatenate([before, tokens]), max(1, len(before))
        call = self._mixer.explain_text(
            tokens,
            _options(knn, memory),
            first=first,
            passages=passages,
            passage_tokens=passage_tokens,
            context_length=context_length,
            min_context=min_context,
        )
        return _run(call)

    def generate(
        self,
        prompt: Context,
        knn: Options | str = None,
        options: GenerationOptions | None = None,
        *,
        memory: MemoryOptions | str | None = None,
        seed: int | None = None,
        on_token: Callable[[NewToken], None] | None = None,
    ) -> Completion:
        """What follows a prompt, a text or token ids (with their BOS); `knn` and `memory` as in `next_token`.

        options: how tokens are chosen and when to stop; by default 16 drawn ones. seed: of the draws; None for another
        each time. on_token: told of each as soon as it is known. Raises what Generator.generate does.
        """
        tokens, chosen = self._tokens(prompt), _options(knn, memory)
        drawn = secrets.randbits(63) if seed is None else seed
        generator = Generator(self._mixer, self.tokenizer)  # belongs to the event loop of this call
        return _run(generator.complete(tokens, options or GenerationOptions(), chosen, seed=drawn, on_token=on_token))

    def close(self) -> None:
        for searcher in self.searchers.values():
            searcher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tokens(self, context: Context) -> npt.NDArray[np.int32]:
        if isinstance(context, str):
            return self.tokenizer.encode(context)
        tokens = np.asarray(context)
        if tokens.ndim != 1 or (len(tokens) and not np.issubdtype(tokens.dtype, np.integer)):
            raise InvalidRequest(
                f"a context is a text or a row of token ids, got {tokens.dtype} of shape {tokens.shape}", param="tokens"
            )
        # checked before the cast: an id that does not fit int32 would wrap into a valid one
        size = self.lm.info.vocab_size
        if len(tokens) and not 0 <= tokens.min() <= tokens.max() < size:
            bad = tokens[(tokens < 0) | (tokens >= size)][0]
            raise InvalidRequest(f"token {bad} lies outside the vocabulary of {size}", param="tokens")
        return tokens.astype(np.int32)


def _opened(where: str | Path, device: str, dtype: str) -> LanguageModel | KeyMemory | CalledModel:
    """The memory at host:port, or in a folder, of either kind; without memory.json it is a model trained elsewhere.

    device, dtype: of a decoder. Raises as open_mlp and LanguageModel.load.
    """
    from knnlm.lm.model import LanguageModel
    from knnlm.memory.manifest import MEMORY, MemoryManifest
    from knnlm.memory.served import open_mlp, with_memory

    path = Path(where)
    if ":" in str(where) and not path.exists():
        return CalledModel(str(where))
    if (path / MEMORY).is_file() and MemoryManifest.open(path).kind == "mlp":
        return open_mlp(path)
    lm = LanguageModel.load(str(path), device=device, dtype=dtype)
    lm.info = with_memory(lm.info, path)
    return lm


def _listed(contexts: Context | Sequence[Context]) -> Sequence[Context]:
    """One context as a list of one. A list of numbers is one context, a list of anything else is several."""
    if isinstance(contexts, str | np.ndarray):
        return [contexts]
    if all(isinstance(item, int | np.integer) for item in contexts):
        return [contexts] if len(contexts) else []  # type: ignore[list-item]  # just checked, element by element
    return contexts  # type: ignore[return-value]  # what is neither is refused by _tokens


def _options(knn: Options | str, memory: MemoryOptions | str | None) -> Options:
    asked = KnnOptions((DomainOptions(knn),)) if isinstance(knn, str) else knn
    if memory is None:
        return asked
    others = {"knn": asked} if isinstance(asked, KnnOptions) else dict(asked or {})
    return {**others, "memory": MemoryOptions(memory) if isinstance(memory, str) else memory}


def _run(call: Coroutine[Any, Any, T]) -> T:  # Any: what a coroutine is sent and yields is its loop's affair
    results: list[T] = []

    async def keep() -> None:
        """A task without a result: asyncio.run formats that of its task twice, arrays and all."""
        results.append(await call)

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(keep())
    else:
        with ThreadPoolExecutor(1, thread_name_prefix="knnlm") as thread:
            thread.submit(asyncio.run, keep()).result()
    return results[0]
