from __future__ import annotations

from dataclasses import FrozenInstanceError, dataclass, replace

import pytest

from scivi.errors import TemplateError
from scivi.inputs.fields import Field
from scivi.models.template import NoPrior, Template


def model(batch, prior, nets) -> None: ...


@dataclass(frozen=True)
class Prior:
    width: float = 2.0


FIELDS = {"y": Field(("row", "band"), "observed"), "sd": Field(("band",))}


def made(**changed) -> Template:
    return Template(
        **{"name": "t", "fields": FIELDS, "rows": "row", "model": model, "dims": {"mu": ()}, **changed}
    )


def test_one_word_stands_for_a_tuple_of_it():
    template = made(dims={"z": "row", "mu": ()})
    assert template.row_dims == ("row",)
    assert template.dims["z"] == ("row",)
    assert template.observed == ("y",)


def test_a_template_is_frozen_and_varied_by_replace():
    template = made(prior=Prior())
    with pytest.raises(FrozenInstanceError):
        template.name = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        template.dims["more"] = ()  # type: ignore[index]
    wider = replace(template, prior=Prior(9.0))
    assert (wider.prior.width, template.prior.width) == (9.0, 2.0)
    assert wider.prior_numbers() == {"width": 9.0}
    assert replace(wider, prior=Prior()) == template


def test_mappings_that_were_handed_in_are_copied():
    dims = {"mu": ()}
    template = made(dims=dims)
    dims["more"] = ("row",)
    assert "more" not in template.dims


def test_sizes_of_its_own_are_numbers_or_other_dims():
    template = made(
        dims={"loading": ("factor", "band"), "corr": ("band", "band_other")},
        sizes={"factor": 3, "band_other": "band"},
    )
    assert template.all_sizes({"row": 9, "band": 2}) == {"row": 9, "band": 2, "factor": 3, "band_other": 2}


def test_every_fault_is_told_at_once():
    with pytest.raises(TemplateError) as caught:
        Template(
            name="bad",
            fields={"plate": Field(("row",)), "a b": Field(("row",)), "n": Field((), at_most="plate")},
            rows=("cell",),
            model="no function",  # type: ignore[arg-type]
            dims={"mu": ("nowhere",), "x": ("draw", "row")},
            units={"absent": "s"},
            prior={"width": 1.0},
        )
    lines = str(caught.value).splitlines()
    assert lines[0] == 'template "bad" cannot be used:'
    for words in (
        'field "plate" has a reserved name; choose another',
        'field "a b" is not a Python name',
        """field "n" is at most "plate", which has dims ('row',) and not ()""",
        'no field has role="observed"',
        "rows \"cell\" is a dim of no field; fields have ['row']",
        "site \"mu\" has dims ['nowhere'] that no field has; give their size in sizes=",
        'site "x": "chain" and "draw" are added to every result; leave them out of dims',
        'unit given for "absent", which dims does not list',
        "model must be a function",
        "prior must be a value of a frozen dataclass",
    ):
        assert any(words in line for line in lines), words


@pytest.mark.parametrize("prior", [Prior, {"a": 1}, 3.0])
def test_a_prior_is_a_value_of_a_frozen_dataclass(prior):
    with pytest.raises(TemplateError, match="prior must be a value of a frozen dataclass"):
        made(prior=prior)


def test_a_prior_that_can_be_changed_is_refused():
    @dataclass
    class Loose:
        width: float = 1.0

    with pytest.raises(TemplateError, match="frozen"):
        made(prior=Loose())
    assert made().prior == NoPrior()


def test_rows_must_be_named():
    with pytest.raises(TemplateError, match="rows names no dim"):
        made(rows=())


def test_settings_of_a_maker_are_such_as_json_holds():
    template = made(made=("here:make", {"cut": 3, "edges": (0.5, 2.0), "prior": None}))
    assert template.made[0] == "here:make"
    assert dict(template.made[1]) == {"cut": 3, "edges": [0.5, 2.0], "prior": None}
    assert replace(template, prior=Prior()).made == template.made
    for settings in ({"prior": Prior()}, {"cut": float("nan")}):
        with pytest.raises(
            TemplateError, match='made: the settings of "here:make" must be such as JSON holds'
        ):
            made(made=("here:make", settings))


def test_a_site_along_a_second_row_dim_is_refused():
    """Only rows of the first are reported."""
    fields = {**FIELDS, "v": Field(("other",), "observed")}
    with pytest.raises(TemplateError, match='site "w" lies along "other": only the first row dim, "row"'):
        made(fields=fields, rows=("row", "other"), dims={"mu": (), "w": ("other",)})
    told = made(fields=fields, rows=("row", "other")).told
    assert set(told) == {"y", "sd"}


def test_a_field_of_several_dims_is_not_named_as_one_of_them():
    with pytest.raises(
        TemplateError, match='field "band" has the name of one of its dims, where labels stand'
    ):
        made(fields={"band": Field(("row", "band"), "observed")})
    made(fields={"row": Field(("row",), "observed")})
