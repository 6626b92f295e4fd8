"""The geometric median: the point with the smallest sum of distances to a set of points."""

import torch


@torch.no_grad()
def geometric_median(points: torch.Tensor, *, max_iterations: int = 200, tolerance: float = 1e-7) -> torch.Tensor:
    """Geometric median of points by Weiszfeld's iteration.

    E. Weiszfeld, Tohoku Math. J. 43 (1937): average the points, weighted by the inverse of their distance to the
    estimate. If the estimate meets a point, the step of Y. Vardi and C.-H. Zhang, PNAS 97 (2000), continues or shows
    that the point is the median.

    Args:
        points: Shape `(N, D)`, at least one point; computed in float64.
        max_iterations: Largest number of iterations.
        tolerance: Stop once the estimate moves by less than this share of the points' mean distance from their mean.

    Returns:
        The median, float64, shape `(D,)`.

    Raises:
        ValueError: If there is no point, or a point is not finite.
    """
    if points.ndim != 2 or not len(points):
        raise ValueError(f"points must be (N, D) with N >= 1, found {tuple(points.shape)}")
    points = points.double()
    if not torch.isfinite(points).all():
        raise ValueError("points must be finite numbers")
    estimate = points.mean(dim=0)
    spread = (points - estimate).norm(dim=1).mean()
    for _ in range(max_iterations):
        moved = _step(points, estimate, spread)
        distance = (moved - estimate).norm()
        estimate = moved
        if distance <= tolerance * spread:
            break
    return estimate


def _step(points: torch.Tensor, estimate: torch.Tensor, spread: torch.Tensor) -> torch.Tensor:
    """One step of Vardi and Zhang; it is Weiszfeld's unless the estimate is one of the points."""
    distances = (points - estimate).norm(dim=1)
    met = distances <= 1e-14 * spread
    weights = torch.where(met, 0.0, 1 / distances.clamp_min(torch.finfo(torch.float64).tiny))
    total = weights.sum()
    if total == 0:
        return estimate
    target = weights @ points / total
    n_met = met.sum()
    if not n_met:
        return target
    gradient_norm = (target - estimate).norm() * total
    share = torch.clamp(n_met / gradient_norm.clamp_min(torch.finfo(torch.float64).tiny), max=1.0)
    return (1 - share) * target + share * estimate
