"""Token texts and encoding, over a tokenizer of each family: byte-level, split as Llama 3's, SentencePiece."""

import json
import threading
import time

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

from knnlm import tokenizer as tokenizer_module
from knnlm.testing import byte_tokenizer
from knnlm.tokenizer import Tokenizer

CORPUS = [
    "the cat sat on the mat and the dog sat on the log",
    "naïve café, says the cat: 日本語 or 日本",
    "the  the",
] * 20
SPECIALS = [AddedToken(name, special=True, normalized=False) for name in ("<s>", "</s>")]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = (
    "the cat sat on the mat", " the cat", "  two spaces", "the", "", " ", "\n", "naïve café", "日本語 🎉 日本",
    "a\n\n b",     "the cat.\nThe dog's 1234 logs \n y", "▁ is no space", "<s> is text, </s> too",
)  # fmt: skip


def byte_level(split: str | None = None) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split is None)
    if split is None:
        backend.pre_tokenizer = whole
    else:
        parts = pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([parts, whole])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=SPECIALS,
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return Tokenizer(backend.to_str(), bos_token_id=0, eos_token_id=1)


def sentence_piece(*, metaspace: bool) -> Tokenizer:
    """As Llama 2 and Mistral have it: `▁` for a space, one before every text, bytes for what has no token."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=120, show_progress=False))
    learned = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names += [t for t in learned["vocab"] if t not in names and t not in "日本語"]
    merges = [tuple(m) for m in learned["merges"] if "".join(m) in names and m[0] in names and m[1] in names]
    vocab = {name: i for i, name in enumerate(names)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(SPECIALS)
    return Tokenizer(backend.to_str(), bos_token_id=1, eos_token_id=2)


TOKENIZERS = {
    "byte": byte_tokenizer(),
    "byte level": byte_level(),
    "llama 3": byte_level(LLAMA3),
    "llama 2": sentence_piece(metaspace=False),
    "mistral": sentence_piece(metaspace=True),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return TOKENIZERS[request.param]


def shown(name: str, text: str) -> str:
    """The text as its tokens have it: SentencePiece takes `▁` for a space, "first" leaves one out."""
    if name in ("llama 2", "mistral"):
        text = text.replace("▁", " ")
    return text.removeprefix(" ") if name == "mistral" else text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_of_a_text_joined_are_the_text(name: str, text: str) -> None:
    tokenizer, expected = TOKENIZERS[name], shown(name, text)
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.bos_token_id
    assert "".join(tokenizer.pieces(tokens[1:])) == tokenizer.decode(tokens[1:]) == expected
    pieces = tokenizer.pieces(tokens)
    assert pieces[0] == "<s>"
    assert "".join(pieces[1:]) == expected
    assert len(pieces) == len(tokens)


@pytest.mark.parametrize("name", ["llama 2", "mistral"])
def test_tokens_that_differ_by_their_space_look_different(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    vocab = tokenizer._backend.get_vocab()
    assert tokenizer.token(vocab["▁the"]) == " the"
    assert tokenizer.token(vocab["t"]) == "t"
    assert tokenizer.token(vocab["▁"]) == " "
    assert tokenizer.token(vocab["<s>"]) == "<s>"
    assert tokenizer.token(vocab["<0xE6>"]) == "\ufffd"
    tokens = tokenizer.encode("the cat sat")
    assert tokenizer.pieces(tokens[1:])[0] == "the"
    assert tokenizer.pieces(tokens[1:], inside=True)[0] == " the"


def test_a_split_character_stands_where_it_is_complete(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("🎉!")[1:]
    pieces = tokenizer.pieces(tokens)
    assert pieces[-2:] == ["🎉", "!"]
    assert not any(pieces[:-2])
    assert tokenizer.pieces(tokens[-3:-2], inside=True) == ["\ufffd"]
    assert tokenizer.pieces(tokens[-2:], inside=True)[-1] == "!"


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("completion", ["t", " the cat", "日本語", "é", "\n\n b"])
def test_a_completion_begins_at_the_first_token_that_holds_any_of_it(name: str, completion: str) -> None:
    tokenizer = TOKENIZERS[name]
    for prompt in ("", "the ca", "the cat", "naïve café", "日本"):
        tokens, first = tokenizer.continued(prompt, completion)
        np.testing.assert_array_equal(tokens, tokenizer.encode(prompt + completion))
        assert 1 <= first < len(tokens)
        if prompt:  # the tokens before it hold nothing of the completion, itself it does
            assert shown(name, prompt).startswith(tokenizer.decode(tokens[1:first]))
            assert len(tokenizer.decode(tokens[1 : first + 1])) > len(shown(name, prompt))
        else:
            assert first == 1


@pytest.mark.parametrize("text", TEXTS)
def test_before_and_after_of_a_passage_are_the_passage(tokenizer: Tokenizer, text: str) -> None:
    tokens = tokenizer.encode("the log " + text)[1:]
    for inside in (False, True):
        whole = "".join(tokenizer.pieces(tokens, inside=inside))
        for cut in range(len(tokens) + 1):
            assert "".join(tokenizer.passage(tokens[:cut], tokens[cut:], position=cut + inside)) == whole


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 260), max_size=40))
def test_of_any_bytes_pieces_are_what_the_library_decodes(ids: list[int]) -> None:
    """Whether they are a text or not; ids that are no token give nothing."""
    for name in ("byte", "byte level"):
        tokenizer = TOKENIZERS[name]
        assert "".join(tokenizer.pieces(ids)) == tokenizer._backend.decode(ids, skip_special_tokens=False)


def test_special_tokens_in_a_text_are_text_unless_asked_for(tokenizer: Tokenizer) -> None:
    text = "the <s> cat</s>"
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert tokenizer.encode(text)[1:].tolist().count(bos) == 0
    assert tokenizer.decode(tokenizer.encode(text)[1:]) == text
    parsed = tokenizer.encode(text, parse_special=True)[1:].tolist()
    assert (parsed.count(bos), parsed[-1]) == (1, eos)


@pytest.mark.parametrize("text", ["a</s>the cat", "the </s>  cat", "</s>cat", "a</s></s> the", "<s>the</s>cat<s>"])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_pieces_of_a_text_with_special_tokens_joined_are_the_text(name: str, text: str) -> None:
    """Also where the tokenizer puts a space behind every special token."""
    tokenizer = TOKENIZERS[name]
    tokens = tokenizer.encode(text, parse_special=True)
    assert tokens.tolist().count(tokenizer.eos_token_id or 0) == text.count("</s>")
    assert tokenizer.decode(tokens[1:]) == text
    assert tokenizer.pieces(tokens[1:], inside=True)[1:] == tokenizer.pieces(tokens[1:])[1:]


@pytest.mark.parametrize("text", ["the cat", "a\ufffdb", "the</s>cat", "日本 the"])
def test_a_byte_level_tokenizer_may_put_a_space_before_a_text(text: str) -> None:
    serialised = json.loads(byte_level().json)
    serialised["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = Tokenizer(json.dumps(serialised), bos_token_id=0, eos_token_id=1)
    tokens = tokenizer.encode(text, parse_special=True)
    assert tokenizer.decode(tokens[1:]) == text
    assert tokenizer.pieces(tokens[1:], inside=True)[0].startswith(" ")
    np.testing.assert_array_equal(tokens, tokenizer.encode(f" {text}", parse_special=True))  # no piece can tell


@pytest.mark.parametrize("content", ["the ", " the", " "])
@pytest.mark.usefixtures("small_portions")
def test_added_tokens_with_a_space_at_an_end_are_never_cut(content: str) -> None:
    backend = tokenizers.Tokenizer.from_str(byte_level().json)
    backend.add_tokens([AddedToken(content, normalized=False)])
    tokenizer = Tokenizer(backend.to_str(), bos_token_id=None, eos_token_id=None)
    text = "the cat the dog " * 50
    assert tokenizer.encode(text).tolist() == backend.encode(text, add_special_tokens=False).ids


@pytest.fixture
def small_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "PORTION_CHARACTERS", 50)
    monkeypatch.setattr(tokenizer_module, "PORTIONS_TOGETHER", 3)
    monkeypatch.setattr(tokenizer_module, "PORTION_TOKENS", 7)


WORDS = st.sampled_from(
    [
        "the",
        "cat",
        " ",
        "  ",
        "\n",
        "\n\n",
        "\r\n",
        ".",
        "'s",
        "123",
        "日本",
        "é",
        "e\u0301",
        "\u2003",
        "<s>",
        "-",
        "\t",
        "🎉",
    ]
)


@pytest.mark.usefixtures("small_portions")
@settings(max_examples=60, deadline=None)
@given(st.lists(WORDS, min_size=60, max_size=200).map("".join))
def test_a_long_text_in_portions_has_the_tokens_of_the_whole(text: str) -> None:
    for tokenizer in TOKENIZERS.values():
        for parse, backend in ((True, tokenizer._parser()), (False, tokenizer._backend)):
            whole = [tokenizer.bos_token_id, *backend.encode(text, add_special_tokens=False).ids]
            assert tokenizer.encode(text, parse_special=parse).tolist() == whole


@pytest.mark.usefixtures("small_portions")
@pytest.mark.parametrize(
    ("name", "cut"), [("byte level", True), ("llama 3", True), ("llama 2", False), ("byte", False)]
)
def test_a_text_is_cut_where_the_tokenizer_parts_it_anyway(name: str, cut: bool) -> None:
    tokenizer = TOKENIZERS[name]
    portions = tokenizer._portions(tokenizer._backend, "the cat sat on the mat. " * 50)
    assert (len(portions) > 10) == cut
    assert "".join(portions) == "the cat sat on the mat. " * 50


def test_many_texts_are_encoded_as_each_alone(tokenizer: Tokenizer) -> None:
    together = tokenizer.encode_all(TEXTS)
    for text, tokens in zip(TEXTS, together, strict=True):
        np.testing.assert_array_equal(tokens, tokenizer.encode(text))
    assert tokenizer.encode_all([]) == []


def test_other_threads_run_while_a_text_is_encoded() -> None:
    tokenizer = TOKENIZERS["byte level"]
    text = "the cat sat on the mat. " * 60_000
    turns, done = 0, threading.Event()

    def encode() -> None:
        tokenizer.encode(text)
        done.set()

    thread = threading.Thread(target=encode)
    thread.start()
    while not done.is_set():
        time.sleep(0.001)
        turns += 1
    thread.join()
    assert turns > 20  # a second of work under the lock would leave one or two
