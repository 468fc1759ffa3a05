"""How fast are genotypes summed out, beside Pyro's enumeration and beside what memory allows?

    python benchmarks/methylation_speed.py --json methylation_speed.json

The pedigree is `methylation.EXAMPLE`: 13 samples, selfing; loci simulated by the template. Log likelihood of
all reads and its gradient by each locus's own log gain and log loss, float32. Pyro's side is the same model
with a genotype site per individual, `config_enumerate` and `TraceEnum_ELBO`, validation off. Both run
eagerly, in turns, --repeats times; ours is timed compiled too. Both are compared with Pyro's in float64.

A step is one of `scivi.fit`, rows taken, objective, gradient and Adam: of `methylation.make(EXAMPLE)`, whose
loci have rates of their own (a guide of each, integrated on nodes: "marginal", and by one draw of the guide:
"trace"), beside that of `heterogeneous=False`. Each has --batch loci. The two take turns.

One thread, and its processor time: the machine may be busy with something else. Compile time is apart.

The least that must be read and written for a locus is, in bytes: methylated and total reads of each sample in
float32 (4 + 4), two log rates (8) in; its log likelihood (4) and two slopes (8) out. With 13 samples that
is 124. Bandwidth is that of a copy of 256 MB, read and written, taken in turns with the rest.

Figures:
    vs_enumeration: Pyro's time over ours, both eager, from reads on; geometric mean of the repeats.
    vs_enumeration_least, vs_enumeration_most: over the repeats.
    vs_enumeration_compiled: Pyro's time, which is eager, over ours compiled.
    vs_enumeration_tree: the same as vs_enumeration with likelihoods of the reads given to both.
    loss_error, loss_error_pyro: of the log likelihood of all loci, from Pyro's in float64, relative.
    gradient_error, gradient_error_pyro: largest of a locus's slopes, likewise, over the largest slope.
    loss_difference, gradient_difference: likewise, of ours from Pyro's where both are in float64.
    amortised_vs_global: time of a step with one rate of all loci over that of a step with rates of each,
        compiled; of the estimator that `scivi.fit` takes. amortised_vs_global_eager: the same, eager.
    amortised_vs_global_trace, amortised_vs_global_trace_eager: the same by one draw of the guide.
    loci_per_s: of a compiled step with one rate of all loci. loci_per_s_eager: eager.
    loci_per_s_each: of a compiled step with rates of each. loci_per_s_each_eager: eager.
    loci_per_s_reads: of log likelihood and gradient from reads on, compiled.
    loci_per_s_tree: likewise with likelihoods of the reads given.
    bandwidth_fraction: least bytes of a locus times loci_per_s_reads, over the bandwidth.
    bandwidth_fraction_tree: likewise of loci_per_s_tree, which reads likelihoods of three states of each
        sample and a scale in the place of counts, 180 bytes in all.
    bandwidth_fraction_step: likewise of loci_per_s, whose least are the reads, 104 bytes.
    bandwidth_gb_s: of the copy.
    compile_s: of the step with rates of each.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import geometric_mean, median

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.infer import TraceEnum_ELBO, config_enumerate
from pyro.ops.indexing import Vindex
from record import use_threads, write_json
from torch import Tensor

import scivi
from domains.genomics import methylation, transmission
from domains.genomics.reads import Errors, PedigreeReads, seen
from scivi.inference.capture import captured, compiled
from scivi.inference.objective import prepare
from scivi.inference.opening import begin, open_data
from scivi.inference.scores import quiet
from scivi.inference.stepper import Compiled, Eager
from scivi.models import Template, sum_product
from scivi.models.sum_product import Seen

COPIED = 2**26  # numbers, of 256 MB: eight times the cache
TREE = methylation.tree_of(methylation.EXAMPLE)
N = len(TREE.seen)
LEAST_BYTES = {"reads": 8 * N + 8 + 12, "tree": 12 * N + 4 + 8 + 12, "step": 8 * N}
FOUNDER = (0.7, 0.02, 0.28)
NONCONVERSION = np.linspace(0.003, 0.01, N)

Values = tuple[Tensor, Tensor]


@dataclass
class Side:
    """Something that is timed.

    Args:
        run: it, once.
        times: how often it runs in one round.
        seconds: of processor time for one run, by round.
    """

    run: Callable[[], object]
    times: int = 1
    seconds: list[float] = field(default_factory=list)

    def measure(self) -> None:
        """One round."""
        begun = time.process_time()
        for _ in range(self.times):
            self.run()
        self.seconds.append((time.process_time() - begun) / self.times)


@dataclass(frozen=True)
class Loci:
    """Reads, and a point at which to differentiate: log gain and log loss of each locus, (2, loci)."""

    methylated: Tensor
    total: Tensor
    log_rates: Tensor
    most: int

    def double(self) -> Loci:
        """The same in float64."""
        return Loci(self.methylated.double(), self.total.double(), self.log_rates.double(), self.most)

    @classmethod
    def simulated(cls, n: int, seed: int) -> Loci:
        """By the template."""
        template, generator = methylation.template, torch.Generator().manual_seed(seed)
        assert template.simulate is not None
        table, _ = template.simulate({"locus": n}, template.prior, generator)
        methylated, total = (
            torch.tensor(table[k].values.astype(np.float32)) for k in ("methylated", "total")
        )
        centre = torch.tensor([[template.prior.gain], [template.prior.loss]]).log()
        return cls(methylated, total, centre + 0.5 * torch.randn(2, n, generator=generator), int(total.max()))


def constants(dtype: torch.dtype) -> tuple[Tensor, Errors]:
    """The founder's states and the errors of reads."""
    two = torch.tensor([0.02], dtype=dtype)
    return torch.tensor(FOUNDER, dtype=dtype), Errors(torch.tensor(NONCONVERSION, dtype=dtype), two, two)


