import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import faiss
import numpy as np
import pytest

from knnlm.index.parallel import MIN_PARALLEL_ROWS, in_slices


@pytest.fixture(params=[1, 2, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(request.param)
    yield request.param
    faiss.omp_set_num_threads(before)


def counting(rows: int) -> tuple[np.ndarray, Callable[[int, int], None]]:
    seen = np.zeros(rows, int)

    def work(lo: int, hi: int) -> None:
        seen[lo:hi] += 1

    return seen, work


@pytest.mark.parametrize("rows", [0, 1, MIN_PARALLEL_ROWS, 2 * MIN_PARALLEL_ROWS, 2 * MIN_PARALLEL_ROWS + 1, 103])
def test_every_row_is_worked_on_once(threads: int, rows: int) -> None:
    seen, work = counting(rows)
    in_slices(work, rows)
    assert (seen == 1).all()


def test_as_many_threads_as_faiss_uses(threads: int) -> None:
    together = threading.Barrier(threads, timeout=30)  # breaks unless all slices run at the same time
    names: list[str] = []

    def work(lo: int, hi: int) -> None:
        together.wait()
        names.append(threading.current_thread().name)

    in_slices(work, 100 * threads)
    assert len(set(names)) == threads
    assert threading.current_thread().name in names


def test_few_rows_wake_no_thread(threads: int) -> None:
    names: list[str] = []
    in_slices(lambda *_: names.append(threading.current_thread().name), 2 * MIN_PARALLEL_ROWS - 1)
    assert names == [threading.current_thread().name]


@pytest.mark.parametrize("failing", [0, 99])
def test_failure_of_any_slice_is_raised_when_all_have_ended(threads: int, failing: int) -> None:
    ended: list[int] = []

    def work(lo: int, hi: int) -> None:
        ended.append(lo)
        if lo <= failing < hi:
            raise ArithmeticError(f"row {failing}")

    with pytest.raises(ArithmeticError, match=f"row {failing}"):
        in_slices(work, 100)
    assert len(ended) == threads


def test_many_callers_at_once() -> None:
    before = faiss.omp_get_max_threads()
    works = [counting(50) for _ in range(40)]

    def call(work: Callable[[int, int], None]) -> None:
        faiss.omp_set_num_threads(3)  # of this thread
        in_slices(work, 50)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda pair: call(pair[1]), works))
    assert all((seen == 1).all() for seen, _ in works)
    assert faiss.omp_get_max_threads() == before
