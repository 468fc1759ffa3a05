"""Parts of amortised guides: a normal at the mode of a density, bent by skew and tail weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import constraints


class SinhArcsinh(torch.distributions.Transform):
    """Skew and tail weight for each coordinate: y = (sinh((asinh(x) + skew) * tail) - m) / s.

    ``m`` and ``s`` keep the point x = 0 at 0 and the slope there at 1, so that skew and tail change the shape
    while place and width stay with the affine map that follows.

    Args:
        skew: real, 0 for none.
        tail: > 0; 1 for none, larger for heavier tails.

    References:
        Jones and Pewsey 2009, Biometrika 96(4), 761-780, doi:10.1093/biomet/asp053.
    """

    domain = constraints.real
    codomain = constraints.real
    bijective = True
    sign: ClassVar[int] = 1

    def __init__(self, skew: Tensor, tail: Tensor, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.skew, self.tail = skew, tail

    def with_cache(self, cache_size: int = 1) -> SinhArcsinh:
        """The same transform with another cache size."""
        return self if cache_size == self._cache_size else SinhArcsinh(self.skew, self.tail, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        centre = self.skew * self.tail
        return (torch.sinh((torch.asinh(x) + self.skew) * self.tail) - torch.sinh(centre)) / self._slope(
            centre
        )

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.sinh(torch.asinh(self._raw(y)) / self.tail - self.skew)

    def _slope(self, centre: Tensor) -> Tensor:
        return self.tail * torch.cosh(centre)

    def _raw(self, y: Tensor) -> Tensor:
        """The hyperbolic sine before place and slope were set."""
        centre = self.skew * self.tail
        return y * self._slope(centre) + torch.sinh(centre)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log |dy/dx|, each coordinate; cosh(a)**2 = 1 + sinh(a)**2 saves taking the angle again."""
        centre = torch.sinh(self.skew * self.tail)
        return 0.5 * (torch.log1p(self._raw(y).square()) - torch.log1p(x * x) - torch.log1p(centre.square()))


class TrilAffine(torch.distributions.Transform):
    """y = loc + tril x for batches of matrices (Pyro's ``LowerCholeskyAffine`` takes a single one).

    Args:
        loc: (*batch, d).
        tril: (*batch, d, d), lower, positive diagonal.
    """

    domain = constraints.real_vector
    codomain = constraints.real_vector
    bijective = True

    def __init__(self, loc: Tensor, tril: Tensor, cache_size: int = 1) -> None:
        super().__init__(cache_size=cache_size)
        self.loc, self.tril = loc, tril

    def with_cache(self, cache_size: int = 1) -> TrilAffine:
        """The same transform with another cache size."""
        return self if cache_size == self._cache_size else TrilAffine(self.loc, self.tril, cache_size)

    def _call(self, x: Tensor) -> Tensor:
        return self.loc + (self.tril @ x.unsqueeze(-1)).squeeze(-1)

    def _inverse(self, y: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.tril, (y - self.loc).unsqueeze(-1), upper=False).squeeze(-1)

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Log det of tril, each batch."""
        return self.tril.diagonal(dim1=-2, dim2=-1).log().sum(-1).expand(x.shape[:-1])


def skew_normal(loc: Tensor, scale_tril: Tensor, skew: Tensor, tail: Tensor) -> dist.TransformedDistribution:
    """A normal bent by sinh-arcsinh in each whitened coordinate, then carried to ``loc`` and ``scale_tril``.

    Args:
        loc: (*batch, d).
        scale_tril: (*batch, d, d), lower, positive diagonal.
        skew: (*batch, d), real.
        tail: (*batch, d), > 0.
    """
    noise = dist.Normal(torch.zeros_like(loc), torch.ones_like(loc)).to_event(1)
    bend = torch.distributions.transforms.IndependentTransform(SinhArcsinh(skew, tail), 1, cache_size=1)
    if loc.shape[-1] == 1:  # the same map without a matrix product
        affine = torch.distributions.transforms.AffineTransform(loc, scale_tril[..., 0], cache_size=1)
        carry = torch.distributions.transforms.IndependentTransform(affine, 1, cache_size=1)
    else:
        carry = TrilAffine(loc, scale_tril)
    return dist.TransformedDistribution(noise, [bend, carry])


def laplace(
    derivatives: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    steps: int = 6,
    max_step: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Mode and Cholesky factor of the covariance at the mode, by Newton steps on each row at once.

    Args:
        derivatives: from points (*batch, d) to gradient (*batch, d) and negative Hessian (*batch, d, d),
            positive definite, of the log density.
        start: (*batch, d).
        steps: Newton steps.
        max_step: the most by which a coordinate moves in a step.

    Returns:
        Mode (*batch, d) and lower Cholesky factor of the inverse of the negative Hessian (*batch, d, d), both
        detached: a guide corrects them by a network, and learns through that.
    """
    with torch.no_grad():
        point = start
        for _ in range(steps):
            gradient, precision = derivatives(point)
            point = point + solve_spd(precision, gradient).clamp(-max_step, max_step)
        return point, inverse_tril(derivatives(point)[1])


def solve_spd(matrix: Tensor, vector: Tensor) -> Tensor:
    """Solve matrix x = vector for symmetric positive definite (*batch, d, d); closed form for d <= 2."""
    if matrix.shape[-1] == 1:
        return vector / matrix[..., 0]
    if matrix.shape[-1] == 2:
        a, b, c = matrix[..., 0, 0], matrix[..., 0, 1], matrix[..., 1, 1]
        x, y = vector.unbind(-1)
        return torch.stack([c * x - b * y, a * y - b * x], -1) / (a * c - b * b).unsqueeze(-1)
    return torch.cholesky_solve(vector.unsqueeze(-1), _cholesky(matrix)).squeeze(-1)


def inverse_tril(precision: Tensor) -> Tensor:
    """Lower Cholesky factor of the inverse of a precision (*batch, d, d); closed form for d <= 2."""
    if precision.shape[-1] == 1:
        return precision.rsqrt()
    if precision.shape[-1] == 2:
        a, b, c = precision[..., 0, 0], precision[..., 0, 1], precision[..., 1, 1]
        first = (c / (a * c - b * b)).sqrt()
        lower = torch.stack([-b / c * first, c.rsqrt()], -1)
        return torch.stack([torch.stack([first, torch.zeros_like(first)], -1), lower], -2)
    flipped = _cholesky(precision.flip((-2, -1))).flip((-2, -1)).mT
    eye = torch.eye(precision.shape[-1], dtype=precision.dtype, device=precision.device)
    return torch.linalg.solve_triangular(flipped, eye.expand_as(precision), upper=False)


def _cholesky(matrix: Tensor) -> Tensor:
    """Cholesky factor; where rounding made a matrix indefinite its diagonal alone: a guide never fails."""
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    ridge = 10 * torch.finfo(matrix.dtype).eps
    tril, info = torch.linalg.cholesky_ex(matrix + torch.diag_embed(ridge * diagonal))
    return torch.where((info == 0)[..., None, None], tril, torch.diag_embed(diagonal.sqrt()))
