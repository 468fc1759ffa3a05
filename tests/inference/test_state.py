from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
import xarray as xr

from scivi.analysis import drift, report
from scivi.errors import CheckpointError, DataError, TemplateError, Unsupported
from scivi.files import write_atomically
from scivi.inference.draws import draw
from scivi.inference.loop import fit
from scivi.inference.state import Fit, load, save
from scivi.inputs.features import Basis, Features
from scivi.inputs.fields import Field
from scivi.models.guides import JointNormal
from scivi.models.named import import_template, reference_of
from scivi.models.template import Template
from tests.inference.conjugate import NOISE, PRIOR, hierarchy, plan, rows, shared

HERE = "tests.inference.test_state"


@dataclass(frozen=True)
class Prior:
    width: float = 2.0
    edges: tuple[float, ...] = (0.0, 1.0)


def model(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(prior.edges[0]), prior.width))
    with batch.plate("row"):
        batch.observe("y", dist.Normal(mu, batch.sd))


FIELDS = {"y": Field(("row",), "observed"), "sd": Field(("row",))}
importable = Template(
    name="importable", fields=FIELDS, rows="row", model=model, dims={"mu": ()}, prior=Prior()
)
own = Template(
    name="own",
    fields=FIELDS,
    rows="row",
    model=lambda b, p, n: model(b, p, n),
    dims={"mu": ()},
    prior=Prior(),
)


def featured(batch, prior, nets):
    mu = pyro.sample("mu", dist.Normal(batch.y.new_tensor(0.0), 2.0))
    with batch.plate("row", dim=-1):
        batch.observe("y", dist.Normal(mu.unsqueeze(-1), batch.y.new_ones(2)).to_event(1))


def featured_guide(batch, prior, nets):
    nets.globals(batch)


def shifted(batch, prior, nets, *, shift):
    model(batch, prior, nets)
    pyro.deterministic("moved", torch.full((), shift))


def differently(batch, prior, nets):
    shifted(batch, prior, nets, shift=1.0)


def make(shift: float = 0.0) -> Template:
    return replace(
        importable,
        name="made",
        model=partial(shifted, shift=shift),
        dims={"mu": (), "moved": ()},
        made=(f"{HERE}:make", {"shift": shift}),
    )


DATA = {**rows(6), "sd": np.linspace(0.5, 1.0, 6)}
QUICK = plan(steps=20, log_every=10, estimator="trace")


@pytest.fixture(scope="module")
def fitted() -> Fit:
    other_prior = replace(importable, prior=Prior(width=0.3, edges=(-1.0, 4.0)))
    return fit(other_prior, DATA, QUICK, progress=False)


def without_time(tree: xr.DataTree) -> dict:
    return {**json.loads(tree.attrs["provenance"]), "created": ""}


def test_a_saved_fit_is_loaded_as_it_was(fitted, tmp_path):
    folder = save(fitted, tmp_path / "fit")
    again = load(folder)
    assert again.template == fitted.template  # with the prior that it was fitted under
    assert again.plan == fitted.plan
    assert again.provenance == json.loads(json.dumps(fitted.provenance))
    xr.testing.assert_identical(again.history, fitted.history)
    for name, value in fitted.nets.state_dict().items():
        assert torch.equal(value, again.nets.state_dict()[name])
    assert not any(p.requires_grad for p in again.nets.parameters())
    before, after = (draw(f, DATA, 20, seed=3) for f in (fitted, again))
    assert without_time(before) == without_time(after)
    for group in before.groups[1:]:
        xr.testing.assert_equal(before[group].to_dataset(), after[group].to_dataset())


def test_an_amortised_fit_is_loaded_without_its_data(tmp_path):
    template = hierarchy()
    fitted = fit(template, rows(100), replace(QUICK, rows_per_batch=8), progress=False)
    again = load(save(fitted, tmp_path), template)
    assert again.sizes == {"row": 100}
    one, other = (draw(f, rows(5, seed=8), 10, seed=1).posterior.z for f in (fitted, again))
    xr.testing.assert_identical(one, other)


