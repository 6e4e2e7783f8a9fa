"""The aggregator's core: a checked request to an answer in the shapes of schemas.py. Knows no HTTP.

It holds the tokenizer and identity of the model behind the lm service, both asked for at start-up, so that they cannot
differ from the model's own.
"""

import asyncio
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from knnlm.clients.explained import explained
from knnlm.clients.rpc import DomainReplica
from knnlm.errors import KnnlmError, Unavailable, UnknownModel
from knnlm.joined import JoinedSearches
from knnlm.memories import KeyMemory, check_fits, stale
from knnlm.messages import Document, DomainInfo, ModelInfo, differs
from knnlm.mixer import Mixer, NextTokens
from knnlm.options import MemoryOptions
from knnlm.protocols import DatastoreClient, DocumentsClient, LanguageModelClient
from knnlm.rounds import Rounds
from knnlm.sources import computed
from knnlm.tokenizer import Tokenizer
from knnlm.wire.arrays import LIST_LIMIT, ListBudget
from knnlm.wire.jsonable import to_json
from services.aggregator.completions.engine import Completions
from services.aggregator.completions.metrics import CompletionMetrics
from services.aggregator.requests import CacheMemory, Inputs, MemoryBudget
from services.aggregator.responses import (
    domain_shape,
    domain_status_shape,
    next_tokens,
    score_response,
    used_domains,
    used_memories,
)
from services.aggregator.retrieval_options import chosen, named_in, short_name
from services.aggregator.schemas import mixing
from services.aggregator.schemas.domains import Domain, DomainStatus
from services.aggregator.schemas.explaining import ExplainRequest
from services.aggregator.schemas.tokenizer import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from services.aggregator.settings import AggregatorSettings
from services.runtime.context import RequestContext
from services.runtime.observability import Metrics, event
from services.runtime.schemas import AddDocumentsBody, ChangeAnswer, RemoveDocumentsBody

LOG = logging.getLogger(__name__)


class Datastore(DatastoreClient, DocumentsClient, Protocol):
    """A datastore service of several replicas. problem: why none of them answers, as far as is known."""

    @property
    def problem(self) -> str | None: ...
    async def activate(self, domain: str, version: str, *, wait: bool = False) -> DomainInfo: ...
    async def replicas(self, domain: str) -> Sequence[DomainReplica]: ...


class Replicated(LanguageModelClient, Protocol):
    """An lm service of several replicas. problem: why none of them answers, as far as is known."""

    @property
    def problem(self) -> str | None: ...


