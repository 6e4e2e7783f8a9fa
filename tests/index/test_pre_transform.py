from typing import Any

import faiss
import numpy as np
import pytest

from knnlm.errors import InvalidRequest
from knnlm.index.pre_transform import PreTransform, Projection, split
from tests.index.helpers import clustered


@pytest.mark.parametrize(
    ("recipe", "pre_transform", "rest"),
    [
        ("ivf8,sq8", None, "ivf8,sq8"),
        ("pca64,ivf8,sq8", PreTransform("pca", 64), "ivf8,sq8"),
        ("pcar64,ivf8,sq8", PreTransform("pcar", 64), "ivf8,sq8"),
        ("opq16,pq16", PreTransform("opq", None, 16), "pq16"),
        ("opq16_64,ivf8", PreTransform("opq", 64, 16), "ivf8"),
    ],
)
def test_recipe_is_split(recipe: str, pre_transform: PreTransform | None, rest: str) -> None:
    assert split(recipe) == (pre_transform, rest, False)
    if pre_transform is not None:
        assert split(recipe + "+fp16") == (pre_transform, rest, True)


@pytest.mark.parametrize(
    "recipe", ["pca,sq8", "pca8_4,sq8", "pcar8_4,sq8", "pca0,sq8", "opq_4,sq8", "opq4_,sq8", "pcax,sq8", "pca8"]
)
def test_malformed_front_is_refused(recipe: str) -> None:
    with pytest.raises(InvalidRequest, match=r"pre-transform .* is not known|a pre-transform without an index"):
        split(recipe)


@pytest.mark.parametrize(
    ("pre_transform", "entries", "message"),
    [
        ("pca17", 1000, "pca cannot make 17 dimensions of 16"),
        ("opq4_32", 1000, "opq cannot make 32 dimensions of 16"),
        ("opq3", 1000, "3 equal parts, 16 dimensions cannot be"),
        ("opq4_10", 1000, "4 equal parts, 10 dimensions cannot be"),
        ("pca8", 15, "learned from at least 16 entries, there are 15"),
        ("opq4", 255, "learned from at least 256 entries, there are 255"),
        ("pca8", 16, None),
        ("opq4_12", 256, None),
    ],
)
def test_front_says_why_it_does_not_suit(pre_transform: str, entries: int, message: str | None) -> None:
    why_not = PreTransform.parse(pre_transform).why_unsuitable(entries, 16)
    assert why_not is None if message is None else message in str(why_not)


@pytest.mark.parametrize("factory", ["PCA6,Flat", "PCAR6,Flat", "OPQ3_6,Flat", "RR10,Flat", "PCA8,RR6,Flat"])
def test_projection_is_the_chain_row_by_row(factory: str) -> None:
    keys = clustered(400, 10)
    index: Any = faiss.index_factory(10, factory)
    index.train(keys)
    assert Projection.possible(index.chain)
    project = Projection(index.chain)
    whole = project(keys[:20])
    steps: Any = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
    expected = keys[:20]
    for step in steps:
        expected = step.apply(expected)
    np.testing.assert_allclose(whole, expected, rtol=1e-3, atol=1e-4)
    for row in range(20):
        np.testing.assert_array_equal(project(keys[row : row + 1])[0], whole[row])


def test_what_is_not_linear_is_left_to_faiss() -> None:
    index: Any = faiss.index_factory(10, "L2norm,Flat")
    assert not Projection.possible(index.chain)
