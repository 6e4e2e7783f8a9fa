import time

import pytest

from knnlm.stops import GrowingText
from knnlm.testing import byte_tokenizer

TOKENIZER = byte_tokenizer()


def grown(text: str, stop: tuple[str, ...], prompt: str = "x") -> tuple[list[str], GrowingText]:
    """Every token of the text, one byte each, up to the one at which it stops."""
    growing = GrowingText(TOKENIZER, TOKENIZER.encode(prompt), stop)
    parts = []
    for token in TOKENIZER.encode(text)[1:].tolist():
        parts.append(growing.add(token))
        if growing.stopped_at is not None:
            return parts, growing
    parts.append(growing.end())
    return parts, growing


@pytest.mark.parametrize(
    ("text", "stop", "expected", "stopped_at"),
    [
        ("one two three", (), "one two three", None),
        ("one two three", ("two",), "one ", "two"),
        ("one two three", ("three", "two"), "one ", "two"),
        ("aaab", ("aab",), "a", "aab"),  # what looked like its beginning was not
        ("ababac", ("abac",), "ab", "abac"),
        ("one tw", ("two",), "one tw", None),  # never completed: what was held back is text
        ("naïve café", ("é",), "naïve caf", "é"),
        ("ab", ("ab", "a"), "", "a"),
        ("\n\nx", ("\n\n",), "", "\n\n"),
    ],
)
def test_the_text_ends_before_a_stop_string(text: str, stop: tuple[str, ...], expected: str, stopped_at: str) -> None:
    parts, growing = grown(text, stop)
    assert "".join(parts) == expected
    assert growing.stopped_at == stopped_at


def test_what_may_begin_a_stop_string_is_held_back_and_nothing_else() -> None:
    parts, _ = grown("a sto a stop", ("stop",))
    assert parts == ["a", " ", "", "", "", "sto ", "a", " ", "", "", "", ""]


def test_a_character_is_never_torn() -> None:
    parts, growing = grown("é", ())
    assert parts == ["", "é", ""]
    assert growing.read == 1


def test_a_character_that_the_prompt_began_is_completed() -> None:
    first, second = TOKENIZER.encode("é")[1:].tolist()
    growing = GrowingText(TOKENIZER, TOKENIZER.encode("caf")[:4], ())
    growing.add(first)
    assert growing.add(second) == "é"
    half = TOKENIZER.encode("café")[:-1]
    assert GrowingText(TOKENIZER, half).add(second) == "é"


def test_a_character_that_never_ends_shows_as_one() -> None:
    growing = GrowingText(TOKENIZER, TOKENIZER.encode("x"))
    assert growing.add(TOKENIZER.encode("é")[1]) == ""
    assert growing.end() == "�"


def test_what_may_begin_one_of_many_long_stop_strings_is_held_back_in_little_time() -> None:
    long = ["a" * i + "c" + "a" * (1000 - i) for i in range(1, 64)]
    for stop, released in ((["a" * 1023 + "b", *long], ""), (["aab" + "x" * 1000, *long[:0:-1]], "a" * 37)):
        growing = GrowingText(TOKENIZER, TOKENIZER.encode("x"), stop)
        texts = [growing.add(token) for token in TOKENIZER.encode("a" * 100)[1:].tolist()]
        assert "".join(texts) == released
        assert "".join(texts) + growing.end() == "a" * 100
    growing = GrowingText(TOKENIZER, TOKENIZER.encode("x"), ["a" * 1023 + "b", *long])
    tokens = TOKENIZER.encode("a" * 1022)[1:].tolist()
    for token in tokens:
        growing.add(token)
    started = time.thread_time()
    growing.add(tokens[0])
    assert time.thread_time() - started < 0.003  # 13 ms where each length of each string is compared
