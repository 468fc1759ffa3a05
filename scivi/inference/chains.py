"""Chains of the no-U-turn sampler on a density of one flat vector: nutpie's sampler, or Pyro's.

Chains of a captured density are run in turn. In threads they would wait for each other, since every leapfrog
step calls Python; a process for each would import torch and Pyro (seconds) and could not be given a model
that was defined in a notebook. Where a density cannot be captured, such as one with equations to be solved, a
call of it costs much, and little more for several points: then chains run side by side in threads, and the
points that they wait for are worked out as one batch.

References:
    Hoffman and Gelman 2014, JMLR 15, 1593-1623 (the sampler); Seyboldt, Carlson and Carpenter 2026,
    arXiv:2603.18845 (nutpie: a mass matrix from draws and gradients).
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from queue import Queue
from typing import Any, cast

import numpy as np
import torch
from pyro.infer import NUTS
from torch import Tensor
from tqdm.auto import tqdm

from scivi.errors import FitError, Unsupported, missing_extra
from scivi.inference.capture import Function
from scivi.inference.potential import Potential, refuse_unless_singular

BACKENDS = ("auto", "nutpie", "pyro")
STATS = ("diverging", "acceptance_rate", "step_size", "n_steps", "tree_depth", "energy")


@dataclass(frozen=True)
class Length:
    """How long a chain is: draws kept, and draws before them in which the sampler adapts."""

    draws: int
    warmup: int


@dataclass(frozen=True)
class Chain:
    """One chain.

    Args:
        path: its draws on the unbounded scale, (draw, n).
        stats: what the sampler did at each, by name of ``STATS``, (draw,).
        gradients: evaluations of density and gradient, warm-up included.
    """

    path: Tensor
    stats: dict[str, np.ndarray]
    gradients: int


def chosen(backend: str | None) -> str:
    """The backend that is asked for; the faster one that is installed if none is.

    Raises:
        Unsupported: there is no such backend, or it is not installed.
    """
    if backend not in (None, *BACKENDS):
        raise Unsupported(f'backend = "{backend}" is not offered; {", ".join(map(repr, BACKENDS))} are.')
    installed = find_spec("nutpie") is not None
    if backend == "nutpie" and not installed:
        raise missing_extra("nutpie", "nuts")
    return "nutpie" if installed and backend != "pyro" else "pyro"


def nutpie_chain(function: Function, first: Tensor, length: Length, seed: int, bar: tqdm) -> Chain:
    """One chain by nutpie.

    Args:
        function: from a point (n,) to log density and gradient.
        first: where it starts, (n,).
        length: of the chain.
        seed: of all that is random in it.
        bar: told of every draw.
    """
    import nutpie
    from nutpie.compiled_pyfunc import from_pyfunc

    start, size, calls = first.numpy(), len(first), 0

    def density(point: np.ndarray) -> tuple[float, np.ndarray]:
        nonlocal calls
        calls += 1
        try:
            value, gradient = function(torch.from_numpy(point))
        except RuntimeError as error:
            refuse_unless_singular(error)  # no factor of a matrix there: as Pyro, a divergence
            return -np.inf, np.zeros(size)
        return value.item(), gradient.numpy()

    def kept(point: np.ndarray) -> dict[str, np.ndarray]:
        bar.update()
        return {"point": point.copy()}

    model = from_pyfunc(
        size,
        lambda: density,
        lambda *seeds_and_chain: kept,
        [np.dtype(np.float64)],
        [(size,)],
        ["point"],
        dims={"point": ("coordinate",)},  # nutpie crashes on a dim without a name
        coords={"coordinate": np.arange(size)},
        make_initial_point_fn=lambda _: start.copy(),
    )
    how: dict[str, Any] = {"draws": length.draws, "tune": length.warmup, "chains": 1, "cores": 1}
    try:
        found: Any = nutpie.sample(model, **how, seed=seed, save_warmup=False, progress_bar=False)
    except RuntimeError as error:
        if "initialization points failed" not in str(error):
            raise
        raise FitError(
            "nutpie could not start: where the chain starts, the log density does not depend on some latent, "
            'or is not finite. Give that latent a proper prior, or use backend="pyro".'
        ) from None
    path, told = np.asarray(found["posterior"]["point"])[0], found["sample_stats"]
    if len(path) < length.draws:  # interrupted: nutpie keeps that to itself
        raise KeyboardInterrupt
    stats = {
        name: np.asarray(told["mean_tree_accept" if name == "acceptance_rate" else name])[0]
        for name in STATS
        if name != "tree_depth"
    }
    stats["tree_depth"] = _depth(stats["n_steps"])
    return Chain(torch.as_tensor(np.ascontiguousarray(path)), stats, calls)


class _Meeting:
    """Points of chains that run side by side, worked out together.

    Args:
        many: from points (chain, n) to log densities (chain,) and gradients (chain, n).
        chains: how many there are.
    """

    def __init__(self, many: Function, chains: int) -> None:
        self.many, self.running = many, chains
        self.asked: Queue[tuple[Tensor, Future[tuple[Tensor, Tensor]]] | None] = Queue()
        self.closed = False

    def ask(self, point: Tensor) -> tuple[Tensor, Tensor]:
        """The density at a chain's point, when the others have theirs."""
        answer: Future[tuple[Tensor, Tensor]] = Future()
        self.asked.put((point.clone(), answer))
        if self.closed:
            raise KeyboardInterrupt
        return answer.result()

    def leave(self) -> None:
        """A chain has ended."""
        self.asked.put(None)

    def serve(self) -> None:
        """Answer until all chains have ended. Called in the thread that torch is used in."""
        waiting: list[tuple[Tensor, Future[tuple[Tensor, Tensor]]]] = []
        try:
            while self.running:
                while self.running and len(waiting) < self.running:  # each asks again at once, or ends
                    if (got := self.asked.get()) is None:
                        self.running -= 1
                    else:
                        waiting.append(got)
                if waiting:
                    values, gradients = self.many(torch.stack([point for point, _ in waiting]))
                    for k, (_, answer) in enumerate(waiting):
                        answer.set_result((values[k], gradients[k]))
                    waiting.clear()
        finally:
            self.closed = True
            while not self.asked.empty():
                if (got := self.asked.get()) is not None:
                    waiting.append(got)
            for _, answer in waiting:
                answer.cancel()


