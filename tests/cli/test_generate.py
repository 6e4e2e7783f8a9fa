"""`knnlm generate`: in process, and at an aggregator."""

import asyncio
from pathlib import Path

import pytest

from knnlm.cli.main import run
from knnlm.generation import GenerationOptions
from knnlm.pipeline import Pipeline
from knnlm.sampling import SamplingOptions
from tests.cli.conftest import Knnlm
from tests.contract.system import store as toys  # noqa: F401  a fixture
from tests.contract.system import system

GREEDY = ("--temperature", "0", "--max-tokens", "5", "--ignore-eos")


def test_it_shows_what_the_library_generates(knnlm: Knnlm, store: Path, model: Path) -> None:
    greedy = GenerationOptions(max_tokens=5, sampling=SamplingOptions(temperature=0), ignore_eos=True)
    with Pipeline.load(str(model), store, ["toy"]) as pipeline:
        expected = pipeline.generate("the cat", "toy", greedy)
    asked = ("generate", "the cat", "--model", model, "--domain", "toy", *GREEDY)
    shown = knnlm(*asked)
    assert shown.out == expected.text + "\n"
    assert "toy v" in shown.err
    answer = knnlm(*asked, "--json").json
    assert answer["tokens"] == list(expected.tokens)
    assert (answer["text"], answer["finish_reason"], answer["stop_reason"]) == (expected.text, "length", None)


def test_the_same_of_a_service(toys: Path, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    async def generated() -> None:
        async with system(toys) as running:
            url = f"http://127.0.0.1:{running.hosts['aggregator'].port}"
            asked = ["generate", "the cat", "--remote", url, "--domain", "cat", *GREEDY]
            assert await asyncio.to_thread(run, asked) == 0
            body = {"prompt": "the cat", "knn": {"domain": "cat"}, "max_tokens": 5, "temperature": 0, "add_bos": True}
            made = await running.post("/v1/completions", {**body, "ignore_eos": True})
            assert capsys.readouterr().out == made["choices"][0]["text"] + "\n"

    asyncio.run(generated())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--temperature", "-1"), "temperature"),
        (("--max-tokens", "-1"), "max_tokens"),
        (("--knn-temperature", "2"), "--knn-temperature means nothing without --domain"),
        (("--api-key-file", "key"), "means nothing without --remote"),
    ],
)
def test_what_cannot_be_is_refused(knnlm: Knnlm, model: Path, given: tuple[str, ...], message: str) -> None:
    answer = knnlm("generate", "the cat", "--model", model, *given)
    assert answer.code == 2
    assert message in answer.err
