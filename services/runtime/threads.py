"""How the threads of torch and FAISS wait for each other. To be said before either is loaded."""

from collections.abc import MutableMapping

__all__ = ["wait_passively"]

SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def wait_passively(environ: MutableMapping[str, str]) -> bool:
    """Let OpenMP threads sleep until there is work. By default they spin, and take the cores from whoever works there:
    the other services, most of all. False where the environment says already how they are to wait.
    """
    if any(name in environ for name in SAID):
        return False
    environ["OMP_WAIT_POLICY"] = "PASSIVE"
    return True
