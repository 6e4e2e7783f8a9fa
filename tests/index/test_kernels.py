"""Loops that check nothing: every tail, every half, padding, and what lies beyond float32."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from knnlm.index import kernels
from knnlm.index.kernels import all_squared_distances, gather, project, squared_distances

# every loop once with the arrays that searches give it, and with slices, maps and arrays that may be written
EVERY_LOOP = """
import sys, numpy as np
from knnlm.index.kernels import all_squared_distances, gather, project, squared_distances, with_shifted_estimates
if sys.argv[1:]:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
points, ids = np.arange(36, dtype=np.float32).reshape(9, 4), np.arange(72).reshape(9, 8) % 9
view = points[:]; view.flags.writeable = False
answers = []
for array in (points, view, points[::2]):
    for kind in (np.float16, np.float32):
        distances = squared_distances(points.astype(kind), array, ids[: len(array), ::2])
        answers += [distances, squared_distances(np.memmap("keys", kind, "w+", shape=(9, 4)), array, ids[: len(array)])]
    answers += [
        all_squared_distances(points, array), project(array, points, points[:, 0]),
        gather(np.arange(6, dtype=np.int32), ids, np.arange(3, dtype=np.int32)),
        with_shifted_estimates(distances[:, :2], distances + 1, ids[: len(array), :4]),
    ]
print([float(answer.sum()) for answer in answers])
"""
LOOPS = 6
ROOT = Path(__file__).resolve().parents[2]

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


def run_every_loop(folder: Path, *arguments: str) -> str:
    command = [sys.executable, "-B", "-c", EVERY_LOOP, *arguments]
    told = {"NUMBA_CACHE_DIR": str(folder / "kept"), "NUMBA_DEBUG_CACHE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=told, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_machine_code_is_kept_of_one_signature_of_every_loop(tmp_path: Path) -> None:
    """Two processes that keep code of two signatures of one function at once can mix up its files. One that was cut
    off, and a full disk, only cost the time to compile."""
    answers = run_every_loop(tmp_path).splitlines()[-1]
    cut_off, lost, *whole = sorted((tmp_path / "kept").rglob("*.nbc"))
    assert 2 + len(whole) == LOOPS
    cut_off.write_bytes(cut_off.read_bytes()[:100])
    lost.unlink()
    said = run_every_loop(tmp_path, "1000")  # bytes a file may have
    assert all(f"data loaded from '{path}'" in said for path in whole)
    assert not lost.exists()
    assert said.splitlines()[-1] == answers


def test_loops_are_compiled_where_no_folder_can_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("numba.core.caching.CacheImpl._locator_classes", [])
    doubled = np.zeros(3)

    @kernels._compiled()
    def double(numbers: npt.NDArray[np.float64], out: npt.NDArray[np.float64]) -> None:
        for i in range(len(numbers)):
            out[i] = 2 * numbers[i]

    double(np.arange(3.0), doubled)
    assert doubled.tolist() == [0, 2, 4]