def test_a_loaded_fit_tells_drift_without_its_data(tmp_path):
    template = hierarchy()
    fitted = fit(template, rows(400), replace(QUICK, rows_per_batch=8), progress=False)
    again = load(save(fitted, tmp_path), template)
    assert fitted.features is not None
    assert again.features is not None
    assert again.features.names == fitted.features.names == ("y", "y: missing")
    np.testing.assert_array_equal(again.features.values, fitted.features.values)
    usual, shifted = rows(200, seed=8), {"y": rows(200, seed=9)["y"] + 0.6}  # .6 sd
    trees = [draw(again, data, 30, seed=1) for data in (usual, shifted)]
    found = [drift(tree) for tree in trees]
    assert [one.attrs["drifted"] for one in found] == [False, True]
    assert not bool(found[1].sel(variable="y")["ok"])
    assert [float(r["value"]) for r in (report(t).sel(check="drift") for t in trees)] == [
        one.attrs["p_value"] for one in found
    ]
    assert "drift" not in report(draw(again, rows(400), 30))["check"]  # the fit's own data
    with pytest.raises(DataError, match="has no features"):  # as a fit that was saved without
        drift(draw(replace(again, features=None), usual, 10))


def test_features_of_wide_fields_and_constants_are_saved(fitted, tmp_path):
    basis = Basis(*(np.float32(np.arange(k)).reshape(shape) for k, shape in ((3, 3), (3, 3), (6, (3, 2)))))
    values = np.array([[1.0, np.nan]], np.float32)
    features = Features(
        ("wide: mean", "wide: sd"), values, {"e[a]": 0.1, "hash": 2.0**47 + 1}, {"wide": basis}
    )
    again = load(save(replace(fitted, features=features), tmp_path)).features
    assert again is not None
    assert (again.names, again.constants) == (features.names, features.constants)
    np.testing.assert_array_equal(again.values, values)
    for part in ("mean", "scale", "directions"):
        np.testing.assert_array_equal(getattr(again.bases["wide"], part), getattr(basis, part))


def test_a_fit_that_was_saved_without_features_is_read(fitted, tmp_path):
    assert load(save(replace(fitted, features=None), tmp_path)).features is None


def test_a_dim_of_the_data_may_be_called_feature():
    fields = {"y": Field(("row", "feature"), "observed")}
    template = replace(hierarchy(), fields=fields, dims={"mu": ()}, model=featured, guide=featured_guide)
    data = {"y": rows(60)["y"].reshape(30, 2)}
    tree = draw(fit(template, data, QUICK, progress=False), {"y": data["y"][:9] + 9}, 5)
    assert tree["features"]["feature_values"].dims == ("row", "feature_")
    assert drift(tree).attrs["drifted"] is True


def test_a_notebooks_own_template_is_passed_in(tmp_path, monkeypatch):
    monkeypatch.delitem(globals(), "own")
    mine = replace(importable, name="own", model=lambda b, p, n: model(b, p, n))
    fitted = fit(mine, DATA, QUICK, progress=False)
    save(fitted, tmp_path)
    assert json.loads((tmp_path / "fit.json").read_text())["reference"] is None
    with pytest.raises(
        CheckpointError,
        match=r'"own" was not importable when .* was saved; pass it: load\(directory, template\)',
    ):
        load(tmp_path)
    assert load(tmp_path, mine).template == mine


def test_a_made_template_is_made_again(tmp_path):
    mine = replace(make(3.0), prior=Prior(width=0.3))
    fitted = fit(mine, DATA, QUICK, progress=False)
    meta = json.loads((save(fitted, tmp_path) / "fit.json").read_text())
    assert (meta["made"], meta["reference"]) == ([f"{HERE}:make", {"shift": 3.0}], None)
    assert fitted.provenance["made"] == meta["made"]
    again = load(tmp_path)
    assert (again.template.prior, again.template.made) == (mine.prior, mine.made)
    assert (draw(again, DATA, 5).posterior.moved == 3.0).all()
    (tmp_path / "fit.json").write_text(json.dumps({**meta, "made": [f"{HERE}:make", {"by": 3}]}))
    with pytest.raises(TemplateError, match=r"makes no template of \{'by': 3\}: .*unexpected keyword"):
        load(tmp_path)
    (tmp_path / "fit.json").write_text(json.dumps({**meta, "made": [f"{HERE}:gone", {}]}))
    with pytest.raises(TemplateError, match=f'"{HERE}:gone" makes no template'):
        load(tmp_path)
    (tmp_path / "fit.json").write_text(json.dumps({**meta, "made": [f"{HERE}:rows", {"n": 3}]}))
    with pytest.raises(TemplateError, match=f'"{HERE}:rows" makes dict, not a Template'):
        load(tmp_path)


