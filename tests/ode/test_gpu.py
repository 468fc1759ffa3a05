"""Solutions and gradients on a GPU against those on the CPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from stiff_problems import robertson
from torch import Tensor

from scivi.ode import solve

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def solved_on(device: str) -> tuple[Tensor, Tensor, Tensor]:
    """States, and the gradients of a weighted sum of their logarithms by log coefficients and by states."""
    problem = robertson()
    log_k = torch.tensor(np.log(problem.scattered(0.3, 5, 1)), device=device, requires_grad=True)
    y0 = (torch.tensor(problem.y0, device=device) + 0.01).requires_grad_()  # no state begins at 0
    times = torch.tensor(np.geomspace(0.01, 1e5, 12), device=device)
    found = solve(problem.system(), log_k.exp(), y0, times, rtol=1e-6, atol=1e-14, method="rodas5p")
    assert found.ok.all()
    assert found.values.device.type == device
    weights = torch.linspace(-1.0, 1.0, found.values[0].numel(), dtype=torch.float64, device=device)
    (found.values.log().flatten(1) @ weights).sum().backward()
    assert log_k.grad is not None
    assert y0.grad is not None
    return found.values.detach().cpu(), log_k.grad.cpu(), y0.grad.cpu()


def test_robertson_on_a_gpu_is_that_on_the_cpu():
    """The same steps with sums in another order: rounding, 1e-16, times what stiffness makes of it."""
    (values, *slopes), (theirs, *their_slopes) = solved_on("cpu"), solved_on("cuda")
    torch.testing.assert_close(theirs, values, rtol=1e-9, atol=0)
    for ours, other in zip(slopes, their_slopes, strict=True):
        assert float((other - ours).abs().max()) <= 1e-9 * float(ours.abs().max())
