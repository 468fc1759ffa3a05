"""Encoders: from a row of data to the numbers that a guide needs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def perceptron(
    inputs: int, outputs: int, hidden: Sequence[int] = (64, 64), *, last: float = 1.0, norm: bool = False
) -> nn.Sequential:
    """A plain multilayer perceptron with SiLU between layers.

    Args:
        inputs: features in.
        outputs: features out.
        hidden: widths of the layers between.
        last: factor on the starting weights of the last layer; 0 starts at zero output, which suits a
            correction.
        norm: put a layer norm before each activation.
    """
    layers: list[nn.Module] = []
    widths = [inputs, *hidden]
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), *([nn.LayerNorm(after)] if norm else []), nn.SiLU()]
    head = nn.Linear(widths[-1], outputs)
    with torch.no_grad():
        head.weight.mul_(last)
        head.bias.zero_()
    return nn.Sequential(*layers, head)


class SequenceEncoder(nn.Module):
    """An encoder of sequences: a stack of dilated convolutions that sees both sides of each step.

    Args:
        inputs: features of a step.
        outputs: features out, for each step.
        width: channels.
        layers: convolutions; the reach is 2 ** layers steps to either side.
    """

    def __init__(self, inputs: int, outputs: int, width: int = 32, layers: int = 4) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.layers = nn.ModuleList(
            nn.Conv1d(width, width, 3, padding=2**k, dilation=2**k) for k in range(layers)
        )

    def forward(self, steps: Tensor) -> Tensor:
        """Encode (*batch, time, inputs) to (*batch, time, outputs)."""
        flat = self.first(steps.reshape(-1, *steps.shape[-2:])).mT
        for layer in self.layers:
            flat = flat + nn.functional.silu(layer(flat))
        return self.last(flat.mT).reshape(*steps.shape[:-1], -1)
