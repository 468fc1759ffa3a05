from __future__ import annotations

from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from scipy.stats import gamma, norm

import scivi
from scivi.errors import Unsupported
from scivi.inference.opening import open_data
from scivi.inference.potential import Potential, fast, potential
from scivi.inference.scores import quiet
from scivi.inputs.batches import chunks
from scivi.models.binding import bind, seeded

pytestmark = pytest.mark.usefixtures("unchecked")

Y = np.array([0.3, -1.2, 2.0])


@pytest.fixture
def unchecked():
    """The sampler runs without the checks of distributions' arguments, which cannot be captured."""
    with quiet():
        yield


def model(batch, prior, nets):
    shift = pyro.sample("shift", dist.Normal(0.0, 3.0))
    with batch.plate("row"):
        rate = pyro.sample("rate", dist.Gamma(2.0, 4.0))
        batch.observe("y", dist.Normal(shift, rate))


TEMPLATE = scivi.Template(
    name="scales",
    rows="row",
    model=model,
    fields={"y": scivi.Field(("row",), role="observed")},
    dims={"shift": (), "rate": ("row",)},
)


def density_of(template: scivi.Template) -> Potential:
    source = open_data(template, xr.Dataset({"y": ("row", Y)}))
    batch = next(chunks(source, template.fields, template.row_dims, 3, torch.device("cpu"), torch.float64))
    with seeded(0):
        return potential(bind(template, batch, 0), batch)


def test_the_density_is_that_of_the_latents_and_the_jacobian_of_their_transforms():
    density = density_of(TEMPLATE)
    x = torch.tensor([0.4, -0.3, 0.1, 0.7], dtype=torch.float64)
    named = {name: value.numpy() for name, value in density.values(x[None]).items()}
    shift, rate = named["shift"][0], named["rate"][0]
    log_jacobian = np.log(rate).sum()  # rate = exp(x): its own derivative
    expected = norm.logpdf(shift, 0, 3) + gamma.logpdf(rate, 2, scale=1 / 4).sum()
    expected += norm.logpdf(Y, shift, rate).sum() + log_jacobian
    value, gradient = density.density(x)
    assert float(value) == pytest.approx(expected, rel=1e-12)  # float64, ten terms
    step = 1e-6
    for k, slope in enumerate(gradient.tolist()):
        moved = [float(density.density(x + step * sign * torch.eye(4)[k])[0]) for sign in (1, -1)]
        assert slope == pytest.approx((moved[0] - moved[1]) / (2 * step), rel=1e-6)  # second order in step


@pytest.mark.parametrize(("calls", "how"), [(10, "captured"), (10**7, "compiled")])
def test_the_captured_and_the_compiled_density_are_the_density(calls, how, monkeypatch):
    density = density_of(TEMPLATE)
    asked = []
    if how == "compiled":  # what the compiler makes of a graph is the business of its own tests
        monkeypatch.setattr(
            "scivi.inference.potential.compiled", lambda graph, x: (asked.append(1) or graph, how)
        )
    function, told = fast(density, calls)
    assert told == {"density": how}
    assert len(asked) == (how == "compiled")
    x = torch.tensor([0.4, -0.3, 0.1, 0.7], dtype=torch.float64)
    for ours, theirs in zip(function(x), density.density(x), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)  # the same operations


def test_a_density_that_cannot_be_captured_runs_as_it_is_and_says_why():
    density = density_of(TEMPLATE)

    def by_value(z: dict[str, Any]) -> torch.Tensor:
        return -density.energy(z) if float(z["shift"].detach()) > 0 else density.energy(z)

    other = Potential(density.shapes, density.transforms, by_value, density.first)
    function, told = fast(other, 10)
    assert function == other.density
    assert told["density"] == "eager"
    assert "decides by the value of a tensor" in told["why"]


def test_a_start_takes_the_values_that_are_given_and_draws_the_rest():
    density = density_of(TEMPLATE)
    with seeded(1):
        point = density.split(density.start({"rate": torch.tensor([1.0, 2.0, 3.0])}))
        other = density.start({"rate": torch.full((3,), torch.nan)})  # of no finite density
    torch.testing.assert_close(point["rate"], torch.log(torch.tensor([1.0, 2.0, 3.0]).double()))
    assert abs(float(point["shift"])) < 2
    assert bool(torch.isfinite(other).all())


def test_a_latent_that_is_discrete_and_unbounded_is_refused():
    def counts(batch, prior, nets):
        with batch.plate("row"):
            n = pyro.sample("n", dist.Poisson(2.0))
            batch.observe("y", dist.Normal(n, 1.0))

    template = scivi.Template(
        name="counts",
        rows="row",
        model=counts,
        fields=TEMPLATE.fields,
        dims={"n": ("row",)},
        guide=lambda batch, prior, nets: None,
    )
    with pytest.raises(Unsupported, match=r"discrete latents \['n'\] one has no finite support"):
        density_of(template)
