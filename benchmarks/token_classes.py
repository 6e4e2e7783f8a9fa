"""Tokens of a text in classes, by the words that they are parts of: names, numbers, function words, the rest."""

import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from knnlm.evaluation.splits import Encoded
from knnlm.tokenizer import Tokenizer

CLASSES = ("names", "numbers", "function words", "rest")
FUNCTION_WORDS = """
    a an the this that these those my your his her its our their some any no every each either neither both all such i
    you he she it we they me him us them mine yours hers ours theirs myself yourself himself herself itself ourselves
    themselves who whom whose which what and or but nor so yet for if unless until while because although though since
    as than whether when where why how of in on at by to from with without within into onto upon about above below over
    under between among through during before after against across along around behind beside besides beyond despite
    down up off out near toward towards via per like be am is are was were been being have has had having do does did
    doing done can could may might must shall should will would ought not never also only just too very there here then
    now again once more most much many few less least other another same own
"""
FUNCTION = frozenset(FUNCTION_WORDS.split())
WORD = re.compile(r"\w+(?:[.,:/-]\d+)*", re.ASCII)


def classes(tokenizer: Tokenizer, documents: Sequence[Encoded]) -> npt.NDArray[np.str_]:
    """(n,) the class of every token of the documents but the first of each. A word that begins with a capital is a name
    unless a sentence begins with it."""
    found: list[str] = []
    for document in documents:
        pieces = [tokenizer.token(int(t)) for t in document.tokens[1:]]
        text = "".join(pieces)
        kinds = np.full(len(text) + 1, 3)
        for word in WORD.finditer(text):
            kinds[word.start() : word.end()] = _kind(text, word)
        ends = np.cumsum([len(piece) for piece in pieces])
        for piece, end in zip(pieces, ends.tolist(), strict=True):
            letters = end - len(piece.lstrip())  # where the word begins, behind the token's space
            found.append(CLASSES[kinds[min(letters, end - 1) if piece else end]])
    return np.array(found)


def _kind(text: str, word: re.Match[str]) -> int:
    if word[0][0].isdigit():
        return 1
    if word[0].lower() in FUNCTION:
        return 2
    before = text[: word.start()].rstrip()[-1:]
    return 0 if word[0][0].isupper() and before and before not in ".!?:" else 3
