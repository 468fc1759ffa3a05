"""Networks by hand against their equations written out, and what is read off them."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from domains.kinetics import rates, tensors
from domains.kinetics.networks import Network, Reaction, network
from scivi.errors import DataError, TemplateError, Unsupported

TORCH = {"dtype": torch.float64}

ROBERTSON = network(
    {"A -> B": "k1", "2 B -> B + C": "k2", "B + C -> A + C": "k3"},
    initial={"A": 1.0, "B": 0.0, "C": 0.0},
    parameters={"k1": 0.04, "k2": 3e7, "k3": 1e4},
)
GENE = network(
    {
        "A + B <-> C": ("on", "off"),
        "0 -> A": "dose * exp(-off * time)",
        "D ->": "V * D^h / (K^h + D^h)",
        "2 A -> D": 0.5,
        "C -> 0": "piecewise(on * C, time < 5, C * off / (1 + C), time >= 2 * K && on < 9, 0)",
    },
    initial={"A": 1.0, "B": "on", "C": 0.0, "D": 0.0},
    parameters={"on": 1.0, "off": 2.0, "dose": 3.0, "V": 1.0, "K": 1.0, "h": 2.5},
)


def places(system, n: int = 6, at: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.rand(n, len(system.states), generator=generator, **TORCH) + at
    p = torch.rand(n, len(system.parameters), generator=generator, **TORCH) + 0.5
    return torch.linspace(0, 10, n, **TORCH), y, p


def test_a_network_by_hand_has_the_rates_of_mass_action():
    found = {r.name: (r.rate, dict(r.change)) for r in GENE.reactions}
    assert found["A + B -> C"] == ("on * A * B", {"A": -1, "B": -1, "C": 1})
    assert found["C -> A + B"] == ("off * C", {"A": 1, "B": 1, "C": -1})
    assert found["0 -> A"] == ("(dose * exp(-off * time))", {"A": 1})
    assert found["2 A -> D"] == ("0.5 * A^2", {"A": -2, "D": 1})
    assert found["D ->"][0] == "V * D^h / (K^h + D^h)"
    assert {r.name: dict(r.change) for r in ROBERTSON.reactions}["2 B -> B + C"] == {"B": -1, "C": 1}


def test_robertson_has_the_equations_that_are_published():
    # y1' = -0.04 y1 + 1e4 y2 y3, y3' = 3e7 y2^2, y2' = -y1' - y3' (Hairer and Wanner 1996, IV.1)
    system = rates.compiled(ROBERTSON, ())
    y = torch.tensor([[0.7, 1e-5, 0.3]], **TORCH)
    first, third = -0.04 * 0.7 + 1e4 * 1e-5 * 0.3, 3e7 * 1e-10
    expected = torch.tensor([[first, -first - third, third]], **TORCH)
    torch.testing.assert_close(
        system.rate(y[:, 0], y, y[:, :0]), expected, rtol=1e-14, atol=1e-14
    )  # rounding


@pytest.mark.parametrize("made", [rates.compiled, lambda n: rates.rates_in(n, tuple(n.parameters))[0]])
@pytest.mark.parametrize("of", [ROBERTSON, GENE], ids=["Robertson", "gene"])
def test_jacobian_and_curvature_are_the_derivatives_of_the_rate(made, of):
    system = made(of)
    t, y, p = places(system)
    slopes = system.jacobian(t, y, p)
    by_torch = torch.func.vmap(
        torch.func.jacrev(lambda t, y, p: system.rate(t[None], y[None], p[None])[0], argnums=1)
    )
    torch.testing.assert_close(slopes, by_torch(t, y, p), rtol=1e-12, atol=1e-12)  # rounding
    ahead = torch.ones_like(t) if system.slope else torch.zeros_like(t)
    bent = system.curvature(t, y, p, ahead, y)
    h = 1e-6
    there, here = (system.jacobian(t + e * ahead, y * (1 + e), p) for e in (h, -h))
    torch.testing.assert_close(bent, (there - here) / (2 * h), rtol=1e-6, atol=1e-6)  # h^2, and rounding / h


def test_derivatives_are_finite_where_nothing_is_there_yet():
    system = rates.compiled(GENE)
    t, y, p = places(system)
    y, p = torch.zeros_like(y).requires_grad_(), p.requires_grad_()
    (system.jacobian(t, y, p).square().sum() + system.rate(t, y, p).square().sum()).backward()
    assert y.grad is not None
    assert p.grad is not None
    assert torch.isfinite(y.grad).all()
    assert torch.isfinite(p.grad).all()


def test_parameters_that_are_not_asked_for_keep_their_values():
    whole, part = rates.compiled(GENE), rates.compiled(GENE, ("h", "on"))
    t, y, p = places(part)
    at = torch.tensor([[float(v) for v in GENE.parameters.values()]], **TORCH).repeat(len(t), 1)
    at[:, 5], at[:, 0] = p.unbind(-1)
    torch.testing.assert_close(part.rate(t, y, p), whole.rate(t, y, at))
    assert part.parameters == ("h", "on")


RESIZED = replace(GENE, parameters={**GENE.parameters, "cell": 2.0}, volumes={"A": "cell", "D": 0.5})


@pytest.mark.parametrize("of", [ROBERTSON, GENE, RESIZED], ids=["mass action", "others", "volumes"])
def test_the_fast_system_is_the_plain_one_at_parameters_of_its_own(of):
    plain, (fast, formulas) = rates.compiled(of), rates.rates_in(of, tuple(of.parameters))
    t, y, p = places(plain)
    q = tensors.stack(tensors.function(formulas, plain.parameters)(p.unbind(-1)), t)
    torch.testing.assert_close(fast.rate(t, y, q), plain.rate(t, y, p))
    torch.testing.assert_close(fast.jacobian(t, y, q), plain.jacobian(t, y, p))
    slopes = torch.func.jacrev(lambda y: plain.rate(t, y, p).sum(0))(y).movedim(1, 0)
    torch.testing.assert_close(plain.jacobian(t, y, p), slopes)


def test_rates_that_divide_by_0_are_named():
    halved = network({"A -> 0": "1 / k"}, initial={"A": 1}, parameters={"k": 0})
    with pytest.raises(DataError, match="not finite at the values of the parameters:\n  - A -> 0"):
        rates.compiled(halved, ())


def two_compartments(size: str | float) -> Network:
    return Network(
        species=("inside", "outside"),
        reactions=(
            Reaction("leak", {"inside": -1.0, "outside": 1.0}, "k * cell * inside - k * cell * outside"),
        ),
        parameters={"k": 0.5, "cell": 2.0, "bath": 10.0},
        initial={"inside": 3.0, "outside": "2 / bath"},
        volumes={"inside": "cell", "outside": size},
    )


@pytest.mark.parametrize("size", ["bath", 10.0])
def test_a_flux_is_divided_by_the_volume_of_each_species(size):
    leak = two_compartments(size)
    for system in (rates.compiled(leak), rates.compiled(leak, ())):
        y = torch.tensor([[3.0, 1.0]], **TORCH)
        p = torch.tensor([[0.5, 2.0, 10.0]], **TORCH)[:, : len(system.parameters)]
        expected = torch.tensor([[-0.5 * 2.0, 0.5 * 2.0 * 2.0 / 10.0]], **TORCH)
        torch.testing.assert_close(system.rate(y[:, 0], y, p), expected)
        slopes = torch.tensor([[[-0.5, 0.5], [0.1, -0.1]]], **TORCH)
        torch.testing.assert_close(system.jacobian(y[:, 0], y, p), slopes)
    volumes = np.array([2.0, 10.0])
    assert (rates.conserved(leak) * volumes).tolist() == [[2.0, 10.0]]
    fast, formulas = rates.rates_in(leak, tuple(leak.parameters))
    plain = rates.compiled(leak)
    t, y, p = places(plain)
    q = tensors.stack(tensors.function(formulas, plain.parameters)(p.unbind(-1)), t)
    torch.testing.assert_close(fast.rate(t, y, q), plain.rate(t, y, p))


def test_mass_action_is_seen_through_sums_and_constants():
    form = rates.mass_action_of(rates.fluxes(two_compartments(10.0), ("k",)))
    assert form is not None
    found = dict(zip(form.reactants, form.stoichiometry.T.tolist(), strict=True))
    assert found == {(0,): [-1.0, 0.2], (1,): [1.0, -0.2]}
    assert [str(each) for each in form.coefficients] == ["k", "k"]
    robertson = rates.mass_action_of(rates.fluxes(ROBERTSON))
    assert robertson is not None
    assert robertson.reactants == ((0,), (1, 1), (1, 2))


@pytest.mark.parametrize("rate", ["k * A / (1 + A)", "k * time * A", "k * A^3", "k * A^0.5", "k * log(A)"])
def test_other_rates_are_no_mass_action(rate):
    made = network({"A -> B": rate}, initial={"A": 1, "B": 0}, parameters={"k": 1})
    assert rates.mass_action_of(rates.fluxes(made)) is None


def test_what_reactions_leave_alone_is_found():
    assert rates.conserved(ROBERTSON).tolist() == [[1, 1, 1]]
    assert rates.conserved(GENE).shape == (0, 4)
    dimer = network({"2 A <-> B": ("k", "k")}, initial={"A": 1, "B": 0}, parameters={"k": 1})
    assert rates.conserved(dimer).tolist() == [[1, 2]]


def test_times_at_which_rates_jump_are_formulas_of_parameters():
    assert sorted(map(str, rates.discontinuities(GENE))) == ["2*K", "5"]
    assert sorted(map(str, rates.discontinuities(GENE, ()))) == ["2", "5"]
    ramp = network({"0 -> A": "max(0, 2 * time - t0) + k"}, initial={"A": 0}, parameters={"t0": 1, "k": 1})
    assert [str(each) for each in rates.discontinuities(ramp)] == ["t0/2"]
    level = network({"A -> 0": "piecewise(k * A, A > 1, 0)"}, initial={"A": 2}, parameters={"k": 1})
    assert rates.discontinuities(level) == ()
    wave = network({"0 -> A": "piecewise(k, sin(time) > 0, 0)"}, initial={"A": 0}, parameters={"k": 1})
    with pytest.raises(Unsupported, match=r"sin\(time\) > 0 is not linear in time"):
        rates.discontinuities(wave)


def test_a_network_comes_back_from_json():
    again = Network.from_dict(json.loads(json.dumps(GENE.to_dict())))
    assert again == GENE
    with pytest.raises(
        TemplateError, match=r'(?s)"parameters" is missing.*no "colour" in a network.*reaction 1'
    ):
        Network.from_dict({"species": [], "reactions": [{"name": "r"}], "initial": {}, "colour": 1})


def test_all_faults_of_a_network_are_listed_at_once():
    with pytest.raises(TemplateError) as told:
        network(
            {
                "A + B <-> C": "k1",
                "0 >A": "k3",
                "D ->": "V*D/(K+D",
                "B + C -> A + C": "2*k9",
                "1.5 A -> B": "k1",
                "A + ? -> D": "k1",
            },
            initial={"A": -1.0, "B": "k1", "X": 0.0, "D": float("nan")},
            parameters={"k1": 1.0, "time": 3.0, "V": 1.0, "A": 1.0},
            assignments={"u": "lost + 1"},
        )
    for part in (
        '"A + B <-> C" needs two rates, forth and back',
        '"0 >A" is no reaction',
        '"A + ? -> D": "?" is no species',
        '"1.5 A -> B": mass action needs whole numbers',
        'a parameter cannot be called "time"',
        '"A" is the name of a species and of a parameter',
        'the value of "D": "nan" is not a finite real number',
        '")" is missing',
        'uses "k9", which nothing defines',
        'the assignment of "u" uses "lost"',
        'species "C" has no initial value',
        'there is an initial value of "X", which is no species',
        'the initial value of "A" is -1; it cannot be negative',
    ):
        assert re.search(re.escape(part), str(told.value)), part


def test_formulas_that_need_each_other_are_a_fault():
    with pytest.raises(TemplateError, match="formulas go in a circle: u -> v -> u"):
        network(
            {"A -> B": "k"}, initial={"A": 1, "B": 0}, parameters={"k": 1}, assignments={"u": "v", "v": "u"}
        )


def test_volumes_must_be_there_and_above_0():
    faulty = Network(
        ("A",), (Reaction("r", {"A": 1.0, "B": 1.0}, "1"),), {"cell": 0.0}, {"A": 1.0}, volumes={"A": "cell"}
    )
    assert faulty.faults() == [
        '"r" changes "B", which is no species',
        'the volume of "A" is 0; it must be above 0',
    ]
