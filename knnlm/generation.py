"""The tokens of one completion, one after another. Written once: the aggregator's completions, the command and the
library's Pipeline.generate run it."""

from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from knnlm.ahead import Draft, StepsAhead
from knnlm.attribution import Carrier
from knnlm.errors import InvalidRequest, Unavailable, UnknownVersion
from knnlm.messages import PASSAGE_TOKENS
from knnlm.mixer import Mixer, Options
from knnlm.rounds import Rounds
from knnlm.rows import Row, StepRequest
from knnlm.sampling import Known, SamplingOptions, choose, uniform
from knnlm.sources import Plan, UsedDomain, UsedMemory
from knnlm.stops import GrowingText
from knnlm.tokenizer import Tokenizer

Ids = npt.NDArray[np.int32]

FINISHED_STOP, FINISHED_LENGTH = "stop", "length"
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024


@dataclass(frozen=True)
class GenerationOptions:
    """How a completion is made, and when it ends.

    max_tokens: at most, and no more than the model's context has room for. stop: strings before which the text ends.
    stop_token_ids: tokens at which it ends, beside the tokenizer's EOS unless `ignore_eos`; their text is left out.
    top: likeliest tokens to list beside each new one. carriers: entries to list of those that gave it most, with
    `passage_tokens` tokens of text on each side. Raises InvalidRequest, naming the field, for values out of range.
    """

    max_tokens: int = 16
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top: int = 0
    carriers: int = 0
    passage_tokens: int = PASSAGE_TOKENS

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top", "carriers", "passage_tokens"):
            if (value := getattr(self, name)) < 0:
                raise InvalidRequest(f"{name} must be >= 0, got {value}", param=name)
        if len(self.stop) > MAX_STOPS or len(self.stop_token_ids) > MAX_STOPS:
            param = "stop" if len(self.stop) > MAX_STOPS else "stop_token_ids"
            raise InvalidRequest(f"{param} may hold {MAX_STOPS}, got {len(getattr(self, param))}", param=param)
        for text in self.stop:
            if not 1 <= len(text) <= MAX_STOP_CHARACTERS:
                raise InvalidRequest(
                    f"a stop string must have 1 to {MAX_STOP_CHARACTERS} characters, got {len(text)}", param="stop"
                )


@dataclass(frozen=True)
class NewToken:
    """One token of a completion.

    row: the mixture that it was chosen from. log_prob, lm_log_prob: its own there, before bias, penalties and
    temperature. top: the likeliest tokens there. text: what is certain of the completion's text now and was not before;
    the beginning of a possible stop string is held back. offset: where the token's own text begins in the completion's,
    in characters. piece: that text, "" while a character is not complete; of EOS and other special tokens, which
    no text has, their name. finish: None, or why this is the last: "stop" or "length". stopped_at: the
    stop string or token. carried: for each of row.components, the entries that gave the token most, if asked for.
    missing: why some of them are missing.
    """

    token: int
    row: Row
    log_prob: float
    lm_log_prob: float
    top: Sequence[tuple[int, float]]
    text: str
    offset: int
    piece: str
    finish: str | None = None
    stopped_at: str | int | None = None
    carried: Sequence[Sequence[Carrier]] = ()
    missing: str | None = None

    @property
    def degraded(self) -> str | None:
        """Why the LM alone answered, or passages are missing; None where it is as asked."""
        return self.row.plan.degraded or self.missing


@dataclass(frozen=True)
class Completion:
    """A completion that has ended. text: without the prompt. tokens: with the EOS or stop token, if one ended it.
    log_probs: of each in the mixture, lm_log_probs: in the LM alone. finish, stopped_at: as in NewToken."""

    text: str
    tokens: Sequence[int]
    log_probs: Sequence[float]
    lm_log_probs: Sequence[float]
    finish: str
    stopped_at: str | int | None
    domains: Sequence[UsedDomain]
    degraded: str | None
    memories: Sequence[UsedMemory] = ()


def version_gone(err: UnknownVersion) -> Unavailable:
    """What a completion raises whose version no replica has any more: another one would make another text."""
    return Unavailable(f"the completion cannot go on: {err.message}")


