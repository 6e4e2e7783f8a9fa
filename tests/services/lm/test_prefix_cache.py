"""The pocket model behind gRPC: steps are answered as without the prefix cache, counted, and bounded in bytes."""

from pathlib import Path

import numpy as np
import pytest

from knnlm.clients.rpc import GrpcLanguageModel
from knnlm.messages import ForwardRequest
from services.lm.app import service
from services.lm.settings import LmSettings
from services.runtime.lifecycle import Host, running

POCKET = Path(__file__).parents[3] / "models" / "pocket"
V = 4096


def counted(host: Host, kind: str) -> float:
    found = host.service.metrics.registry.get_sample_value("knnlm_lm_prefix_tokens_total", {"kind": kind})
    return found or 0.0


@pytest.mark.parametrize("max_bytes", [0, 3 << 20, 512 << 20])
async def test_steps_are_answered_as_without_the_cache(max_bytes: int) -> None:
    settings = LmSettings(model=str(POCKET), port=0, grpc_port=0, device="cpu", prefix_cache_bytes=max_bytes)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(V, size=n).astype(np.int32) for n in (40, 7, 90, 21)]
    async with running(service(settings)) as host, GrpcLanguageModel(f"127.0.0.1:{host.grpc_port}") as lm:
        for _ in range(12):
            positions = [np.array([len(one) - 1], np.int32) for one in sequences]
            step = await lm.forward(ForwardRequest(sequences, positions, full=True, keys=True, cache=True))
            whole = await lm.forward(ForwardRequest(sequences, positions, full=True, keys=True))
            assert step.log_probs is not None
            assert whole.log_probs is not None
            assert step.keys is not None
            assert whole.keys is not None
            np.testing.assert_allclose(step.log_probs, whole.log_probs, atol=1e-5, rtol=1e-5)
            np.testing.assert_allclose(step.keys, whole.keys, atol=1e-5, rtol=1e-5)
            best = step.log_probs.argmax(axis=1).astype(np.int32)
            sequences = [np.append(one, token) for one, token in zip(sequences, best, strict=True)]
        asked, found = counted(host, "asked"), counted(host, "found")
        held = host.service.metrics.registry.get_sample_value("knnlm_lm_prefix_bytes")
    assert held is not None
    assert held <= max_bytes
    if max_bytes == 512 << 20:  # all but the first tokens, and one in each step
        assert asked == sum(4 * step + 158 for step in range(12))
        assert asked - found == 158 + 11 * 4
    elif max_bytes:  # there is room for three of them
        assert 0 < found < asked - 158 - 11 * 4
    else:
        assert (asked, found, held) == (0, 0, 0)
