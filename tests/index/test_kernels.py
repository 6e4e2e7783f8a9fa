"""Loops that check nothing: every tail, every half, padding, and what lies beyond float32."""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.index.kernels import all_squared_distances, gather, project, squared_distances

MISSING_DISTANCE = np.finfo(np.float32).max
DTYPES = [np.float16, np.float32]


def some(seed: int, *shape: int) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def true(
    keys: npt.NDArray[np.floating], queries: npt.NDArray[np.float32], ids: npt.NDArray[np.int64]
) -> npt.NDArray[np.float64]:
    distances: npt.NDArray[np.float64] = np.square(keys[ids].astype(np.float64) - queries[:, None]).sum(axis=2)
    return distances


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 3, 8, 15, 16, 17, 31, 32, 33, 63, 100, 257])
def test_distances_are_true_in_every_dimension(dtype: type[np.floating], dim: int) -> None:
    keys, queries = some(0, 50, dim).astype(dtype), some(1, 7, dim)
    ids = np.random.default_rng(2).integers(-1, 50, (7, 30))
    distances = squared_distances(keys, queries, ids)
    np.testing.assert_allclose(distances[ids >= 0], true(keys, queries, ids)[ids >= 0], rtol=1e-5)
    assert (distances[ids < 0] == MISSING_DISTANCE).all()
    assert distances.dtype == np.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_same_alone_and_at_any_place(dtype: type[np.floating]) -> None:
    keys, queries = some(0, 100, 37).astype(dtype), some(1, 20, 37)
    ids = np.random.default_rng(2).integers(-1, 100, (20, 33))
    whole = squared_distances(keys, queries, ids)
    order = np.random.default_rng(3).permutation(33)
    np.testing.assert_array_equal(
        squared_distances(keys, queries, np.ascontiguousarray(ids[:, order])), whole[:, order]
    )
    for row in range(20):
        np.testing.assert_array_equal(
            squared_distances(keys, queries[row : row + 1], ids[row : row + 1])[0], whole[row]
        )


@pytest.mark.parametrize("points", [1, 31, 32, 33, 200])
def test_distances_to_all_points_are_true_and_the_same_alone(points: int) -> None:
    centroids, queries = some(0, points, 37), some(1, 9, 37)
    every = np.tile(np.arange(points), (9, 1))
    distances = all_squared_distances(centroids, queries)
    np.testing.assert_allclose(distances, true(centroids, queries, every), rtol=1e-5)
    for row in range(9):
        np.testing.assert_array_equal(all_squared_distances(centroids, queries[row : row + 1])[0], distances[row])


def test_values_of_added_entries_follow_those_of_the_others() -> None:
    values, added = np.arange(50, dtype=np.int32), np.arange(100, 140, dtype=np.int32)
    ids = np.random.default_rng(0).integers(-1, 90, (7, 40))
    whole = np.concatenate([values, added])
    np.testing.assert_array_equal(gather(values, ids, added), np.where(ids >= 0, whole[ids], -1))
    np.testing.assert_array_equal(gather(values[:0], ids % 40, added), added[ids % 40])


def test_slices_of_larger_arrays_are_read_right() -> None:
    """As threads are given them, columns cut off included."""
    keys, queries = some(0, 100, 20), some(1, 9, 20)
    ids = np.random.default_rng(2).integers(0, 100, (9, 40))
    np.testing.assert_allclose(
        squared_distances(keys, queries[3:8], ids[3:8, :11]), true(keys, queries, ids)[3:8, :11], rtol=1e-5
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_in_a_file_that_is_only_read(tmp_path: Path, dtype: type[np.floating]) -> None:
    np.save(tmp_path / "keys.npy", some(0, 60, 24).astype(dtype))
    keys, queries = np.load(tmp_path / "keys.npy", mmap_mode="r"), some(1, 4, 24)
    ids = np.random.default_rng(2).integers(0, 60, (4, 10))
    np.testing.assert_allclose(squared_distances(keys, queries, ids), true(np.array(keys), queries, ids), rtol=1e-5)


def test_every_half_converts_exactly() -> None:
    """Subnormal ones too; the others of 65536 are infinite or no number."""
    bits = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = bits[np.isfinite(bits)][:, None]  # (m, 1): a key of one dimension each
    distances = squared_distances(finite, np.zeros((1, 1), np.float32), np.arange(len(finite))[None])
    np.testing.assert_array_equal(distances[0], np.square(finite[:, 0].astype(np.float32)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1e19, 3e38])
def test_beyond_float32_is_far_and_finite(dtype: type[np.floating], size: float) -> None:
    queries = np.full((2, 16), size, np.float32)
    queries[1, ::2] *= -1
    distances = squared_distances(np.ones((3, 16), dtype), queries, np.array([[0, 1, -1], [2, 1, 0]]))
    assert (distances == MISSING_DISTANCE).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_that_are_no_numbers_are_far(dtype: type[np.floating]) -> None:
    keys = np.array([[np.nan, 0], [np.inf, 0], [0, 0]], dtype)
    assert squared_distances(keys, np.zeros((1, 2), np.float32), np.array([[0, 1, 2]])).tolist() == [
        [MISSING_DISTANCE, MISSING_DISTANCE, 0]
    ]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_nothing_asked_gives_nothing(shape: tuple[int, int]) -> None:
    ids = np.empty(shape, np.int64)
    assert squared_distances(some(0, 3, 8), some(1, shape[0], 8), ids).shape == shape
    assert gather(np.arange(3, dtype=np.int32), ids).shape == shape


@pytest.mark.parametrize("columns", [1, 15, 16, 17, 40])
def test_gather_is_indexing_with_padding(columns: int) -> None:
    values = np.random.default_rng(0).integers(0, 1000, 500).astype(np.int32)
    values.setflags(write=False)
    ids = np.random.default_rng(1).integers(0, 500, (6, columns))
    ids[::2, -1] = -1
    np.testing.assert_array_equal(gather(values, ids), np.where(ids >= 0, values[ids], -1))


@pytest.mark.parametrize(("dim", "out"), [(1, 1), (17, 5), (33, 40)])
def test_projection_is_a_matrix_product_row_by_row(dim: int, out: int) -> None:
    vectors, matrix, offset = some(0, 9, dim), some(1, out, dim), some(2, out)
    whole = project(vectors, matrix, offset)
    np.testing.assert_allclose(whole, vectors @ matrix.T + offset, rtol=1e-4, atol=1e-5)
    for row in range(9):
        np.testing.assert_array_equal(project(vectors[row : row + 1], matrix, offset)[0], whole[row])
