"""Several processes as one fit: each takes its share of every minibatch, and all take the same step.

Process r of W takes rows_r of the B rows of a minibatch, and its plates scale by N / rows_r. So the mean over
processes of the objectives, weighed by rows_r W / B, is the objective of the whole minibatch, with what has
no rows counted once; and so with the gradients, which are averaged in one exchange before they are clipped.

Nothing here is kept between calls but torch's own process group: inside one (``torch.distributed`` is
initialised) a fit is shared, elsewhere it is not.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from scivi.errors import FitError, PlanError, listed
from scivi.inference.processes import LOST, Place, place

HEED = 10  # steps between looks at what others ask for, where a look waits for a GPU (our choice)
MEET, WAIT = timedelta(minutes=10), timedelta(hours=2)  # for others to come; for what the first does alone


class Team:
    """The processes of one fit, seen from one of them; alone unless told otherwise.

    Args:
        rank: number of this process.
        size: number of processes.

    Attributes:
        asked: whether this process was asked to stop; all heed it at the same step.
        deadline: when the fit is to give way, on this process's clock (``time.perf_counter``).
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size
        self.asked, self.deadline, self._is_due = False, math.inf, False

    @property
    def due(self) -> bool:
        """Whether the fit is to give way after this step: by the clock, of several processes by any one's."""
        return time.perf_counter() > self.deadline if self.size == 1 else self._is_due

    def device(self, device: torch.device) -> torch.device:
        """The device with its number, so that reading threads take the same one."""
        if self.size == 1 or device.type != "cuda" or device.index is not None:
            return device
        return torch.device("cuda", torch.cuda.current_device())

    def streams(self, seed: int, step: int, device: torch.device) -> dict[torch.device, Tensor]:
        """Random states with which this process takes a step: its own, and so in no need of being saved."""
        mixed = np.random.SeedSequence([seed, self.rank, step]).generate_state(1, np.uint64)
        devices = {torch.device("cpu"), device}
        return {d: torch.Generator(d).manual_seed(int(mixed[0] >> 1)).get_state() for d in devices}

    def average(
        self,
        nets: nn.Module,
        before: Sequence[Tensor],
        numbers: Mapping[str, Tensor],
        weight: float,
        look: bool,
    ) -> tuple[dict[str, Tensor], bool]:
        """Replace gradients by their mean over processes, and what buffers have gone through likewise.

        Args:
            nets: with this process's gradients; a parameter without one counts as zero.
            before: what ``moving`` told before the step.
            numbers: of this process, by name.
            weight: of this process's gradients and numbers; over processes they sum to their number.
            look: whether to look at what the others ask for.

        Returns:
            The means of the numbers, and whether any process was asked to stop.
        """
        parameters, buffers = [p for p in nets.parameters() if p.requires_grad], moving(nets)
        like = parameters[0]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        flags = like.new_tensor([self.asked, time.perf_counter() > self.deadline])
        weighed = [*gradients, *numbers.values()]
        moves = [torch.where(now == then, 0, now - then) for now, then in zip(buffers, before, strict=True)]
        plain = [*moves, flags]
        pieces = [weight * t.detach().to(like) for t in weighed] + [t.to(like) for t in plain]
        flat = torch.cat([t.reshape(-1) for t in pieces])
        with together():
            dist.all_reduce(flat)
        found = iter((flat / self.size).split([t.numel() for t in pieces]))
        for parameter in parameters:
            parameter.grad = next(found).view_as(parameter)
        means = {name: next(found).reshape(value.shape) for name, value in numbers.items()}
        with torch.no_grad():
            for now, then in zip(buffers, before, strict=True):  # what has not moved keeps its bits
                now.copy_(then + next(found).view_as(then).to(then))
        if not look:
            self._is_due = False
            return means, False
        asked, self._is_due = (flag > 0 for flag in next(found).tolist())
        return means, asked

    def follow(self, nets: nn.Module) -> None:
        """Take over parameters and buffers of the first process."""
        if self.size > 1:
            with torch.no_grad(), together():
                for tensor in [*nets.parameters(), *nets.buffers()]:
                    held = tensor.detach().contiguous()
                    if held.numel():
                        dist.broadcast(held, 0)
                        tensor.copy_(held)

    def told(self, value: Any, root: int = 0) -> Any:
        """What one process says, such as JSON holds, to all."""
        if self.size == 1:
            return value
        said = json.dumps(value).encode() if self.rank == root else b""
        with together():
            length = torch.tensor([len(said)], device=_device())
            dist.broadcast(length, root)
            letters = torch.zeros(int(length), dtype=torch.uint8, device=_device())
            if self.rank == root:
                letters = torch.frombuffer(bytearray(said), dtype=torch.uint8).to(letters)
            dist.broadcast(letters, root)
        return json.loads(bytes(letters.cpu().numpy()))

    def each(self, value: Any) -> list[Any]:
        """What every process says, such as JSON holds, by rank."""
        return [self.told(value, rank) for rank in range(self.size)]

    def any(self, flag: bool) -> bool:
        """Whether any process says so."""
        return bool(self.total(torch.tensor(float(flag), device=_device())) > 0) if self.size > 1 else flag

    def total(self, value: Tensor) -> Tensor:
        """The sum over processes."""
        if self.size == 1:
            return value
        found = value.to(_device(), copy=True)
        with together():
            dist.all_reduce(found)
        return found.to(value)

    def wait(self) -> None:
        """Until all processes have come here."""
        self.any(False)

    def agree(self, parts: Mapping[str, Any]) -> None:
        """Refuse processes that are not of one fit.

        Args:
            parts: what they must share, such as JSON holds, by name.

        Raises:
            PlanError: naming the parts in which they differ.
        """
        if self.size == 1:
            return
        codes = [hashlib.sha256(json.dumps(p, sort_keys=True).encode()).digest() for p in parts.values()]
        table = torch.zeros(self.size, len(parts), dtype=torch.int64)
        table[self.rank] = torch.tensor([int.from_bytes(code[:7], "big") for code in codes])
        found = self.total(table)
        different = [name for name, codes in zip(parts, found.T, strict=True) if len(codes.unique()) > 1]
        if different:
            what = f"the {self.size} processes of this fit were given different"
            raise PlanError(f"{what} {', '.join(different)}; start all of them in the same way.")


