"""The aggregator's core: a checked request to an answer in the shapes of schemas.py. Knows no HTTP.

It holds the tokenizer and identity of the model behind the lm service, both asked for at start-up, so that they cannot
differ from the model's own.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from knnlm.clients.rpc import DomainReplica
from knnlm.decoding import end_of_context
from knnlm.errors import DeadlineExceeded, InvalidRequest, KnnlmError, TooLarge, Unavailable
from knnlm.messages import (
    DatastoreClient,
    Document,
    DocumentsClient,
    DomainInfo,
    LanguageModelClient,
    ModelInfo,
    differs,
)
from knnlm.mixer import Mixer
from knnlm.tokenizer import Tokenizer
from knnlm.wire.arrays import LIST_LIMIT, ListBudget
from services.aggregator.responses import (
    domain_shape,
    domain_status_shape,
    next_tokens,
    score_response,
    used_domains,
)
from services.aggregator.retrieval_options import chosen, domain_of, short_name
from services.aggregator.schemas import mixing
from services.aggregator.schemas.domains import Domain, DomainStatus
from services.aggregator.schemas.tokenizer import (
    DetokenizeRequest,
    DetokenizeResponse,
    TokenizeRequest,
    TokenizeResponse,
)
from services.aggregator.settings import AggregatorSettings
from services.runtime.context import RequestContext
from services.runtime.schemas import AddDocumentsBody, ChangeAnswer, RemoveDocumentsBody

Ids = npt.NDArray[np.int32]


class Datastore(DatastoreClient, DocumentsClient, Protocol):
    """A datastore service of several replicas. problem: why none of them answers, as far as is known."""

    @property
    def problem(self) -> str | None: ...
    async def activate(self, domain: str, version: str, *, wait: bool = False) -> DomainInfo: ...
    async def replicas(self, domain: str) -> Sequence[DomainReplica]: ...


class MemoryBudget:
    """Bounds the numbers that requests hold in memory together. Requests wait in the order of their arrival."""

    def __init__(self, size: int) -> None:
        self._left = size
        self._turn = asyncio.Lock()
        self._freed = asyncio.Event()

    @asynccontextmanager
    async def hold(self, size: int, seconds: float) -> AsyncIterator[None]:
        """size: at most that of the budget. Raises DeadlineExceeded when it is not free within `seconds`."""
        try:
            async with asyncio.timeout(seconds), self._turn:
                while self._left < size:
                    self._freed.clear()
                    await self._freed.wait()
                self._left -= size
        except TimeoutError as err:
            raise DeadlineExceeded("the request's time was over before memory for its distributions was free") from err
        try:
            yield
        finally:
            self._left += size
            self._freed.set()


class Aggregator:
    """One model and a set of domains, mixed. Make it with `connect`. degraded: told of each answer by the LM alone that
    was to have been mixed."""

    def __init__(
        self,
        lm: LanguageModelClient,
        datastore: Datastore,
        info: ModelInfo,
        tokenizer: Tokenizer,
        settings: AggregatorSettings,
        degraded: Callable[[], None] = lambda: None,
    ) -> None:
        self.info = info
        self.tokenizer = tokenizer
        self._datastore = datastore
        self._settings = settings
        self._degraded = degraded
        self._budget = MemoryBudget(settings.max_distribution_numbers)
        self._mixer = Mixer(
            lm,
            datastore,
            info,
            batch_tokens=settings.score_batch_tokens,
            max_window=settings.max_context_length,
            down=lambda: datastore.problem,
        )

    @classmethod
    async def connect(
        cls,
        lm: LanguageModelClient,
        datastore: Datastore,
        settings: AggregatorSettings,
        *,
        degraded: Callable[[], None] = lambda: None,
    ) -> "Aggregator":
        """Ask the lm service who it is. Raises what the client raises while that service is not ready."""
        info, json = await asyncio.gather(lm.get_model(), lm.get_tokenizer())
        tokenizer = Tokenizer(json, bos_token_id=info.bos_token_id, eos_token_id=info.eos_token_id)
        if tokenizer.sha256 != info.tokenizer_sha256:
            raise Unavailable(
                f"the lm service gave a tokenizer with sha256 {tokenizer.sha256}, announced {info.tokenizer_sha256}"
            )
        return cls(lm, datastore, info, tokenizer, settings, degraded)

    async def next_token(self, request: mixing.NextTokenRequest, call: RequestContext) -> mixing.NextTokenResponse:
        """The answer; seconds per stage go into the call. Raises KnnlmError for everything that cannot be answered."""
        model, sources = chosen(request, self.info.model_id, self._settings)
        self._check_shown(request, mixed=bool(sources))
        contexts = [self._fitting(context, request) for context in await self._contexts(request)]
        async with self._budget.hold(self._numbers(request, len(contexts)), call.remaining()):
            answer = await self._mixer.next_token(
                contexts, sources, passages=request.neighbors, passage_tokens=request.neighbor_tokens
            )
            self._note(answer.degraded, answer.timings, call)
            results = await asyncio.to_thread(next_tokens, request, contexts, answer, self.tokenizer)
        return mixing.NextTokenResponse(
            model=model, domains=used_domains(answer), degraded=answer.degraded, results=results
        )

    async def score(self, request: mixing.ScoreRequest, call: RequestContext) -> mixing.ScoreResponse:
        """The answer; seconds per stage go into the call. Raises KnnlmError for everything that cannot be answered."""
        model, sources = chosen(request, self.info.model_id, self._settings)
        length, least = request.context_length, request.min_context
        if (length, least) == (None, None) and self._settings.context_length is not None:
            length = min(self._settings.context_length, self.info.context_length)
            least = None if self._settings.min_context is None else min(self._settings.min_context, length - 1)
        tokens = await self._one_text(request)
        score = await self._mixer.score_text(tokens, sources, context_length=length, min_context=least)
        self._note(score.degraded, score.timings, call)
        return await asyncio.to_thread(score_response, score, model, self.tokenizer)

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

    def _check_shown(self, request: mixing.NextTokenRequest, *, mixed: bool) -> None:
        limits = self._settings
        for name, most in (
            ("top_n", limits.max_top_n),
            ("neighbors", limits.max_neighbors),
            ("neighbor_tokens", limits.max_neighbors),
        ):
            if getattr(request, name) > most:
                raise TooLarge(f"{name} must be at most {most}, got {getattr(request, name)}", param=name)
        if request.neighbors and not mixed:
            raise InvalidRequest("neighbors were asked for, but no domain is named in knn or model", param="neighbors")

    def _numbers(self, request: mixing.NextTokenRequest, contexts: int) -> int:
        """Numbers in the distributions that the request needs. Raises TooLarge, before any work."""
        most, numbers = self._settings.max_distribution_numbers, contexts * self.info.vocab_size
        if numbers > most:
            raise TooLarge(
                f"{contexts} contexts have distributions over {self.info.vocab_size} tokens each, {numbers} numbers; "
                f"at most {most} are made for one request: ask for fewer contexts",
                param="text" if request.tokens is None else "tokens",
            )
        if request.full and request.encoding == "list":
            ListBudget(LIST_LIMIT).spend(3 * numbers)  # p, p_lm and p_knn
        return numbers

    def _fitting(self, context: Ids, request: mixing.NextTokenRequest) -> Ids:
        """The context, or with `truncate` its BOS and as much of its end as the model takes."""
        most = min(self.info.context_length, self._settings.max_context_length)
        if len(context) <= most:
            return context
        if request.truncate is None:
            raise TooLarge(
                f'a context has {len(context)} tokens, at most {most} are taken; truncate "left" keeps its end',
                param="text" if request.tokens is None else "tokens",
            )
        return end_of_context(context, most, self.info.bos_token_id)

    async def model_ids(self) -> list[str]:
        """The LM's own id, and one id per domain that this LM can be mixed with. Without retrieval, the LM's alone."""
        try:
            infos = await self._datastore.list_domains()
        except KnnlmError:  # a list of models must not fail because retrieval is down: what cannot be used is left out
            infos = []
        usable = [d.domain for d in infos if differs(vars(d), self.info) is None]
        return [self.model_name, *(f"{self.model_name}+{d}" for d in usable)]

    async def domain(self, name: str) -> Domain:
        """One domain. Raises UnknownDomain."""
        return domain_shape(await self._datastore.get_domain(name))

    async def tokenize(self, request: TokenizeRequest) -> TokenizeResponse:
        """The ids of the text; BOS first when asked for."""
        self.check_model(request.model)
        self._check_texts([request.prompt], "prompt", empty=True)
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
        most = self._settings.max_score_tokens
        if len(request.tokens) > most:
            raise TooLarge(f"tokens may hold {most}, got {len(request.tokens)} (--max-score-tokens)", param="tokens")
        text = await asyncio.to_thread(lambda: self.tokenizer.decode(self._token_array(request.tokens)))
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
        """The domain that a model id names, None for the LM alone. Raises UnknownModel for any other id."""
        return domain_of(model, self.info.model_id)

    async def _contexts(self, request: mixing.NextTokenRequest) -> list[Ids]:
        if (request.text is None) == (request.tokens is None):
            raise InvalidRequest("give either text or tokens", param="text")
        if request.text is not None:
            texts = [request.text] if isinstance(request.text, str) else list(request.text)
            self._check_count(len(texts), "text")
            self._check_texts(texts, "text")
            return await asyncio.to_thread(self.tokenizer.encode_all, texts, parse_special=request.parse_special)
        rows = request.tokens or []
        self._check_count(len(rows), "tokens")
        return [self._token_array(row) for row in rows]

    async def _one_text(self, request: mixing.ScoreRequest) -> Ids:
        if (request.text is None) == (request.tokens is None):
            raise InvalidRequest("give either text or tokens", param="text")
        if request.tokens is not None:
            tokens = self._token_array(request.tokens)
        else:
            text = request.text or ""
            self._check_texts([text], "text")
            tokens = await asyncio.to_thread(self.tokenizer.encode, text, parse_special=request.parse_special)
        if len(tokens) > self._settings.max_score_tokens:
            raise TooLarge(
                f"the text has {len(tokens)} tokens, at most {self._settings.max_score_tokens} are scored at once",
                param="text",
            )
        return tokens

    def _check_count(self, count: int, param: str) -> None:
        if not count:
            raise InvalidRequest(f"{param} is empty: expected at least one context", param=param)
        if count > self._settings.max_texts:
            raise TooLarge(f"{param} may hold {self._settings.max_texts} contexts, got {count}", param=param)

    def _check_texts(self, texts: Sequence[str], param: str, *, empty: bool = False) -> None:
        if not (all(texts) or empty):
            raise InvalidRequest(f"{param} must not be empty", param=param)
        size = sum(len(text.encode()) for text in texts)
        if size > self._settings.max_text_bytes:
            raise TooLarge(
                f"{param} may have {self._settings.max_text_bytes} bytes, got {size} (--max-text-bytes)", param=param
            )

    def _token_array(self, tokens: Sequence[int]) -> Ids:
        largest = max(tokens, default=0)
        if largest >= self.info.vocab_size:
            raise InvalidRequest(f"token {largest} is outside the vocabulary of {self.info.vocab_size}", param="tokens")
        return np.array(tokens, np.int32)
