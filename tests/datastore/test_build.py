"""What a build makes of documents. Interruption is in test_resume.py."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.document_table import Row
from knnlm.datastore.encode import plan_parts
from knnlm.datastore.manifest import WindowsRecord
from knnlm.datastore.progress import Progress
from knnlm.datastore.reader import Datastore
from knnlm.decoding import plan_fed_windows, plan_windows
from knnlm.errors import Conflict, DatastoreError, InvalidRequest, ModelError
from knnlm.index.searcher import Searcher
from knnlm.messages import Document, ForwardRequest, ForwardResult
from knnlm.testing import BOS, TEXTS, ToyLanguageModel, toy_datastore
from knnlm.tokenizer import Tokenizer


class Spoiled(ToyLanguageModel):
    """Replaces one number of the key of the first "!" it sees."""

    def __init__(self, number: float) -> None:
        super().__init__()
        self._number = number

    def forward(self, request: ForwardRequest) -> ForwardResult:
        result = super().forward(request)
        assert result.keys is not None
        rows = np.concatenate([t[p] for t, p in zip(request.tokens, request.positions, strict=True)])
        result.keys[rows == self.tokenizer.encode("!")[1], 3] = self._number
        return result


def key(lm: ToyLanguageModel, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """h(tokens): the key after the last of them."""
    result = lm.forward(ForwardRequest([tokens], [np.array([len(tokens) - 1], np.int32)], keys=True)).keys
    assert result is not None
    return np.asarray(result[0], np.float32)


@pytest.mark.parametrize("key_dtype", ["float16", "float32"])
def test_entry_is_the_key_of_its_context_and_the_next_token(tmp_path: Path, key_dtype: str) -> None:
    lm = ToyLanguageModel(context_length=256)  # longer than any text: the window is the whole document
    datastore = Datastore.open(toy_datastore(tmp_path, lm, key_dtype=key_dtype))
    entry = 0
    for text in TEXTS:
        tokens = lm.tokenizer.encode(text)
        for i in range(len(tokens) - 1):
            np.testing.assert_array_equal(datastore.keys[entry], key(lm, tokens[: i + 1]).astype(key_dtype))
            assert datastore.values[entry] == tokens[i + 1]
            entry += 1
    assert entry == datastore.manifest.entries == len(datastore.keys) == len(datastore.values)
    assert datastore.keys.dtype == key_dtype


@pytest.mark.parametrize(("context_length", "min_context"), [(32, 16), (32, 1), (32, 31), (7, 3), (2, 1)])
def test_long_documents_are_cut_into_windows(tmp_path: Path, context_length: int, min_context: int) -> None:
    lm = ToyLanguageModel()
    text = "".join(TEXTS)
    path = build(
        [Document("a", "short"), Document("b", text)], lm, Catalog(tmp_path), "toy", key_dtype="float32",
        context_length=context_length, min_context=min_context, batch_tokens=100, part_entries=20,
    )  # fmt: skip
    datastore = Datastore.open(path)
    tokens = lm.tokenizer.encode(text)
    first = len(lm.tokenizer.encode("short")) - 1
    for window in plan_windows(len(tokens), context_length, min_context):
        for target in range(window.first, window.end):
            expected = key(lm, tokens[window.start : target])
            np.testing.assert_array_equal(datastore.keys[first + target - 1], expected.astype(np.float32))
            assert datastore.values[first + target - 1] == tokens[target]
    assert datastore.manifest.windows == WindowsRecord(
        context_length=context_length, min_context=min_context, parse_special=False
    )


def test_every_window_may_begin_with_bos(tmp_path: Path) -> None:
    lm, text = ToyLanguageModel(), "".join(TEXTS)
    path = build([Document("a", text)], lm, Catalog(tmp_path), "toy", key_dtype="float32", bos="window")
    datastore = Datastore.open(path)
    assert datastore.manifest.windows.bos == "window"
    assert Searcher.open(path).info(()).window_bos_token_id == BOS
    tokens = lm.tokenizer.encode(text)
    np.testing.assert_array_equal(datastore.tokens, tokens)  # the text has it once
    for window in plan_fed_windows(len(tokens), 32, 16, BOS):
        for target in range(window.first, window.end):
            context = tokens[window.start : target]
            expected = key(lm, context if not window.start else np.array([BOS, *context], np.int32))
            np.testing.assert_array_equal(datastore.keys[target - 1], expected.astype(np.float32))
    with pytest.raises(InvalidRequest, match="bos must be document or window, got 'always'"):
        build([Document("a", text)], lm, Catalog(tmp_path), "other", bos="always")
    lm.info = dataclasses.replace(lm.info, bos_token_id=None)
    with pytest.raises(InvalidRequest, match="expected a model with a BOS token"):
        build([Document("a", text)], lm, Catalog(tmp_path), "other", bos="window")


def test_bos_stands_once_before_every_document_and_is_no_value(tmp_path: Path) -> None:
    datastore = Datastore.open(toy_datastore(tmp_path, texts=["one\n\ntwo\n", "three"]))
    assert np.flatnonzero(datastore.tokens == BOS).tolist() == [0, len("one\n\ntwo\n") + 1]
    assert BOS not in datastore.values


@given(st.lists(st.integers(0, 90), max_size=12), st.integers(2, 32), st.data())
def test_parts_cover_every_entry_once(lengths: list[int], context_length: int, data: st.DataObject) -> None:
    min_context = data.draw(st.integers(1, context_length - 1))
    part_entries = data.draw(st.integers(1, 200))
    starts = np.cumsum([0, *lengths])
    rows = [Row(str(i), int(starts[i]), length) for i, length in enumerate(lengths)]
    windows = WindowsRecord(context_length=context_length, min_context=min_context, parse_special=False)
    parts = list(plan_parts(rows, windows, part_entries))
    assert [p.number for p in parts] == list(range(len(parts)))
    assert [p.lo for p in parts] == [0, *(p.hi for p in parts)][: len(parts)]
    assert sum(p.hi - p.lo for p in parts) == sum(max(length - 1, 0) for length in lengths)
    assert all(part_entries <= p.hi - p.lo < part_entries + context_length for p in parts[:-1])
    for part in parts:
        assert [piece.entry for piece in part.pieces] == [
            part.lo + sum(q.entries for q in part.pieces[:i]) for i in range(len(part.pieces))
        ]


def test_model_is_never_given_more_than_asked(tmp_path: Path) -> None:
    class Counting(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            padded = len(request.tokens) * max(len(t) for t in request.tokens)
            seen.append(padded)
            return super().forward(request)

    seen: list[int] = []
    build([Document("a", "x" * 500)] * 3, Counting(), Catalog(tmp_path), "toy", batch_tokens=100)
    assert max(seen) <= 100
    assert sum(seen) / len(seen) > 64


def test_documents_without_entries_are_listed(tmp_path: Path) -> None:
    class WithoutBos(ToyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = Tokenizer(self.tokenizer.json, bos_token_id=None, eos_token_id=None)

    documents = [Document(i, text) for i, text in zip("abcde", ["x", "yz", "x", "uvw", "x"], strict=True)]
    datastore = Datastore.open(build(documents, WithoutBos(), Catalog(tmp_path), "toy"))
    assert datastore.manifest.documents == 5
    assert datastore.manifest.entries == 3
    assert [datastore.passage(e, 9, 9).document for e in range(3)] == ["b", "d", "d"]


@pytest.mark.parametrize("texts", [[], ["x"], ["x", "y"]])
def test_no_token_to_predict_makes_no_version(tmp_path: Path, texts: list[str]) -> None:
    class WithoutBos(ToyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.tokenizer = Tokenizer(self.tokenizer.json, bos_token_id=None, eos_token_id=None)

    documents = [Document(str(i), text) for i, text in enumerate(texts)]
    with pytest.raises(InvalidRequest, match="no document with a token to predict") as caught:
        build(documents, WithoutBos(), Catalog(tmp_path), "toy")
    assert caught.value.param == "documents"
    assert list(tmp_path.iterdir()) == []


def test_no_documents_leave_a_domain_and_what_is_being_built_of_it_as_they_are(tmp_path: Path) -> None:
    toy_datastore(tmp_path)
    with pytest.raises(DatastoreError, match="cannot hold"):
        build([Document("a", "ab!c")], Spoiled(np.nan), Catalog(tmp_path), "toy")
    with pytest.raises(InvalidRequest, match="no document with a token to predict"):
        build([], ToyLanguageModel(), Catalog(tmp_path), "toy")
    assert sorted(f.name for f in (tmp_path / "toy").iterdir()) == [".v2.building", "CURRENT", "v1"]
    assert build([Document("a", "ab!c")], ToyLanguageModel(), Catalog(tmp_path), "toy").name == "v2"


@pytest.mark.parametrize(
    ("number", "key_dtype"), [(np.nan, "float32"), (np.inf, "float32"), (-np.inf, "float16"), (65600, "float16")]
)
def test_key_that_cannot_be_stored_is_named(tmp_path: Path, number: float, key_dtype: str) -> None:
    documents = [Document("fine", "abc"), Document("bad one", "ab!c")]
    with pytest.raises(DatastoreError, match=rf"position 3 of document 'bad one'.*{key_dtype} cannot hold"):
        build(documents, Spoiled(number), Catalog(tmp_path), "toy", key_dtype=key_dtype)
    assert Catalog(tmp_path).domains() == []


def test_large_keys_fit_float32(tmp_path: Path) -> None:
    path = build([Document("a", "ab!c")], Spoiled(65600.0), Catalog(tmp_path), "toy", key_dtype="float32")
    assert Datastore.open(path).keys.max() == 65600


def test_half_precision_model_fills_a_single_precision_datastore(tmp_path: Path) -> None:
    class Half(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            result = super().forward(request)
            assert result.keys is not None
            return dataclasses.replace(result, keys=result.keys.astype(np.float16))

    keys = Datastore.open(toy_datastore(tmp_path, Half(), key_dtype="float32")).keys
    assert keys.dtype == np.float32
    np.testing.assert_array_equal(keys, keys.astype(np.float16))


def test_token_outside_the_vocabulary_is_named(tmp_path: Path) -> None:
    class Narrow(ToyLanguageModel):
        def __init__(self) -> None:
            super().__init__()
            self.info = dataclasses.replace(self.info, vocab_size=100)

    with pytest.raises(DatastoreError, match=r"document 'b' has token 129, expected \[0, 100\)"):
        build([Document("a", "abc"), Document("b", "é")], Narrow(), Catalog(tmp_path), "toy")


def test_model_that_answers_in_another_shape_is_refused(tmp_path: Path) -> None:
    class Narrow(ToyLanguageModel):
        def forward(self, request: ForwardRequest) -> ForwardResult:
            result = super().forward(request)
            assert result.keys is not None
            return dataclasses.replace(result, keys=result.keys[:, :15])

    with pytest.raises(DatastoreError, match=r"gave keys \(3, 15\), expected \(3, 16\)"):
        build([Document("a", "abc")], Narrow(), Catalog(tmp_path), "toy")


def test_model_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    lm = ToyLanguageModel()
    lm.info = dataclasses.replace(lm.info, tokenizer_sha256="other")
    with pytest.raises(ModelError, match="it says other"):
        build([], lm, Catalog(tmp_path), "toy")


@pytest.mark.parametrize(
    ("name", "value"),
    [("context_length", 33), ("context_length", 1), ("min_context", 32), ("min_context", 0), ("key_dtype", "int8"),
     ("batch_tokens", 0), ("part_entries", 0), ("version", "../v1")],
)  # fmt: skip
def test_parameters_out_of_range_are_named(tmp_path: Path, name: str, value: object) -> None:
    with pytest.raises(InvalidRequest) as caught:
        build([], ToyLanguageModel(), Catalog(tmp_path), "toy", **{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
    assert list(tmp_path.iterdir()) == []


def test_version_that_exists_is_never_changed(tmp_path: Path) -> None:
    toy_datastore(tmp_path)
    with pytest.raises(Conflict, match="v1 of domain toy exists already"):
        toy_datastore(tmp_path, texts=["other"])
    assert build([Document("a", "text")], ToyLanguageModel(), Catalog(tmp_path), "toy").name == "v2"
    assert not any(f.name.startswith(".") for f in (tmp_path / "toy").iterdir())
    assert not any(f.name.startswith(".") for f in (tmp_path / "toy/v2").iterdir())


def test_progress_is_enough_for_a_display(tmp_path: Path) -> None:
    seen: list[Progress] = []
    path = build(
        [Document(str(i), t) for i, t in enumerate(TEXTS)], ToyLanguageModel(), Catalog(tmp_path), "toy",
        part_entries=50, on_progress=seen.append,
    )  # fmt: skip
    manifest = Datastore.open(path).manifest
    assert list(dict.fromkeys(p.phase for p in seen)) == ["tokenize", "encode", "publish"]
    assert max(p.tokens for p in seen if p.phase == "tokenize") == manifest.tokens
    encode = [p for p in seen if p.phase == "encode"]
    assert all(p.entries_total == manifest.entries for p in encode)
    assert [p.entries_done for p in encode] == sorted(p.entries_done for p in encode)
    assert encode[-1].entries_done == manifest.entries
    assert encode[-1].seconds_left == 0
    assert encode[-1].tokens > manifest.tokens  # windows overlap
    assert seen[0].seconds_left is None


def test_documents_are_read_as_a_stream(tmp_path: Path) -> None:
    alive = 0

    def documents() -> Iterator[Document]:
        nonlocal alive
        for i in range(100):
            alive = i
            yield Document(str(i), f"text {i}")

    read: list[int] = []
    build(documents(), ToyLanguageModel(), Catalog(tmp_path), "toy", on_progress=lambda _: read.append(alive))
    assert read[:3] == [0, 1, 2]
