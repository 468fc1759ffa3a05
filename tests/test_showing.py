"""What a notebook shows: templates, plans and fits as HTML that is valid, escaped and loads nothing."""

from __future__ import annotations

import os
import re
import signal
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr
from torch.distributions import constraints

import scivi
from scivi import shown
from scivi.errors import DataError, PlanError
from scivi.inference.plan import Plateau

HOSTILE = "<script>alert('x')</script>"
EMPTY = {"br", "img", "polyline", "circle", "wbr", "meta"}  # elements that no tag closes


@dataclass(frozen=True)
class Prior:
    level_sd: float = 5.0  # points; our choice
    spread: float = 2.0  # points; half-normal scale


def schools_model(batch, prior, nets):
    """Eight schools <of Rubin>, 1981.

    And no more than that.
    """
    level = pyro.sample("level", dist.Normal(0.0, prior.level_sd))
    spread = pyro.sample("spread", dist.HalfNormal(prior.spread))
    with batch.plate("school"):
        own = pyro.sample("own", dist.Normal(0.0, 1.0).mask(torch.ones(batch.n_rows(), dtype=torch.bool)))
        effect = pyro.deterministic("effect", level + spread * own)
        batch.observe("result", dist.Normal(effect, batch.sd))


SCHOOLS = scivi.Template(
    name="schools",
    rows="school",
    model=schools_model,
    prior=Prior(),
    fields={
        "result": scivi.Field("school", "observed", unit="points", doc=f"gain of a school {HOSTILE}"),
        "sd": scivi.Field("school", support=constraints.positive, unit="points", default=10.0),
        "kind": scivi.Field("school", labels=("state", "private"), default="private"),
    },
    dims={"level": (), "spread": (), "effect": ("school",)},
    units={"level": "points", "effect": "points & pence"},
)
TABLE = xr.Dataset({"result": ("school", [28.0, 8, -3, 7, -1, 1, 18, 12])})
PLAN = scivi.Plan(steps=60, rows_per_batch=None, log_every=10, stop=None, compile="off", estimator="trace")


@pytest.fixture(scope="module")
def fitted() -> scivi.Fit:
    return scivi.fit(SCHOOLS, TABLE, PLAN, progress=False)


