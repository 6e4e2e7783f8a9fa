"""The aggregator's core: a checked request to an answer in the shapes of schemas.py. Knows no HTTP.

It holds the tokenizer and identity of the model behind the lm service, both asked for at start-up, so that they cannot
differ from the model's own.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Protocol

import numpy as np
import numpy.typing as npt

from knnlm.clients.rpc import DomainReplica
from knnlm.decoding import choose_windows
from knnlm.errors import InvalidRequest, KnnlmError, TooLarge, Unavailable
from knnlm.messages import DatastoreClient, Document, DocumentsClient, DomainInfo, LanguageModelClient, ModelInfo
from knnlm.mixer import Mixer
from knnlm.tokenizer import Tokenizer
from services.aggregator import schemas
from services.aggregator.answers import (
    domain_shape,
    domain_status_shape,
    finite,
    next_tokens,
    scored_tokens,
    used_domains,
)
from services.aggregator.choices import choose, domain_of, short_name
from services.aggregator.settings import AggregatorSettings
from services.runtime.schemas import AddDocumentsBody, ChangeAnswer, RemoveDocumentsBody

Ids = npt.NDArray[np.int32]


class Datastore(DatastoreClient, DocumentsClient, Protocol):
    """A datastore service of several replicas. problem: why none of them answers, as far as is known."""

    @property
    def problem(self) -> str | None: ...
    async def activate(self, domain: str, version: str, *, wait: bool = False) -> DomainInfo: ...
    async def replicas(self, domain: str) -> Sequence[DomainReplica]: ...


class Aggregator:
    """One model and a set of domains, mixed. Make it with `connect`. degraded: told of each answer by the LM alone that
    was to have been mixed."""

    def __init__(
        self,
        lm: LanguageModelClient,
        datastore: Datastore | None,
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
        self._mixer = Mixer(
            lm,
            datastore,
            info,
            batch_tokens=settings.score_batch_tokens,
            down=lambda: None if datastore is None else datastore.problem,
        )

    @classmethod
    async def connect(
        cls,
        lm: LanguageModelClient,
        datastore: Datastore | None,
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

    async def next_token(self, request: schemas.NextTokenRequest) -> tuple[schemas.NextTokenResponse, dict[str, float]]:
        """The answer, and seconds per stage. Raises KnnlmError for everything that cannot be answered."""
        model, knn = choose(request, self.info.model_id, self._settings)
        limits = self._settings
        if request.top_n > limits.max_top_n:
            raise TooLarge(f"top_n must be at most {limits.max_top_n}, got {request.top_n}", param="top_n")
        for name in ("neighbors", "neighbor_tokens"):
            if getattr(request, name) > limits.max_neighbors:
                raise TooLarge(
                    f"{name} must be at most {limits.max_neighbors}, got {getattr(request, name)}", param=name
                )
        if request.neighbors and knn is None:
            raise InvalidRequest("neighbors were asked for, but no domain is named in knn or model", param="neighbors")
        contexts = await self._contexts(request)
        answer = await self._mixer.next_token(
            contexts, knn, passages=request.neighbors, passage_tokens=request.neighbor_tokens
        )
        self._note(answer.degraded)
        results = await asyncio.to_thread(next_tokens, request, contexts, answer, self.tokenizer)
        response = schemas.NextTokenResponse(
            model=model, domains=used_domains(answer), degraded=answer.degraded, results=results
        )
        return response, dict(answer.timings)

    async def score(self, request: schemas.ScoreRequest) -> tuple[schemas.ScoreResponse, dict[str, float]]:
        """The answer, and seconds per stage. Raises KnnlmError for everything that cannot be answered."""
        model, knn = choose(request, self.info.model_id, self._settings)
        tokens = await self._one_text(request)
        _, least = choose_windows(self.info, min_context=request.min_context)
        score = await self._mixer.score(tokens, knn, min_context=least)
        self._note(score.degraded)
        rows = await asyncio.to_thread(scored_tokens, score, self.tokenizer)
        lm_total = float(score.lm_log_probs.sum(dtype=np.float64))
        return schemas.ScoreResponse(
            model=model,
            domains=used_domains(score),
            degraded=score.degraded,
            first_token_id=int(tokens[0]),
            tokens=rows,
            total_log_p=finite(score.total),
            total_log_p_lm=lm_total,
            perplexity=finite(score.perplexity),
            perplexity_lm=float(np.exp(-lm_total / len(rows))),
            min_context=least,
        ), dict(score.timings)

    async def domains(self) -> list[schemas.Domain]:
        """Every domain of the datastore service, in its order."""
        if self._datastore is None:
            return []
        return [domain_shape(d) for d in await self._datastore.list_domains()]

    async def activate(self, domain: str, version: str, *, wait: bool) -> schemas.Domain:
        """Switch a domain to another version; the replicas that were not asked follow by watching the store.

        wait: until all that serve the domain have done so. Raises DeadlineExceeded with the names of those that have
        not, and what they say.
        """
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so no domain can be switched")
        return domain_shape(await self._datastore.activate(domain, version, wait=wait))

    async def add_documents(self, domain: str, request: AddDocumentsBody) -> ChangeAnswer:
        """Add documents to a domain: one replica of the datastore service encodes them and serves them when this
        returns, the others follow. Raises what that service raises."""
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so there is no domain to add documents to")
        documents = [Document(given.id, given.text) for given in request.documents]
        change = await self._datastore.add_documents(domain, documents, replace=request.replace)
        return ChangeAnswer(**asdict(change))

    async def remove_documents(self, domain: str, request: RemoveDocumentsBody) -> ChangeAnswer:
        """Remove documents from a domain by their ids; see add_documents."""
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so there is no domain to remove documents from")
        return ChangeAnswer(**asdict(await self._datastore.remove_documents(domain, request.ids)))

    async def domain_status(self, name: str) -> schemas.DomainStatus:
        """One domain, and what each replica of the datastore service says of it. Raises UnknownDomain, Unavailable."""
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so there is no domain")
        info, replicas = await asyncio.gather(self._datastore.get_domain(name), self._datastore.replicas(name))
        return domain_status_shape(info, replicas)

    def _note(self, degraded: str | None) -> None:
        if degraded is not None:
            self._degraded()

    async def model_ids(self) -> list[str]:
        """The LM's own id, and one id per domain that was made with this LM. Without retrieval, the LM's alone."""
        try:
            infos = await self._datastore.list_domains() if self._datastore else []
        except KnnlmError:  # a list of models must not fail because retrieval is down: what cannot be used is left out
            infos = []
        usable = [d.domain for d in infos if d.weights_sha256 == self.info.weights_sha256]
        return [self.model_name, *(f"{self.model_name}+{d}" for d in usable)]

    async def domain(self, name: str) -> schemas.Domain:
        """One domain. Raises UnknownDomain."""
        if self._datastore is None:
            raise Unavailable("no datastore service is configured, so there is no domain")
        return domain_shape(await self._datastore.get_domain(name))

    async def tokenize(self, request: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
        """The ids of the text; BOS first when asked for."""
        self.check_model(request.model)
        self._check_texts([request.prompt], "prompt", empty=True)
        return await asyncio.to_thread(self._tokenized, request)

    def _tokenized(self, request: schemas.TokenizeRequest) -> schemas.TokenizeResponse:
        tokens = self.tokenizer.encode(request.prompt, parse_special=request.parse_special)
        if not request.add_special_tokens and self.info.bos_token_id is not None:
            tokens = tokens[1:]
        return schemas.TokenizeResponse.model_construct(  # unchecked: it may be long
            count=len(tokens),
            max_model_len=self.info.context_length,
            tokens=tokens.tolist(),
            token_strs=self.tokenizer.pieces(tokens) if request.return_token_strs else None,
        )

    async def detokenize(self, request: schemas.DetokenizeRequest) -> schemas.DetokenizeResponse:
        """The text of the tokens."""
        self.check_model(request.model)
        if len(request.tokens) > self._settings.max_text_bytes:
            raise TooLarge(
                f"tokens may hold {self._settings.max_text_bytes}, got {len(request.tokens)} (--max-text-bytes)",
                param="tokens",
            )
        text = await asyncio.to_thread(lambda: self.tokenizer.decode(self._token_array(request.tokens)))
        return schemas.DetokenizeResponse(prompt=text)

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

    async def _contexts(self, request: schemas.NextTokenRequest) -> list[Ids]:
        if (request.text is None) == (request.tokens is None):
            raise InvalidRequest("give either text or tokens", param="text")
        if request.text is not None:
            texts = [request.text] if isinstance(request.text, str) else list(request.text)
            self._check_count(len(texts), "text")
            self._check_texts(texts, "text")
            return await asyncio.to_thread(self.tokenizer.encode_all, texts, parse_special=request.parse_special)
        rows: Sequence[object] = request.tokens or []
        many = [rows] if rows and isinstance(rows[0], int) else rows
        self._check_count(len(many), "tokens")
        return [self._token_array(row) for row in many]  # type: ignore[arg-type]  # the schema knows the two shapes

    async def _one_text(self, request: schemas.ScoreRequest) -> Ids:
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