@pytest.mark.parametrize("change", [{"model": differently}, {"guide": JointNormal()}, {"dims": {"mu": ()}}])
def test_what_was_replaced_after_making_is_not_made_again(change, tmp_path):
    mine = replace(make(), **change)
    save(fit(mine, DATA, QUICK, progress=False), tmp_path)
    with pytest.raises(CheckpointError, match=r'"made" was not importable .* pass it'):
        load(tmp_path)
    assert load(tmp_path, mine).template == mine


def test_a_maker_that_fails_by_then_keeps_no_fit_from_being_saved(tmp_path, monkeypatch):
    def gone(shift):
        raise FileNotFoundError("pedigree.csv")

    mine = make()
    fitted = fit(mine, DATA, QUICK, progress=False)
    monkeypatch.setitem(globals(), "make", gone)
    assert load(save(fitted, tmp_path), mine).template == mine


def test_a_fit_of_other_settings_is_not_gone_on_with(tmp_path):
    how = {"checkpoint": tmp_path / "state", "resume": True, "progress": False}
    fit(make(1.0), DATA, QUICK, **how)
    fit(make(1.0), DATA, QUICK, **how)
    with pytest.raises(CheckpointError, match=r"made: there .*'shift': 1.0.* here .*'shift': 2.0"):
        fit(make(2.0), DATA, QUICK, **how)


def test_references_of_templates():
    assert reference_of(replace(importable, prior=Prior(width=9.0))) == f"{HERE}:importable"
    assert import_template(f"{HERE}:importable") is importable
    with pytest.raises(TemplateError, match=r'has no template "nothing"; it has .*importable'):
        import_template(f"{HERE}:nothing")
    with pytest.raises(TemplateError, match='"nowhere" is not of the form module:name'):
        import_template("nowhere")
    with pytest.raises(TemplateError, match=r'there is no module "no.where"'):
        import_template("no.where:template")


