"""Exact search on a device: every key in its memory, products of matrices, the smallest of every row. Needs torch.

A search has two halves. Scores |x|^2 - 2 q.x come from matrix products and carry their rounding, which depends on the
batch; the candidates they give are rescored by true differences, summed in one fixed order. Then the k nearest are
*proven*: a bound on the scores' error tells how near an entry that is no candidate can be. Where the bound cannot tell
(equal keys at the k-th place), a second pass takes every entry that it does not rule out. So the answer is that of
rescoring all entries, whatever the batch, the device or the order in which it works.
"""

import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from knnlm.errors import DatastoreError, InsufficientMemory, InvalidRequest
from knnlm.index.contract import DEFAULTS, MISSING_DISTANCE, Float32, Index, Int64, Keys, Parameters, chunks
from knnlm.index.memory import readable, require
from knnlm.options import SearchOptions

if TYPE_CHECKING:
    import torch

__all__ = ["DeviceIndex", "open_on_device", "pick_device"]

WORKSPACE = {"cpu": 1 << 28, "cuda": 1 << 30}  # bytes that a search may take on the device beside the keys
ROWS = 1024  # queries worked on at once: more do not make products faster
LEAST_SPARE = 64  # candidates beside the k, ...
SPARE = 1 / 8  # ... and as a share of k: fewer, and the proof fails more often
LO = 2.0**11  # the lower of a query's two halves is held multiplied by this
ID_BITS = 32

# Bounds on rounding. Products are summed in float32, on tensor cores by cutting off digits: d * ACCUMULATION * |q||x|.
# A query in two halves keeps 22 bits: HALVES * |q||x|. TINY covers what underflows.
ACCUMULATION = 2.0**-23
HALVES = 2.0**-21
TINY = 1e-30
LARGEST = 2.0**126  # scores beyond overflow: nothing is proven then


def open_on_device(
    keys: Keys, device: str, recipe: str = "flat", file: Path | None = None, parameters: Parameters | None = None
) -> Index:
    """The index of a recipe on device cuda or cuda:N; exact search also on cpu, by the same code.

    "flat" takes the stored keys (n, d), float16 or float32, as they are, read chunk by chunk; for all others see
    gpu.py. Raises InsufficientMemory before anything is loaded, DatastoreError when torch, FAISS's GPU part or the
    device is not there, InvalidRequest for another name of a device.
    """
    if recipe != "flat":
        from knnlm.index.gpu import open_on_gpu

        return open_on_gpu(file, recipe, parameters or {}, device)
    target = pick_device(device)
    return DeviceIndex.load(keys, target, WORKSPACE[target.type])


def pick_device(device: str) -> "torch.device":
    """Raises InvalidRequest for a name other than cpu, cuda, cuda:N, and DatastoreError when it is not there."""
    kind, _, number = device.partition(":")
    if kind not in ("cpu", "cuda") or (":" in device and (kind == "cpu" or not number.isdigit())):
        raise InvalidRequest(f"device must be cpu, cuda or cuda:N, got {device!r}", param="device")
    try:
        import torch
    except ImportError as err:
        raise DatastoreError(
            f"exact search on device {device} needs torch, which is not installed: install knnlm[gpu]", param="device"
        ) from err
    if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
        raise DatastoreError(
            f"device {device!r} is not there: torch {torch.__version__} sees {torch.cuda.device_count()} GPUs",
            param="device",
        )
    return torch.device(device)


