"""Robust least squares with priors, in numpy."""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
# Residuals (ln) beyond this count by their size, not its square: two standard deviations of
# repeated runs of one model on one machine, which scatter by 4 % (``speed.json``).
_HUBER = 0.08
_NOISE = 0.1
_STEP = 1e-3
_MAX_CHANGE = 0.7


def fit_logs(
    residuals: Callable[[Array], Array],
    start: Array,
    means: Array,
    sds: Array,
    *,
    weights: Array,
    steps: int,
) -> Array:
    """Minimises sum weights * huber(residuals / noise) + sum ((x - means) / sds)^2.

    Gauss-Newton with reweighting; a step changes no parameter by more than a factor of two.

    Args:
        residuals: Residuals at given parameters.
        start: First parameters.
        means: Prior means.
        sds: Prior standard deviations.
        weights: Weight of each residual.
        steps: Iterations.
    """
    x = start.copy()
    for _ in range(steps):
        r = residuals(x)
        jacobian = np.stack([(residuals(_moved(x, i)) - r) / _STEP for i in range(len(x))], axis=1)
        huber = np.minimum(1.0, _HUBER / np.maximum(np.abs(r), 1e-12))
        w = weights * huber / _NOISE**2
        normal = jacobian.T @ (w[:, None] * jacobian) + np.diag(sds**-2.0)
        gradient = jacobian.T @ (w * r) + (x - means) / sds**2
        change = np.linalg.solve(normal, gradient)
        x = x - np.clip(change, -_MAX_CHANGE, _MAX_CHANGE)
        if np.max(np.abs(change)) < 1e-3:
            break
    return x


def _moved(x: Array, index: int) -> Array:
    moved = x.copy()
    moved[index] += _STEP
    return moved
