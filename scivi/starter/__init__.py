"""``scivi new``: a template that runs, its test and a notebook, to begin with.

Their text is in the files beside this one, with ``STARTER`` in the place of the name. They end in .txt, so
that nothing takes them for modules of scivi.
"""

from __future__ import annotations

import keyword
import sys
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

from scivi.errors import TemplateError, listed
from scivi.files import write_atomically

FILES = {  # what is written, by the text that it is made of
    "model.py.txt": "{name}.py",
    "test_model.py.txt": "test_{name}.py",
    "notebook.ipynb.txt": "{name}.ipynb",
}
PLACEHOLDER = "STARTER"


def write(name: str, folder: str | Path = ".") -> list[Path]:
    """Write the three files.

    Args:
        name: of the module.
        folder: made if absent.

    Returns:
        Their paths.

    Raises:
        TemplateError: the name cannot be that of a module, or is that of another; or a file is there already.
            Then nothing is written.
    """
    paths = {text: Path(folder, made.format(name=name)) for text, made in FILES.items()}
    if faults := _faults(name, list(paths.values())):
        raise TemplateError(listed(f'a template cannot be called "{name}":', faults))
    for text, path in paths.items():
        content = (files("scivi.starter") / text).read_text(encoding="utf-8")
        write_atomically(path, content.replace(PLACEHOLDER, name).encode())
    return list(paths.values())


def _faults(name: str, paths: list[Path]) -> list[str]:
    if not name.isidentifier() or keyword.iskeyword(name):
        return ["it must be a Python identifier, such as bird_calls: letters, digits and _, no digit first"]
    if there := [f'"{path}" exists already, and is not overwritten' for path in paths if path.exists()]:
        return there
    if name in sys.modules or find_spec(name) is not None:
        return ["there is a module of that name already, which this one would hide or be hidden by"]
    return []


def next_steps(name: str, folder: str | Path = ".") -> str:
    """What to do next, in three commands."""
    place = "" if Path(folder) == Path() else f', in "{folder}"'
    return (
        f"\nNext{place}:\n"
        f"  scivi check {name}:template\n"
        f"  scivi simulate {name}:template --size site=40 --size visit=5 --out {name}.nc\n"
        f"  scivi fit {name}:template {name}.nc --out results/{name}"
    )
