from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributions import constraints

from scivi.errors import TemplateError
from scivi.inputs.batches import Batch
from scivi.inputs.fields import RESERVED, Field, Tally, check_fields, describe_support, outside_support


def faults_in(name: str, field: Field, values: np.ndarray, first_row: int = 0) -> list[str]:
    tally = Tally(name, field)
    tally.add(values, (first_row, *[0] * (values.ndim - 1)))
    return tally.faults()


COUNT = Field(("source", "band"), "observed", constraints.nonnegative_integer)
RATIO = Field(("source",), "given", constraints.positive)

SUPPORTS = {
    "whole numbers >= 0": (constraints.nonnegative_integer, [0, 3], [-1, 0.5, np.inf]),
    "whole numbers >= 1": (constraints.positive_integer, [1, 7], [0, 1.5]),
    "whole numbers between 0 and 2": (constraints.integer_interval(0, 2), [0, 1, 2], [3, -1, 0.5]),
    "numbers > 0": (constraints.positive, [1e-9, 5], [0, -1, np.inf]),
    "numbers >= 0": (constraints.nonnegative, [0, 5], [-1e-9, np.inf]),
    "numbers between 0 and 1": (constraints.unit_interval, [0, 0.5, 1], [-0.1, 1.1]),
    "numbers < 2": (constraints.less_than(2.0), [1.9, -5], [2.0, 3.0]),
    "finite numbers": (constraints.real, [-1.0, 1e30], [np.inf, -np.inf]),
    "0 or 1": (constraints.boolean, [0, 1], [2, 0.5]),
}


@pytest.mark.parametrize(("words", "case"), SUPPORTS.items())
def test_support_is_told_and_held(words, case):
    support, inside, outside = case
    field = Field(("row",), "observed", support)
    assert describe_support(support) == words
    assert not outside_support(np.array(inside, float), field).any()
    assert outside_support(np.array(outside, float), field).all()
    # What stands in for a missing entry must itself be scored without a warning.
    assert bool(support.check(torch.tensor(field.feasible)))


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, bool])
@pytest.mark.parametrize("words", [words for words in SUPPORTS if "whole" in words])
def test_whole_numbers_need_not_become_floats_to_be_held_to_bounds(words, dtype, monkeypatch):
    support, inside, outside = SUPPORTS[words]
    field = Field(("row",), "observed", support)
    info = None if dtype is bool else np.iinfo(dtype)
    fits = [x for x in outside if info and x == round(min(x, 99)) and info.min <= x]
    if fits:
        assert outside_support(np.array(fits, dtype), field).all()
    monkeypatch.setattr("scivi.inputs.fields.torch.from_numpy", None)  # what must not be called
    assert not outside_support(np.array([x for x in inside if x or dtype is not bool], dtype), field).any()


def test_missing_entries_are_allowed_where_they_can_be_forecast():
    gap = np.array([1.0, np.nan])
    assert not outside_support(gap, Field(("row",), "observed", constraints.positive)).any()
    assert outside_support(gap, Field(("row",), "given", constraints.positive)).tolist() == [False, True]


def test_faults_tell_number_first_place_and_kind():
    values = np.array([1.0, np.nan, 0.0, -2.0])
    assert faults_in("alpha", RATIO, values, first_row=100) == [
        'field "alpha": 2 of 4 entries are not numbers > 0; the first is 0.0 at source=102.',
        'field "alpha": 1 of 4 entries are missing; the first at source=101. '
        "A given field may not have missing entries.",
    ]


@pytest.mark.parametrize("stored", [np.int16, np.float32])
def test_wrapped_counts_are_recognised(stored):
    # 40 000 counts in a 16-bit column read -25 536; -32 768 betrays the same in a column widened too late.
    wrapped = np.array([[40_000, 3]], np.uint16).astype(np.int16)
    values = wrapped if stored is np.int16 else np.array([[-32768, 3]], np.float32)
    (fault,) = faults_in("n_on", COUNT, values.astype(stored))
    assert "wrap-around" in fault
    assert "wrap-around" not in faults_in("n_on", COUNT, np.array([[-1, 3]], np.int64))[0]


def test_tally_over_chunks_equals_one_reading():
    rng = np.random.default_rng(0)
    values = np.where(rng.random((50, 3)) < 0.1, -1.0, 2.0)
    whole, pieces = Tally("n", COUNT), Tally("n", COUNT)
    whole.add(values)
    for start in range(0, 50, 7):
        pieces.add(values[start : start + 7], (start, 0))
    assert whole.outside > 0
    assert pieces.faults() == whole.faults()


def test_values_are_left_as_they_are():
    values = np.array([1.0, np.nan, -1.0])
    before = values.copy()
    faults_in("alpha", RATIO, values)
    np.testing.assert_array_equal(values, before)


def test_a_field_of_labels_has_their_places():
    field = Field(("row",), labels=["CG", "CHG"], default="CHG")  # type: ignore[arg-type]
    assert (field.labels, field.default, field.assumed, field.feasible) == (("CG", "CHG"), 1.0, 1.0, 0.0)
    assert replace(field, role="given") == field
    assert outside_support(np.array([0, 1, -1, np.nan]), field).tolist() == [False, False, True, True]
    assert field.as_stored(np.array([[1.0, np.nan], [0.0, 1.0]])).tolist() == [["CHG", ""], ["CG", "CHG"]]
    assert COUNT.as_stored(np.array([1.0])).tolist() == [1.0]
    with pytest.raises(TemplateError, match=r"labels are .* must be different words") as caught:
        Field(("row",), support=constraints.positive, labels=("a", "a"), default="c")
    assert "default is 'c'; it must be one of a, a, or the place of one" in str(caught.value)
    assert "leave support and at_most" in str(caught.value)
    with pytest.raises(TemplateError, match="default is 'c'; only a field with labels has one in words"):
        Field(("row",), default="c")


def test_what_stands_in_for_a_count_is_above_no_bound():
    assert replace(COUNT, at_most="total").feasible == 0.0
    assert COUNT.feasible == 1.0


def test_unusable_fields_list_every_fault():
    with pytest.raises(TemplateError, match=r"role is 'seen'[\s\S]*name a dimension twice"):
        Field(("a", "a"), "seen")  # type: ignore[arg-type]
    with pytest.raises(TemplateError, match="an observed field has no default"):
        Field(("a",), "observed", default=1.0)
    assert check_fields({"plate": Field(("a",)), "2x": Field(("a",))}) == [
        'field "plate" has a reserved name; choose another',
        'field "2x" is not a Python name',
        'no field has role="observed": there would be nothing to learn from',
    ]
    assert {n for n in dir(Batch) if not n.startswith("_")} | set(Batch.__annotations__) == set(RESERVED)
    bounds = {"y": replace(COUNT, at_most="n"), "z": replace(COUNT, at_most="alpha"), "alpha": RATIO}
    assert check_fields(bounds) == [
        'field "y" is at most "n", which is no field',
        """field "z" is at most "alpha", which has dims ('source',) and not ('source', 'band')""",
    ]