def team() -> Team:
    """The processes of the group that this one has joined; this one alone if there is none."""
    if dist.is_available() and dist.is_initialized():
        return Team(dist.get_rank(), dist.get_world_size())
    return Team()


def moving(nets: nn.Module) -> list[Tensor]:
    """The buffers that a step may change by some amount."""
    return [b for b in nets.buffers() if b.is_floating_point()]


def _device() -> torch.device:
    """Where the group exchanges numbers."""
    on_gpu = dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


@contextmanager
def together() -> Iterator[None]:
    """An exchange, whose failure means that a process is gone."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise FitError(f"{LOST}; its own message says why ({reason}).") from None


@contextmanager
def group(device: str = "cpu") -> Iterator[Team]:
    """Join the processes that were started with this one, for as long as it lasts; alone, do nothing.

    Args:
        device: of the plan. "cuda" takes the GPU of this process's number on its machine.

    Yields:
        The processes.

    Raises:
        PlanError: the environment is torn, a GPU was named or is not there.
        FitError: the others did not come.
    """
    own = place(os.environ)
    if own is None or dist.is_initialized():
        yield team()
        return
    on_gpu, before = device.startswith("cuda"), 0
    if on_gpu:
        before = torch.cuda.current_device()
        torch.cuda.set_device(_gpu(own, device))
    try:
        with together():
            store, rank, size = next(dist.rendezvous(own.meeting, own.rank, own.size, timeout=MEET))
            backend = "nccl" if on_gpu else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=WAIT)
        yield team()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        if on_gpu:
            torch.cuda.set_device(before)


def _gpu(own: Place, device: str) -> int:
    """The number of this process's GPU."""
    here = torch.cuda.device_count()
    faults = []
    if device != "cuda":
        faults.append(f'device = "{device}" names one GPU for all of them; use "cuda"')
    if not here:
        faults.append("torch finds no GPU on this machine")
    elif own.local >= here > 1:
        faults.append(f"this is number {own.local + 1} on a machine with {here} GPUs")
    if faults:
        raise PlanError(listed(f"{own.size} processes cannot share this fit:", faults))
    return own.local % here  # a scheduler may show each process one GPU only
