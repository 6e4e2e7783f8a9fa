"""Every field of /v1/completions: honoured, neutral, or refused by its name."""

import json
from pathlib import Path
from typing import Any

from tests.contract.system import store, system  # noqa: F401  a fixture
from tests.contract.test_completions import IDS, TOKENIZER, body

WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": ""}, 400, "prompt"),
    ({"prompt": []}, 400, "prompt"),
    ({"prompt": [[]]}, 400, "prompt"),
    ({"prompt": None}, 400, "prompt"),
    ({"prompt": ["a", 1]}, 400, "prompt"),
    ({"prompt": [1, "a"]}, 400, "prompt"),
    ({"prompt": [-1]}, 400, "prompt"),
    ({"prompt": [258]}, 400, "prompt"),
    ({"prompt": [True]}, 400, "prompt"),
    ({"prompt": "\ud800"}, 400, "prompt"),
    ({"prompt": {"a": 1}}, 400, "prompt"),
    ({"prompt": "x" * 32}, 400, "prompt"),
    ({"prompt": ["x"] * 129}, 413, "prompt"),
    ({"n": 129}, 413, "n"),
    ({"n": 0}, 400, "n"),
    ({"best_of": 2, "n": 3}, 400, "best_of"),
    ({"best_of": 2, "stream": True}, 400, "best_of"),
    ({"max_tokens": -1}, 400, "max_tokens"),
    ({"max_tokens": 10**30}, 413, "max_tokens"),
    ({"max_tokens": 1.5}, 400, "max_tokens"),
    ({"max_tokens": 65_537}, 413, "max_tokens"),
    ({"temperature": -1}, 400, "temperature"),
    ({"temperature": "hot"}, 400, "temperature"),
    ({"temperature": 1e9}, 400, "temperature"),
    ({"temperature": 1e-9}, 400, "temperature"),
    ({"top_p": 0}, 400, "top_p"),
    ({"top_k": -2}, 400, "top_k"),
    ({"min_p": 2}, 400, "min_p"),
    ({"presence_penalty": 3}, 400, "presence_penalty"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty"),
    ({"logit_bias": {"a": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"258": 1}}, 400, "logit_bias"),
    ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
    ({"logit_bias": {"5": None}}, 400, "logit_bias"),
    ({"logit_bias": [1]}, 400, "logit_bias"),
    ({"logprobs": 21}, 413, "logprobs"),
    ({"logprobs": True}, 400, "logprobs"),
    ({"seed": 2**63}, 400, "seed"),
    ({"stop": ["x"] * 65}, 400, "stop"),
    ({"stop": 7}, 400, "stop"),
    ({"stop": "x" * 1025}, 400, "stop"),
    ({"stop_token_ids": [258]}, 400, "stop_token_ids"),
    ({"stop_token_ids": [2**70]}, 400, "stop_token_ids"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options"),
    ({"stream": "yes"}, 400, "stream"),
    ({"suffix": "x"}, 400, "suffix"),
    ({"max_completion_tokens": 5}, 400, "max_completion_tokens"),
    ({"top_logprobs": 3}, 400, "top_logprobs"),
    ({"knn": {"domain": "cat", "explain_tokens": 3}}, 400, "knn.explain_tokens"),
    ({"repetition_penalty": 1.2}, 400, "repetition_penalty"),
    ({"min_tokens": 2}, 400, "min_tokens"),
    ({"prompt_logprobs": 1}, 400, "prompt_logprobs"),
    ({"response_format": {"type": "json_object"}}, 400, "response_format"),
    ({"model": "gpt-4"}, 404, "model"),
    ({"model": "toy+nothing"}, 404, "model"),
    ({"knn": {"domain": "nothing"}, "model": "toy"}, 404, "knn.domain"),
    ({"knn": {"unknown": 1}}, 400, "knn.unknown"),
    ({"knn": {"domain": "cat", "temperature": 0}, "model": "toy"}, 400, "knn.temperature"),
    ({"knn": {"domain": "raw"}, "model": "toy"}, 400, "knn.temperature"),
    ({"on_datastore_error": "shrug"}, 400, "on_datastore_error"),
]

NEUTRAL: dict[str, Any] = {
    "n": 1, "best_of": 1, "echo": False, "logprobs": None, "stop": None, "stop_token_ids": [], "seed": None,
    "temperature": 1, "top_p": 1.0, "top_k": -1, "min_p": 0, "presence_penalty": 0, "frequency_penalty": 0.0,
    "logit_bias": {}, "user": "someone", "stream": False, "stream_options": None, "suffix": None,
    "repetition_penalty": 1.0, "min_tokens": 0, "prompt_logprobs": None, "skip_special_tokens": True,
    "include_stop_str_in_output": False, "response_format": {"type": "text"}, "add_special_tokens": True,
    "truncate_prompt_tokens": None, "return_tokens_as_token_ids": False, "knn": None, "on_datastore_error": None,
    "ignore_eos": False, "priority": 3, "what_nobody_knows": {"a": [1]},
}  # fmt: skip


async def test_what_cannot_be_is_refused_by_its_name_whole_or_streamed(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        unexpected = []
        for fields, status, param in WRONG:
            for stream in ({}, {"stream": True}):
                if "stream_options" in fields and stream:
                    continue
                given = json.dumps({"prompt": "the", "model": "toy+cat", "max_tokens": 2, **stream, **fields})
                headers = {"content-type": "application/json"}
                answer = await running.client.post("/v1/completions", content=given, headers=headers)
                seen = (answer.status_code, answer.json().get("error", {}).get("param"))
                if seen != (status, param) or len(answer.text) > 500:
                    unexpected.append((fields, answer.status_code, answer.text))
        assert not unexpected
        assert (await running.post("/v1/completions", {"model": "toy"}, 400))["error"]["param"] == "prompt"


async def test_neutral_values_and_nulls_change_nothing(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        plain = {"prompt": "the", "model": "toy+cat", "seed": 4, "max_tokens": 2}
        expected = (await running.post("/v1/completions", plain))["choices"]
        for name, value in NEUTRAL.items():
            for given in (value, None):
                if name == "seed":
                    continue
                assert (await running.post("/v1/completions", {**plain, name: given}))["choices"] == expected, name


async def test_options_do_what_they_say(store: Path) -> None:  # noqa: F811
    async with system(store) as running:

        async def made(**fields: Any) -> list[Any]:
            return list((await running.post("/v1/completions", body(**fields)))["choices"])

        letters = {name: int(TOKENIZER.encode(name)[1]) for name in "qz"}
        always = {"logit_bias": {str(letters["q"]): 100}}
        (choice,) = await made(**always, stop=["qqq"])
        assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("", "stop", "qqq")
        (choice,) = await made(**always, stop_token_ids=[letters["q"]], logprobs=0)
        assert (choice["text"], choice["stop_reason"], choice["logprobs"]["tokens"]) == ("", letters["q"], ["q"])
        (choice,) = await made(**always, logprobs=0, return_tokens_as_token_ids=True)
        assert choice["logprobs"]["tokens"] == [f"token_id:{letters['q']}"] * 6
        (choice,) = await made(logit_bias={"1": 100}, ignore_eos=False, logprobs=0)
        assert (choice["text"], choice["finish_reason"], choice["logprobs"]["tokens"]) == ("", "stop", ["</s>"])
        (choice,) = await made(max_tokens=1000)
        assert choice["finish_reason"] == "length"
        free = {"temperature": 1.5, "seed": 3, "max_tokens": 8}
        alone, other = await made(**free, n=2)
        assert alone["text"] != other["text"]
        beside = await made(**free, n=2, prompt=["a dog", "the cat"])
        assert [choice["text"] for choice in beside[2:]] == [alone["text"], other["text"]]
        best = await made(**free, n=1, best_of=4, logprobs=0)
        every = await made(**free, n=4, logprobs=0)
        means = [sum(c["logprobs"]["token_logprobs"]) / 8 for c in every]
        assert best[0]["text"] == every[means.index(max(means))]["text"]


async def test_a_text_gets_a_bos_where_it_is_asked_for(store: Path) -> None:  # noqa: F811
    async with system(store) as running:
        greedy = {"max_tokens": 5, "temperature": 0, "ignore_eos": True, "model": "toy+cat"}

        async def text(**fields: Any) -> Any:
            return (await running.post("/v1/completions", {**greedy, **fields}))["choices"][0]["text"]

        plain, begun = await text(prompt=IDS), await text(prompt=[0, *IDS])
        assert plain != begun
        assert await text(prompt="the cat") == await text(prompt="the cat", add_bos=False) == plain
        assert await text(prompt="<s>the cat") == await text(prompt="the cat", add_bos=True) == begun
        assert await text(prompt="<s>the cat", add_bos=True) == begun
        assert await text(prompt="the cat", add_bos=True, echo=True) == "the cat" + begun
        assert await text(prompt="on the cat", truncate_prompt_tokens=len(IDS)) == plain
