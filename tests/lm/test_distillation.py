"""The loss of a memory against dense KL + CE over a tiny vocabulary, its gradient, and its floor."""

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from knnlm.lm.distillation import cross_entropy
from knnlm.lm.soft_labels import SoftLabels, soft_labels
from knnlm.neighbors import TokenMasses

V = 7
VALUES = np.array([2, 0, 5, 6], np.int32)  # among the targets; not among them; no targets at all; the only target
P = np.array(
    [
        [0.0, 0.2, 0.5, 0.0, 0.3, 0.0, 0.0],
        [0.0, 0.9, 0.0, 0.1, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    ]
)


def sparse() -> TokenMasses:
    rows, tokens = np.nonzero(P)
    offsets = np.concatenate([[0], np.cumsum((P > 0).sum(axis=1))]).astype(np.int64)
    return TokenMasses(offsets, tokens.astype(np.int32), np.log(P[rows, tokens]))


def dense(logits: torch.Tensor, beta: float) -> torch.Tensor:
    """(n,) beta KL(p || q) + (1 - beta) CE(y, q), by definition; a row without targets: CE alone."""
    log_q = torch.log_softmax(logits, -1)
    p, targets = torch.from_numpy(P), torch.from_numpy(VALUES.astype(np.int64))
    kl = torch.where(p > 0, p * (torch.where(p > 0, p, 1.0).log() - log_q), 0.0).sum(1)
    ce = -log_q.gather(1, targets[:, None])[:, 0]
    share = torch.from_numpy(np.where(P.sum(axis=1) > 0, beta, 0.0))
    return share * kl + (1 - share) * ce


def ours(logits: torch.Tensor, labels: SoftLabels) -> torch.Tensor:
    tokens, weights = torch.from_numpy(labels.tokens), torch.from_numpy(labels.weights)
    return cross_entropy(logits, tokens, weights)


def random_logits(seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(len(VALUES), V, generator=generator, dtype=torch.float64)).requires_grad_()


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_loss_and_gradient_are_those_of_dense_kl_and_ce(beta: float) -> None:
    labels = soft_labels(sparse(), VALUES, beta)
    logits, again = random_logits(), random_logits()
    loss = ours(logits, labels)
    expected = dense(again, beta)
    assert loss.item() - labels.constant.sum() == pytest.approx(expected.sum().item(), abs=1e-12)
    loss.backward()  # type: ignore[no-untyped-call]
    expected.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert again.grad is not None
    np.testing.assert_allclose(logits.grad.numpy(), again.grad.numpy(), atol=1e-12)
    each = [ours(random_logits()[i : i + 1], labels.rows(np.array([i]))).item() for i in range(len(VALUES))]
    np.testing.assert_allclose(np.array(each) - labels.constant, expected.detach().numpy(), atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_the_floor_is_what_the_soft_labels_themselves_reach(beta: float) -> None:
    labels = soft_labels(sparse(), VALUES, beta)
    share = np.where(P.sum(axis=1) > 0, beta, 0.0)[:, None]
    t = share * P + (1 - share) * np.eye(V)[VALUES]
    with np.errstate(divide="ignore"):
        best = torch.from_numpy(np.where(t > 0, np.log(np.where(t > 0, t, 1)), -1e4))
    reached = dense(best, beta).numpy()
    np.testing.assert_allclose(labels.floor, reached, atol=1e-9)
    assert (dense(random_logits(), beta).detach().numpy() >= reached).all()


def test_a_row_without_targets_is_trained_on_its_token_alone() -> None:
    labels = soft_labels(sparse(), VALUES, 0.7)
    assert weights_of(labels, 2) == {5: 1.0}
    assert labels.floor[2] == labels.entropy[2] == 0
    nothing = soft_labels(None, VALUES, 0.7)
    np.testing.assert_array_equal(nothing.tokens[:, 0], VALUES)
    assert nothing.weights.shape == (4, 1)


def test_a_token_that_came_and_is_a_target_counts_once() -> None:
    labels = soft_labels(sparse(), VALUES, 0.5)
    assert weights_of(labels, 0) == pytest.approx({2: 0.75, 1: 0.1, 4: 0.15})
    assert weights_of(labels, 3) == {6: 1.0}
    np.testing.assert_allclose(labels.weights.sum(axis=1), 1)


def weights_of(labels: SoftLabels, row: int) -> dict[int, float]:
    pairs: npt.NDArray[np.float64] = labels.weights[row]
    return {int(t): float(w) for t, w in zip(labels.tokens[row], pairs, strict=True) if w > 0}


def test_distances_to_the_floor_are_finite_for_masses_at_the_edge() -> None:
    tiny = TokenMasses(np.array([0, 2]), np.array([1, 3], np.int32), np.array([0.0, -700.0]))
    labels = soft_labels(tiny, np.array([3]), 0.5)
    assert all(math.isfinite(x) for x in (*labels.entropy, *labels.constant, *labels.floor))