class DeviceIndex(Index):
    """Its answers are sorted by (distance, id) already. Searches of several threads run one after the other, so that
    what they take on the device is bounded."""

    exact = True
    memory = "device"

    @classmethod
    def load(cls, keys: Keys, device: "torch.device", workspace: int) -> Self:
        """keys: (n, d). workspace: bytes that searches may take on the device."""
        import torch

        n, dim = keys.shape
        path = Path(getattr(keys, "filename", None) or "keys")
        if keys.dtype not in (np.float16, np.float32):
            raise DatastoreError(f"{path}: keys on a device must be float16 or float32, got {keys.dtype}")
        if n >= 1 << ID_BITS:
            raise DatastoreError(f"{path}: a device takes fewer than {1 << ID_BITS} entries, there are {n}")
        _require(n * (dim * keys.dtype.itemsize + 4) + workspace, path, device)
        try:
            stored = torch.empty((n, dim), dtype=getattr(torch, keys.dtype.name), device=device)
            norms = torch.empty(n, dtype=torch.float32, device=device)
            for lo, hi in chunks(n, dim):
                stored[lo:hi].copy_(torch.from_numpy(np.array(keys[lo:hi])))
                norms[lo:hi] = stored[lo:hi].to(torch.float64).square_().sum(dim=1)
        except torch.OutOfMemoryError as err:
            raise InsufficientMemory(f"{path} does not fit on {device}: {err}", param="device") from err
        return cls(stored, norms, workspace)

    def __init__(
        self, keys: "torch.Tensor", norms: "torch.Tensor", workspace: int, *, halves: bool | None = None
    ) -> None:
        """keys: (n, d) and norms: (n,) float32, the squares of their lengths, on one device. halves: multiply in
        float16, each query as the sum of two; by default where keys are float16 and the device is none of the CPU's.
        """
        self._keys = keys
        self._norms = norms
        self._workspace = workspace
        self._half = keys.dtype.itemsize == 2
        self._halves = self._half and keys.device.type != "cpu" if halves is None else halves
        self._longest = math.sqrt(float(norms.max())) if len(norms) else 0.0
        self._searching = threading.Lock()

    @property
    def memory_bytes(self) -> int:
        return self._keys.nbytes + self._norms.nbytes

    def search(self, queries: Float32, k: int, options: SearchOptions = DEFAULTS) -> tuple[Float32, Int64]:
        """Raises InsufficientMemory when others have taken what searches need on the device."""
        import torch

        del options
        n = len(queries)
        distances, ids = np.full((n, k), MISSING_DISTANCE, np.float32), np.full((n, k), -1, np.int64)
        k = min(k, len(self._keys))
        if not k:
            return distances, ids
        candidates = min(len(self._keys), k + max(LEAST_SPARE, math.ceil(SPARE * k)))
        rows = max(1, min(ROWS, self._workspace // (256 * candidates)))
        with self._searching, torch.inference_mode():
            for lo in range(0, n, rows):
                block = torch.from_numpy(queries[lo : lo + rows]).to(self._keys.device)
                try:
                    packed = self._nearest(block, k, candidates)
                except torch.OutOfMemoryError as err:
                    raise InsufficientMemory(f"no room for a search on {self._keys.device}: {err}") from err
                distances[lo : lo + rows, :k] = (packed >> ID_BITS).to(torch.int32).view(torch.float32).cpu().numpy()
                ids[lo : lo + rows, :k] = (packed & ((1 << ID_BITS) - 1)).cpu().numpy()
        return distances, ids

    def _nearest(self, queries: "torch.Tensor", k: int, candidates: int) -> "torch.Tensor":
        """(n, k) of (distance, id) packed into int64, ascending."""
        import torch

        product = _Product(self, queries)
        scores, ids = self._candidates(product, candidates)
        rows = torch.arange(len(queries), device=queries.device).repeat_interleave(candidates)
        packed = _packed(self._distances(queries, rows, ids.flatten()), ids.flatten()).view(ids.shape)
        packed = packed.sort(dim=1).values[:, :k]
        if candidates < len(self._keys):
            kth = (packed[:, -1] >> ID_BITS).to(torch.int32).view(torch.float32).to(torch.float64)
            lengths, slack = product.lengths, product.slack
            relative = (math.log2(self._keys.shape[1] + 1) + 4) * ACCUMULATION  # of a rescored distance
            # an entry that is no candidate scores no less than the last candidate: it is no nearer than this
            nearest_other = (scores.amax(dim=1).to(torch.float64) + lengths.square() - slack) * (1 - relative)
            unproven = (~(kth < nearest_other)).nonzero()[:, 0]
            if len(unproven):
                limit = (kth / (1 - relative) - lengths.square() + slack)[unproven]
                packed[unproven] = self._below(queries[unproven], limit, k)
        return packed

    def _candidates(self, product: "_Product", wanted: int) -> tuple["torch.Tensor", "torch.Tensor"]:
        """(n, wanted) smallest scores and their ids, in no order."""
        import torch

        best = torch.empty((len(product), 0), device=self._keys.device)
        ids = torch.empty((len(product), 0), dtype=torch.int64, device=self._keys.device)
        for lo, hi in product.chunks():
            found, at = product.scores(lo, hi).topk(min(wanted, hi - lo), dim=1, largest=False, sorted=False)
            best, ids = torch.cat([best, found], dim=1), torch.cat([ids, at + lo], dim=1)
            if best.shape[1] > wanted:
                best, at = best.topk(wanted, dim=1, largest=False, sorted=False)
                ids = ids.gather(1, at)
        return best, ids

    def _below(self, queries: "torch.Tensor", limit: "torch.Tensor", k: int) -> "torch.Tensor":
        """(n, k) nearest, as `_nearest`, of all entries whose score is not above the limit (n,) of their query."""
        import torch

        product = _Product(self, queries)
        up = torch.nextafter(limit.to(torch.float32), torch.tensor(torch.inf, device=limit.device))
        best = [torch.empty(0, dtype=torch.int64, device=limit.device) for _ in range(len(queries))]
        for lo, hi in product.chunks():
            hits = ~(product.scores(lo, hi) > up[:, None])  # a score that is no number rules nothing out
            for row in hits.any(dim=1).nonzero()[:, 0].tolist():
                ids = hits[row].nonzero()[:, 0] + lo
                distances = self._distances(queries, torch.full_like(ids, row), ids)
                best[row] = torch.cat([best[row], _packed(distances, ids)]).sort().values[:k]
        return torch.stack(best)

    def _distances(self, queries: "torch.Tensor", rows: "torch.Tensor", ids: "torch.Tensor") -> "torch.Tensor":
        """(m,) squared L2 between queries[rows] and keys[ids], each (m,): see `_sum_of_squares`."""
        import torch

        result = torch.empty(len(ids), dtype=torch.float32, device=ids.device)
        step = max(1, self._workspace // (64 * self._keys.shape[1]))
        for lo in range(0, len(ids), step):
            difference = self._keys[ids[lo : lo + step]].to(torch.float32)
            difference -= queries[rows[lo : lo + step]]
            result[lo : lo + step] = _sum_of_squares(difference)
        return result.clamp_(max=float(MISSING_DISTANCE))  # too far for float32


class _Product:
    """Scores of a block of queries, and how far they can be from |x|^2 - 2 q.x."""

    def __init__(self, index: DeviceIndex, queries: "torch.Tensor") -> None:
        import torch

        self._index = index
        self._n = len(queries)
        if index._halves:
            self._queries, self._factor = _two_halves(queries)
        else:
            self._queries = queries
            self._factor = torch.full((self._n, 1), -2.0, device=queries.device)
        self.lengths = queries.to(torch.float64).square().sum(dim=1).sqrt()  # (n,)
        products, squares = self.lengths * index._longest, index._longest**2
        dim = queries.shape[1]
        of_product = dim * ACCUMULATION + (HALVES if index._halves else 0.0)
        slack = 2 * of_product * products + 4 * ACCUMULATION * (squares + 2 * products) + TINY
        overflows = (self.lengths + index._longest).square() > LARGEST
        self.slack = slack.masked_fill(overflows, torch.inf)  # (n,) float64

    def __len__(self) -> int:
        return self._n

    def chunks(self) -> list[tuple[int, int]]:
        """[lo, hi) over all keys, such that the scores of one, and its keys where they are converted, are small."""
        index = self._index
        converted = index._keys.shape[1] if index._keys.device.type == "cpu" and index._half else 0
        step = max(1, index._workspace // (32 * max(self._n, converted)))
        return [(lo, min(lo + step, len(index._keys))) for lo in range(0, len(index._keys), step)]

    def scores(self, lo: int, hi: int) -> "torch.Tensor":
        """(n, hi - lo) float32."""
        import torch

        keys = self._index._keys[lo:hi]
        if keys.device.type != "cpu" and self._index._halves:
            product = torch.mm(self._queries, keys.T, out_dtype=torch.float32)
        else:
            product = self._queries.to(torch.float32) @ keys.to(torch.float32).T
        if self._index._halves:
            product = product[: self._n].add_(product[self._n :], alpha=1 / LO)
        return torch.addcmul(self._index._norms[lo:hi], product, self._factor)


def _two_halves(queries: "torch.Tensor") -> tuple["torch.Tensor", "torch.Tensor"]:
    """(2n, d) float16: of queries (n, d), scaled by powers of two, what float16 can hold, then LO times the rest. And
    (n, 1), what a product with (the first half + the second / LO) is to be multiplied with, to be -2 q.x."""
    import torch

    _, exponent = torch.frexp(queries.abs().amax(dim=1, keepdim=True))
    up = (15 - exponent).clamp(-126, 100)  # 2^up itself must be a float32 on any device
    scaled = torch.ldexp(queries, up)  # below 2^15
    upper = scaled.to(torch.float16)
    lower = ((scaled - upper.to(torch.float32)) * LO).to(torch.float16)
    return torch.cat([upper, lower]), torch.ldexp(torch.full_like(up, -2.0, dtype=torch.float32), -up)


def _sum_of_squares(difference: "torch.Tensor") -> "torch.Tensor":
    """(m,) of (m, d), which is overwritten. By halves, elementwise: bit-equal whatever m is, on every device."""
    width = difference.square_().shape[1]
    while width > 1:
        half = (width + 1) // 2
        difference[:, : width - half] += difference[:, half:width]
        width = half
    return difference[:, 0]


def _packed(distances: "torch.Tensor", ids: "torch.Tensor") -> "torch.Tensor":
    """(m,) int64 that sort by (distance, id): the bits of a float that is not negative sort as it does."""
    import torch

    bits: Any = distances.view(torch.int32).to(torch.int64)
    packed: torch.Tensor = (bits << ID_BITS) | ids
    return packed


def _require(needed: int, path: Path, device: "torch.device") -> None:
    import torch

    if device.type == "cpu":
        require(needed, path)
        return
    free, total = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # kept by torch for reuse
    if needed > free:
        raise InsufficientMemory(
            f"{path} would hold {readable(needed)} on {device}, {readable(free)} of {readable(total)} are free there: "
            "store its keys as float16, use an index on the CPU, or spread the datastore over devices",
            param="device",
        )
