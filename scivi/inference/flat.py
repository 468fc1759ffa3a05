"""All that a step changes, as a few flat tensors, and the optimisers' formulas on them."""

from __future__ import annotations

import torch
from torch import Tensor

from scivi.errors import Unsupported
from scivi.inference.objective import Objective
from scivi.inference.state import State
from scivi.inputs.batches import Batch


class Flat:
    """Parameters, the optimiser's moments and the nets' buffers of a fit, read from and written to its state.

    Args:
        state: of the fit.

    Raises:
        Unsupported: the parameters differ in dtype or device.
    """

    def __init__(self, state: State) -> None:
        trained = {n: p for n, p in state.bound.nets.named_parameters() if p.requires_grad}
        kinds = {(p.dtype, p.device) for p in trained.values()}
        if len(kinds) > 1:
            raise Unsupported(f"parameters of several kinds: {sorted(map(str, kinds))}")
        self.names, self.shapes = list(trained), [p.shape for p in trained.values()]
        self.sizes = [p.numel() for p in trained.values()]
        self.dtype, self.device = kinds.pop()
        self.buffers = [n for n, _ in state.bound.nets.named_buffers()]
        group = state.optimiser.param_groups[0]
        self.adam = isinstance(state.optimiser, torch.optim.Adam)
        self.slots = ("exp_avg", "exp_avg_sq") if self.adam else ("momentum_buffer",)
        self.numbers: tuple[float, ...] = (
            (*group["betas"], group["eps"]) if self.adam else (group["momentum"],)
        )

    @property
    def n_flat(self) -> int:
        """How many of the tensors are as long as all parameters together; the others are buffers."""
        return 1 + len(self.slots)

    def read(self, state: State) -> list[Tensor]:
        """Parameters and moments, each flat, then buffers; none of them the state's own."""
        parameters = [p for p in state.bound.nets.parameters() if p.requires_grad]
        out = [torch.cat([p.detach().reshape(-1) for p in parameters])]
        for slot in self.slots:
            held = [state.optimiser.state[p].get(slot) for p in parameters]
            pairs = zip(held, parameters, strict=True)
            out.append(
                torch.cat([torch.zeros_like(p).reshape(-1) if h is None else h.reshape(-1) for h, p in pairs])
            )
        return [*(t.detach() for t in out), *(b.detach().clone() for b in state.bound.nets.buffers())]

    def write(self, tensors: list[Tensor], state: State) -> None:
        """Put the tensors back in place."""
        parameters = [p for p in state.bound.nets.parameters() if p.requires_grad]
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](parameters), self.split(tensors[0]))
            for buffer, value in zip(state.bound.nets.buffers(), tensors[self.n_flat :], strict=True):
                buffer.copy_(value)
        moments = [self.split(t) for t in tensors[1 : self.n_flat]]
        for k, p in enumerate(parameters):
            slots = {name: moment[k].clone() for name, moment in zip(self.slots, moments, strict=True)}
            if self.adam:
                slots["step"] = torch.tensor(float(state.step), device=self.device)
            state.optimiser.state[p] = slots

    def split(self, flat: Tensor) -> list[Tensor]:
        """A flat tensor as one for each parameter."""
        return [x.view(s) for x, s in zip(flat.split(self.sizes), self.shapes, strict=True)]

    def held(self, flat: Tensor, buffers: list[Tensor]) -> dict[str, Tensor]:
        """Values by name of parameter and buffer."""
        return {
            **dict(zip(self.names, self.split(flat), strict=True)),
            **dict(zip(self.buffers, buffers, strict=True)),
        }

    def moved(self, own: list[Tensor], gradient: Tensor, length: Tensor, root: Tensor) -> list[Tensor]:
        """Parameters and moments after an update of the optimiser.

        Args:
            own: parameters and moments.
            gradient: (n,).
            length: learning rate; for Adam over its first bias correction, ().
            root: square root of Adam's second bias correction, ().
        """
        flat, first, *second = own[: self.n_flat]
        length, root = length.to(self.dtype), root.to(self.dtype)
        if not self.adam:
            first = self.numbers[0] * first + gradient
            return [flat - length * first, first]
        beta1, beta2, eps = self.numbers
        first = first + (1 - beta1) * (gradient - first)
        square = beta2 * second[0] + (1 - beta2) * gradient.square()
        return [flat - length * (first / (square.sqrt() / root + eps)), first, square]

    def corrections(self, lr: float, step: int) -> tuple[float, float]:
        """``length`` and ``root`` of ``moved`` at a step, counted from 0."""
        if not self.adam:
            return lr, 1.0
        beta1, beta2, _ = self.numbers
        return lr / (1 - beta1 ** (step + 1)), (1 - beta2 ** (step + 1)) ** 0.5

    def step(
        self, objective: Objective, batch: Batch, own: list[Tensor], numbers: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """One step as a function of tensors alone.

        Args:
            objective: of the fit; with its plan's clipping.
            batch: the rows.
            own: flat tensors and buffers, as ``read`` gives them.
            numbers: step length, Adam's root and KL weight, (3,).

        Returns:
            The new flat tensors and buffers; and objective, its square, gradient norm, parts and 1, as a
            window takes them in.
        """
        length, root, beta = numbers.unbind()
        buffers = [b.clone() for b in own[self.n_flat :]]
        leaf = own[0].detach().requires_grad_(True)
        value = objective.bound.holding(
            self.held(leaf, buffers), lambda: objective.evaluate(batch, beta.to(self.dtype))
        )
        (gradient,) = torch.autograd.grad(value.loss, leaf)
        norm = gradient.norm()
        if objective.plan.clip is not None:  # as torch's clip_grad_norm_
            gradient = gradient * (objective.plan.clip / (norm + 1e-6)).clamp(max=1.0)
        nats = value.objective
        entries = [nats, nats.square(), norm, *value.parts.values(), torch.ones_like(nats)]
        told = torch.stack([e.detach().double().reshape(()) for e in entries])
        return [*self.moved(own, gradient, length, root), *buffers], told
