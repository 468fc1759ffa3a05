"""Prices or returns, as pandas or xarray hold them, to the table that the templates of this folder read.

    y_t = 100 ln(P_t / P_(t-1)),     percent

Missing numbers stay missing: a return needs the prices of both its days, so a price that is missing takes two
returns with it. Zeros stay zero.
"""

from __future__ import annotations

from typing import cast

import numpy as np
import pandas as pd
import xarray as xr

from scivi.errors import DataError, listed

Values = pd.DataFrame | pd.Series | xr.DataArray
NEGATIVE_SHARE = 0.2  # of the numbers, beyond which they are returns and no prices with errors (our choice)


def from_prices(prices: Values) -> xr.Dataset:
    """Table of the daily log returns of some series of prices.

    Args:
        prices: (day, series), > 0, days ascending; one dim is a single series. NaN where there is none. An
            xarray must call its dims "day" and "series".

    Returns:
        "returns" (series, day) in percent, from the second day on.

    Raises:
        DataError: neither pandas nor an xarray; days along the columns, unsorted or repeated, labels of
            series repeated, prices that are not positive and finite numbers, series without any two days in a
            row. One error tells all of them.
    """
    frame = _frame(prices, "prices")
    values, faults = _numbers(frame)
    share = (values < 0).to_numpy().sum() / max(1, values.notna().to_numpy().sum())
    if share > NEGATIVE_SHARE:
        found = f"{share:.0%} of the numbers are negative, as those of returns are"
        told = f"{found}, and a price is positive and finite: give returns, in percent, to from_returns"
        raise DataError(listed("these prices cannot be used:", [*faults, told]))
    faults += _told(values, (values <= 0) | (values == np.inf), "a price is positive and finite")
    change = values.where(values > 0).apply(np.log).diff().iloc[1:] * 100
    return _table(change, faults, "prices", "has no two days in a row with a price")


def from_returns(returns: Values) -> xr.Dataset:
    """Table of returns that are there already.

    Args:
        returns: in percent, of either sign; otherwise as the prices of ``from_prices``.

    Returns:
        "returns" (series, day) in percent.

    Raises:
        DataError: as ``from_prices`` does.
    """
    values, faults = _numbers(_frame(returns, "returns"))
    faults += _told(values, values.abs() == np.inf, "a return is finite")
    return _table(values, faults, "returns", "has no return at all")


def _frame(values: Values, word: str) -> pd.DataFrame:
    """Days by series, whatever held them; dates without a time zone."""
    if isinstance(values, xr.DataArray):
        if not {"day"} <= set(values.dims) <= {"day", "series"}:
            raise DataError(f'{word} have dims {values.dims}; they need ("day", "series"), or "day" alone.')
        values = cast(pd.DataFrame | pd.Series, values.transpose("day", ...).to_pandas())
    if not isinstance(values, pd.DataFrame | pd.Series):
        raise DataError(f"{word} are {type(values).__name__}; they need {_remedy(values)}.")
    frame = values.to_frame(values.name or "0") if isinstance(values, pd.Series) else values.copy()
    if _transposed(frame):
        raise DataError(f"{word} have their days in the columns: give .T of them, one row for each day.")
    if isinstance(frame.index, pd.DatetimeIndex) and frame.index.tz is not None:
        frame.index = frame.index.tz_localize(None)  # numpy's dates have none; the day is that of the market
    return frame


def _remedy(values: object) -> str:
    """What a table of some other kind is to be made into, and how."""
    table = "a table of pandas, a row for each day and a column for each series"
    if isinstance(values, xr.Dataset):
        return f"one of its variables, such as data[{str(next(iter(values.data_vars), 'name'))!r}]"
    if isinstance(values, str) or hasattr(values, "__fspath__"):
        return f"{table}: pandas.read_csv(path, index_col=0, parse_dates=True)"
    if hasattr(values, "to_df"):  # AnnData
        return f"{table}: .to_df() makes one, whose rows must be days"
    return f"{table}: pandas.DataFrame(numbers, index=days, columns=names)"


def _transposed(frame: pd.DataFrame) -> bool:
    """Whether the columns are dates, or text that tells dates while the rows have none."""
    if isinstance(frame.index, pd.DatetimeIndex):
        return False
    if isinstance(frame.columns, pd.DatetimeIndex):
        return True
    if pd.api.types.is_integer_dtype(frame.index) or not len(frame.columns):
        return False
    told = pd.to_datetime(frame.columns.astype(str), format="ISO8601", errors="coerce")
    return bool(told.notna().all())


def _numbers(frame: pd.DataFrame) -> tuple[pd.DataFrame, list[str]]:
    """The values as numbers, and what is wrong with labels and types."""
    days, faults = frame.index, []
    if not isinstance(days, pd.DatetimeIndex) and not pd.api.types.is_integer_dtype(days):
        faults.append(
            f"days are labelled by {days.dtype}, not by dates: read them with index_col=0, parse_dates=True"
        )
    elif days.hasnans:
        faults.append(f"{int(days.isna().sum())} days have no date")
    elif not days.is_monotonic_increasing:
        at = int(np.argmax(days[1:] < days[:-1]))
        faults.append(
            f"days are not in order: {_day(days[at + 1])} comes after {_day(days[at])}; sort_index() sorts"
        )
    if days.has_duplicates:
        twice = days[days.duplicated()]
        faults.append(f"{len(twice)} days occur again, first {_day(twice[0])}")
    if frame.columns.has_duplicates:
        faults.append(
            f"several series are called {sorted(set(map(str, frame.columns[frame.columns.duplicated()])))}"
        )
    for name, kind in zip(frame.columns, frame.dtypes, strict=True):
        if pd.api.types.is_datetime64_any_dtype(kind):
            faults.append(f'column "{name}" holds dates: set_index("{name}") makes them the days')
    values = pd.DataFrame(
        {k: pd.to_numeric(frame.iloc[:, k], errors="coerce") for k in range(frame.shape[1])}
    )
    values = values.astype(float).set_axis(frame.columns, axis=1)
    faults += _told(frame, values.isna() & frame.notna(), "it is no number")
    return values, faults


def _told(frame: pd.DataFrame, bad: pd.DataFrame, why: str) -> list[str]:
    """A sentence on each series that has such an entry: how many, and the first."""
    found = []
    for k in np.flatnonzero(bad.to_numpy().any(0)):
        at = np.flatnonzero(bad.to_numpy()[:, k])
        first = f"{frame.iloc[at[0], k]} on {_day(frame.index[at[0]])}"
        found.append(f'series "{frame.columns[k]}" has {first}, {len(at)} such in all: {why}')
    return found


def _day(label: object) -> str:
    return str(label.date()) if isinstance(label, pd.Timestamp) else str(label)


def _table(change: pd.DataFrame, faults: list[str], word: str, empty: str) -> xr.Dataset:
    """The table, if nothing is wrong."""
    there = change.notna().to_numpy().any(0)
    told = " ".join(faults)
    faults += [
        f'series "{name}" {empty}' for name in change.columns[~there] if f'series "{name}" has' not in told
    ]
    if faults:
        raise DataError(listed(f"these {word} cannot be used:", faults))
    coords = {"series": [str(name) for name in change.columns], "day": change.index.to_numpy()}
    made = xr.DataArray(change.to_numpy().T.copy(), coords, ("series", "day"), attrs={"units": "percent"})
    return made.to_dataset(name="returns")
