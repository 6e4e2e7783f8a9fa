"""Exact search on a device is the brute force, bit for bit: whatever the batch, the rounding and the ties."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import faiss
import numpy as np
import numpy.typing as npt
import pytest
import torch

from knnlm.datastore.reader import Datastore
from knnlm.errors import DatastoreError, InsufficientMemory, InvalidRequest
from knnlm.index.build import build_index
from knnlm.index.device import DeviceIndex, _two_halves, open_on_device, pick_device
from knnlm.index.searcher import Searcher
from knnlm.messages import SearchRequest
from knnlm.options import SearchOptions
from tests.index.helpers import brute_force, clustered, datastore

Floats = npt.NDArray[np.floating]
Float32 = npt.NDArray[np.float32]
Int64 = npt.NDArray[np.int64]
MISSING_DISTANCE = np.finfo(np.float32).max
DIM = 24
GPU = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"))
DEVICES = ["cpu", GPU]
SMALL = 1 << 16  # of workspace: cuts searches into many chunks of keys and blocks of queries


def twin(keys: Floats, queries: Float32, k: int) -> tuple[Float32, Int64]:
    """Every query against every key, in the order of summation that the index promises."""
    with np.errstate(over="ignore"):
        squares = np.square(keys.astype(np.float32)[None] - queries[:, None])  # (n, entries, d)
        width = squares.shape[2]
        while width > 1:
            half = (width + 1) // 2
            squares[:, :, : width - half] += squares[:, :, half:width]
            width = half
    distances = np.minimum(squares[:, :, 0], MISSING_DISTANCE)
    ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, ids, axis=1), ids


def index(keys: Floats, device: str = "cpu", *, workspace: int = SMALL, halves: bool | None = None) -> DeviceIndex:
    opened = DeviceIndex.load(keys, pick_device(device), workspace)
    return DeviceIndex(opened._keys, opened._norms, workspace, halves=halves)


def same(index: DeviceIndex, keys: Floats, queries: Float32, k: int) -> None:
    distances, ids = index.search(queries, k)
    expected, expected_ids = twin(keys, queries, k)
    assert distances.dtype == np.float32
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(distances, expected)


@pytest.fixture(scope="module")
def queries() -> Float32:
    return clustered(20, DIM, seed=1)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "halves"), [(np.float32, False), (np.float16, False), (np.float16, True)])
@pytest.mark.parametrize("k", [1, 100, 900, 1500])
def test_it_is_brute_force_bit_for_bit(
    device: str, dtype: type[np.floating], halves: bool, k: int, queries: Float32
) -> None:
    keys = clustered(1500, DIM).astype(dtype)
    same(index(keys, device, halves=halves), keys, queries, k)


def test_the_twin_itself_is_near_the_true_distances(queries: Float32) -> None:
    keys = clustered(300, DIM)
    distances, ids = twin(keys, queries, 300)
    true, _ = brute_force(keys, queries, 300)
    np.testing.assert_allclose(distances, true, rtol=1e-6)
    assert (np.sort(ids, axis=1) == np.arange(300)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("halves", [False, True])
def test_an_answer_does_not_depend_on_the_batch(device: str, halves: bool, queries: Float32) -> None:
    keys = clustered(3000, DIM).astype(np.float16)
    opened = index(keys, device, workspace=1 << 20, halves=halves)
    together = opened.search(queries, 50)
    for row in range(len(queries)):
        distances, ids = opened.search(queries[row : row + 1].copy(), 50)
        np.testing.assert_array_equal(distances[0], together[0][row])
        np.testing.assert_array_equal(ids[0], together[1][row])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("halves", [False, True])
def test_of_equal_keys_the_lowest_ids_are_kept_however_many_there_are(device: str, halves: bool) -> None:
    keys = clustered(4000, DIM).astype(np.float16)
    keys[np.random.default_rng(0).permutation(4000)[:2500]] = keys[0]
    same(index(keys, device, halves=halves), keys, keys[:1].astype(np.float32) + 0.1, 40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("halves", [False, True])
def test_distances_that_cancel_in_a_product_are_found_all_the_same(device: str, halves: bool) -> None:
    """Far from the origin and close together, products tell nothing of who is nearest."""
    rng = np.random.default_rng(2)
    keys = (200 + 0.5 * rng.standard_normal((2000, DIM))).astype(np.float16)
    queries = (200 + 0.5 * rng.standard_normal((5, DIM))).astype(np.float32)
    same(index(keys, device, halves=halves), keys, queries, 30)


def test_products_alone_would_have_been_wrong_there() -> None:
    rng = np.random.default_rng(2)
    keys = (200 + 0.5 * rng.standard_normal((2000, DIM))).astype(np.float16).astype(np.float32)
    query = (200 + 0.5 * rng.standard_normal((1, DIM))).astype(np.float32)
    scores = np.square(keys).sum(axis=1) - 2 * (keys @ query[0])
    wrong = set(np.argsort(scores)[:94]) - set(np.argsort(scores)[:30])
    _, expected = twin(keys, query, 30)
    assert wrong & set(expected[0].tolist())  # some of the 30 are not even among the first


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-41, 1e-36, 1e-20, 1e6, 1e19, 1e37])
def test_tiny_and_huge_queries_are_searched_truly(device: str, halves: bool, scale: float) -> None:
    keys = clustered(500, DIM).astype(np.float16)
    queries = (scale * clustered(3, DIM, seed=4)).astype(np.float32)
    same(index(keys, device, halves=halves), keys, queries, 20)


@pytest.mark.parametrize("device", DEVICES)
def test_keys_whose_squares_overflow_are_far_and_not_lost(device: str) -> None:
    keys = clustered(500, DIM)
    keys[::2] *= np.float32(1e25)
    same(index(keys, device), keys, clustered(3, DIM, seed=4), 400)
    same(index(keys, device), keys, keys[:2], 400)


def test_more_neighbors_than_entries_are_padded(queries: Float32) -> None:
    keys = clustered(5, DIM)
    distances, ids = index(keys).search(queries, 8)
    expected, expected_ids = twin(keys, queries, 5)
    np.testing.assert_array_equal(distances[:, :5], expected)
    np.testing.assert_array_equal(ids[:, :5], expected_ids)
    assert (ids[:, 5:] == -1).all()
    assert (distances[:, 5:] == MISSING_DISTANCE).all()


def test_no_entries_and_no_queries(queries: Float32) -> None:
    _, ids = index(np.zeros((0, DIM), np.float16)).search(queries, 3)
    assert (ids == -1).all()
    assert ids.shape == (len(queries), 3)
    distances, ids = index(clustered(5, DIM)).search(np.zeros((0, DIM), np.float32), 3)
    assert distances.shape == ids.shape == (0, 3)


@pytest.mark.parametrize("dim", [1, 2, 3, 37])
def test_any_dimension(dim: int) -> None:
    keys = clustered(400, dim).astype(np.float16)
    same(index(keys), keys, clustered(4, dim, seed=5), 30)


@pytest.mark.parametrize("device", DEVICES)
def test_threads_get_what_each_asked_for(device: str) -> None:
    keys = clustered(2000, DIM).astype(np.float16)
    opened = index(keys, device)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda seed: same(opened, keys, clustered(6, DIM, seed=seed), 25), range(32)))


def test_it_says_what_it_is_and_what_it_holds() -> None:
    opened = open_on_device(clustered(100, DIM).astype(np.float16), "cpu")
    assert (opened.exact, opened.memory, opened.efforts) == (True, "device", {})
    assert opened.memory_bytes == 100 * (2 * DIM + 4)


@pytest.mark.parametrize("device", DEVICES)
def test_what_does_not_fit_is_refused_before_it_is_read(device: str) -> None:
    keys = np.broadcast_to(np.float16(0), (1 << 31, 1 << 20))  # of 4 PiB, in no memory at all
    with pytest.raises(InsufficientMemory, match=r"keys would hold 4\d{3}\.\d TiB \(\d+ bytes\).* bytes\)"):
        open_on_device(keys, device)


def test_keys_of_another_kind_are_refused() -> None:
    with pytest.raises(DatastoreError, match="float64"):
        open_on_device(np.zeros((3, 2)), "cpu")
    with pytest.raises(DatastoreError, match="fewer than 4294967296 entries"):
        open_on_device(np.broadcast_to(np.float16(0), (1 << 32, 1)), "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:x", "cpu:0", "CPU", "cuda:0:1"])
def test_other_names_of_devices_are_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="device must be cpu, cuda or cuda:N"):
        pick_device(name)


def test_a_device_that_is_not_there_is_said_to_be_missing() -> None:
    with pytest.raises(DatastoreError, match=rf"'cuda:99' is not there.* sees {torch.cuda.device_count()} GPUs"):
        open_on_device(clustered(3, DIM), "cuda:99")


def test_without_torch_it_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from knnlm.errors import DatastoreError\n"
        "from knnlm.index.device import pick_device\n"
        "try: pick_device('cuda')\n"
        "except DatastoreError as err: print(err.message)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "knnlm[gpu]" in done.stdout


@pytest.mark.parametrize("scale", [1e-37, 1e-20, 1.0, 1e30])
def test_two_halves_hold_a_query_to_22_bits(scale: float) -> None:
    queries = torch.from_numpy((scale * clustered(50, DIM, seed=6)).astype(np.float32))
    halves, factor = _two_halves(queries)
    assert halves.dtype == torch.float16
    assert halves.isfinite().all()
    whole = (halves[:50].double() + halves[50:].double() / 2**11) * factor.double() / -2
    lengths = queries.double().norm(dim=1)
    assert ((whole - queries.double()).norm(dim=1) <= 2**-22 * lengths + 1e-37).all()


def test_a_searcher_over_it_answers_as_over_flat(tmp_path: Path, queries: Float32) -> None:
    keys = clustered(700, DIM)
    path = datastore(tmp_path, keys, key_dtype="float16")
    stored = Datastore.open(path)
    searcher = Searcher(stored, open_on_device(stored.keys, "cpu"), recipe="flat")
    request = SearchRequest("toy", queries, SearchOptions(k=60), ids=True)
    found, expected = searcher.search(request).neighbors, Searcher.open(path, index="flat").search(request).neighbors
    np.testing.assert_array_equal(found.ids, expected.ids)
    np.testing.assert_array_equal(found.values, expected.values)
    np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-6)
    assert searcher.memory.index == "device"


def test_what_does_not_fit_is_named_by_its_file(tmp_path: Path) -> None:
    stored = Datastore.open(datastore(tmp_path, clustered(10, DIM)))
    with pytest.raises(InsufficientMemory, match=r"/toy/v1/keys\.npy would hold"):
        DeviceIndex.load(stored.keys, pick_device("cpu"), workspace=1 << 50)


@pytest.mark.skipif(hasattr(faiss, "StandardGpuResources"), reason="this faiss knows GPUs")
def test_lists_on_a_gpu_need_another_faiss_and_it_says_which(tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match=r"ivf8,sq8 .* device cuda: .*faiss-gpu.*choose index flat"):
        open_on_device(clustered(10, DIM), "cuda", "ivf8,sq8", tmp_path / "index.faiss", {"nprobe": 2})
    with pytest.raises(InvalidRequest, match="device must be cuda or cuda:N"):
        open_on_device(clustered(10, DIM), "cpu", "ivf8,sq8", tmp_path / "index.faiss", {"nprobe": 2})


@pytest.mark.skipif(
    not hasattr(faiss, "StandardGpuResources") or not faiss.get_num_gpus(),
    reason="there is no GPU, or faiss knows none",
)
def test_lists_on_a_gpu_find_what_they_find_on_the_cpu(tmp_path: Path, queries: Float32) -> None:
    path = datastore(tmp_path, clustered(3000, DIM), key_dtype="float16")
    build_index(path, "ivf16,sq8")
    request = SearchRequest("toy", queries, SearchOptions(k=50, nprobe=16), ids=True)
    found = Searcher.open(path, device="cuda").search(request).neighbors
    expected = Searcher.open(path).search(request).neighbors
    np.testing.assert_array_equal(found.ids, expected.ids)
    with pytest.raises(InvalidRequest, match="at most 2048"):
        Searcher.open(path, device="cuda").search(SearchRequest("toy", queries, SearchOptions(k=2500)))