class Aggregator:
    """One model, a set of domains and memories by their names, mixed. Make it with `connect`, close its `completions`.
    degraded: told of each answer by the LM alone that was to have been mixed. skipped: as in Mixer."""

    def __init__(
        self,
        lm: LanguageModelClient,
        datastore: Datastore,
        info: ModelInfo,
        tokenizer: Tokenizer,
        settings: AggregatorSettings,
        degraded: Callable[[], None] = lambda: None,
        completion_metrics: CompletionMetrics | None = None,
        memories: Mapping[str, Replicated | KeyMemory] | None = None,
        skipped: Callable[[int], None] = lambda _searches: None,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._datastore = datastore
        self._memories = dict(memories or {})
        self._settings = settings
        self._degraded = degraded
        self._inputs = Inputs(info, tokenizer, settings)
        self._budget = MemoryBudget(settings.max_distribution_numbers)
        self._caches = CacheMemory(info.key_dim, settings)
        metrics = completion_metrics or CompletionMetrics(Metrics("aggregator"))
        self._mixer = Mixer(
            lm,
            JoinedSearches(datastore),
            info,
            batch_tokens=settings.score_batch_tokens,
            max_window=settings.max_context_length,
            memories=self._memories,
            down=self._down,
            skipped=skipped,
        )
        self._rounds = Rounds(self._mixer, observe=metrics.round)
        self.completions = Completions(self._mixer, self._rounds, tokenizer, settings, self._caches, metrics, degraded)

    @classmethod
    async def connect(
        cls,
        lm: LanguageModelClient,
        datastore: Datastore,
        settings: AggregatorSettings,
        *,
        memories: Mapping[str, Replicated | KeyMemory] | None = None,
        degraded: Callable[[], None] = lambda: None,
        skipped: Callable[[int], None] = lambda _searches: None,
        completion_metrics: CompletionMetrics | None = None,
    ) -> "Aggregator":
        """Ask the lm service who it is. Raises what the client raises while that service is not ready."""
        info, json, template = await asyncio.gather(lm.get_model(), lm.get_tokenizer(), lm.get_chat_template())
        bos, eos = info.bos_token_id, info.eos_token_id
        tokenizer = Tokenizer(json, bos_token_id=bos, eos_token_id=eos, chat_template=template)
        if tokenizer.sha256 != info.tokenizer_sha256:
            raise Unavailable(
                f"the lm service gave a tokenizer with sha256 {tokenizer.sha256}, announced {info.tokenizer_sha256}"
            )
        aggregator = cls(lm, datastore, info, tokenizer, settings, degraded, completion_metrics, memories, skipped)
        await aggregator.completions.start()
        return aggregator

    def _down(self, kind: str, options: Any) -> str | None:  # Any: a record of options of that kind
        """See Mixer."""
        if kind == "knn":
            return self._datastore.problem
        memory = self._memories.get(options.name or "") if isinstance(options, MemoryOptions) else None
        if memory is None or isinstance(memory, KeyMemory) or memory.problem is None or options.lmbda == 0:
            return None
        return f"memory {options.name}: {memory.problem}"

    async def log_memories(self) -> None:
        """Ask every memory what it is, and log it: one that is down keeps nobody waiting, and is asked again when a
        request names it."""
        for name, found in (await self._usable_memories()).items():
            if isinstance(found, KnnlmError):
                event(LOG, "memory_unusable", logging.WARNING, memory=name, reason=found.message)
            else:
                event(LOG, "memory_ready", memory=name, model=found.model_id, fingerprint=found.fingerprint)

    async def _usable_memories(self) -> Mapping[str, ModelInfo | KeyMemory | KnnlmError]:
        """The model that each memory is, or why it cannot be mixed now."""

        async def ask(name: str, memory: Replicated | KeyMemory) -> ModelInfo | KeyMemory | KnnlmError:
            try:
                if not isinstance(memory, KeyMemory) and memory.problem is not None:
                    raise Unavailable(memory.problem)
                found = memory if isinstance(memory, KeyMemory) else await memory.get_model()
                check_fits(name, found, self.info)
            except KnnlmError as err:
                return err
            return found

        found = await asyncio.gather(*(ask(name, memory) for name, memory in self._memories.items()))
        return dict(zip(self._memories, found, strict=True))

    async def next_token(self, request: mixing.NextTokenRequest, call: RequestContext) -> bytes:
        """The answer as JSON, a NextTokenResponse; seconds per stage go into the call.

        Raises KnnlmError for everything that cannot be answered.
        """
        model, sources = chosen(request, self.info.model_id, self._settings)
        self._inputs.check_shown(request, retrieved="knn" in sources)
        contexts = await self._inputs.contexts(request.text, request.tokens, parse_special=request.parse_special)
        contexts = [self._inputs.fitting(c, request.truncate, request.given) for c in contexts]
        numbers = self._inputs.distribution_numbers(len(contexts), request.given)
        if request.full and request.encoding == "list":
            ListBudget(LIST_LIMIT).spend(3 * numbers)  # p, p_lm and p_knn
        caches = self._caches.hold(sources, len(contexts), call.remaining())
        async with caches, self._budget.hold(numbers, call.remaining()):
            shown = {"passages": request.neighbors, "passage_tokens": request.neighbor_tokens}
            if len(contexts) == 1:  # one of many that may have come at the same moment
                answer = await self._rounds.next_token(contexts[0], sources, **shown)
            else:
                answer = await self._mixer.next_token(contexts, sources, **shown)
            self._note(answer.degraded, answer.timings, call)
            given = (request, model, contexts, answer)
            if request.full or request.neighbors:  # long to write
                return await asyncio.to_thread(self._next_token_answer, *given)
            return await computed(numbers, self._next_token_answer, *given)

    def _next_token_answer(
        self,
        request: mixing.NextTokenRequest,
        model: str,
        contexts: Sequence[npt.NDArray[np.int32]],
        answer: NextTokens,
    ) -> bytes:
        results = next_tokens(request, contexts, answer, self.tokenizer)
        shape = mixing.NextTokenResponse(
            model=model,
            domains=used_domains(answer),
            memories=used_memories(answer),
            degraded=answer.degraded,
            results=results,
        )
        return shape.model_dump_json(by_alias=True).encode()

    async def score(self, request: mixing.ScoreRequest, call: RequestContext) -> mixing.ScoreResponse:
        """The answer; seconds per stage go into the call. Raises KnnlmError for everything that cannot be answered."""
        model, sources = chosen(request, self.info.model_id, self._settings)
        length, least = self._window(request)
        tokens = await self._inputs.one_text(request.text, request.tokens, parse_special=request.parse_special)
        async with self._caches.hold(sources, 1, call.remaining()):
            score = await self._mixer.score_text(tokens, sources, context_length=length, min_context=least)
        self._note(score.degraded, score.timings, call)
        return await asyncio.to_thread(score_response, score, model, self.tokenizer)

    async def explain(self, request: ExplainRequest, call: RequestContext) -> bytes:
        """The answer as JSON, an ExplainResponse. Raises KnnlmError for everything that cannot be answered."""
        model, sources = chosen(request, self.info.model_id, self._settings)
        length, least = self._window(request)
        tokens, first = await self._inputs.explained(request)
        async with self._caches.hold(sources, 1, call.remaining()):
            score = await self._mixer.explain_text(
                tokens,
                sources,
                first=first,
                passages=request.passages,
                passage_tokens=request.passage_tokens,
                context_length=length,
                min_context=least,
            )
        self._note(score.degraded, score.timings, call)
        # on a thread: it has many parts
        return await asyncio.to_thread(
            lambda: json.dumps(to_json(explained(score, model, self.tokenizer)), allow_nan=False).encode()
        )

    def _window(self, request: mixing.ScoreRequest) -> tuple[int | None, int | None]:
        """context_length and min_context: as asked for, else as the settings say."""
        length, least = request.context_length, request.min_context
        if (length, least) == (None, None) and self._settings.context_length is not None:
            length = min(self._settings.context_length, self.info.context_length)
            least = None if self._settings.min_context is None else min(self._settings.min_context, length - 1)
        return length, least

    async def domains(self) -> list[Domain]:
        """Every domain of the datastore service, in its order."""
        return [domain_shape(d) for d in await self._datastore.list_domains()]

    async def activate(self, domain: str, version: str, *, wait: bool) -> Domain:
        """Switch a domain to another version; the replicas that were not asked follow by watching the store.

        wait: until all that serve the domain have done so. Raises DeadlineExceeded with the names of those that have
        not, and what they say.
        """
        return domain_shape(await self._datastore.activate(domain, version, wait=wait))

    async def add_documents(self, domain: str, request: AddDocumentsBody) -> ChangeAnswer:
        """Add documents to a domain: one replica of the datastore service encodes them and serves them when this
        returns, the others follow. Raises what that service raises."""
        documents = [Document(given.id, given.text) for given in request.documents]
        change = await self._datastore.add_documents(domain, documents, replace=request.replace)
        return ChangeAnswer(**asdict(change))

    async def remove_documents(self, domain: str, request: RemoveDocumentsBody) -> ChangeAnswer:
        """Remove documents from a domain by their ids; see add_documents."""
        return ChangeAnswer(**asdict(await self._datastore.remove_documents(domain, request.ids)))

    async def domain_status(self, name: str) -> DomainStatus:
        """One domain, and what each replica of the datastore service says of it. Raises UnknownDomain, Unavailable."""
        info, replicas = await asyncio.gather(self._datastore.get_domain(name), self._datastore.replicas(name))
        return domain_status_shape(info, replicas)

    def _note(self, degraded: str | None, timings: Mapping[str, float], call: RequestContext) -> None:
        call.timings.update(timings)
        if degraded is not None:
            self._degraded()

    async def models(self) -> dict[str, str | None]:
        """The LM's own id, and one id for each domain, memory and pair of them that this LM can be mixed with; without
        retrieval, no domains. For each, why its memory is stale, None where it has none or that is not known."""
        try:
            infos = await self._datastore.list_domains()
        except KnnlmError:  # a list of models must not fail because retrieval is down: what cannot be used is left out
            infos = []
        usable = [d.domain for d in infos if differs(vars(d), self.info) is None]
        mixed = [self.model_name, *(f"{self.model_name}+{d}" for d in usable)]
        listed: dict[str, str | None] = dict.fromkeys(mixed)
        for name, found in (await self._usable_memories()).items():
            if not isinstance(found, KnnlmError):
                trained = found.trained if isinstance(found, KeyMemory) else found.memory
                listed |= dict.fromkeys([f"{model}~{name}" for model in mixed], stale(trained, infos))
        return listed

    async def domain(self, name: str) -> Domain:
        """One domain. Raises UnknownDomain."""
        return domain_shape(await self._datastore.get_domain(name))

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """The ids of the text; BOS first when asked for."""
        self.check_model(request.model)
        self._inputs.check_texts([request.prompt], "prompt", empty=True)
        return await asyncio.to_thread(self._tokenized, request)

    def _tokenized(self, request: TokenizeRequest) -> TokenizeResponse:
        tokens = self.tokenizer.encode(request.prompt, parse_special=request.parse_special)
        if not request.add_special_tokens and self.info.bos_token_id is not None:
            tokens = tokens[1:]
        return TokenizeResponse.model_construct(  # unchecked: it may be long
            count=len(tokens),
            max_model_len=self.info.context_length,
            tokens=tokens.tolist(),
            token_strs=self.tokenizer.pieces(tokens) if request.return_token_strs else None,
        )

    async def detokenize(self, request: DetokenizeRequest) -> DetokenizeResponse:
        """The text of the tokens."""
        self.check_model(request.model)
        self._inputs.check_token_count(len(request.tokens))
        text = await asyncio.to_thread(lambda: self.tokenizer.decode(self._inputs.token_array(request.tokens)))
        return DetokenizeResponse(prompt=text)

    def tokenizer_info(self) -> dict[str, object]:
        def text(token: int | None) -> str | None:
            return None if token is None else self.tokenizer.token(token)

        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": text(self.info.bos_token_id),
            "eos_token": text(self.info.eos_token_id),
            "vocab_size": len(self.tokenizer),
            "sha256": self.info.tokenizer_sha256,
        }

    @property
    def model_name(self) -> str:
        """The last part of the model's path or hub id: what users write."""
        return short_name(self.info.model_id)

    def check_model(self, model: str | None) -> str | None:
        """The domain that a model id names, None where it names none. Raises UnknownModel for any other id."""
        domain, memory = named_in(model, self.info.model_id)
        if memory is not None and memory not in self._memories:
            known = ", ".join(sorted(self._memories)) or "none"
            raise UnknownModel(f"model {model!r:.200} names an unknown memory; known: {known}", param="model")
        return domain
