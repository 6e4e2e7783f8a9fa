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