class Nesting(HTMLParser):
    """Reads HTML, and refuses a tag that closes another than the last that was opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        assert not any(name.startswith("on") or name in ("href", "src") for name, _ in attrs)
        if tag not in EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.add(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def text_of(html: str) -> str:
    """What is read of valid HTML that loads nothing."""
    reader = Nesting()
    reader.feed(html)
    reader.close()
    assert reader.open == []
    assert not reader.seen & {"script", "style", "link", "iframe", "img", "object"}
    assert not re.search(r"url\(|https?://|@import", html)
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html))


def test_a_template_tells_what_it_reads_reports_and_believes():
    html = SCHOOLS._repr_html_()
    told = text_of(html)
    for part in (
        "schools template",
        "Eight schools &lt;of Rubin&gt;, 1981.",
        "rows: school; guide: mean-field normal",
        "result school observed points",
        "sd school given points",
        "10 if absent",
        "private if absent",
        "one of state, private",
        "effect school points &amp; pence",
        "level scalar points",
        "level_sd 5 points; our choice",
        "spread 2 points; half-normal scale",
    ):
        assert part in told, part
    assert "no more than that" not in told
    assert repr(SCHOOLS) == 'Template "schools": result over school; reports level, spread, effect'


def test_hostile_names_are_escaped():
    hostile = replace(SCHOOLS, name=HOSTILE)
    assert HOSTILE not in hostile._repr_html_()
    assert "&lt;script&gt;" in text_of(hostile._repr_html_())
    fit = scivi.fit(
        hostile, TABLE.rename(school="school"), replace(PLAN, steps=2, log_every=1), progress=False
    )
    fit.provenance["fit"]["finish"] = {HOSTILE: HOSTILE}
    assert HOSTILE not in fit._repr_html_()
    text_of(fit._repr_html_())


def test_a_plan_tells_what_differs_from_its_defaults_first():
    plan = scivi.Plan(steps=40, rows_per_batch=None, stop=Plateau(window=50))
    first, rest = plan._repr_html_().split("<details>")
    told = re.sub("<[^>]*>", " ", first)
    assert re.findall(r"(steps|rows_per_batch|stop)\s+(\S+)\s+(\S+)", told) == [
        ("steps", "40", "5000"),
        ("rows_per_batch", "None", "512"),
        ("stop", "Plateau(window=50)", "Plateau()"),
    ]
    assert "lr" in rest
    assert "5000" not in rest
    assert "settings at their default" in text_of(plan._repr_html_())
    assert "value" not in text_of(scivi.Plan()._repr_html_()).split("settings")[0]


def test_the_short_form_of_a_plan_makes_it_again():
    assert repr(scivi.Plan()) == "Plan()"
    plan = scivi.Plan(steps=7, lr=0.1, device="cpu", stop=Plateau(least=0.1))
    assert (
        repr(plan)
        == "Plan(steps=7, lr=0.1, stop=Plateau(window=100, tolerance=2.0, least=0.1, min_steps=200))"
    )
    assert eval(repr(plan), {"Plan": scivi.Plan, "Plateau": Plateau}) == plan


def test_a_fit_tells_how_it_ended_and_draws_its_model(fitted):
    html = fitted._repr_html_()
    told = text_of(html)
    for part in (
        "schools fit",
        "It took all the steps it was given",
        "60 steps",
        "8 × school",
        "nats per row, lower is better",
        "level Normal",
        "spread HalfNormal",
        "own Normal",  # the mask is no distribution
        "result Normal",
        "effect",
        "latent observed derived",
    ):
        assert part in told, part
    assert html.count("<svg") == html.count('role="img"') == html.count("<title>") == 1
    assert "objective over 60 steps" in re.findall(r'aria-label="([^"]*)"', html)[0]
    assert repr(fitted).startswith('Fit of "schools" to {')


def test_plates_hold_their_sites(fitted):
    model = fitted._repr_html_().split(">model</summary>")[1].split("<summary")[0]
    outside, inside = model.split("border-radius:.5em")
    assert [name in outside for name in (">level ", ">spread ", ">own ")] == [True, True, False]
    own, effect, result = (inside.index(f">{name} <") for name in ("own", "effect", "result"))
    assert own < effect < result < inside.index("8 × school")
    assert inside[:result].rsplit("<span", 1)[1].count("background") == 1  # observed: filled
    assert inside[:own].rsplit("<span", 1)[1].count("background") == 0


def test_what_is_shown_leaves_randomness_and_parameters_alone(fitted):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert fitted._repr_html_() == fitted._repr_html_()
    assert torch.equal(torch.get_rng_state(), before)
    assert len(pyro.get_param_store()) == 0


@pytest.mark.parametrize("values", [[], [1.0], [np.nan, 2.0], [1.0, 1.0, 1.0], [9e9, 3.0, np.inf, 2.0, 1.0]])
def test_a_curve_of_any_numbers_stays_in_its_box(values):
    drawn = shown.sparkline(values, "a < b")
    if sum(map(np.isfinite, values)) < 2:
        assert drawn == ""
        return
    text_of(drawn)
    points = re.findall(r"([\d.-]+),([\d.-]+)", re.findall(r'points="([^"]*)"', drawn)[0])
    assert len(points) == sum(map(np.isfinite, values))
    assert all(0 <= float(x) <= 260 and 0 <= float(y) <= 44 for x, y in points)


class Interrupter:
    """A recorder that presses Ctrl-C, or the stop button of a notebook, at an entry."""

    def write(self, entry) -> None:
        if entry["step"] == 30:
            os.kill(os.getpid(), signal.SIGINT)

    def close(self) -> None: ...


@pytest.fixture
def heard() -> Iterator[None]:
    """Ctrl-C reaches this process, also where it was started in the background, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_fit_is_a_fit_that_says_so(heard):
    plan = replace(PLAN, steps=100_000)
    fit = scivi.fit(SCHOOLS, TABLE, plan, record=Interrupter(), progress=False)
    assert 30 <= fit.provenance["fit"]["steps"] <= 40
    assert "It was interrupted" in text_of(fit._repr_html_())
    assert "stopped by signal" in repr(fit)
    assert np.isfinite(scivi.draw(fit, TABLE, draws=5, seed=0)["posterior"]["level"].values).all()
    with pytest.raises(KeyboardInterrupt):  # the next one is the notebook's again
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (lambda: scivi.Plan(steps=-1, lr=-2.0), PlanError),
        (lambda: scivi.fit(SCHOOLS, TABLE.rename(result="gain"), PLAN, progress=False), DataError),
    ],
)
def test_what_a_notebook_shows_of_a_mistake_is_short(call, kind):
    """A few frames, each of ours, with nothing chained: the last line is the message."""
    with pytest.raises(kind) as caught:
        call()
    frames = traceback.extract_tb(caught.value.__traceback__)
    assert len(frames) <= 8
    assert all("site-packages" not in frame.filename for frame in frames)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert len(str(caught.value)) < 600
