"""Rows of a batch worked on by all processors that this process may use, in threads that let go of the interpreter."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import faiss

__all__ = ["in_slices"]

MIN_PARALLEL_ROWS = 4  # rows for which a second thread is worth waking, each of some hundred microseconds

_lock = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def in_slices(work: Callable[[int, int], None], rows: int) -> None:
    """Call work(lo, hi) for slices that cover [0, rows), one in this thread and the others beside it.

    As many as FAISS uses threads, so that OMP_NUM_THREADS holds for both. Raises what the first failing slice raised,
    when all have ended.
    """
    threads = max(1, min(faiss.omp_get_max_threads(), rows // MIN_PARALLEL_ROWS))
    if threads == 1:
        work(0, rows)
        return
    edges = [rows * i // threads for i in range(threads + 1)]
    others = [_pool(threads - 1).submit(work, edges[i], edges[i + 1]) for i in range(1, threads)]
    try:
        work(edges[0], edges[1])
    finally:
        failures = [other.exception() for other in others]
    for failure in failures:
        if failure is not None:
            raise failure


def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for the life of the process: starting threads costs as much as a slice."""
    with _lock:
        if threads not in _pools:
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="search")
        return _pools[threads]