class Generator:
    """Completions of one model. Those of one event loop that run at the same time advance in shared rounds."""

    def __init__(self, mixer: Mixer, tokenizer: Tokenizer, rounds: Rounds | None = None) -> None:
        self._mixer = mixer
        self._tokenizer = tokenizer
        self.rounds = rounds or Rounds(mixer)
        self._under_way = 0  # completions

    def room(self, prompt: Ids, max_tokens: int, plan: Plan | None = None) -> int:
        """Tokens that will be generated at most. Raises InvalidRequest for a prompt without tokens, and for one that
        leaves no room in the context of the model or of a plan's sources."""
        length = self._mixer.context_length(plan)
        if not len(prompt):
            raise InvalidRequest("the prompt is empty: expected at least one token", param="prompt")
        if len(prompt) > length or (len(prompt) == length and max_tokens > 0):
            who = "the model takes" if length == self._mixer.info.context_length else "the memory that is mixed takes"
            raise InvalidRequest(
                f"the prompt has {len(prompt)} tokens, {who} {length} together with what is generated "
                f"(lm-eval: max_length={length})",
                param="prompt",
            )
        return min(max_tokens, length - len(prompt))

    def check_tokens(self, options: GenerationOptions) -> None:
        """Raises InvalidRequest for tokens that the model does not have."""
        size = self._mixer.info.vocab_size
        for param, tokens in (("logit_bias", options.sampling.logit_bias), ("stop_token_ids", options.stop_token_ids)):
            for token in tokens:
                if not 0 <= token < size:
                    raise InvalidRequest(f"{param} names token {token}, the vocabulary has {size}", param=param)

    async def generate(
        self, prompt: Ids, options: GenerationOptions, sources: Options | Plan = None, *, seed: int = 0, choice: int = 0
    ) -> AsyncGenerator[NewToken, None]:
        """The new tokens, each as soon as it is known. Close it where it is left before its end.

        prompt: (t,) int32 with its BOS. sources: a plan, or options as for Mixer.plan, which is made before the first
        token; it holds for all. seed, choice: all that the draws depend on. Raises as Mixer.plan and Rounds.step;
        Unavailable when a version that answered before is no longer there.
        """
        self.check_tokens(options)
        if not self.room(prompt, options.max_tokens):
            return

        async def begun(plan: Plan) -> tuple[_Sequence, Row]:
            room = self.room(prompt, options.max_tokens, plan)
            sequence = _Sequence(self._tokenizer, prompt, room, options)
            return sequence, await self.rounds.step(sequence.request(plan))

        planned = begun(sources) if isinstance(sources, Plan) else self._mixer.planned(sources, begun)
        sequence, row = await planned
        ahead = StepsAhead(self.rounds, sequence.drafting(row.plan, seed, choice), row.plan.ahead)
        self._under_way += 1
        try:
            while True:
                new = await self._new(sequence, row, uniform(seed, choice, sequence.generated))
                yield new
                if new.finish is not None:
                    return
                request = sequence.request(row.plan)
                if row.plan.ahead and self._under_way == 1:
                    row = await ahead.row(request)
                else:  # a shared round is cheaper than one for each of several
                    await ahead.close()
                    row = await self.rounds.step(request)
        except UnknownVersion as err:
            raise version_gone(err) from err
        finally:
            self._under_way -= 1
            await ahead.close()

    async def complete(
        self,
        prompt: Ids,
        options: GenerationOptions,
        sources: Options = None,
        *,
        seed: int = 0,
        on_token: Callable[[NewToken], None] | None = None,
    ) -> Completion:
        """The whole completion that `generate` makes. prompt: (t,) int32 with its BOS. on_token: told of each token as
        soon as it is known. Raises as `generate`."""
        plan = await self._mixer.plan(sources)
        texts: list[str] = []
        tokens: list[int] = []
        log_probs: list[tuple[float, float]] = []
        finish, stopped_at, degraded = FINISHED_LENGTH, None, plan.degraded
        async with aclosing(self.generate(prompt, options, plan, seed=seed)) as made:
            async for new in made:
                texts.append(new.text)
                tokens.append(new.token)
                log_probs.append((new.log_prob, new.lm_log_prob))
                finish, stopped_at, degraded = new.finish or finish, new.stopped_at, degraded or new.degraded
                if on_token is not None:
                    on_token(new)
        mixed, lm = [p for p, _ in log_probs], [p for _, p in log_probs]
        return Completion("".join(texts), tokens, mixed, lm, finish, stopped_at, plan.domains, degraded, plan.memories)

    async def _new(self, sequence: "_Sequence", row: Row, draw: float) -> NewToken:
        """The next token, chosen and added to the sequence."""
        options = sequence.options
        token, top = choose(row.known, options.sampling, sequence.counts, draw), row.top(options.top)
        if token is None or top is None:
            row = await self.rounds.completed(row, sequence.request(row.plan))
            token, top = choose(row.known, options.sampling, sequence.counts, draw), row.top(options.top)
        if token is None or top is None:
            raise RuntimeError("a complete row leaves nothing open")
        carried: Sequence[Sequence[Carrier]] = ()
        missing = None
        if options.carriers:
            carried, missing = await row.carried(token, options.carriers, options.passage_tokens)
        offset = sequence.text.read
        text, finish, stopped_at = sequence.add(token)
        log_prob, lm_log_prob = row.log_probs_of(token)
        return NewToken(
            token, row, log_prob, lm_log_prob, top, text, offset, sequence.piece, finish, stopped_at, carried, missing
        )


