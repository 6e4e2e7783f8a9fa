"""Recipes that no index has."""

import pytest

from knnlm.errors import InvalidRequest
from knnlm.index.table import family


@pytest.mark.parametrize("recipe", ["", "tree", "IVF8", "1", "auto"])
def test_unknown_family_lists_those_known(recipe: str) -> None:
    with pytest.raises(InvalidRequest, match="families: flat, ivf"):
        family(recipe)


@pytest.mark.parametrize(
    "recipe",
    [
        "flat,sq8",
        "flat8",
        "ivf",
        "ivf0",
        "ivf8,",
        "ivf8,sq3",
        "ivf8,pq",
        "ivf8,pq0",
        "ivf99999999",
        "ivf8,sq8,x",
        "ivf8,pq<M>",
        "ivf8\n",
        "hnsw",
        "hnsw1",
        "hnsw257",
        "hnsw8,",
        "hnsw8,pq8x4fs",
        "hnsw8,rabitqfs",
        "sq3",
        "fp16,flat",
        "pca8,",
        "pca8_4,flat",
        "pca0,sq8",
        "opq,sq8",
        "pca8,flat",
        "faiss:",
    ],
)
def test_malformed_recipe_is_refused(recipe: str) -> None:
    with pytest.raises(InvalidRequest, match=r"is not known|a pre-transform without an index|unknown index recipe"):
        family(recipe)


@pytest.mark.parametrize("recipe", ["faiss:IVF64,Flat,Refine(Flat)", "faiss:PCA16,IVF64,PQ8,RFlat", "faiss:Flat,RFlat"])
def test_a_refinement_of_faiss_is_refused(recipe: str) -> None:
    """It would hide the lists, of which one was visited then, whatever a search asked for."""
    assert "every search is rescored" in str(family(recipe).why_unsuitable(10_000, 40))
