"""FAISS's own indexes on a GPU, where a FAISS that has them is installed: inverted lists with flat, fp16, sq8, pq.

The index is read from its file as on the CPU and copied to the device. For exact search see device.py, which needs no
such FAISS.
"""

import threading
from pathlib import Path
from typing import Any

import faiss

from knnlm.errors import DatastoreCorrupt, DatastoreError, InsufficientMemory, InvalidRequest
from knnlm.index.contract import DEFAULTS, Float32, Index, Int64, Parameters
from knnlm.options import SearchOptions

__all__ = ["GpuIndex", "open_on_gpu"]

MAX_GPU_K = 2048  # neighbors, and lists, that FAISS's GPU kernels can select


def open_on_gpu(file: Path | None, recipe: str, parameters: Parameters, device: str) -> Index:
    """The index of `recipe` in `file`, copied to device "cuda" or "cuda:N"; `parameters`: of the manifest.

    Raises DatastoreError when this FAISS or the device cannot hold it, saying what could be installed or chosen
    instead; DatastoreCorrupt when the file is no index.
    """
    number = _number(device)
    gpus = int(faiss.get_num_gpus()) if hasattr(faiss, "StandardGpuResources") else 0
    if not gpus:
        raise DatastoreError(
            f"index {recipe} cannot be searched on device {device}: the installed faiss has no GPU support or sees no "
            "GPU. Install faiss-gpu (conda) or faiss-gpu-cu12 (pip) in place of faiss-cpu, or choose index flat, which "
            "is searched on the device by torch (knnlm[gpu])",
            param="device",
        )
    if number >= gpus:
        raise DatastoreError(f"device {device!r} is not there: faiss sees {gpus} GPUs", param="device")
    if file is None:
        raise DatastoreCorrupt(f"index {recipe} needs its file, the manifest names none")
    try:
        index = faiss.read_index(str(file))
    except RuntimeError as err:
        raise DatastoreCorrupt(f"{file} is not an index: {err}") from err
    return GpuIndex(index, file.stat().st_size, recipe, parameters, number)


class GpuIndex(Index):
    """Candidates for rescoring. Near-ties at the last candidate can depend on the batch: products of matrices find the
    lists. Searches run one after the other: FAISS's GPU resources are for one thread at a time."""

    memory = "device"

    def __init__(self, index: Any, size: int, recipe: str, parameters: Parameters, number: int) -> None:
        """index: of FAISS, on the CPU (Any: it has no types). size: bytes of its file. number: of the GPU."""
        base = faiss.downcast_index(index.index) if isinstance(index, faiss.IndexPreTransform) else index
        if not isinstance(base, faiss.IndexIVF):
            raise _unfit(recipe, number, f"{type(base).__name__} has no lists")
        gpu: Any = faiss  # the package that is checked against has no such names
        self._resources = gpu.StandardGpuResources()
        try:
            self._index = gpu.index_cpu_to_gpu(self._resources, number, index)
        except RuntimeError as err:
            if "memory" in str(err).lower():
                raise InsufficientMemory(f"index {recipe} does not fit on cuda:{number}: {err}") from err
            raise _unfit(recipe, number, str(err)) from err
        self._bytes = size
        self._nlist = int(base.nlist)
        self.efforts = {"nprobe": min(int(parameters.get("nprobe", 1)), self._nlist)}
        self.overfetch = float(parameters.get("overfetch", 1.0))
        self._searching = threading.Lock()

    def search(self, queries: Float32, k: int, options: SearchOptions = DEFAULTS) -> tuple[Float32, Int64]:
        """Raises InvalidRequest for more candidates or lists than FAISS's GPU kernels can select."""
        settings = faiss.SearchParametersIVF()
        settings.nprobe = min(self.effort("nprobe", options), self._nlist)
        for name, given in (("k", k), ("nprobe", settings.nprobe)):
            if given > MAX_GPU_K:
                raise InvalidRequest(
                    f"FAISS on a GPU selects at most {MAX_GPU_K} candidates and visits at most {MAX_GPU_K} lists, "
                    f"got {name} {given}, over-fetched candidates counted: lower k, overfetch or nprobe, or take flat",
                    param=name,
                )
        with self._searching:
            distances, ids = self._index.search(queries, k, params=settings)
        return distances, ids

    @property
    def memory_bytes(self) -> int:
        return self._bytes


def _number(device: str) -> int:
    kind, _, number = device.partition(":")
    if kind != "cuda" or (":" in device and not number.isdigit()):
        raise InvalidRequest(f"device must be cuda or cuda:N, got {device!r}", param="device")
    return int(number or 0)


def _unfit(recipe: str, number: int, why: str) -> DatastoreError:
    return DatastoreError(
        f"index {recipe} cannot be searched on cuda:{number}: {why}. FAISS's GPU indexes are ivf<n> with flat, fp16, "
        "sq8 or pq<M>; flat is searched there by torch; all others on the CPU",
        param="device",
    )
