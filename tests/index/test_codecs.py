import pytest

from knnlm.index.codecs import codec


@pytest.mark.parametrize(
    "name", ["", "pq", "pq0", "pq<M>", "pq12x4", "pq12x8fs", "pq12345", "SQ8", "sq8 ", "fp32", "sq"]
)
def test_what_is_no_codec_is_not_known(name: str) -> None:
    assert codec(name) is None


def test_number_reaches_faiss() -> None:
    found = codec("pq48x4fs")
    assert found is not None
    assert (found.factory, found.parts) == ("PQ48x4fs", 48)


@pytest.mark.parametrize(
    ("name", "entries", "dim", "message"),
    [
        ("pq3", 1000, 8, "pq3 cuts a key into 3 equal parts, 8 dimensions cannot be"),
        ("pq4", 255, 8, "pq4 needs at least 256 entries, there are 255"),
        ("sq8", 0, 8, "sq8 needs at least 1 entries, there are 0"),
        ("pq4x4fs", 256, 8, None),
        ("sq8", 1, 8, None),
    ],
)
def test_codec_says_why_it_does_not_suit(name: str, entries: int, dim: int, message: str | None) -> None:
    found = codec(name)
    assert found is not None
    assert found.why_unsuitable(entries, dim) == message
