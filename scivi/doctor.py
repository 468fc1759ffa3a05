"""``scivi doctor``: what is installed, what this machine has, and what installs the rest.

Whatever is missing is told, never raised: it is for machines on which something is wrong.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

from scivi.extras import installed, required
from scivi.version import version

SHOWN = ("torch", "pyro-ppl", "numpy", "xarray", "arviz-base", "arviz-stats", "arviz-plots")


def examine() -> dict[str, Any]:
    """Versions, devices and extras.

    Returns:
        "versions" (None: not installed) and "missing" (what scivi always needs and is not here); "cpu" (cores
        that this process may use, torch's threads, whether steps can be compiled); "cuda" (a list of devices,
        each with memory in bytes and whether a computation on it succeeded; why there is none); "extras"
        (packages with versions, those that are missing, and the command that installs them). JSON holds it.
    """
    found = required()
    versions = {"python": platform.python_version(), "scivi": version()}
    return {
        "versions": {**versions, **{name: installed(name) for name in SHOWN}},
        "missing": [name for name in found.get("", []) if installed(name) is None],
        **_machine(),
        "extras": {extra: _extra(extra, names) for extra, names in found.items() if extra},
    }


def _extra(extra: str, names: list[str]) -> dict[str, Any]:
    packages = {name: installed(name) for name in names}
    missing = [name for name, here in packages.items() if here is None]
    return {"packages": packages, "missing": missing, "install": f'pip install "scivi[{extra}]"'}


def _machine() -> dict[str, Any]:
    """Processor and graphics cards, as torch sees them."""
    has_affinity = hasattr(os, "sched_getaffinity")  # not on every system
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
    cpu: dict[str, Any] = {"cores": cores, "torch_threads": None, "compiler": None}
    try:
        import torch

        from scivi.inference.capture import has_compiler
    except (ImportError, OSError) as error:  # OSError: a library of its own that cannot be loaded
        return {"cpu": cpu, "cuda": {"devices": [], "why": f"torch cannot be imported: {error}"}}
    cpu |= {"torch_threads": torch.get_num_threads(), "compiler": has_compiler()}
    with warnings.catch_warnings(record=True) as told:  # of a driver that does not fit, say
        warnings.simplefilter("always")
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        devices = [_device(torch, k) for k in range(n)]
    why = "" if devices else "no device is seen"
    if torch.version.cuda is None and not devices:
        why = "this torch is built without CUDA"
    why = "; ".join([*filter(None, [why]), *(str(one.message).splitlines()[0] for one in told)])
    return {"cpu": cpu, "cuda": {"devices": devices, "why": why}}


def _device(torch: Any, k: int) -> dict[str, Any]:
    """A graphics card, tried with a small sum."""
    name = f"cuda:{k}"
    try:
        free, memory = torch.cuda.mem_get_info(k)
        about = {"model": torch.cuda.get_device_name(k), "memory": memory, "free": free}
        usable = torch.ones(8, device=name).sum().item() == 8
    except RuntimeError as error:  # in use by another process, out of memory, too old for this torch
        return {"device": name, "usable": False, "why": str(error).splitlines()[0]}
    return {"device": name, **about, "usable": usable, "why": "" if usable else "it adds wrongly"}


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What was found, as lines to print."""
    rows = [(name, here or "not installed") for name, here in found["versions"].items()]
    if found["missing"]:
        rows.append(("missing", f"{', '.join(found['missing'])}: pip install scivi"))
    cpu, cuda = found["cpu"], found["cuda"]
    rows.append(("cpu", f"{cpu['cores']} cores, {cpu['torch_threads'] or 'unknown'} threads of torch"))
    words = {True: "found: steps can be compiled", False: "none (c++, g++ or clang++): steps stay uncompiled"}
    rows.append(("C++ compiler", words.get(cpu["compiler"], "unknown")))
    rows += [(one["device"], _about(one)) for one in cuda["devices"]]
    rows += [("cuda", cuda["why"])] if cuda["why"] else []
    rows += [(f"[{extra}]", _standing(one)) for extra, one in found["extras"].items()]
    if not found["extras"]:
        rows.append(("extras", "unknown: scivi runs from a folder and is not installed"))
    width = max(len(name) for name, _ in rows)
    yield from (f"{name:{width}}  {text}" for name, text in rows)


def _about(device: Mapping[str, Any]) -> str:
    if not device["usable"]:
        return f"cannot be used: {device['why']}"
    return f"{device['model']}, {device['memory'] / 1e9:.0f} GB, of which {device['free'] / 1e9:.0f} are free"


def _standing(extra: Mapping[str, Any]) -> str:
    here = ", ".join(f"{name} {found}" for name, found in extra["packages"].items() if found)
    gone = f"missing {', '.join(extra['missing'])}: {extra['install']}" if extra["missing"] else ""
    return "; ".join(filter(None, [here, gone]))
