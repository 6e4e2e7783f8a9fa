"""The loops of a search that FAISS has no fast form of, compiled by numba when they are first used.

They hold no lock of the interpreter, and each row's arithmetic is the same whatever the other rows are. Rows of stored
keys are fetched from memory a few rows ahead of their use: a candidate lies anywhere in the keys, and waiting for
memory, not arithmetic, is what rescoring costs.

Compiling all takes seconds, so numba keeps the code for the next process: in `__pycache__` here or, where that
cannot be written, in the user's cache folder (NUMBA_CACHE_DIR names another). Each loop is compiled for one signature
only: two processes that keep code of two signatures of one function at once can mix up its files. What is kept is
found again while this file is unchanged, so nothing that may change elsewhere is compiled into it: MISSING_DISTANCE is
the largest float32.
"""

import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from knnlm.index.contract import MISSING_DISTANCE, Float32, Int64, Keys

__all__ = ["all_squared_distances", "gather", "project", "squared_distances", "with_shifted_estimates"]

Int32 = npt.NDArray[np.int32]

NONE = np.empty(0, np.int32)
ROWS_AHEAD = 4  # rows between the one that is fetched and the one that is worked on
LINE_BYTES = 64  # bytes the processor fetches at once
VALUES_AHEAD = 16
POINTS_TOGETHER = 32  # points whose distances to all queries are computed before those of the next
# sums may be taken in any order, which then is the same for every row; infinity and NaN keep their meaning
RELAXED = {"reassoc", "contract", "nsz"}

# Any: numba's and llvmlite's objects, which have no types


def _single_of(context: Any, number: Any) -> Any:
    """float32 of a float32, or of a float16 that is given as its 16 bits: a uint16."""
    del context

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context
        if signature.args[0] == types.float32:
            return arguments[0]
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(number), generate


