"""Text to token ids and back, one way everywhere: in process, in the lm service and in the aggregator.

A document is encoded whole, without the tokenizer's own special-token template, and the BOS token is put before it once
when the model has one. Tokenizing line by line, or letting the template decide, puts BOS tokens into datastores.

Other threads run meanwhile: the tokenizers library lets go of the interpreter's lock while it encodes a batch, and what
is done under the lock is done in portions.
"""

import codecs
import hashlib
import json
import re
from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import tokenizers

from knnlm.errors import ModelError

PORTION_CHARACTERS = 1 << 16  # characters encoded at a time, where a text can be cut
PORTIONS_TOGETHER = 32
PORTION_TOKENS = 1 << 14
CUT_CONTEXT = 256  # characters on either side of a cut by which it is judged
CUT_TRIES = 32
CUT = re.compile(r"(?<=\S)(?=[ \n]\S)")  # before a single space or line end, between words
STEPS = {
    "decoder": "decoders",
    "pre_tokenizer": "pretokenizers",
    "normalizer": "normalizers",
}  # where a sequence lists them
BYTE_TOKEN = re.compile(r"<0x([0-9A-F]{2})>")

Ids = npt.NDArray[np.int32]


class Tokenizer:
    """`json` is the serialisation of the tokenizers library. Raises ModelError when it is none.

    chat_template: the Jinja template that makes a prompt of messages (knnlm.chat), None where the model has none.
    """

    def __init__(
        self, json: str, *, bos_token_id: int | None, eos_token_id: int | None, chat_template: str | None = None
    ) -> None:
        self._backend = _backend(json)
        self._backend.encode_special_tokens = True  # as any other text
        self._parsing: tokenizers.Tokenizer | None = None  # one to which special tokens in a text are special
        self.json = json
        self.bos_token_id = bos_token_id
        self.eos_token_id = eos_token_id
        self.chat_template = chat_template
        self._shape = _Shape(self._backend)
        self._added = {i: token.content for i, token in self._backend.get_added_tokens_decoder().items()}
        self._special = frozenset(i for i, t in self._backend.get_added_tokens_decoder().items() if t.special)
        # the added tokens behind which a text begins anew, for the tokenizer
        self._restarts = {
            i
            for i, token in self._backend.get_added_tokens_decoder().items()
            if self._shape.prefixes_parts or (self._shape.prefixes_normalized and not token.normalized)
        }
        self._bytes: dict[int, bytes] = {}  # bytes of each token met so far
        self._texts: dict[int, str | None] = {}  # the same where they are whole characters, else None
        self._anchor = next((i for c in "aeo01" if (i := self._backend.token_to_id(c)) is not None), None)

    @property
    def special_ids(self) -> frozenset[int]:
        """Added tokens that are no part of a text, such as EOS."""
        return self._special

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer's own template begins a text with the BOS token. `encode` does not ask it."""
        first = self._backend.encode("", add_special_tokens=True).ids[:1]
        return self.bos_token_id is not None and first == [self.bos_token_id]

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.json.encode()).hexdigest()

    def encode(self, text: str, *, parse_special: bool = False) -> Ids:
        """(t,) int32: BOS first when there is one, then the text.

        parse_special: special tokens that are written in the text, such as `</s>`, count as such; else they are text.
        """
        return self.encode_all([text], parse_special=parse_special)[0]

    def encode_all(self, texts: Sequence[str], *, parse_special: bool = False) -> list[Ids]:
        """Each text as `encode` gives it; several at the same time on a machine with several cores."""
        backend = self._parser() if parse_special else self._backend
        cut = [self._portions(backend, text) for text in texts]
        start = [] if self.bos_token_id is None else [np.array([self.bos_token_id], np.int32)]
        parts = iter(_encoded(backend, [portion for portions in cut for portion in portions]))
        return [np.concatenate([np.empty(0, np.int32), *start, *islice(parts, len(portions))]) for portions in cut]

    def continued(self, prompt: str, completion: str, *, parse_special: bool = False) -> tuple[Ids, int]:
        """The tokens of both texts together, as `encode` gives them, and the place of the first that holds any of the
        completion: 1 at least, for what stands first has no probability."""
        whole, before = self.encode_all([prompt + completion, prompt], parse_special=parse_special)
        border = len(self.decode(before))
        ends = np.cumsum([len(piece) for piece in self.pieces(whole)])  # (t,) of the tokens, in characters
        last = int(np.searchsorted(ends, border))  # the first token that reaches the border
        over = len(self.decode(whole[: last + 1])) > border  # if only by the first bytes of a character
        return whole, max(1, last if over else last + 1)

    def decode(self, ids: npt.NDArray[np.integer] | list[int]) -> str:
        """The text of several tokens, special tokens included; ids the tokenizer does not know give nothing."""
        return "".join(self.pieces(ids))

    def pieces(self, ids: npt.NDArray[np.integer] | Sequence[int], *, inside: bool = False) -> list[str]:
        """What each token adds to the text; joined they are the text.

        A character that is split over several tokens stands at the one that completes it, the others are empty; bytes
        that never become a character show as U+FFFD. inside: the tokens stand inside a text. Else the first of them,
        after special tokens, begins one: without the space that the tokenizer puts before every text, if it does. Some
        put one behind every special token too. A tokenizer that puts none before a text that begins with one
        (Metaspace, `add_prefix_space`) gives both texts the same tokens: shown is the one without.
        """
        reader = self.reader(inside=inside)
        found = [
            reader.add(token)
            for start in range(0, len(ids), PORTION_TOKENS)
            for token in np.asarray(ids[start : start + PORTION_TOKENS]).tolist()
        ]
        rest = reader.end()
        if rest:
            found[-1] += rest
        return found

    def reader(self, *, inside: bool = False) -> "Reader":
        """What turns tokens that come one after another into `pieces`."""
        return Reader(self, inside)

    def passage(self, before: Ids, after: Ids, *, position: int) -> tuple[str, str]:
        """The texts of tokens that follow one another; together they are the whole's. position: of the first token of
        `after` in its document."""
        pieces = self.pieces(np.concatenate([before, after]), inside=position > len(before))
        return "".join(pieces[: len(before)]), "".join(pieces[len(before) :])

    def token(self, token_id: int) -> str:
        """The text of one token inside a text: with its leading space. Bytes that are no character alone are U+FFFD."""
        text = self._texts.get(token_id)
        return self.pieces([token_id], inside=True)[0] if text is None else text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token inside a text stands for, which need not be whole characters."""
        return self._learned(token_id)

    def __len__(self) -> int:
        size: int = self._backend.get_vocab_size(with_added_tokens=True)
        return size

    def _parser(self) -> tokenizers.Tokenizer:
        if self._parsing is None:
            self._parsing = _backend(self.json)
        return self._parsing

    def _learned(self, token_id: int) -> bytes:
        raw = self._bytes.get(token_id)
        if raw is None:
            raw = self._bytes[token_id] = self._bytes_of(token_id)
            try:
                self._texts[token_id] = raw.decode()
            except UnicodeDecodeError:
                self._texts[token_id] = None
        return raw

    def _bytes_of(self, token_id: int) -> bytes:
        """What a token inside a text stands for, which need not be whole characters."""
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._shape.byte_level:
            known = [BYTES.get(character) for character in token]
            return token.encode() if None in known else bytes(known)  # type: ignore[arg-type]  # just seen
        if self._shape.byte_fallback and (byte := BYTE_TOKEN.fullmatch(token)):
            return bytes.fromhex(byte[1])
        # behind another token: a decoder may take the first space of a text away
        anchor = [] if self._anchor is None else [self._anchor]
        whole = self._backend.decode([*anchor, token_id], skip_special_tokens=False)
        return whole[len(self._backend.decode(anchor, skip_special_tokens=False)) :].encode()

    def _portions(self, backend: tokenizers.Tokenizer, text: str) -> list[str]:
        """Parts of a long text that have, encoded one by one, the tokens of the whole; the text itself if in doubt."""
        portions: list[str] = []
        start = 0
        while self._shape.splits and len(text) - start > 2 * PORTION_CHARACTERS:
            at = self._cut(backend.pre_tokenizer, text, start + PORTION_CHARACTERS)
            if at is None:
                break
            portions.append(text[start:at])
            start = at
        return [*portions, text[start:]]

    def _cut(self, pre: Any, text: str, least: int) -> int | None:  # Any: any of the library's pre-tokenizers
        """A place at or soon after `least` where the pre-tokenizer parts the text in any case.

        No token reaches over such a place. Whether it is one is seen on the characters around it: pre-tokenizers that
        look further do not count (see _Shape).
        """
        candidates = CUT.finditer(text, least, least + PORTION_CHARACTERS)
        for at in islice((match.start() for match in candidates), CUT_TRIES):
            left, right = text[max(0, at - CUT_CONTEXT) : at], text[at : at + CUT_CONTEXT]
            apart = [piece for side in (left, right) for piece, _ in pre.pre_tokenize_str(side)]
            if apart == [piece for piece, _ in pre.pre_tokenize_str(left + right)]:
                return at
        return None


class Reader:
    """The pieces of one text whose tokens come one after another; see Tokenizer.pieces."""

    def __init__(self, tokenizer: Tokenizer, inside: bool) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._begins, self._split = not inside, False

    def add(self, token: int) -> str:
        """What the next token adds; "" while a character is not complete."""
        known = self._tokenizer
        text = known._texts.get(token)
        if text is not None and not (self._begins or self._split):
            self._begins = token in known._restarts
            return text
        raw = known._learned(token)
        if self._begins and token not in known._added:
            self._begins = False
            if known._shape.byte_level:
                raw = raw.removeprefix(b" ") if known._shape.prefixes_parts else raw
            elif raw.startswith(b" "):
                raw = known._backend.decode([token], skip_special_tokens=False).encode()
        self._begins = self._begins or token in known._restarts
        piece = self._decoder.decode(raw)
        self._split = bool(self._decoder.getstate()[0])
        return piece

    def end(self) -> str:
        """What a character that never became complete shows as."""
        return self._decoder.decode(b"", final=True)


class _Shape:
    """What the kind of a tokenizer says of its tokens.

    byte_level: tokens are written in the alphabet of bytes. byte_fallback: tokens like <0xE2> are bytes. splits: the
    text is parted by a regular expression, and tokens do not reach over its parts. prefixes_parts: a space is put
    before a text and behind every added token. prefixes_normalized: the same, but only behind those not normalized.
    """

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        decoders, pre, normalizers = (_steps(getattr(backend, name), name) for name in STEPS)
        self.byte_level = any(step["type"] == "ByteLevel" for step in decoders)
        self.byte_fallback = any(step["type"] == "ByteFallback" for step in decoders)
        parted = any(step["type"] == "Split" or step.get("use_regex") for step in pre)
        local = all(step["type"] in ("Split", "ByteLevel", "Digits") for step in pre)
        prefixed = any(step.get("add_prefix_space") for step in pre)
        stable = all(step["type"] == "NFC" for step in normalizers)
        self.prefixes_normalized = any(step["type"] == "Prepend" for step in normalizers)
        self.prefixes_parts = any(_prefixes(step) for step in pre)
        # an added token is looked for before all else: over a cut, or with the space beside it
        added = backend.get_added_tokens_decoder().values()
        apart = not any(t.lstrip or t.rstrip or t.content != t.content.strip() or CUT.search(t.content) for t in added)
        self.splits = parted and local and not prefixed and stable and apart


def _steps(component: Any, name: str) -> list[dict[str, Any]]:  # Any: one of the library's many classes, or None
    """What a component of a tokenizer does one after the other, each as its JSON."""
    return [] if component is None else _flat(json.loads(component.__getstate__()), STEPS[name])


def _flat(part: dict[str, Any], inner: str) -> list[dict[str, Any]]:  # Any: JSON
    return [step for p in part[inner] for step in _flat(p, inner)] if part["type"] == "Sequence" else [part]


def _prefixes(step: dict[str, Any]) -> bool:  # Any: JSON
    """Whether a step of a pre-tokenizer puts a space before every part that it is given."""
    if "prepend_scheme" in step:
        return bool(step["prepend_scheme"] == "always")
    return bool(step.get("add_prefix_space"))


def _backend(json: str) -> tokenizers.Tokenizer:
    try:
        backend = tokenizers.Tokenizer.from_str(json)
    except Exception as err:  # the library raises bare Exception for every malformed file
        raise ModelError(f"not a tokenizer of the tokenizers library: {err}") from err
    backend.no_truncation()
    backend.no_padding()
    return backend


def _encoded(backend: tokenizers.Tokenizer, portions: list[str]) -> list[Ids]:
    """(t,) int32 of each. Encodings are large: they are let go of one at a time."""
    found: list[Ids] = []
    for start in range(0, len(portions), PORTIONS_TOGETHER):
        encodings = backend.encode_batch_fast(portions[start : start + PORTIONS_TOGETHER], add_special_tokens=False)
        encodings.reverse()
        while encodings:
            ids = encodings.pop().ids
            blocks = [np.array(ids[at : at + PORTION_TOKENS], np.int32) for at in range(0, len(ids), PORTION_TOKENS)]
            found.append(np.concatenate([np.empty(0, np.int32), *blocks]))
    return found


def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in byte-level tokenizers, as GPT-2 chose them."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = _byte_alphabet()
