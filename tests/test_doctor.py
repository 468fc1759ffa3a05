"""``scivi doctor`` and the extras: what is here, what is missing and what brings it, on any machine."""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from scivi import doctor, extras
from scivi.cli import app

TOLD = {
    "Provides-Extra": ["astro", "nuts", "all"],
    "Requires-Dist": [
        "torch>=2.5",
        "arviz-stats[xarray]<0.9,>=0.8",
        'xarray<2026; python_version < "3.12"',
        'astropy>=6.1; extra == "astro"',
        'nutpie>=0.15; extra == "nuts"',
        'python-libsbml>=5; python_version < "4" and extra == "nuts"',
        'scivi[astro,nuts]; extra == "all"',
    ],
}


@pytest.fixture
def metadata(monkeypatch):
    """Metadata of scivi as above; of the packages, nutpie alone is missing."""
    monkeypatch.setattr(
        extras, "metadata", lambda name: SimpleNamespace(get_all=lambda key, other: TOLD.get(key, other))
    )

    def version(name):
        if name == "nutpie":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(extras, "version", version)


def test_extras_are_read_from_the_metadata(metadata):
    assert extras.required() == {
        "": ["torch", "arviz-stats", "xarray"],
        "astro": ["astropy"],
        "nuts": ["nutpie", "python-libsbml"],
        "all": ["astropy", "nutpie", "python-libsbml"],
    }
    assert extras.extra_of("libsbml") == "nuts"
    assert extras.extra_of("astropy.io.fits") == "astro"
    assert extras.extra_of("torch") is None  # which no extra brings


def test_a_missing_package_is_told_with_what_installs_it(metadata):
    found = doctor.examine()
    one = found["extras"]["nuts"]
    assert one["packages"] == {"nutpie": None, "python-libsbml": "1.0"}
    assert one["missing"] == ["nutpie"]
    shown = list(doctor.lines(found))
    line = next(line for line in shown if line.startswith("[nuts]"))
    assert line.endswith('python-libsbml 1.0; missing nutpie: pip install "scivi[nuts]"')
    assert len({line[: line.index("  ")] for line in shown}) == len(shown)


def test_it_tells_versions_and_devices_as_json():
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert {"python", "scivi", "torch", "pyro-ppl", "xarray", "arviz-stats"} <= set(found["versions"])
    assert found["cpu"]["cores"] >= 1
    assert found["cuda"]["devices"] or found["cuda"]["why"]


def test_it_goes_on_where_torch_and_all_else_are_missing(monkeypatch):
    def nothing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(extras, "metadata", nothing)
    monkeypatch.setattr(extras, "version", nothing)
    monkeypatch.setitem(sys.modules, "torch", None)
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    told = {line.split("  ")[0].strip(): line for line in result.stdout.splitlines()}
    assert told["torch"].endswith("not installed")
    assert "torch cannot be imported" in told["cuda"]
    assert "not installed" in told["extras"]


def test_what_scivi_needs_and_is_missing_is_told(metadata, monkeypatch):
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "xarray" else "1.0")
    found = doctor.examine()
    assert found["missing"] == ["xarray"]
    assert any(line.startswith("missing") and "xarray: pip install" in line for line in doctor.lines(found))


def cards(**answers):
    """A torch with one graphics card, some of whose answers are errors."""

    def answer(name, value):
        def call(*arguments, **named):
            if name in answers:
                raise answers[name]
            return value

        return call

    total = SimpleNamespace(sum=lambda: SimpleNamespace(item=lambda: 8.0))
    cuda = SimpleNamespace(
        mem_get_info=answer("memory", (60 * 10**9, 80 * 10**9)), get_device_name=answer("name", "H200")
    )
    return SimpleNamespace(cuda=cuda, ones=answer("ones", total))


def test_a_graphics_card_is_tried():
    found = doctor._device(cards(), 0)
    assert found["usable"]
    assert doctor._about(found) == "H200, 80 GB, of which 60 are free"
    found = doctor._device(cards(ones=RuntimeError("no kernel image is available\nfor this device")), 1)
    assert found == {"device": "cuda:1", "usable": False, "why": "no kernel image is available"}
    assert doctor._about(found) == "cannot be used: no kernel image is available"
