"""lm-eval as it is installed in .venv-clients: KIND WHERE CASES [PACKAGES] to scores, one line of JSON.

KIND: `local-completions`, of the service at WHERE, or `hf`, of the model in the folder WHERE. CASES: a file of what to
score, see test_lm_eval.py. PACKAGES: a folder that is looked into last. For each way to send requests: [log-likelihood,
whether greedy] of each pair, the rolling log-likelihood of each text, and what each context goes on with.
"""

import json
import sys
from copy import deepcopy
from pathlib import Path

kind, where, file, *packages = sys.argv[1:]
sys.path += packages

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402

WAYS: dict[str, dict[str, object]] = {
    "tokens": {},
    "tokens in batches": {"batch_size": 4},
    "tokens at once": {"num_concurrent": 4},
    "tokens in batches at once": {"batch_size": 2, "num_concurrent": 2},
    "texts": {"tokenized_requests": False},
    "texts in batches": {"tokenized_requests": False, "batch_size": 4},
}
TOKENS = 24

cases = json.loads(Path(file).read_text(encoding="utf-8"))
until = {"until": cases["until"], "max_gen_toks": TOKENS, "do_sample": False}
asked = {
    "loglikelihood": [tuple(pair) for pair in cases["pairs"]],
    "loglikelihood_rolling": [(text,) for text in cases["texts"]],
    "generate_until": [(context, until) for context in cases["contexts"]],
}


def scores(**arguments: object) -> dict[str, object]:
    """arguments: of the model's class."""
    lm = get_model(kind)(**arguments)
    found = {}
    for method, requests in asked.items():
        # lm-eval takes options out of the dicts that it is given
        instances = [Instance(method, {}, deepcopy(r), i) for i, r in enumerate(requests)]
        found[method] = getattr(lm, method)(instances)
    return found


if kind == "hf":
    # windows of an API with the same max_length have two tokens less; what hf keeps of contexts is wrong for pairs that
    # only differ in where the context ends
    options = {"device": "cpu", "dtype": "float32", "max_length": cases["max_length"] - 2, "logits_cache": False}
    given: dict[str, dict[str, object]] = {"": {"pretrained": where, **options}}
else:
    url = f"{where}/v1/completions"
    shared = {"base_url": url, "model": cases["model"], "max_length": cases["max_length"]}
    given = {name: {**shared, **way} for name, way in WAYS.items()}
print(json.dumps({name: scores(**arguments) for name, arguments in given.items()}))
