"""The text of a completion while it grows: characters are never torn, and it ends before a stop string. Pure."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from knnlm.tokenizer import Tokenizer

CONTEXT_TOKENS = 16  # last tokens of the prompt, which are read first: a character may begin there


class GrowingText:
    """What tokens that come one after another add to a prompt.

    stop: strings before which the text ends, wherever tokens part them. What may be the beginning of one is held back.
    read: characters of all tokens so far, held back or not. piece: those of the last token.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: npt.NDArray[np.integer], stop: Sequence[str] = ()) -> None:
        self._reader = tokenizer.reader(inside=len(prompt) > CONTEXT_TOKENS)
        for token in prompt[-CONTEXT_TOKENS:].tolist():
            self._reader.add(token)
        self._stop = [text for text in stop if text]
        self._begun = [0] * len(self._stop)  # characters of each that end the text
        self._held = ""
        self.read = 0
        self.piece = ""
        self.stopped_at: str | None = None

    def add(self, token: int) -> str:
        """The text that is certain now. With `stopped_at` set it is the last."""
        self.piece = self._reader.add(token)
        return self._released(self.piece)

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        text = self._released(self._reader.end()) + self._held
        self._held = ""
        return text

    def _released(self, piece: str) -> str:
        self.read += len(piece)
        text = self._held + piece
        found = [(at, stop) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            at, self.stopped_at = min(found)
            self._held = ""
            return text[:at]
        self._begun = [_begun(stop, size, piece) for stop, size in zip(self._stop, self._begun, strict=True)]
        held = max(self._begun, default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _begun(stop: str, size: int, piece: str) -> int:
    """Characters at the end of a text that begin the stop string. size: the same before the piece was added, which does
    not complete it (Knuth, Morris and Pratt 1977)."""
    borders = _borders(stop)
    for character in piece:
        while size and stop[size] != character:
            size = borders[size - 1]
        size += stop[size] == character
    return size


@lru_cache(maxsize=256)
def _borders(text: str) -> list[int]:
    """For each beginning of the text, characters of its longest end that is a shorter beginning."""
    borders, size = [0], 0
    for character in text[1:]:
        while size and text[size] != character:
            size = borders[size - 1]
        size += text[size] == character
        borders.append(size)
    return borders
