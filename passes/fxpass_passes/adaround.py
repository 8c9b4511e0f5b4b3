"""Rounding that is learnt from data: scales, AdaRound, and a discrete descent on the force error; used by ``quantize``.

AdaRound (Nagel et al., ICML 2020) rounds each weight up or down so that a quadratic form of the rounding errors d is
small, d^T H d, with H the Hessian of the loss. Here the loss is the force error itself, and H is J^T J of
``Calibration.gradients``, in two forms: block by block as a Kronecker product, without coupling between channels, for
the soft optimisation that the paper describes; and as a whole, for a discrete descent that starts from it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

LEVELS = 127  # symmetric int8: -127 to 127
ZETA, GAMMA = 1.2, -0.1  # stretch of the rectified sigmoid: sigmoid(v) * ZETA + GAMMA, clipped to [0, 1]
TINY = 1e-30


def scales(weights: Tensor, importance: Tensor, clips: int = 21) -> Tensor:
    """Scale of each channel: of ``clips`` clipping ranges down to 0.8 of the full one, the one of least error.

    Args:
        weights: [P, K, N], K weights for each of N channels.
        importance: [P, K, 1], what a squared error of each weight costs.

    Returns:
        [P, 1, N]; 1 for a channel of zeros.
    """
    full = weights.abs().amax(1, keepdim=True) / LEVELS
    full = torch.where(full > 0, full, 1.0)
    best, least = full, torch.full_like(full, torch.inf)
    for clip in torch.linspace(1.0, 0.8, clips).tolist():
        scale = full * clip
        rounded = (weights / scale).round().clamp(-LEVELS, LEVELS) * scale
        cost = (importance * (rounded - weights).square()).sum(1, keepdim=True)
        best, least = torch.where(cost < least, scale, best), torch.minimum(cost, least)
    return best


def adaround(
    x: Tensor, hessian: Tensor, importance: Tensor, *, steps: int, rate: float = 0.02, penalty: float = 0.2
) -> Tensor:
    """Which weights to round up, block by block: the soft optimisation of AdaRound.

    Minimises sum_n importance_n d_n^T hessian d_n + penalty * sum(1 - |2 h - 1|^beta), d = floor(x) + h - x, by
    Adam, where h is the rectified sigmoid of free variables, and beta falls from 20 to 2 once a fifth of the
    steps are done. At the end all h count as 0 or 1.

    Args:
        x: weights over their scales, [P, K, N].
        hessian: [P, K, K], symmetric; its scale is of no concern.
        importance: [P, 1, N], of each channel; likewise.

    Returns:
        bool [P, K, N].
    """
    hessian = hessian / hessian.diagonal(dim1=1, dim2=2).mean(1).clamp_min(TINY)[:, None, None]
    importance = importance / importance.mean((1, 2), keepdim=True).clamp_min(TINY)
    low = below(x)
    start = ((x - low).clamp(0.01, 0.99) - GAMMA) / ZETA
    free = torch.logit(start).requires_grad_()
    optimiser = torch.optim.Adam([free], lr=rate)
    for step in range(steps):
        with torch.enable_grad():
            h = (torch.sigmoid(free) * ZETA + GAMMA).clamp(0, 1)
            d = low + h - x
            loss = (importance * d * (hessian @ d)).sum()
            done = (step / steps - 0.2) / 0.8
            if done > 0:
                loss = loss + penalty * (1 - (2 * h - 1).abs().pow(20 - 18 * done)).sum()
            optimiser.zero_grad()
            loss.backward()
        optimiser.step()
    return torch.sigmoid(free.detach()) > 0.5


def below(x: Tensor) -> Tensor:
    """The level below each x; the one above is a level too."""
    return x.floor().clamp(-LEVELS, LEVELS - 1)


def descend(x: Tensor, up: Tensor, gradients: Tensor, *, sweeps: int, seed: int) -> Tensor:
    """Round single weights the other way as long as that makes the force error smaller.

    The error is |G d|^2 + mu |d|^2 with G the projected Jacobian of all weights at once, so that errors of one
    layer make up for those of another. The ridge mu is the mean of the diagonal of G^T G: it stands for what the
    projections do not see, and keeps from rounding far weights up without need. Each weight in turn, in a random order,
    takes the better of its two levels; G d is kept up to date, so a sweep over n weights costs n * probes.

    Args:
        x: weights over their scales, [n].
        up: where to start, bool [n].
        gradients: by the weights over their scales, [probes, n].

    Returns:
        bool [n].
    """
    columns = np.ascontiguousarray(gradients.t().numpy())
    low = (below(x) - x).double().numpy()
    chosen = np.where(up.numpy(), low + 1, low)
    residual = columns.T @ chosen.astype(np.float32)
    squares = np.einsum("nm,nm->n", columns, columns, dtype=np.float64)
    stiff = squares + squares.mean()
    order = np.random.default_rng(seed).permutation(len(chosen))
    for _ in range(sweeps):
        for n in order:
            d, column = chosen[n], columns[n]
            slope = float(residual @ column) - d * squares[n]
            down = low[n]
            # stiff * d^2 + 2 * slope * d at d = down + 1, less that at d = down
            best = down + 1 if stiff[n] * (2 * down + 1) + 2 * slope < 0 else down
            if best != d:
                residual += column * np.float32(best - d)
                chosen[n] = best
    return torch.from_numpy(chosen > low)