def of_reads(log_rates: Tensor, methylated: Tensor, total: Tensor, most: int) -> Values:
    """Log likelihood of each locus and its slopes, by ours."""
    leaf = log_rates.detach().requires_grad_(True)
    step = transmission.step("selfing", *leaf.exp().unbind(0))
    founder, errors = constants(total.dtype)
    reads = PedigreeReads(TREE, step, founder.unbind(0), total, errors, most=most)
    log_p = reads.log_prob(methylated)
    return log_p.detach(), torch.autograd.grad(log_p.sum(), leaf)[0]


def of_likelihoods(log_rates: Tensor, *given: Tensor) -> Values:
    """The same with the likelihoods of the reads, by state, and their scale given."""
    leaf = log_rates.detach().requires_grad_(True)
    step = transmission.step("selfing", *leaf.exp().unbind(0))
    root = constants(log_rates.dtype)[0].unbind(0)
    log_p = sum_product.log_likelihood(TREE, Seen(given[:-1], given[-1]), step, root)
    return log_p.detach(), torch.autograd.grad(log_p.sum(), leaf)[0]


def enumerated(log_rates: Tensor, loci: Loci, likelihoods: Seen | None) -> None:
    """The Pyro model: a genotype site for each individual."""
    step = torch.stack(
        [torch.stack(row, -1) for row in transmission.step("selfing", *log_rates.exp().unbind(0))], -2
    )
    along = {g: torch.linalg.matrix_power(step, g) for g in {TREE.length[v] for v in TREE.edges}}
    founder, errors = constants(loci.total.dtype)
    phi, place = 1 / errors.overdispersion - 1, torch.arange(len(loci.total))
    sample = {v: s for s, v in enumerate(TREE.seen)}
    with pyro.plate("locus", len(loci.total)):
        genotypes = []
        for v, p in enumerate(TREE.parent):
            law = founder if p < 0 else Vindex(along[TREE.length[v]])[place, genotypes[p]]
            genotypes.append(pyro.sample(f"genotype_{v}", dist.Categorical(law)))
            if v not in sample:
                continue
            s = sample[v]
            if likelihoods is not None:
                log_e = torch.stack([e[s] for e in likelihoods.states], -1).log()
                pyro.factor(f"reads_{s}", Vindex(log_e)[place, genotypes[v]])
                continue
            half = torch.full_like(phi[0], 0.5)
            mean = torch.stack([errors.nonconversion[s], half, 1 - errors.inappropriate[0]])[genotypes[v]]
            reads = dist.BetaBinomial(mean * phi, (1 - mean) * phi, loci.total[:, s])
            pyro.sample(f"reads_{s}", reads, obs=loci.methylated[:, s])


