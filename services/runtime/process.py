"""What is set for the whole process of a service: memory, garbage collection, threads, and when it ends."""

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Mapping, MutableMapping

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # as malloc.h numbers them
MMAP_THRESHOLD_BYTES = 32 << 20  # glibc allows no more
TRIM_THRESHOLD_BYTES = 256 << 20
# seconds after which a thread that runs Python must let a waiting one run. The event loop lets others run several times
# in a request, and may wait this long each time before it goes on; Python's default is 0.005
SWITCH_INTERVAL_S = 0.001
OMP_WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def configure_malloc(environ: Mapping[str, str]) -> bool:
    """Let glibc keep freed memory: an answer's buffers of some 100 KiB would otherwise be given back to the system
    after each request and faulted in for the next, which takes more time than filling them. False where nothing was
    changed: another C library, or MALLOC_ variables that set it already.
    """
    if any(name.startswith("MALLOC_") for name in environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl and macOS have none; Windows has no CDLL(None)
        return False
    return bool(mallopt(M_MMAP_THRESHOLD, MMAP_THRESHOLD_BYTES)) and bool(
        mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)
    )


def keep_loaded() -> None:
    """Turn garbage collection on, for objects made from now on. Those made before are never looked through again: a
    collection stops every thread, and one of all that torch and transformers define takes some 200 ms. What of them is
    let go of later, such as a version of a domain, must therefore be in no reference cycle.
    """
    gc.collect()
    gc.freeze()
    gc.enable()


def end_with_stdin(environ: Mapping[str, str]) -> bool:
    """Where KNNLM_END_WITH_STDIN is set, end as at SIGTERM when standard input ends: whoever started the service holds
    its other end, and has ended. False where it is not set.
    """
    if not environ.get("KNNLM_END_WITH_STDIN"):
        return False

    def wait() -> None:
        while os.read(0, 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=wait, name="stdin", daemon=True).start()
    return True


def set_omp_wait_policy(environ: MutableMapping[str, str], spins: int = 0) -> bool:
    """Let waiting OpenMP threads spin `spins` times (GNU's library) or one millisecond (LLVM's), then sleep; 0: sleep
    at once. By default they spin for many milliseconds, and take the cores from the other services. False where the
    environment sets a policy already. Call it before torch or FAISS is loaded: OpenMP reads the variables then.
    """
    if any(name in environ for name in OMP_WAIT_VARIABLES):
        return False
    if spins == 0:
        environ["OMP_WAIT_POLICY"] = "PASSIVE"
    else:
        environ.update(GOMP_SPINCOUNT=str(spins), KMP_BLOCKTIME="1")
    return True