class _Sequence:
    """A prompt and what was generated after it. piece: as in NewToken, of the last token."""

    def __init__(self, tokenizer: Tokenizer, prompt: Ids, room: int, options: GenerationOptions) -> None:
        self.options = options
        self.text = GrowingText(tokenizer, prompt, options.stop)
        self.counts: Counter[int] = Counter()
        self.generated = 0
        self.piece = ""
        self._tokenizer = tokenizer
        self._ends = {*options.stop_token_ids, *(() if options.ignore_eos else (tokenizer.eos_token_id,))}
        self._silent = tokenizer.special_ids
        self._tokens = np.empty(len(prompt) + room, np.int32)
        self._tokens[: len(prompt)] = prompt
        self._length = len(prompt)
        self._state: dict[str, Any] = {}  # Any: each source's own

    def request(self, plan: Plan) -> StepRequest:
        sampling = self.options.sampling
        known = [*sampling.logit_bias, *(self.counts if sampling.penalises else ())]
        context = self._tokens[: self._length]
        carriers = self.options.carriers > 0
        return StepRequest(plan, context, sampling.temperature, known, cache=True, carriers=carriers, state=self._state)

    def drafting(self, plan: Plan, seed: int, choice: int) -> Draft:
        """What StepsAhead asks for drafts. A token that would end the sequence is not drafted."""

        def draft(drafted: Sequence[int], known: Known) -> StepRequest | None:
            length = self._length + len(drafted)
            if length + 1 >= len(self._tokens):
                return None
            if self.options.sampling.penalises or self.options.sampling.logit_bias:
                return None  # the tokens they are about may not be known
            token = choose(known, self.options.sampling, {}, uniform(seed, choice, self.generated + len(drafted)))
            if token is None or token in self._ends:
                return None
            context = np.append(self._tokens[: self._length], np.array([*drafted, token], np.int32))
            return replace(self.request(plan), context=context)

        return draft

    def add(self, token: int) -> tuple[str, str | None, str | int | None]:
        """The text that is certain now, why the completion ends, and the stop string or token at which it does."""
        self._tokens[self._length] = token
        self._length += 1
        self.generated += 1
        self.counts[token] += 1
        ended, stopped_at = token in self._ends, token if token in self.options.stop_token_ids else None
        if ended or token in self._silent:
            text, self.piece = "", self._tokenizer.token(token)
        else:
            text, self.piece = self.text.add(token), self.text.piece
        if self.text.stopped_at is not None:
            return text, FINISHED_STOP, self.text.stopped_at
        if ended or self._length == len(self._tokens):
            return text + self.text.end(), FINISHED_STOP if ended else FINISHED_LENGTH, stopped_at
        return text, None, None
