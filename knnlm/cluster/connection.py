"""This process's connection to a Ray cluster, whether it builds, serves or asks what is served."""

import os
import socket
from typing import Any

from knnlm.errors import Unavailable

__all__ = ["LOCAL", "MAX_REPLICAS", "NAMESPACE", "configure", "connect", "first_line"]

LOCAL = "local"  # the address of a cluster of this process's own
NAMESPACE = "knnlm"
MAX_REPLICAS = 10_000  # replicas of one shard that may be asked for
ANSWER_SECONDS = 10.0  # within which a cluster's port takes a connection


def configure(address: str) -> None:
    """Set what Ray reads from the environment when it is imported; call it before. Variables that are set stay."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == LOCAL:
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # else Ray takes the host's own address


def connect(address: str, processors: int | None = None, **options: Any) -> None:  # Any: as ray.init takes them
    """Connect this process to the Ray cluster at `address` (auto, HOST:PORT, ray://HOST:PORT); "local" starts one on
    the loopback address alone.

    processors: of the one that is started, None = those of this machine. Raises Unavailable when none answers.
    """
    configure(address)
    _require_listening(address)
    import ray

    if address == LOCAL:
        options |= {"include_dashboard": False, "_node_ip_address": "127.0.0.1", "num_cpus": processors}
    try:
        ray.init(address=address, namespace=NAMESPACE, log_to_driver=False, **options)
    except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as err:
        raise Unavailable(f"no Ray cluster answers at {address!r}: {first_line(err)}", param="address") from err


def _require_listening(address: str) -> None:
    """Raise Unavailable where nothing listens at HOST:PORT or ray://HOST:PORT: Ray itself would wait for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
    except OSError as err:
        raise Unavailable(f"no Ray cluster answers at {address!r}: {err.strerror or err}", param="address") from err


def first_line(err: BaseException) -> str:
    """The first line of an error of Ray's, which have pages."""
    return (str(err) or type(err).__name__).strip().splitlines()[0][:300]
