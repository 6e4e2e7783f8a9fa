"""The tokens of a prompt and what would have been likelier, against whole distributions."""

import numpy as np
import pytest

from knnlm.joined import JoinedSearches
from knnlm.mixer import Mixer
from knnlm.options import DomainOptions, KnnOptions
from knnlm.prompts import score_prompt
from tests.test_mixer import TEXT, TOY, BruteForce, Lm
from tests.toys import COUNTS, CountOptions, counts  # noqa: F401  a fixture

TOKENS = TOY.tokenizer.encode(TEXT)[:30]
KNN = KnnOptions((DomainOptions("toy", lmbda=0.4),))


@pytest.mark.parametrize("sources", [None, {"knn": KNN}, {"knn": KNN, COUNTS: CountOptions()}], ids=str)
@pytest.mark.parametrize("top", [0, 3])
@pytest.mark.usefixtures("counts")
async def test_equals_the_whole_distributions(sources: dict[str, object] | None, top: int) -> None:
    mixer = Mixer(Lm(), JoinedSearches(BruteForce()), TOY.info)
    plan = await mixer.plan(sources)
    scored = await score_prompt(mixer, plan, TOKENS, top, {})
    assert [one.token for one in scored.tokens] == TOKENS[1:].tolist()
    for i, one in enumerate(scored.tokens):
        mixed = (await mixer.step(plan, [TOKENS[: i + 1]])).mixed
        row = mixed.log_probs[0]
        assert one.log_prob == pytest.approx(row[one.token], abs=1e-6)
        assert one.lm_log_prob == pytest.approx(mixed.lm_log_probs[0, one.token], abs=1e-6)
        assert [log_prob for _, log_prob in one.top] == pytest.approx(np.sort(row)[::-1][:top].tolist(), abs=1e-6)
        assert dict(one.top).get(one.token, one.log_prob) == one.log_prob