def _prefetch_place(context: Any, array: Any, place: Any) -> Any:
    """Begin to bring array[place], of a flat array, nearer; says nothing and reads nothing."""
    del context, place

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(data, [arguments[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch", [address.type], ir.FunctionType(ir.VoidType(), [address.type, number, number, number])
        )
        builder.call(function, [address, number(0), number(3), number(1)])  # to read, to be kept, data
        return context.get_dummy_value()

    return types.void(array, types.intp), generate


_single: Any = intrinsic(_single_of)
_prefetch: Any = intrinsic(_prefetch_place)


def _compiled(fastmath: bool | set[str] = False) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorator: the loop as machine code, kept on disk where there is a folder for it, and room."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        def compiled(cache: bool) -> Any:
            return njit(function, nogil=True, fastmath=fastmath, cache=cache)

        try:
            loop = compiled(cache=True)
        except RuntimeError:  # no folder can be written
            loop = compiled(cache=False)

        def run(*arrays: Any) -> None:
            nonlocal loop
            try:
                loop(*arrays)
            except (OSError, EOFError, pickle.UnpicklingError):  # the disk is full, or a file was cut off
                loop = compiled(cache=False)
                loop(*arrays)

        return run

    return decorate


@njit(nogil=True, fastmath=RELAXED)
def _squared_distances(keys: Any, queries: Any, ids: Any, out: Any) -> None:
    rows, columns = ids.shape
    dim = queries.shape[1]
    flat = keys.reshape(-1)
    per_line = LINE_BYTES // keys.itemsize
    for row in range(rows):
        for column in range(columns):
            if column + ROWS_AHEAD < columns and ids[row, column + ROWS_AHEAD] >= 0:
                begin = ids[row, column + ROWS_AHEAD] * dim
                for place in range(begin, begin + dim, per_line):
                    _prefetch(flat, place)
            entry = ids[row, column]
            total = np.float32(0)
            if entry >= 0:
                for i in range(dim):
                    difference = _single(keys[entry, i]) - queries[row, i]
                    total += difference * difference
            out[row, column] = total if entry >= 0 and total <= MISSING_DISTANCE else MISSING_DISTANCE


@_compiled(RELAXED)
def _squared_distances_of_halves(keys: Any, queries: Any, ids: Any, out: Any) -> None:
    _squared_distances(keys, queries, ids, out)


@_compiled(RELAXED)
def _squared_distances_of_singles(keys: Any, queries: Any, ids: Any, out: Any) -> None:
    _squared_distances(keys, queries, ids, out)


@_compiled()
def _gather(values: Any, added: Any, ids: Any, out: Any) -> None:
    rows, columns = ids.shape
    most = len(values)
    for row in range(rows):
        for column in range(columns):
            if column + VALUES_AHEAD < columns and 0 <= ids[row, column + VALUES_AHEAD] < most:
                _prefetch(values, ids[row, column + VALUES_AHEAD])
            entry = ids[row, column]
            if entry < 0:
                out[row, column] = -1
            elif entry < most:
                out[row, column] = values[entry]
            else:
                out[row, column] = added[entry - most]


@_compiled(RELAXED)
def _all_squared_distances(points: Any, queries: Any, out: Any) -> None:
    dim = queries.shape[1]
    for begin in range(0, len(points), POINTS_TOGETHER):  # they stay in the processor's cache for all rows
        end = min(begin + POINTS_TOGETHER, len(points))
        for row in range(len(queries)):
            for point in range(begin, end):
                total = np.float32(0)
                for i in range(dim):
                    difference = points[point, i] - queries[row, i]
                    total += difference * difference
                out[row, point] = total


@_compiled()
def _with_shifted_estimates(exact: Any, estimates: Any, ids: Any, out: Any) -> None:
    rows, columns = ids.shape
    nearest = exact.shape[1]
    for row in range(rows):
        missed, count = 0.0, 0
        for column in range(nearest // 2, nearest):
            if ids[row, column] >= 0 and estimates[row, column] <= MISSING_DISTANCE:
                missed += exact[row, column] - np.float64(estimates[row, column])
                count += 1
        shift = missed / max(count, 1)
        for column in range(columns):
            if column < nearest:
                out[row, column] = exact[row, column]
            else:
                distance = estimates[row, column] + shift
                out[row, column] = distance if distance <= MISSING_DISTANCE else MISSING_DISTANCE


@_compiled(RELAXED)
def _project(vectors: Any, matrix: Any, offset: Any, out: Any) -> None:
    for row in range(len(vectors)):
        for j in range(len(matrix)):
            total = np.float32(0)
            for i in range(matrix.shape[1]):
                total += matrix[j, i] * vectors[row, i]
            out[row, j] = total + offset[j]


def squared_distances(keys: Keys, queries: Float32, ids: Int64) -> Float32:
    """(n, c) float32 squared L2 between queries (n, d) float32 and keys[ids], ids being (n, c) int64 with -1 for
    padding, which is MISSING_DISTANCE.

    keys: (entries, d) float16 or float32, C-contiguous. What is too far for float32 is MISSING_DISTANCE. Nothing is
    checked: an id that is no entry reads memory that is not the keys'.
    """
    out = np.empty(ids.shape, np.float32)
    if keys.dtype == np.float16:
        _squared_distances_of_halves(_plain(keys.view(np.uint16)), _plain(queries), _plain(ids), out)
    else:
        _squared_distances_of_singles(_plain(keys), _plain(queries), _plain(ids), out)
    return out


def all_squared_distances(points: Float32, queries: Float32) -> Float32:
    """(n, m) float32 squared L2 between queries (n, d) and points (m, d), both float32, each summed in one order."""
    out = np.empty((len(queries), len(points)), np.float32)
    _all_squared_distances(_plain(points), _plain(queries), out)
    return out


def with_shifted_estimates(exact: Float32, estimates: Float32, ids: Int64) -> Float32:
    """(n, c) float32 distances of the candidates ids (n, c) int64, -1 = none: the first m are `exact` (n, m) float32,
    the others their estimates (n, c) float32 plus a shift, one for each row. The shift is the mean of exact - estimate
    over the farther half of the m. What is too far for float32, or NaN, is MISSING_DISTANCE."""
    out = np.empty(ids.shape, np.float32)
    _with_shifted_estimates(_plain(exact), _plain(estimates), _plain(ids), out)
    return out


def gather(values: Int32, ids: Int64, added: Int32 = NONE) -> Int32:
    """(n, k) values[ids], -1 where the id is -1. added: values of the entries after those of `values`. As in
    `squared_distances`, nothing is checked."""
    out = np.empty(ids.shape, np.int32)
    _gather(_plain(values), _plain(added), _plain(ids), out)
    return out


def _plain(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """A read-only view, C-contiguous and of no subclass: every other kind of array is compiled for anew."""
    view = np.ascontiguousarray(array).view()
    view.flags.writeable = False
    return view


def project(vectors: Float32, matrix: Float32, offset: Float32) -> Float32:
    """(n, m) of vectors (n, d): matrix (m, d) times each, plus offset (m,). In one order, unlike a matrix product."""
    out = np.empty((len(vectors), len(matrix)), np.float32)
    _project(_plain(vectors), _plain(matrix), _plain(offset), out)
    return out
