"""One process with model and datastores, over a toy model and a real datastore."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from knnlm.datastore.build import build
from knnlm.datastore.catalog import Catalog
from knnlm.datastore.updates.revise import with_tuning
from knnlm.errors import Conflict, InvalidRequest, KnnlmError, UnknownDomain, UnknownVersion
from knnlm.evaluation.perplexity import leaks
from knnlm.evaluation.splits import encode
from knnlm.generation import GenerationOptions
from knnlm.index.searcher import Searcher
from knnlm.local import LocalDatastore, LocalLanguageModel
from knnlm.messages import Document, ForwardRequest, SearchRequest
from knnlm.options import DomainOptions, KnnOptions, SearchOptions
from knnlm.pipeline import Context, Pipeline
from knnlm.sampling import SamplingOptions
from knnlm.testing import TEXTS, ToyLanguageModel, toy_datastore
from knnlm.tuning_records import Tuning

TEXT = "the dog sat on the mat and the cat looked at the log, " * 2  # longer than one window of the toy


@pytest.fixture
def pipeline(tmp_path: Path) -> Iterator[Pipeline]:
    lm = ToyLanguageModel()
    path = toy_datastore(tmp_path, lm)
    with_tuning(path, Tuning(4.0, 0.4, 16, 9.0, 8.0, 100, 3))
    with Pipeline(lm, {"toy": Searcher.open(path, expect=lm.info)}) as opened:
        yield opened


def options(**given: float) -> KnnOptions:
    return KnnOptions((DomainOptions("toy", **given),))  # type: ignore[arg-type]  # floats alone


def test_score_without_retrieval_is_the_model(pipeline: Pipeline) -> None:
    tokens = pipeline.tokenizer.encode("the dog sat")
    expected = pipeline.lm.forward(
        ForwardRequest([tokens], [np.arange(len(tokens) - 1, dtype=np.int32)], targets=tokens[1:])
    )
    score = pipeline.score("the dog sat")
    np.testing.assert_array_equal(score.log_probs, expected.target_log_probs)
    assert score.knn_log_probs is None


def test_generate_takes_the_likeliest_of_next_token_again_and_again(pipeline: Pipeline) -> None:
    greedy = GenerationOptions(max_tokens=6, sampling=SamplingOptions(temperature=0), ignore_eos=True)
    seen: list[str] = []
    completion = pipeline.generate("the cat", "toy", greedy, on_token=lambda new: seen.append(new.text))
    context = pipeline.tokenizer.encode("the cat").tolist()
    for token, log_prob in zip(completion.tokens, completion.log_probs, strict=True):
        mixed = pipeline.next_token([context], "toy").mixed
        assert token == int(mixed.log_probs[0].argmax())
        assert log_prob == pytest.approx(float(mixed.log_probs[0].max()))
        context.append(token)
    assert completion.text == "".join(seen) == pipeline.tokenizer.decode(list(completion.tokens))
    assert (completion.finish, completion.degraded, completion.domains[0].domain) == ("length", None, "toy")


def test_generate_draws_the_same_with_the_same_seed(pipeline: Pipeline) -> None:
    free = GenerationOptions(max_tokens=12, ignore_eos=True)
    drawn = [pipeline.generate("the cat", options(lmbda=0.2), free, seed=seed).tokens for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert pipeline.generate("the cat", None, free).tokens != pipeline.generate("the cat", None, free).tokens


def test_lambda_zero_is_exactly_the_model(pipeline: Pipeline) -> None:
    np.testing.assert_array_equal(pipeline.score(TEXT, options(lmbda=0)).log_probs, pipeline.score(TEXT).log_probs)
    contexts = ["the cat", "x"]
    np.testing.assert_array_equal(
        pipeline.next_token(contexts, options(lmbda=0)).mixed.log_probs, pipeline.next_token(contexts).mixed.log_probs
    )


def test_perplexity_equals_that_of_the_distributions_at_every_position(pipeline: Pipeline) -> None:
    text = TEXT[:30]  # one window, so that the contexts are the text's beginnings
    tokens = pipeline.tokenizer.encode(text)
    rows = pipeline.next_token([tokens[:i] for i in range(1, len(tokens))], "toy").mixed.log_probs
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, atol=1e-6)  # float32 log-probabilities of the model
    perplexity = np.exp(-rows[np.arange(len(rows)), tokens[1:]].mean())
    assert pipeline.score(text, "toy").perplexity == pytest.approx(perplexity, rel=1e-6)


def test_a_domain_by_name_is_used_as_it_was_tuned(pipeline: Pipeline) -> None:
    by_name = pipeline.score(TEXT, "toy")
    assert [(u.domain, u.version, u.temperature, u.lmbda, u.k) for u in by_name.domains] == [
        ("toy", "v1", 4.0, 0.4, 16)
    ]
    explicit = KnnOptions((DomainOptions("toy", lmbda=0.4, temperature=4.0),), search=SearchOptions(k=16))
    np.testing.assert_array_equal(by_name.log_probs, pipeline.score(TEXT, explicit).log_probs)
    assert by_name.perplexity < pipeline.score(TEXT).perplexity


def test_explained_tokens_name_the_documents_that_hold_them(pipeline: Pipeline) -> None:
    """Text that is stored finds itself: what it is given comes from its own document, and places there."""
    text = TEXTS[0][:30]
    score = pipeline.explain(text, "toy", passages=3, passage_tokens=4)
    np.testing.assert_array_equal(score.log_probs, pipeline.score(text, "toy").log_probs)
    carried = score.mixed.components[0].evidence.carried
    assert [row[0].passage.position for row in carried] == list(range(1, len(carried) + 1))
    assert {row[0].passage.document for row in carried} == {"0"}
    assert score.documents[0].document == "0"
    prompted = pipeline.explain(text[10:], "toy", prompt=text[:10])
    assert prompted.log_probs.tolist() == score.log_probs[10:].tolist()
    ids = pipeline.tokenizer.encode(text)
    by_ids = pipeline.explain(ids[11:], "toy", prompt=ids[:11])
    assert by_ids.log_probs.tolist() == prompted.log_probs.tolist()
    with pytest.raises(InvalidRequest, match="both be texts, or both token ids"):
        pipeline.explain(text, "toy", prompt=ids)


def test_passages_are_of_the_nearest_entries(pipeline: Pipeline) -> None:
    found = pipeline.next_token(TEXTS[0][:20], "toy", passages=2, passage_tokens=5).found[0]
    nearest = found.passages[0][0]
    assert nearest.document == "0"  # the context itself is stored
    assert pipeline.tokenizer.decode(nearest.after) == TEXTS[0][20:25]
    assert len(found.passages[0]) == 2


@pytest.mark.parametrize(
    "context", ["the cat", np.array([0, 90, 91]), [0, 90, 91]], ids=["text", "array", "list of numbers"]
)
def test_one_context_gives_one_row(pipeline: Pipeline, context: Context) -> None:
    row = pipeline.next_token(context).mixed.log_probs
    assert row.shape == (1, 258)
    several = pipeline.next_token([context, "x"]).mixed.log_probs
    np.testing.assert_array_equal(several[:1], row)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ([0, 258], "token 258 lies outside the vocabulary of 258"),
        ([0, -1], "token -1 lies outside"),
        ([0, 2**32 + 5], "token 4294967301 lies outside"),
        ([], "empty"),
        (np.zeros((2, 2), np.int32), "a context is a text or a row of token ids"),
        (np.zeros(2), "a context is a text or a row of token ids, got float64"),
        ([0] * 33, "33 tokens, the model takes 32"),
    ],
)
def test_wrong_contexts_are_refused(pipeline: Pipeline, context: Context, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        pipeline.next_token([context])


def test_works_inside_a_running_event_loop(pipeline: Pipeline) -> None:
    async def in_a_notebook() -> float:
        return pipeline.score(TEXT, "toy").perplexity

    assert asyncio.run(in_a_notebook()) == pipeline.score(TEXT, "toy").perplexity


def test_unknown_domain_is_named_with_those_that_are_open(pipeline: Pipeline) -> None:
    with pytest.raises(UnknownDomain, match=r"unknown domain 'law'; opened: toy"):
        pipeline.score(TEXT, "law")


def test_another_version_than_the_opened_one_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UnknownVersion, match="v9"):
        pipeline.score(TEXT, KnnOptions((DomainOptions("toy", version="v9"),)))


def test_local_clients_answer_as_the_objects_do(pipeline: Pipeline) -> None:
    lm, datastore = LocalLanguageModel(pipeline.lm), LocalDatastore(pipeline.searchers)
    assert asyncio.run(lm.get_model()) == pipeline.lm.info
    assert asyncio.run(lm.get_tokenizer()) == pipeline.tokenizer.json
    listed = asyncio.run(datastore.list_domains())
    assert [(d.domain, d.version, tuple(d.versions)) for d in listed] == [("toy", "v1", ("v1",))]
    request = SearchRequest("toy", np.zeros((2, 16), np.float32), SearchOptions(k=3))
    found = asyncio.run(datastore.search(request))
    np.testing.assert_array_equal(
        found.neighbors.distances, pipeline.searchers["toy"].search(request).neighbors.distances
    )
    with pytest.raises(Conflict, match="opened with version v1"):
        asyncio.run(datastore.activate("toy", "v2"))


def test_load_refuses_before_it_loads_a_model(tmp_path: Path) -> None:
    toy_datastore(tmp_path, activate=False)
    no_model = str(tmp_path / "no model here")
    with pytest.raises(UnknownVersion, match=r"domain toy has no current version: activate one of v1"):
        Pipeline.load(no_model, tmp_path, ["toy"])
    with pytest.raises(UnknownDomain, match="law"):
        Pipeline.load(no_model, tmp_path, ["law"])
    with pytest.raises(InvalidRequest, match="no store"):
        Pipeline.load(no_model, domains=["toy"])
    with pytest.raises(KnnlmError, match="no model here"):
        Pipeline.load(no_model)


def test_a_domain_without_a_current_version_is_in_nobodys_way_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy_datastore(tmp_path)
    toy_datastore(tmp_path, domain="law", activate=False)
    monkeypatch.setattr("knnlm.lm.model.LanguageModel.load", lambda *_, **__: ToyLanguageModel())
    with Pipeline.load("toy", tmp_path) as opened:
        assert list(opened.searchers) == ["toy"]
    with pytest.raises(UnknownVersion, match="domain law has no current version"):
        Pipeline.load("toy", tmp_path, ["toy", "law"])


def test_a_text_is_scored_with_windows_as_the_keys_of_its_domain_were_made(tmp_path: Path) -> None:
    """So that stored text finds itself, at no distance, in later windows as well."""
    lm, text, searchers = ToyLanguageModel(), "".join(TEXTS), {}
    for bos in ("document", "window"):
        path = build([Document("a", text)], lm, Catalog(tmp_path), bos, key_dtype="float32", bos=bos)
        searchers[bos] = Searcher.open(path)
    with Pipeline(lm, searchers) as pipeline:
        for bos in searchers:
            knn = KnnOptions((DomainOptions(bos, lmbda=0.9, temperature=1e-3),), search=SearchOptions(k=1))
            assert pipeline.score(text, knn).perplexity < 1.2
            held_out = encode([Document("a", text)], lm.tokenizer)
            assert leaks(pipeline, held_out, [bos], (32, 16))[bos] == 1.0