def test_a_template_that_needs_what_is_not_installed_says_what_installs_it(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(sys.modules, "nutpie", None)
    (tmp_path / "sampled.py").write_text("import nutpie\n")
    (tmp_path / "broken.py").write_text("import no_such_package_at_all\n")
    with pytest.raises(Unsupported, match=r'"nutpie" is not installed.*scivi\[nuts\]'):
        import_template("sampled:template")
    with pytest.raises(
        TemplateError, match='"broken" needs "no_such_package_at_all", which is not installed'
    ):
        import_template("broken:template")


def test_saving_again_leaves_one_set_of_tensors(fitted, tmp_path):
    save(fitted, tmp_path)
    changed = fit(fitted.template, DATA, replace(QUICK, seed=5), progress=False)
    save(changed, tmp_path)
    assert len(list(tmp_path.glob("tensors-*.safetensors"))) == 1
    assert sorted(p.suffix for p in tmp_path.iterdir()) == [".json", ".nc", ".safetensors"]
    assert load(tmp_path).plan.seed == 5


def test_nothing_and_damage_are_told_apart(fitted, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no fit in .*: it has no fit.json"):
        load(tmp_path)
    save(fitted, tmp_path)
    tensors = next(tmp_path.glob("tensors-*"))
    whole = tensors.read_bytes()
    tensors.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="cannot be read as safetensors"):
        load(tmp_path)
    tensors.unlink()
    with pytest.raises(CheckpointError, match=r'there is no file ".*tensors-'):
        load(tmp_path)
    meta = tmp_path / "fit.json"
    meta.write_text(meta.read_text().replace('"format": 1', '"format": 99'))
    with pytest.raises(CheckpointError, match="has format 99; this version reads 1"):
        load(tmp_path)
    meta.write_text(meta.read_text()[:100])
    with pytest.raises(CheckpointError, match=r'fit.json" is damaged'):
        load(tmp_path)


def test_a_template_that_has_changed_since_is_refused(fitted, tmp_path):
    def wider(batch, prior, nets):
        model(batch, prior, nets)
        pyro.sample("more", dist.Normal(0.0, 1.0))

    save(fitted, tmp_path)
    with pytest.raises(CheckpointError, match='does not fit template "importable" as it is now'):
        load(tmp_path, replace(importable, model=wider))


def test_a_file_is_put_in_place_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    with pytest.raises(TypeError):
        write_atomically(path, [b"not", b"bytes"])  # type: ignore[arg-type]
    assert path.read_bytes() == b"old"


def ended_process() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_what_a_killed_writer_left_goes_with_the_next_write_of_that_file(tmp_path):
    gone = ended_process()
    for name in (f".file.{gone}.part", f".other.{gone}.part", ".file.1.part", ".file.mine.part"):
        (tmp_path / name).write_bytes(b"half")
    write_atomically(tmp_path / "file", b"new")
    # process 1 runs, and a name of another form is not ours
    assert {p.name for p in tmp_path.iterdir()} == {
        "file", f".other.{gone}.part", ".file.1.part", ".file.mine.part"
    }  # fmt: skip


def test_a_saved_fit_has_no_unfinished_files_and_never_reads_one(fitted, tmp_path):
    save(fitted, tmp_path)
    gone = ended_process()
    for name in ("tensors-0123456789abcdef.safetensors", "fit.json", "history.nc"):
        (tmp_path / f".{name}.{gone}.part").write_bytes(b"half")
    again = load(tmp_path)
    xr.testing.assert_identical(again.history, fitted.history)
    save(fitted, tmp_path)
    assert list(tmp_path.glob(".*")) == []


def test_a_fit_says_what_it_is(fitted):
    assert repr(fitted).startswith(
        "Fit of \"importable\" to {'row': 6}: 20 steps, stopped by steps, objective"
    )
    ended = fitted.provenance["fit"]
    assert (ended["steps"], ended["restarts"], ended["finish"], ended["estimator"]) == (20, [], {}, "trace")
    assert fitted.provenance["prior"] == {"width": 0.3, "edges": (-1.0, 4.0)}
    assert fitted.provenance["data"]["sizes"] == {"row": 6}


def test_a_template_with_nothing_to_learn_is_refused_unless_it_says_so(tmp_path):
    still = replace(shared, guide=lambda b, p, n: pyro.sample("mu", dist.Normal(0.0, 1.0)), nets=None)
    with pytest.raises(TemplateError, match="neither model nor guide has anything to learn"):
        fit(still, rows(5), QUICK, progress=False)
    meant = replace(still, plan={"steps": 0})
    fitted = fit(meant, rows(5), QUICK, progress=False, checkpoint=tmp_path / "state")
    ended = fitted.provenance["fit"]
    assert (ended["steps"], ended["stopped"], ended["estimator"]) == (0, "nothing to learn", None)
    again = fit(meant, rows(5), QUICK, progress=False, checkpoint=tmp_path / "state", resume=True)
    assert again.provenance == fitted.provenance
    save(fitted, tmp_path / "fit")
    tree = draw(load(tmp_path / "fit", meant), rows(5), 400)
    # The guide's sd is 1; chosen by their weights, draws have that of the posterior, .266 with five rows, to
    # 4 % (400 draws) and 5 % (1,600 proposals, of which about a quarter weigh).
    assert tree["posterior"]["mu"].std() == pytest.approx((1 / PRIOR**2 + 5 / NOISE**2) ** -0.5, rel=0.2)
    checks = report(tree)
    assert any("Nothing was to be learnt" in sentence for sentence in checks["sentence"].values)
