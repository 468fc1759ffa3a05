"""The log marginal of all rows and its gradient in the globals, compiled where many rows repay it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from scivi.errors import Unsupported
from scivi.inference import marginal
from scivi.inference.capture import Function, captured, compiled, work_of
from scivi.inference.plan import Plan
from scivi.inference.stepper import CLOSE, Form, kind
from scivi.inputs.batches import Batch
from scivi.models.binding import Bound
from scivi.models.guides import JointNormalGuide

# Numbers that a pass writes from which compiling repays itself in a single fit (our choice), and rows x nodes
# from which it is worth finding out how many they are.
MANY_NUMBERS, MANY = 2**33, 2**22


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
        self.work, self.asked = work, plan.compile == "on"
        self.wanted = self.asked or (plan.compile == "auto" and work >= MANY)
        self.names = [n for n, _ in (*bound.nets.named_parameters(), *bound.nets.named_buffers())]
        self.own = [p.detach() for p in bound.nets.parameters()] + [*bound.nets.buffers()]
        self.form: dict[int, tuple[object, ...]] = {}  # of the chunks that are compiled, by nodes
        self.ready: dict[int, Function] = {}  # those that agreed with the eager pass of this fit

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
        form = Form(batch, batch.index)
        shorter = self.form.setdefault(per_dim, form.key) != form.key  # the last chunk
        if not self.wanted or shorter:
            return self._eager(at, batch, per_dim)
        if per_dim not in self.ready:
            try:
                self.ready[per_dim] = self._function(at, form, per_dim)
            except Unsupported:
                self.wanted = False
                return self._eager(at, batch, per_dim)
        value, slope = self.ready[per_dim](at, *self.own, *form.tensors)
        return value, slope

    def _function(self, at: Tensor, form: Form, per_dim: int) -> Function:
        """The template's function for such a chunk, if it serves, or a new one.

        Raises:
            Unsupported: it cannot be captured, or differs from the eager one.
        """
        memo = self.bound.template.memo
        key = ("pass", per_dim, self.layout, form.key, *(kind(t) for t in self.own))
        arguments = [at, *self.own, *form.tensors]
        if key in memo and self._agrees(memo[key], arguments, form.like, per_dim):
            return memo[key]

        def function(at: Tensor, *tensors: Tensor) -> tuple[Tensor, Tensor]:
            n = len(self.names)
            batch, index = form.filled(tensors[n:])
            held = dict(zip(self.names, tensors[:n], strict=True))
            some = replace(batch, index=index)
            return self.bound.holding(held, lambda: self._eager(at, some, per_dim))

        graph = captured(function, arguments, owned=self.own)
        chunks = self.work / (form.like.n_rows() * marginal.n_nodes(self.layout.dims, per_dim))
        if not self.asked and work_of(graph) * chunks < MANY_NUMBERS:
            raise Unsupported("compiling would take longer than it saves")
        memo[key], _ = compiled(graph, arguments)
        if not self._agrees(memo[key], arguments, form.like, per_dim):
            del memo[key]
            raise Unsupported("the compiled pass differs from the eager one")
        return memo[key]

    def _agrees(self, function: Function, arguments: list[Tensor], batch: Batch, per_dim: int) -> bool:
        ours, eager = function(*arguments)[1], self._eager(arguments[0], batch, per_dim)[1]
        close = CLOSE[eager.dtype]
        return torch.allclose(ours, eager, rtol=close, atol=close * float(eager.abs().max()))
