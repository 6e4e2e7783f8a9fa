"""Whole documents, always in the same part."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from knnlm.errors import InvalidRequest
from knnlm.evaluation.splits import Part, encode, part_of, sample, select, unseen
from knnlm.messages import Document
from knnlm.testing import TEXTS, byte_tokenizer, toy_datastore
from knnlm.tokenizer import Tokenizer

DOCUMENTS = [Document(f"d{i}", "word " * (1 + i % 17)) for i in range(300)]


def test_parts_never_change() -> None:
    # pinned: another assignment would move documents from fitting to reporting in every project that relies on it
    others = {i: part_of(f"d{i}") for i in range(30) if part_of(f"d{i}") is not Part.STORE}
    tune, report = Part.TUNE, Part.REPORT
    assert others == {5: tune, 12: report, 13: tune, 16: report, 22: tune, 24: report, 28: report}


def test_parts_have_their_shares_and_make_up_the_whole() -> None:
    count = Counter(part_of(f"document {i}") for i in range(10_000))
    # five standard deviations of a binomial with 10,000 draws are 200 for .8 and 150 for .1
    assert abs(count[Part.STORE] - 8000) < 200
    assert abs(count[Part.TUNE] - 1000) < 150
    assert abs(count[Part.REPORT] - 1000) < 150


def test_parts_are_disjoint_and_keep_the_order() -> None:
    parts = {part: list(select(DOCUMENTS, part)) for part in (Part.STORE, Part.TUNE, Part.REPORT)}
    assert sorted(d.id for part in parts.values() for d in part) == sorted(d.id for d in DOCUMENTS)
    assert all(part == [d for d in DOCUMENTS if d in part] for part in parts.values())
    assert list(select(DOCUMENTS, Part.ALL)) == DOCUMENTS


def test_encoding_leaves_out_what_has_nothing_to_predict() -> None:
    without_bos = Tokenizer(byte_tokenizer().json, bos_token_id=None, eos_token_id=None)
    documents = [Document("one byte", "x"), Document("two", "xy")]
    assert [e.id for e in encode(documents, without_bos)] == ["two"]
    assert encode(documents, without_bos)[0].text == "y"  # the first token is never predicted
    assert [(e.id, e.text) for e in encode(documents, byte_tokenizer())] == [("one byte", "x"), ("two", "xy")]


@pytest.mark.parametrize("max_tokens", [1, 10, 333])
def test_sample_has_exactly_the_tokens_asked_for(max_tokens: int) -> None:
    tokenizer = byte_tokenizer()
    chosen = sample(encode(DOCUMENTS, tokenizer), tokenizer, max_tokens)
    assert sum(len(e.tokens) - 1 for e in chosen) == max_tokens
    for e in chosen:
        assert e.text == tokenizer.decode(e.tokens[1:])
    ids = [d.id for d in DOCUMENTS]
    assert [ids.index(e.id) for e in chosen] == sorted(ids.index(e.id) for e in chosen)


def test_sample_spreads_over_all_documents() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(DOCUMENTS, tokenizer)
    chosen = sample(encoded, tokenizer, sum(len(e.tokens) - 1 for e in encoded) // 2)
    places = np.array([int(e.id[1:]) for e in chosen])
    counts = np.histogram(places, bins=3, range=(0, 300))[0]
    assert counts.min() > 30  # of about 50 in each third


def test_sample_takes_little_of_each_long_document() -> None:
    tokenizer = byte_tokenizer()
    long = encode([Document(f"d{i}", "word " * 1000) for i in range(40)], tokenizer)
    chosen = sample(long, tokenizer, 640)
    assert [len(e.tokens) - 1 for e in chosen] == [20] * 32
    few = sample(long[:2], tokenizer, 640)
    assert sum(len(e.tokens) - 1 for e in few) == 640


def test_sample_of_everything_is_everything() -> None:
    tokenizer = byte_tokenizer()
    encoded = encode(DOCUMENTS[:5], tokenizer)
    assert sample(encoded, tokenizer, 10_000) == encoded
    assert sample([], tokenizer, 5) == []
    with pytest.raises(InvalidRequest, match="max_tokens must be at least 1, got 0"):
        sample(encoded, tokenizer, 0)


def test_unseen_leaves_out_stored_ids_and_stored_texts(tmp_path: Path) -> None:
    path = toy_datastore(tmp_path)
    documents = [
        Document("new", "nobody has read this"),
        Document("0", "the id of a stored document"),
        Document("a copy", TEXTS[1]),
    ]
    assert [e.id for e in unseen(encode(documents, byte_tokenizer()), path)] == ["new"]