def nutpie_chains(
    many: Function, firsts: Sequence[Tensor], length: Length, seeds: Sequence[int], bar: tqdm
) -> list[Chain]:
    """Chains by nutpie, side by side.

    Args:
        many: from points (chain, n) to log densities (chain,) and gradients (chain, n).
        firsts: where each starts, (n,).
        length: of each.
        seeds: of each.
        bar: told of every draw.
    """
    meeting = _Meeting(many, len(firsts))

    def run(first: Tensor, seed: int) -> Chain:
        try:
            return nutpie_chain(meeting.ask, first, length, seed, bar)
        finally:
            meeting.leave()

    with ThreadPoolExecutor(len(firsts), thread_name_prefix="scivi-chain") as pool:
        found = [pool.submit(run, first, seed) for first, seed in zip(firsts, seeds, strict=True)]
        meeting.serve()
        return [each.result() for each in found]


def _depth(n_steps: Any) -> Any:
    """Doublings of a trajectory of so many steps; the last may not have been finished."""
    return np.ceil(np.log2(np.asarray(n_steps) + 1))


class _Kernel(NUTS):
    """Pyro's sampler, which also tells the kinetic energy of a transition's momentum (Pyro 1.9 does not)."""

    kinetic = 0.0

    def _sample_r(self, name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        momentum, unscaled = super()._sample_r(name)
        self.kinetic = float(self._kinetic_energy(unscaled))
        return momentum, unscaled


def pyro_chain(density: Potential, first: Tensor, length: Length, bar: tqdm) -> Chain:
    """One chain by Pyro; its randomness is torch's."""
    calls = 0

    def energy(z: dict[str, Tensor]) -> Tensor:
        nonlocal calls
        calls += 1
        return density.energy(z)

    kernel = _Kernel(potential_fn=energy)
    point = kernel.initial_params = density.split(first)
    kernel.setup(length.warmup)
    path: list[Sequence[Tensor]] = []
    stats: dict[str, list[float]] = {name: [] for name in STATS}
    for k in range(length.warmup + length.draws):
        before = float(cast(Tensor, kernel._fetch_from_cache()[1]))
        called, accepted = calls, kernel._mean_accept_prob
        point = kernel.sample(point)
        bar.update()
        if k < length.warmup:
            continue
        n, n_steps = k - length.warmup + 1, calls - called
        rate = kernel._mean_accept_prob if n == 1 else accepted + n * (kernel._mean_accept_prob - accepted)
        diverged = (n - 1) in kernel.diagnostics()["divergences"][-1:]
        told = (diverged, rate, kernel.step_size, n_steps, _depth(n_steps), before + kernel.kinetic)
        for name, number in zip(STATS, told, strict=True):
            stats[name].append(number)
        path.append([point[name].detach().reshape(-1) for name in density.shapes])
    flat = torch.stack([torch.cat(list(parts)) for parts in path])
    return Chain(flat, {name: np.array(numbers) for name, numbers in stats.items()}, calls)
