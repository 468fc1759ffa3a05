"""The log marginal of all rows and its gradient in the globals, compiled where many rows repay it."""

from __future__ import annotations

from collections.abc import Iterable
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
        self.ready: dict[object, Function | None] = {}  # by nodes and form; None: eager

    def __call__(self, theta: Tensor, batches: Iterable[Batch], per_dim: int) -> Tensor:
        """Log marginal of each chunk of rows and its gradient, (chunk, 1 + D), in float64.

        Args:
            theta: globals on the unbounded scale, (D,).
            batches: the rows, in chunks; those like the first one are worth compiling.
            per_dim: nodes per local dimension.
        """
        at, first, out = theta.detach().to(self.module.loc.dtype), None, []
        for batch in batches:
            form = Form(batch, batch.index)
            first = first or form.key
            run = self._ready(at, form, per_dim) if self.wanted and form.key == first else None
            value, slope = run(at, *self.own, *form.tensors) if run else self._eager(at, batch, per_dim)
            out.append(torch.cat([value.reshape(1), slope]).to(theta))
        return torch.stack(out)

    def _eager(self, at: Tensor, batch: Batch, per_dim: int) -> tuple[Tensor, Tensor]:
        at = at.detach().requires_grad_(True)
        with torch.enable_grad():
            value = marginal.log_marginal(self.bound, self.module, at, batch, self.layout, per_dim)
            (slope,) = torch.autograd.grad(value, at)
        return value.detach(), slope

    def _ready(self, at: Tensor, form: Form, per_dim: int) -> Function | None:
        """The function of such chunks, if it agreed with the eager pass of this fit."""
        key = (per_dim, form.key)
        if key not in self.ready:
            try:
                self.ready[key] = self._function(at, form, per_dim)
            except Unsupported:
                self.wanted, self.ready[key] = False, None
        return self.ready[key]

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