def of_pyro(loci: Loci, likelihoods: Seen | None = None) -> Values:
    """Log likelihood of all loci and its slopes, by Pyro."""
    leaf = loci.log_rates.detach().requires_grad_(True)
    elbo = TraceEnum_ELBO(max_plate_nesting=1)
    with pyro.validation_enabled(False):
        loss = elbo.differentiable_loss(
            config_enumerate(enumerated), lambda *_: None, leaf, loci, likelihoods
        )
    log_p = -loss
    if likelihoods is not None:
        log_p = log_p + likelihoods.log_scale.sum()
    return log_p.detach(), torch.autograd.grad(log_p, leaf)[0]


def machine_code(
    function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]
) -> tuple[Callable[[], Sequence[Tensor]], str]:
    """A call of the function, compiled."""
    run, how = compiled(captured(function, examples), examples)
    return lambda: run(*examples), how


class Steps:
    """A template's training steps, as a fit takes them.

    Args:
        template: what is fitted.
        table: its data.
        plan: how; whether its steps are compiled too.
    """

    def __init__(self, template: Template, table: object, plan: scivi.Plan) -> None:
        self.state = begin(template, open_data(template, table), plan)
        objective = prepare(self.state.bound, self.state.bound.example, plan)
        self.estimator, begun = objective.estimator, time.perf_counter()
        with quiet():
            self.stepper = (
                Compiled(self.state, objective, plan) if plan.compile == "on" else Eager(objective, plan)
            )
        self.compile_s, self.at_once = time.perf_counter() - begun, self.stepper.told.get("at_once", 1)

    def side(self) -> Side:
        """As what is timed: at least ten steps where they are compiled."""
        compiled = isinstance(self.stepper, Compiled)
        steps = self.at_once * (-(-10 // self.at_once)) if compiled else 1

        def run() -> None:
            with quiet():
                last = self.state.step + steps
                while self.state.step < last:
                    self.stepper.take(self.state, last - self.state.step)
                self.stepper.settle(self.state)
            self.state.window = {}

        run()
        self.steps = steps
        return Side(run)


def in_turns(sides: Sequence[Side], repeats: int) -> None:
    """Measure all, again and again."""
    for side in sides:
        side.run()
    for _ in range(repeats):
        for side in sides:
            side.measure()


def enumeration(n: int, seed: int, repeats: int) -> dict[str, float]:
    """Figures of the sum over genotypes alone."""
    loci = Loci.simulated(n, seed)
    errors = constants(loci.total.dtype)[1]
    likelihoods = seen(loci.methylated, loci.total, errors, len(FOUNDER), loci.most)
    arguments = (loci.log_rates, loci.methylated, loci.total)
    given = (loci.log_rates, *likelihoods.states, likelihoods.log_scale)

    def ours(*arguments: Tensor) -> Values:
        return of_reads(*arguments, loci.most)

    exact = loci.double()
    truth = of_pyro(exact)
    figures: dict[str, float] = {}
    for end, found in (
        ("error", ours(*arguments)),
        ("error_pyro", of_pyro(loci)),
        ("difference", of_reads(exact.log_rates, exact.methylated, exact.total, exact.most)),
    ):
        figures[f"loss_{end}"] = float(((found[0].sum() - truth[0]) / truth[0]).abs())
        figures[f"gradient_{end}"] = float((found[1] - truth[1]).abs().max() / truth[1].abs().max())
    reads, tree_code = machine_code(ours, arguments)[0], machine_code(of_likelihoods, given)[0]
    source, target = torch.rand(COPIED), torch.empty(COPIED)
    sides = {
        "pyro": Side(lambda: of_pyro(loci)),
        "reads": Side(lambda: ours(*arguments)),
        "pyro_tree": Side(lambda: of_pyro(loci, likelihoods)),
        "tree": Side(lambda: of_likelihoods(*given)),
        "reads_compiled": Side(reads, 20),
        "tree_compiled": Side(tree_code, 100),
        "copy": Side(lambda: target.copy_(source)),
    }
    in_turns(list(sides.values()), repeats)
    for name, side in sides.items():
        spread = f"{1e3 * min(side.seconds):.3f} to {1e3 * max(side.seconds):.3f}"
        print(f"{name:15s} {1e3 * median(side.seconds):9.3f} ms ({spread})")
    ratio = _ratios(sides["pyro"], sides["reads"])
    bandwidth = 8 * COPIED / median(sides["copy"].seconds)
    rate = {name: n / median(sides[f"{name}_compiled"].seconds) for name in ("reads", "tree")}
    return figures | {
        "vs_enumeration": geometric_mean(ratio),
        "vs_enumeration_least": min(ratio),
        "vs_enumeration_most": max(ratio),
        "vs_enumeration_compiled": geometric_mean(_ratios(sides["pyro"], sides["reads_compiled"])),
        "vs_enumeration_tree": geometric_mean(_ratios(sides["pyro_tree"], sides["tree"])),
        "loci_per_s_reads": rate["reads"],
        "loci_per_s_tree": rate["tree"],
        "bandwidth_fraction": LEAST_BYTES["reads"] * rate["reads"] / bandwidth,
        "bandwidth_fraction_tree": LEAST_BYTES["tree"] * rate["tree"] / bandwidth,
        "bandwidth_gb_s": bandwidth / 1e9,
    }


def _ratios(one: Side, other: Side) -> list[float]:
    return [a / b for a, b in zip(one.seconds, other.seconds, strict=True)]


def steps(n: int, batch: int, seed: int, repeats: int) -> dict[str, float]:
    """Figures of training steps."""
    templates = {
        "global": methylation.make(methylation.EXAMPLE, heterogeneous=False),
        "each": methylation.template,
    }
    simulate, generator = methylation.template.simulate, torch.Generator().manual_seed(seed)
    assert simulate is not None
    table, _ = simulate({"locus": n}, methylation.template.prior, generator)
    runs, sides = {}, {}
    for how in ("on", "off"):
        for name, estimator in (("global", "auto"), ("each", "auto"), ("each", "trace")):
            plan = scivi.Plan(rows_per_batch=batch, compile=how, estimator=estimator, stop=None)
            key = name + ("_trace" if estimator == "trace" else "") + ("_eager" if how == "off" else "")
            runs[key] = Steps(templates[name], table, plan)
            sides[key] = runs[key].side()
            told = f"{runs[key].estimator}, {runs[key].at_once} a call, ready in {runs[key].compile_s:.0f} s"
            print(f"{key:17s} {told}", flush=True)
    in_turns(list(sides.values()), repeats)
    seconds = {key: [s / runs[key].steps for s in side.seconds] for key, side in sides.items()}
    for key, of_step in seconds.items():
        spread = f"{1e3 * min(of_step):.2f} to {1e3 * max(of_step):.2f}"
        print(f"{key:17s} {1e3 * median(of_step):9.2f} ms a step ({spread})")
    figures = {"compile_s": runs["each"].compile_s}
    for end in ("", "_eager"):
        for kind in ("", "_trace"):
            pairs = zip(seconds["global" + end], seconds["each" + kind + end], strict=True)
            figures[f"amortised_vs_global{kind}{end}"] = geometric_mean(a / b for a, b in pairs)
        figures[f"loci_per_s{end}"] = batch / median(seconds["global" + end])
        figures[f"loci_per_s_each{end}"] = batch / median(seconds["each" + end])
    return figures


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--loci", type=int, default=8192, help="of the sum over genotypes")
    parser.add_argument("--batch", type=int, default=8192, help="loci of a step")
    parser.add_argument("--table", type=int, default=65536, help="loci that steps are taken from")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    use_threads(1)
    print(f"load {os.getloadavg()[0]:.1f}")
    figures = enumeration(given.loci, given.seed, given.repeats)
    figures |= steps(given.table, given.batch, given.seed, given.repeats)
    bandwidth = 1e9 * figures["bandwidth_gb_s"]
    figures["bandwidth_fraction_step"] = LEAST_BYTES["step"] * figures["loci_per_s"] / bandwidth
    print("\n" + "\n".join(f"{name:32s} {value:.4g}" for name, value in figures.items()))
    settings = {name: value for name, value in vars(given).items() if isinstance(value, int)}
    settings |= {"threads": 1, "load": os.getloadavg()[0]}
    write_json(given.json, __doc__.splitlines()[0], figures, settings)


if __name__ == "__main__":
    main()
