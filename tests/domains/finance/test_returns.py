from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from anndata import AnnData

from domains.finance.returns import from_prices, from_returns
from scivi.errors import DataError

DAYS = pd.bdate_range("2020-01-01", periods=6)
PRICES = pd.DataFrame({"a": [100.0, 101, 101, 99, 105, 104], "b": [10.0, 11, np.nan, 12, 12, 13]}, index=DAYS)


def test_returns_are_log_ratios_and_a_gap_takes_both_its_days():
    found = from_prices(PRICES)["returns"]
    assert found.dims == ("series", "day")
    assert found["series"].values.tolist() == ["a", "b"]
    np.testing.assert_array_equal(found["day"].values, DAYS[1:].to_numpy())
    a = [
        100 * np.log(101 / 100),
        0.0,
        100 * np.log(99 / 101),
        100 * np.log(105 / 99),
        100 * np.log(104 / 105),
    ]
    b = [100 * np.log(11 / 10), np.nan, np.nan, 0.0, 100 * np.log(13 / 12)]
    np.testing.assert_allclose(found.values, [a, b], rtol=1e-12)


def test_pandas_and_xarray_give_the_same_table():
    labelled = xr.DataArray(PRICES.to_numpy(), {"day": DAYS, "series": ["a", "b"]}, ("day", "series"))
    xr.testing.assert_identical(from_prices(labelled), from_prices(PRICES))
    xr.testing.assert_identical(from_prices(labelled.T), from_prices(PRICES))
    single = from_prices(PRICES["a"])
    xr.testing.assert_identical(single, from_prices(PRICES[["a"]]))
    xr.testing.assert_identical(from_prices(PRICES.tz_localize("America/New_York")), from_prices(PRICES))
    again = from_returns(from_prices(PRICES)["returns"])
    xr.testing.assert_identical(again, from_prices(PRICES))


def test_one_error_tells_every_fault():
    bad = PRICES.assign(
        b=[10.0, -1.0, np.nan, 0.0, 12.0, np.inf], c=np.nan, d=["1", "2", "three", "4", "5", "6"]
    )
    bad.index = DAYS[[0, 2, 1, 3, 3, 5]]
    with pytest.raises(DataError) as raised:
        from_prices(bad)
    told = str(raised.value)
    assert "2020-01-02 comes after 2020-01-03" in told
    assert "1 days occur again, first 2020-01-06" in told
    assert 'series "b" has -1.0 on 2020-01-03, 3 such in all' in told
    assert 'series "c" has no two days in a row with a price' in told
    assert 'series "d" has three on 2020-01-02, 1 such in all: it is no number' in told
    assert 'series "a"' not in told


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (PRICES.set_axis(["x"] * 6, axis=0), "not by dates"),
        (PRICES.set_axis(["a", "a"], axis=1), "several series are called"),
        (xr.DataArray([1.0, 2.0], dims="time"), "dims"),
        (PRICES["a"] * np.inf, "a return is finite"),
    ],
)
def test_unusable_returns_are_refused(values, words):
    with pytest.raises(DataError, match=words):
        from_returns(values)


RETURNS = 100 * np.log(PRICES[["a"]]).diff().iloc[1:]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (PRICES.T, "prices have their days in the columns: give .T of them"),
        (PRICES.T.rename(columns=str), "prices have their days in the columns: give .T of them"),
        (PRICES.T.reset_index(drop=True), "prices have their days in the columns: give .T of them"),
        (
            AnnData(PRICES.to_numpy()),
            r"prices are AnnData; they need a table of pandas.*\.to_df\(\) makes one",
        ),
        (PRICES.to_numpy(), r"prices are ndarray; .*pandas\.DataFrame\(numbers, index=days"),
        (Path("prices.csv"), r"need a table of pandas.*read_csv\(path, index_col=0, parse_dates=True\)"),
        (xr.Dataset({"close": ("day", [1.0, 2.0])}), r"need one of its variables, such as data\['close'\]"),
        (RETURNS, "40% of the numbers are negative, .*: give returns, in percent, to from_returns"),
        (PRICES.rename_axis("date").reset_index(), r'column "date" holds dates: set_index\("date"\)'),
    ],
)
def test_what_are_no_prices_is_told_with_what_to_do(values, words):
    with pytest.raises(DataError, match=words) as raised:
        from_prices(values)
    assert len(str(raised.value).splitlines()) <= 2  # one fault, told once


def test_days_without_dates_and_single_wrong_prices_are_told_as_before():
    numbered = from_prices(PRICES.reset_index(drop=True))
    np.testing.assert_array_equal(numbered["returns"].values, from_prices(PRICES)["returns"].values)
    with pytest.raises(DataError, match=r'series "a" has -100.0 on 2020-01-01, 1 such in all'):
        from_prices(PRICES.assign(a=PRICES["a"] * [-1, 1, 1, 1, 1, 1]))


def test_what_is_handed_in_stays_as_it_was():
    before = PRICES.copy()
    from_prices(PRICES)
    pd.testing.assert_frame_equal(PRICES, before)
