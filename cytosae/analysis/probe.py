"""A linear classifier of images by their mean token vectors."""

from typing import NamedTuple

import torch

_CONSTANT = 1e-12
"""A channel counts as constant if its variance is at most this share of its mean square: float64 rounding."""


class Probe(NamedTuple):
    """A fitted classifier in float64. It predicts the class with the largest logit, the smaller one among equals."""

    mean: torch.Tensor
    """Mean of the training features, shape `(D,)`."""
    scale: torch.Tensor
    """Their population standard deviation, shape `(D,)`; 1 where a channel is constant."""
    weights: torch.Tensor
    """Weights of standardised features, shape `(D, C)`; 0 for constant channels."""
    intercept: torch.Tensor
    """Shape `(C,)`."""

    def logits(self, features: torch.Tensor) -> torch.Tensor:
        """Logits, float64, shape `(n, C)`, for features of shape `(n, D)`."""
        return (features.to(self.mean) - self.mean) / self.scale @ self.weights + self.intercept


class LinearProbe:
    """Ridge regression on one-hot labels, in closed form from accumulated moments: memory does not grow.

    Any split of the images into updates and merges gives the same moments up to float64 rounding.

    Args:
        n_features: Width D of the features.
        n_classes: Classes C.
        device: Device of the state.
    """

    def __init__(self, n_features: int, n_classes: int, *, device: torch.device | str = "cpu") -> None:
        self._seconds = torch.zeros(n_features, n_features, dtype=torch.float64, device=device)
        self._class_sums = torch.zeros(n_classes, n_features, dtype=torch.float64, device=device)
        self.n_images = torch.zeros(n_classes, dtype=torch.int64, device=device)
        """Images of each class so far, int64, shape `(C,)`."""

    def update(self, features: torch.Tensor, labels: torch.Tensor) -> None:
        """Add images.

        Args:
            features: Any float type, shape `(n, D)`.
            labels: Class of each image, int64, shape `(n,)`.

        Raises:
            ValueError: If the shapes do not fit or a label is not a class.
        """
        check_shape("features", features, (len(labels), self._class_sums.shape[1]))
        check_labels(labels, len(self.n_images))
        wide, members = features.to(self._seconds), members_of(labels.to(self.n_images.device), len(self.n_images))
        self._seconds.addmm_(wide.T, wide)
        self._class_sums.addmm_(members.to(wide), wide)
        self.n_images += members.sum(dim=1)

    def merge(self, other: "LinearProbe") -> None:
        """Add the moments that another probe accumulated on other images."""
        self._seconds += other._seconds.to(self._seconds.device)
        self._class_sums += other._class_sums.to(self._seconds.device)
        self.n_images += other.n_images.to(self._seconds.device)

    def fit(self, ridge: float = 0.01) -> Probe:
        """Fit the classifier to all images added so far.

        With Z the standardised features `(n, D)` and Y the one-hot labels `(n, C)`, it minimises
        `||Z W + 1 c^T - Y||^2 + lambda ||W||^2` with `lambda = ridge * trace(Z^T Z) / D`, which is `ridge * n` if no
        channel is constant. The intercept c is not penalised; because Z has mean 0, it is each class's share of images.

        Args:
            ridge: Strength of the penalty relative to the features' mean second moment; above 0.

        Raises:
            ValueError: If no image was added or `ridge` is not above 0.
        """
        n = int(self.n_images.sum())
        if not n or not ridge > 0:
            raise ValueError(f"fit needs images and a ridge above 0, found {n} images and {ridge}")
        mean = self._class_sums.sum(dim=0) / n
        squares = self._seconds.diagonal() / n
        variance = squares - mean.square()
        varies = variance > _CONSTANT * squares
        scale = torch.where(varies, variance, 1.0).sqrt()
        inverse = varies / scale
        gram = (self._seconds - n * torch.outer(mean, mean)) * torch.outer(inverse, inverse)
        # Z has mean 0, so Z^T (Y - 1 c^T) is Z^T Y, the sum of centred features per class.
        target = (self._class_sums - self.n_images[:, None] * mean).T * inverse[:, None]
        if not varies.any():
            return Probe(mean, scale, torch.zeros_like(target), self.n_images / n)
        gram.diagonal().add_(ridge * gram.trace() / len(mean))
        weights = torch.cholesky_solve(target, torch.linalg.cholesky(gram))
        return Probe(mean, scale, weights, self.n_images.double() / n)


def members_of(labels: torch.Tensor, n_classes: int) -> torch.Tensor:
    """Which images belong to each class, bool, shape `(C, n)`: sums by a product with it have a fixed order."""
    return torch.arange(n_classes, device=labels.device)[:, None] == labels


def check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Check an argument.

    Raises:
        ValueError: Unless the tensor has the expected shape.
    """
    if tensor.shape != expected:
        raise ValueError(f"{name} must be {expected}, found {tuple(tensor.shape)}")


def check_labels(labels: torch.Tensor, n_classes: int) -> None:
    """Check an argument.

    Raises:
        ValueError: Unless every label is a class.
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < n_classes:
        raise ValueError(f"labels must lie in 0..{n_classes - 1}, found {int(labels.min())}..{int(labels.max())}")
