"""The log marginal of all rows and its gradient in the globals, compiled where many rows repay it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from scivi.errors import Unsupported
from scivi.inference import marginal
from scivi.inference.capture import Function, captured, compiled
from scivi.inference.plan import Plan
from scivi.inference.stepper import Form
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound
from scivi.models.guides import JointNormalGuide

MANY = 2**25  # rows x nodes of a pass from which compiling repays itself in a single fit (our choice)
CLOSE = {torch.float32: 1e-3, torch.float64: 1e-8}  # of the gradient of a chunk, relative (our choice)


class Passes:
    """Sums over rows of the log marginal and its gradient.

    Args:
        bound: a trained pair; its parameters stay as they are while this is used.
        module: the joint normal that holds the globals.
        plan: of the fit.
        work: rows x nodes of a pass.
    """

    def __init__(self, bound: Bound, module: JointNormalGuide, plan: Plan, work: int) -> None:
        self.bound, self.module = bound, module
        self.layout = marginal.layout(bound, bound.example)
        self.wanted = plan.compile == "on" or (plan.compile == "auto" and work >= MANY)
        self.names = [n for n, _ in bound.nets.named_parameters()]
        self.own = [p.detach() for p in bound.nets.parameters()] + [*bound.nets.buffers()]
        self.form: dict[int, tuple[object, ...]] = {}  # of the chunks that are compiled, by nodes

    def __call__(
        self, theta: Tensor, batches: Callable[[int], Iterable[Batch]], per_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Log marginal of all rows, and its gradient (D,), in float64.

        Args:
            theta: globals on the unbounded scale, (D,).
            batches: from nodes per dimension to the rows, in chunks.
            per_dim: nodes per local dimension.
        """
        at = theta.detach().to(self.module.loc.dtype)
        value, slope = theta.new_zeros(()), torch.zeros_like(theta)
        for batch in batches(per_dim):
            part, own = self._chunk(at, batch, per_dim)
            value, slope = value + part, slope + own
        return value, slope

    def _eager(self, at: Tensor, batch: Batch, per_dim: int) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_(True)
        with torch.enable_grad():
            value = marginal.log_marginal(self.bound, self.module, at, batch, self.layout, per_dim)
            (slope,) = torch.autograd.grad(value, at)
        return value.detach(), slope

    def _chunk(self, at: Tensor, batch: Batch, per_dim: int) -> tuple[Tensor, Tensor]:
        form = Form(batch, tuple((row, len(places)) for row, places in batch.index.items()))
        if (
            not self.wanted or self.form.setdefault(per_dim, form.key) != form.key
        ):  # the last chunk is shorter
            return self._eager(at, batch, per_dim)
        data = [*batch.values.values(), *batch.observed_mask.values(), *batch.index.values()]
        key = (
            "pass",
            per_dim,
            self.layout,
            *form.key,
            *sorted(batch.sizes.items()),
            *(t.shape for t in self.own),
        )
        memo = self.bound.template.memo
        if key not in memo:
            try:
                memo[key] = self._compile(at, batch, per_dim, data)
            except Unsupported:
                self.wanted = False
                return self._eager(at, batch, per_dim)
        function = memo[key]
        value, slope = function(at, *self.own, *data)
        return value, slope

    def _compile(self, at: Tensor, batch: Batch, per_dim: int, data: list[Tensor]) -> Function:
        n_values, n_masks, n_own = len(batch.values), len(batch.observed_mask), len(self.own)
        buffers = [n for n, _ in self.bound.nets.named_buffers()]

        def function(at: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
            held = dict(zip([*self.names, *buffers], arguments[:n_own], strict=True))
            columns = arguments[n_own:]
            values = dict(zip(batch.values, columns[:n_values], strict=True))
            masks = dict(zip(batch.observed_mask, columns[n_values : n_values + n_masks], strict=True))
            index = dict(zip(batch.index, columns[n_values + n_masks :], strict=True))
            some = replace(batch, values=values, observed_mask=masks, index=index)
            return self.bound.holding(held, lambda: self._eager(at, some, per_dim))

        arguments = [at, *self.own, *data]
        compiled_one, _ = compiled(captured(function, arguments, owned=self.own), arguments)
        ours, eager = compiled_one(*arguments)[1], self._eager(at, batch, per_dim)[1]
        close = CLOSE[at.dtype]
        if not torch.allclose(ours, eager, rtol=close, atol=close * float(eager.abs().max())):
            raise Unsupported("the compiled pass differs from the eager one")
        return compiled_one
