"""The loops of a search that FAISS has no fast form of, compiled by numba when they are first used.

They hold no lock of the interpreter, and each row's arithmetic is the same whatever the other rows are. Rows of stored
keys are fetched from memory a few rows ahead of their use: a candidate lies anywhere in the keys, and waiting for
memory, not arithmetic, is what rescoring costs.
"""

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


def _half_of(context: Any, bits: Any) -> Any:
    """float32 of a float16 that is given as its 16 bits."""
    del context, bits

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        del context, signature
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


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


_half: Any = intrinsic(_half_of)
_prefetch: Any = intrinsic(_prefetch_place)


@njit(nogil=True)
def _single(number: Any) -> Any:
    return number


def _squared_distances(widened: Any, per_line: int) -> Any:
    """The loop for one dtype of keys. widened: float32 of a stored number; per_line: stored numbers in LINE_BYTES
    bytes."""

    @njit(nogil=True, fastmath=RELAXED)
    def loop(keys: Any, queries: Any, ids: Any, out: Any) -> None:
        rows, columns = ids.shape
        dim = queries.shape[1]
        flat = keys.reshape(-1)
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
                        difference = widened(keys[entry, i]) - queries[row, i]
                        total += difference * difference
                out[row, column] = total if entry >= 0 and total <= MISSING_DISTANCE else MISSING_DISTANCE

    return loop


_of_halves = _squared_distances(_half, LINE_BYTES // 2)
_of_singles = _squared_distances(_single, LINE_BYTES // 4)


@njit(nogil=True)
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


@njit(nogil=True, fastmath=RELAXED)
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


@njit(nogil=True)
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


@njit(nogil=True, fastmath=RELAXED)
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
    raw = np.asarray(keys)  # numba knows no maps
    if raw.dtype == np.float16:
        _of_halves(raw.view(np.uint16), queries, ids, out)
    else:
        _of_singles(raw, queries, ids, out)
    return out


def all_squared_distances(points: Float32, queries: Float32) -> Float32:
    """(n, m) float32 squared L2 between queries (n, d) and points (m, d), both float32, each summed in one order."""
    out = np.empty((len(queries), len(points)), np.float32)
    _all_squared_distances(points, queries, out)
    return out


def with_shifted_estimates(exact: Float32, estimates: Float32, ids: Int64) -> Float32:
    """(n, c) float32 distances of the candidates ids (n, c) int64, -1 = none: the first m are `exact` (n, m) float32,
    the others their estimates (n, c) float32 plus a shift, one for each row. The shift is the mean of exact - estimate
    over the farther half of the m. What is too far for float32, or NaN, is MISSING_DISTANCE."""
    out = np.empty(ids.shape, np.float32)
    _with_shifted_estimates(exact, estimates, ids, out)
    return out


def gather(values: Int32, ids: Int64, added: Int32 = NONE) -> Int32:
    """(n, k) values[ids], -1 where the id is -1. added: values of the entries after those of `values`. As in
    `squared_distances`, nothing is checked."""
    out = np.empty(ids.shape, np.int32)
    _gather(_read_only(values), _read_only(added), ids, out)
    return out


def _read_only(array: Int32) -> Int32:
    """A view: maps are read-only already, and every other kind is compiled for anew."""
    view = np.asarray(array).view()
    view.flags.writeable = False
    return view


def project(vectors: Float32, matrix: Float32, offset: Float32) -> Float32:
    """(n, m) of vectors (n, d): matrix (m, d) times each, plus offset (m,). In one order, unlike a matrix product."""
    out = np.empty((len(vectors), len(matrix)), np.float32)
    _project(vectors, matrix, offset, out)
    return out
