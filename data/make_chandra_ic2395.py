"""Make chandra_ic2395.nc: photon counts of 142 X-ray sources in three bands, from the full table.

Usage: python data/make_chandra_ic2395.py chandra_ic2395_21137.nc [OUT]

Keeps the three bands that do not overlap, names the dims as the photon template does, and turns the published
energy conversion factor (erg cm-2 s-1 per net count) into counts per unit of flux. See data/README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import xarray as xr

BANDS = [
    "soft",
    "medium",
    "hard",
]  # disjoint; the published broad, 0.7-1.2 and 0.7-7.0 keV bands overlap these
UNIT = 1e-15  # erg cm-2 s-1: the unit of brightness, our choice, so that typical brightness is of order one
FLUX_UNIT = "1e-15 erg cm-2 s-1"

VARIABLES = {
    "n_on": ("ct", "counts in the source aperture"),
    "n_off": ("ct", "counts in the background aperture"),
    "alpha": ("1", "exposure-weighted area of the source aperture over that of the background aperture"),
    "exposure": (f"ct / ({FLUX_UNIT})", "expected net counts per unit of model flux"),
    "exposure_filled": (
        "1",
        "exposure is the band's median over sources, since net counts were too few to tell",
    ),
    "flux": (FLUX_UNIT, "published energy flux, mode"),
    "flux_lo": (FLUX_UNIT, "published energy flux, lower end of the 68 % interval"),
    "flux_hi": (FLUX_UNIT, "published energy flux, upper end of the 68 % interval"),
    "model_flux": (FLUX_UNIT, "published model flux, mode; the scale of exposure"),
    "model_flux_lo": (FLUX_UNIT, "published model flux, lower end of the 68 % interval"),
    "model_flux_hi": (FLUX_UNIT, "published model flux, upper end of the 68 % interval"),
    "ra": ("deg", "right ascension"),
    "dec": ("deg", "declination"),
    "e_min": ("keV", "lower edge of the band"),
    "e_max": ("keV", "upper edge of the band"),
}

ATTRIBUTES = {
    "title": "Photon counts of X-ray sources in the open cluster IC 2395",
    "telescope": "Chandra ACIS",
    "obsid": 21137,
    "source": "Public Chandra archive; source table of Yang et al. 2022, made with CIAO srcflux (aprates)",
    "citation": "Yang et al. 2022, ApJ 941, 104; arXiv:2206.13656",
    "comment": "n_on, n_off, alpha were recovered from published net counts and errors; see data/README.md",
}


def minimal_table(full: xr.Dataset) -> xr.Dataset:
    """The published table, reduced to what the photon template reads and what its result is compared with.

    Args:
        full: dims (src, band), with ``ecf`` in erg cm-2 s-1 per net count and fluxes in erg cm-2 s-1.

    Returns:
        Dims (source, band); band is soft, medium, hard. Missing published values stay NaN.
    """
    table = full.sel(band=BANDS).rename(
        src="source", mflux="model_flux", mflux_lo="model_flux_lo", mflux_hi="model_flux_hi"
    )
    fluxes = [name for name in table.data_vars if "flux" in str(name)]
    table = table.assign({name: table[name] / UNIT for name in fluxes})
    table = table.assign(exposure=UNIT / table["ecf"], exposure_filled=table["ecf_filled"])
    table = table.assign(n_on=table["n_on"].astype(np.int32), n_off=table["n_off"].astype(np.int32))
    table = table[list(VARIABLES)].assign_coords(
        band=np.array(BANDS), source=table["source"].astype(np.int32)
    )
    for name, (units, long_name) in VARIABLES.items():
        table[name].attrs = {"units": units, "long_name": long_name}
    table["source"].attrs = {"long_name": "number of the source in the published table"}
    table["band"].attrs = {"long_name": "energy band"}
    return table.assign_attrs(ATTRIBUTES)


def main() -> None:
    """Read the developer table, write the small one."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("full", type=Path, help="chandra_ic2395_21137.nc, the full table (6 bands)")
    parser.add_argument("out", type=Path, nargs="?", default=Path(__file__).with_name("chandra_ic2395.nc"))
    arguments = parser.parse_args()
    with xr.open_dataset(arguments.full, engine="h5netcdf") as full:
        table = minimal_table(full.load())
    compressed = {"zlib": True, "complevel": 9, "shuffle": True}
    encoding = {name: compressed for name in table.data_vars if table[name].ndim == 2}
    arguments.out.unlink(missing_ok=True)
    table.to_netcdf(arguments.out, engine="h5netcdf", encoding=encoding)


if __name__ == "__main__":
    main()
