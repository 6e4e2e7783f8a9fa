"""The parts of benchmarks.memory that compute: joint weights, and classes of tokens."""

import numpy as np

from benchmarks.memory import joint_weights, mixed
from benchmarks.token_classes import classes
from knnlm.evaluation.splits import encode
from knnlm.messages import Document
from knnlm.testing import byte_tokenizer


def test_joint_weights_are_the_best_on_a_grid() -> None:
    rng = np.random.default_rng(0)
    log_probs = np.log(rng.dirichlet(np.ones(300), 3))
    log_probs[1, ::3] = -np.inf  # not stored
    found = mixed(log_probs, joint_weights(log_probs)).sum()
    grid = [
        mixed(log_probs, np.array([a, b, 1 - a - b])).sum()
        for a in np.linspace(0.01, 0.98, 60)
        for b in np.linspace(0.01, 0.99 - a, 30)
        if a + b < 1
    ]
    assert found >= max(grid) - 1e-3


def test_tokens_are_classed_by_the_words_that_they_are_parts_of() -> None:
    tokenizer = byte_tokenizer()
    text = "In 1906 the boat of Jacobi sank. The end"
    (document,) = encode([Document("d", text)], tokenizer)
    found = classes(tokenizer, [document])
    assert len(found) == len(document.tokens) - 1 == len(text)
    kinds = {word: set(found[text.index(word) : text.index(word) + len(word)]) for word in text.rstrip().split()}
    assert kinds == {
        "In": {"function words"}, "1906": {"numbers"}, "the": {"function words"}, "boat": {"rest"},
        "of": {"function words"}, "Jacobi": {"names"}, "sank.": {"rest"}, "The": {"function words"}, "end": {"rest"},
    }  # fmt: skip
